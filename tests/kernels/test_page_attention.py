"""Attention of compiled blocks over their pages, for every kind of processor that this one can stand for."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tailorbird.kernels import native
from tailorbird.kernels.blocks import PAGE, Batch, BlockStructure, HeadsStructure, run_attention

pytestmark = pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")

#: what a number is off at most that is rounded to bfloat16, as a share of it
UNIT = 2**-8
versions = st.sampled_from(native.versions() or (0,))


class Layer:
    """One layer's heads, pages with whatever was there before, and tokens that are read at once or apart."""

    def __init__(
        self, heads: int, kv_heads: int, d: int, length: int, window: int, dtype: torch.dtype, seed: int = 0
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.heads, self.kv_heads, self.d, self.length = heads, kv_heads, d, length
        self.window, self.dtype, self.scale = window, dtype, 1 / math.sqrt(d)
        self.query, self.key, self.value = (
            torch.randn(count, length, d, generator=generator) for count in (heads, kv_heads, kv_heads)
        )
        pages = -(-length // PAGE)
        self.table = torch.randperm(pages, generator=generator).int()[None]

    def read(self, version: int, pieces: list[int], before: float = 0.0) -> Tensor:
        """Results ``[length, heads, d]``; tokens come in so many at a time, into pages full of `before`."""
        shape = self.table.numel(), self.kv_heads, self.d * PAGE
        keys, values = (torch.full(shape, before, dtype=self.dtype) for _ in range(2))
        heads, kv_heads, d = self.heads, self.kv_heads, self.d
        block = BlockStructure(
            queries=HeadsStructure(0, heads // kv_heads * d, d), keys=HeadsStructure(heads * d, d, 0),
            values=HeadsStructure((heads + kv_heads) * d, d, 0), heads=heads, kv_heads=kv_heads, head_dim=d,
            window=self.window, scale=self.scale, key_pages=keys.data_ptr(), value_pages=values.data_ptr(),
        )  # fmt: skip
        projected = torch.cat([self.query, self.key, self.value]).transpose(0, 1).contiguous()
        results, start = [], 0
        for count in pieces:
            here = projected[start : start + count].flatten(1).contiguous()
            positions = torch.arange(start, start + count, dtype=torch.int32)
            batch = Batch(positions, torch.zeros_like(positions), self.table, self.dtype)
            results.append(run_attention(block, batch, here, version))
            start += count
        return torch.cat(results).view(self.length, heads, d)

    def exact(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Results in float64, and the same of values without their signs."""
        group = self.heads // self.kv_heads
        key, value = (
            part.to(self.dtype).double().repeat_interleave(group, 0) for part in (self.key, self.value)
        )
        scores = query.double() @ key.transpose(1, 2) * self.scale
        near = torch.arange(self.length)[:, None] - torch.arange(self.length)
        seen = (near >= 0) & (near < (self.window or self.length))
        weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
        return (weights @ value).transpose(0, 1), (weights @ value.abs()).transpose(0, 1)


def rounded(version: int, dtype: torch.dtype) -> bool:
    """Whether queries and weights are rounded to bfloat16, which is said of version 5 alone."""
    return version == 5 and dtype == torch.bfloat16


@given(
    version=versions,
    group=st.integers(1, 5),
    kv_heads=st.integers(1, 3),
    d=st.sampled_from([16, 32, 48, 64, 80, 128]),
    length=st.integers(1, 90),
    window=st.sampled_from([0, 0, 1, 5, 40]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_results_are_as_close_as_their_roundings_allow(
    version: int, group: int, kv_heads: int, d: int, length: int, window: int, dtype: torch.dtype
) -> None:
    """A weight is off by its own rounding and its sum's: twice the unit of bfloat16, or nearly nothing."""
    layer = Layer(group * kv_heads, kv_heads, d, length, window, dtype)
    paired = rounded(version, dtype)
    wanted, sizes = layer.exact(layer.query.bfloat16() if paired else layer.query)
    found = layer.read(version, [length]).double()
    assert bool(((found - wanted).abs() <= (2 * UNIT if paired else 0) * sizes + 1e-5).all())


@given(version=versions, dtype=st.sampled_from([torch.float32, torch.bfloat16]), data=st.data())
def test_results_have_the_same_bits_in_whatever_pieces_tokens_come(
    version: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    length = data.draw(st.integers(1, 100))
    layer = Layer(
        6, 2, data.draw(st.sampled_from([16, 48, 64])), length, data.draw(st.sampled_from([0, 33])), dtype
    )
    pieces, left = [], length
    while left:
        pieces.append(data.draw(st.integers(1, left)))
        left -= pieces[-1]
    assert torch.equal(layer.read(version, pieces), layer.read(version, [length]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("version", native.versions())
def test_what_lies_behind_the_last_key_changes_nothing(version: int, dtype: torch.dtype) -> None:
    """Not even what isn't a number: pages are handed on as they are, by requests that may have gone wrong."""
    for length in (1, 2, 31, 33, 40):
        for d in (16, 64):
            layer = Layer(4, 2, d, length, 0, dtype)
            clean = layer.read(version, [1] * length)
            assert clean.isfinite().all()
            assert torch.equal(layer.read(version, [1] * length, before=math.nan), clean)


@pytest.mark.skipif(5 not in native.versions(), reason="this processor has no products of bfloat16")
def test_products_of_bfloat16_are_taken_where_the_processor_has_them() -> None:
    assert native.best_version() == 5
    layer = Layer(4, 2, 64, 70, 0, torch.bfloat16)
    by_pairs, widened = layer.read(5, [70]), layer.read(2, [70])
    assert not torch.equal(by_pairs, widened)
    kept = Layer(4, 2, 64, 70, 0, torch.float32)
    assert torch.equal(kept.read(5, [70]), kept.read(2, [70]))
