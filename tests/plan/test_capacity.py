"""Capacity: errors of known quantizers, what the paper prints, and no format above a perfect code."""

from __future__ import annotations

import pytest

from tailorbird.formats.codebooks import UNITS
from tailorbird.formats.packed import CodebookCoding, IntegerCoding, TableCoding
from tailorbird.plan.capacity import FormatRow, capacity, format_rows, gaussian_error


@pytest.fixture(scope="module")
def rows() -> list[FormatRow]:
    return format_rows()


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


def test_no_format_is_above_a_perfect_code_and_those_ahead_are_beaten_by_none(rows: list[FormatRow]) -> None:
    assert len({row.name for row in rows}) == len(rows)
    assert [row.bits_per_weight for row in rows] == sorted(row.bits_per_weight for row in rows)
    for row in rows:
        assert 0 < row.capacity < row.bound < 1
        fewer = [one for one in rows if one.bits_per_weight <= row.bits_per_weight and one is not row]
        assert row.ahead == all(one.capacity < row.capacity for one in fewer)
    assert {row.ahead for row in rows} == {True, False}


def test_every_kind_of_coding_is_there(rows: list[FormatRow]) -> None:
    names = {row.name.split()[0] for row in rows}
    integers = {f"int{bits}" for bits in (2, 3, 4, 5, 6, 8)}
    points = {"gauss2x2", "gauss2x4", "gauss3x2", "gauss4x2"}
    tables = {"table2", "table3", "table4", "binary"}
    assert names == integers | points | tables | {"nf4", "fp4", *UNITS, "bf16", "fp16", "df11"}
    assert {"nf4 g64 double", "binary row"} <= {row.name for row in rows}


def test_floats_hold_nearly_all_and_entropy_codes_the_same_in_fewer_bits(rows: list[FormatRow]) -> None:
    bf16, df11 = (next(row for row in rows if row.name == name) for name in ("bf16", "df11"))
    assert bf16.bits_per_weight == 16
    assert 0.998 < bf16.capacity < 1
    assert df11.gaussian_error == bf16.gaussian_error
    # a sign, 7 bits of mantissa, and the entropy of the exponents: that of -floor(log2 |x|), 2.5 bits
    assert 10.4 < df11.bits_per_weight < 11.2


@pytest.mark.parametrize(("bits", "error"), [(2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_grids_of_normal_values_come_near_the_best_of_their_width(bits: int, error: float) -> None:
    # groups of 64 with scales of their own fit the values of the group better
    assert 0.7 * error < gaussian_error(CodebookCoding(f"gauss{bits}", 64)) < error


def test_nested_bits_take_those_that_are_read_and_lose_a_little_for_it(rows: list[FormatRow]) -> None:
    found = {row.name: row for row in rows}
    for bits in (8, 6, 4, 2):
        nested, alone = found[f"int{bits} of 8 g64"], gaussian_error(IntegerCoding(bits, 64, symmetric=True))
        assert nested.bits_per_weight == bits + 16 / 64
        assert alone < nested.gaussian_error < 5 * alone
