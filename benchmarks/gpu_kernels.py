"""Speed of the Triton kernels on a GPU, beside PyTorch's and the GPU's own copy bandwidth.

Linears: every width in groups of 128 with zero points, beside bf16 through cuBLAS and PyTorch's int4
product. Prompts: many rows of activations rounded to int8 times packed integers, and to FP8 where the GPU has
it, the rounding included, beside bf16 through cuBLAS and PyTorch's FP8 product. Attention: one new token per
sequence over bf16, int8 and int4 pages, beside scaled_dot_product_attention over keys and values that lie in
one piece. Adapters: rows of 8 adapters of rank 16, beside gathered batched products.

What is read rotates over at least 512 MB, so that no cache holds it; calls are replayed from a CUDA graph,
and subjects take turns. Bytes are those that must be read and written: weights with scales and zero points
(or keys and values), inputs, outputs. Their rate is compared with a copy's, which counts bytes read and
written alike. Results are first compared with exact ones, and the bits of a linear's rows with those of the
same rows in other batches. Kernels are launched in the way that was fastest here (`triton_tuning`).

    python benchmarks/gpu_kernels.py [--only linears prompts attention adapters] [--rounds 7]
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from machine import add_quiet_option, require_quiet, write_result
from tailorbird.kernels import (
    triton_adapters,
    triton_attention,
    triton_fp8,
    triton_int8,
    triton_linear,
    triton_runtime,
)
from tailorbird.kernels.packing import packed_width
from tailorbird.kernels.reference import dequantize, to_bytes

#: (out_features, in_features)
SHAPES = ((4096, 4096), (8192, 8192), (14336, 4096))
BATCHES = (1, 4, 16, 64)
WIDTHS = (2, 3, 4, 5, 6, 8)
PROMPTS, PROMPT_WIDTHS = (512, 2048), (4, 8)
GROUP = 128
CONTEXTS, SEQUENCES = (1024, 8192, 32768), (1, 16)
HEADS, KV_HEADS, HEAD_DIM, PAGE = 32, 8, 128, 16
ADAPTERS, RANK = 8, 16
ROTATED_BYTES = 512 << 20
DEVICE = "cuda"


@dataclass(frozen=True, eq=False)
class Subject:
    """A call, the copies of its weights or caches that take turns, and the bytes of one."""

    name: str
    copies: Sequence[Any]
    call: Callable[[Any, Any], Tensor]
    nbytes: int


class Replay:
    """One call per copy in a CUDA graph."""

    def __init__(self, subject: Subject, argument: Any) -> None:
        self.calls = len(subject.copies)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles and chooses before anything is recorded
            for copy in subject.copies[:2]:
                subject.call(copy, argument)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for copy in subject.copies:
                subject.call(copy, argument)

    def seconds(self) -> float:
        """Of one call, over one replay."""
        return timed(self.graph.replay) / self.calls


def timed(call: Callable[[], Any]) -> float:
    """Seconds that the GPU takes."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def copy_bandwidth() -> float:
    """Bytes read and written per second by copies of 1 GiB; the median of 20."""
    source = torch.ones(1 << 28, device=DEVICE)
    target = torch.empty_like(source)
    seconds = [timed(lambda: target.copy_(source)) for _ in range(25)]
    return 2 * source.nbytes / statistics.median(seconds[5:])


def rotated(first: Any, nbytes: int, copy: Callable[[Any], Any]) -> list[Any]:
    """`first` and copies of it, `ROTATED_BYTES` together or more."""
    return [first, *(copy(first) for _ in range(math.ceil(ROTATED_BYTES / nbytes) - 1))]


def copy_parts(parts: Any) -> Any:
    """A copy of a dataclass of tensors, tensors and all."""
    fields = {k: v.clone() if isinstance(v, Tensor) else v for k, v in vars(parts).items()}
    return type(parts)(**fields)


def measure(
    subjects: Sequence[Subject],
    argument: Any,
    extra_bytes: int,
    rounds: int,
    bandwidth: float,
    case: dict[str, Any],
) -> list[dict[str, Any]]:
    """All subjects with one argument, in turns."""
    replays = {subject.name: Replay(subject, argument) for subject in subjects}
    times: dict[str, list[float]] = {subject.name: [] for subject in subjects}
    for number in range(rounds + 1):
        for name, replay in replays.items():
            seconds = replay.seconds()
            if number:  # the first round warms up
                times[name].append(seconds)
    found = []
    for subject in subjects:
        seconds, total = statistics.median(times[subject.name]), subject.nbytes + extra_bytes
        found.append(
            {
                **case, "subject": subject.name, "copies": len(subject.copies), "bytes": total,
                "seconds": seconds, "bandwidth_share": total / seconds / bandwidth,
                "rounds": times[subject.name],
            }
        )  # fmt: skip
    return found


def planes(bits: int, shape: tuple[int, int]) -> tuple[triton_linear.Planes, Tensor]:
    """A random weight as our products read it, and as it counts, in float64."""
    outputs, inputs = shape
    generator = torch.Generator(DEVICE).manual_seed(bits)
    groups = inputs // GROUP

    def noise(*size: int) -> Tensor:
        return torch.randint(0, 256, size, dtype=torch.uint8, device=DEVICE, generator=generator)

    codes, zeros = noise(outputs, packed_width(inputs, bits)), noise(outputs, packed_width(groups, bits))
    scales = torch.rand(outputs, groups, device=DEVICE, generator=generator).bfloat16()
    stored: dict[str, Any] = {"bits": bits, "group_size": GROUP, "in_features": inputs}
    layout = triton_linear.prepare(codes, scales, zeros, **stored)
    return layout, dequantize(codes, scales, zeros, **stored).double()


def check(
    name: str, call: Callable[[Tensor], Tensor], x: Tensor, exact: Tensor, sizes: Tensor, console: Console
) -> None:
    """Stop where a product is off, and say so where a row's bits depend on its batch.

    `exact` and `sizes` are the results of the first rows of `x`, and the sums of the sizes of their terms.
    """
    together = call(x)
    off = ((together[: len(exact)] - exact).abs() / sizes).max().item()
    if not off < 2.0**-8:
        raise SystemExit(f"the product {name} is off by {off:.1e} of the sum of sizes")
    for batch in (1, 4, 16, 64, 512):
        if batch < len(x) and not torch.equal(call(x[:batch]), together[:batch]):
            console.print(f"[red]{name}: rows have other bits in a batch of {batch}")


def packed_linear(bits: int, shape: tuple[int, int], console: Console) -> Subject:
    """Our product, after a look at its results."""
    layout, weight = planes(bits, shape)
    x = torch.randn(max(BATCHES), shape[1], device=DEVICE).bfloat16()
    exact, sizes = x.double() @ weight.t(), x.double().abs() @ weight.t().abs()
    check(f"{bits} bits {shape}", lambda x: triton_linear.linear(x, layout), x, exact, sizes, console)
    copies = rotated(layout, layout.nbytes, copy_parts)
    return Subject(f"{bits} bits", copies, lambda w, x: triton_linear.linear(x, w), layout.nbytes)


def rounded_linear(bits: int, shape: tuple[int, int], console: Console) -> Subject:
    """Our product of activations rounded to int8, after a look at its results."""
    layout, weight = planes(bits, shape)
    x = torch.randn(max(PROMPTS), shape[1], device=DEVICE).bfloat16()
    first = to_bytes(x[:64], GROUP).double()
    exact, sizes = first @ weight.t(), first.abs() @ weight.t().abs()
    name = f"int8 x {bits} bits"
    check(f"{name} {shape}", lambda x: triton_int8.linear(x, layout), x, exact, sizes, console)
    copies = rotated(layout, layout.nbytes, copy_parts)
    return Subject(name, copies, lambda w, x: triton_int8.linear(x, w), layout.nbytes)


def fp8_linears(shape: tuple[int, int], console: Console) -> list[Subject]:
    """Our FP8 product and, on compute capability 9.0, PyTorch's with a scale per row; both round `x`."""
    weight = triton_fp8.to_fp8(torch.randn(shape, device=DEVICE))
    x = torch.randn(max(PROMPTS), shape[1], device=DEVICE).bfloat16()
    first = triton_fp8.to_fp8(x[:64])
    left, right = (part.values.double() * part.scales.double()[:, None] for part in (first, weight))
    exact, sizes = left @ right.t(), left.abs() @ right.t().abs()
    check(f"fp8 {shape}", lambda x: triton_fp8.linear(x, weight), x, exact, sizes, console)
    nbytes = weight.values.nbytes + weight.scales.nbytes
    copies = rotated(weight, nbytes, copy_parts)

    def peer(weight: triton_fp8.Codes, x: Tensor) -> Tensor:
        codes = triton_fp8.round_rows(x)
        return torch._scaled_mm(
            codes.values, weight.values.t(), scale_a=codes.scales[:, None], scale_b=weight.scales[None],
            out_dtype=torch.bfloat16, use_fast_accum=True,
        )  # fmt: skip

    subjects = [Subject("fp8", copies, lambda w, x: triton_fp8.linear(x, w), nbytes)]
    if torch.cuda.get_device_capability() == (9, 0):
        subjects.append(Subject("fp8 PyTorch", copies, peer, nbytes))
    return subjects


def dense_linear(shape: tuple[int, int]) -> Subject:
    """cuBLAS's bf16 product."""
    dense = torch.randn(shape, device=DEVICE).bfloat16()
    copies = rotated(dense, dense.nbytes, Tensor.clone)
    return Subject("bf16 cuBLAS", copies, lambda w, x: torch.nn.functional.linear(x, w), dense.nbytes)


def torch_linears(shape: tuple[int, int]) -> list[Subject]:
    """cuBLAS's bf16 product and PyTorch's int4 product."""
    outputs, inputs = shape
    halves = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8, device=DEVICE)
    packed = torch.ops.aten._convert_weight_to_int4pack(halves, 8)
    scales_and_zeros = torch.rand(inputs // GROUP, outputs, 2, device=DEVICE).bfloat16()
    nbytes = packed.nbytes + scales_and_zeros.nbytes
    return [
        dense_linear(shape),
        Subject(
            "int4 PyTorch",
            rotated((packed, scales_and_zeros), nbytes, lambda parts: tuple(part.clone() for part in parts)),
            lambda parts, x: torch.ops.aten._weight_int4pack_mm(x, parts[0], GROUP, parts[1]),
            nbytes,
        ),
    ]


def measure_linears(rounds: int, bandwidth: float, console: Console) -> list[dict[str, Any]]:
    """Every width at every shape and batch."""
    rows = []
    for shape in SHAPES:
        subjects = [*torch_linears(shape), *(packed_linear(bits, shape, console) for bits in WIDTHS)]
        for batch in BATCHES:
            x = torch.randn(batch, shape[1], device=DEVICE).bfloat16()
            case = {"out_features": shape[0], "in_features": shape[1], "batch": batch}
            rows += measure(subjects, x, 2 * batch * sum(shape), rounds, bandwidth, case)
        show(
            console,
            f"{shape[0]} x {shape[1]}, groups of {GROUP}",
            [row for row in rows if (row["out_features"], row["in_features"]) == shape],
            lambda row: f"batch {row['batch']}",
        )
        del subjects
        torch.cuda.empty_cache()
    return rows


def measure_prompts(rounds: int, bandwidth: float, console: Console) -> list[dict[str, Any]]:
    """Products of many rows, which arithmetic decides and not bytes."""
    rows = []
    for shape in SHAPES:
        subjects = [dense_linear(shape), *(rounded_linear(bits, shape, console) for bits in PROMPT_WIDTHS)]
        if triton_fp8.has_fp8(torch.device(DEVICE)):
            subjects += fp8_linears(shape, console)
        for batch in PROMPTS:
            x = torch.randn(batch, shape[1], device=DEVICE).bfloat16()
            case = {"out_features": shape[0], "in_features": shape[1], "batch": batch}
            rows += measure(subjects, x, 2 * batch * sum(shape), rounds, bandwidth, case)
        show(
            console,
            f"{shape[0]} x {shape[1]}",
            [row for row in rows if (row["out_features"], row["in_features"]) == shape],
            lambda row: f"{row['batch']} rows",
        )
        del subjects
        torch.cuda.empty_cache()
    return rows


def caches(sequences: int, context: int) -> list[Subject]:
    """Our attention over bf16, int8 and int4 pages, and PyTorch's over whole keys and values."""
    most = context // PAGE
    shape = sequences * most, PAGE, KV_HEADS, HEAD_DIM
    keys, values = (torch.randn(shape, device=DEVICE).bfloat16() for _ in range(2))
    tables = torch.randperm(sequences * most, device=DEVICE).int().view(sequences, most)
    lengths = torch.full((sequences,), context, dtype=torch.int32, device=DEVICE)
    kept = {"bf16 pages": (triton_attention.Cache(keys, values), keys, values)}
    for name, store in (("int8 pages", triton_attention.to_int8), ("int4 pages", triton_attention.to_int4)):
        stored = store(keys), store(values)
        parts = (part for pair in zip(*stored, strict=True) for part in pair)
        kept[name] = triton_attention.Cache(*parts), restored(*stored[0]), restored(*stored[1])

    def whole(pages: Tensor) -> Tensor:
        joined = pages[tables.long()].view(sequences, context, KV_HEADS, HEAD_DIM)
        return joined.transpose(1, 2).contiguous()

    def peer(parts: Sequence[Tensor], queries: Tensor) -> Tensor:
        found = torch.nn.functional.scaled_dot_product_attention(
            queries.unsqueeze(2), parts[0], parts[1], enable_gqa=True
        )
        return found.squeeze(2)

    def ours(cache: triton_attention.Cache, queries: Tensor) -> Tensor:
        return triton_attention.decode(queries, cache, tables, lengths)

    pieces = whole(keys), whole(values)
    queries = torch.randn(sequences, HEADS, HEAD_DIM, device=DEVICE).bfloat16()
    subjects = []
    for name, (cache, *as_they_count) in kept.items():
        exact = peer([whole(part)[:1].float() for part in as_they_count], queries[:1].float())
        off = ((ours(cache, queries)[:1] - exact).abs().max() / exact.abs().max()).item()
        if not off < 0.02:
            raise SystemExit(f"attention over {context} tokens in {name} is off by {off:.1e} of the largest")
        nbytes = sum(part.nbytes for part in vars(cache).values() if part is not None)
        subjects.append(Subject(name, rotated(cache, nbytes, copy_parts), ours, nbytes))
    size = 2 * keys.nbytes
    return [
        Subject(
            "bf16 PyTorch, in one piece",
            rotated(pieces, size, lambda parts: tuple(part.clone() for part in parts)),
            peer,
            size,
        ),
        *subjects,
    ]


def restored(codes: Tensor, scales: Tensor, zeros: Tensor | None = None) -> Tensor:
    """Stored keys or values as they count, in float32."""
    if zeros is None:
        return codes * scales[..., None]
    return (torch.cat([codes & 15, codes >> 4], -1).float() - zeros[..., None]) * scales[..., None]


def measure_attention(rounds: int, bandwidth: float, console: Console) -> list[dict[str, Any]]:
    """Every context and number of sequences."""
    rows = []
    for sequences in SEQUENCES:
        for context in CONTEXTS:
            subjects = caches(sequences, context)
            queries = torch.randn(sequences, HEADS, HEAD_DIM, device=DEVICE).bfloat16()
            case = {"sequences": sequences, "context": context}
            rows += measure(subjects, queries, 2 * queries.nbytes, rounds, bandwidth, case)
            del subjects
            torch.cuda.empty_cache()
    title = f"one token, {HEADS} heads of {HEAD_DIM}, {KV_HEADS} of keys"
    show(console, title, rows, lambda row: f"{row['sequences']} x {row['context']}")
    return rows


def measure_adapters(rounds: int, bandwidth: float, console: Console) -> list[dict[str, Any]]:
    """Rows of several adapters, next to gathering their matrices."""
    outputs, inputs = SHAPES[0]
    single = [
        (
            torch.randn(RANK, inputs, device=DEVICE).bfloat16(),
            torch.randn(outputs, RANK, device=DEVICE).bfloat16(),
            1.0 / inputs,
        )
        for _ in range(ADAPTERS)
    ]
    adapters = triton_adapters.stack(single)
    rows = []
    for batch in BATCHES:
        of_row = torch.arange(batch, device=DEVICE) % ADAPTERS
        tiles = triton_adapters.tile_rows(of_row, ADAPTERS)
        y = torch.zeros(batch, outputs, device=DEVICE, dtype=torch.bfloat16)

        def ours(
            weights: triton_adapters.Adapters,
            x: Tensor,
            y: Tensor = y,
            tiles: triton_adapters.Tiles = tiles,
        ) -> Tensor:
            return triton_adapters.add(y, x, weights, tiles)

        def gathered(
            weights: triton_adapters.Adapters,
            x: Tensor,
            y: Tensor = y,
            of_row: Tensor = of_row,
        ) -> Tensor:
            low = torch.bmm(weights.down[of_row], x.unsqueeze(2))
            high = torch.bmm(weights.up[of_row], low).squeeze(2)
            return y.add_(high * weights.scales[of_row].unsqueeze(1).to(y.dtype))

        used = min(batch, ADAPTERS)
        nbytes = used * RANK * (inputs + outputs) * 2
        copies = rotated(adapters, nbytes, copy_parts)
        subjects = [Subject("gathered", copies, gathered, nbytes), Subject("tiles", copies, ours, nbytes)]
        x = torch.randn(batch, inputs, device=DEVICE).bfloat16()
        exact = gathered(adapters, x, torch.zeros_like(y)).float()
        off = ((ours(adapters, x, torch.zeros_like(y)) - exact).abs().max() / exact.abs().max()).item()
        if not off < 0.05:
            raise SystemExit(f"adapters of {batch} rows are off by {off:.1e} of the largest")
        extra = 2 * batch * (inputs + 2 * outputs)
        rows += measure(subjects, x, extra, rounds, bandwidth, {"batch": batch})
    title = f"{ADAPTERS} adapters of rank {RANK}, {outputs} x {inputs}"
    show(console, title, rows, lambda row: f"batch {row['batch']}")
    return rows


def show(
    console: Console, title: str, rows: Sequence[dict[str, Any]], heading: Callable[[dict[str, Any]], str]
) -> None:
    """A table of subjects by cases: time, share of the copy bandwidth, and how much faster than the first."""
    headings = list(dict.fromkeys(heading(row) for row in rows))
    names = list(dict.fromkeys(row["subject"] for row in rows))
    cells = {(row["subject"], heading(row)): row for row in rows}
    table = Table("", *headings, title=f"{title}: time, share of copy bandwidth, x {names[0]}")
    for name in names:
        line = []
        for column in headings:
            row, first = cells[name, column], cells[names[0], column]
            line.append(
                f"{row['seconds'] * 1e6:.1f} us {row['bandwidth_share']:.0%} "
                f"{first['seconds'] / row['seconds']:.2f}x"
            )
        table.add_row(name, *line)
    console.print(table)


PARTS = {
    "linears": measure_linears,
    "prompts": measure_prompts,
    "attention": measure_attention,
    "adapters": measure_adapters,
}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--name", default="gpu_kernels", help="name of the result file")
    add_quiet_option(parser)
    arguments = parser.parse_args()
    if not torch.cuda.is_available() or torch.version.cuda is None:
        raise SystemExit("no CUDA device · expected: an NVIDIA GPU and PyTorch for it · run it where one is")
    if not triton_runtime.installed() or triton_runtime.interpreted():
        raise SystemExit(
            "Triton is missing or set to interpret · expected: kernels on the GPU · "
            "pip install triton, unset TRITON_INTERPRET"
        )
    busy = require_quiet(arguments.even_if_busy)
    console = Console()
    bandwidth = copy_bandwidth()
    properties = torch.cuda.get_device_properties(0)
    console.print(f"{properties.name}, copies {bandwidth / 1e9:.0f} GB/s, read and written")
    found = {part: PARTS[part](arguments.rounds, bandwidth, console) for part in arguments.only}
    gpu = {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "processors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "triton": triton_runtime.triton.__version__,
    }
    write_result(arguments.name, {"others_cores": busy, "gpu": gpu, "copy_bandwidth": bandwidth, **found})


if __name__ == "__main__":
    main()
