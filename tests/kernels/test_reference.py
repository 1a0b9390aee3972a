"""The reference against the formula, written with no packing and no chunks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tailorbird.formats.codebooks import LEVELS
from tailorbird.kernels import packing
from tailorbird.kernels.packing import BITS, pack_codes
from tailorbird.kernels.reference import (
    LARGEST,
    SEGMENT,
    dequantize,
    group_layout,
    linear,
    round_inputs,
    to_bytes,
)

SHAPES = st.sampled_from([(1, 1), (3, 64), (5, 172), (2, 4097), (7, 33), (4, 128), (1, 255)])


def case(shape: tuple[int, int], bits: int, group_size: int, symmetric: bool, scale_dtype: torch.dtype):
    """Packed tensors and the weight they stand for in float64, value by value."""
    generator = torch.Generator().manual_seed(hash((shape, bits, group_size)) % 2**31)
    rows, columns = shape
    groups, _ = group_layout(columns, group_size)
    values = torch.randint(0, 1 << bits, shape, generator=generator)
    zeros = torch.randint(0, 1 << bits, (rows, groups), generator=generator)
    if symmetric:
        zeros.fill_(1 << (bits - 1))
    scales = torch.randn(rows, groups, generator=generator).to(scale_dtype)
    size = group_size or columns
    group_of = torch.arange(columns) // size
    weight = scales.double()[:, group_of] * (values - zeros[:, group_of])
    packed = (pack_codes(values, bits), scales, None if symmetric else pack_codes(zeros, bits))
    return packed, weight


@given(
    shape=SHAPES,
    bits=st.sampled_from(BITS),
    group_size=st.sampled_from([0, 32, 64, 96, 128, 256]),
    symmetric=st.booleans(),
    scale_dtype=st.sampled_from([torch.bfloat16, torch.float16]),
)
@settings(max_examples=120, deadline=None)
def test_dequantize_is_exact_in_float32(shape, bits, group_size, symmetric, scale_dtype) -> None:
    packed, weight = case(shape, bits, group_size, symmetric, scale_dtype)
    kwargs = {"bits": bits, "group_size": group_size, "in_features": shape[1]}
    assert torch.equal(dequantize(*packed, **kwargs).double(), weight)
    assert torch.equal(dequantize(*packed, **kwargs, dtype=torch.bfloat16), weight.float().bfloat16())


@given(
    shape=SHAPES,
    group_size=st.sampled_from([0, 32, 64, 96, 128, 256]),
    scale_dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    codebook=st.sampled_from([name for name, levels in LEVELS.items() if len(levels) == 16]),
)
@settings(max_examples=60, deadline=None)
def test_levels_take_the_place_of_integers_exactly(shape, group_size, scale_dtype, codebook) -> None:
    (codes, scales, _), _ = case(shape, 4, group_size, True, scale_dtype)
    values = packing.unpack_codes(codes, 4, shape[1])
    group_of = torch.arange(shape[1]) // (group_size or shape[1])
    weight = scales.double()[:, group_of] * torch.tensor(LEVELS[codebook].tolist())[values.long()]
    kwargs = {"bits": 4, "group_size": group_size, "in_features": shape[1], "levels": LEVELS[codebook]}
    assert torch.equal(dequantize(codes, scales, None, **kwargs).double(), weight)
    x = torch.randn(3, shape[1])
    bound = (shape[1] + 4) * 2.0**-24 * (x.double().abs() @ weight.abs().t())
    assert (
        (linear(x, codes, scales, None, **kwargs).double() - x.double() @ weight.t()).abs() <= bound
    ).all()


@given(shape=SHAPES, bits=st.sampled_from(BITS), symmetric=st.booleans())
@settings(max_examples=30, deadline=None)
def test_order_says_which_input_a_stored_column_belongs_to(shape, bits, symmetric) -> None:
    packed, weight = case(shape, bits, 32, symmetric, torch.bfloat16)
    order = torch.randperm(shape[1], generator=torch.Generator().manual_seed(0)).int()
    kwargs = {"bits": bits, "group_size": 32, "in_features": shape[1], "order": order}
    result = dequantize(*packed, **kwargs)
    for column, source in enumerate(order.tolist()):
        assert torch.equal(result[:, source].double(), weight[:, column])
    x = torch.randn(3, shape[1])
    permuted = x[:, order.long()].double()
    bound = (shape[1] + 4) * 2.0**-24 * (permuted.abs() @ weight.abs().t())
    assert ((linear(x, *packed, **kwargs).double() - permuted @ weight.t()).abs() <= bound).all()


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, weight = case((57, 172), 3, 64, False, torch.bfloat16)
    monkeypatch.setattr(packing, "CHUNK_VALUES", 500)
    result = dequantize(*packed, bits=3, group_size=64, in_features=172)
    assert torch.equal(result.double(), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear_multiplies_in_the_dtype_of_its_input_and_adds_the_bias(dtype: torch.dtype) -> None:
    packed, weight = case((5, 172), 4, 64, False, torch.bfloat16)
    x, bias = torch.randn(2, 3, 172).to(dtype), torch.randn(5)
    result = linear(x, *packed, bits=4, group_size=64, in_features=172, bias=bias)
    assert result.dtype == dtype
    assert result.shape == (2, 3, 5)
    expected = x.double() @ weight.t() + bias
    # rounding of weight, bias and result, each at most half a unit in the last place
    bound = torch.finfo(dtype).eps * (x.double().abs() @ weight.abs().t() + bias.abs() + expected.abs())
    assert ((result.double() - expected).abs() <= bound + 1e-4 * (dtype == torch.float32)).all()


def test_a_group_as_long_as_the_row_or_longer_is_one_group() -> None:
    assert group_layout(100, 0) == group_layout(100, 128) == group_layout(100, 100) == (1, 100)
    assert group_layout(172, 64) == (3, 64)


@given(
    columns=st.sampled_from([1, 100, 300]),
    seed=st.integers(0, 99),
    size=st.sampled_from([1e-35, 1e-3, 1.0, 1e4]),
)
def test_bytes_are_rounded_with_one_division(columns: int, seed: int, size: float) -> None:
    """As compiled products do: in float32, the largest of a segment over 127, ties to even."""
    x = torch.randn(2, columns, generator=torch.Generator().manual_seed(seed)).bfloat16().float() * size
    expected = x.numpy().copy()
    for segment in np.split(expected, range(128, columns, 128), axis=1):
        largest = np.abs(segment).max(1, keepdims=True)
        inverse = np.where(largest < 1e-30, 0, np.float32(127) / largest)
        segment[:] = np.rint(segment * inverse) * (largest / np.float32(127))
    assert torch.equal(to_bytes(x, 0), torch.from_numpy(expected))


def representable(to: str) -> torch.Tensor:
    """All that a format holds, ascending; of FP8 by the definition of its bits."""
    if to != "fp8":
        most = {"int8": 127, "int4": 7}[to]
        return torch.arange(-most, most + 1).double()
    positive = [
        m / 8 * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7)
        for e in range(16) for m in range(8) if (e, m) != (15, 7)
    ]  # fmt: skip
    return torch.tensor(sorted({sign * value for value in positive for sign in (-1, 1)})).double()


@given(
    shape=SHAPES, to=st.sampled_from(sorted(LARGEST)), group_size=st.sampled_from([0, 32, 96, 256]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_inputs_become_the_nearest_that_the_format_holds(
    shape: tuple[int, int], to: str, group_size: int, dtype: torch.dtype
) -> None:
    """Beside every value that the format holds, at the scale that each segment should have."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(shape[1])).to(dtype)
    found, columns, values = round_inputs(x, group_size, to), torch.arange(shape[1]), representable(to)
    size = group_size or shape[1]
    segment_of = columns // size * 10**6 + columns % size // SEGMENT
    for segment in segment_of.unique():
        own = x[:, segment_of == segment].double()
        scale = own.abs().amax(1, keepdim=True) / values[-1]
        least = (own[..., None] - scale[..., None] * values).abs().amin(-1)
        error = (found[:, segment_of == segment].double() - own).abs()
        assert (error - least <= 1e-6 * own.abs().amax()).all()


def test_rounding_gives_what_is_not_finite_to_its_segment_only() -> None:
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    x[1, 7], x[2, 200] = float("inf"), float("nan")
    for to in LARGEST:
        found = round_inputs(x, 0, to).isfinite()
        assert found[0].all()
        assert found[1, 128:].all()
        assert found[2, :128].all()
        assert not found[1, :128].any()
        assert not found[2, 128:].any()
