"""What rounding the inputs of linears to bytes adds to the loss, on every language model at hand.

Each model is compressed uniformly by second-order rounding, once with exact inputs and once as `fit` does by
default, which lets as many linears round their inputs as are predicted to cost a tenth of what the weights
cost, or 5e-4 nats per token. The added KL is held against that.

    python benchmarks/rounded_inputs.py [--bits 2 3 4 8] [--only MODEL ...]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import tailorbird
from fit_quality import ASSETS, SEQUENCES, Subject, subjects
from machine import write_result
from tailorbird.errors import GateRefused
from tailorbird.plan.inputs import LEAST_KL, SHARE
from tailorbird.plan.planfile import load_plan


def compress(subject: Subject, output: Path, bits: int, activations: str) -> tuple[Any, Path]:
    """The result, whether or not the gate liked it, and where it lies."""
    try:
        result = tailorbird.compress(
            subject.model, output, recipe=f"gptq:bits={bits},group=64,embedding_bits={bits}",
            calibration=subject.calibration, evaluation=subject.held_out, sequences=SEQUENCES,
            measure_speed=False, measure_spread=False, activations=activations,
        )  # fmt: skip
    except GateRefused as refusal:
        result = refusal.result
    return result, Path(result.output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--assets", type=Path, default=ASSETS)
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 3, 4, 8])
    parser.add_argument("--only", nargs="+", help="names of models")
    parser.add_argument("--name", default="rounded_inputs", help="name of the result file")
    arguments = parser.parse_args()
    console = Console()
    rows = []
    for subject in subjects(arguments.assets):
        if arguments.only and subject.name not in arguments.only:
            continue
        for bits in arguments.bits:
            with tempfile.TemporaryDirectory(prefix="rounded-inputs-") as folder:
                exact, _ = compress(subject, Path(folder) / "exact", bits, "exact")
                rounded, output = compress(subject, Path(folder) / "auto", bits, "auto")
                plan = load_plan(output / "plan.yaml")
            allowed = max(SHARE * exact.kl_mean, LEAST_KL)
            rows.append(
                {
                    "model": subject.name, "bits": bits,
                    "kl_exact": exact.kl_mean, "kl_rounded": rounded.kl_mean,
                    "added": rounded.kl_mean - exact.kl_mean, "allowed": allowed,
                    "kept": rounded.kl_mean - exact.kl_mean <= allowed,
                    "places_rounded": sum(place.activation is not None for place in plan.places),
                    "places": len(plan.places),
                }
            )  # fmt: skip
            write_result(arguments.name, {"rows": rows, "all_kept": all(row["kept"] for row in rows)})
    table = Table("model", "bits", "KL, exact inputs", "added", "allowed", "places", "kept")
    for row in rows:
        table.add_row(
            row["model"], str(row["bits"]), f"{row['kl_exact']:.4g}", f"{row['added']:+.2g}",
            f"{row['allowed']:.2g}", f"{row['places_rounded']} of {row['places']}",
            "yes" if row["kept"] else "no",
        )  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    main()
