"""Inputs rounded to what nothing here multiplies: the products are those of the rounded inputs, no others."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packed_weights import random_packed
from tailorbird.errors import CheckpointError
from tailorbird.formats.modules import CompressedLinear
from tailorbird.formats.packed import (
    CodebookCoding,
    FloatCoding,
    GroupedCoding,
    IntegerCoding,
    TableCoding,
)
from tailorbird.kernels import native
from tailorbird.kernels.reference import FP8, INT4, round_inputs
from tailorbird.model.layout import ModelLayout, ModuleLayout

#: what is simulated with a scale for each segment; test_static_inputs.py has the other
SIMULATED = (FP8, INT4)
CODINGS = st.sampled_from(
    [
        IntegerCoding(4, 32),
        IntegerCoding(8, 0, symmetric=True),
        CodebookCoding("fp4", 64),
        IntegerCoding(3, 96),
    ]
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(
    coding=CODINGS, to=st.sampled_from(SIMULATED), order=st.booleans(), bias=st.booleans(),
    rows=st.integers(1, 60), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_the_product_is_that_of_the_rounded_inputs(
    coding: GroupedCoding, to: str, order: bool, bias: bool, rows: int, dtype: torch.dtype
) -> None:
    packed, offset = random_packed(coding, (24, 172), order), normal(24, seed=2) if bias else None
    module = CompressedLinear.from_packed(packed, offset, simulated=to)
    x = normal(rows, 172, seed=3).to(dtype)
    columns = packed.tensors["order"].long() if order else torch.arange(172)
    rounded = round_inputs(x[:, columns], coding.group_size, to).double()
    expected = rounded @ packed.dequantize().double()[:, columns].t() + (0 if offset is None else offset)
    found = module(x)
    assert found.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}[dtype]
    assert (found.double() - expected).abs().max() <= tolerance * expected.abs().max()
    assert (found - CompressedLinear.from_packed(packed, offset)(x)).abs().max() > 0


@pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")
@pytest.mark.parametrize("to", SIMULATED)
def test_a_row_has_the_same_bits_alone_and_in_a_batch(to: str) -> None:
    module = CompressedLinear.from_packed(random_packed(IntegerCoding(4, 32), (40, 96)), simulated=to)
    x = normal(20, 96)
    assert torch.equal(module(x), torch.cat([module(row) for row in x.split(1)]))


@pytest.mark.parametrize("to", SIMULATED)
@pytest.mark.parametrize("order", [False, True])
def test_a_gradient_passes_the_rounding(to: str, order: bool) -> None:
    packed = random_packed(IntegerCoding(4, 32), (24, 96), order)
    module = CompressedLinear.from_packed(packed, simulated=to)
    x, gradient = normal(5, 96).requires_grad_(), normal(5, 24, seed=4)
    output = module(x)
    torch.testing.assert_close(output, module(x.detach()), rtol=1e-5, atol=1e-4)
    output.backward(gradient)
    torch.testing.assert_close(x.grad, gradient @ packed.dequantize(), rtol=1e-4, atol=1e-4)


def test_paths_say_that_it_is_simulated() -> None:
    packed = random_packed(IntegerCoding(4, 32), (40, 96))
    exact, simulated = (CompressedLinear.from_packed(packed, simulated=to) for to in (None, "fp8"))
    assert simulated.path(1, torch.bfloat16) == f"{exact.path(1, torch.float32)}, inputs in fp8 simulated"


@pytest.mark.parametrize("activation", ["int8", "fp8", "int4"])
def test_a_layout_says_to_what(activation: str) -> None:
    module = ModuleLayout(
        24, 96, IntegerCoding(4, 32), rounds=activation == "int8",
        simulated=None if activation == "int8" else activation,
    )  # fmt: skip
    data = ModelLayout({"a": module}).to_dict()
    assert data["modules"]["a"]["activation"] == activation
    assert ModelLayout.from_dict(data).modules["a"] == module


@pytest.mark.parametrize("given", ["fp4", None, 8, ["fp8"]])
def test_a_layout_with_another_is_refused(given: object) -> None:
    data = ModelLayout({"a": ModuleLayout(24, 96, IntegerCoding(4, 32), rounds=True)}).to_dict()
    data["modules"]["a"]["activation"] = given
    with pytest.raises(CheckpointError, match=r"`activation` of module `a` is .*`fp8`"):
        ModelLayout.from_dict(data)


@pytest.mark.parametrize("coding", [FloatCoding(), TableCoding(4)])
def test_only_groups_have_rounded_inputs(coding: FloatCoding | TableCoding) -> None:
    with pytest.raises(CheckpointError, match="`activation` int4 with"):
        ModuleLayout(24, 96, coding, simulated="int4")
