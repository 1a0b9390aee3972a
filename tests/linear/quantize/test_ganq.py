"""GANQ: best tables for codes, and no turn that makes a row worse."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tailorbird.calibrate.statistics import LinearStatistics
from tailorbird.errors import SettingsError
from tailorbird.formats.packed import CodebookCoding, Coding, FloatCoding, IntegerCoding, TableCoding
from tailorbird.linear.quantize.ganq import Ganq, ascending, damped, fitted_factors, values_of
from tailorbird.linear.quantize.gptq import Gptq
from tailorbird.linear.quantize.leanquant import Leanquant
from tailorbird.linear.quantize.quantease import Quantease
from tailorbird.linear.quantize.rtn import Rtn


def statistics_of(columns: int, seed: int = 0) -> LinearStatistics:
    """Of correlated inputs, some of which carry far more than others."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / torch.arange(1, columns + 1)[:, None]
    x = torch.randn(400, columns, generator=generator) @ mixing
    return LinearStatistics(x.T @ x / len(x), None, x.abs().mean(0), len(x))


def heavy_tailed(rows: int, columns: int) -> Tensor:
    normal = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    return normal * normal.abs()


def errors(weight: Tensor, values: Tensor, gram: Tensor) -> Tensor:
    left = weight.double() - values.double()
    return ((left @ gram.double()) * left).sum(1)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_tables_are_those_of_slow_least_squares(bits: int) -> None:
    known, weight = statistics_of(60), heavy_tailed(7, 60)
    gram, generator = damped(known.gram, 0.01), torch.Generator().manual_seed(2)
    codes = torch.randint(0, 2**bits, weight.shape, generator=generator).to(torch.uint8)
    codes[0] = codes[0].clamp(max=1)  # values that no code names
    before = torch.randn(7, 2**bits, generator=generator)
    found = fitted_factors(weight, codes, torch.eye(2**bits), before, gram)
    root = torch.linalg.cholesky(gram.double())
    for row in range(7):
        named = codes[row].unique().long()
        chosen = (codes[row].long()[None] == named[:, None]).double()  # S
        solved = torch.linalg.lstsq((chosen @ root).T, (weight[row].double() @ root)[:, None]).solution[:, 0]
        torch.testing.assert_close(found[row, named].double(), solved, rtol=1e-3, atol=1e-4)
        others = [code for code in range(2**bits) if code not in named.tolist()]
        assert torch.equal(found[row, others], before[row, others])
        moved = found[row].clone()
        moved[named[0]] += 0.05
        best, worse = (
            errors(weight[row : row + 1], t[codes[row].long()][None], gram) for t in (found[row], moved)
        )
        assert float(best) < float(worse)


def test_putting_tables_in_order_changes_no_weight() -> None:
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 8, (5, 40), generator=generator).to(torch.uint8)
    tables = torch.randn(5, 8, generator=generator)
    again, ordered = ascending(codes, tables)
    assert torch.equal(values_of(again, ordered), values_of(codes, tables))
    assert bool((ordered.diff(dim=1) >= 0).all())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_no_row_gets_worse_with_more_turns_and_none_is_worse_than_leanquant(bits: int) -> None:
    known, weight = statistics_of(96), heavy_tailed(24, 96)
    coding, gram = TableCoding(bits), damped(known.gram, 0.01)
    least = errors(weight, Leanquant()(weight, known, coding).dequantize(), gram)
    first = float(least.sum())
    for rounds in (1, 2, 3, 6):
        found = errors(weight, Ganq(rounds=rounds)(weight, known, coding).dequantize(), gram)
        assert bool((found <= least * (1 + 1e-4) + 1e-9).all())
        least = found
    assert float(least.sum()) < 0.9 * first


def test_a_turn_with_cross_moments_aims_where_gptq_aims() -> None:
    known, weight = statistics_of(48), heavy_tailed(10, 48)
    cross = 0.1 * torch.randn(48, 48, generator=torch.Generator().manual_seed(4))
    asymmetric = replace(known, cross=cross @ known.gram)
    target = Gptq().prepare(asymmetric).target(weight)
    coding = TableCoding(3)
    found = Ganq()(weight, asymmetric, coding).dequantize()
    assert torch.equal(found, Ganq(asymmetric=False)(target, known, coding).dequantize())
    assert not torch.equal(found, Ganq(asymmetric=False)(weight, asymmetric, coding).dequantize())


def test_inputs_that_were_never_seen_do_no_harm() -> None:
    known, weight = statistics_of(32), heavy_tailed(6, 32)
    gram = known.gram.clone()
    gram[5], gram[:, 5] = 0, 0
    for seen in (gram, torch.zeros(32, 32)):
        packed = Ganq()(weight, replace(known, gram=seen), TableCoding(3))
        assert bool(packed.dequantize().isfinite().all())


@pytest.mark.parametrize("coding", [IntegerCoding(4, 64), CodebookCoding("nf4", 64)])
def test_it_makes_tables_and_floats_only(coding: Coding) -> None:
    known, weight = statistics_of(32), heavy_tailed(6, 32)
    with pytest.raises(SettingsError, match=rf"`ganq` for codes of {coding.label}.*table=4"):
        Ganq()(weight, known, coding)
    floats = Ganq()(weight, known, FloatCoding("float16"))
    assert torch.equal(floats.dequantize(), weight.half().float())


@pytest.mark.parametrize("method", [Gptq(), Quantease()])
def test_methods_of_grids_refuse_tables(method: Gptq | Quantease) -> None:
    with pytest.raises(SettingsError, match=r"for codes of table3.*bits=4.*rtn, leanquant, ganq or bcq"):
        method(heavy_tailed(6, 32), statistics_of(32), TableCoding(3))


def test_bad_settings_and_missing_statistics_are_named() -> None:
    with pytest.raises(SettingsError, match="rounds 0 of ganq"):
        Ganq(rounds=0)
    with pytest.raises(SettingsError, match="ganq without calibration statistics"):
        Ganq()(heavy_tailed(6, 32), None, TableCoding(3))
    with pytest.raises(SettingsError, match="for tables of float16"):
        Ganq()(1e6 * heavy_tailed(6, 32), statistics_of(32), TableCoding(3, "float16"))


def test_at_equal_levels_it_is_well_below_uniform_grids_and_clusters() -> None:
    known, weight = statistics_of(96), heavy_tailed(32, 96)
    ours = errors(weight, Ganq()(weight, known, TableCoding(3)).dequantize(), known.gram).sum()
    clusters = errors(weight, Rtn()(weight, known, TableCoding(3)).dequantize(), known.gram).sum()
    grids = errors(weight, Gptq()(weight, known, IntegerCoding(3, 0)).dequantize(), known.gram).sum()
    assert float(ours) < 0.7 * float(grids)
    assert float(ours) < 0.7 * float(clusters)
