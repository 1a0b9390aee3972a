"""Serving beside other engines on the CPU: the same requests, continuous batching everywhere, in turns.

Two mixes of random prompts: short ones, with lengths like those of ShareGPT's conversations (log-normal,
median prompt 60 and answer 100 tokens, cut at 1,024 and 400), and long ones (512 to 2,048 tokens, answers of
32 to 96). Each is run at saturation, 16 requests at once, and with Poisson arrivals of half as many requests,
at 60 % of the rate that the slowest engine reached then. Every engine runs in a process and an environment of
its own (`cpu_peers.py` says how these are made; OpenVINO's needs `openvino-genai` too) at its own 4 bits,
transformers in bf16; greedy, two threads, steps of at most 512 tokens. Tokens per second count prompts and
answers; medians over the rounds, and medians of the ratios of each round.

No prompt is sent twice, since tailorbird's cache of prompts is always on and the others' are off: mix, way
and round together are the seed of a load. Engines say how many tokens of prompts they found in a cache, and
any stop the run. What is measured is kept, and a run goes on where the last one was stopped.

Last, one sequence of our 4 bits is written by `tailorbird generate`'s own loop, by the engine and through
HTTP, in turns. With `--single` that is all, and no other engine is needed.

    python benchmarks/serve_throughput.py FOLDER [--models 110M] [--requests 32] [--rounds 3]
    python benchmarks/serve_throughput.py --single
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cpu_peers import GROUPS, Entry, Process, installed_version, prepare, pythons
from cpu_speed import SIZES, read_bandwidth
from machine import add_quiet_option, kept_result, require_quiet, write_result
from packed_models import round_plainly
from random_models import write_random

SEQUENCES = 16
FORMATS = ("transformers bf16", "tailorbird 4 bits", "llama.cpp q4_0", "openvino int4")
WAYS = ("saturation", "arrivals")
#: Goals: engine -> ratio of our throughput at saturation to its.
GOALS = {"transformers": 2.0, "llama.cpp": 1.3, "openvino": 1.1}
#: Share of the slowest engine's rate at which requests arrive, and the share of requests that do.
ARRIVALS, ARRIVING = 0.6, 0.5
#: Random tokens are below this number.
VOCABULARY = 32_000
#: What writes one sequence; goal: how fast the engine is beside the first.
SINGLE, SINGLE_GOAL = ("generate", "tailorbird", "http"), 0.9
SINGLE_PROMPT, SINGLE_NEW, SINGLE_ROUNDS = 64, 256, 7

Load = list[tuple[float, list[int], int]]


def short_mix(count: int, rng: random.Random) -> Load:
    """Lengths like those of conversations."""
    found = []
    for _ in range(count):
        prompt = min(1024, max(4, round(rng.lognormvariate(4.1, 1.0))))
        found.append((0.0, tokens(prompt, rng), min(400, max(4, round(rng.lognormvariate(4.6, 0.8))))))
    return found


def long_mix(count: int, rng: random.Random) -> Load:
    """Long prompts, short answers."""
    return [(0.0, tokens(rng.randrange(512, 2049), rng), rng.randrange(32, 97)) for _ in range(count)]


MIXES = {"short": short_mix, "long": long_mix}


def tokens(count: int, rng: random.Random) -> list[int]:
    """A random prompt."""
    return [rng.randrange(3, VOCABULARY) for _ in range(count)]


def arriving(load: Load, per_second: float, rng: random.Random) -> Load:
    """The same requests, one after the other as a Poisson process."""
    at, found = 0.0, []
    for _, prompt, new in load:
        at += rng.expovariate(per_second)
        found.append((at, prompt, new))
    return found


def warm_up() -> Load:
    """What every engine reads and writes before anything counts."""
    return short_mix(SEQUENCES, random.Random("warm-up"))


def requests_of(mix: str, way: str, requests: int) -> int:
    """How many requests a load has: of long ones half as many, but enough to run 16 at once."""
    count = requests if mix == "short" else max(SEQUENCES, requests // 2)
    return count if way == "saturation" else max(1, round(ARRIVING * count))


def load_of(cell: dict[str, Any], number: int) -> Load:
    """The requests of a round, whose prompts no other load has."""
    rng = random.Random(f"{cell['mix']}, {cell['way']}, round {number}")
    load = MIXES[cell["mix"]](cell["requests"], rng)
    return load if cell["way"] == "saturation" else arriving(load, cell["per_second"], rng)


@contextmanager
def started(entries: Sequence[Entry], python: dict[str, str], sequences: int) -> Iterator[dict[str, Process]]:
    """A process for each entry, by its name; all are gone at the end."""
    processes: dict[str, Process] = {}
    try:
        for entry in entries:
            processes[entry.name] = Process(entry, python[entry.engine], "serve_child.py", str(sequences))
        yield processes
    finally:
        for process in processes.values():
            process.end()


def served(process: Process, load: Load) -> list[list[float]]:
    """Times of every request's tokens; stops where a cache knew a prompt."""
    answer = json.loads(process.ask(json.dumps([load, SEQUENCES])))
    if answer["cached_tokens"]:
        raise SystemExit(
            f"{process.entry.name} found {answer['cached_tokens']} tokens of prompts in a cache · expected: "
            "none · let the seeds of the loads differ"
        )
    times: list[list[float]] = answer["times"]
    return times


def summarize(load: Load, times: list[list[float]]) -> dict[str, float]:
    """Rates and waiting times of one run."""
    end = max(one[-1] for one in times)
    written, read = sum(map(len, times)), sum(len(prompt) for _, prompt, _ in load)
    firsts = sorted(one[0] - at for (at, _, _), one in zip(load, times, strict=True))
    gaps = sorted(b - a for one in times for a, b in itertools.pairwise(one))
    return {
        "output_tokens_per_s": written / end,
        "all_tokens_per_s": (written + read) / end,
        "requests_per_s": len(load) / end,
        "first_token_median_s": statistics.median(firsts),
        "first_token_p99_s": firsts[int(0.99 * (len(firsts) - 1))],
        "between_tokens_median_s": statistics.median(gaps),
        "between_tokens_p99_s": gaps[int(0.99 * (len(gaps) - 1))],
    }


def cells_in(kept: dict[str, Any], models: Sequence[str], requests: int) -> list[dict[str, Any]]:
    """Every model, mix and way, with the runs of each engine that are there."""
    there = {(cell["model"], cell["mix"], cell["way"]): cell for cell in kept.get("cells", [])}
    found = []
    for model, mix, way in itertools.product(models, MIXES, WAYS):
        fresh = {"model": model, "mix": mix, "way": way, "requests": requests_of(mix, way, requests)}
        found.append(there.get((model, mix, way), fresh | {"engines": {}}))
    return found


def missing(cell: dict[str, Any], names: Sequence[str], rounds: int) -> list[tuple[int, str]]:
    """Rounds and engines in the order in which they are measured; every other round goes backwards."""
    return [
        (number, name)
        for number in range(rounds)
        for name in (names if number % 2 else reversed(names))
        if len(cell["engines"].get(name, {}).get("rounds", ())) <= number
    ]


def slowest(cells: Sequence[dict[str, Any]], cell: dict[str, Any]) -> float:
    """Requests per second of the slowest engine at saturation, for the same model and mix."""
    (same,) = (
        other
        for other in cells
        if (other["model"], other["mix"], other["way"]) == (cell["model"], cell["mix"], "saturation")
    )
    return min(engine["requests_per_s"] for engine in same["engines"].values())


def add_round(cell: dict[str, Any], name: str, run: dict[str, float]) -> None:
    """One more run of an engine: medians over all, and ours beside the others'."""
    rounds = [*cell["engines"].get(name, {}).get("rounds", ()), run]
    median = {key: statistics.median(one[key] for one in rounds) for key in run}
    cell["engines"][name] = median | {"rounds": rounds}
    cell["compared"] = compare(cell)


def compare(cell: dict[str, Any]) -> list[dict[str, Any]]:
    """Ours beside each of the others: medians of the ratios of each round."""

    def ratio(peer: dict[str, Any], key: str) -> float:
        pairs = zip(ours["rounds"], peer["rounds"], strict=False)
        return statistics.median(mine[key] / its[key] for mine, its in pairs)

    ours = next((cell["engines"][name] for name in cell["engines"] if name.startswith("tailorbird")), None)
    found = []
    for name, peer in cell["engines"].items():
        engine = name.split()[0]
        if ours is None or engine == "tailorbird":
            continue
        goal = GOALS[engine] if cell["way"] == "saturation" else None
        found.append(
            {
                "peer": name, "throughput_ratio": ratio(peer, "all_tokens_per_s"), "goal": goal,
                "between_tokens_p99_ratio": ratio(peer, "between_tokens_p99_s"),
                "first_token_median_ratio": ratio(peer, "first_token_median_s"),
            }
        )  # fmt: skip
    return found


def measure(arguments: argparse.Namespace, busy: float, console: Console) -> list[dict[str, Any]]:
    """All cells, measured as far as they aren't there; in each round every engine gets the same requests."""
    python = pythons(arguments.peers)
    versions = {
        engine: installed_version(python[engine], package)
        for engine, package in (("llama.cpp", "llama-cpp-python"), ("openvino", "openvino-genai"))
        if engine in python
    }
    settings = {
        "requests": arguments.requests, "sequences": SEQUENCES, "arrivals": ARRIVALS, "arriving": ARRIVING,
        "prompts": "each sent once", "peers": versions,
    }  # fmt: skip
    kept = kept_result(arguments.name, settings)
    cells, alone = cells_in(kept, arguments.models, arguments.requests), kept.get("single", {})
    names = [name for name in FORMATS if name.split()[0] in python]
    found = {
        "others_cores": max(busy, kept.get("others_cores", 0.0)), "settings": settings,
        "read_bandwidth": kept.get("read_bandwidth") or read_bandwidth(), "single": alone,
    }  # fmt: skip

    def keep() -> None:
        there = [cell for cell in kept.get("cells", []) if cell["model"] not in arguments.models]
        there += [cell for cell in cells if cell["engines"]]
        write_result(arguments.name, found | {"cells": there})

    for size in arguments.models:
        own = [cell for cell in cells if cell["model"] == size]
        if any(missing(cell, names, arguments.rounds) for cell in own):
            with tempfile.TemporaryDirectory(prefix="serve-") as folder:
                entries = [e for e in prepare(size, Path(folder), python, console) if e.name in names]
                with started(entries, python, SEQUENCES) as processes:
                    for process in processes.values():
                        served(process, warm_up())
                    for cell in own:
                        if cell["way"] == "arrivals" and "per_second" not in cell:
                            cell["per_second"] = ARRIVALS * slowest(cells, cell)
                        for number, name in missing(cell, names, arguments.rounds):
                            load = load_of(cell, number)
                            run = summarize(load, served(processes[name], load))
                            add_round(cell, name, run)
                            keep()
                            console.print(
                                f"{size}, {cell['mix']}, {cell['way']}, round {number}, {name}: "
                                f"{run['all_tokens_per_s']:.0f} tokens/s"
                            )
        if size not in alone:
            alone[size] = single(size, SINGLE_ROUNDS, console)
            keep()
    return cells


def show(cells: Sequence[dict[str, Any]], console: Console) -> None:
    """The table, and our ratios."""
    table = Table(
        "model", "mix", "way", "engine", "tokens/s", "written/s", "first token p50", "between p50 / p99 ms"
    )
    for cell in cells:
        for name, row in cell["engines"].items():
            between = f"{1e3 * row['between_tokens_median_s']:.1f} / {1e3 * row['between_tokens_p99_s']:.0f}"
            table.add_row(
                cell["model"], cell["mix"], cell["way"], name, f"{row['all_tokens_per_s']:.0f}",
                f"{row['output_tokens_per_s']:.0f}", f"{row['first_token_median_s']:.2f} s", between,
            )  # fmt: skip
    console.print(table)
    for cell in cells:
        for pair in cell.get("compared", ()):
            console.print({"mix": cell["mix"], "way": cell["way"], **pair})


def single(size: str, rounds: int, console: Console) -> dict[str, Any]:
    """One sequence at a time, by each in turns, with a prompt of its own in every round."""
    python = dict.fromkeys(SINGLE, sys.executable)
    seconds: dict[str, list[float]] = {name: [] for name in SINGLE}
    with tempfile.TemporaryDirectory(prefix="serve-") as folder:
        source = write_random(SIZES[size], Path(folder) / "source", context=8192)
        path = round_plainly(source, Path(folder) / "4-bits", 4, GROUPS[4])
        entries = [Entry(name, "4 bits", 4, str(path)) for name in SINGLE]
        with started(entries, python, 1) as processes:
            turns = list(zip(SINGLE, processes.values(), strict=True))
            for number in range(-2, rounds):  # both orders warm up
                rng = random.Random(f"single, round {number}")
                load: Load = [(0.0, tokens(SINGLE_PROMPT, rng), SINGLE_NEW)]
                for name, process in turns[:: 1 if number % 2 else -1]:
                    (times,) = served(process, load)
                    if number >= 0:
                        seconds[name].append(times[-1])
    rows = {}
    for name in SINGLE:
        pairs = zip(seconds["generate"], seconds[name], strict=True)
        ratio = statistics.median(alone / its for alone, its in pairs)
        rate = statistics.median(SINGLE_NEW / its for its in seconds[name])
        rows[name] = {"tokens_per_s": rate, "of_generate": ratio, "seconds": seconds[name]}
        console.print(f"{size}, one sequence, {name}: {rate:.0f} tokens/s, {ratio:.3f} of generate")
    reached = rows["tailorbird"]["of_generate"] >= SINGLE_GOAL
    console.print(f"goal of the engine: {SINGLE_GOAL:g}, {'reached' if reached else 'missed'}")
    lengths = {"prompt_tokens": SINGLE_PROMPT, "new_tokens": SINGLE_NEW}
    return {"model": size, **lengths, "goal": SINGLE_GOAL, "reached": reached, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("peers", type=Path, nargs="?", help="folder of the engines' environments")
    parser.add_argument("--models", nargs="+", default=["110M"], choices=list(SIZES))
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3, help=f"of one sequence, {SINGLE_ROUNDS} at least")
    parser.add_argument("--single", action="store_true", help="one sequence beside `generate`, nothing else")
    parser.add_argument(
        "--name", default="serve_throughput", help="name of the result file; `_single` is added to it"
    )
    add_quiet_option(parser)
    arguments = parser.parse_args()
    if not arguments.single and arguments.peers is None:
        parser.error("the folder of the engines' environments is missing")
    busy = require_quiet(arguments.even_if_busy)
    console = Console()
    if arguments.single:
        found = single(arguments.models[0], max(arguments.rounds, SINGLE_ROUNDS), console)
        write_result(f"{arguments.name}_single", {"others_cores": busy, **found})
        return
    show(measure(arguments, busy, console), console)


if __name__ == "__main__":
    main()
