"""Where an adapter begins on a packed model: held-out loss at the start and after tuning, for every start.

The model's linears are rounded to nearest at 2 and 3 bits, embedding and head stay. A cell is one start on
one of them, in a process of its own, with the same rows in the same order for all. As a start that learns
reads about as much as the tuning itself, plain LoRA stands there with twice the steps, too. Each finished
cell is a file of its own below `results/quantized_starts`, with what its numbers depend on; what is there
isn't run again, unless it is of other conditions and `--refresh` is given.

    python benchmarks/quantized_starts.py [--model demo] [--bits 2 3] [--start plain eora ...] [--refresh]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from machine import RESULTS, write_result
from packed_models import round_plainly
from tune_methods import BATCH, LENGTH, STEPS, conditions, prepare, run_cell, to_run

CELLS = "quantized_starts"
GROUP = 64
#: Tuning without a start, by the names of cells: steps of it.
PLAIN = {"plain": STEPS, "plain-twice": 2 * STEPS}


def starts() -> list[str]:
    """Names of all cells of a model."""
    from tailorbird import api

    return [*PLAIN, *(row.name for row in api.methods(family="start"))]


def settings_of(cell: str, model: str) -> dict[str, Any]:
    """Arguments of `tailorbird.tune` that a cell has for its own."""
    if cell in PLAIN:
        return {"steps": PLAIN[cell], "evaluate_every": PLAIN[cell] // 2}
    return {"steps": STEPS, "evaluate_every": STEPS // 2, "init": cell, "source": model}


def run_cells(model: str, bits: int, chosen: list[str], again: bool, refresh: bool) -> None:
    """Those of one packed model that aren't there or are of other conditions, or all that are asked for."""
    from tailorbird.model.location import locate

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        packed = round_plainly(Path(locate(model)), folder / "packed", bits, GROUP, int8=False, ends=False)
        learned, held_out = prepare("bodies", model, Path(), folder)
        for cell in chosen:
            label = f"{CELLS}/{Path(model).name}/{bits}-bits/{cell}"
            output = folder / cell
            settings = {
                "model": str(packed), "data": str(learned), "validation": str(held_out),
                "output": str(output), "batch": BATCH, "length": LENGTH, **settings_of(cell, model),
            }  # fmt: skip
            rounded = f"{Path(model).name}, {bits} bits, groups of {GROUP}"
            now = conditions(settings, rounded, (learned, held_out))
            if not again and not to_run(label, now, refresh):
                continue
            found = run_cell(settings)
            if "failed" not in found:
                looks = json.loads((output / "history.json").read_text())["looks"]
                found["loss_at_start"] = looks[0]["loss"]
            (RESULTS / label).parent.mkdir(parents=True, exist_ok=True)
            write_result(label, {"bits": bits, "group_size": GROUP, "conditions": now, **found})
            print(label, found.get("loss_at_start"), found.get("loss_after", found.get("failed")), flush=True)


def show(model: str, bits: int) -> None:
    """The table of one packed model, least loss first."""
    folder = RESULTS / CELLS / Path(model).name / f"{bits}-bits"
    cells = {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}
    done = {name: cell for name, cell in cells.items() if cell.get("loss_after") is not None}
    columns = ("start", "packed alone", "at the start", "after tuning", "steps")
    table = Table(*columns, title=f"{model}, {bits} bits")
    for name, cell in sorted(done.items(), key=lambda item: item[1]["loss_after"]):
        losses = (f"{cell[key]:.3f}" for key in ("loss_before", "loss_at_start", "loss_after"))
        table.add_row(name, *losses, str(cell["steps"]))
    Console(width=100).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", default="demo")
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 3])
    parser.add_argument("--start", nargs="+", help="cells to run; all that aren't there if not given")
    parser.add_argument("--refresh", action="store_true", help="run cells of other conditions anew, too")
    arguments = parser.parse_args()
    for bits in arguments.bits:
        chosen = arguments.start or starts()
        run_cells(arguments.model, bits, chosen, bool(arguments.start), arguments.refresh)
        show(arguments.model, bits)


if __name__ == "__main__":
    main()
