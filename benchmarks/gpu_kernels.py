"""Speed of the Triton kernels on a GPU, beside PyTorch's and the GPU's own copy bandwidth.

Linears: every width in groups of 128 with zero points, beside bf16 through cuBLAS and PyTorch's int4
product. Attention: one new token per sequence over bf16 and int8 pages, beside scaled_dot_product_attention
over keys and values that lie in one piece. Adapters: rows of 8 adapters of rank 16, beside gathered batched
products.

What is read rotates over at least 512 MB, so that no cache holds it; calls are replayed from a CUDA graph,
and subjects take turns. Bytes are those that must be read and written: weights with scales and zero points
(or keys and values), inputs, outputs. Their rate is compared with a copy's, which counts bytes read and
written alike. Results are first compared with exact ones, and the bits of a linear's rows with those of the
same rows in other batches.

    python benchmarks/gpu_kernels.py [--only linears attention adapters] [--rounds 7]
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
from tailorbird.kernels import triton_adapters, triton_attention, triton_linear, triton_runtime
from tailorbird.kernels.packing import packed_width
from tailorbird.kernels.reference import dequantize

#: (out_features, in_features)
SHAPES = ((4096, 4096), (8192, 8192), (14336, 4096))
BATCHES = (1, 4, 16, 64)
WIDTHS = (2, 3, 4, 5, 6, 8)
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


def packed_linear(bits: int, shape: tuple[int, int], console: Console) -> Subject:
    """Our product, after a look at its results."""
    outputs, inputs = shape
    generator = torch.Generator(DEVICE).manual_seed(bits)
    groups = inputs // GROUP

    def noise(*size: int) -> Tensor:
        return torch.randint(0, 256, size, dtype=torch.uint8, device=DEVICE, generator=generator)

    codes, zeros = noise(outputs, packed_width(inputs, bits)), noise(outputs, packed_width(groups, bits))
    scales = torch.rand(outputs, groups, device=DEVICE, generator=generator).bfloat16()
    stored: dict[str, Any] = {"bits": bits, "group_size": GROUP, "in_features": inputs}
    layout = triton_linear.prepare(codes, scales, zeros, **stored)
    x = torch.randn(max(BATCHES), inputs, device=DEVICE, generator=generator).bfloat16()
    weight = dequantize(codes, scales, zeros, **stored).double()
    together, exact = triton_linear.linear(x, layout), x.double() @ weight.t()
    off = ((together - exact).abs() / (x.double().abs() @ weight.t().abs())).max().item()
    if not off < 2.0**-8:
        raise SystemExit(f"the product of {bits} bits at {shape} is off by {off:.1e} of the sum of sizes")
    for batch in BATCHES:
        if not torch.equal(triton_linear.linear(x[:batch], layout), together[:batch]):
            console.print(f"[red]{bits} bits, {shape}: rows have other bits in a batch of {batch}")
    nbytes = layout.nbytes
    return Subject(
        f"{bits} bits", rotated(layout, nbytes, copy_parts), lambda w, x: triton_linear.linear(x, w), nbytes
    )


def torch_linears(shape: tuple[int, int]) -> list[Subject]:
    """cuBLAS's bf16 product and PyTorch's int4 product."""
    outputs, inputs = shape
    dense = torch.randn(shape, device=DEVICE).bfloat16()
    halves = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8, device=DEVICE)
    packed = torch.ops.aten._convert_weight_to_int4pack(halves, 8)
    scales_and_zeros = torch.rand(inputs // GROUP, outputs, 2, device=DEVICE).bfloat16()
    nbytes = packed.nbytes + scales_and_zeros.nbytes
    return [
        Subject(
            "bf16 cuBLAS",
            rotated(dense, dense.nbytes, Tensor.clone),
            lambda w, x: torch.nn.functional.linear(x, w),
            dense.nbytes,
        ),
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


def caches(sequences: int, context: int) -> list[Subject]:
    """Our attention over bf16 and int8 pages, and PyTorch's over whole keys and values."""
    most = context // PAGE
    shape = sequences * most, PAGE, KV_HEADS, HEAD_DIM
    keys, values = (torch.randn(shape, device=DEVICE).bfloat16() for _ in range(2))
    tables = torch.randperm(sequences * most, device=DEVICE).int().view(sequences, most)
    lengths = torch.full((sequences,), context, dtype=torch.int32, device=DEVICE)
    (int8_keys, key_scales), (int8_values, value_scales) = map(triton_attention.to_int8, (keys, values))
    paged = triton_attention.Cache(keys, values)
    small = triton_attention.Cache(int8_keys, int8_values, key_scales, value_scales)

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
    exact = peer([piece[:1].float() for piece in pieces], queries[:1].float())
    for cache, allowed in ((paged, 0.02), (small, 0.05)):
        off = ((ours(cache, queries)[:1] - exact).abs().max() / exact.abs().max()).item()
        if not off < allowed:
            raise SystemExit(
                f"attention over {context} tokens in {cache.keys.dtype} is off by {off:.1e} of the largest"
            )
    size, small_size = 2 * keys.nbytes, 2 * (int8_keys.nbytes + key_scales.nbytes)
    return [
        Subject(
            "bf16 PyTorch, in one piece",
            rotated(pieces, size, lambda parts: tuple(part.clone() for part in parts)),
            peer,
            size,
        ),
        Subject("bf16 pages", rotated(paged, size, copy_parts), ours, size),
        Subject("int8 pages", rotated(small, small_size, copy_parts), ours, small_size),
    ]


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


PARTS = {"linears": measure_linears, "attention": measure_attention, "adapters": measure_adapters}


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
