"""The grids of normal values are those that the script finds, and the best ones by Lloyd's conditions."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gaussian_grids as benchmark
from tailorbird.formats.codebooks import LEVELS, UNITS

#: Max 1960, "Quantizing for Minimum Distortion", table I, whose figures have as many digits
PUBLISHED = {2: 0.1175, 3: 0.03454, 4: 0.009497}


@pytest.mark.parametrize("bits", benchmark.BITS)
def test_the_levels_are_those_that_it_finds(bits: int) -> None:
    levels, unit = benchmark.levels_of(benchmark.lloyd(1 << bits))
    assert levels == LEVELS[f"gauss{bits}"].tolist()
    assert unit == pytest.approx(UNITS[f"gauss{bits}"], abs=1e-5)


@pytest.mark.parametrize("bits", benchmark.BITS)
def test_they_lose_what_is_published_of_the_best(bits: int) -> None:
    """By adding up the density in small steps, which knows nothing of the script's formulas."""
    z = torch.arange(-9, 9, 1e-4, dtype=torch.float64)
    density = torch.exp(-z.square() / 2)
    density /= density.sum()
    points = LEVELS[f"gauss{bits}"].double() / UNITS[f"gauss{bits}"]
    cell = torch.bucketize(z, (points[1:] + points[:-1]) / 2)
    error = float(((z - points[cell]).square() * density).sum())
    assert error == pytest.approx(PUBLISHED[bits], rel=2e-3)
    assert error == pytest.approx(benchmark.distortion(points.tolist()), rel=1e-6)
    share = torch.zeros(len(points), dtype=torch.float64).index_add_(0, cell, density)
    mean = torch.zeros_like(share).index_add_(0, cell, z * density) / share
    # each point is the mean of what is nearest to it, up to the rounding of levels
    assert float((mean - points).abs().max()) <= 0.7 / UNITS[f"gauss{bits}"]
    for levels in benchmark.lloyd(1 << bits), (mean * 1.02).tolist(), (mean * 0.98).tolist():
        assert benchmark.distortion(benchmark.lloyd(1 << bits)) <= benchmark.distortion(levels) + 1e-12
