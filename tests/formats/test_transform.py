"""Codes behind an input transform: stored exactly, counted, and computed with on every path."""

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
from tailorbird.errors import CheckpointError, SettingsError
from tailorbird.formats import compressed_tensors, gguf
from tailorbird.formats.modules import CompressedEmbedding, CompressedLinear
from tailorbird.formats.packed import (
    BinaryCoding,
    CodebookCoding,
    CodesCoding,
    FloatCoding,
    IntegerCoding,
    PackedWeight,
    TableCoding,
    VectorCoding,
    stored_bytes,
)
from tailorbird.formats.transform import Transform, transform_from_dict
from tailorbird.kernels import native
from tailorbird.kernels.walsh import rotate, rotate_back
from tailorbird.model.layout import ModelLayout, ModuleLayout

CODINGS = st.builds(
    IntegerCoding, st.sampled_from([2, 3, 4, 8]), st.just(64), st.booleans()
) | st.sampled_from(
    [CodebookCoding(name, 64) for name in ("nf4", "gauss2", "gauss3", "gauss4")]
    + [VectorCoding(name, 64) for name in ("gauss2x2", "gauss2x4")]
    + [TableCoding(3), BinaryCoding(64)]
)
SHAPE = 24, 176
BLOCKS = st.sampled_from([1, 2, 16])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def signs_of(columns: int, block: int) -> Tensor:
    drawn = torch.randint(0, 2, (columns // block, block), generator=torch.Generator().manual_seed(3))
    return (2 * drawn - 1).to(torch.int8)


def with_transform(
    coding: CodesCoding, shape: tuple[int, int] = SHAPE, block: int = 16, rank: int = 0, share: float = 0.0
) -> PackedWeight:
    packed = random_packed(coding, shape).with_transform(signs_of(shape[1], block))
    if rank:
        packed = packed.with_low_rank(normal(shape[0], rank), normal(rank, shape[1], seed=1))
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(7)) < share
    return packed.with_sparse(3 * normal(*shape, seed=2), mask)


def exact(packed: PackedWeight) -> Tensor:
    """The weight in float64: codes turned back, and what stands beside them, which isn't turned."""
    codes = packed.behind_transform.dequantize(torch.float64)
    return rotate_back(codes, packed.tensors["signs"]) + packed.beside().double()


@given(
    coding=CODINGS, block=BLOCKS, rank=st.sampled_from([0, 3]), share=st.sampled_from([0.0, 0.05])
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_the_weight_is_what_the_codes_stand_for_turned_back(
    coding: CodesCoding, block: int, rank: int, share: float
) -> None:
    packed = with_transform(coding, SHAPE, block, rank, share)
    assert packed.transform == Transform(block)
    torch.testing.assert_close(packed.dequantize().double(), exact(packed), rtol=1e-5, atol=1e-4)
    assert torch.equal(packed.behind_transform.dequantize(), random_packed(coding, SHAPE).dequantize())
    counted = stored_bytes(
        coding, *SHAPE, low_rank=packed.low_rank, sparse=packed.sparse, transform=packed.transform
    )
    assert packed.nbytes == counted
    assert packed.base.nbytes == stored_bytes(coding, *SHAPE) + SHAPE[1]
    module = CompressedLinear.from_packed(packed)
    assert module.transform == packed.transform
    assert torch.equal(module.weight, packed.dequantize())
    for rows in (slice(3, 9), slice(0, 3), slice(20, None), slice(5, 5)):
        torch.testing.assert_close(module.weight_rows(rows), packed.dequantize()[rows])


@given(
    coding=CODINGS, block=BLOCKS, bias=st.booleans(), rounds=st.booleans(), rows=st.integers(1, 60),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    rank=st.sampled_from([0, 3]), share=st.sampled_from([0.0, 0.05]),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_every_path_multiplies_turned_inputs(
    coding: CodesCoding, block: int, bias: bool, rounds: bool, rows: int, dtype: torch.dtype, rank: int,
    share: float,
) -> None:  # fmt: skip
    packed = with_transform(coding, SHAPE, block, rank, share)
    offset = normal(24, seed=2) if bias else None
    behind = CompressedLinear.from_packed(packed.behind_transform, offset, rounds)
    module = CompressedLinear.from_packed(packed, offset, rounds)
    assert module.path(rows, dtype) == f"rotated {behind.path(rows, dtype)}"
    x = normal(rows, 176, seed=3).to(dtype)
    found = module(x)
    expected = behind(rotate(x, packed.tensors["signs"])).double() + x.double() @ packed.beside().double().t()
    assert found.dtype == dtype
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 2e-3}.get(dtype, 1e-5)
    assert (found.double() - expected).abs().max() <= tolerance * expected.abs().max()
    assert torch.equal(module(x.reshape(1, rows, 176))[0], found)
    if not rounds or not behind.path(rows, dtype).endswith("int8"):
        dense = x.double() @ exact(packed).t() + (0 if offset is None else offset.double())
        assert (found.double() - dense).abs().max() <= max(tolerance, 1e-4) * dense.abs().max()


@pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize("coding", [IntegerCoding(3, 32), CodebookCoding("gauss2", 32)])
def test_a_row_has_the_same_bits_alone_and_in_a_batch(
    coding: CodesCoding, dtype: torch.dtype, rounds: bool
) -> None:
    module = CompressedLinear.from_packed(with_transform(coding, (40, 96), 32), rounds=rounds)
    x = normal(20, 96).to(dtype)
    together = module(x)
    assert torch.equal(together, torch.cat([module(row) for row in x.split(1)]))
    assert torch.equal(together[3:11], module(x[3:11]))


@given(coding=CODINGS, rows=st.integers(1, 9), rank=st.sampled_from([0, 3]))
@settings(max_examples=30, deadline=None)
def test_the_gradient_of_the_input_is_that_of_the_weight(coding: CodesCoding, rows: int, rank: int) -> None:
    packed = with_transform(coding, rank=rank)
    module = CompressedLinear.from_packed(packed)
    x = normal(rows, 176).requires_grad_()
    gradient = normal(rows, 24, seed=4)
    module(x).backward(gradient)
    assert x.grad is not None
    expected = gradient.double() @ exact(packed)
    assert (x.grad.double() - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_what_is_saved_is_loaded() -> None:
    packed = with_transform(IntegerCoding(4, 32), (24, 96))
    module = CompressedLinear.from_packed(packed)
    assert list(module.state_dict()) == ["codes", "scales", "zeros", "signs"]
    other = CompressedLinear(96, 24, packed.coding, bias=False, transform=packed.transform)
    other.load_state_dict(module.state_dict())
    x = normal(3, 96)
    assert torch.equal(other(x), module(x))
    assert torch.equal(copy.deepcopy(module)(x), module(x))
    halved = other.half()
    assert halved.signs is not None
    assert halved.signs.dtype == torch.int8
    with pytest.raises(RuntimeError, match="signs"):
        CompressedLinear(96, 24, packed.coding, bias=False).load_state_dict(module.state_dict())


@pytest.mark.parametrize(
    "signs",
    [
        torch.zeros(6, 16, dtype=torch.int8),
        torch.ones(6, 16),
        torch.ones(3, 16, dtype=torch.int8),
        torch.ones(4, 24, dtype=torch.int8),
        torch.ones(96, dtype=torch.int8),
        torch.full((6, 16), 2, dtype=torch.int8),
        torch.full((6, 16), -128, dtype=torch.int8),
    ],
    ids=["zeros", "floats", "too few", "no power of two", "a vector", "twos", "the least byte"],
)
def test_signs_that_are_none_are_refused(signs: Tensor) -> None:
    base = random_packed(IntegerCoding(4, 32), (4, 96))
    with pytest.raises(CheckpointError, match="signs"):
        PackedWeight(base.coding, 4, 96, base.tensors | {"signs": signs})


def test_damaged_signs_are_refused_by_modules_too() -> None:
    base = random_packed(IntegerCoding(4, 32), (4, 96))
    module = CompressedLinear(96, 4, base.coding, bias=False, transform=Transform(16))
    wrong = base.tensors | {"signs": torch.zeros(6, 16, dtype=torch.int8)}
    with pytest.raises(RuntimeError, match="signs"):
        module.load_state_dict(wrong)
    for name, tensor in wrong.items():
        setattr(module, name, tensor)
    with pytest.raises(CheckpointError, match=r"`some\.linear`: `signs`"):
        module.check_parts("some.linear")


def test_an_order_floats_and_embeddings_have_none() -> None:
    signs = signs_of(96, 16)
    with pytest.raises(CheckpointError, match="`order` and `signs`"):
        random_packed(IntegerCoding(4, 32), (24, 96), order=True).with_transform(signs)
    with pytest.raises(CheckpointError, match="unknown tensor `signs`"):
        PackedWeight.from_float(normal(24, 96), FloatCoding()).with_transform(signs)
    with pytest.raises(SettingsError, match="an embedding with input transform"):
        CompressedEmbedding.from_packed(with_transform(IntegerCoding(4, 32), (24, 96)))


@pytest.mark.parametrize("block", [0, 3, -2, 1 << 17, True, 16.0, "16", None])
def test_a_block_is_a_power_of_two(block: Any) -> None:
    with pytest.raises(SettingsError, match="block"):
        Transform(block)
    with pytest.raises(CheckpointError, match="transform"):
        transform_from_dict({"block": block})


@pytest.mark.parametrize("stated", [None, 16, {}, {"block": 16, "seed": 0}, [16]])
def test_what_is_stated_of_it_is_exactly_the_block(stated: object) -> None:
    with pytest.raises(CheckpointError, match="transform"):
        transform_from_dict(stated)


def test_a_layout_states_it_and_refuses_what_cannot_be() -> None:
    stated = ModuleLayout(24, 96, IntegerCoding(4, 32), transform=Transform(32))
    assert stated.tensor_names("m") == ("m.codes", "m.scales", "m.zeros", "m.signs")
    layout = ModelLayout({"m": stated}, "e", "h")
    assert layout.to_dict()["modules"]["m"]["transform"] == {"block": 32}
    assert ModelLayout.from_dict(layout.to_dict()) == layout
    with pytest.raises(CheckpointError, match="blocks of 64 for 96 inputs"):
        replace(stated, transform=Transform(64))
    with pytest.raises(CheckpointError, match="`order`"):
        replace(stated, order=True)
    with pytest.raises(CheckpointError, match="`transform` beside float"):
        replace(stated, coding=FloatCoding())
    with pytest.raises(CheckpointError, match="`transform` of the embedding"):
        ModelLayout({"e": stated}, "e", "h")


def test_other_formats_refuse_it_by_name() -> None:
    packed = with_transform(IntegerCoding(4, 32, True, "float16"), (24, 96))
    for module in (gguf, compressed_tensors):
        assert module.refusal(packed.coding, 96) is None
        assert "input transform" in str(module.refusal(packed.coding, 96, False, packed.named_part))
