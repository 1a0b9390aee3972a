"""What folds do for weights and inputs that are both rounded, on every language model at hand.

Each model is compressed uniformly with 8-bit weights (symmetric, one group per row, to the nearest, also
beside the largest inputs in 16 bits) and with 4-bit weights (groups of 64, GPTQ; integers and FP4; integers
behind learned matrices), embedding and head at 16 bits; with inputs as they are and with all of them rounded
to bytes, FP8 and 4 bits; without a fold and behind each. KL in nats per token on held-out text. Other numbers
that the file of results has already stay.

    python benchmarks/weights_and_activations.py [--only MODEL ...] [--weights LABEL ...] [--folds NAME ...]
                                                 [--inputs NAME ...]
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import tailorbird
from fit_quality import ASSETS, SEQUENCES, Subject, subjects
from machine import RESULTS, write_result
from tailorbird.errors import GateRefused
from tailorbird.model.json_file import read_json

#: what the weights become -> method, coding
WEIGHTS = {
    "int8 row": ("rtn", "bits=8,group=0,symmetric=true"),
    "int8 row, inputs apart": ("llm-int8", "bits=8,group=0,symmetric=true"),
    "int4 g64": ("gptq", "bits=4,group=64,asymmetric=false"),
    "int4 g64, matrices": ("rtn+flatquant", "bits=4,group=64"),
    "fp4 g64": ("gptq", "codebook=fp4,group=64,asymmetric=false"),
}
FOLDS = ("none", "smoothing", "fptq", "awq", "outliertune")
#: what inputs are rounded to -> field of a row
INPUTS = {
    "exact": "kl_exact_inputs", "int8": "kl_rounded_inputs", "fp8": "kl_fp8_inputs", "int4": "kl_int4_inputs",
}  # fmt: skip
NAME = "weights_and_activations"


def divergence(subject: Subject, recipe: str, inputs: str) -> float:
    """KL of the result, whether or not the gate liked it."""
    recipe, activations = (
        (recipe, "exact") if inputs == "exact" else (f"{recipe},activation={inputs}", "auto")
    )
    with tempfile.TemporaryDirectory(prefix="weights-and-activations-") as folder:
        try:
            result = tailorbird.compress(
                subject.model, Path(folder) / "out", recipe=recipe, calibration=subject.calibration,
                evaluation=subject.held_out, sequences=SEQUENCES, measure_speed=False, measure_spread=False,
                activations=activations,
            )  # fmt: skip
        except GateRefused as refusal:
            result = refusal.result  # type: ignore[attr-defined]
        return float(result.kl_mean)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--assets", type=Path, default=ASSETS)
    parser.add_argument("--only", nargs="+", help="names of models")
    parser.add_argument("--weights", nargs="+", choices=list(WEIGHTS), default=list(WEIGHTS))
    parser.add_argument("--folds", nargs="+", choices=FOLDS, default=list(FOLDS))
    parser.add_argument("--inputs", nargs="+", choices=list(INPUTS), default=list(INPUTS))
    arguments = parser.parse_args()
    stored = RESULTS / f"{NAME}.json"
    rows: list[dict[str, Any]] = read_json(stored)["rows"] if stored.exists() else []
    for subject in subjects(arguments.assets):
        if arguments.only and subject.name not in arguments.only:
            continue
        for weights, fold in itertools.product(arguments.weights, arguments.folds):
            method, coding = WEIGHTS[weights]
            recipe = f"{method}:{coding}" if fold == "none" else f"{fold}+{method}:{coding}"
            key = {"model": subject.name, "weights": weights, "fold": fold}
            made = next((row for row in rows if key.items() <= row.items()), key)
            rows = [row for row in rows if row is not made] + [made]
            for inputs in arguments.inputs:
                made[INPUTS[inputs]] = divergence(subject, recipe, inputs)
                write_result(NAME, {"rows": rows})
    table = Table("model", "weights", "fold", *(f"KL, {inputs} inputs" for inputs in INPUTS))
    for row in rows:
        found = (f"{row[field]:.4g}" if field in row else "" for field in INPUTS.values())
        table.add_row(row["model"], row["weights"], row["fold"], *found)
    Console().print(table)


if __name__ == "__main__":
    main()
