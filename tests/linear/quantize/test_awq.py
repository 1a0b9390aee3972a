"""Folds leave the function as it was, and the search finds scales that lower the error."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tailorbird.calibrate.statistics import GramAccumulator, LinearStatistics
from tailorbird.errors import SettingsError
from tailorbird.formats.packed import FloatCoding, IntegerCoding
from tailorbird.linear.error import output_error
from tailorbird.linear.quantize.awq import (
    Awq,
    apply_norm_fold,
    apply_pair_fold,
    magnitude_scales,
    scale_statistics,
)
from tailorbird.linear.quantize.rtn import Rtn

WIDTH = 96


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def positive(count: int = WIDTH) -> Tensor:
    return torch.rand(count, generator=generator(9)) * 3 + 0.2


def inputs_with_outliers(tokens: int = 600) -> Tensor:
    x = torch.randn(tokens, WIDTH, generator=generator(1))
    x[:, ::24] *= 30
    return x


def statistics_of(x: Tensor, source: Tensor | None = None) -> LinearStatistics:
    accumulator = GramAccumulator(x.shape[-1], cross=source is not None)
    accumulator.add(x, source)
    return accumulator.finish()


class RmsNorm(nn.Module):
    """As in Llama; with `offset` as in Gemma."""

    def __init__(self, weight: Tensor, offset: bool) -> None:
        super().__init__()
        self.weight, self.offset = weight, offset

    def forward(self, x: Tensor) -> Tensor:
        normal = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        return normal * (self.weight.to(x.dtype) + (1 if self.offset else 0))


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_folding_into_an_rms_norm_changes_nothing(offset: bool, dtype: torch.dtype) -> None:
    weight = (torch.randn(WIDTH, generator=generator(2)) * 0.3 + (0 if offset else 1)).to(dtype)
    weight[4] = -1 if offset else 0  # a channel that is switched off
    linears = [torch.randn(rows, WIDTH, generator=generator(rows)) for rows in (8, 5)]
    folded = apply_norm_fold(weight, None, linears, positive(), offset)
    assert folded.weight.dtype == dtype
    assert not torch.equal(folded.weight, weight)
    x = torch.randn(20, WIDTH, generator=generator(3), dtype=torch.float64)
    before, after = RmsNorm(weight, offset)(x), RmsNorm(folded.weight, offset)(x)
    torch.testing.assert_close(after * folded.scales, before, rtol=1e-5, atol=1e-6)
    for old, new in zip(linears, folded.linears, strict=True):
        torch.testing.assert_close(after @ new.double().T, before @ old.double().T, rtol=1e-5, atol=1e-5)
    near = torch.ones(WIDTH, dtype=torch.bool)
    near[4] = False
    closeness = {torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 0.01}[dtype]
    assert float((folded.scales / positive() - 1).abs()[near].median()) < closeness


def test_folding_into_a_layer_norm_divides_its_bias_too() -> None:
    norm = nn.LayerNorm(WIDTH)
    nn.init.normal_(norm.weight, 1, 0.3)
    nn.init.normal_(norm.bias, 0, 0.5)
    linear = nn.Linear(WIDTH, 7)
    x = torch.randn(20, WIDTH, generator=generator(3))
    before = linear(norm(x))
    with torch.no_grad():
        folded = apply_norm_fold(norm.weight, norm.bias, [linear.weight], positive())
        norm.weight.copy_(folded.weight)
        assert folded.bias is not None
        norm.bias.copy_(folded.bias)
        linear.weight.copy_(folded.linears[0])
    torch.testing.assert_close(linear(norm(x)), before, rtol=1e-4, atol=1e-5)


def test_a_channel_that_the_dtype_would_lose_is_kept() -> None:
    weight = torch.full((WIDTH,), -0.99, dtype=torch.bfloat16)
    scales = torch.full((WIDTH,), 1000.0)
    linear = torch.randn(3, WIDTH, generator=generator())
    folded = apply_norm_fold(weight, None, [linear], scales, offset=True)
    gain, new_gain = weight.float() + 1, folded.weight.float() + 1
    torch.testing.assert_close(new_gain * folded.linears[0], gain * linear)


def test_folding_values_into_the_output_projection_changes_nothing() -> None:
    value, output = nn.Linear(32, 48), nn.Linear(48, 32)
    x = torch.randn(2, 10, 32, generator=generator(4))
    attention = torch.softmax(torch.randn(2, 10, 10, generator=generator(5)), -1)
    before = output(attention @ value(x))
    with torch.no_grad():
        folded = apply_pair_fold(value.weight, value.bias, output.weight, positive(48))
        value.weight.copy_(folded.weight)
        assert folded.bias is not None
        value.bias.copy_(folded.bias)
        output.weight.copy_(folded.target)
    torch.testing.assert_close(output(attention @ value(x)), before, rtol=1e-4, atol=1e-5)


def test_folding_up_into_down_of_a_fused_gated_mlp_changes_nothing() -> None:
    gate_up, down = nn.Linear(32, 2 * 40), nn.Linear(40, 32, bias=False)
    x = torch.randn(10, 32, generator=generator(6))

    def mlp() -> Tensor:
        gate, up = gate_up(x).chunk(2, -1)
        return down(nn.functional.silu(gate) * up)

    before = mlp()
    old = gate_up.weight.detach().clone()
    with torch.no_grad():
        folded = apply_pair_fold(gate_up.weight, gate_up.bias, down.weight, positive(40), first_row=40)
        gate_up.weight.copy_(folded.weight)
        assert folded.bias is not None
        gate_up.bias.copy_(folded.bias)
        down.weight.copy_(folded.target)
    torch.testing.assert_close(mlp(), before, rtol=1e-4, atol=1e-5)
    assert torch.equal(gate_up.weight[:40], old[:40])
    assert not torch.equal(gate_up.weight[40:], old[40:])


def test_rows_that_do_not_exist_are_refused() -> None:
    source, target = torch.zeros(10, 4), torch.zeros(3, 8)
    with pytest.raises(ValueError, match="scales"):
        apply_pair_fold(source, None, target, torch.ones(8), first_row=3)
    with pytest.raises(ValueError, match="scales"):
        apply_pair_fold(source, None, target, torch.ones(7))


def test_scaled_statistics_are_those_of_scaled_inputs() -> None:
    x = inputs_with_outliers()
    source = x + 0.1 * torch.randn(x.shape, generator=generator(7))
    scales = positive()
    found = scale_statistics(statistics_of(x, source), scales)
    expected = statistics_of(x / scales, source / scales)
    for name in ("gram", "cross", "mean_abs"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-3, atol=1e-4)


def test_scales_are_powers_of_the_magnitudes_around_one() -> None:
    mean_abs = torch.tensor([1.0, 4.0, 16.0, 0.0])
    torch.testing.assert_close(magnitude_scales(mean_abs, 0.5), torch.tensor([0.5, 1.0, 2.0, 1.0]))
    torch.testing.assert_close(magnitude_scales(100 * mean_abs, 0.5), magnitude_scales(mean_abs, 0.5))
    assert torch.equal(magnitude_scales(mean_abs, 0.0), torch.ones(4))
    assert torch.equal(magnitude_scales(torch.zeros(3), 0.5), torch.ones(3))


def test_the_search_lowers_the_error_where_few_inputs_are_large() -> None:
    x = inputs_with_outliers()
    statistics = statistics_of(x)
    weights = [torch.randn(rows, WIDTH, generator=generator(rows)) for rows in (16, 12)]
    codings = [IntegerCoding(3, 32), IntegerCoding(4, 32)]
    found = Awq()(weights, statistics, codings)
    assert 0 < found.alpha < 1
    assert found.error < 0.8 * found.error_before
    # both errors are those of the outputs after the fold, summed over the linears
    for scales, error in ((torch.ones(WIDTH), found.error_before), (found.scales, found.error)):
        change = energy = 0.0
        for weight, coding in zip(weights, codings, strict=True):
            rounded = Rtn(False)(weight * scales, None, coding).dequantize()
            change += float((x / scales @ rounded.T - x @ weight.T).double().square().sum())
            energy += float((x @ weight.T).double().square().sum())
        assert error == pytest.approx(change / energy, rel=1e-3)


def test_the_best_exponent_of_the_grid_is_taken() -> None:
    statistics = statistics_of(inputs_with_outliers())
    weight, coding = torch.randn(16, WIDTH, generator=generator()), IntegerCoding(3, 32)
    found = Awq(grid=8)([weight], statistics, [coding])
    errors = []
    for step in range(8):
        scales = magnitude_scales(statistics.mean_abs, step / 8)
        rounded = Rtn(False)(weight * scales, None, coding).dequantize() / scales
        errors.append(output_error(weight, rounded, statistics.gram))
    assert found.error == pytest.approx(min(errors), rel=1e-3)
    assert found.alpha == errors.index(min(errors)) / 8


def test_scales_stay_one_where_no_other_helps() -> None:
    x = torch.randn(50, WIDTH, generator=generator(1))
    weight = torch.randn(4, WIDTH, generator=generator(2)).bfloat16().float()
    for codings in ([FloatCoding("float32")], [IntegerCoding(4, 32)]):
        found = Awq(grid=1)([weight], statistics_of(x), codings)
        assert torch.equal(found.scales, torch.ones(WIDTH))
        assert found.alpha == 0
        assert found.error == found.error_before
    exact = Awq()([weight], statistics_of(x), [FloatCoding("bfloat16")])
    assert torch.equal(exact.scales, torch.ones(WIDTH))
    nothing = Awq(grid=2)([torch.zeros(4, WIDTH)], statistics_of(x), [IntegerCoding(4, 32)])
    assert nothing.error == nothing.error_before == 0


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(SettingsError, match="grid"):
        Awq(grid=0)
    with pytest.raises(ValueError):
        Awq()([torch.zeros(4, WIDTH)], statistics_of(torch.ones(2, WIDTH)), [])
