"""What compiled products and PyTorch's operators cost each other when they take turns, and what a call costs.

PyTorch and the compiled library share their threads. Here a linear at 4 bits alternates with an operator of
PyTorch's, and the time of a pair is compared with those of its parts, each measured in a row of its own;
the three take turns, medians of some rounds. Their ratio is 1 where taking turns costs nothing. Weights
rotate, so that no part finds its own in the second cache, in a row as little as in turns. The same for a
block of transformers' Llama over compressed linears: these alone, one after the other, on what they are given
in the block; and the block with modules in their place that return what the linears have computed before.

The cost of a call is that of a product so small that nothing remains of it: one token times 16 x 32. It is
measured through Python's function, through the C function (called by ctypes, whose own cost is that of a
function that does nothing), and with all threads.

Threads that have nothing to do wait for the next call, first awake, then asleep. How long they stay awake is
read off their clocks of processor time at some moments after a call, of ours and of PyTorch's: OpenMP's
library, which both share, decides it, and `OMP_WAIT_POLICY` and `GOMP_SPINCOUNT` tell it.

A row's sum has one order, so that threads share out rows, never the columns of one row. What that costs
where rows are few: columns in as many parts as there are threads are the same bytes and operations as so many
times the rows with that part of the columns. Such a product is measured beside the other, and apart from it
PyTorch's addition of the parts, which are so few numbers that it is hardly more than a call.

    python benchmarks/threads.py [--rounds 15]
    OMP_WAIT_POLICY=passive python benchmarks/threads.py --name threads_passive
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from cpu_speed import ROTATED_BYTES
from machine import add_quiet_option, require_quiet, write_result
from tailorbird.formats.modules import CompressedLinear
from tailorbird.formats.packed import IntegerCoding, PackedWeight
from tailorbird.kernels import native

SIZE, BITS, GROUP = 2048, 4, 64
TOKENS = (1, 8, 512)
COPIES = 8
#: Seconds that a row of calls takes, about.
ROW_SECONDS = 0.04
CALLS = 20_000
#: Of the block, whose width is `SIZE`.
INNER, HEADS, KV_HEADS = 5632, 32, 8
#: Microseconds after a call at which clocks are read, and until when threads are to sleep.
MOMENTS, SLEEP_GOAL = (20, 50, 100, 200, 500, 1000, 5000, 20_000), 50
#: Calls after which they are read, in a round.
READINGS = 5
#: That decide how long threads wait awake.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
#: Rows and columns of products: 1, 3, 4 and 16 tiles of 16 rows, and for comparison more than enough.
ORDER_SHAPES = ((16, 32_768), (48, 32_768), (64, 16_384), (256, 4096), (4096, 4096))

Call = Callable[[], Any]


def packed_weight(out_features: int, in_features: int) -> PackedWeight:
    """A random weight."""
    groups = -(-in_features // GROUP)
    return PackedWeight.from_codes(
        torch.randint(0, 1 << BITS, (out_features, in_features)),
        (torch.rand(out_features, groups) / GROUP).bfloat16(),
        torch.randint(0, 1 << BITS, (out_features, groups)), IntegerCoding(BITS, GROUP), None,
    )  # fmt: skip


def layout(packed: PackedWeight) -> native.Tiles:
    """A weight as the library reads it."""
    parts = packed.tensors
    return native.tiles(
        parts["codes"], parts["scales"], parts["zeros"], bits=BITS, group_size=GROUP,
        in_features=packed.in_features,
    )  # fmt: skip


def native_part(tokens: int) -> Call:
    """Our product at `SIZE`."""
    x, packed = torch.randn(tokens, SIZE), packed_weight(SIZE, SIZE)
    layouts = itertools.cycle([layout(packed) for _ in range(COPIES)])
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


class Known(torch.nn.Module):
    """Takes the place of a linear whose outputs are there already."""

    def __init__(self, output: torch.Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        return self.output


class Block:
    """A block of transformers' Llama over compressed linears, and its two parts."""

    def __init__(self, tokens: int) -> None:
        config = LlamaConfig(
            hidden_size=SIZE, intermediate_size=INNER, num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS, attn_implementation="sdpa",
        )  # fmt: skip
        self.x = torch.randn(1, tokens, SIZE).bfloat16()
        self.angles = LlamaRotaryEmbedding(config)(self.x, torch.arange(tokens)[None])
        self.layer, self.bare = (
            LlamaDecoderLayer(config, 0).bfloat16().requires_grad_(False).eval() for _ in range(2)
        )
        self.given: list[tuple[CompressedLinear, torch.Tensor]] = []
        names = [name for name, module in self.layer.named_modules() if isinstance(module, torch.nn.Linear)]
        for name in names:
            dense = self.layer.get_submodule(name)
            packed = packed_weight(dense.out_features, dense.in_features)
            linear = CompressedLinear.from_packed(packed, rounds=True)
            assert linear.path(tokens, self.x.dtype) == "native-int8"
            self.layer.set_submodule(name, linear)
        outputs: dict[torch.nn.Module, torch.Tensor] = {}

        def keep(linear: Any, inputs: Any, output: torch.Tensor) -> None:
            self.given.append((linear, inputs[0]))
            outputs[linear] = output

        hooks = [self.layer.get_submodule(name).register_forward_hook(keep) for name in names]
        self.whole()
        for hook in hooks:
            hook.remove()
        for name in names:
            self.bare.set_submodule(name, Known(outputs[self.layer.get_submodule(name)]))

    def whole(self) -> torch.Tensor:
        """The block."""
        return self.layer(self.x, position_embeddings=self.angles)

    def linears(self) -> list[torch.Tensor]:
        """Its linears alone."""
        return [linear(x) for linear, x in self.given]

    def rest(self) -> torch.Tensor:
        """All else."""
        return self.bare(self.x, position_embeddings=self.angles)


class Turns(NamedTuple):
    """Compiled products, something else, and both in turns."""

    name: str
    ours: Call
    theirs: Call
    both: list[Call]


def turns(tokens: int) -> Iterator[Turns]:
    """Each operator in turns with our product, and a block."""
    ours = native_part(tokens)
    for name, theirs in torch_parts(tokens).items():
        yield Turns(name, ours, theirs, [ours, theirs])
    block = Block(tokens)
    yield Turns("rest of a block", block.linears, block.rest, [block.whole])


def row_seconds(calls: list[Call], repeats: int) -> float:
    """Seconds of one turn of `calls`, over a row of turns."""
    began = time.perf_counter()
    for _ in range(repeats):
        for call in calls:
            call()
    return (time.perf_counter() - began) / repeats


def measure_turns(rounds: int, console: Console) -> list[dict[str, Any]]:
    """Each pair and its parts, at every number of tokens."""
    rows = []
    table = Table("tokens", "operator", "ours, µs", "operator, µs", "in turns, µs", "parts / in turns")
    for tokens in TOKENS:
        for name, ours, theirs, both in turns(tokens):
            subjects = {"ours": [ours], "operator": [theirs], "turns": both}
            repeats = max(3, int(ROW_SECONDS / row_seconds(both, 5)))
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


def c_function(weight: native.Tiles, x: torch.Tensor, threads: int) -> Call:
    """A product through the C function, which is told addresses alone."""
    library, y = native.library(), torch.empty(len(x), weight.out_features)
    arguments = (
        ctypes.addressof(weight.described), x.data_ptr(), y.data_ptr(), len(x), 0, 1, threads,
        native.best_version(),
    )  # fmt: skip

    def call() -> None:
        library.tailorbird_linear(*arguments)

    call.kept = weight, x, y  # type: ignore[attr-defined]
    return call


def measure_calls(rounds: int, console: Console) -> dict[str, float]:
    """Seconds of a call that multiplies next to nothing."""
    small, x = layout(packed_weight(16, 32)), torch.randn(1, 32)
    library, threads = native.library(), torch.get_num_threads()
    subjects = {
        "Python's function": lambda: native.linear(x, small, int8=True),
        "C function": c_function(small, x, 1),
        f"C function, {threads} threads": c_function(small, x, threads),
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


def other_clocks() -> list[int]:
    """Clocks of the processor time of every thread of this process but this one, as Linux numbers them."""
    own = threading.get_native_id()
    others = (int(task.name) for task in Path("/proc/self/task").iterdir() if int(task.name) != own)
    return [(~thread << 3) | 6 for thread in others]  # 4: of a thread; 2: as the scheduler counts


def processor_seconds(clocks: list[int]) -> float:
    """Seconds for which the threads of these clocks have run."""
    return sum(map(time.clock_gettime, clocks))


def after_call(call: Call, clocks: list[int], moments: tuple[int, ...]) -> list[float]:
    """Seconds for which threads have run since a call has ended, at some microseconds after its end."""
    call()
    ended, before, found = time.perf_counter(), processor_seconds(clocks), []
    for moment in moments:
        while time.perf_counter() < ended + moment * 1e-6:
            pass  # asleep, this thread would come back too late
        found.append(processor_seconds(clocks) - before)
    return found


def measure_waiting(rounds: int, console: Console) -> list[dict[str, Any]]:
    """How long threads stay awake after a call; nothing where there is one thread, or no Linux."""
    others = torch.get_num_threads() - 1
    if others == 0 or not Path("/proc/self/task").exists():
        return []
    subjects = {
        "ours, 1 token": native_part(1),
        "ours, 512 tokens": native_part(512),
        "PyTorch's bf16 product": torch_parts(1)["bf16 product"],
    }
    table = Table(
        "µs after a call", *map(str, MOMENTS), "awake, µs", f"at most {SLEEP_GOAL}",
        title="processor time of each thread but the caller's, µs",
    )  # fmt: skip
    rows = []
    for name, call in subjects.items():
        call()  # threads begin with the first
        clocks = other_clocks()
        readings = [after_call(call, clocks, MOMENTS) for _ in range(rounds * READINGS)]
        took = [statistics.median(at) / others * 1e6 for at in zip(*readings, strict=True)]
        # whoever has run all the time may go on
        still = took[-1] > 0.95 * MOMENTS[-1]
        row = {
            "call": name, "moments_us": MOMENTS, "busy_us": took, "awake_us": took[-1], "still_awake": still,
            "reached": took[-1] <= SLEEP_GOAL,
        }  # fmt: skip
        awake = f"{'over' if still else 'about'} {took[-1]:.0f}"
        table.add_row(name, *(f"{busy:.0f}" for busy in took), awake, "yes" if row["reached"] else "no")
        rows.append(row)
    console.print(table)
    return rows


def measure_order(rounds: int, console: Console) -> list[dict[str, Any]]:
    """What it costs that threads share out rows but no columns."""
    threads = torch.get_num_threads()
    parts = 1 << threads.bit_length() - 1  # powers of two divide the columns into groups
    columns_title = f"columns in {parts}, µs"
    table = Table("rows x columns", "rows alone, µs", columns_title, "adding, µs", "rows / columns")
    found = []
    for rows, columns in ORDER_SHAPES:
        products = []
        for shape in ((rows, columns), (rows * parts, columns // parts)):
            packed, x = packed_weight(*shape), torch.randn(1, shape[1])
            copies = range(ROTATED_BYTES // packed.nbytes)
            calls = itertools.cycle([c_function(layout(packed), x, threads) for _ in copies])
            products.append(lambda calls=calls: next(calls)())
        sums = torch.randn(parts, rows)
        subjects = {"rows": products[0], "columns": products[1], "adding": lambda sums=sums: sums.sum(0)}
        times: dict[str, list[float]] = {name: [] for name in subjects}
        repeats = max(3, int(ROW_SECONDS / row_seconds([products[0]], 100)))
        for number in range(rounds + 1):
            for name, call in subjects.items():
                seconds = row_seconds([call], repeats)
                if number:  # the first round warms up
                    times[name].append(seconds)
        medians = {f"{name}_seconds": statistics.median(values) for name, values in times.items()}
        ratio = medians["rows_seconds"] / medians["columns_seconds"]
        found.append({"shape": [rows, columns], "parts": parts, **medians, "ratio": ratio})
        took = (f"{seconds * 1e6:.1f}" for seconds in medians.values())
        table.add_row(f"{rows} x {columns}", *took, f"{ratio:.2f}")
    console.print(table)
    return found


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
        "waiting": measure_waiting(arguments.rounds, console),
        "waiting_settings": {name: os.environ.get(name) for name in WAITING},
        "order": measure_order(arguments.rounds, console),
    }
    write_result(arguments.name, {"others_cores": busy, **found})


if __name__ == "__main__":
    main()
