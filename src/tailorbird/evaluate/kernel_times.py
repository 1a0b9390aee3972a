"""What the compiled blocks take on this machine, measured once for every kernel and kept.

Medians of several repetitions count, as they do where a model's speed is measured. Measured are stand-ins for
a model's blocks (`stand_ins`): small ones that stay in the cache, large ones that together don't, and ones so
small that only what surrounds the arithmetic is left. `hardware.cost` puts the time of a model's step
together from these.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tailorbird.errors import SettingsError
from tailorbird.evaluate.stand_ins import (
    CACHED,
    FEW_TOKENS,
    MORE_REPEATS,
    NOTHING,
    REPEATS,
    STREAMED,
    Kernel,
    StandIn,
    Weights,
    Width,
)
from tailorbird.formats.modules import CompressedEmbedding, CompressedLinear
from tailorbird.formats.packed import IntegerCoding, PackedWeight
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
    NORM_KINDS,
    PAGE,
    STEPS,
    LinearStructure,
    NormStructure,
    run_head,
)
from tailorbird.model.anatomy import BYTES_PER_CACHED_VALUE
from tailorbird.progress import Progress, Silent
from tailorbird.run.embedding import embed_by
from tailorbird.run.fused import MOST_TOKENS, FusedModel
from tailorbird.run.generate import FusedDecoding, likeliest

SCHEMA = 2
#: Numbers of tokens at which products are timed; 4 and 12 are where other kernels take over.
TOKENS = (1, 2, 3, 4, 8, 11, 12, 16, 32, 64, 128, 512)
#: Weights that are read in turn for the rate from memory: more than last-level caches hold.
STREAM_BYTES = 128 << 20
#: Operations after which a measurement of many blocks has enough of them.
ENOUGH_OPERATIONS = 4e9
#: Contexts at which attention of single queries is timed, and for how many sequences.
CONTEXTS, SEQUENCES = (96, 608), 16
#: Prompts at which attention of neighbours is timed.
PROMPTS = (64, 512)
#: Logits of a token where the head is timed.
VOCABULARY = 32_768
#: Blocks of a model that is hardly there, beside one of a single block.
MANY_LAYERS = 9
#: What is read between calls that take microseconds: more than the caches next to a core hold.
NEAR_BYTES = 16 << 20
#: Weights of a head that a cache holds.
CACHED_HEAD = 1 << 21
#: Channels of an embedding's row.
EMBEDDED = 1024
#: What the timing of a kernel takes at most, about, where other work goes on.
KERNEL_SECONDS = 6.0
#: What surrounds products is timed with it.
BASIC = Kernel(IntegerCoding(4, 64), int8=True)

_LINEARS = ("attention_in", "attention_out", "mlp_in", "mlp_out")


def _linears(seconds: Tensor) -> float:
    return sum(float(seconds[STEPS.index(step)]) for step in _LINEARS)


def _of(seconds: Tensor, step: str) -> float:
    return float(seconds[STEPS.index(step)])


def _product_times(kernel: Kernel, like: Width) -> list[tuple[float, float]]:
    """For each of `TOKENS`, seconds per weight of blocks like these, from the cache and from memory."""
    nothing, cached = StandIn(kernel, NOTHING), StandIn(kernel, like)
    streamed = StandIn(kernel, like, most=1 << 10, size=STREAM_BYTES)
    rates = []
    for tokens in TOKENS:
        around = _linears(nothing.steps(tokens))
        enough = max(1, int(ENOUGH_OPERATIONS / (2 * tokens * like.weights)))
        both = (_linears(cached.steps(tokens)), _linears(streamed.steps(tokens, most=enough)))
        rates.append(_both(tuple(max(taken - around, 0.1 * taken) / like.weights for taken in both)))
    return rates


def _head_times(kernel: Kernel, width: int, vocab_size: int) -> list[tuple[float, float]]:
    """For each of `TOKENS`, seconds per weight of a head like this, from the cache and from memory."""
    rows = min(vocab_size, VOCABULARY)
    memory = Weights(kernel, STREAM_BYTES)
    few, heads = Weights(kernel, 1).linear(max(1, min(rows, CACHED_HEAD // width)), width), []
    while memory.left > 0:
        heads.append(memory.linear(rows, width))
    ones = torch.ones(width, dtype=torch.float32, device="cpu")
    norm = NormStructure(ones.data_ptr(), None, 1e-5, NORM_KINDS["root_mean_square"])
    rates = []
    for tokens in TOKENS:
        hidden = torch.ones(tokens, width, dtype=torch.float32, device="cpu")
        enough = max(1, int(ENOUGH_OPERATIONS / (2 * tokens * rows * width)))
        both = []
        for subjects in ([few], heads[:enough]):

            def call(subjects: list[LinearStructure] = subjects, hidden: Tensor = hidden) -> None:
                for head in subjects:
                    run_head(norm, head, hidden)

            weights = sum(head.weight.rows for head in subjects) * width
            both.append(_median_seconds(call, MORE_REPEATS if tokens <= FEW_TOKENS else REPEATS) / weights)
        rates.append(_both(both))
    return rates


def _both(rates: Sequence[float]) -> tuple[float, float]:
    """Of a product from the cache, and from memory, which isn't faster."""
    cached, memory = rates
    return cached, max(cached, memory)


def _streaming() -> list[tuple[int, float]]:
    """Bytes of weights read in turn, and how far their rate is from the cache's to the memory's."""
    kernel = Kernel(IntegerCoding(8, 64), int8=True)
    stand = StandIn(kernel, CACHED, most=1 << 10, size=STREAM_BYTES)
    size = CACHED.weights * (8 + (16 + 8) / 64) / 8
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
    nothing, cached = StandIn(kernel, NOTHING), StandIn(kernel, CACHED)
    one, many = nothing.steps(1), nothing.steps(64)
    own = -(-64 // threads)
    token = max(0.0, float(many.sum() - one.sum()) / max(1, own - 1))
    wide = cached.steps(64)

    def per_channel(step: str, channels: int) -> float:
        return max(0.0, _of(wide, step) - _of(many, step)) / own / (channels - 64)

    memory = StandIn(kernel, STREAMED, most=4, size=STREAM_BYTES)
    apart = [(SEQUENCES, SEQUENCES, context) for context in CONTEXTS]
    alone = _attention(cached, apart, threads)
    return {
        "block": max(0.0, float(one.sum()) - token),
        "token": token,
        "norms": per_channel("norms", CACHED.width),
        "activation": per_channel("activation", CACHED.inner),
        "alone": alone,
        "alone_streamed": _from_memory(alone, _attention(memory, apart, threads)),
        "together": _attention(cached, [(tokens, 1, 0) for tokens in PROMPTS], threads),
        **_logits(),
        **_lookup(),
    }


def _attention(stand: StandIn, cases: Sequence[tuple[int, int, int]], threads: int) -> dict[str, float]:
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
    attended, size = 64 * STREAMED.heads, 2 * 2 * 64 * STREAMED.kv_heads
    byte = max(0.0, streamed["pair"] - cached["pair"]) * attended / size
    return {**cached, "placed": streamed["placed"], "byte": byte}


def _logits() -> dict[str, float]:
    """What choosing the likeliest of logits takes."""
    logits = torch.zeros(SEQUENCES, VOCABULARY, dtype=torch.float32, device="cpu")
    return {"logit": _median_seconds(lambda: likeliest(logits), REPEATS) / logits.numel()}


def _lookup() -> dict[str, float]:
    """What rows of a compressed embedding take beyond those of a dense one."""
    coding = IntegerCoding(4, 64)
    codes = torch.zeros(256, EMBEDDED, dtype=torch.int64, device="cpu")
    scales = torch.ones(256, EMBEDDED // 64, dtype=torch.bfloat16, device="cpu")
    zeros = torch.ones(256, EMBEDDED // 64, dtype=torch.uint8, device="cpu")
    packed = CompressedEmbedding.from_packed(PackedWeight.from_codes(codes, scales, zeros, coding))
    dense = nn.Embedding.from_pretrained(packed.weight.bfloat16())
    every = torch.arange(256, device="cpu")

    def beyond(ids: Tensor) -> float:
        one, other = (embed_by(embedding) for embedding in (packed, dense))
        return max(0.0, _typical(lambda: one(ids, ids)) - _typical(lambda: other(ids, ids)))

    one, many = beyond(every[:1]), beyond(every)
    return {"lookup": one, "unpacked": max(0.0, many - one) / 255 / EMBEDDED}


def _around_blocks(times: KernelTimes) -> dict[str, float]:
    """What a step takes around blocks, and what the first one does: on models that are hardly there."""
    model, shape = _hardly_there(1)
    taken = []
    for sequences, others in ((1, NEAR_BYTES), (32, NEAR_BYTES), (1, STREAM_BYTES)):
        decoding = FusedDecoding(FusedModel(model))
        decoding.read(torch.zeros(sequences, 8, dtype=torch.int64, device="cpu"))
        fed = torch.zeros(sequences, 1, dtype=torch.int64, device="cpu")
        seconds = _typical(lambda decoding=decoding, fed=fed: likeliest(decoding.read(fed)), others)  # type: ignore[misc]
        taken.append(seconds - decode_step_seconds(shape, times, sequences, 16))
    sequence = max(0.0, (taken[1] - taken[0]) / 31)
    step = max(0.0, taken[0] - sequence)
    step_streamed = max(step, taken[2] - sequence)
    times = dataclasses.replace(times, step=step, step_streamed=step_streamed, sequence=sequence)
    one, many = (_begin_seconds(layers, times) for layers in (1, MANY_LAYERS))
    begin_block = max(0.0, (many - one) / (MANY_LAYERS - 1))
    begin = max(0.0, one - begin_block)
    return {
        "step": step, "step_streamed": step_streamed, "sequence": sequence, "begin": begin,
        "begin_block": begin_block,
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
    return statistics.median(rounds) - prefill_seconds(shape, times, 1, PAGE)


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


def _median_seconds(call: Callable[[], Any], repeats: int) -> float:
    """Of a call, after one that warms up."""
    rounds = []
    for number in range(repeats + 1):
        began = time.perf_counter()
        call()
        if number:
            rounds.append(time.perf_counter() - began)
    return statistics.median(rounds)


def _typical(call: Callable[[], Any], others: int = NEAR_BYTES) -> float:
    """Median seconds of a call that takes microseconds, and finds its caches as a step leaves them."""
    other = torch.ones(others // 4, dtype=torch.float32, device="cpu")
    call()
    rounds = []
    for _ in range(4 * REPEATS):
        other.sum()
        began = time.perf_counter()
        call()
        rounds.append(time.perf_counter() - began)
    return statistics.median(rounds)


def kernel_times(
    kernels: Collection[Kernel], shape: ModelShape, progress: Progress | None = None
) -> KernelTimes:
    """What blocks with these kernels take here, with as many threads as PyTorch uses now.

    Measured where it isn't known yet, which takes a few seconds and one for each kernel; kept for this
    machine, number of threads, build of the native library and shape of block and head.

    Parameters
    ----------
    kernels : collection of Kernel
    shape : ModelShape
        Of the model whose speed is asked for; what its linears are now doesn't matter.

    Raises
    ------
    SettingsError
        There is no native library.
    """
    threads, wanted = torch.get_num_threads(), _wanted(kernels, shape)
    progress, identity = progress or Silent(), _identity(threads)
    path = kernel_times_path(threads)
    entry = _read(path, identity) or {"schema": SCHEMA, "identity": identity, "around": None, "products": {}}
    missing = [each for each in dict.fromkeys(wanted) if each[0] not in entry["products"]]
    if missing or entry["around"] is None:
        progress.stage("kernel times", len(missing) + (entry["around"] is None))
    for key, kernel, width, head in missing:
        blocks, heads = _product_times(kernel, width), _head_times(kernel, width.width, head)
        entry["products"][key] = {"blocks": blocks, "head": heads}
        write_entry(path, entry)
        progress.advance(note=kernel.name)
    if entry["around"] is None:
        around: dict[str, Any] = {"streaming": _streaming()}
        around |= dict.fromkeys(("step", "step_streamed", "sequence", "begin", "begin_block"), 0.0)
        around |= _around_products(threads)
        tiny = {BASIC.name: entry["products"][wanted[0][0]]}
        around |= _around_blocks(_assemble(threads, around, tiny))
        entry["around"] = around
        write_entry(path, entry)
        progress.advance(note="around them")
    return _chosen(threads, entry, wanted)


def known_kernel_times(kernels: Collection[Kernel], shape: ModelShape) -> KernelTimes | None:
    """`kernel_times` where all of it is kept; None where some would have to be measured first.

    Raises
    ------
    SettingsError
        There is no native library.
    """
    threads, wanted = torch.get_num_threads(), _wanted(kernels, shape)
    entry = _read(kernel_times_path(threads), _identity(threads))
    if entry is None or entry["around"] is None or any(key not in entry["products"] for key, *_ in wanted):
        return None
    return _chosen(threads, entry, wanted)


def timing_seconds(kernels: Collection[Kernel], shape: ModelShape) -> float:
    """About what `kernel_times` would take: nothing where all of it is kept.

    Raises
    ------
    SettingsError
        There is no native library.
    """
    threads, wanted = torch.get_num_threads(), _wanted(kernels, shape)
    entry = _read(kernel_times_path(threads), _identity(threads)) or {"around": None, "products": {}}
    missing = {key for key, *_ in wanted if key not in entry["products"]}
    return KERNEL_SECONDS * (len(missing) + (entry["around"] is None))


def _wanted(kernels: Collection[Kernel], shape: ModelShape) -> list[tuple[str, Kernel, Width, int]]:
    """Of `BASIC` and each kernel: its key, the kernel, like what it is timed, and on which head."""
    if not native.available():
        raise SettingsError(
            "a prediction of speed without compiled kernels",
            "an installation with them",
            "install tailorbird where there is a C++ compiler, or from a wheel",
        )
    like = _like(shape)
    every = ((BASIC, NOTHING, 256), *((kernel, like, shape.vocab_size) for kernel in kernels))
    return [(f"{kernel.name}, {width.label}, {head}", kernel, width, head) for kernel, width, head in every]


def _identity(threads: int) -> dict[str, Any]:
    return {**machine_identity(), "threads": threads, "library": native.fingerprint()}


def _chosen(
    threads: int, entry: dict[str, Any], wanted: Sequence[tuple[str, Kernel, Width, int]]
) -> KernelTimes:
    found = {kernel.name: entry["products"][key] for key, kernel, _, _ in wanted[1:]}
    return _assemble(threads, entry["around"], found)


def _like(shape: ModelShape) -> Width:
    """The channels of a model's blocks as those of stand-ins: of a middle one, where they differ."""
    rising = sorted(shape.blocks, key=lambda b: (b.width, b.inner, b.attended, b.cached_bytes))
    block = rising[len(rising) // 2]
    kv_channels = block.cached_bytes // (2 * BYTES_PER_CACHED_VALUE)
    heads = max(1, round(block.attended / 64))
    return Width(block.width, max(1, block.inner), heads, min(heads, max(1, round(kv_channels / 64))))


def _assemble(threads: int, around: dict[str, Any], products: dict[str, Any]) -> KernelTimes:
    streaming = tuple((int(size), float(share)) for size, share in around["streaming"])

    def rates(part: str) -> dict[str, Any]:
        return {name: tuple((one, other) for one, other in both[part]) for name, both in products.items()}

    attention = {name: AttentionTimes(**around[name]) for name in ("alone", "alone_streamed", "together")}
    return KernelTimes(
        threads=threads, piece=MOST_TOKENS, tokens=TOKENS, products=rates("blocks"), heads=rates("head"),
        **{**around, **attention, "streaming": streaming},
    )  # fmt: skip


def _read(path: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """What is kept for this machine, or None where there is nothing or it can't be understood."""
    try:
        entry = json.loads(path.read_text())
        if entry["schema"] != SCHEMA or entry["identity"] != identity:
            return None
        for both in entry["products"].values():
            for rates in (both["blocks"], both["head"]):
                if len(rates) != len(TOKENS) or not all(_positive(rate) for rate in rates):
                    return None
        if entry["around"] is not None:
            _assemble(1, entry["around"], {})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return entry


def _positive(values: Iterable[float]) -> bool:
    return all(isinstance(value, float) and math.isfinite(value) and value > 0 for value in values)
