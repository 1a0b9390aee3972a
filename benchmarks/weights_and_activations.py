"""What folds do for weights and inputs that are both rounded, on every language model at hand.

Each model is compressed uniformly with 8-bit weights (symmetric, one group per row, to the nearest, also
beside the largest inputs in 16 bits) and with 4-bit weights (groups of 64, GPTQ; integers and FP4; integers
behind learned matrices), embedding and head at 16 bits; with inputs as they are and with all of them rounded
to bytes, with scales of each token's own or fixed beforehand, to FP8 and to 4 bits; without a fold and behind
each. KL in nats per token on held-out text. One more model computes what python-7m does, with every 16th
channel behind a norm 32 times larger.

Each number is written as soon as it is there. What the file of results has already, for the same recipe and
as many calibration windows, isn't measured again.

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
from tailorbird.model.weights import Weights
from tailorbird.model.writing import write_tensors

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
    "exact": "kl_exact_inputs", "int8": "kl_rounded_inputs", "int8-static": "kl_static_inputs",
    "fp8": "kl_fp8_inputs", "int4": "kl_int4_inputs",
}  # fmt: skip
NAME = "weights_and_activations"
#: the model whose channels are made unequal, every so many by a factor, and what reads them
UNEVEN, EVERY, FACTOR = "python-7m", 16, 32
READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


def uneven(subject: Subject, folder: Path) -> Subject:
    """The same function, whose norms leave some channels far larger than others, in `folder`."""
    source = Path(subject.model)
    for file in source.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    stored = Weights.open(source)
    tensors = {name: stored.read(name) for name in stored.names}
    for name, tensor in tensors.items():
        if name.endswith("layernorm.weight"):
            tensor[::EVERY] *= FACTOR
        elif any(f".{reader}." in name for reader in READERS):
            tensor[:, ::EVERY] /= FACTOR
    write_tensors(folder / "model.safetensors", tensors, hashes=False)
    name = f"{subject.name}, channels x {FACTOR}"
    return Subject(name, str(folder), subject.calibration, subject.held_out)


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
    with tempfile.TemporaryDirectory(prefix="weights-and-activations-") as folder:
        known = subjects(arguments.assets)
        known += [uneven(subject, Path(folder)) for subject in known if subject.name == UNEVEN]
        for subject in known:
            if arguments.only and subject.name not in arguments.only:
                continue
            for weights, fold in itertools.product(arguments.weights, arguments.folds):
                method, coding = WEIGHTS[weights]
                recipe = f"{method}:{coding}" if fold == "none" else f"{fold}+{method}:{coding}"
                key = {
                    "model": subject.name, "weights": weights, "fold": fold, "recipe": recipe,
                    "sequences": SEQUENCES,
                }  # fmt: skip
                made = next((row for row in rows if key.items() <= row.items()), None)
                if made is None:
                    made = key
                    rows.append(made)
                for inputs in arguments.inputs:
                    if INPUTS[inputs] not in made:
                        made[INPUTS[inputs]] = divergence(subject, recipe, inputs)
                        write_result(NAME, {"rows": rows})
    table = Table("model", "weights", "fold", *(f"KL, {inputs} inputs" for inputs in INPUTS))
    for row in rows:
        found = (f"{row[field]:.4g}" if field in row else "" for field in INPUTS.values())
        table.add_row(row["model"], row["weights"], row["fold"], *found)
    Console().print(table)


if __name__ == "__main__":
    main()
