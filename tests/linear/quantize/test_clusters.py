"""Clusters of rows: the nearest values, sums that agree with slow ones, and no worse than uniform grids."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tailorbird.errors import SettingsError
from tailorbird.formats.packed import IntegerCoding, TableCoding
from tailorbird.linear.quantize.clusters import clustered, nearest_values, stored_values
from tailorbird.linear.quantize.grid import fit_grid, quantize_to_grid


def heavy_tailed(rows: int, columns: int, seed: int = 0) -> Tensor:
    normal = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return normal * normal.square()


def weights_of_errors(columns: int, seed: int = 1) -> Tensor:
    return torch.rand(columns, generator=torch.Generator().manual_seed(seed)) ** 4


def objective(weight: Tensor, values: Tensor, importance: Tensor) -> Tensor:
    return ((weight.double() - values.double()).square() * importance.double()).sum(1)


@given(levels=st.sampled_from([4, 8, 16]), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_the_nearest_value_is_the_nearest_of_all_and_the_lower_of_two(levels: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tables = torch.randint(-9, 9, (5, levels), generator=generator).float().sort(1).values
    values = torch.randint(-40, 40, (5, 31), generator=generator).float() / 4
    distances = (values[..., None] - tables[:, None, :]).abs()
    codes = nearest_values(values, tables)
    assert torch.equal(tables.gather(1, codes), tables.gather(1, distances.argmin(-1)))


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_no_row_is_worse_than_on_its_uniform_grid(bits: int, weighed: bool) -> None:
    weight, importance = heavy_tailed(40, 200), weights_of_errors(200) if weighed else None
    coding = TableCoding(bits, "float16")
    tables = clustered(weight, coding, importance)
    found = tables.gather(1, nearest_values(weight, tables))
    uniform = IntegerCoding(bits, 0, scale_dtype="float16")
    scales, zeros = fit_grid(weight, uniform, importance, apart=True)
    assert zeros is not None
    codes = quantize_to_grid(weight, scales, zeros, uniform)
    by_grid = scales.float() * (codes.float() - zeros.float())
    counted = torch.ones(200) if importance is None else importance
    ours, theirs = (objective(weight, values, counted) for values in (found, by_grid))
    assert bool((ours <= theirs * (1 + 1e-3)).all())
    assert float(ours.sum()) < 0.8 * float(theirs.sum())


@pytest.mark.parametrize("bits", [2, 4])
def test_each_value_is_the_centre_of_its_cluster(bits: int) -> None:
    weight, importance = heavy_tailed(9, 150), weights_of_errors(150).double()
    tables = clustered(weight, TableCoding(bits, "float16"), importance)
    codes = nearest_values(weight, tables)
    for row, table, own in zip(weight.double(), tables, codes, strict=True):
        for code in own.unique().tolist():
            inside = own == code
            centre = float((row[inside] * importance[inside]).sum() / importance[inside].sum())
            assert float(table[code]) == pytest.approx(centre, rel=2e-3, abs=1e-6)


def test_few_distinct_weights_are_kept_exactly() -> None:
    values = torch.tensor([-2.0, -0.5, 0.0, 3.0])
    weight = values[torch.randint(0, 4, (6, 64), generator=torch.Generator().manual_seed(3))]
    weight[0] = 0.25
    weight[1] = 0
    tables = clustered(weight, TableCoding(3))
    assert torch.equal(tables.gather(1, nearest_values(weight, tables)), weight)


def test_tables_ascend_and_are_as_stored() -> None:
    for dtype in ("bfloat16", "float16"):
        tables = clustered(heavy_tailed(7, 3), TableCoding(4, dtype))  # fewer weights than values
        assert bool((tables.diff(dim=1) >= 0).all())
        assert torch.equal(tables, tables.to(getattr(torch, dtype)).float())
        assert torch.equal(clustered(heavy_tailed(7, 3), TableCoding(4, dtype), torch.zeros(3)), tables)


def test_weights_beyond_the_dtype_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"1e\+05 for tables of float16.*bfloat16 tables"):
        clustered(torch.full((2, 8), 1e5), TableCoding(2, "float16"))
    with pytest.raises(SettingsError, match=r"at most"):
        stored_values(torch.tensor([[torch.inf, 0.0, 0.0, 0.0]]), TableCoding(2))
