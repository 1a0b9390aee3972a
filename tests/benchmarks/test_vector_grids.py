"""The grids of points are the best ones by Lloyd's conditions, and lose less than values one by one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gaussian_grids
import vector_grids as benchmark
from tailorbird.formats.codebooks import POINTS, VECTOR_UNITS, bits_of

#: mean squared error of a standard normal value, as the script prints it
ERRORS = {"gauss2x2": 0.107602, "gauss2x4": 0.096342, "gauss3x2": 0.029777, "gauss4x2": 0.007823}


def points_of(name: str) -> Tensor:
    return POINTS[name].float() / VECTOR_UNITS[name]


def drawn(dimension: int) -> benchmark.Cloud:
    """Vectors drawn at random, which know nothing of the script's lattice and sequence."""
    half = torch.randn((400_000, dimension), generator=torch.Generator().manual_seed(5))
    nodes = torch.cat([half, -half])
    return benchmark.Cloud(nodes, torch.full((len(nodes),), 1 / len(nodes)))


@pytest.mark.parametrize("name", benchmark.SHAPES)
def test_points_lose_what_is_stated_and_less_than_values_one_by_one(name: str) -> None:
    points = points_of(name)
    _, error = benchmark.means(points, drawn(points.shape[1]))
    assert error == pytest.approx(ERRORS[name], rel=5e-3)
    bits = bits_of(name) // points.shape[1]
    alone = gaussian_grids.distortion(gaussian_grids.lloyd(1 << bits))
    assert error < 0.93 * alone
    # no code of so many bits loses less: the distortion of the rate, Shannon 1959
    assert error > 4.0**-bits


@pytest.mark.parametrize("name", benchmark.SHAPES)
def test_each_point_is_the_mean_of_what_is_nearest_to_it(name: str) -> None:
    points = points_of(name)
    of = benchmark.cloud(points.shape[1], fine=False)
    means, error = benchmark.means(points, of)
    moved = (means - points).square().sum(1)
    values = torch.cat([nodes for nodes, _ in of.chunks()])
    share = torch.bincount(benchmark.nearest(values, points), minlength=len(points)) / len(values)
    assert float((moved * share).sum()) < 0.02 * error * points.shape[1]
    for factor in (0.98, 1.02):
        assert benchmark.means(factor * points, of)[1] > error


def test_the_iteration_finds_the_best_values_of_one_dimension() -> None:
    """In one dimension it ends where the exact formulas do."""
    nodes = torch.linspace(-6, 6, 20_001)[:, None]
    weights = torch.exp(-nodes[:, 0].square() / 2)
    found, error = benchmark.lloyd(
        torch.linspace(-2, 2, 8)[:, None], benchmark.Cloud(nodes, weights / weights.sum()), 3000
    )
    exact = torch.tensor(gaussian_grids.lloyd(8))
    torch.testing.assert_close(found[:, 0], exact, rtol=0, atol=5e-3)
    assert error == pytest.approx(gaussian_grids.distortion(exact.tolist()), rel=1e-3)


def test_a_small_grid_is_found_again_with_its_unit() -> None:
    name = "gauss2x2"
    unit, error = benchmark.unit_of(POINTS[name])
    assert unit == pytest.approx(VECTOR_UNITS[name], abs=0.02)
    assert error == pytest.approx(ERRORS[name], rel=1e-3)
    few = benchmark.cloud(2, fine=False)
    _, again = benchmark.lloyd(points_of(name), few, 100)
    assert again == pytest.approx(ERRORS[name], rel=2e-3)
