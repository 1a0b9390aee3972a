"""OutlierTune: shifts and scales of the formulas, ranges that are even after them, the same function."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tailorbird.calibrate.statistics import GramAccumulator, LinearStatistics
from tailorbird.formats.packed import Coding, IntegerCoding
from tailorbird.kernels.reference import to_bytes
from tailorbird.linear.quantize.outliertune import Outliertune
from tailorbird.linear.quantize.smoothing import Smoothing
from tailorbird.linear.scaling import apply_norm_fold, apply_norm_shift

WIDTH = 96
CODINGS: list[Coding] = [IntegerCoding(8, 0, True)]


def statistics_of(x: Tensor) -> LinearStatistics:
    accumulator = GramAccumulator(WIDTH)
    accumulator.add(x)
    return accumulator.finish()


def windows() -> Tensor:
    """Inputs ``[windows, tokens, WIDTH]`` some of whose channels are large, others far from zero."""
    x = torch.randn(6, 50, WIDTH, generator=torch.Generator().manual_seed(1))
    x[..., ::24] *= 30
    x[..., 5::12] += 40
    return x


def norm_and_readers(dtype: torch.dtype) -> tuple[nn.LayerNorm, list[nn.Linear]]:
    torch.manual_seed(0)
    norm = nn.LayerNorm(WIDTH)
    nn.init.normal_(norm.weight, 1, 0.3)
    nn.init.normal_(norm.bias, 0, 2.0)
    return norm.to(dtype), [nn.Linear(WIDTH, rows).to(dtype) for rows in (40, 7)]


def test_the_shift_is_the_mean_of_the_middles_of_windows() -> None:
    x = windows()
    middles = [(float(w[:, 5].max()) + float(w[:, 5].min())) / 2 for w in x]
    found = Outliertune().shift([x[:4], x[4:]])
    assert float(found[5]) == pytest.approx(sum(middles) / 6, rel=1e-6)
    assert torch.equal(found, Outliertune().shift(x[i : i + 1] for i in range(6)))


def test_ranges_are_even_after_it() -> None:
    x = windows()[:1]  # of one window, the middle of the range is that of all tokens
    fold = Outliertune()
    moved = x - fold.shift([x])
    torch.testing.assert_close(moved.amax((0, 1)), -moved.amin((0, 1)), rtol=1e-4, atol=1e-4)
    scaled = moved / fold.scales([], statistics_of(moved), [])
    extremes = torch.stack([scaled.amax((0, 1)), -scaled.amin((0, 1))])
    torch.testing.assert_close(extremes, extremes[:1, :1].expand_as(extremes), rtol=1e-4, atol=1e-4)


def test_without_a_shift_the_scales_are_those_of_smoothing_at_one() -> None:
    x = windows()
    weight = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(2))
    x[..., 9] = 0
    found = Outliertune().scales([weight], statistics_of(x), CODINGS)
    assert torch.equal(found, Smoothing(1.0).scales([weight], statistics_of(x), CODINGS))
    assert float(found[9]) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_shift_leaves_the_function(dtype: torch.dtype) -> None:
    norm, readers = norm_and_readers(dtype)
    shift = torch.randn(WIDTH, generator=torch.Generator().manual_seed(3)) * 3
    x = torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    pairs = [(linear.weight.detach(), linear.bias.detach()) for linear in readers]
    moved = apply_norm_shift(norm.bias.detach(), pairs, shift)
    assert moved.bias.dtype == dtype
    assert not torch.equal(moved.bias, norm.bias)
    torch.testing.assert_close(moved.shift, shift, rtol=0.02, atol=0.05)
    norm.double()
    before = [linear.double()(norm(x)) for linear in readers]
    with torch.no_grad():
        norm.bias.copy_(moved.bias)
        for linear, bias in zip(readers, moved.readers, strict=True):
            linear.bias.copy_(bias)
    for old, linear in zip(before, readers, strict=True):
        # beside the rounding of its biases a linear in 16 bits loses nothing: the norm's cancels
        allowed = 1e-12 if dtype == torch.float64 else float(moved.readers[0].abs().max()) * 2**-8
        torch.testing.assert_close(linear(norm(x)), old, rtol=0, atol=allowed)


def test_a_shift_and_scales_leave_the_function_together() -> None:
    norm, readers = norm_and_readers(torch.float32)
    shift = torch.randn(WIDTH, generator=torch.Generator().manual_seed(3))
    scales = torch.rand(WIDTH, generator=torch.Generator().manual_seed(5)) * 3 + 0.2
    x = torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(4))
    before = [linear(norm(x)) for linear in readers]
    with torch.no_grad():
        moved = apply_norm_shift(norm.bias, [(linear.weight, linear.bias) for linear in readers], shift)
        folded = apply_norm_fold(norm.weight, moved.bias, [linear.weight for linear in readers], scales)
        norm.weight.copy_(folded.weight)
        assert folded.bias is not None
        norm.bias.copy_(folded.bias)
        for linear, weight, bias in zip(readers, folded.linears, moved.readers, strict=True):
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)
    for old, linear in zip(before, readers, strict=True):
        torch.testing.assert_close(linear(norm(x)), old, rtol=1e-4, atol=1e-4)


def test_outputs_of_rounded_inputs_are_nearer_where_channels_are_far_from_zero() -> None:
    x = torch.randn(6, 50, WIDTH, generator=torch.Generator().manual_seed(1))
    x[..., 5::12] += 40
    weight = torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(6)).double()
    fold = Outliertune()

    def error(shift: Tensor) -> float:
        scales = fold.scales([weight], statistics_of(x - shift), CODINGS)
        rounded = to_bytes((x - shift) / scales, 0).double() * scales + shift
        return float(((rounded - x) @ weight.T).square().mean())

    assert error(fold.shift([x])) < 0.5 * error(torch.zeros(WIDTH))
