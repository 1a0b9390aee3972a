"""Low-rank and sparse additions: exact up to float32's rounding, and the same bits for a row in any batch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tailorbird.kernels import native
from tailorbird.kernels.additions import (
    SparseRows,
    add_low_rank,
    add_sparse,
    dense,
    low_rank_reference,
    sparse_reference,
)

pytestmark = pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")

versions = st.sampled_from(native.versions() or (0,))
rows = st.integers(1, 13)
shapes = st.tuples(st.sampled_from([1, 15, 16, 17, 64, 130]), st.sampled_from([1, 31, 64, 172, 4097]))
dtypes = st.sampled_from([torch.float32, torch.bfloat16])
UNIT = 2.0**-24


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def sparse_rows(
    shape: tuple[int, int], values: torch.dtype, columns: torch.dtype, share: float = 0.1
) -> SparseRows:
    """Random places; every third row is empty."""
    there = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < share
    there[::3] = False
    places = there.nonzero()
    counts = torch.cat([torch.zeros(1, dtype=torch.int64), there.sum(1).cumsum(0)])
    return SparseRows(counts, places[:, 1].to(columns), normal(len(places), dtype=values, seed=4), shape[1])


@given(count=rows, shape=shapes, rank=st.integers(1, 70), down=dtypes, up=dtypes, version=versions)
@settings(max_examples=120, deadline=None)
def test_low_rank_additions_are_exact_up_to_rounding(
    count: int, shape: tuple[int, int], rank: int, down: torch.dtype, up: torch.dtype, version: int
) -> None:
    out_features, in_features = shape
    y, x = normal(count, out_features), normal(count, in_features, seed=1)
    v, u = normal(rank, in_features, dtype=down, seed=2), normal(out_features, rank, dtype=up, seed=3)
    before = y.clone()
    found = add_low_rank(y, x, v, u, version)
    size = y.double().abs() + x.double().abs() @ v.double().abs().t() @ u.double().abs().t()
    exact = y.double() + x.double() @ v.double().t() @ u.double().t()
    assert ((found.double() - exact).abs() <= (in_features + rank + 4) * UNIT * size).all()
    assert torch.equal(y, before)
    assert torch.equal(low_rank_reference(y, x, v, u), exact.float())


@given(
    count=rows, shape=shapes, values=st.sampled_from([torch.bfloat16, torch.float16]),
    columns=st.sampled_from([torch.uint16, torch.int32]), version=versions,
)  # fmt: skip
@settings(max_examples=120, deadline=None)
def test_sparse_additions_are_exact_up_to_rounding(
    count: int, shape: tuple[int, int], values: torch.dtype, columns: torch.dtype, version: int
) -> None:
    sparse = sparse_rows(shape, values, columns)
    y, x = normal(count, shape[0]), normal(count, shape[1], seed=1)
    weight = dense(sparse, torch.float64)
    assert (weight != 0).sum() == len(sparse.values)
    exact = y.double() + x.double() @ weight.t()
    size = y.double().abs() + x.double().abs() @ weight.abs().t()
    found = add_sparse(y, x, sparse, version)
    assert ((found.double() - exact).abs() <= (shape[1] + 4) * UNIT * size).all()
    assert torch.equal(sparse_reference(y, x, sparse), exact.float())


def test_every_value_of_16_bits_is_read_exactly() -> None:
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    offsets = torch.arange(65537)
    columns = torch.zeros(65536, dtype=torch.uint16)
    for dtype in (torch.float16, torch.bfloat16):
        sparse = SparseRows(offsets, columns, bits.view(dtype), 1)
        for version in native.versions():
            found = add_sparse(torch.zeros(1, 65536), torch.ones(1, 1), sparse, version)
            torch.testing.assert_close(found[0], bits.view(dtype).float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("version", native.versions())
def test_a_row_has_the_same_bits_alone_and_among_others(version: int, threads: None) -> None:
    y, x = normal(11, 1000), normal(11, 520, seed=1)
    v, u = normal(61, 520, seed=2), normal(1000, 61, dtype=torch.bfloat16, seed=3)
    sparse = sparse_rows((1000, 520), torch.bfloat16, torch.uint16)
    together = add_low_rank(y, x, v, u, version), add_sparse(y, x, sparse, version)
    for count in (1, 3):
        torch.set_num_threads(count)
        for start, stop in ((0, 11), (4, 5), (2, 9), (0, 6)):
            here = slice(start, stop)
            assert torch.equal(add_low_rank(y[here], x[here], v, u, version), together[0][here])
            assert torch.equal(add_sparse(y[here], x[here], sparse, version), together[1][here])


def test_results_in_bfloat16_are_rounded_once() -> None:
    y, x = normal(5, 100, dtype=torch.bfloat16), normal(5, 64, dtype=torch.bfloat16, seed=1)
    v, u = normal(8, 64, seed=2), normal(100, 8, seed=3)
    assert torch.equal(add_low_rank(y, x, v, u), add_low_rank(y.float(), x.float(), v, u).bfloat16())
    sparse = sparse_rows((100, 64), torch.float16, torch.int32)
    assert torch.equal(add_sparse(y, x, sparse), add_sparse(y.float(), x.float(), sparse).bfloat16())


def test_values_at_one_place_are_added() -> None:
    sparse = SparseRows(
        torch.tensor([0, 2]), torch.tensor([1, 1], dtype=torch.int32), torch.tensor([2.0, 3.0]).half(), 3
    )
    assert dense(sparse).tolist() == [[0.0, 5.0, 0.0]]
    assert add_sparse(torch.ones(1, 1), torch.tensor([[1.0, 2.0, 3.0]]), sparse).tolist() == [[11.0]]


@pytest.mark.parametrize(
    ("y", "x", "down", "up", "words"),
    [
        (normal(2, 8), normal(3, 4), normal(1, 4), normal(8, 1), "as many rows"),
        (normal(8), normal(1, 4), normal(1, 4), normal(8, 1), "matrices"),
        (normal(2, 8).half(), normal(2, 4), normal(1, 4), normal(8, 1), "torch.float16"),
        (normal(2, 8), normal(2, 4), normal(1, 5), normal(8, 1), r"`down` is \[1, 5\]"),
        (normal(2, 8), normal(2, 4), normal(1, 4), normal(8, 2), r"`up` is \[8, 2\]; expected .*\[8, 1\]"),
        (normal(2, 8), normal(2, 4), normal(0, 4), normal(8, 0), "nothing of it empty"),
        (normal(2, 8), normal(2, 4), normal(1, 4).double(), normal(8, 1), "torch.float64"),
        (normal(2, 8), normal(2, 4), normal(4, 2).t(), normal(8, 2), "not contiguous"),
    ],
)
def test_low_rank_parts_that_do_not_fit_are_refused(
    y: Tensor, x: Tensor, down: Tensor, up: Tensor, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        add_low_rank(y, x, down, up)


@pytest.mark.parametrize(
    ("offsets", "columns", "values", "words"),
    [
        ([0, 2, 1], [0, 1], [1, 1], "rise"),
        ([0, 1, 3], [0, 1], [1, 1], "rise"),
        ([1, 1, 2], [0, 1], [1, 1], "rise"),
        ([], [], [], "rise"),
        ([0, 1, 2], [0], [1, 1], "a column for each"),
        ([0, 1, 2], [0, 4], [1, 1], "columns 0 to 4; expected 0 to 3"),
        ([0, 1, 2], [-1, 0], [1, 1], "columns -1 to 0"),
    ],
)
def test_sparse_rows_that_do_not_fit_together_are_refused(
    offsets: list[int], columns: list[int], values: list[float], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        SparseRows(
            torch.tensor(offsets, dtype=torch.int64), torch.tensor(columns, dtype=torch.int32),
            torch.tensor(values, dtype=torch.float16), 4,
        )  # fmt: skip


def test_sparse_rows_of_other_dtypes_and_shapes_are_refused() -> None:
    offsets, columns, values = torch.tensor([0, 1]), torch.tensor([0], dtype=torch.int32), torch.ones(1)
    with pytest.raises(ValueError, match=r"values are torch.float32"):
        SparseRows(offsets, columns, values, 4)
    with pytest.raises(ValueError, match=r"columns are torch.int64"):
        SparseRows(offsets, columns.long(), values.half(), 4)
    with pytest.raises(ValueError, match=r"offsets are torch.int32"):
        SparseRows(offsets.int(), columns, values.half(), 4)
    sparse = SparseRows(offsets, columns, values.half(), 4)
    with pytest.raises(ValueError, match="expected 1 and 4 columns"):
        add_sparse(torch.ones(2, 1), torch.ones(2, 5), sparse)
