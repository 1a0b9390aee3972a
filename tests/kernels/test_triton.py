"""Triton's kernels: exact up to float32's rounding, and a row has the same bits alone and among others.

Without a GPU they run in Triton's interpreter, on small shapes.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from packed_weights import laid_out, random_packed
from tailorbird.errors import ResourceError, SettingsError
from tailorbird.formats.packed import IntegerCoding, PackedWeight
from tailorbird.kernels import triton_linear, triton_runtime
from tailorbird.kernels.packing import BITS, pack_codes

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
#: Relative error of rounding to a dtype; the interpreter cuts bfloat16 off instead.
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0 ** (-8 if ON_GPU else -7)}
DTYPES = list(ROUNDING)
#: The interpreter multiplies tiles with NumPy, whose order of summing depends on the tile's shape. Tiles of
#: up to so many rows have the same.
MOST_ROWS = 65 if ON_GPU else 16

with_triton = pytest.mark.skipif(not triton_runtime.installed(), reason="the package triton isn't installed")


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def planes_of(packed: PackedWeight) -> triton_linear.Planes:
    on_device = {name: tensor.to(DEVICE) for name, tensor in packed.tensors.items()}
    return laid_out(triton_linear.prepare, dataclasses.replace(packed, tensors=on_device))


@with_triton
@given(
    bits=st.sampled_from(BITS),
    group_size=st.sampled_from([0, 32, 64, 96, 128, 256]),
    symmetric=st.booleans(),
    scale_dtype=st.sampled_from(["float16", "bfloat16"]),
    dtype=st.sampled_from(DTYPES),
    rows=st.sampled_from([1, 2, 5, 16, 17, 33, 65]),
    shape=st.tuples(st.sampled_from([1, 63, 65, 130]), st.sampled_from([1, 31, 172, 320, 1056, 2100])),
)
@settings(max_examples=50, deadline=None)
def test_products_are_exact_up_to_rounding(
    bits: int,
    group_size: int,
    symmetric: bool,
    scale_dtype: str,
    dtype: torch.dtype,
    rows: int,
    shape: tuple[int, int],
) -> None:
    packed = random_packed(IntegerCoding(bits, group_size, symmetric, scale_dtype), shape)
    x = random(rows, rows, shape[1], dtype=dtype)
    weight = packed.dequantize(torch.float64).to(DEVICE)
    exact = x.double() @ weight.t()
    product = triton_linear.linear(x, planes_of(packed))
    assert product.dtype == dtype
    # Every product, partial sum and scaling is rounded to float32, the result once more to its dtype.
    bound = (shape[1] + 4) * 2.0**-24 * (x.double().abs() @ weight.abs().t())
    bound += ROUNDING[dtype] * (exact.abs() + bound)
    assert ((product.double() - exact).abs() <= bound).all()


@with_triton
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_unit_vectors_give_the_weight_exactly(bits: int, symmetric: bool) -> None:
    packed = random_packed(IntegerCoding(bits, 64, symmetric, "float16"), (20, 600))
    columns = torch.arange(0, 600, 19)
    units = torch.eye(600, device=DEVICE)[columns]
    product = triton_linear.linear(units, planes_of(packed))
    assert torch.equal(product.cpu(), packed.dequantize(torch.float32).t()[columns])


@with_triton
@given(
    bits=st.sampled_from(BITS),
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(2, MOST_ROWS),
    columns=st.sampled_from([200, 1056]),
)
@settings(max_examples=15, deadline=None)
def test_a_row_has_the_same_bits_alone_and_among_others(
    bits: int, dtype: torch.dtype, rows: int, columns: int
) -> None:
    layout = planes_of(random_packed(IntegerCoding(bits, 64), (70, columns)))
    x = random(rows, rows, columns, dtype=dtype)
    together = triton_linear.linear(x, layout)
    for row in {0, rows // 2, rows - 1}:
        assert torch.equal(triton_linear.linear(x[row : row + 1], layout)[0], together[row])


@with_triton
@pytest.mark.parametrize("bits", BITS)
def test_planes_waste_no_bit_where_inputs_fill_their_steps(bits: int) -> None:
    layout = planes_of(random_packed(IntegerCoding(bits, 128), (8, 1024)))
    stored = layout.low.nbytes + (0 if layout.high is None else layout.high.nbytes)
    assert stored == 8 * 1024 * bits // 8


@with_triton
def test_no_rows_give_no_rows() -> None:
    layout = planes_of(random_packed(IntegerCoding(4, 64), (8, 64)))
    assert triton_linear.linear(torch.empty(0, 64, device=DEVICE), layout).shape == (0, 8)


def test_groups_that_split_chunks_are_refused() -> None:
    codes = pack_codes(torch.zeros(4, 96, dtype=torch.uint8), 4)
    scales = torch.ones(4, 2, dtype=torch.bfloat16)
    with pytest.raises(SettingsError, match="groups of 48"):
        triton_linear.prepare(codes, scales, None, bits=4, group_size=48, in_features=96)


@with_triton
def test_other_activations_are_refused() -> None:
    layout = planes_of(random_packed(IntegerCoding(4, 64), (8, 64)))
    for x in (torch.zeros(2, 63, device=DEVICE), torch.zeros(2, 64, device=DEVICE, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"expected float16, bfloat16 or float32 \[rows, 64\]"):
            triton_linear.linear(x, layout)


def test_without_triton_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = planes_of(random_packed(IntegerCoding(4, 64), (8, 64)))
    monkeypatch.setattr(triton_runtime, "triton", None)
    with pytest.raises(ResourceError, match="pip install triton"):
        triton_linear.linear(torch.zeros(1, 64, device=DEVICE), layout)


@with_triton
def test_tensors_outside_the_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_runtime, "interpreted", lambda: False)
    with pytest.raises(ResourceError, match="tensors on cpu · expected: all on one CUDA device"):
        triton_runtime.require(torch.zeros(1))


def test_dispatching_imports_no_triton() -> None:
    code = (
        "import tailorbird.kernels.dispatch, tailorbird.formats.modules, sys; print('triton' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
