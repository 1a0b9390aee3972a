"""The cost of work before it is done: operations counted by formula, seconds from measured rates.

Nothing here measures; the rates come in as a `Probe`, and those of compiled blocks as `KernelTimes`. A
floating-point operation is one addition or one multiplication, so a product of ``[m, k]`` and ``[k, n]``
takes ``2 m k n`` of them.

A step of compiled blocks takes what its parts take. Products are counted in weights, at a rate that depends
on the kernel, on the number of tokens, and on whether the model's weights stay in the cache from step to
step or stream from memory. What is done token by token is counted in channels, attention in pairs of a
query and a key.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass

from tailorbird.hardware.probe import Probe


def forward_flops(
    tokens: int, linear_parameters: int, *, layers: int = 0, attention_width: int = 0, context: int = 0
) -> float:
    """Operations of one forward pass.

    Parameters
    ----------
    tokens : int
        Tokens that go in, over all sequences.
    linear_parameters : int
        Weights that each token is multiplied with (linears of all blocks counted in `layers`, and the head
        where it runs).
    layers : int
        Blocks whose attention is counted; 0 leaves attention out.
    attention_width : int
        Query heads times head size.
    context : int
        Keys that each query meets; for whole windows their length, since masked products are computed too.

    Returns
    -------
    float
        Operations.
    """
    scores_and_values = 2 * 2 * context * attention_width * layers
    return float(tokens) * (2 * linear_parameters + scores_and_values)


def gram_flops(tokens: int, in_features: int) -> float:
    """Operations that summing ``x xᵀ`` over `tokens` inputs of a linear takes."""
    return 2.0 * tokens * in_features**2


def gptq_flops(out_features: int, in_features: int) -> float:
    """Operations of second-order rounding of one linear.

    The Gram matrix is factorized, inverted and factorized again (4/3 n³ together), then each column's error
    is spread over the columns after it (2 · out · n²/2). Source: GPTQ, arXiv:2210.17323, section 3.3.
    """
    n = float(in_features)
    return 4 / 3 * n**3 + out_features * n**2


def decode_tokens_per_s(weight_bytes: int, probe: Probe, *, batch: int = 1, fraction: float = 1.0) -> float:
    """Tokens per second of decoding where reading the weights is what takes the time.

    Parameters
    ----------
    weight_bytes : int
        Bytes of weights read per step (embedding rows don't count, a head does).
    probe : Probe
        The machine.
    batch : int
        Sequences that share one reading of the weights.
    fraction : float
        Part of the read bandwidth that the kernels reach, as `speed` measures it (`bandwidth_fraction`).

    Returns
    -------
    float
        Tokens per second over the whole batch.
    """
    return batch * fraction * probe.read_bandwidth / weight_bytes


@dataclass(frozen=True)
class ProductShape:
    """One linear, as far as its time depends on it.

    Attributes
    ----------
    kernel : str
        How it is multiplied: a key of `KernelTimes.products`.
    weights : int
        ``out_features * in_features``.
    bytes : int
        What a step reads of it.
    """

    kernel: str
    weights: int
    bytes: int


@dataclass(frozen=True)
class BlockShape:
    """One block.

    Attributes
    ----------
    products : tuple of ProductShape
    width, attended, inner : int
        Channels between blocks, of all heads together, and inside the feed-forward sublayer.
    cached_bytes : int
        Of keys and values of a token.
    window : int or None
        Keys that a query meets at most.
    """

    products: tuple[ProductShape, ...]
    width: int
    attended: int
    inner: int
    cached_bytes: int
    window: int | None = None


@dataclass(frozen=True)
class ModelShape:
    """A model that runs in compiled blocks.

    Attributes
    ----------
    blocks : tuple of BlockShape
    head : ProductShape
    vocab_size : int
    looked_up : int
        Values of a compressed embedding's row, which are unpacked for every token; 0 where it is dense.
    """

    blocks: tuple[BlockShape, ...]
    head: ProductShape
    vocab_size: int
    looked_up: int = 0

    @property
    def bytes(self) -> int:
        """What a step reads of all linears."""
        return self.head.bytes + sum(product.bytes for block in self.blocks for product in block.products)


@dataclass(frozen=True)
class AttentionTimes:
    """Seconds for every channel of all heads, but for `byte`.

    Attributes
    ----------
    placed : float
        Of a token of a thread: rotary angles, and its key and value into the cache.
    query : float
        Of a query beside its keys.
    pair : float
        Of a query and one of its keys.
    byte : float
        Of a byte of keys and values that comes from memory.
    """

    placed: float
    query: float
    pair: float
    byte: float = 0.0

    def between(self, other: AttentionTimes, share: float) -> AttentionTimes:
        """`share` of the way to `other`."""
        both = zip(astuple(self), astuple(other), strict=True)
        return AttentionTimes(*(mine + share * (theirs - mine) for mine, theirs in both))


@dataclass(frozen=True)
class KernelTimes:
    """What compiled blocks take on one machine, with so many threads. Seconds, tokens, bytes.

    Attributes
    ----------
    threads : int
    piece : int
        Tokens that go through the blocks in one call, at most.
    tokens : tuple of int
        Rising numbers of tokens at which products were timed.
    products, heads : mapping
        Kernel -> for each of `tokens` the seconds per weight, from the cache and from memory: in blocks of
        about the model's shape, and in its head.
    streaming : tuple of (int, float)
        Rising bytes of weights that are read in turn, and which share of the way from the cache's to the
        memory's rate a product then goes.
    block, token : float
        What a block takes beside all else, and for every token of a thread.
    norms, activation : float
        Per token of a thread and channel: of the width, of the feed-forward sublayer.
    alone, alone_streamed, together : AttentionTimes
        For queries of different sequences, whose keys come from the cache or from memory, and for neighbours
        in one sequence.
    step, step_streamed, sequence : float
        Around the blocks, once: where the model leaves the caches to others, or needs them itself; and for
        every sequence.
    begin, begin_block : float
        When sequences begin, once, and for every block: rotary angles, room for keys and values.
    logit : float
        Per logit that is given back, beyond the head's product.
    lookup, unpacked : float
        What looking up rows of a compressed embedding takes beyond those of a dense one, once and per value.
    """

    threads: int
    piece: int
    tokens: tuple[int, ...]
    products: Mapping[str, Sequence[tuple[float, float]]]
    heads: Mapping[str, Sequence[tuple[float, float]]]
    streaming: tuple[tuple[int, float], ...]
    block: float
    token: float
    norms: float
    activation: float
    alone: AttentionTimes
    alone_streamed: AttentionTimes
    together: AttentionTimes
    step: float
    step_streamed: float
    sequence: float
    begin: float
    begin_block: float
    logit: float
    lookup: float
    unpacked: float

    def streamed_share(self, size: int) -> float:
        """How far `size` bytes of weights, read in turn, are from the cache: 0 in it, 1 in memory."""
        return _interpolate(
            [math.log(known) for known, _ in self.streaming],
            [share for _, share in self.streaming],
            math.log(max(size, 1)),
        )

    def product_seconds(self, product: ProductShape, tokens: int, streamed: float) -> float:
        """Seconds of one product of a block with `tokens` tokens."""
        return self._seconds(self.products[product.kernel], product.weights, tokens, streamed)

    def head_seconds(self, head: ProductShape, tokens: int, streamed: float) -> float:
        """Seconds of the head's product with `tokens` tokens."""
        return self._seconds(self.heads[head.kernel], head.weights, tokens, streamed)

    def _seconds(
        self, rates: Sequence[tuple[float, float]], weights: int, tokens: int, streamed: float
    ) -> float:
        here = [cached + streamed * (memory - cached) for cached, memory in rates]
        return weights * _interpolate(self.tokens, here, tokens)


def _interpolate(known: Sequence[float], values: Sequence[float], at: float) -> float:
    """Linear between known points, constant before the first; past the last in proportion to the last two."""
    if len(known) == 1 or at <= known[0]:
        return values[0]
    right = min(bisect_right(known, at), len(known) - 1)
    share = (at - known[right - 1]) / (known[right] - known[right - 1])
    return values[right - 1] + share * (values[right] - values[right - 1])


def decode_step_seconds(model: ModelShape, times: KernelTimes, batch: int, context: int) -> float:
    """Seconds in which `batch` sequences, each with `context` tokens in the cache, get one more token."""

    def keys(block: BlockShape) -> float:
        return batch * min(context + 1, math.inf if block.window is None else block.window)

    size = model.bytes + sum(int(keys(block)) * block.cached_bytes for block in model.blocks)
    streamed = times.streamed_share(size)
    attention = times.alone.between(times.alone_streamed, streamed)
    blocks = _blocks_seconds(model, times, batch, streamed, keys, attention)
    return blocks + _around(model, times, batch, batch, streamed)


def prefill_seconds(model: ModelShape, times: KernelTimes, batch: int, prompt: int) -> float:
    """Seconds in which `batch` sequences of `prompt` tokens are read into empty caches."""
    total, seconds = batch * prompt, times.begin + len(model.blocks) * times.begin_block
    streamed = times.streamed_share(model.bytes)
    for start in range(0, total, times.piece):
        end = min(start + times.piece, total)

        def pairs(block: BlockShape, start: int = start, end: int = end) -> float:
            window = math.inf if block.window is None else block.window
            return _pairs_until(end, prompt, window) - _pairs_until(start, prompt, window)

        seconds += _blocks_seconds(model, times, end - start, streamed, pairs, times.together)
    return seconds + _around(model, times, total, batch, streamed)


def _pairs_until(token: int, prompt: int, window: float) -> float:
    """Keys that the queries before `token` meet, of sequences of `prompt` tokens one after the other."""
    whole, rest = divmod(token, prompt)
    return whole * _pairs_of(prompt, window) + _pairs_of(rest, window)


def _pairs_of(tokens: int, window: float) -> float:
    """Keys that the first `tokens` queries of a sequence meet together."""
    if tokens <= window:
        return tokens * (tokens + 1) / 2
    return window * (window + 1) / 2 + (tokens - window) * window


def _blocks_seconds(
    model: ModelShape,
    times: KernelTimes,
    tokens: int,
    streamed: float,
    pairs: Callable[[BlockShape], float],
    attention: AttentionTimes,
) -> float:
    own = -(-tokens // times.threads)  # tokens of the thread that has most
    seconds = 0.0
    for block in model.blocks:
        channels = (
            times.norms * block.width + attention.placed * block.attended + times.activation * block.inner
        )
        seconds += times.block + own * (times.token + channels)
        met = pairs(block)
        seconds += (tokens * attention.query + met * attention.pair) * block.attended
        seconds += met * attention.byte * block.cached_bytes
        seconds += sum(times.product_seconds(product, tokens, streamed) for product in block.products)
    return seconds


def _around(model: ModelShape, times: KernelTimes, tokens: int, sequences: int, streamed: float) -> float:
    """Embedding, head and what stands around them."""
    head = times.head_seconds(model.head, sequences, streamed)
    step = times.step + streamed * (times.step_streamed - times.step)
    logits = sequences * model.vocab_size * times.logit
    embedding = times.lookup + tokens * model.looked_up * times.unpacked if model.looked_up else 0.0
    return step + sequences * times.sequence + head + logits + embedding
