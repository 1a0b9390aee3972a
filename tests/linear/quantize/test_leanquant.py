"""LeanQuant: its grids are the best of those searched, by the weights that it states."""

from __future__ import annotations

import itertools

import pytest
import torch

from tailorbird.calibrate.statistics import LinearStatistics
from tailorbird.formats.packed import CodebookCoding, GroupedCoding, IntegerCoding, TableCoding
from tailorbird.linear.error import output_error
from tailorbird.linear.quantize.clusters import clustered
from tailorbird.linear.quantize.gptq import Gptq, inverse_diagonal, inverse_factor
from tailorbird.linear.quantize.grid import (
    CLIP_STEPS,
    NARROWEST,
    fit_grid,
    grid_of,
    quantize_to_grid,
    stored_scales,
)
from tailorbird.linear.quantize.leanquant import Leanquant
from tailorbird.linear.quantize.tables import codes_by_feedback


def statistics_of(columns: int, seed: int = 0) -> LinearStatistics:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(columns, generator=generator) + 0.1
    x = torch.randn(300, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    x *= spread
    return LinearStatistics(x.T @ x / len(x), None, x.abs().mean(0), len(x))


def test_the_diagonal_is_that_of_the_inverse() -> None:
    gram = statistics_of(40).gram
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    damped = gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(40)
    found = inverse_diagonal(inverse_factor(gram, order, 0.01), order)
    torch.testing.assert_close(found, torch.linalg.inv(damped).diagonal(), rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_grid_is_the_best_of_all_pairs_of_ends(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(5, 32, generator=generator) + 0.5
    importance = torch.rand(32, generator=generator) ** 4
    coding = IntegerCoding(bits, 0, scale_dtype="float16")
    levels = 2**bits - 1
    shrinks = [1 - (1 - NARROWEST[bits]) * i / CLIP_STEPS for i in range(CLIP_STEPS + 1)]
    scales, zeros = fit_grid(weight, coding, importance, apart=True)
    assert zeros is not None

    def error(scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        codes = ((weight / scale).round() + zero).clamp(0, levels)
        return ((scale * (codes - zero) - weight).square() * importance).sum(1)

    found = error(scales.float(), zeros.float())
    joint = fit_grid(weight, coding, importance)
    assert joint[1] is not None
    least = torch.full((5,), torch.inf)
    for down, up in itertools.product(shrinks, shrinks):
        low, high = weight.amin(1, keepdim=True) * down, weight.amax(1, keepdim=True) * up
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = stored_scales((high - low) / levels, coding)
        least = torch.minimum(least, error(scale, (-low / scale).round().clamp(0, levels)))
    assert bool((found <= least * (1 + 1e-4)).all())
    assert float(found.sum()) < float(error(joint[0].float(), joint[1].float()).sum())


@pytest.mark.parametrize(
    "coding", [IntegerCoding(3, 32), IntegerCoding(3, 32, symmetric=True), CodebookCoding("nf4", 32)]
)
def test_it_rounds_with_error_feedback_on_that_grid(coding: GroupedCoding) -> None:
    statistics = statistics_of(44)
    weight = torch.randn(6, 44, generator=torch.Generator().manual_seed(5))
    order = torch.argsort(statistics.gram.diagonal(), descending=True, stable=True)
    inverse = inverse_diagonal(inverse_factor(statistics.gram, order, 0.01), order)
    importance = (inverse / inverse.min()).pow(-4).float()
    scales, zeros = fit_grid(weight, coding, importance, apart=True)
    found = Leanquant(exponent=4.0)(weight, statistics, coding)
    grid = grid_of(found)
    assert torch.equal(grid[0], scales)
    assert (grid[1] is None) == (zeros is None)
    assert zeros is None or (grid[1] is not None and torch.equal(grid[1], zeros))
    expected = Gptq().prepare(statistics)(weight, coding, (scales, zeros))
    assert torch.equal(found.tensors["codes"], expected.tensors["codes"])
    nearest = quantize_to_grid(weight, scales, zeros, coding)
    assert not torch.equal(nearest, expected.tensors["codes"])


def test_with_equal_weights_its_wider_search_is_no_worse_than_that_of_others() -> None:
    statistics = statistics_of(256)
    weight = torch.randn(32, 256, generator=torch.Generator().manual_seed(6)) + 0.3
    coding = IntegerCoding(2, 64)
    lean = Leanquant(exponent=0.0)(weight, statistics, coding).dequantize()
    plain = Gptq()(weight, statistics, coding).dequantize()
    assert output_error(weight, lean, statistics.gram) < 1.02 * output_error(weight, plain, statistics.gram)


def test_tables_are_clusters_by_the_same_weights_and_feedback_rounds_to_them() -> None:
    statistics = statistics_of(64)
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(7)) ** 3
    order = torch.argsort(statistics.gram.diagonal(), descending=True, stable=True)
    inverse = inverse_diagonal(inverse_factor(statistics.gram, order, 0.01), order)
    coding = TableCoding(3, "float16")
    tables = clustered(weight, coding, (inverse / inverse.min()).pow(-3).float())
    found = Leanquant(exponent=3.0)(weight, statistics, coding)
    assert torch.equal(found.tensors["tables"].float(), tables)
    codes = codes_by_feedback(Gptq().prepare(statistics), weight, tables)
    assert torch.equal(found.dequantize(), tables.gather(1, codes.long()))


def test_tables_leave_less_error_than_uniform_grids_of_as_many_values() -> None:
    statistics = statistics_of(128)
    weight = torch.randn(24, 128, generator=torch.Generator().manual_seed(8)) ** 3
    for bits in (2, 3, 4):
        codings = TableCoding(bits), IntegerCoding(bits, 0)
        tables, uniform = (Leanquant()(weight, statistics, one).dequantize() for one in codings)
        assert output_error(weight, tables, statistics.gram) < 0.8 * output_error(
            weight, uniform, statistics.gram
        )
