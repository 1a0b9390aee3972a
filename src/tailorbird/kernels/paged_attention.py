"""Attention of packed tokens over keys and values in pages, for one layer at a time.

Tokens of several sequences stand one after the other without padding. Each layer's new keys and values are
written into pages, and every token attends over those of its own sequence up to itself. What computes it is
chosen by `choose`: the compiled code of the fused blocks, whose sums are float32; Triton's decoding for
sequences with one token; else each sequence's pages are gathered and PyTorch attends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tailorbird.kernels import native
from tailorbird.kernels.blocks import (
    HEAD_MULTIPLE,
    PAGE,
    Batch,
    BlockStructure,
    HeadsStructure,
    run_attention,
)
from tailorbird.kernels.dispatch import has_triton

#: what `choose` answers; pages of `NATIVE` are laid out in another way than those of the others
NATIVE, TRITON, GATHERED = "native", "triton", "gathered"


@dataclass(frozen=True)
class AttentionLayer:
    """How a layer attends.

    Attributes
    ----------
    heads, kv_heads, head_dim : int
        `heads` is a multiple of `kv_heads`; neighbours share a head of keys.
    scale : float
        Of the scores.
    window : int
        Last tokens that are seen, the own included; 0 for all.
    softcap : float
        Scaled scores `s` become ``softcap * tanh(s / softcap)``; 0 for none.
    sinks : bool
        Each head has one more score, learned, whose weight goes nowhere
        (https://arxiv.org/abs/2309.17453).
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False


class PackedTokens:
    """Tokens of a step, described once for all layers.

    Parameters
    ----------
    positions, sequences : Tensor[tokens], int32, on the CPU
        Where a token stands, and in which sequence; tokens of a sequence are neighbours, in order, without
        gaps.
    tables : Tensor[sequences, most_pages], int32, on the CPU
        The page of each `PAGE` tokens of a sequence.
    device : torch.device
        Of keys and values.
    """

    def __init__(self, positions: Tensor, sequences: Tensor, tables: Tensor, device: torch.device) -> None:
        self.positions, self.sequences, self.tables = positions.contiguous(), sequences.contiguous(), tables
        self.device = device
        self._batches: dict[torch.dtype, Batch] = {}

    def batch(self, dtype: torch.dtype) -> Batch:
        """For compiled code, with keys and values of `dtype`."""
        if dtype not in self._batches:
            self._batches[dtype] = Batch(self.positions, self.sequences, self.tables, dtype)
        return self._batches[dtype]

    @cached_property
    def slots(self) -> tuple[Tensor, Tensor]:
        """Page, and place in the page, of every token; int64 on the device."""
        pages = self.tables[self.sequences.long(), self.positions.long() // PAGE]
        return pages.long().to(self.device), (self.positions.long() % PAGE).to(self.device)

    @cached_property
    def spans(self) -> list[tuple[int, int, int, int]]:
        """First token and the one after the last, number, and first position, of every sequence."""
        numbers, counts = torch.unique_consecutive(self.sequences, return_counts=True)
        ends = counts.cumsum(0).tolist()
        begins = [0, *ends[:-1]]
        positions = self.positions.tolist()
        return [
            (begin, end, number, positions[begin])
            for begin, end, number in zip(begins, ends, numbers.tolist(), strict=True)
        ]

    @cached_property
    def singles(self) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens that are alone of their sequence: which, the pages of these, and how long they are."""
        rows = torch.tensor([begin for begin, end, _, _ in self.spans if end == begin + 1], dtype=torch.int64)
        tables, lengths = self.tables[self.sequences[rows].long()], self.positions[rows] + 1
        device = self.device
        return rows.to(device), tables.contiguous().to(device), lengths.to(device)


def choose(layer: AttentionLayer, dtype: torch.dtype, device: torch.device) -> str:
    """What computes the attention of a layer: `NATIVE`, `TRITON` (with one token) or `GATHERED`.

    `dtype` is that of keys and values in pages.
    """
    if layer.sinks:
        return GATHERED
    if device.type == "cpu":
        fits = layer.head_dim % HEAD_MULTIPLE == 0 and dtype in (torch.float32, torch.bfloat16)
        return NATIVE if fits and native.available() else GATHERED
    fits = dtype in (torch.float16, torch.bfloat16)
    return TRITON if fits and device.type == "cuda" and has_triton() else GATHERED


def attend(
    layer: AttentionLayer,
    path: str,
    tokens: PackedTokens,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pages: tuple[Tensor, Tensor],
    sinks: Tensor | None = None,
) -> Tensor:
    """Write keys and values into pages, and attend.

    Parameters
    ----------
    layer : AttentionLayer
    path : str
        From `choose`; the same for all that is in `pages`.
    tokens : PackedTokens
    query : Tensor[heads, tokens, head_dim]
    key, value : Tensor[kv_heads, tokens, head_dim]
    pages : (Tensor, Tensor)
        Of keys and of values, ``[pages, kv_heads, head_dim * PAGE]``; which number stands where is the
        business of the path.
    sinks : Tensor[heads], optional
        For a layer that has some.

    Returns
    -------
    Tensor[tokens, heads, head_dim], dtype of `query`
    """
    if path == NATIVE:
        return _attend_compiled(layer, tokens, query, key, value, pages)
    cache = tuple(pool.view(-1, PAGE, layer.kv_heads, layer.head_dim) for pool in pages)
    page, slot = tokens.slots
    for pool, new in zip(cache, (key, value), strict=True):
        pool[page, slot] = new.transpose(0, 1).to(pool.dtype)
    count = query.shape[1]
    result = torch.empty(count, layer.heads, layer.head_dim, dtype=query.dtype, device=query.device)
    spans: Sequence[tuple[int, int, int, int]] = tokens.spans
    if path == TRITON:
        _decode_singles(layer, tokens, query, cache, result)
        spans = [span for span in spans if span[1] > span[0] + 1]
    for begin, end, number, start in spans:
        first = max(0, start - layer.window + 1) // PAGE if layer.window else 0
        last = start + end - begin
        table = tokens.tables[number, first : -(-last // PAGE)].long().to(tokens.device)
        keys, values = (pool[table].flatten(0, 1)[: last - first * PAGE].to(query.dtype) for pool in cache)
        result[begin:end] = gathered_attention(
            layer, query[:, begin:end], keys, values, start, first * PAGE, sinks
        )
    return result


def store(path: str, keys: Tensor, values: Tensor, pages: tuple[Tensor, Tensor]) -> None:
    """Let pages 0, 1, ... hold keys and values of a sequence's first tokens, as `attend` does.

    Parameters
    ----------
    path : str
    keys, values : Tensor[tokens, kv_heads, head_dim]
    pages : (Tensor, Tensor)
        As of `attend`.
    """
    heads, channels = keys.shape[1:]
    tokens = torch.arange(len(keys), device="cpu")
    page, slot = tokens // PAGE, tokens % PAGE
    of_keys, of_values = pages
    new_keys, new_values = keys.to(of_keys), values.to(of_values)
    if path == NATIVE:
        of_keys.view(-1, heads, channels, PAGE)[page, :, :, slot] = new_keys
        of_values.view(-1, heads, PAGE, channels)[page, :, slot] = new_values
        return
    for pool, new in ((of_keys, new_keys), (of_values, new_values)):
        pool.view(-1, PAGE, heads, channels)[page, slot] = new


def gathered_attention(
    layer: AttentionLayer,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    start: int,
    first: int = 0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of neighbouring tokens of one sequence, with PyTorch.

    Parameters
    ----------
    layer : AttentionLayer
    query : Tensor[heads, tokens, head_dim]
    keys, values : Tensor[keys, kv_heads, head_dim]
        Of the positions from `first` to that of the last token.
    start : int
        Position of the first token.
    first : int
    sinks : Tensor[heads], optional

    Returns
    -------
    Tensor[tokens, heads, head_dim]
    """
    own = torch.arange(start, start + query.shape[1], device=query.device)[:, None]
    theirs = torch.arange(first, first + len(keys), device=query.device)[None]
    seen = theirs <= own
    if layer.window:
        seen &= theirs > own - layer.window
    grouped = layer.heads // layer.kv_heads
    if not layer.softcap and sinks is None:
        found = torch.nn.functional.scaled_dot_product_attention(
            query[None], keys.transpose(0, 1)[None], values.transpose(0, 1)[None], attn_mask=seen,
            scale=layer.scale, enable_gqa=grouped > 1,
        )  # fmt: skip
        return found[0].transpose(0, 1)
    keys, values = (part.float().transpose(0, 1).repeat_interleave(grouped, 0) for part in (keys, values))
    scores = query.float() @ keys.transpose(1, 2) * layer.scale
    if layer.softcap:
        scores = torch.tanh(scores / layer.softcap) * layer.softcap
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.float()[:, None, None].expand(-1, len(own), 1)], -1)
    weights = scores.softmax(-1)[..., : keys.shape[1]]
    return (weights @ values).transpose(0, 1).to(query.dtype)


def _attend_compiled(
    layer: AttentionLayer,
    tokens: PackedTokens,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pages: tuple[Tensor, Tensor],
) -> Tensor:
    """By the code of the fused blocks."""
    heads, kv_heads, d = layer.heads, layer.kv_heads, layer.head_dim
    keys, values = pages
    block = BlockStructure(
        queries=HeadsStructure(0, heads // kv_heads * d, d), keys=HeadsStructure(heads * d, d, 0),
        values=HeadsStructure((heads + kv_heads) * d, d, 0), heads=heads, kv_heads=kv_heads, head_dim=d,
        window=layer.window, scale=layer.scale, softcap=layer.softcap, key_pages=keys.data_ptr(),
        value_pages=values.data_ptr(),
    )  # fmt: skip
    projected = torch.cat([query, key, value]).transpose(0, 1).float().contiguous()
    found = run_attention(block, tokens.batch(keys.dtype), projected.flatten(1))
    return found.view(-1, heads, d).to(query.dtype)


def _decode_singles(
    layer: AttentionLayer, tokens: PackedTokens, query: Tensor, cache: tuple[Tensor, ...], result: Tensor
) -> None:
    """By Triton, the tokens that are alone of their sequence, into their rows of `result`."""
    from tailorbird.kernels import triton_attention

    rows, tables, lengths = tokens.singles
    if len(rows):
        result[rows] = triton_attention.decode(
            query.transpose(0, 1)[rows].to(cache[0].dtype), triton_attention.Cache(*cache), tables, lengths,
            scale=layer.scale, window=layer.window or None, soft_cap=layer.softcap or None,
        ).to(query.dtype)  # fmt: skip
