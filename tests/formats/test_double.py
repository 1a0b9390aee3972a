"""Scales that are codes: what they stand for, how near it is, and that everything reads the same weight."""

from __future__ import annotations

import pytest
import torch

from packed_weights import random_packed
from tailorbird.formats.modules import CompressedEmbedding, CompressedLinear
from tailorbird.formats.packed import (
    CodebookCoding,
    DoubleCoding,
    PackedWeight,
    coded_scales,
    expanded_scales,
    stored_bytes,
)
from tailorbird.kernels.dynamic_codes import BLOCK
from tailorbird.linear.quantize.grid import fit_grid, quantize_to_grid
from tailorbird.linear.quantize.rtn import Rtn

CODING = DoubleCoding("nf4", 64)


def weight(rows: int = 96, columns: int = 172) -> torch.Tensor:
    """Of rows that differ in size, as trained ones do."""
    generator = torch.Generator().manual_seed(0)
    sizes = 0.02 * (1 + torch.rand(rows, 1, generator=generator))
    return torch.randn(rows, columns, generator=generator) * sizes


@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (300, 5)])
def test_scales_come_back_as_near_as_their_steps_lie(shape: tuple[int, int]) -> None:
    scales = torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 0.01 + 0.002
    read = expanded_scales(coded_scales(scales))
    assert read is not None
    assert (read.dtype, read.shape) == (torch.bfloat16, scales.shape)
    distances = (scales - scales.mean()).flatten()
    for start in range(0, len(distances), BLOCK):
        block = slice(start, start + BLOCK)
        # half of the widest step, that of the highest decade, and the rounding to bfloat16
        allowed = distances[block].abs().max() * 0.9 / 64 + scales.max() * 2**-8
        assert bool(((scales - read.float()).flatten()[block].abs() <= allowed).all())


def test_equal_scales_come_back_to_the_bit() -> None:
    scales = torch.full((20, 30), 0.0123).bfloat16()
    assert torch.equal(expanded_scales(coded_scales(scales)), scales)


def test_its_weight_is_that_of_the_codebook_with_the_scales_that_it_stands_for() -> None:
    packed = Rtn()(weight(), None, CODING)
    assert packed.expanded.coding == CodebookCoding("nf4", 64)
    assert torch.equal(packed.dequantize(), packed.expanded.dequantize())
    assert packed.nbytes == stored_bytes(CODING, 96, 172) < stored_bytes(CODING.expanded, 96, 172)


def test_codes_are_the_nearest_by_the_scales_that_are_stored() -> None:
    matrix = weight()
    packed = Rtn()(matrix, None, CODING)
    scales = expanded_scales(packed.tensors).float().repeat_interleave(64, 1)[:, :172]
    candidates = scales[..., None] * CODING.levels.float()
    nearest = (candidates - matrix[..., None]).abs().amin(-1)
    torch.testing.assert_close((packed.dequantize() - matrix).abs(), nearest, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("clip_search", [True, False])
def test_it_costs_next_to_nothing_beside_the_same_scales_in_16_bits(clip_search: bool) -> None:
    matrix, plain = weight(), CODING.expanded
    scales, _ = fit_grid(matrix, plain, None, clip_search, upright=True)
    assert bool((scales > 0).all())
    exact = PackedWeight.from_codes(quantize_to_grid(matrix, scales, None, plain), scales, None, plain)
    ours = Rtn(clip_search)(matrix, None, CODING)
    errors = [float((one.dequantize() - matrix).square().sum()) for one in (ours, exact)]
    assert errors[0] < 1.005 * errors[1]


def test_groups_of_zeros_stay_zero_and_spoil_no_other() -> None:
    matrix = weight()
    matrix[3], matrix[5, 64:128] = 0, 0
    packed = Rtn()(matrix, None, CODING)
    assert not packed.dequantize()[matrix == 0].any()
    error = (packed.dequantize() - matrix).norm() / matrix.norm()
    assert error < 0.12
    assert not Rtn()(torch.zeros(4, 70), None, CODING).dequantize().any()


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 40])
def test_a_linear_runs_as_one_with_expanded_scales(rows: int, dtype: torch.dtype, gradient: bool) -> None:
    packed = Rtn()(weight(), None, CODING)
    x = torch.randn(rows, 172, generator=torch.Generator().manual_seed(2)).to(dtype)
    found = []
    for one in (packed, packed.expanded):
        linear = CompressedLinear.from_packed(one)
        own = x.clone().requires_grad_(gradient)
        y = linear(own)
        if gradient:
            y.square().sum().backward()
        found.append(
            (linear.path(rows, dtype, gradient), y.detach(), own.grad, linear.weight_rows(slice(2, 5)))
        )
    assert found[0][0] == found[1][0]
    for ours, theirs in zip(found[0][1:], found[1][1:], strict=True):
        assert ours is theirs is None or torch.equal(ours, theirs)


def test_an_embedding_looks_up_its_rows() -> None:
    packed = random_packed(CODING, (50, 96))
    ids = torch.tensor([[3, 49], [0, 3]])
    found = CompressedEmbedding.from_packed(packed)(ids)
    assert torch.equal(found, packed.dequantize()[ids])


def test_stored_tensors_keep_their_dtypes_whatever_the_module_becomes() -> None:
    packed = Rtn()(weight(), None, CODING)
    linear = CompressedLinear.from_packed(packed).to(torch.bfloat16)
    assert {name: tensor.dtype for name, tensor in linear.state_dict().items()} == {
        name: tensor.dtype for name, tensor in packed.tensors.items()
    }
    assert torch.equal(linear.packed().dequantize(), packed.dequantize())
