"""Codes behind two matrices of their inputs: stored exactly, counted, computed with, refused if damaged."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from packed_weights import random_packed
from tailorbird.adapt.merge.rounding import Rounding
from tailorbird.calibrate.statistics import GramAccumulator
from tailorbird.errors import CheckpointError, SettingsError
from tailorbird.formats import compressed_tensors, gguf
from tailorbird.formats.modules import CompressedEmbedding, CompressedLinear
from tailorbird.formats.packed import (
    CodebookCoding,
    CodesCoding,
    FloatCoding,
    IntegerCoding,
    PackedWeight,
    stored_bytes,
)
from tailorbird.formats.transform import (
    LEAST_RATIO,
    Transform,
    invertible,
    kronecker_transform,
    transform_from_dict,
)
from tailorbird.kernels import native
from tailorbird.kernels.reference import round_inputs
from tailorbird.model.layout import ModelLayout, ModuleLayout

SHAPE = 24, 192
DTYPES = ["bfloat16", "float16", "float32"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def matrix(order: int) -> Tensor:
    return torch.eye(order) + 0.3 * normal(order, order, seed=order) / order**0.5


def mixed(coding: CodesCoding, dtype: str = "bfloat16", block: int = 16, rank: int = 0) -> PackedWeight:
    packed = random_packed(coding, SHAPE).with_matrices(matrix(SHAPE[1] // block), matrix(block), dtype)
    if rank:
        packed = packed.with_low_rank(normal(SHAPE[0], rank), normal(rank, SHAPE[1], seed=1))
    return packed


def dense(packed: PackedWeight) -> Tensor:
    """The matrix of inputs, float64: ``T = (A ⊗ B)^T``."""
    return torch.kron(packed.tensors["left"].double(), packed.tensors["right"].double()).t()


CODINGS = st.sampled_from([IntegerCoding(4, 64), IntegerCoding(3, 32, True), CodebookCoding("nf4", 64)])


@given(
    coding=CODINGS, dtype=st.sampled_from(DTYPES), block=st.sampled_from([1, 16, 48, 192]),
    rank=st.sampled_from([0, 3]),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_the_weight_is_what_the_codes_stand_for_times_the_matrix(
    coding: CodesCoding, dtype: str, block: int, rank: int
) -> None:
    packed = mixed(coding, dtype, block, rank)
    assert packed.transform == Transform(block, dtype)
    codes = packed.behind_transform.dequantize(torch.float64)
    expected = codes @ dense(packed) + packed.beside().double()
    torch.testing.assert_close(packed.dequantize().double(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(packed.behind_transform.dequantize(), random_packed(coding, SHAPE).dequantize())
    added = ((SHAPE[1] // block) ** 2 + block**2) * (4 if dtype == "float32" else 2)
    assert packed.base.nbytes == stored_bytes(coding, *SHAPE) + added
    assert packed.nbytes == stored_bytes(coding, *SHAPE, low_rank=packed.low_rank, transform=packed.transform)
    module = CompressedLinear.from_packed(packed)
    assert module.transform == packed.transform
    assert torch.equal(module.weight, packed.dequantize())
    torch.testing.assert_close(module.weight_rows(slice(3, 9)), packed.dequantize()[3:9])


@given(
    coding=CODINGS, rows=st.integers(1, 40), rank=st.sampled_from([0, 3]), bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_every_path_multiplies_mixed_inputs(
    coding: CodesCoding, rows: int, rank: int, bias: bool, dtype: torch.dtype
) -> None:
    packed = mixed(coding, rank=rank)
    offset = normal(24, seed=2) if bias else None
    module = CompressedLinear.from_packed(packed, offset)
    behind = CompressedLinear.from_packed(packed.behind_transform, offset)
    assert module.path(rows, dtype) == f"mixed {behind.path(rows, dtype)}"
    x = normal(rows, SHAPE[1], seed=3).to(dtype)
    found = module(x)
    assert found.dtype == dtype
    whole = packed.behind_transform.dequantize(torch.float64) @ dense(packed) + packed.beside().double()
    expected = x.double() @ whole.t() + (0 if offset is None else offset.double())
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    assert (found.double() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_alone_and_in_a_batch(dtype: torch.dtype) -> None:
    module = CompressedLinear.from_packed(mixed(IntegerCoding(3, 32)))
    x = normal(20, SHAPE[1]).to(dtype)
    together = module(x)
    assert torch.equal(together, torch.cat([module(row) for row in x.split(1)]))
    assert torch.equal(together[3:11], module(x[3:11]))


def test_inputs_are_rounded_behind_it() -> None:
    packed = mixed(IntegerCoding(4, 64))
    x = normal(7, SHAPE[1], seed=3)
    inputs = round_inputs((x.double() @ dense(packed).t()).float(), 64, "int4")
    expected = inputs @ packed.behind_transform.dequantize().t()
    found = CompressedLinear.from_packed(packed, simulated="int4")(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_the_gradient_of_the_input_is_that_of_the_weight() -> None:
    packed = mixed(IntegerCoding(4, 64))
    x = normal(5, SHAPE[1]).requires_grad_()
    gradient = normal(5, 24, seed=4)
    CompressedLinear.from_packed(packed)(x).backward(gradient)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, gradient @ packed.dequantize(), rtol=1e-4, atol=1e-4)


def test_a_merge_keeps_it_and_moves_the_codes() -> None:
    """Rounded by the inputs that reach the codes; nearer to the target than the codes as they were."""
    packed = mixed(IntegerCoding(4, 64))
    inputs = GramAccumulator(SHAPE[1])
    x = normal(400, SHAPE[1], seed=5) * torch.linspace(0.1, 3, SHAPE[1])
    inputs.add(x)
    target = packed.dequantize() + 0.2 * normal(*SHAPE, seed=6)
    found = Rounding(inputs.finish())(packed, target).packed
    assert found.transform == packed.transform
    assert torch.equal(found.tensors["left"], packed.tensors["left"])
    before, after = ((x @ (one.dequantize() - target).t()).square().sum() for one in (packed, found))
    assert after < 0.5 * before


def test_what_is_saved_is_loaded() -> None:
    packed = mixed(IntegerCoding(4, 64))
    module = CompressedLinear.from_packed(packed)
    assert list(module.state_dict()) == ["codes", "scales", "zeros", "left", "right"]
    other = CompressedLinear(SHAPE[1], 24, packed.coding, bias=False, transform=packed.transform)
    other.load_state_dict(module.state_dict())
    x = normal(3, SHAPE[1])
    assert torch.equal(other(x), module(x))
    assert torch.equal(copy.deepcopy(module)(x), module(x))
    halved = other.half()
    assert halved.left is not None
    assert halved.left.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "change",
    [
        {"left": torch.zeros(12, 12, dtype=torch.bfloat16)},
        {"left": torch.ones(12, 12, dtype=torch.bfloat16)},
        {"right": torch.full((16, 16), torch.nan, dtype=torch.bfloat16)},
        {"right": torch.diag(torch.tensor([torch.inf] + [1.0] * 15)).bfloat16()},
        {"right": torch.eye(8, dtype=torch.bfloat16)},
        {"left": torch.eye(12)},
        {"right": torch.ones(16, dtype=torch.bfloat16)},
        {"right": torch.eye(16, dtype=torch.int8)},
    ],
    ids=["zeros", "rank one", "nan", "infinite", "too small", "another dtype", "a vector", "whole numbers"],
)
def test_a_damaged_or_singular_matrix_is_refused(change: dict[str, Tensor]) -> None:
    packed = mixed(IntegerCoding(4, 64))
    wrong = packed.tensors | change
    with pytest.raises(CheckpointError, match=r"left|right|inverse"):
        PackedWeight(packed.coding, *SHAPE, wrong)
    module = CompressedLinear(SHAPE[1], 24, packed.coding, bias=False, transform=packed.transform)
    with pytest.raises(RuntimeError, match=r"left|right"):
        module.load_state_dict(wrong)


@pytest.mark.parametrize("name", ["left", "right"])
def test_one_matrix_alone_is_refused(name: str) -> None:
    packed = mixed(IntegerCoding(4, 64))
    kept = {part: tensor for part, tensor in packed.tensors.items() if part != name}
    with pytest.raises(CheckpointError, match=r"left|right"):
        PackedWeight(packed.coding, *SHAPE, kept)


def test_a_singular_matrix_can_t_be_written() -> None:
    with pytest.raises(CheckpointError, match="`right` that has no inverse"):
        random_packed(IntegerCoding(4, 64), SHAPE).with_matrices(torch.eye(12), torch.ones(16, 16))


@pytest.mark.parametrize("order", [2, 3, 16, 43])
@pytest.mark.parametrize("ratio", [1.0, 1e-2, 1e-4, 1.4e-5, 1.01e-5, 0.99e-5, 1e-6, 1e-12, 0.0])
@pytest.mark.parametrize("others", ["large", "small"])
def test_whether_there_is_an_inverse_is_what_singular_values_say(
    order: int, ratio: float, others: str
) -> None:
    generator = torch.Generator().manual_seed(order)
    left, right = (
        torch.linalg.qr(torch.randn(order, order, generator=generator, dtype=torch.float64))[0] for _ in "ab"
    )
    values = torch.full((order,), 1.0 if others == "large" else max(ratio, 1e-5), dtype=torch.float64)
    values[0], values[-1] = 1.0, ratio
    for size in (1.0, 1e-30, 1e30):
        assert invertible(size * left @ values.diag() @ right) == (ratio > LEAST_RATIO)
    assert not invertible(torch.zeros(order, order))
    for damage in (torch.nan, torch.inf):
        assert not invertible(torch.eye(order).index_fill(0, torch.tensor([0]), damage))


def test_singular_values_are_only_taken_of_what_may_be_singular(monkeypatch: pytest.MonkeyPatch) -> None:
    taken, svdvals = [], torch.linalg.svdvals
    monkeypatch.setattr(torch.linalg, "svdvals", lambda one: taken.append(one) or svdvals(one))
    assert all(invertible(matrix(order).bfloat16()) for order in (16, 43, 64))
    assert not taken
    assert not invertible(torch.ones(4, 4))
    assert len(taken) == 1
    assert not invertible(torch.ones(3, 4))


def test_damage_is_named_when_files_are_read() -> None:
    packed = mixed(IntegerCoding(4, 64))
    module = CompressedLinear.from_packed(packed)
    module.left = torch.zeros(12, 12, dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"`some\.linear`: `left` that has no inverse"):
        module.check_parts("some.linear")


def test_an_order_signs_floats_and_embeddings_have_none() -> None:
    matrices = matrix(12), matrix(16)
    with pytest.raises(CheckpointError, match="`order` and `left`"):
        random_packed(IntegerCoding(4, 64), SHAPE, order=True).with_matrices(*matrices)
    with pytest.raises(CheckpointError, match="unknown tensor `left`"):
        mixed(IntegerCoding(4, 64)).with_transform(torch.ones(12, 16))
    with pytest.raises(CheckpointError, match="unknown tensor `left`"):
        PackedWeight.from_float(normal(*SHAPE), FloatCoding()).with_matrices(*matrices)
    with pytest.raises(SettingsError, match="an embedding with input transform"):
        CompressedEmbedding.from_packed(mixed(IntegerCoding(4, 64)))


@pytest.mark.parametrize(
    "stated",
    [
        {"block": 0, "matrices": "bfloat16"},
        {"block": 1.0, "matrices": "bfloat16"},
        {"block": 3, "matrices": "int8"},
        {"block": 3, "matrices": ["bfloat16"]},
        {"matrices": "bfloat16"},
        {"block": 3, "matrices": "bfloat16", "seed": 1},
    ],
    ids=str,
)
def test_what_is_stated_wrongly_is_refused(stated: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="transform"):
        transform_from_dict(stated)


@given(features=st.integers(1, 5000))
@settings(max_examples=60, deadline=None)
def test_orders_are_the_nearest_divisors(features: int) -> None:
    block = kronecker_transform(features, "bfloat16").block
    other, rest = divmod(features, block)
    assert rest == 0
    assert other <= block
    assert not [n for n in range(other + 1, block) if features % n == 0]


def test_a_layout_states_it() -> None:
    stated = ModuleLayout(24, 192, IntegerCoding(4, 64), transform=Transform(16, "bfloat16"))
    assert stated.tensor_names("m") == ("m.codes", "m.scales", "m.zeros", "m.left", "m.right")
    layout = ModelLayout({"m": stated}, "e", "h")
    assert layout.to_dict()["modules"]["m"]["transform"] == {"block": 16, "matrices": "bfloat16"}
    assert ModelLayout.from_dict(layout.to_dict()) == layout
    with pytest.raises(CheckpointError, match="blocks of 7 for 192 inputs"):
        replace(stated, transform=Transform(7, "bfloat16"))
    with pytest.raises(CheckpointError, match="`order`"):
        replace(stated, order=True)


def test_other_formats_refuse_it_by_name() -> None:
    packed = mixed(IntegerCoding(4, 64, True, "float16"))
    for module in (gguf, compressed_tensors):
        assert "input transform" in str(module.refusal(packed.coding, 192, False, packed.named_part))


@pytest.mark.parametrize("transform", [Transform(5, "float32"), Transform(32)])
def test_blocks_that_leave_inputs_over_have_no_layout(transform: Transform) -> None:
    with pytest.raises(CheckpointError, match="blocks that divide the inputs"):
        transform.tensor_layout(4, 48)
