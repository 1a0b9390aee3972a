"""Tuning on the CPU: tokens per second and memory beside PEFT's adapters in a plain PyTorch loop.

A random 110 M Llama in bfloat16. Every subject is a process of its own, each round runs all of them in turn
and medians count. LoRA of rank 8 on every linear, and on query and value projections alone; rows of 4 x 256
tokens, and of 1 x 1,024. The same adapter on the model at 4 bits stands beside them, and, where their
environment is given, TRL's SFTTrainer and PEFT on bitsandbytes' NF4. Memory is the most that was resident,
less what was resident once the model was loaded and every weight had been touched.

The result is written after each measurement. Another run of the same settings goes on with what is there:
medians are those of all rounds.

    python -m venv PEERS; PEERS/bin/pip install torch transformers peft trl bitsandbytes
    python benchmarks/tune_speed.py [PEERS] [--rounds 3] [--steps 6] [--again]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from machine import add_quiet_option, kept_result, require_quiet, write_result
from tune_child import RANK, TARGETS

CHILD = Path(__file__).with_name("tune_child.py")
BATCHES = ((4, 256), (1, 1024))
SUBJECTS = ("peft", "tailorbird", "tailorbird 4 bits", "forward")
#: Those that run in the peers' environment.
PEERS = ("trl", "bitsandbytes")
GROUP = 64
#: Of the random model.
MODEL = {"blocks": 12, "hidden": 768, "intermediate": 2048, "heads": 12, "kv_heads": 4, "context": 2048}


def measure(
    python: str, subject: str, model: Path, targets: str, batch: tuple[int, int], steps: int
) -> dict[str, Any]:
    """One subject in a process of its own."""
    command = [python, str(CHILD), subject, str(model), targets, *map(str, batch), str(steps)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise SystemExit(f"{subject} failed:\n{ran.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


def summary(runs: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
    """Medians over the rounds that are there."""
    speed = [tokens / statistics.median(run["seconds"]) for run in runs]
    above = [run["peak_bytes"] - run["loaded_bytes"] for run in runs]
    return {
        "tokens_per_s": statistics.median(speed), "bytes_above_weights": statistics.median(above),
        "rounds": speed, "runs": runs,
    }  # fmt: skip


def cells_in(kept: dict[str, Any], anew: Container[str]) -> list[dict[str, Any]]:
    """Every cell with the rounds that are there already, but for subjects that are measured anew."""
    cells = []
    for batch in BATCHES:
        for targets in TARGETS:
            own: dict[str, Any] = next(
                (
                    cell["subjects"]
                    for cell in kept.get("cells", ())
                    if (tuple(cell["batch"]), cell["targets"]) == (batch, targets)
                ),
                {},
            )
            found = {subject: one for subject, one in own.items() if subject not in anew}
            cells.append({"batch": list(batch), "targets": targets, "subjects": found})
    return cells


def missing(
    cells: list[dict[str, Any]], subjects: Sequence[str], rounds: int
) -> list[tuple[dict[str, Any], str]]:
    """Cells and subjects in the order in which they are measured; every other round goes backwards."""
    return [
        (cell, subject)
        for cell in cells
        for number in range(rounds)
        for subject in (subjects if number % 2 == 0 else reversed(subjects))
        if len(cell["subjects"].get(subject, {}).get("runs", ())) <= number
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("peers", type=Path, nargs="?", help="an environment with trl and bitsandbytes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="of each round, after one that isn't counted")
    parser.add_argument("--name", default="tune_speed", help="of the result file; empty writes none")
    parser.add_argument("--again", action="store_true", help="measure anew what is there already")
    add_quiet_option(parser)
    arguments = parser.parse_args()
    others = require_quiet(arguments.even_if_busy)
    python = dict.fromkeys(SUBJECTS, sys.executable)
    if arguments.peers:
        python |= dict.fromkeys(PEERS, str(arguments.peers / "bin" / "python"))
    settings = {"steps": arguments.steps, "group_size": GROUP, "model": MODEL}
    kept = kept_result(arguments.name, settings) if arguments.name else {}
    others = max(others, kept.get("others_cores", 0.0))
    cells = cells_in(kept, python if arguments.again else ())
    todo = missing(cells, list(python), arguments.rounds)
    with tempfile.TemporaryDirectory() as folder:
        models = make_models(Path(folder)) if todo else {}
        for cell, subject in todo:
            model, batch = models["4 bits" if subject.endswith("bits") else "bf16"], tuple(cell["batch"])
            found = measure(python[subject], subject, model, cell["targets"], batch, arguments.steps)
            runs = [*cell["subjects"].get(subject, {}).get("runs", ()), found]
            cell["subjects"][subject] = summary(runs, math.prod(batch))
            speed = cell["subjects"][subject]["rounds"][-1]
            rows = "{} x {}".format(*batch)
            print(
                f"{rows}, {cell['targets']}, {subject}, round {len(runs)}: {speed:.0f} tokens/s", flush=True
            )
            if arguments.name:
                there = [one for one in cells if one["subjects"]]
                write_result(
                    arguments.name,
                    {"others_cores": others, "rank": RANK, "settings": settings, "cells": there},
                )
    show(cells)


def make_models(folder: Path) -> dict[str, Path]:
    """The model, and the same at 4 bits."""
    from packed_models import round_plainly
    from random_models import write_random_llama

    source = write_random_llama(folder / "bf16", **MODEL)
    return {"bf16": source, "4 bits": round_plainly(source, folder / "4", 4, GROUP, int8=False)}


def show(cells: list[dict[str, Any]]) -> None:
    """The table."""
    table = Table("rows", "targets", "subject", "tokens/s", "of PEFT", "MB above weights", "of PEFT")
    for cell in cells:
        base = cell["subjects"]["peft"]
        for subject, found in cell["subjects"].items():
            table.add_row(
                "{} x {}".format(*cell["batch"]), cell["targets"], subject, f"{found['tokens_per_s']:.0f}",
                f"{found['tokens_per_s'] / base['tokens_per_s']:.2f}",
                f"{found['bytes_above_weights'] / 1e6:.0f}",
                f"{found['bytes_above_weights'] / base['bytes_above_weights']:.2f}",
            )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
