"""Speed on the CPU: the compiled products of single linears, and whole models over compiled blocks.

Linears: every width and NF4 in groups of 64, 4 and 8 bits in other groups, symmetric, and codebooks, points
and tables, at several numbers of tokens, beside PyTorch's dynamic int8 product and its bf16 product at the
same shape, in turns. The weights in use rotate over more memory than the caches hold. Bytes are those of the
packed weight with its scales and zero points; their rate is compared with the machine's read bandwidth, which
is measured in every turn, since a shared machine changes it within minutes. Codebooks of fewer than 4 bits
are read as 4, and points as a byte for each value, so that they take longer than their bytes say. With many
tokens every coding is compared with PyTorch's int8; with one, the times of 2 and 3 bits with that of 4 and
with the bytes of both, at a larger shape, too.

Models: random-weight Llamas, decoded at batch 1 and 8 and fed a prompt of 512 tokens, beside the bf16
source through transformers, in turns. Logits are formed for the last position only.

    python benchmarks/cpu_speed.py [--linears] [--models 110M 0.5B] [--bits 4 8] [--rounds 5]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from machine import add_quiet_option, require_quiet, write_result
from packed_models import round_plainly
from random_models import Shape, write_random
from tailorbird.formats.packed import (
    CodebookCoding,
    IntegerCoding,
    PackedWeight,
    ScaledCoding,
    TableCoding,
    VectorCoding,
    unpacking,
)
from tailorbird.kernels import native
from tailorbird.model.checkpoint import open_checkpoint
from tailorbird.model.load import load
from tailorbird.run.generate import Decoding, decode

SIZES = {
    "110M": Shape("llama", 12, 768, 2048, 12, 4),
    "0.5B": Shape("llama", 24, 1024, 4096, 16, 8),
    "GPT-2": Shape("gpt2", 12, 768, 3072, 12, 12),
}
WIDTHS = (2, 3, 4, 5, 6, 8)
TOKENS = (1, 8, 32, 256, 1024)
SHAPE = 4096, 4096
GROUP = 64
#: Name of a linear at `SHAPE` -> its coding.
CODINGS: dict[str, ScaledCoding | TableCoding] = {
    **{f"{bits} bits": IntegerCoding(bits, GROUP) for bits in WIDTHS},
    **{f"{bits} bits g{group}": IntegerCoding(bits, group) for group in (32, 128) for bits in (4, 8)},
    **{f"{bits} bits row": IntegerCoding(bits, 0) for bits in (4, 8)},
    "4 bits sym": IntegerCoding(4, GROUP, symmetric=True),
    **{name: CodebookCoding(name, GROUP) for name in ("nf4", "fp4", "gauss3")},
    "gauss2x4": VectorCoding("gauss2x4", GROUP),
    "table4": TableCoding(4),
}
#: PyTorch's product of bytes, whose speed is the measure where there are so many tokens.
INT8, MANY_TOKENS = "int8 dynamic", 256
#: Share of that which is the goal: of these, and of other codings.
AS_FAST = ("4 bits", "8 bits", "4 bits g128", "8 bits g128")
GOAL, OTHERS_GOAL = 0.95, 0.70
#: The larger shape, and what is timed there, with one token.
LARGE, LARGE_WIDTHS = (8192, 8192), (2, 3, 4)
#: Goal for the time of 2 and 3 bits, in that of 4 bits times the ratio of their bytes.
PROPORTION = 1.2
ROTATED_BYTES = 128 << 20
PROMPT, NEW, BATCH, BATCH_NEW = 512, 64, 8, 32


def read_bandwidth(values: torch.Tensor | None = None) -> float:
    """Bytes per second of summing `values`, or 1 GiB, with all threads; the best of seven."""
    values = torch.ones(1 << 28) if values is None else values
    best = min(_seconds(values.sum) for _ in range(7))
    return values.nbytes / best


def _seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


class Rotating:
    """Copies of one linear that take turns."""

    def __init__(self, copies: list[Any], call: Callable[[Any, Any], Any]) -> None:
        self.copies, self.call, self.turn = copies, call, 0

    def run(self, x: Any) -> float:
        """Seconds of one product."""
        copy = self.copies[self.turn % len(self.copies)]
        self.turn += 1
        return _seconds(lambda: self.call(copy, x))


def random_weight(coding: ScaledCoding | TableCoding, shape: tuple[int, int]) -> PackedWeight:
    """Random codes and what belongs to them."""
    rows, columns = shape
    generator = torch.Generator().manual_seed(coding.bits)
    width, bits = columns, coding.bits
    if isinstance(coding, VectorCoding):
        width, bits = columns // coding.dimension, coding.code_bits
    codes = torch.randint(0, 1 << bits, (rows, width), generator=generator, dtype=torch.uint8)
    if isinstance(coding, TableCoding):
        tables = torch.randn(rows, 1 << bits, generator=generator).bfloat16()
        return PackedWeight.from_tables(codes, tables, coding)
    groups = columns // coding.group_size if coding.group_size else 1
    scales = torch.rand(rows, groups, generator=generator).bfloat16()
    if isinstance(coding, VectorCoding):
        return PackedWeight.from_points(codes, scales, coding, columns)
    zeros = None
    if not coding.symmetric:
        zeros = torch.randint(0, 1 << bits, (rows, groups), generator=generator, dtype=torch.uint8)
    return PackedWeight.from_codes(codes, scales, zeros, coding)


def packed_linear(coding: ScaledCoding | TableCoding, shape: tuple[int, int] = SHAPE) -> tuple[Rotating, int]:
    """Our product, and the bytes of its weight."""
    packed = random_weight(coding, shape)
    parts, told = packed.tensors, {"in_features": shape[1], **unpacking(coding)}
    copies = range(max(2, ROTATED_BYTES // packed.nbytes))
    if isinstance(coding, TableCoding):
        told["tables"] = parts["tables"]
        rows = [native.table_rows(parts["codes"], None, None, **told) for _ in copies]
        return Rotating(rows, lambda layout, x: native.table_linear(x, layout)), packed.nbytes
    tiles = [native.tiles(parts["codes"], parts["scales"], parts.get("zeros"), **told) for _ in copies]
    return Rotating(tiles, lambda layout, x: native.linear(x, layout, int8=True)), packed.nbytes


def torch_linears() -> dict[str, tuple[Rotating, int]]:
    """PyTorch's products at `SHAPE`: bf16, and int8 with dynamic activations."""
    rows, columns = SHAPE
    dense = [torch.randn(SHAPE).bfloat16() for _ in range(max(2, ROTATED_BYTES // (2 * rows * columns)))]
    found = {
        "bf16": (
            Rotating(dense, lambda w, x: torch.nn.functional.linear(x.bfloat16(), w)),
            2 * rows * columns,
        )
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = [
            torch.ao.quantization.quantize_dynamic(
                torch.nn.Sequential(torch.nn.Linear(columns, rows, bias=False)),
                {torch.nn.Linear},
                torch.qint8,
            )
            for _ in range(max(2, ROTATED_BYTES // (rows * columns)))
        ]
    found[INT8] = Rotating(quantized, lambda module, x: module(x)), rows * columns
    return found


@torch.no_grad()
def time_linears(
    subjects: dict[str, tuple[Rotating, int]],
    shape: tuple[int, int],
    tokens: int,
    rounds: int,
    memory: torch.Tensor,
) -> list[dict[str, Any]]:
    """Every product of that shape and so many tokens, in turns, beside the bandwidth of reading `memory`."""
    rows, columns = shape
    x = torch.randn(tokens, columns)
    times: dict[str, list[float]] = {name: [] for name in subjects}
    shares: dict[str, list[float]] = {name: [] for name in subjects}
    repeats = 16 if tokens <= 8 else 4 if tokens <= 32 else 1
    for number in range(rounds + 1):
        bandwidth = read_bandwidth(memory)
        for name, (subject, size) in subjects.items():
            seconds = statistics.median(subject.run(x) for _ in range(repeats))
            if number:  # the first round warms up
                times[name].append(seconds)
                shares[name].append(size / seconds / bandwidth)
    found = []
    for name, (_, size) in subjects.items():
        seconds = statistics.median(times[name])
        found.append(
            {
                "linear": name, "shape": list(shape), "tokens": tokens, "seconds": seconds, "bytes": size,
                "bandwidth_share": statistics.median(shares[name]),
                "operations_per_s": 2 * tokens * rows * columns / seconds,
            }
        )  # fmt: skip
    return found


def judge(rows: list[dict[str, Any]]) -> None:
    """Add to rows of one shape and number of tokens how they compare, and whether goals are reached."""
    by_name = {row["linear"]: row for row in rows}
    for name, row in by_name.items():
        if row["tokens"] >= MANY_TOKENS and name in CODINGS:
            share = by_name[INT8]["seconds"] / row["seconds"]
            goal = GOAL if name in AS_FAST else OTHERS_GOAL
            row["of_int8"] = {"share": share, "goal": goal, "reached": share >= goal}
        if row["tokens"] == 1 and name in ("2 bits", "3 bits"):
            four = by_name["4 bits"]
            seconds, size = row["seconds"] / four["seconds"], row["bytes"] / four["bytes"]
            row["of_4_bits"] = {"seconds": seconds, "bytes": size, "reached": seconds <= PROPORTION * size}


def measure_linears(rounds: int, console: Console) -> list[dict[str, Any]]:
    """Every product at every number of tokens, and those of the larger shape at one."""
    memory = torch.ones(ROTATED_BYTES)
    subjects = {name: packed_linear(coding) for name, coding in CODINGS.items()} | torch_linears()
    cells = [(subjects, SHAPE, tokens) for tokens in TOKENS]
    larger = {f"{bits} bits": packed_linear(IntegerCoding(bits, GROUP), LARGE) for bits in LARGE_WIDTHS}
    found = []
    for measured, shape, tokens in [*cells, (larger, LARGE, 1)]:
        rows = time_linears(measured, shape, tokens, rounds, memory)
        judge(rows)
        found += rows
    title = f"{SHAPE[0]} x {SHAPE[1]}: share of the bandwidth, or GOP/s and share of PyTorch's {INT8}"
    table = Table("linear", *(f"{tokens} tokens" for tokens in TOKENS), title=title)
    for name in subjects:
        own = (row for row in found if row["linear"] == name and row["shape"] == [*SHAPE])
        table.add_row(name, *map(cell, own))
    console.print(table)
    title = "one token: time and bytes beside those of 4 bits"
    table = Table("shape", "linear", "of bandwidth", "time", "bytes", "in proportion", title=title)
    for row in (row for row in found if "of_4_bits" in row):
        beside = row["of_4_bits"]
        table.add_row(
            "{} x {}".format(*row["shape"]), row["linear"], f"{row['bandwidth_share']:.0%}",
            f"{beside['seconds']:.2f}", f"{beside['bytes']:.2f}", "yes" if beside["reached"] else "no",
        )  # fmt: skip
    console.print(table)
    return found


def cell(row: dict[str, Any]) -> str:
    """What the table says of one product."""
    if row["tokens"] <= 8:
        return f"{row['bandwidth_share']:.0%} of bandwidth"
    text = f"{row['operations_per_s'] / 1e9:.0f} GOP/s"
    if "of_int8" not in row:
        return text
    beside = row["of_int8"]
    return f"{text}, {beside['share']:.0%}" + ("" if beside["reached"] else f", not {beside['goal']:.0%}")


class Subject:
    """A loaded model and how long its rounds took."""

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.bytes = name, open_checkpoint(str(path)).weights.total_bytes
        began = time.perf_counter()
        self.model = load(str(path))
        self.read(decode(self.model), 1, 1)
        self.load_seconds = time.perf_counter() - began
        self.rates: dict[str, list[float]] = {"prefill": [], "decode": [], "batch": []}

    def read(self, decoding: Decoding, batch: int, tokens: int) -> torch.Tensor:
        """Read random tokens."""
        vocabulary = self.model.config.vocab_size
        return decoding.read(torch.randint(0, vocabulary, (batch, tokens)))

    def round(self, keep: bool) -> None:
        """A prompt, tokens after it, and tokens of a batch."""
        decoding = decode(self.model)
        prompt = _seconds(lambda: self.read(decoding, 1, PROMPT))
        single = decode(self.model)
        self.read(single, 1, NEW)
        one = _seconds(lambda: [self.read(single, 1, 1) for _ in range(NEW)])
        several = decode(self.model)
        self.read(several, BATCH, NEW)
        many = _seconds(lambda: [self.read(several, BATCH, 1) for _ in range(BATCH_NEW)])
        if keep:
            self.rates["prefill"].append(PROMPT / prompt)
            self.rates["decode"].append(NEW / one)
            self.rates["batch"].append(BATCH * BATCH_NEW / many)


def measure_models(
    sizes: list[str], widths: list[int], rounds: int, bandwidth: float, console: Console
) -> list[dict[str, Any]]:
    """Every size and width beside its bf16 source."""
    rows = []
    for size in sizes:
        with tempfile.TemporaryDirectory(prefix="cpu-speed-") as folder:
            source = write_random(SIZES[size], Path(folder) / "source", context=2048)
            paths = {"bf16": source} | {
                f"{bits} bits": round_plainly(source, Path(folder) / str(bits), bits, GROUP)
                for bits in widths
            }
            subjects = [Subject(name, path) for name, path in paths.items()]
            for number in range(rounds + 1):
                for subject in subjects:
                    subject.round(keep=number > 0)
        read_weights = SIZES[size].weights + 32_000 * SIZES[size].width
        for subject in subjects:
            medians = {name: statistics.median(rates) for name, rates in subject.rates.items()}
            bits = 16 if subject.name == "bf16" else int(subject.name.split()[0]) + (16 + 8) / GROUP
            rows.append(
                {
                    "model": size, "subject": subject.name, "bytes": subject.bytes,
                    "load_seconds": subject.load_seconds,
                    **{f"{name}_tokens_per_s": rate for name, rate in medians.items()},
                    "bandwidth_share": read_weights * bits / 8 * medians["decode"] / bandwidth,
                    "rounds": subject.rates,
                }
            )  # fmt: skip
    table = Table("model", "weights", "prefill 512", "decode", "batch 8", "x bf16", "of bandwidth", "load s")
    for row in rows:
        base = next(r for r in rows if r["model"] == row["model"] and r["subject"] == "bf16")
        ratios = " / ".join(
            f"{row[key] / base[key]:.2f}"
            for key in ("prefill_tokens_per_s", "decode_tokens_per_s", "batch_tokens_per_s")
        )
        table.add_row(
            row["model"], row["subject"], f"{row['prefill_tokens_per_s']:.0f}",
            f"{row['decode_tokens_per_s']:.0f}", f"{row['batch_tokens_per_s']:.0f}", ratios,
            f"{row['bandwidth_share']:.0%}", f"{row['load_seconds']:.2f}",
        )  # fmt: skip
    console.print(table)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--linears", action="store_true", help="the single linears only")
    parser.add_argument("--models", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--name", default="cpu_speed", help="name of the result file")
    add_quiet_option(parser)
    arguments = parser.parse_args()
    busy = require_quiet(arguments.even_if_busy)
    console = Console()
    bandwidth = read_bandwidth()
    console.print(f"read bandwidth {bandwidth / 1e9:.1f} GB/s, {torch.get_num_threads()} threads")
    found: dict[str, Any] = {
        "read_bandwidth": bandwidth,
        "linears": measure_linears(arguments.rounds, console),
    }
    if not arguments.linears:
        found["models"] = measure_models(
            arguments.models, arguments.bits, arguments.rounds, bandwidth, console
        )
    write_result(arguments.name, {"others_cores": busy, **found})


if __name__ == "__main__":
    main()
