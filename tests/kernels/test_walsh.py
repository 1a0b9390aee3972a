"""Rotation by blocks: it is the matrix that is documented, keeps lengths, and can be taken back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tailorbird.kernels import native
from tailorbird.kernels.walsh import by_library, by_operators, rotate, rotate_back

BLOCKS = st.sampled_from([(1, 1), (7, 1), (3, 2), (1, 32), (5, 16), (3, 64), (1, 1024)])


def signs_of(shape: tuple[int, int]) -> Tensor:
    generator = torch.Generator().manual_seed(shape[0] * 31 + shape[1])
    return (torch.randint(0, 2, shape, generator=generator) * 2 - 1).to(torch.int8)


def matrix(signs: Tensor) -> Tensor:
    """``blockdiag(H / sqrt(block)) diag(signs)`` in float64, from the entries of `H`."""
    block = signs.shape[1]
    places = torch.arange(block)
    common = (places[:, None] & places)[..., None] >> torch.arange(11) & 1
    hadamard = (1 - 2 * (common.sum(-1) % 2)).double() / block**0.5
    return torch.block_diag(*([hadamard] * len(signs))) * signs.flatten()


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@given(blocks=BLOCKS, rows=st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_it_is_the_matrix(blocks: tuple[int, int], rows: int) -> None:
    signs = signs_of(blocks)
    x, expected = normal(rows, signs.numel()).double(), matrix(signs)
    torch.testing.assert_close(rotate(x, signs), x @ expected.T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rotate_back(x, signs), x @ expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rotate_back(rotate(x, signs), signs), x, rtol=1e-12, atol=1e-12)


@given(blocks=BLOCKS, dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
@settings(max_examples=30, deadline=None)
def test_a_row_has_the_same_bits_alone_and_is_rounded_once(
    blocks: tuple[int, int], dtype: torch.dtype
) -> None:
    signs = signs_of(blocks)
    x = normal(9, signs.numel()).to(dtype)
    for turn in (rotate, rotate_back):
        together = turn(x, signs)
        assert together.dtype == dtype
        assert torch.equal(together, torch.stack([turn(row, signs) for row in x]))
        assert torch.equal(together.view(3, 3, -1), turn(x.view(3, 3, -1), signs))
        assert torch.equal(together, turn(x.float(), signs).to(dtype))


@pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")
@given(
    blocks=st.tuples(st.integers(1, 3), st.sampled_from([1 << i for i in range(14)])),
    rows=st.integers(0, 3),
    back=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_compiled_it_has_the_bits_of_the_operators(blocks: tuple[int, int], rows: int, back: bool) -> None:
    signs = signs_of(blocks)
    x = normal(rows, signs.numel()) * torch.logspace(-20, 20, signs.numel())
    expected = by_operators(x, signs, back)
    for version in native.versions():
        assert torch.equal(by_library(x, signs, back, version), expected)
    assert torch.equal((rotate_back if back else rotate)(x, signs), expected)
    strided = torch.stack([x, x + 1], -1)[..., 0]
    assert torch.equal((rotate_back if back else rotate)(strided, signs), expected)


@pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")
def test_compiled_it_keeps_what_is_not_finite_in_its_block() -> None:
    x, signs = normal(2, 96), signs_of((3, 32))
    x[1, 40] = float("inf")
    found = rotate(x, signs)
    assert bool(found[0].isfinite().all())
    assert bool(found[1, 32:64].isinf().all())
    assert torch.equal(found[:, :32], rotate(x[:, :32], signs[:1]))


def test_the_gradient_of_the_gradient_is_there() -> None:
    signs = signs_of((2, 8))
    x, direction = normal(3, 16).requires_grad_(), normal(3, 16).requires_grad_()
    (gradient,) = torch.autograd.grad(rotate(x, signs), x, direction, create_graph=True)
    (found,) = torch.autograd.grad(gradient, direction, x)
    torch.testing.assert_close(found, rotate(x, signs))


def test_one_value_is_spread_over_its_block_and_no_other() -> None:
    x = torch.zeros(64)
    x[17] = 8.0
    found = rotate(x, signs_of((4, 16)))
    assert found.abs().tolist() == [0.0] * 16 + [2.0] * 16 + [0.0] * 32


@pytest.mark.parametrize("turn", [rotate, rotate_back])
def test_the_gradient_is_turned_back(turn: object) -> None:
    assert callable(turn)
    signs = signs_of((3, 16))
    x = normal(4, 48).requires_grad_()
    gradient = normal(4, 48) + 1
    turn(x, signs).backward(gradient)
    other = rotate_back if turn is rotate else rotate
    assert x.grad is not None
    torch.testing.assert_close(x.grad, other(gradient, signs))


def test_inputs_that_the_signs_do_not_cover_are_refused() -> None:
    with pytest.raises(ValueError, match="48 inputs for 32 signs"):
        rotate(torch.zeros(2, 48), signs_of((1, 32)))
