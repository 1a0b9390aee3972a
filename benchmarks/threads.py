"""What compiled products and PyTorch's operators cost each other when they take turns, and what a call costs.

PyTorch and the compiled library share their threads. Here a linear at 4 bits alternates with an operator of
PyTorch's, and the time of a pair is compared with those of its parts, each measured in a row of its own;
the three take turns, medians of some rounds. Their ratio is 1 where taking turns costs nothing. Weights
rotate, so that no part finds its own in the second cache, in a row as little as in turns.

The cost of a call is that of a product so small that nothing remains of it: one token times 16 x 32. It is
measured through Python's function, through the C function (called by ctypes, whose own cost is that of a
function that does nothing), and with all threads.

    python benchmarks/threads.py [--rounds 15]
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from machine import add_quiet_option, require_quiet, write_result
from tailorbird.formats.packed import IntegerCoding, PackedWeight
from tailorbird.kernels import native

SIZE, BITS, GROUP = 2048, 4, 64
TOKENS = (1, 8, 512)
COPIES = 8
#: Seconds that a row of calls takes, about.
ROW_SECONDS = 0.04
CALLS = 20_000

Call = Callable[[], Any]


def layout(out_features: int, in_features: int) -> native.Tiles:
    """A random weight as the library reads it."""
    groups = -(-in_features // GROUP)
    packed = PackedWeight.from_codes(
        torch.randint(0, 1 << BITS, (out_features, in_features)),
        torch.rand(out_features, groups).bfloat16(),
        torch.randint(0, 1 << BITS, (out_features, groups)), IntegerCoding(BITS, GROUP), None,
    )  # fmt: skip
    parts = packed.tensors
    return native.tiles(
        parts["codes"], parts["scales"], parts["zeros"], bits=BITS, group_size=GROUP, in_features=in_features
    )


def native_part(tokens: int) -> Call:
    """Our product at `SIZE`."""
    x, layouts = torch.randn(tokens, SIZE), itertools.cycle([layout(SIZE, SIZE) for _ in range(COPIES)])
    return lambda: native.linear(x, next(layouts), int8=True)


def torch_parts(tokens: int) -> dict[str, Call]:
    """What a model does beside its linears, and a step of training."""
    x, weights = torch.randn(tokens, SIZE), itertools.cycle(torch.randn(COPIES, SIZE, SIZE).bfloat16())
    rounded = x.bfloat16()
    module = torch.nn.Sequential(torch.nn.Linear(512, 1024), torch.nn.GELU(), torch.nn.Linear(1024, 512))
    batch = torch.randn(64, 512)

    def train() -> None:
        module.zero_grad()
        module(batch).square().mean().backward()

    return {
        "bf16 product": lambda: torch.nn.functional.linear(rounded, next(weights)),
        "softmax, norm": lambda: torch.nn.functional.layer_norm(x.softmax(-1), (SIZE,)),
        "training step": train,
    }


def row_seconds(calls: list[Call], repeats: int) -> float:
    """Seconds of one turn of `calls`, over a row of turns."""
    began = time.perf_counter()
    for _ in range(repeats):
        for call in calls:
            call()
    return (time.perf_counter() - began) / repeats


def measure_turns(rounds: int, console: Console) -> list[dict[str, Any]]:
    """Each operator in turns with our product, at every number of tokens."""
    rows = []
    table = Table("tokens", "operator", "ours, µs", "operator, µs", "in turns, µs", "parts / in turns")
    for tokens in TOKENS:
        ours = native_part(tokens)
        for name, theirs in torch_parts(tokens).items():
            subjects = {"ours": [ours], "operator": [theirs], "turns": [ours, theirs]}
            repeats = max(3, int(ROW_SECONDS / row_seconds([ours, theirs], 5)))
            times: dict[str, list[float]] = {subject: [] for subject in subjects}
            for number in range(rounds + 1):
                for subject, calls in subjects.items():
                    seconds = row_seconds(calls, repeats)
                    if number:  # the first round warms up
                        times[subject].append(seconds)
            medians = {f"{subject}_seconds": statistics.median(times[subject]) for subject in subjects}
            alone = medians["ours_seconds"] + medians["operator_seconds"]
            ratio = alone / medians["turns_seconds"]
            rows.append({"tokens": tokens, "operator": name, **medians, "ratio": ratio})
            table.add_row(
                str(tokens), name, *(f"{seconds * 1e6:.0f}" for seconds in medians.values()), f"{ratio:.2f}"
            )
    console.print(table)
    return rows


def measure_calls(rounds: int, console: Console) -> dict[str, float]:
    """Seconds of a call that multiplies next to nothing."""
    small, x, y = layout(16, 32), torch.randn(1, 32), torch.empty(1, 16)
    library, version = native.library(), native.best_version()
    weight, threads = ctypes.addressof(small.described), torch.get_num_threads()

    def function(count: int) -> Call:
        arguments = (weight, x.data_ptr(), y.data_ptr(), 1, 0, 1, count, version)
        return lambda: library.tailorbird_linear(*arguments)

    subjects = {
        "Python's function": lambda: native.linear(x, small, int8=True),
        "C function": function(1),
        f"C function, {threads} threads": function(threads),
        "nothing, through ctypes": lambda: library.tailorbird_runs_version(0),
    }
    times: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in range(rounds):
        for name, call in subjects.items():
            times[name].append(row_seconds([call], CALLS // rounds))
    medians = {name: statistics.median(values) for name, values in times.items()}
    table = Table("call of 16 x 32", "µs")
    for name, seconds in medians.items():
        table.add_row(name, f"{seconds * 1e6:.2f}")
    console.print(table)
    return medians


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--name", default="threads", help="name of the result file")
    add_quiet_option(parser)
    arguments = parser.parse_args()
    busy = require_quiet(arguments.even_if_busy)
    console = Console()
    found = {
        "turns": measure_turns(arguments.rounds, console),
        "call_seconds": measure_calls(arguments.rounds, console),
    }
    write_result(arguments.name, {"others_cores": busy, **found})


if __name__ == "__main__":
    main()
