"""One checkpoint of 8 bits read at fewer: the KL at each width, beside checkpoints made for that width alone.

Groups of 64 without zero points; embedding and head stay as they are. Every checkpoint is made by `compress`
and read by `evaluate` at 8, 6, 4 and 2 bits on one excerpt of held-out text.

    python benchmarks/nested_bits.py [--assets DIR] [--only MODEL ...]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import tailorbird
from fit_quality import ASSETS, Subject, subjects
from machine import write_result
from tailorbird.errors import GateRefused
from tailorbird.formats.nested import WIDTHS

RECIPES = (
    "gptq:bits=8,group=64,symmetric=true",
    *(f"double-rounding:bits=8,group=64,balance={balance}" for balance in (1.0, 0.5, 0.25)),
    *(f"gptq:bits={bits},group=64,symmetric=true" for bits in (6, 4, 2)),
)
SEQUENCES = 32
#: characters of the excerpt
CHARACTERS = 100_000


def made(subject: Subject, recipe: str, text: Path, output: Path) -> str:
    """The directory of the result, whether or not the gate likes it."""
    try:
        return tailorbird.compress(
            subject.model, output, recipe=recipe, calibration=subject.calibration, evaluation=str(text),
            sequences=SEQUENCES, activations="exact", measure_speed=False, measure_spread=False,
        ).output  # fmt: skip
    except GateRefused as refused:
        return str(refused.result.output)


def run(subject: Subject) -> list[dict[str, Any]]:
    """All checkpoints of one model at all widths that they have."""
    assert subject.held_out is not None
    rows = []
    with tempfile.TemporaryDirectory(prefix="nested-") as name:
        text = Path(name) / "held_out.txt"
        text.write_text(Path(subject.held_out).read_text(encoding="utf-8")[:CHARACTERS], encoding="utf-8")
        for number, recipe in enumerate(RECIPES):
            directory = made(subject, recipe, text, Path(name) / str(number))
            for bits in WIDTHS if "bits=8" in recipe else (None,):
                found = tailorbird.evaluate(directory, text=str(text), reference=subject.model, bits=bits)
                rows.append({"model": subject.name, "recipe": recipe, "read_at": bits, "kl": found.kl_mean})
                print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--assets", type=Path, default=ASSETS)
    parser.add_argument("--only", nargs="+", help="names of models")
    parser.add_argument("--name", default="nested_bits", help="name of the result file")
    arguments = parser.parse_args()
    rows = []
    for subject in subjects(arguments.assets):
        if subject.held_out is not None and (not arguments.only or subject.name in arguments.only):
            rows += run(subject)
    write_result(arguments.name, {"rows": rows})
    table = Table("model", "recipe", "read at", "KL")
    for row in rows:
        table.add_row(row["model"], row["recipe"], str(row["read_at"] or "as it is"), f"{row['kl']:.3g}")
    Console().print(table)


if __name__ == "__main__":
    main()
