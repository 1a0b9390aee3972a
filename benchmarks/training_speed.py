"""Speed of training through packed weights on the CPU: the product, its input's gradient, and both.

Every width and NF4 in every shape, at 512 tokens in bfloat16, beside a dense bfloat16 linear of PyTorch,
whose weight needs no gradient either, and the reference, which dequantizes by PyTorch's operators and keeps
the dense weight for the gradient, in turns; medians. "Ordered" is a linear whose columns are stored in
another order.

    python benchmarks/training_speed.py [--rounds 9] [--tokens 512] [--name training_speed]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from machine import add_quiet_option, require_quiet, write_result
from tailorbird.formats.modules import CompressedLinear
from tailorbird.formats.packed import CodebookCoding, GroupedCoding, IntegerCoding, PackedWeight
from tailorbird.kernels import reference

SHAPES = ((2048, 2048), (4096, 4096), (5632, 2048), (2048, 5632))
WIDTHS = (3, 4, 8)
GROUP = 64
PARTS = ("forward", "gradient", "both")


class Subject:
    """A linear, an input and the seconds of each part."""

    def __init__(self, call: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, rows: int) -> None:
        self.call, self.x = call, x
        self.gradient = torch.randn(len(x), rows).bfloat16()
        self.times: dict[str, list[float]] = {part: [] for part in PARTS}

    def round(self, keep: bool) -> None:
        """One step."""
        began = time.perf_counter()
        y = self.call(self.x)
        between = time.perf_counter()
        torch.autograd.grad(y, self.x, self.gradient)
        ended = time.perf_counter()
        if keep:
            for part, seconds in zip(PARTS, (between - began, ended - between, ended - began), strict=True):
                self.times[part].append(seconds)


def packed_linear(coding: GroupedCoding, rows: int, columns: int, ordered: bool = False) -> CompressedLinear:
    """A linear of random codes."""
    most = 1 << coding.bits
    generator = torch.Generator().manual_seed(coding.bits)
    groups = columns // GROUP
    codes = torch.randint(0, most, (rows, columns), generator=generator, dtype=torch.uint8)
    zeros = None
    if not coding.symmetric:
        zeros = torch.randint(0, most, (rows, groups), generator=generator, dtype=torch.uint8)
    scales = torch.rand(rows, groups, generator=generator).bfloat16()
    order = torch.randperm(columns, generator=generator) if ordered else None
    return CompressedLinear.from_packed(PackedWeight.from_codes(codes, scales, zeros, coding, order))


def by_reference(linear: CompressedLinear) -> Callable[[torch.Tensor], torch.Tensor]:
    """The exact product of `linear`."""
    return lambda x: reference.linear(
        x, linear.codes, linear.scales, linear.zeros, bits=linear.coding.bits,
        group_size=linear.coding.group_size, in_features=linear.in_features,
    )  # fmt: skip


def measure(rows: int, columns: int, tokens: int, rounds: int) -> list[dict[str, Any]]:
    """Every width at one shape, beside the dense linear."""
    x = torch.randn(tokens, columns).bfloat16().requires_grad_()
    weight = torch.randn(rows, columns).bfloat16()
    codings: dict[str, GroupedCoding] = {f"{bits} bits": IntegerCoding(bits, GROUP) for bits in WIDTHS}
    codings["nf4"] = CodebookCoding("nf4", GROUP)
    linears = {name: packed_linear(coding, rows, columns) for name, coding in codings.items()}
    assert all(linear.path(tokens, x.dtype, gradient=True) == "native-panels" for linear in linears.values())
    calls: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "dense": lambda x: torch.nn.functional.linear(x, weight),
        **linears,
        "4 bits, ordered": packed_linear(codings["4 bits"], rows, columns, ordered=True),
        "reference": by_reference(linears["4 bits"]),
    }
    subjects = {name: Subject(call, x, rows) for name, call in calls.items()}
    for number in range(rounds + 1):
        for subject in subjects.values():
            subject.round(keep=number > 0)  # the first round warms up
    return [
        {
            "shape": [rows, columns], "linear": name,
            **{f"{part}_seconds": statistics.median(subject.times[part]) for part in PARTS},
            "rounds": subject.times,
        }
        for name, subject in subjects.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--name", default="training_speed", help="name of the result file")
    add_quiet_option(parser)
    arguments = parser.parse_args()
    busy = require_quiet(arguments.even_if_busy)
    console = Console()
    found = []
    title = f"{arguments.tokens} tokens, {torch.get_num_threads()} threads: ms, and speed relative to dense"
    table = Table("shape", "linear", *PARTS, title=title)
    for rows, columns in SHAPES:
        measured = measure(rows, columns, arguments.tokens, arguments.rounds)
        dense = measured[0]
        for row in measured:
            row["of_dense"] = {part: dense[f"{part}_seconds"] / row[f"{part}_seconds"] for part in PARTS}
            cells = (f"{1000 * row[f'{part}_seconds']:.1f}  {row['of_dense'][part]:.2f}" for part in PARTS)
            table.add_row(f"{rows} x {columns}", row["linear"], *cells)
        found += measured
    console.print(table)
    write_result(arguments.name, {"others_cores": busy, "tokens": arguments.tokens, "linears": found})


if __name__ == "__main__":
    main()
