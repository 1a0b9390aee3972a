"""Codebooks: NF4 is the one that was published, FP4 what its bits say; levels are signed bytes."""

from __future__ import annotations

import pytest
import torch

from tailorbird.formats.codebooks import (
    LARGEST,
    LEVELS,
    POINTS,
    UNITS,
    VECTOR_UNITS,
    bits_of,
    normal_quantiles,
)

#: As printed in appendix E of Dettmers et al. 2023, arXiv:2305.14314.
PUBLISHED = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
    1.0,
]  # fmt: skip


def test_the_quantiles_are_those_of_the_paper() -> None:
    assert normal_quantiles() == pytest.approx(PUBLISHED, abs=1e-6)


def test_levels_are_the_quantiles_to_the_nearest_127th() -> None:
    levels = LEVELS["nf4"].double()
    assert bool(((levels / 127 - torch.tensor(PUBLISHED).double()).abs() <= 0.5 / 127 + 1e-6).all())


@pytest.mark.parametrize("name", LEVELS)
def test_levels_ascend_to_ends_equally_far(name: str) -> None:
    levels = LEVELS[name]
    assert levels.dtype == torch.int8
    assert bool((levels[1:] >= levels[:-1]).all())
    assert (-int(levels[0]), len(levels)) == (int(levels[-1]), 1 << bits_of(name))
    assert int(levels[-1]) <= LARGEST


def test_two_hold_zero_and_grids_of_normal_values_mirror_around_it() -> None:
    assert {name for name, levels in LEVELS.items() if 0 in levels.tolist()} == {"nf4", "fp4"}
    assert [bits_of(name) for name in UNITS] == [2, 3, 4]
    assert all(torch.equal(LEVELS[name], -LEVELS[name].flip(0)) for name in UNITS)


@pytest.mark.parametrize("name", POINTS)
def test_points_are_as_many_as_codes_of_whole_bits_a_value(name: str) -> None:
    points = POINTS[name]
    assert points.dtype == torch.int8
    bits, dimension = map(int, name.removeprefix("gauss").split("x"))
    assert points.shape == (1 << bits * dimension, dimension)
    assert bits_of(name) == bits * dimension
    assert len(points.unique(dim=0)) == len(points)
    assert points.abs().amax() == LARGEST
    # of normal values the largest of the points are some deviations away, and their mean is none
    assert 1.5 < LARGEST / VECTOR_UNITS[name] < 4
    assert float((points.float().mean(0) / VECTOR_UNITS[name]).abs().max()) < 0.1


def test_floats_of_4_bits_are_those_of_their_bits() -> None:
    values = []
    for code in range(16):
        sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
        magnitude = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2 ** (exponent - 1)
        values.append(-magnitude if sign else magnitude)
    assert max(values) == 6
    assert sorted(values) == (LEVELS["fp4"].double() / 2).tolist()
