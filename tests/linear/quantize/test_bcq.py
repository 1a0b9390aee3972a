"""Binary-coded weights: sums of scales that are stored exactly, and scales that no others beat."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tailorbird.calibrate.statistics import LinearStatistics
from tailorbird.errors import SettingsError
from tailorbird.formats.packed import Coding, FloatCoding, IntegerCoding, TableCoding
from tailorbird.linear.quantize.bcq import (
    Bcq,
    all_signs,
    binary_scales,
    greedy_scales,
    stored_scales,
)
from tailorbird.linear.quantize.clusters import clustered, nearest_values
from tailorbird.linear.quantize.ganq import Ganq, damped, fitted_factors
from tailorbird.linear.quantize.gptq import Gptq


def statistics_of(columns: int, seed: int = 0) -> LinearStatistics:
    """Of correlated inputs, some of which carry far more than others."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / torch.arange(1, columns + 1)[:, None]
    x = torch.randn(400, columns, generator=generator) @ mixing
    return LinearStatistics(x.T @ x / len(x), None, x.abs().mean(0), len(x))


def normal(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))


def sums_of(scales: Tensor) -> Tensor:
    """Every sum of a row's scales with signs, ascending, one after the other."""
    rows = []
    for row in scales.double().tolist():
        choices = itertools.product([-1, 1], repeat=len(row))
        rows.append(sorted(sum(s * a for s, a in zip(signs, row, strict=True)) for signs in choices))
    return torch.tensor(rows, dtype=torch.float64)


def weighted_error(weight: Tensor, scales: Tensor, importance: Tensor) -> Tensor:
    tables = sums_of(scales).float()
    values = tables.gather(1, nearest_values(weight, tables))
    return ((weight - values).double().square() * importance.double()).sum(1)


def output_errors(weight: Tensor, values: Tensor, gram: Tensor) -> Tensor:
    left = weight.double() - values.double()
    return ((left @ gram.double()) * left).sum(1)


@given(
    scales=st.lists(st.floats(-(2.0**20), 2.0**20, width=32), min_size=2, max_size=4),
    dtype=st.sampled_from(["bfloat16", "float16"]),
    exponent=st.integers(-30, -7),
)
@settings(max_examples=300, deadline=None)
def test_every_sum_of_stored_scales_is_a_value_of_the_dtype(
    scales: list[float], dtype: str, exponent: int
) -> None:
    coding = TableCoding(len(scales), dtype)
    given_scales = torch.tensor([scales]) * 2.0**exponent
    stored = stored_scales(given_scales, coding)
    sums = sums_of(stored)
    kind = {"bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
    assert torch.equal(sums.to(kind).double(), sums)
    most = max(2 * torch.finfo(kind).eps * float(given_scales.abs().sum()), 2.0**-24)
    assert float((stored - given_scales).abs().max()) <= most
    assert torch.equal(stored, stored_scales(stored, coding))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_what_is_stored_are_the_sums_of_as_many_scales_as_there_are_bits(bits: int, dtype: str) -> None:
    known, weight = statistics_of(80), normal(16, 80)
    packed = Bcq(rounds=3)(weight, known, TableCoding(bits, dtype))
    tables = packed.tensors["tables"].double()
    # the greatest sum, and those in which one sign is turned, tell the scales: among the subsets of doubled
    # scales the least that those known don't explain is the next
    for table in tables:
        left = sorted((table.max() - table).tolist())
        sums, scales = [0.0], []
        left.remove(0.0)
        while left:
            scales.append(left[0])
            new = [one + scales[-1] for one in sums]
            for one in new:
                left.remove(one)  # exactly
            sums += new
        assert len(scales) == bits
        assert float(table.max()) == sum(scales) / 2


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_alternating_lowers_the_greedy_error_to_where_moving_a_scale_under_its_signs_raises_it(
    bits: int,
) -> None:
    weight, importance = normal(12, 300), torch.rand(300, generator=torch.Generator().manual_seed(3)) + 0.01
    scales = binary_scales(weight, bits, importance)
    ours = weighted_error(weight, scales, importance)
    greedy = weighted_error(weight, greedy_scales(weight, bits, importance).float(), importance)
    assert bool((ours <= greedy * (1 + 1e-5)).all())
    assert float(ours.sum()) < 0.95 * float(greedy.sum())
    every = all_signs(bits)
    nearest = (weight[..., None] - (scales @ every.T)[:, None]).abs().argmin(-1)
    for term, by in itertools.product(range(bits), (-0.01, 0.01)):
        moved = scales.clone()
        moved[:, term] += by
        values = (every[nearest] * moved[:, None]).sum(-1)
        error = ((weight - values).double().square() * importance.double()).sum(1)
        assert bool((error > ours).all())


def test_weights_that_are_such_sums_come_back() -> None:
    generator = torch.Generator().manual_seed(4)
    scales = torch.tensor([[4.0, 1.0, 0.25], [1.0, 0.5, 0.0625]])
    signs = torch.randint(0, 2, (2, 500, 3), generator=generator) * 2.0 - 1
    weight = (signs * scales[:, None]).sum(-1)
    found = Bcq()(weight, statistics_of(500), TableCoding(3)).dequantize()
    assert torch.equal(found, weight)


@pytest.mark.parametrize("bits", [2, 3])
def test_scales_for_signs_are_those_of_slow_least_squares(bits: int) -> None:
    known, weight = statistics_of(60), normal(7, 60)
    gram, generator = damped(known.gram, 0.01), torch.Generator().manual_seed(2)
    codes = torch.randint(0, 2**bits, weight.shape, generator=generator)
    signs = all_signs(bits)
    found = fitted_factors(weight, codes, signs, torch.zeros(7, bits), gram)
    root = torch.linalg.cholesky(gram.double())
    for row in range(7):
        chosen = signs[codes[row]].T.double()  # [bits, in]
        solved = torch.linalg.lstsq((chosen @ root).T, (weight[row].double() @ root)[:, None]).solution[:, 0]
        torch.testing.assert_close(found[row].double(), solved, rtol=1e-3, atol=1e-4)


def test_codes_that_leave_scales_open_leave_them_where_they_are() -> None:
    weight, signs = normal(3, 40), all_signs(2)
    before = torch.tensor([[1.0, 0.5]]).expand(3, 2)
    codes = torch.randint(0, 2, (3, 40), generator=torch.Generator().manual_seed(5)) * 3  # both signs alike
    found = fitted_factors(weight, codes, signs, before, torch.eye(40))
    torch.testing.assert_close(found[:, 0] - found[:, 1], torch.full((3,), 0.5), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_no_row_gets_worse_with_more_turns(bits: int) -> None:
    known, weight = statistics_of(96), normal(24, 96)
    coding, gram = TableCoding(bits), damped(known.gram, 0.01)
    least = output_errors(weight, Bcq(rounds=0)(weight, known, coding).dequantize(), gram)
    first = float(least.sum())
    for rounds in (1, 3, 6):
        found = output_errors(weight, Bcq(rounds=rounds)(weight, known, coding).dequantize(), gram)
        assert bool((found <= least * (1 + 1e-4) + 1e-9).all())
        least = found
    assert float(least.sum()) < 0.95 * first


def test_it_is_better_than_uniform_rows_and_free_tables_are_better_still() -> None:
    known, weight = statistics_of(96), normal(32, 96) * normal(32, 96).abs()
    ours = output_errors(weight, Bcq()(weight, known, TableCoding(3)).dequantize(), known.gram).sum()
    free = output_errors(weight, Ganq()(weight, known, TableCoding(3)).dequantize(), known.gram).sum()
    grids = output_errors(weight, Gptq()(weight, known, IntegerCoding(3, 0)).dequantize(), known.gram).sum()
    assert float(free) < float(ours) < 0.9 * float(grids)
    alone = binary_scales(weight, 3, torch.ones(96))
    clusters = clustered(weight, TableCoding(3, "float16"))
    values = clusters.gather(1, nearest_values(weight, clusters))
    assert float((weight - values).square().sum()) < float(
        weighted_error(weight, alone, torch.ones(96)).sum()
    )


def test_cross_moments_inputs_never_seen_and_zeros() -> None:
    known, weight = statistics_of(48), normal(10, 48)
    cross = 0.1 * torch.randn(48, 48, generator=torch.Generator().manual_seed(4)) @ known.gram
    asymmetric = replace(known, cross=cross)
    target = Gptq().prepare(asymmetric).target(weight)
    found = Bcq()(weight, asymmetric, TableCoding(3)).dequantize()
    assert torch.equal(found, Bcq(asymmetric=False)(target, known, TableCoding(3)).dequantize())
    gram = known.gram.clone()
    gram[5], gram[:, 5] = 0, 0
    for seen in (gram, torch.zeros(48, 48)):
        packed = Bcq()(weight, replace(known, gram=seen), TableCoding(3))
        assert bool(packed.dequantize().isfinite().all())
    assert not bool(Bcq()(torch.zeros(10, 48), known, TableCoding(3)).dequantize().any())


@pytest.mark.parametrize("coding", [IntegerCoding(4, 64), IntegerCoding(2, 0)])
def test_it_makes_tables_and_floats_only(coding: Coding) -> None:
    known, weight = statistics_of(32), normal(6, 32)
    with pytest.raises(SettingsError, match=rf"`bcq` for codes of {coding.label}.*table=4"):
        Bcq()(weight, known, coding)
    floats = Bcq()(weight, known, FloatCoding("float16"))
    assert torch.equal(floats.dequantize(), weight.half().float())


def test_bad_settings_missing_statistics_and_weights_too_large_are_named() -> None:
    with pytest.raises(SettingsError, match="rounds -1 of bcq"):
        Bcq(rounds=-1)
    with pytest.raises(SettingsError, match=r"damping 0\.0 of bcq"):
        Bcq(damping=0.0)
    with pytest.raises(SettingsError, match="bcq without calibration statistics"):
        Bcq()(normal(6, 32), None, TableCoding(3))
    with pytest.raises(SettingsError, match="for tables of float16"):
        Bcq()(1e6 * normal(6, 32), statistics_of(32), TableCoding(3, "float16"))
