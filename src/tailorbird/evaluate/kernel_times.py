"""What the compiled blocks take on this machine, measured once for every kernel and kept.

Whatever disturbs a measurement makes it slower, so the fastest of several counts. Blocks of random weights
stand in for a model's: small ones that stay in the cache, large ones that together
don't, and ones so small that only what surrounds the arithmetic is left. `hardware.cost` puts the time of a
model's step together from these.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tailorbird.errors import SettingsError
from tailorbird.formats.modules import CompressedEmbedding, CompressedLinear
from tailorbird.formats.packed import Coding, FloatCoding, IntegerCoding, PackedWeight
from tailorbird.hardware.cache import kernel_times_path, write_entry
from tailorbird.hardware.cost import (
    AttentionTimes,
    BlockShape,
    KernelTimes,
    ModelShape,
    ProductShape,
    decode_step_seconds,
    prefill_seconds,
)
from tailorbird.hardware.probe import machine_identity
from tailorbird.kernels import native
from tailorbird.kernels.blocks import (
    ACTIVATIONS,
    NORM_KINDS,
    PAGE,
    STEPS,
    BlockStructure,
    HeadsStructure,
    LinearStructure,
    NormStructure,
    run_blocks,
    run_head,
)
from tailorbird.kernels.reference import group_layout
from tailorbird.progress import Progress, Silent
from tailorbird.run.fused import MOST_TOKENS, FusedModel
from tailorbird.run.generate import FusedDecoding

SCHEMA = 1
#: Numbers of tokens at which products are timed; 4 and 12 are where other kernels take over.
TOKENS = (1, 2, 3, 4, 8, 11, 12, 16, 32, 64, 128, 512)
#: Weights that are read in turn for the rate from memory: more than last-level caches hold.
STREAM_BYTES = 128 << 20
#: Operations after which a measurement of many blocks has enough of them.
ENOUGH_OPERATIONS = 4e9
#: Repetitions of a measurement, and of one with few tokens, which is the more easily disturbed.
REPEATS, MORE_REPEATS, FEW_TOKENS = 5, 15, 16
#: Contexts at which attention of single queries is timed, and for how many sequences.
CONTEXTS, SEQUENCES = (96, 608), 16
#: Prompts at which attention of neighbours is timed.
PROMPTS = (64, 512)
#: Logits of a token where the head is timed.
VOCABULARY = 32_768
#: Blocks of a model that is hardly there, beside one of a single block.
MANY_LAYERS = 9
#: What is read between calls that take microseconds: more than the caches next to a core hold.
OTHER_BYTES = 16 << 20
#: Channels of an embedding's row.
EMBEDDED = 1024

_LINEARS = ("attention_in", "attention_out", "mlp_in", "mlp_out")


@dataclass(frozen=True)
class Kernel:
    """How a linear is multiplied in compiled blocks.

    Attributes
    ----------
    coding : Coding
        Of the stored weight; a dense weight in float16 is widened to float32.
    int8 : bool
        Whether inputs are rounded to bytes.
    """

    coding: Coding
    int8: bool = False

    @property
    def name(self) -> str:
        """Such as ``int4 g64 · int8`` or ``bf16``."""
        if isinstance(self.coding, FloatCoding):
            return "fp32" if self.coding.dtype == "float16" else self.coding.label
        return f"{self.coding.label} · {'int8' if self.int8 else 'float'}"


@dataclass(frozen=True)
class _Width:
    """Channels of a stand-in block: between blocks, inside the feed-forward sublayer, and heads of 64."""

    width: int
    inner: int
    heads: int
    kv_heads: int

    @property
    def shapes(self) -> dict[str, list[tuple[int, int]]]:
        """``(out_features, in_features)`` of the linears of each step."""
        attended, keys = 64 * self.heads, 64 * self.kv_heads
        return {
            "attention_in": [(rows, self.width) for rows in (attended, keys, keys)],
            "attention_out": [(self.width, attended)],
            "mlp_in": [(self.inner, self.width)] * 2,
            "mlp_out": [(self.width, self.inner)],
        }

    @property
    def weights(self) -> int:
        return sum(rows * columns for shapes in self.shapes.values() for rows, columns in shapes)


_NOTHING = _Width(64, 64, 1, 1)
_CACHED = _Width(512, 1408, 8, 4)
_STREAMED = _Width(1024, 2816, 16, 8)


class _Weights:
    """Random weights of one kernel in memory that the linears share out among themselves."""

    def __init__(self, kernel: Kernel, size: int) -> None:
        self.kernel, self.arena, self.kept = kernel, native.Arena(), []  # type: ignore[var-annotated]
        self.left = size

    def linear(self, rows: int, columns: int) -> LinearStructure:
        """A linear with weights of its own."""
        coding = self.kernel.coding
        if isinstance(coding, FloatCoding):
            dtype = torch.bfloat16 if coding.dtype == "bfloat16" else torch.float32
            dense = self._keep(torch.full((rows, columns), 1e-3, dtype=dtype, device="cpu"))
            described = native.WeightStructure(rows=rows, in_features=columns, columns=columns, groups=1)
            self.left -= dense.nbytes
            return LinearStructure(described, dense.data_ptr(), None, int(dtype == torch.float32), 0)
        groups, size = group_layout(columns, coding.group_size)
        tiles, steps = -(-rows // native.LANES), -(-columns // native.STEP)
        codes = self._keep(self.arena.empty(tiles, steps, coding.bits, native.LANES))
        codes.fill_(0x2B5D1E73)
        scales = self._keep(
            torch.full((tiles, groups, native.LANES), 1e-3, dtype=torch.bfloat16, device="cpu")
        )
        zeros = table = None
        if coding.levels is not None:
            table = self._keep(torch.arange(16, dtype=torch.uint8, device="cpu"))
        elif not coding.symmetric:
            zeros = self._keep(torch.ones((tiles, groups, native.LANES), dtype=torch.uint8, device="cpu"))
        described = native.WeightStructure(
            codes.data_ptr(), scales.data_ptr(), None if zeros is None else zeros.data_ptr(), rows, columns,
            steps * native.STEP, groups, steps * native.STEP if groups == 1 else size,
            coding.bits if table is None else 8, 0, None if table is None else table.data_ptr(),
        )  # fmt: skip
        self.left -= codes.nbytes + scales.nbytes + (0 if zeros is None else zeros.nbytes)
        return LinearStructure(described, None, None, 0, int(self.kernel.int8))

    def block(self, of: _Width) -> BlockStructure:
        """A gated block with rotary angles."""
        ones = self._keep(torch.ones(of.width, dtype=torch.float32, device="cpu"))
        norm = NormStructure(ones.data_ptr(), None, 1e-5, NORM_KINDS["root_mean_square"])
        none = NormStructure(None, None, 0.0, NORM_KINDS["none"])
        q, k = 64 * of.heads, 64 * of.kv_heads
        block = BlockStructure(
            before_attention=norm, before_mlp=norm, after_attention=none, after_mlp=none, query=none,
            key=none, queries=HeadsStructure(0, q // of.kv_heads, 64), keys=HeadsStructure(q, 64, 64),
            values=HeadsStructure(q + k, 64, 64), heads=of.heads, kv_heads=of.kv_heads, head_dim=64,
            rotary_dim=64, attention_linears=3, mlp_linears=2, gated=1, activation=ACTIVATIONS["silu"],
            scale=0.125,
        )  # fmt: skip
        for step, shapes in of.shapes.items():
            linears = [self.linear(*shape) for shape in shapes]
            if len(shapes) == 1:
                setattr(block, step, linears[0])
            else:
                for index, linear in enumerate(linears):
                    getattr(block, step)[index] = linear
        return block

    def blocks(self, of: _Width, most: int) -> Any:
        """At most so many blocks: as many as the memory holds, one at least."""
        made = [self.block(of)]
        while len(made) < most and self.left > 0:
            made.append(self.block(of))
        return (BlockStructure * len(made))(*made)

    def _keep(self, tensor: Tensor) -> Tensor:
        self.kept.append(tensor)
        return tensor


class _Stand:
    """Blocks on which tokens are timed."""

    def __init__(self, kernel: Kernel, of: _Width, most: int = 1, size: int = 1) -> None:
        self.of, self.weights = of, _Weights(kernel, size)
        self.blocks = self.weights.blocks(of, most)

    def steps(self, tokens: int, sequences: int = 1, context: int = 0, most: int | None = None) -> Tensor:
        """Least seconds ``[len(STEPS)]`` of a block; tokens are shared out evenly among the sequences."""
        of, each = self.of, tokens // sequences
        pages = -(-(context + each) // PAGE)
        width = 64 * of.kv_heads * PAGE
        apart = len(self.blocks) if context else 1  # the keys of each block, as a model has them
        shape = 2, apart, sequences * pages * width
        cache = torch.zeros(shape, dtype=torch.bfloat16, device="cpu")
        angles = torch.ones(context + each, 64, dtype=torch.float32, device="cpu")
        for index, block in enumerate(self.blocks):
            block.key_pages, block.value_pages = (part[index % apart].data_ptr() for part in cache)
            block.cosine = block.sine = angles.data_ptr()
        hidden = torch.ones(tokens, of.width, dtype=torch.float32, device="cpu")
        positions = torch.arange(context, context + each, dtype=torch.int32, device="cpu").repeat(sequences)
        of_sequence = torch.arange(sequences, dtype=torch.int32, device="cpu").repeat_interleave(each)
        table = torch.arange(sequences * pages, dtype=torch.int32, device="cpu").view(sequences, pages)
        count = len(self.blocks) if most is None else min(most, len(self.blocks))
        rounds = []
        for number in range((MORE_REPEATS if tokens <= FEW_TOKENS else REPEATS) + 1):
            seconds = torch.zeros(len(STEPS), dtype=torch.float64, device="cpu")
            run_blocks(
                self.blocks, hidden, positions, of_sequence, table, torch.bfloat16, last=count,
                seconds=seconds,
            )  # fmt: skip
            if number:  # the first one warms up
                rounds.append(seconds / count)
        return torch.stack(rounds).min(0).values


def _linears(seconds: Tensor) -> float:
    return sum(float(seconds[STEPS.index(step)]) for step in _LINEARS)


def _of(seconds: Tensor, step: str) -> float:
    return float(seconds[STEPS.index(step)])


def _product_times(kernel: Kernel) -> list[tuple[float, float]]:
    """For each of `TOKENS`, seconds per weight from the cache and from memory."""
    nothing, cached = _Stand(kernel, _NOTHING), _Stand(kernel, _CACHED)
    streamed = _Stand(kernel, _STREAMED, most=1 << 10, size=STREAM_BYTES)
    rates = []
    for tokens in TOKENS:
        around = _linears(nothing.steps(tokens))
        enough = max(1, int(ENOUGH_OPERATIONS / (2 * tokens * _STREAMED.weights)))
        both = (_linears(cached.steps(tokens)), _linears(streamed.steps(tokens, most=enough)))
        few = [max(taken - around, 0.1 * taken) for taken in both]
        rates.append((few[0] / _CACHED.weights, few[1] / _STREAMED.weights))
    return rates


def _streaming() -> list[tuple[int, float]]:
    """Bytes of weights read in turn, and how far their rate is from the cache's to the memory's."""
    kernel = Kernel(IntegerCoding(8, 64), int8=True)
    stand = _Stand(kernel, _CACHED, most=1 << 10, size=STREAM_BYTES)
    size = _CACHED.weights * (8 + (16 + 8) / 64) / 8
    counts = sorted({round(2 ** (half / 2)) for half in range(20)} & {*range(len(stand.blocks) + 1)})
    taken = [_linears(stand.steps(1, most=count)) for count in counts]
    span = taken[-1] - min(taken)
    share, rising = 0.0, []
    for count, seconds in zip(counts, taken, strict=True):
        share = max(share, (seconds - min(taken)) / span if span > 0 else 0.0)
        rising.append((int(count * size), share))
    return rising


def _around_products(threads: int) -> dict[str, Any]:
    """The fields of `KernelTimes` that no kernel changes."""
    kernel = Kernel(IntegerCoding(4, 64), int8=True)
    nothing, cached = _Stand(kernel, _NOTHING), _Stand(kernel, _CACHED)
    one, many = nothing.steps(1), nothing.steps(64)
    own = -(-64 // threads)
    token = max(0.0, float(many.sum() - one.sum()) / max(1, own - 1))
    wide = cached.steps(64)

    def per_channel(step: str, channels: int) -> float:
        return max(0.0, _of(wide, step) - _of(many, step)) / own / (channels - 64)

    memory = _Stand(kernel, _STREAMED, most=4, size=STREAM_BYTES)
    apart = [(SEQUENCES, SEQUENCES, context) for context in CONTEXTS]
    alone = _attention(cached, apart, threads)
    return {
        "block": max(0.0, float(one.sum()) - token),
        "token": token,
        "norms": per_channel("norms", _CACHED.width),
        "activation": per_channel("activation", _CACHED.inner),
        "alone": alone,
        "alone_streamed": _from_memory(alone, _attention(memory, apart, threads)),
        "together": _attention(cached, [(tokens, 1, 0) for tokens in PROMPTS], threads),
        **_head(kernel),
        **_lookup(),
    }


def _attention(stand: _Stand, cases: Sequence[tuple[int, int, int]], threads: int) -> dict[str, float]:
    """The fields of `AttentionTimes`, from two cases of tokens, sequences and context before them."""
    attended = 64 * stand.of.heads
    queries, keys, taken, placed = [], [], [], 0.0
    for tokens, sequences, context in cases:
        seconds, each = stand.steps(tokens, sequences, context), tokens // sequences
        queries.append(tokens)
        keys.append(sequences * (each * context + each * (each + 1) / 2))
        taken.append(_of(seconds, "attention") / attended)
        placed = _of(seconds, "rotary") / attended / -(-tokens // threads)
    # taken = queries * query + keys * pair
    (few, many), (near, far), (short, long) = queries, keys, taken
    pair = max(0.0, (long * few - short * many) / (far * few - near * many))
    return {"placed": placed, "query": max(0.0, short - near * pair) / few, "pair": pair}


def _from_memory(cached: dict[str, float], streamed: dict[str, float]) -> dict[str, float]:
    """The fields of `AttentionTimes` where keys and values come from memory: what that adds goes to bytes."""
    attended, size = 64 * _STREAMED.heads, 2 * 2 * 64 * _STREAMED.kv_heads
    byte = max(0.0, streamed["pair"] - cached["pair"]) * attended / size
    return {**cached, "placed": streamed["placed"], "byte": byte}


def _head(kernel: Kernel) -> dict[str, float]:
    """What giving back logits takes beyond the head's product."""
    head, small = (_Weights(kernel, 1) for _ in range(2))
    ones = torch.ones(64, dtype=torch.float32, device="cpu")
    norm = NormStructure(ones.data_ptr(), None, 1e-5, NORM_KINDS["root_mean_square"])
    hidden = torch.ones(SEQUENCES, 64, dtype=torch.float32, device="cpu")
    large, least = head.linear(VOCABULARY, 64), small.linear(64, 64)
    with_logits = _least(lambda: run_head(norm, large, hidden).argmax(-1))
    without = _least(lambda: run_head(norm, least, hidden).argmax(-1))
    return {"logit": max(0.0, with_logits - without) / (SEQUENCES * VOCABULARY)}


def _lookup() -> dict[str, float]:
    """What rows of a compressed embedding take."""
    coding = IntegerCoding(4, 64)
    codes = torch.zeros(256, EMBEDDED, dtype=torch.int64, device="cpu")
    scales = torch.ones(256, EMBEDDED // 64, dtype=torch.bfloat16, device="cpu")
    zeros = torch.ones(256, EMBEDDED // 64, dtype=torch.uint8, device="cpu")
    embedding = CompressedEmbedding.from_packed(PackedWeight.from_codes(codes, scales, zeros, coding))
    every = torch.arange(256, device="cpu")
    one, many = _least(lambda: embedding(every[:1])), _least(lambda: embedding(every))
    return {"lookup": one, "unpacked": max(0.0, many - one) / 255 / EMBEDDED}


def _around_blocks(times: KernelTimes) -> dict[str, float]:
    """What a step takes around blocks, and what the first one does: on models that are hardly there."""
    model, shape = _hardly_there(1)
    taken = []
    for sequences in (1, 32):
        decoding = FusedDecoding(FusedModel(model))
        decoding.read(torch.zeros(sequences, 8, dtype=torch.int64, device="cpu"))
        fed = torch.zeros(sequences, 1, dtype=torch.int64, device="cpu")
        seconds = _least(lambda decoding=decoding, fed=fed: decoding.read(fed).argmax(-1))  # type: ignore[misc]
        taken.append(seconds - decode_step_seconds(shape, times, sequences, 16))
    sequence = max(0.0, (taken[1] - taken[0]) / 31)
    step = max(0.0, taken[0] - sequence)
    times = dataclasses.replace(times, step=step, sequence=sequence)
    one, many = (_begin_seconds(layers, times) for layers in (1, MANY_LAYERS))
    begin_block = max(0.0, (many - one) / (MANY_LAYERS - 1))
    return {
        "step": step, "sequence": sequence, "begin": max(0.0, one - begin_block), "begin_block": begin_block
    }  # fmt: skip


def _begin_seconds(layers: int, times: KernelTimes) -> float:
    """What the first reading takes beyond what is predicted for it."""
    model, shape = _hardly_there(layers)
    prompt = torch.zeros(1, PAGE, dtype=torch.int64, device="cpu")
    rounds = []
    for _ in range(MORE_REPEATS):
        decoding = FusedDecoding(FusedModel(model))
        began = time.perf_counter()
        decoding.read(prompt)
        rounds.append(time.perf_counter() - began)
    return min(rounds) - prefill_seconds(shape, times, 1, PAGE)


def _hardly_there(layers: int) -> tuple[Any, ModelShape]:
    """A model of so many tiny blocks, and its shape."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=1, vocab_size=256,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    coding = IntegerCoding(4, 64)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            rows, columns = module.weight.shape
            codes = torch.zeros(rows, columns, dtype=torch.int64, device="cpu")
            scales = torch.ones(rows, 1, dtype=torch.bfloat16, device="cpu")
            zeros = torch.ones(rows, 1, dtype=torch.uint8, device="cpu")
            packed = PackedWeight.from_codes(codes, scales, zeros, coding)
            model.set_submodule(name, CompressedLinear.from_packed(packed, rounds=True))
    product = ProductShape(Kernel(coding, True).name, 64 * 64, 1)
    block = BlockShape((product,) * 7, 64, 64, 64, cached_bytes=4 * 64)
    return model.eval(), ModelShape((block,) * layers, dataclasses.replace(product, weights=64 * 256), 256)


def _least(call: Callable[[], Any]) -> float:
    """Least seconds of a call that takes microseconds, and finds its caches as a step leaves them."""
    other = torch.ones(OTHER_BYTES // 4, dtype=torch.float32, device="cpu")
    call()
    rounds = []
    for _ in range(4 * REPEATS):
        other.sum()
        began = time.perf_counter()
        call()
        rounds.append(time.perf_counter() - began)
    return min(rounds)


def kernel_times(kernels: Collection[Kernel], progress: Progress | None = None) -> KernelTimes:
    """What blocks with these kernels take here, with as many threads as PyTorch uses now.

    Measured where it isn't known yet, which takes a few seconds and half a second for each kernel; kept for
    this machine, number of threads and build of the native library.

    Raises
    ------
    SettingsError
        There is no native library.
    """
    if not native.available():
        raise SettingsError(
            "a prediction of speed without compiled kernels",
            "an installation with them",
            "install tailorbird where there is a C++ compiler, or from a wheel",
        )
    progress = progress or Silent()
    threads = torch.get_num_threads()
    identity = {**machine_identity(), "threads": threads, "library": native.fingerprint()}
    path = kernel_times_path(threads)
    entry = _read(path, identity) or {"schema": SCHEMA, "identity": identity, "around": None, "products": {}}
    basic = Kernel(IntegerCoding(4, 64), int8=True)
    wanted = {kernel.name: kernel for kernel in (basic, *kernels)}
    missing = [kernel for name, kernel in wanted.items() if name not in entry["products"]]
    if missing or entry["around"] is None:
        progress.stage("kernel times", len(missing) + (entry["around"] is None))
    for kernel in missing:
        entry["products"][kernel.name] = _product_times(kernel)
        write_entry(path, entry)
        progress.advance(note=kernel.name)
    if entry["around"] is None:
        around: dict[str, Any] = {"streaming": _streaming(), "step": 0.0, "sequence": 0.0, "begin": 0.0}
        around["begin_block"] = 0.0
        around |= _around_products(threads)
        around |= _around_blocks(_assemble(threads, around, entry["products"]))
        entry["around"] = around
        write_entry(path, entry)
        progress.advance(note="around them")
    return _assemble(threads, entry["around"], entry["products"])


def _assemble(threads: int, around: dict[str, Any], products: dict[str, Any]) -> KernelTimes:
    streaming = tuple((int(size), float(share)) for size, share in around["streaming"])
    rates = {name: tuple((one, other) for one, other in pairs) for name, pairs in products.items()}
    attention = {name: AttentionTimes(**around[name]) for name in ("alone", "alone_streamed", "together")}
    return KernelTimes(
        threads=threads, piece=MOST_TOKENS, tokens=TOKENS, products=rates,
        **{**around, **attention, "streaming": streaming},
    )  # fmt: skip


def _read(path: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """What is kept for this machine, or None where there is nothing or it can't be understood."""
    try:
        entry = json.loads(path.read_text())
        if entry["schema"] != SCHEMA or entry["identity"] != identity:
            return None
        for rates in entry["products"].values():
            if len(rates) != len(TOKENS) or not all(_positive(rate) for rate in rates):
                return None
        if entry["around"] is not None:
            _assemble(1, entry["around"], {})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return entry


def _positive(values: Iterable[float]) -> bool:
    return all(isinstance(value, float) and math.isfinite(value) and value > 0 for value in values)
