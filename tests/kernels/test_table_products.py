"""Products with tables of rows: exact up to float32's rounding, the same bits whatever runs beside a row."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packed_weights import random_packed
from tailorbird.formats.modules import CompressedLinear
from tailorbird.formats.packed import TABLE_BITS, TABLE_DTYPES, PackedWeight, TableCoding, unpacking
from tailorbird.kernels import native

pytestmark = pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")
versions = st.sampled_from(native.versions() or (0,))
codings = st.builds(TableCoding, st.sampled_from(TABLE_BITS), st.sampled_from(list(TABLE_DTYPES)))
shapes = st.tuples(st.sampled_from([1, 3, 4, 15, 16, 33]), st.sampled_from([1, 8, 15, 16, 31, 64, 172, 1025]))


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def layout_of(packed: PackedWeight) -> native.TableRows:
    tensors = packed.tensors
    return native.table_rows(
        tensors["codes"], None, None, in_features=packed.in_features, tables=tensors["tables"],
        **unpacking(packed.coding),
    )  # fmt: skip


def activations(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * 1009 + columns))


@given(coding=codings, rows=st.sampled_from([1, 2, 4, 5, 7, 13, 40]), shape=shapes, version=versions)
@settings(max_examples=150, deadline=None)
def test_products_are_exact_up_to_rounding(
    coding: TableCoding, rows: int, shape: tuple[int, int], version: int
) -> None:
    packed, x = random_packed(coding, shape), activations(rows, shape[1])
    weight = packed.dequantize(torch.float64)
    product = native.table_linear(x, layout_of(packed), version)
    bound = (shape[1] + 4) * 2.0**-24 * (x.double().abs() @ weight.abs().t())
    assert ((product.double() - x.double() @ weight.t()).abs() <= bound).all()


@given(coding=codings, rows=st.integers(2, 30), version=versions)
@settings(max_examples=40, deadline=None)
def test_a_row_has_the_same_bits_alone_and_among_others(coding: TableCoding, rows: int, version: int) -> None:
    layout, x = layout_of(random_packed(coding, (37, 200))), activations(rows, 200)
    together = native.table_linear(x, layout, version)
    for row in range(rows):
        assert torch.equal(native.table_linear(x[row : row + 1], layout, version)[0], together[row])


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("bits", TABLE_BITS)
def test_a_row_has_the_same_bits_with_any_number_of_threads(bits: int) -> None:
    layout, x = layout_of(random_packed(TableCoding(bits), (1000, 512))), activations(9, 512)
    products = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        products.append(native.table_linear(x, layout))
    assert torch.equal(products[0], products[1])
    assert torch.equal(products[0], products[2])


@pytest.mark.parametrize("bits", TABLE_BITS)
def test_bfloat16_is_rounded_once(bits: int) -> None:
    layout, x = layout_of(random_packed(TableCoding(bits), (33, 100))), activations(6, 100).bfloat16()
    assert torch.equal(native.table_linear(x, layout), native.table_linear(x.float(), layout).bfloat16())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("columns", [32, 37])
def test_what_is_no_number_stays_in_its_row(value: float, columns: int) -> None:
    packed, x = random_packed(TableCoding(3), (20, columns)), activations(6, columns)
    x[2, columns - 1] = value
    found, expected = native.table_linear(x, layout_of(packed)), x @ packed.dequantize().t()
    assert torch.equal(found.isnan(), expected.isnan())
    torch.testing.assert_close(found, expected, equal_nan=True, rtol=1e-4, atol=1e-4)


def test_a_table_that_holds_no_number_spoils_no_column_that_is_not_there() -> None:
    packed = random_packed(TableCoding(2), (4, 18))
    codes, tables = torch.ones(4, 18, dtype=torch.int64), packed.tensors["tables"].clone()
    tables[:, 0] = float("inf")
    product = native.table_linear(
        activations(3, 18), layout_of(PackedWeight.from_tables(codes, tables, packed.coding))
    )
    assert product.isfinite().all()


@pytest.mark.parametrize("order", [False, True])
def test_a_module_takes_them_in_the_order_of_its_inputs(order: bool) -> None:
    packed, x = random_packed(TableCoding(4), (24, 96), order), activations(5, 96)
    module = CompressedLinear.from_packed(packed)
    torch.testing.assert_close(module(x), x @ packed.dequantize().t(), rtol=1e-4, atol=1e-4)
    assert module.path(5, torch.float32) == "native-tables"
