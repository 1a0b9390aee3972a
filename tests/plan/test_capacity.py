"""Capacity: errors of known quantizers, what the paper prints, and no format above a perfect code."""

from __future__ import annotations

import pytest

from tailorbird.formats.packed import FloatCoding, IntegerCoding, TableCoding
from tailorbird.plan.capacity import FORMATS, capacity, format_rows, gaussian_error


@pytest.mark.parametrize(
    ("bits", "uniform", "free"),
    [(2, 0.1188, 0.1175), (3, 0.03744, 0.03454), (4, 0.01154, 0.009497)],
)
def test_errors_are_those_of_the_best_quantizers_of_normal_values(
    bits: int, uniform: float, free: float
) -> None:
    # Max 1960, "Quantizing for Minimum Distortion"; a row's zero is a level here, which costs a little
    assert gaussian_error(TableCoding(bits, "float16")) == pytest.approx(free, rel=0.03)
    assert uniform * 0.97 < gaussian_error(IntegerCoding(bits, 0)) < uniform * 1.3


def test_the_law_gives_what_the_paper_prints_for_scalar_quantizers() -> None:
    printed = {0.1188: 0.57, 0.03744: 0.75, 0.01154: 0.87, 1.05e-4: 0.99}
    for error, share in printed.items():
        assert capacity(error) == pytest.approx(share, abs=0.01)


def test_capacity_runs_from_none_to_all_and_falls_with_the_error() -> None:
    assert (capacity(1.0), capacity(0.0)) == (0.0, 1.0)
    shares = [capacity(4.0**-bits) for bits in (0.5, 1, 2, 3, 4, 6, 8)]
    assert shares == sorted(shares)


def test_no_format_is_above_a_perfect_code_and_those_ahead_are_beaten_by_none() -> None:
    rows = format_rows()
    assert len({row.name for row in rows}) == len(FORMATS) == len(rows)
    assert [row.bits_per_weight for row in rows] == sorted(row.bits_per_weight for row in rows)
    for row in rows:
        assert 0 < row.capacity < row.bound < 1
        fewer = [one for one in rows if one.bits_per_weight <= row.bits_per_weight and one is not row]
        assert row.ahead == all(one.capacity < row.capacity for one in fewer)
    assert {row.ahead for row in rows} == {True, False}


def test_floats_hold_nearly_all() -> None:
    (row,) = format_rows([FloatCoding("bfloat16")])
    assert (row.bits_per_weight, row.ahead) == (16, True)
    assert 0.998 < row.capacity < 1
