"""Numbers in 8 bits, block by block."""

from __future__ import annotations

import pytest
import torch

from tailorbird.kernels.dynamic_codes import BLOCK, blocks_of, decode, encode, levels


def coded(values: torch.Tensor, signed: bool) -> torch.Tensor:
    codes, scales = torch.empty(len(values), dtype=torch.uint8), torch.empty(blocks_of(len(values)))
    encode(values, codes, scales, signed)
    return decode(codes, scales, signed)


@pytest.mark.parametrize("signed", [True, False])
def test_levels(signed: bool) -> None:
    found = levels(signed)
    assert len(found) == len(found.unique()) == 256
    assert 0.0 in found
    assert found[-1] == 1
    assert (found.min() < 0) == signed
    # twice as many in each decade as in the one below it; the highest one has the 1, too
    counts = [int(((found > low / 10) & (found < low)).sum()) for low in (1.0, 0.1, 0.01)]
    assert counts == ([64, 32, 16] if signed else [128, 64, 32])


@pytest.mark.parametrize("count", [1, 255, 256, 1000])
@pytest.mark.parametrize("signed", [True, False])
def test_every_value_becomes_the_nearest_level_of_its_block(signed: bool, count: int) -> None:
    values = torch.randn(count, generator=torch.Generator().manual_seed(0)) ** 3
    values = values if signed else values.abs()
    found = coded(values, signed)
    for begin in range(0, count, BLOCK):
        block = values[begin : begin + BLOCK]
        scaled = levels(signed) * block.abs().max()
        if not signed:
            scaled = scaled[1:]  # none of these is zero
        best = (block[:, None] - scaled).abs().amin(1)
        assert torch.allclose((block - found[begin : begin + BLOCK]).abs(), best, rtol=1e-4, atol=1e-7)


def test_errors_are_bounded_by_the_largest_gap_of_a_decade() -> None:
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(1))
    largest = torch.nn.functional.pad(values, (0, 240)).view(-1, BLOCK).abs().amax(1).repeat_interleave(BLOCK)
    error = (coded(values, True) - values).abs() / largest[:10_000]
    assert error.max() <= 0.9 / 64 / 2 + 1e-6
    assert error[values.abs() / largest[:10_000] < 0.1].max() <= 0.9 / 64 / 2 * 0.6


@pytest.mark.parametrize("signed", [True, False])
def test_values_at_the_bounds_of_levels_are_coded_as_a_search_finds_them(signed: bool) -> None:
    steps = levels(signed)
    bounds = (steps[1:] + steps[:-1]) / 2
    ends = torch.tensor([-2.0, 2.0])
    values = torch.cat([bounds, torch.nextafter(bounds, ends[0]), torch.nextafter(bounds, ends[1]), steps])
    if not signed:
        values = values[values > bounds[0]]
    for block in values.split(BLOCK - 1):
        block = torch.cat([torch.ones(1), block])  # so that the scale is 1
        codes, scales = torch.empty(len(block), dtype=torch.uint8), torch.empty(1)
        encode(block, codes, scales, signed)
        assert torch.equal(codes.long(), torch.bucketize(block, bounds))


def test_zeros_stay_and_divisors_do_not_become_zero() -> None:
    assert (coded(torch.zeros(300), True) == 0).all()
    tiny = torch.tensor([1.0, 1e-12, 0.0])
    found = coded(tiny, False)
    assert found[0] == 1
    assert 0 < found[1] < 1e-6
    assert found[2] == 0
