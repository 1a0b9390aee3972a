"""How long quantizing takes, and how much memory: our methods and peers on random-weight Llamas.

Every subject rounds the same model to 4 bits in groups of 64 from the same calibration windows, in a process
of its own, one after the other in turns; medians over rounds. Of the project the stage that collects
statistics and rounds is set against the one call of a peer; the whole command, with scores of sensitivity and
the comparison with the source that peers leave out, is given beside it. `gptq-plain` is GPTQ without
asymmetric calibration, which is what peers do; `gptq` carries the source model's inputs along. Environments
of peers lie in one folder as for `quality_per_byte.py`. Refuses to start on a busy machine.

The result is written after each subject. Another run of the same settings goes on with what is there; medians
are those of all rounds. A subject that failed isn't tried again but with --again.

    python benchmarks/compression_time.py [--peers FOLDER] [--sizes 0.5B] [--rounds 3] [--windows 64]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cpu_peers import installed_version
from fit_quality import Subject
from fit_speed import write_text
from machine import add_quiet_option, kept_result, require_quiet, write_result
from quality_per_byte import PEERS, open_subject, run_child
from random_models import write_random_llama

#: name -> (blocks, width, feed-forward width, heads, key heads); vocabulary of 32,000
SIZES = {"110M": (12, 768, 2048, 12, 4), "0.5B": (24, 1024, 4096, 16, 8)}
#: of the result file
NAME = "compression_time"
OWN = ("gptq-plain", "gptq", "gptq+signround")
LENGTH, BITS, GROUP = 512, 4, 64


def seconds_of(name: str, python: str, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One run; what it wrote is removed."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        found = run_child(python, {**settings, "subject": name, "output": str(Path(scratch) / "result")})
    found.pop("output", None)
    found.pop("methods", None)
    return found


def measure(
    size: str, pythons: dict[str, str], rounds: int, windows: int, runs: dict[str, list[dict[str, Any]]]
) -> Iterator[str]:
    """Every subject on one model, as often as `runs` doesn't have it yet; gives its name after each run.

    Parameters
    ----------
    size : str
    pythons : dict of str to str
        By subject.
    rounds, windows : int
    runs : dict of str to list of dict
        By subject; what is found is added.
    """
    todo = [
        name
        for number in range(rounds)
        for name in pythons
        if len(runs.get(name, ())) <= number and not has_failed(runs.get(name, ()))
    ]
    if not todo:
        return
    blocks, hidden, intermediate, heads, kv_heads = SIZES[size]
    with tempfile.TemporaryDirectory(prefix="compression-time-") as name:
        folder = Path(name)
        model = write_random_llama(
            folder / "source", blocks=blocks, hidden=hidden, intermediate=intermediate, heads=heads,
            kv_heads=kv_heads, context=LENGTH,
        )  # fmt: skip
        text = write_text(folder / "text.jsonl")
        opened = open_subject(Subject(size, str(model), str(text), None), folder, windows)
        settings = {
            "bits": BITS, "group": GROUP, "model": str(model), "calibration": str(text), "evaluation": None,
            "sequences": windows, "ids": str(opened.ids), "linears": opened.linears, "steps": None,
            "transposed": opened.transposed,
        }  # fmt: skip
        for subject in todo:
            own = runs.setdefault(subject, [])
            if has_failed(own):
                continue
            own.append(seconds_of(subject, pythons[subject], settings, folder))
            print(size, subject, own[-1], flush=True)
            yield subject


def has_failed(runs: Sequence[dict[str, Any]]) -> bool:
    """Whether one of a subject's runs has."""
    return any("failed" in run for run in runs)


def rows_of(runs: dict[str, dict[str, list[dict[str, Any]]]], windows: int) -> list[dict[str, Any]]:
    """A row for each model and subject."""
    return [
        {"model": size, "subject": subject, "windows": windows, "length": LENGTH, **medians(found)}
        for size, subjects in runs.items()
        for subject, found in subjects.items()
    ]


def medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of every number over the rounds; why the first failed, where one did."""
    failed = next((run for run in runs if "failed" in run), None)
    if failed is not None:
        return {**failed, "runs": runs}
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]} | {"runs": runs}


def show(rows: list[dict[str, Any]]) -> None:
    """One line for each subject."""
    table = Table("model", "subject", "s", "with scores and gate", "peak MiB")
    for row in rows:
        if "failed" in row:
            table.add_row(row["model"], row["subject"], row["failed"], "", "")
            continue
        whole = row.get("seconds_with_scores_and_gate")
        table.add_row(
            row["model"], row["subject"], f"{row['seconds']:.0f}", f"{whole:.0f}" if whole else "",
            f"{row['peak_rss_bytes'] / 2**20:.0f}",
        )  # fmt: skip
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--peers", type=Path, help="folder of the peers' environments")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["0.5B"])
    parser.add_argument("--subjects", nargs="+", choices=[*OWN, *PEERS], help="only these")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--windows", type=int, default=64, help=f"of calibration, {LENGTH} tokens each")
    parser.add_argument("--again", action="store_true", help="measure anew what is there already")
    add_quiet_option(parser)
    arguments = parser.parse_args()
    busy = require_quiet(arguments.even_if_busy)
    pythons = dict.fromkeys(OWN, sys.executable)
    for name, peer in PEERS.items():
        python = None if arguments.peers is None else arguments.peers / peer.environment / "bin" / "python"
        if BITS in peer.bits and python is not None and python.exists():
            pythons[name] = str(python)
    if arguments.subjects:
        pythons = {name: pythons[name] for name in arguments.subjects}
    peers = {
        name: installed_version(pythons[name], peer.package)
        for name, peer in PEERS.items()
        if name in pythons
    }
    settings = {"bits": BITS, "group_size": GROUP, "length": LENGTH, "windows": arguments.windows}
    kept = kept_result(NAME, settings)
    before = kept.get("peers", {})
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in kept.get("rows", ()):
        name = row["subject"]
        asked = arguments.again and row["model"] in arguments.sizes and name in pythons
        if not asked and peers.get(name, before.get(name)) == before.get(name):
            runs.setdefault(row["model"], {})[name] = row["runs"]
    busy = max(busy, kept.get("others_cores", 0.0))
    for size in arguments.sizes:
        own = runs.setdefault(size, {})
        for _ in measure(size, pythons, arguments.rounds, arguments.windows, own):
            rows = rows_of(runs, arguments.windows)
            write_result(
                NAME,
                {"others_cores": busy, "peers": before | peers, "settings": settings, "rows": rows},
            )
    show(rows_of(runs, arguments.windows))


if __name__ == "__main__":
    main()
