"""Static scales: the best of the grid for the very inputs that were shown, however these were cut."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tailorbird.calibrate.input_scales import RATIOS, InputScale
from tailorbird.errors import TailorbirdError


def inputs(seed: int, tokens: int = 300, outlier: float = 1.0) -> torch.Tensor:
    x = torch.randn(tokens, 48, generator=torch.Generator().manual_seed(seed))
    x[:, 5] *= outlier
    return x


def searched(*parts: torch.Tensor) -> InputScale:
    search = InputScale(parts[0].shape[-1])
    for part in parts:
        search.widen(part)
    for part in parts:
        search.add(part)
    return search


def squared_error(x: torch.Tensor, scale: float) -> torch.Tensor:
    """Of each input, in float64."""
    wide = x.double()
    return ((wide / scale).round().clamp(-127, 127) * scale - wide).square().sum(0)


@given(
    seed=st.integers(0, 999),
    outlier=st.sampled_from([1.0, 10.0, 500.0]),
    cut=st.integers(1, 299),
    size=st.sampled_from([1e-6, 1.0, 1e5]),
)
@settings(max_examples=40, deadline=None)
def test_the_scale_is_the_best_of_the_grid(seed: int, outlier: float, cut: int, size: float) -> None:
    x = inputs(seed, outlier=outlier) * size
    search = searched(x[:cut].view(1, cut, 48), x[cut:])
    largest = float(x.abs().max())
    assert search.tried == pytest.approx([ratio * largest / 127 for ratio in RATIOS], rel=1e-6)
    errors = [float(squared_error(x, scale).sum()) for scale in search.tried]
    assert float(squared_error(x, search.scale).sum()) <= min(errors) * (1 + 1e-5)
    torch.testing.assert_close(search.squared_errors, squared_error(x, search.scale), rtol=1e-3, atol=0)
    assert search.scale == searched(x).scale


def test_clipping_a_rare_outlier_is_chosen_and_a_frequent_one_is_not() -> None:
    rare, frequent = inputs(0, 20_000), inputs(0)
    rare[0, 0] = 20.0
    frequent[:, 0] = 1000.0
    assert searched(rare).scale < 0.5 * 20 / 127
    assert searched(frequent).scale == pytest.approx(1000 / 127)


def test_inputs_that_are_zeros_have_a_scale() -> None:
    assert searched(torch.zeros(3, 8)).scale > 0
    assert not searched(torch.zeros(3, 8)).squared_errors.any()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(wrong: float) -> None:
    x = inputs(0)
    x[7, 3] = wrong
    with pytest.raises(TailorbirdError, match="finite activations in calibration"):
        searched(x)
