"""Attention of one new token per sequence over keys and values in pages, on the GPU.

Grouped heads share one reading of their keys and values. The keys of a sequence are split at fixed
multiples of `SPLIT` tokens, one program each (flash decoding), and the splits of a sequence are joined first
to last: what a sequence gets depends on its own tokens only, never on the batch.

Keys and values are float16 or bfloat16, or integers with one scale per token and head: int8, or 4 bits with
a zero point too, two of them in a byte. Scores, their softmax and all sums are float32; the weights of the
values are rounded to the queries' dtype before that product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tailorbird.kernels.triton_runtime import jit, operand, require, tl, triton
from tailorbird.kernels.triton_tuning import Launch, choose, magnitude

#: tokens of one program, and those that it looks at in one step
SPLIT, STEP = 512, 64
#: how a split may be launched: another number of warps would add up the weights in another order
LAUNCHES = (Launch(4, 2), Launch(4, 3), Launch(4, 1))


@dataclass(frozen=True, eq=False)
class Cache:
    """Keys and values of one layer in pages.

    Parameters
    ----------
    keys, values : Tensor[pages, page_tokens, kv_heads, head_dim], float16, bfloat16 or int8
        Or of `head_dim / 2`, uint8: two codes of 4 bits a byte (`to_int4`).
    key_scales, value_scales : Tensor[pages, page_tokens, kv_heads], floating point, or None
        What integers are multiplied by; None for floats.
    key_zeros, value_zeros : Tensor[pages, page_tokens, kv_heads], uint8, or None
        What is taken off codes of 4 bits before; None for all others.
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None
    key_zeros: Tensor | None = None
    value_zeros: Tensor | None = None


def to_int8(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Keys or values as int8 with a scale per vector; the largest of a vector is at 127.

    Parameters
    ----------
    vectors : Tensor[..., head_dim], floating point

    Returns
    -------
    tuple[Tensor[..., head_dim], Tensor[...]]
        int8, and float32 scales.
    """
    scales = vectors.float().abs().amax(-1) / 127
    inverse = torch.where(scales > 0, 1 / scales, 0.0)
    return (vectors.float() * inverse.unsqueeze(-1)).round().clamp(-127, 127).to(torch.int8), scales


def to_int4(vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys or values as codes of 4 bits: `scale * (code - zero)`, off by half a scale at most.

    The range that a vector's codes cover has 0 in it, so that the zero point is a code itself.

    Parameters
    ----------
    vectors : Tensor[..., head_dim], floating point
        `head_dim` even.

    Returns
    -------
    tuple[Tensor[..., head_dim / 2], Tensor[...], Tensor[...]]
        uint8, float32 scales and uint8 zero points. Byte `j` holds code `j` in its lower half and code
        `j + head_dim / 2` in its upper one.

    Raises
    ------
    ValueError
        For an odd `head_dim`.
    """
    if vectors.shape[-1] % 2:
        raise ValueError(f"vectors of {vectors.shape[-1]} values; expected an even number")
    values = vectors.float()
    lowest, highest = values.amin(-1).clamp(max=0), values.amax(-1).clamp(min=0)
    scales = (highest - lowest) / 15
    inverse = torch.where(scales > 0, 1 / scales, 0.0)
    zeros = (-lowest * inverse).round()
    codes = ((values * inverse.unsqueeze(-1)).round() + zeros.unsqueeze(-1)).clamp(0, 15).to(torch.uint8)
    low, high = codes.chunk(2, -1)
    return low | (high << 4), scales, zeros.to(torch.uint8)


def decode(
    queries: Tensor,
    cache: Cache,
    tables: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Tensor:
    """Attention of the last token of each sequence over all its tokens, its own included.

    Parameters
    ----------
    queries : Tensor[sequences, heads, head_dim], float16 or bfloat16
        `heads` is a multiple of the cache's `kv_heads`; neighbours share a head of keys.
    cache : Cache
        Floats have the dtype of the queries.
    tables : Tensor[sequences, most_pages], int32
        The page of each `page_tokens` tokens of a sequence; entries after its last page are never read.
    lengths : Tensor[sequences], int32
        Tokens of each sequence; a sequence without tokens gives zeros.
    scale : float, optional
        Of the scores; by default `head_dim ** -0.5`.
    window : int, optional
        Last tokens that are seen, the own included.
    soft_cap : float, optional
        Scaled scores `s` become `soft_cap * tanh(s / soft_cap)`.

    Returns
    -------
    Tensor[sequences, heads, head_dim], dtype of `queries`

    Raises
    ------
    ResourceError
        Without Triton, or where not all tensors are on one CUDA device.
    ValueError
        For shapes and dtypes that don't fit, or a `window` or `soft_cap` that isn't positive.
    """
    require(queries, tables, lengths, *_tensors(cache))
    _check(queries, cache, tables, lengths, window, soft_cap)
    sequences, heads, head_dim = queries.shape
    page_tokens, kv_heads = cache.keys.shape[1:3]
    result = torch.empty_like(queries, memory_format=torch.contiguous_format)
    splits = -(-tables.shape[1] * page_tokens // SPLIT)
    if sequences == 0 or heads == 0 or splits == 0:
        return result.zero_()
    group = heads // kv_heads
    device, float32 = queries.device, torch.float32
    sums = torch.empty(sequences, heads, splits, head_dim, dtype=float32, device=device)
    norms = torch.empty(2, sequences, heads, splits, dtype=float32, device=device)
    wide, factor = triton.next_power_of_2(head_dim), head_dim**-0.5 if scale is None else scale
    bits = {torch.int8: 8, torch.uint8: 4}.get(cache.keys.dtype, 16)

    def launch(how: Launch) -> None:
        _sum_split[(splits, kv_heads, sequences)](
            queries.contiguous(), *(part if part is not None else cache.keys for part in _parts(cache)),
            tables, lengths, sums, norms, sequences * heads * splits,
            kv_heads, tables.shape[1], splits, factor, 0 if window is None else window, soft_cap or 1.0,
            soft_cap is not None, bits, page_tokens, SPLIT, STEP, head_dim, wide, group,
            max(16, triton.next_power_of_2(group)), operand(queries.dtype), num_warps=how.warps,
            num_stages=how.stages,
        )  # fmt: skip

    case = (bits, queries.dtype, kv_heads, group, head_dim, page_tokens, magnitude(splits))
    launch(choose("attention", (*case, magnitude(sequences)), LAUNCHES, launch, device))
    _join_splits[(heads, sequences)](
        sums, norms, lengths, result, sequences * heads * splits, splits,
        0 if window is None else window, SPLIT, head_dim, wide, num_warps=2,
    )  # fmt: skip
    return result


def _parts(cache: Cache) -> tuple[Tensor | None, ...]:
    """In the order in which the kernel takes them."""
    scales = cache.key_scales, cache.value_scales
    return cache.keys, cache.values, *scales, cache.key_zeros, cache.value_zeros


def _tensors(cache: Cache) -> list[Tensor]:
    return [part for part in _parts(cache) if part is not None]


def _check(
    queries: Tensor,
    cache: Cache,
    tables: Tensor,
    lengths: Tensor,
    window: int | None,
    soft_cap: float | None,
) -> None:
    """Raise `ValueError` where the arguments of `decode` don't fit each other."""
    keys, values = cache.keys, cache.values
    if queries.dtype not in (torch.float16, torch.bfloat16) or queries.dim() != 3:
        raise ValueError(
            f"queries {queries.dtype} {list(queries.shape)}; expected float16 or bfloat16 "
            "[sequences, heads, head_dim]"
        )
    sequences, heads, head_dim = queries.shape
    stored_dim = head_dim / 2 if keys.dtype == torch.uint8 else head_dim
    if keys.dim() != 4 or values.shape != keys.shape or keys.shape[3] != stored_dim or heads % keys.shape[2]:
        raise ValueError(
            f"keys {list(keys.shape)} and values {list(values.shape)} for queries {list(queries.shape)}; "
            "expected both [pages, page_tokens, kv_heads, head_dim], or half as wide in uint8, and heads a "
            "multiple of kv_heads"
        )
    *_, key_scales, value_scales, key_zeros, value_zeros = _parts(cache)
    scales = [part for part in (key_scales, value_scales) if part is not None]
    zeros = [part for part in (key_zeros, value_zeros) if part is not None]
    counts = {torch.int8: (2, 0), torch.uint8: (2, 2), queries.dtype: (0, 0)}
    fits = (len(scales), len(zeros)) == counts.get(keys.dtype) and values.dtype == keys.dtype
    fits &= all(part.shape == keys.shape[:3] for part in (*scales, *zeros))
    if not fits or any(part.dtype != torch.uint8 for part in zeros):
        raise ValueError(
            f"keys {keys.dtype}, values {values.dtype}, scales {[list(part.shape) for part in scales]}, zero "
            f"points {[list(part.shape) for part in zeros]}; expected both {queries.dtype} without either, "
            "or int8 with two scales [pages, page_tokens, kv_heads], or uint8 with uint8 zero points too"
        )
    whole = tables.dim() == 2 and len(tables) == sequences and lengths.shape == (sequences,)
    if not whole or {tables.dtype, lengths.dtype} != {torch.int32}:
        raise ValueError(
            f"tables {tables.dtype} {list(tables.shape)} and lengths {lengths.dtype} {list(lengths.shape)}; "
            f"expected int32 [{sequences}, most_pages] and int32 [{sequences}]"
        )
    if not all(part.is_contiguous() for part in (*_tensors(cache), tables, lengths)):
        raise ValueError("keys, values, scales, zero points, tables and lengths must be contiguous")
    if (window is not None and window < 1) or (
        soft_cap is not None and not (soft_cap > 0 and math.isfinite(soft_cap))
    ):
        raise ValueError(f"window {window}, soft_cap {soft_cap}; expected positive numbers")


@jit
def _sum_split(
    queries, keys, values, key_scales, value_scales, key_zeros, value_zeros, tables, lengths, sums, norms,
    norms_size, kv_heads, most_pages, splits, factor, window, soft_cap,
    CAPPED: tl.constexpr, BITS: tl.constexpr, PAGE: tl.constexpr, SPLIT: tl.constexpr,
    STEP: tl.constexpr, HEAD: tl.constexpr, WIDE: tl.constexpr, GROUP: tl.constexpr,
    HEADS: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """One split of one sequence for the `GROUP` heads that share keys: the weighted sum of the values, the
    largest score and the sum of the weights. Writes nothing for a split out of sight."""
    split, kv_head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + sequence)
    seen_from = tl.where(window > 0, tl.maximum(length - window, 0), 0)
    first = tl.maximum(split * SPLIT, seen_from // STEP * STEP)
    last = tl.minimum((split + 1) * SPLIT, length)
    if first < last:
        h, d, t = tl.arange(0, HEADS), tl.arange(0, WIDE), tl.arange(0, STEP)
        heads = kv_heads * GROUP
        head = sequence * heads + kv_head * GROUP + h
        own = (h < GROUP)[:, None] & (d < HEAD)[None, :]
        query = tl.load(queries + head.to(tl.int64)[:, None] * HEAD + d[None, :], mask=own, other=0.0)
        largest = tl.full([HEADS], float("-inf"), tl.float32)
        weights = tl.zeros([HEADS], tl.float32)
        total = tl.zeros([HEADS, WIDE], tl.float32)
        # The halves of a vector of 4 bits lie in the same bytes.
        width: tl.constexpr = HEAD // 2 if BITS == 4 else HEAD
        column, shift = d % width if BITS == 4 else d, d // width * 4
        for start in range(first, last, STEP):
            token = start + t
            there = token < last
            page = tl.load(tables + sequence.to(tl.int64) * most_pages + token // PAGE, mask=there, other=0)
            vector = (page.to(tl.int64) * PAGE + token % PAGE) * kv_heads + kv_head
            at, loaded = vector[:, None] * width + column[None, :], there[:, None] & (d < HEAD)[None, :]
            key = tl.load(keys + at, mask=loaded, other=0)
            if BITS == 4:
                zero = tl.load(key_zeros + vector, mask=there, other=0).to(tl.float32)
                # as the mantissa of 2**23 + code: cheaper than converting an integer, and exact
                code = (key.to(tl.int32) >> shift[None, :]) & 15
                key = (code | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + zero)[:, None]
            score = tl.dot(query.to(OPERAND), tl.trans(key.to(OPERAND)))
            if BITS < 16:
                score *= tl.load(key_scales + vector, mask=there, other=0.0).to(tl.float32)[None, :]
            score *= factor
            if CAPPED:
                score = soft_cap * (1.0 - 2.0 / (tl.exp(2.0 / soft_cap * score) + 1.0))
            score = tl.where((there & (token >= seen_from))[None, :], score, float("-inf"))
            # Every step that is visited holds a token in sight: the maximum is finite.
            highest = tl.maximum(largest, tl.max(score, 1))
            shrink, weight = tl.exp(largest - highest), tl.exp(score - highest[:, None])
            weights = weights * shrink + tl.sum(weight, 1)
            value = tl.load(values + at, mask=loaded, other=0)
            if BITS == 4:
                zero = tl.load(value_zeros + vector, mask=there, other=0).to(tl.float32)
                code = (value.to(tl.int32) >> shift[None, :]) & 15
                value = (code | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + zero)[:, None]
            if BITS < 16:
                weight *= tl.load(value_scales + vector, mask=there, other=0.0).to(tl.float32)[None, :]
            part = tl.dot(weight.to(query.dtype).to(OPERAND), value.to(OPERAND))
            total = total * shrink[:, None] + part
            largest = highest
        at = head * splits + split
        tl.store(sums + at.to(tl.int64)[:, None] * HEAD + d[None, :], total, mask=own)
        tl.store(norms + at, largest, mask=h < GROUP)
        tl.store(norms + norms_size + at, weights, mask=h < GROUP)


@jit
def _join_splits(
    sums, norms, lengths, result, norms_size, splits, window,
    SPLIT: tl.constexpr, HEAD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Joins the splits in sight of one head of one sequence, first to last."""
    head = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    length = tl.load(lengths + tl.program_id(1))
    seen_from = tl.where(window > 0, tl.maximum(length - window, 0), 0)
    d = tl.arange(0, WIDE)
    largest, weights = float("-inf"), 0.0
    total = tl.zeros([WIDE], tl.float32)
    for split in range(seen_from // SPLIT, tl.cdiv(length, SPLIT)):
        at = head * splits + split
        found = tl.load(norms + at)
        part = tl.load(sums + at.to(tl.int64) * HEAD + d, mask=d < HEAD, other=0.0)
        highest = tl.maximum(largest, found)
        shrink, grow = tl.exp(largest - highest), tl.exp(found - highest)
        total = total * shrink + part * grow
        weights = weights * shrink + tl.load(norms + norms_size + at) * grow
        largest = highest
    total /= tl.where(weights > 0, weights, 1.0)
    tl.store(result + head.to(tl.int64) * HEAD + d, total.to(result.dtype.element_ty), mask=d < HEAD)
