"""Serving beside other engines on the CPU: the same requests, continuous batching everywhere, in turns.

Two mixes of random prompts: short ones, with lengths like those of ShareGPT's conversations (log-normal,
median prompt 60 and answer 100 tokens, cut at 1,024 and 400), and long ones (512 to 2,048 tokens, answers of
32 to 96). Each is run at saturation, 16 requests at once, and with Poisson arrivals at 60 % of the rate that
the slowest engine reached then, transformers' left out. Every engine runs in a process and an environment of
its own (`cpu_peers.py` says how these are made; OpenVINO's needs `openvino-genai` too) at its own 4 bits,
transformers in bf16; greedy, two threads, steps of at most 512 tokens. Tokens per second count prompts and
answers; medians over the rounds.

    python benchmarks/serve_throughput.py FOLDER [--models 110M] [--requests 32] [--rounds 5]
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cpu_peers import Entry, Process, installed_version, prepare, pythons
from cpu_speed import SIZES, read_bandwidth
from machine import add_quiet_option, require_quiet, write_result

HERE = Path(__file__).parent
SEQUENCES = 16
FORMATS = ("transformers bf16", "tailorbird 4 bits", "llama.cpp q4_0", "openvino int4")
#: Goals: engine -> ratio of our throughput at saturation to its.
GOALS = {"transformers": 2.0, "llama.cpp": 1.3, "openvino": 1.1}
#: Share of the slowest engine's rate at which requests arrive.
ARRIVALS = 0.6

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
    return [rng.randrange(3, 32_000) for _ in range(count)]


def arriving(load: Load, per_second: float, rng: random.Random) -> Load:
    """The same requests, one after the other as a Poisson process."""
    at, found = 0.0, []
    for _, prompt, new in load:
        at += rng.expovariate(per_second)
        found.append((at, prompt, new))
    return found


def served(process: Process, load: Load) -> list[list[float]]:
    """Times of every request's tokens."""
    return json.loads(process.ask(json.dumps([load, SEQUENCES])))


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


def measure(
    entries: list[Entry], python: dict[str, str], requests: int, rounds: int, console: Console
) -> list[dict[str, Any]]:
    """Every engine, mix and way of arriving; each round every engine gets the same requests."""
    rows = []
    processes = [Process(entry, python[entry.engine], "serve_child.py", str(SEQUENCES)) for entry in entries]
    try:
        for process in processes:
            served(process, short_mix(SEQUENCES, random.Random(0)))  # warms up
        for mix, make in MIXES.items():
            slowest = None
            for way in ("saturation", "arrivals"):
                present = [p for p in processes if slowest is None or p.entry.engine != "transformers"]
                runs: dict[str, list[dict[str, float]]] = {process.entry.name: [] for process in present}
                count = requests if mix == "short" else max(8, requests // 4)
                for number in range(rounds):
                    rng = random.Random(number)
                    load = make(count, rng)
                    if slowest is not None:
                        load = arriving(load, ARRIVALS * slowest, rng)
                    for process in present if number % 2 else reversed(present):
                        runs[process.entry.name].append(summarize(load, served(process, load)))
                for process in present:
                    found = runs[process.entry.name]
                    median = {key: statistics.median(run[key] for run in found) for key in found[0]}
                    rows.append(
                        {
                            "engine": process.entry.engine, "format": process.entry.format, "mix": mix,
                            "way": way, "requests": count, **median, "rounds": found,
                        }
                    )  # fmt: skip
                    console.print(
                        f"{mix}, {way}, {process.entry.name}: {median['all_tokens_per_s']:.0f} tokens/s"
                    )
                here = [row for row in rows if row["mix"] == mix and row["way"] == way]
                slowest = min(row["requests_per_s"] for row in here if row["engine"] != "transformers")
    finally:
        for process in processes:
            process.end()
    return rows


def compare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours beside each of the others: throughput, and the longest waits between tokens."""
    found = []
    for row in rows:
        if row["engine"] != "tailorbird":
            continue
        same = [other for other in rows if (other["mix"], other["way"]) == (row["mix"], row["way"])]
        for other in same:
            if other["engine"] == "tailorbird":
                continue
            found.append(
                {
                    "mix": row["mix"], "way": row["way"], "peer": other["engine"],
                    "throughput_ratio": row["all_tokens_per_s"] / other["all_tokens_per_s"],
                    "goal": GOALS[other["engine"]] if row["way"] == "saturation" else None,
                    "between_tokens_p99_ratio": row["between_tokens_p99_s"] / other["between_tokens_p99_s"],
                }
            )  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("peers", type=Path, help="folder of the engines' environments")
    parser.add_argument("--models", nargs="+", default=["110M"], choices=list(SIZES))
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--name", default="serve_throughput", help="name of the result file")
    add_quiet_option(parser)
    arguments = parser.parse_args()
    busy = require_quiet(arguments.even_if_busy)
    console = Console()
    python = pythons(arguments.peers)
    versions = {
        engine: installed_version(python[engine], package)
        for engine, package in (("llama.cpp", "llama-cpp-python"), ("openvino", "openvino-genai"))
        if engine in python
    }
    found: dict[str, Any] = {"read_bandwidth": read_bandwidth(), "peers": versions, "models": {}}
    for size in arguments.models:
        with tempfile.TemporaryDirectory(prefix="serve-") as folder:
            entries = [e for e in prepare(size, Path(folder), python, console) if e.name in FORMATS]
            rows = measure(entries, python, arguments.requests, arguments.rounds, console)
        compared = compare(rows)
        found["models"][size] = {"rows": rows, "compared": compared}
        write_result(arguments.name, {"others_cores": busy, **found})
        table = Table(
            "mix", "way", "engine", "tokens/s", "written/s", "first token p50", "between p50 / p99 ms"
        )
        for row in rows:
            between = f"{1e3 * row['between_tokens_median_s']:.1f} / {1e3 * row['between_tokens_p99_s']:.0f}"
            table.add_row(
                row["mix"], row["way"], f"{row['engine']} {row['format']}", f"{row['all_tokens_per_s']:.0f}",
                f"{row['output_tokens_per_s']:.0f}", f"{row['first_token_median_s']:.2f} s", between,
            )  # fmt: skip
        console.print(table)
        for pair in compared:
            console.print(pair)


if __name__ == "__main__":
    main()
