"""Inputs rounded with one scale that the checkpoint states: exactly so, and refused where it doesn't."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packed_weights import random_packed
from tailorbird.errors import CheckpointError
from tailorbird.formats.modules import CompressedLinear
from tailorbird.formats.packed import CodebookCoding, GroupedCoding, IntegerCoding
from tailorbird.kernels.reference import INT8_STATIC, round_to_scale
from tailorbird.model.layout import ModelLayout, ModuleLayout

CODINGS = st.sampled_from(
    [IntegerCoding(4, 32), IntegerCoding(8, 0, symmetric=True), CodebookCoding("fp4", 64)]
)
SCALE = float(np.float32(0.017))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(
    scale=st.floats(2.0**-20, 2.0**20, width=32), seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
def test_inputs_become_the_nearest_multiple_within_reach(scale: float, seed: int, dtype: torch.dtype) -> None:
    x = (normal(4, 96, seed=seed) * 60 * scale).to(dtype)
    found = round_to_scale(x, scale)
    assert found.dtype == torch.float32
    exact, values = x.double(), torch.arange(-127, 128).double() * scale
    exact = exact.where(exact.isfinite(), 0)  # beyond float16
    least = (exact[..., None] - values).abs().amin(-1)
    error = (found.double() - exact).abs().where(x.isfinite(), 0)
    assert (error - least <= 1e-5 * scale).all()
    single = x.float().numpy()
    with np.errstate(invalid="ignore"):
        steps = np.clip(np.rint(single / np.float32(scale)), -127, 127) * np.float32(scale)
    assert np.array_equal(found.numpy(), np.where(np.isfinite(single), steps, single))


def test_what_is_not_finite_stays_so() -> None:
    x = torch.tensor([1.0, float("inf"), float("nan"), -float("inf")])
    assert round_to_scale(x, 0.5).isfinite().tolist() == [True, False, False, False]


@given(
    coding=CODINGS, order=st.booleans(), bias=st.booleans(), rows=st.integers(1, 60),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_the_product_is_that_of_the_rounded_inputs(
    coding: GroupedCoding, order: bool, bias: bool, rows: int, dtype: torch.dtype
) -> None:
    packed, offset = random_packed(coding, (24, 172), order), normal(24, seed=2) if bias else None
    module = CompressedLinear.from_packed(packed, offset, simulated=INT8_STATIC, input_scale=SCALE)
    x = normal(rows, 172, seed=3).to(dtype)
    rounded = (x.double() / SCALE).round().clamp(-127, 127) * SCALE
    expected = rounded @ packed.dequantize().double().t() + (0 if offset is None else offset)
    found = module(x)
    assert found.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}[dtype]
    assert (found.double() - expected).abs().max() <= tolerance * expected.abs().max()
    assert module.path(1, torch.float32).endswith("inputs in int8-static simulated")


def test_a_gradient_passes_the_rounding() -> None:
    packed = random_packed(IntegerCoding(4, 32), (24, 96))
    module = CompressedLinear.from_packed(packed, simulated=INT8_STATIC, input_scale=SCALE)
    x, gradient = normal(5, 96).requires_grad_(), normal(5, 24, seed=4)
    module(x).backward(gradient)
    torch.testing.assert_close(x.grad, gradient @ packed.dequantize(), rtol=1e-4, atol=1e-4)


def stated(**changed: object) -> dict:
    module = ModuleLayout(24, 96, IntegerCoding(4, 32), simulated=INT8_STATIC, input_scale=SCALE)
    data = json.loads(json.dumps(ModelLayout({"a": module}).to_dict()))
    data["modules"]["a"] |= changed
    return data


def test_a_layout_states_the_scale_to_the_bit() -> None:
    module = ModelLayout.from_dict(stated()).modules["a"]
    assert (module.activation, module.input_scale) == (INT8_STATIC, SCALE)


@pytest.mark.parametrize("scale", [None, "1", True, 0, -1.0, float("nan"), float("inf"), 1e-50, 1e50, [1.0]])
def test_a_layout_with_a_scale_that_is_none_is_refused(scale: object) -> None:
    with pytest.raises(CheckpointError, match=r"`input_scale` of module `a` is .*compress the model again"):
        ModelLayout.from_dict(stated(input_scale=scale))


def test_scale_and_rounding_come_together() -> None:
    data = stated()
    del data["modules"]["a"]["input_scale"]
    with pytest.raises(CheckpointError, match=r"int8-static without `input_scale`.*compress the model again"):
        ModelLayout.from_dict(data)
    with pytest.raises(CheckpointError, match="`input_scale` where `activation` is int8 "):
        ModelLayout.from_dict(stated(activation="int8"))
    with pytest.raises(ValueError, match="rounded to int8-static with the scale None"):
        CompressedLinear.from_packed(random_packed(IntegerCoding(4, 32), (24, 96)), simulated=INT8_STATIC)
