"""CBQ's pre-processing: what stands out is found, whatever its place, and comes down to the others."""

from __future__ import annotations

import pytest
import torch

from tailorbird.calibrate.statistics import GramAccumulator
from tailorbird.errors import SettingsError
from tailorbird.formats.packed import IntegerCoding
from tailorbird.linear.quantize.cfp import Cfp, standing_out

CODING = IntegerCoding(4, 32)


def magnitudes(seed: int, planted: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """64 values between 1 and 2, some of them replaced; and where."""
    generator = torch.Generator().manual_seed(seed)
    values = 1 + torch.rand(64, generator=generator)
    places = torch.randperm(64, generator=generator)[: len(planted)]
    values[places] = torch.tensor(planted)
    return values, torch.zeros(64, dtype=torch.bool).index_fill_(0, places, True)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("planted", [[9.0], [20.0, 21.0, 20.5], [40.0, 41.0]], ids=str)
def test_planted_channels_stand_out(seed: int, planted: list[float]) -> None:
    values, where = magnitudes(seed, [*planted, 4.0, 4.1] if len(planted) > 1 else planted)
    expected = where & (values > 5)
    assert torch.equal(standing_out(values), expected)


def test_the_cut_has_the_greatest_merit() -> None:
    values = torch.cat([torch.linspace(1, 2, 40), torch.tensor([5.0, 5.5, 6.0, 9.0, 9.2])])
    outside = standing_out(values)
    assert values[outside].tolist() == pytest.approx([9.0, 9.2])
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(0))
    assert torch.equal(standing_out(values[order]), outside[order])


def test_channels_of_one_size_are_left_alone() -> None:
    assert not standing_out(torch.linspace(1, 2, 64)).any()
    assert not standing_out(torch.ones(64)).any()
    assert not standing_out(torch.zeros(64)).any()


def test_the_greatest_come_down_to_the_others() -> None:
    x = torch.randn(512, 64, generator=torch.Generator().manual_seed(0)).clamp(-3, 3)
    x[:, [3, 40]] *= 50
    x[:, 7] *= 4  # beyond the others, and far below those two
    accumulator = GramAccumulator(64)
    accumulator.add(x)
    statistics = accumulator.finish()
    assert statistics.max_abs is not None
    scales = Cfp(alpha=1.0).scales([torch.ones(4, 64)], statistics, [CODING])
    assert (scales != 1).nonzero().flatten().tolist() == [3, 40]
    after = statistics.max_abs / scales
    assert after.max() == pytest.approx(float(statistics.max_abs[scales == 1].max()), rel=1e-5)
    half = Cfp(alpha=0.5).scales([torch.ones(4, 64)], statistics, [CODING])
    torch.testing.assert_close(half.square(), scales)


def test_an_input_that_is_zero_but_for_one_channel_is_left_alone() -> None:
    accumulator = GramAccumulator(8)
    accumulator.add(torch.tensor([[0.0, 0, 0, 5, 0, 0, 0, 0]]))
    assert (Cfp().scales([], accumulator.finish(), []) == 1).all()


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_an_exponent_out_of_range_is_refused(alpha: float) -> None:
    with pytest.raises(SettingsError, match=r"alpha .* of cfp"):
        Cfp(alpha=alpha)
