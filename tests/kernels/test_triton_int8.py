"""Products of rounded activations: exact up to float32's rounding, the same bits in any batch and tile."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from packed_weights import random_packed
from tailorbird.formats.packed import IntegerCoding
from tailorbird.kernels import triton_int8
from tailorbird.kernels.packing import BITS
from tailorbird.kernels.reference import SEGMENT, group_layout, to_bytes
from triton_cases import DEVICE, DTYPES, of_rounding, planes_of, random, with_triton

GROUP_SIZES = [0, 32, 64, 96, 128, 160, 192, 256]


def restored(codes: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """Bytes times their scales, in float32."""
    inputs = codes.shape[1]
    _, size = group_layout(inputs, group_size)
    column = torch.arange(inputs, device=codes.device)
    segment = column // size * -(-size // SEGMENT) + column % size // SEGMENT
    return codes.float() * scales[segment].t()


@with_triton
@given(
    group_size=st.sampled_from(GROUP_SIZES),
    inputs=st.sampled_from([1, 31, 172, 320, 520]),
    dtype=st.sampled_from(DTYPES),
    size=st.sampled_from([1e-35, 1e-3, 1.0, 1e4]),
)
@settings(max_examples=12, deadline=None)
def test_activations_are_rounded_as_the_reference_rounds_them(
    group_size: int, inputs: int, dtype: torch.dtype, size: float
) -> None:
    layout = planes_of(random_packed(IntegerCoding(4, group_size), (3, inputs)))
    x = (random(inputs, 4, inputs) * size).to(dtype)
    x[1, :150] = 0.0  # whole segments without a scale
    x[2] = torch.round(x[2] / size * 4) / 4 * size  # ties
    codes, scales, sums = triton_int8.round_rows(x, layout)
    assert torch.equal(restored(codes, scales, group_size), to_bytes(x, group_size))
    run = triton_int8.run_chunks(layout) * 32
    padded = torch.nn.functional.pad(codes.int(), (0, -inputs % run))
    assert torch.equal(sums.t().long(), padded.view(4, -1, run).sum(-1))


@with_triton
@given(
    bits=st.sampled_from(BITS),
    group_size=st.sampled_from(GROUP_SIZES),
    symmetric=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    rows=st.sampled_from([1, 5, 33]),
    shape=st.tuples(st.sampled_from([1, 65]), st.sampled_from([1, 31, 172, 320, 700])),
)
@settings(max_examples=15, deadline=None)
def test_products_are_exact_up_to_rounding(
    bits: int,
    group_size: int,
    symmetric: bool,
    dtype: torch.dtype,
    rows: int,
    shape: tuple[int, int],
) -> None:
    packed = random_packed(IntegerCoding(bits, group_size, symmetric), shape)
    layout = planes_of(packed)
    x = random(rows, rows, shape[1], dtype=dtype)
    weight = packed.dequantize(torch.float64).to(DEVICE)
    rounded = to_bytes(x, group_size).double()
    exact = rounded @ weight.t()
    product = triton_int8.linear(x, layout)
    assert product.dtype == dtype
    # Scales are multiplied and runs added in float32; the bytes' sums are exact, a run's sum is one number.
    runs = -(-shape[1] // 32)
    bound = (runs + 4) * 2.0**-24 * (rounded.abs() @ weight.abs().t())
    bound += of_rounding(exact.abs() + bound, dtype)
    assert ((product.double() - exact).abs() <= bound).all()


@with_triton
@pytest.mark.parametrize("bits", [3, 8])
def test_a_row_has_the_same_bits_alone_among_others_and_in_every_tile(
    bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = planes_of(random_packed(IntegerCoding(bits, 96), (70, 160)))
    x = random(bits, 20, 160)
    together = triton_int8.linear(x, layout)
    for row in (0, 19):
        assert torch.equal(triton_int8.linear(x[row : row + 1], layout)[0], together[row])
    for launch in triton_int8.LAUNCHES:
        monkeypatch.setattr(triton_int8, "LAUNCHES", (launch,))
        assert torch.equal(triton_int8.linear(x, layout), together)


@with_triton
@pytest.mark.parametrize("strange", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_spoils_its_row_only(strange: float) -> None:
    layout = planes_of(random_packed(IntegerCoding(4, 64), (20, 300)))
    x = random(1, 5, 300)
    clean = triton_int8.linear(x, layout)
    x[2, 130] = strange
    spoiled = triton_int8.linear(x, layout)
    assert not spoiled[2].isfinite().any()
    others = torch.tensor([0, 1, 3, 4], device=DEVICE)
    assert torch.equal(spoiled[others], clean[others])


@with_triton
def test_other_activations_are_refused_and_no_rows_give_none() -> None:
    layout = planes_of(random_packed(IntegerCoding(4, 64), (8, 64)))
    assert triton_int8.linear(torch.empty(0, 64, device=DEVICE), layout).shape == (0, 8)
    for x in (torch.zeros(2, 63, device=DEVICE), torch.zeros(2, 64, device=DEVICE, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"expected float16, bfloat16 or float32 \[rows, 64\]"):
            triton_int8.linear(x, layout)
