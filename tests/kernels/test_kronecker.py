"""Kronecker products against the dense matrix, forth and back, and row by row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tailorbird.kernels.kronecker import behind, in_front, mix, mix_rows

ORDERS = st.sampled_from([(1, 7), (2, 43), (4, 4), (12, 16), (7, 1)])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(orders=ORDERS, rows=st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_it_is_the_dense_matrix(orders: tuple[int, int], rows: int) -> None:
    left, right = (normal(order, order, seed=seed) for seed, order in enumerate(orders))
    x = normal(rows, orders[0] * orders[1], seed=2)
    dense = x @ torch.kron(left, right)
    for found in (mix(x, left, right), mix_rows(x, left, right)):
        torch.testing.assert_close(found, dense, rtol=1e-12, atol=1e-12)


@given(orders=ORDERS)
@settings(max_examples=20, deadline=None)
def test_a_weight_behind_it_gives_the_same_products(orders: tuple[int, int]) -> None:
    left, right = (torch.eye(n, dtype=torch.float64) + 0.3 * normal(n, n, seed=n) for n in orders)
    width = orders[0] * orders[1]
    weight, x = normal(5, width), normal(3, width, seed=1)
    moved = behind(weight, left, right)
    assert width == 1 or not torch.allclose(moved, weight)
    torch.testing.assert_close(mix(x, left, right) @ moved.t(), x @ weight.t(), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(in_front(moved, left, right), weight, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("orders", [(2, 86), (16, 16), (24, 32)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_alone_and_in_a_batch(orders: tuple[int, int], dtype: torch.dtype) -> None:
    left, right = (normal(n, n, seed=n).bfloat16() for n in orders)
    x = normal(65, orders[0] * orders[1]).to(dtype)
    together = mix(x, left, right)
    assert together.dtype == dtype
    assert torch.equal(together, torch.cat([mix(row, left, right) for row in x.split(1)]))
    assert torch.equal(together[3:20], mix(x[3:20], left, right))
    assert torch.equal(together.reshape(5, 13, -1), mix(x.reshape(5, 13, -1), left, right))


def test_autocast_narrows_nothing() -> None:
    left, right, x = (normal(*shape).float() for shape in ((4, 4), (8, 8), (3, 32)))
    expected = mix(x, left, right), mix_rows(x, left, right)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = mix(x, left, right), mix_rows(x, left, right)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
