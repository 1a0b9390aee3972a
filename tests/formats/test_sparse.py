"""A sparse part beside codes: stored exactly, counted, and computed with on every path."""

from __future__ import annotations

import copy
import itertools

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
    CodebookCoding,
    FloatCoding,
    GroupedCoding,
    IntegerCoding,
    PackedWeight,
    stored_bytes,
)
from tailorbird.formats.sparse import VALUE_DTYPES, Sparse, sparse_from_dict
from tailorbird.kernels import native

CODINGS = st.builds(IntegerCoding, st.sampled_from([2, 3, 4, 8]), st.just(64), st.booleans()) | st.just(
    CodebookCoding("nf4", 64)
)
DTYPES = tuple(VALUE_DTYPES)
SHAPE = 24, 172


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def mask_of(share: float, shape: tuple[int, int] = SHAPE) -> Tensor:
    """Some places, with a whole row and none of another among them."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(7)) < share
    mask[1], mask[2] = True, False
    return mask


def with_part(
    coding: GroupedCoding, shape: tuple[int, int] = SHAPE, share: float = 0.05, dtype: str = "bfloat16",
    order: bool = False, rank: int = 0,
) -> PackedWeight:  # fmt: skip
    packed = random_packed(coding, shape, order)
    if rank:
        packed = packed.with_low_rank(normal(shape[0], rank), normal(rank, shape[1], seed=1), dtype)
    return packed.with_sparse(3 * normal(*shape, seed=2), mask_of(share, shape), dtype)


def exact(packed: PackedWeight) -> Tensor:
    """The weight in float64, from its parts, value by value."""
    weight = packed.base.dequantize(torch.float64) + packed.product().double()
    counts, columns = packed.tensors["counts"].tolist(), packed.tensors["columns"].tolist()
    values = iter(zip(columns, packed.tensors["values"].double(), strict=True))
    for row in range(packed.out_features):
        for column, value in itertools.islice(values, counts[row]):
            weight[row, column] += value
    return weight


@given(
    coding=CODINGS, order=st.booleans(), share=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    dtype=st.sampled_from(DTYPES), rank=st.sampled_from([0, 3]),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_the_weight_is_the_sum_of_its_parts(
    coding: GroupedCoding, order: bool, share: float, dtype: str, rank: int
) -> None:
    packed = with_part(coding, share=share, dtype=dtype, order=order, rank=rank)
    nonzeros = int(mask_of(share).sum())
    assert packed.sparse == Sparse(nonzeros, dtype)
    torch.testing.assert_close(packed.dequantize().double(), exact(packed), rtol=1e-5, atol=1e-4)
    assert torch.equal(packed.base.dequantize(), random_packed(coding, SHAPE, order).dequantize())
    counted = stored_bytes(coding, *SHAPE, order, packed.low_rank, packed.sparse)
    assert packed.nbytes == counted == packed.base.nbytes + 2 * rank * (24 + 172) + 2 * 24 + 4 * nonzeros
    module = CompressedLinear.from_packed(packed)
    assert module.sparse == packed.sparse
    assert torch.equal(module.weight, packed.dequantize())
    for rows in (slice(3, 9), slice(0, 3), slice(20, None), slice(5, 5)):
        torch.testing.assert_close(module.weight_rows(rows), packed.dequantize()[rows])


@given(
    coding=CODINGS, order=st.booleans(), bias=st.booleans(), rounds=st.booleans(), rows=st.integers(1, 60),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    values=st.sampled_from(DTYPES), rank=st.sampled_from([0, 3]),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_every_path_adds_it(
    coding: GroupedCoding, order: bool, bias: bool, rounds: bool, rows: int, dtype: torch.dtype, values: str,
    rank: int,
) -> None:  # fmt: skip
    packed = with_part(coding, dtype=values, order=order, rank=rank)
    offset = normal(24, seed=2) if bias else None
    plain = CompressedLinear.from_packed(packed.base, offset, rounds)
    module = CompressedLinear.from_packed(packed, offset, rounds)
    x = normal(rows, 172, seed=3).to(dtype)
    share = x.double() @ (exact(packed) - packed.base.dequantize(torch.float64)).t()
    found, expected = module(x), plain(x).double() + share
    assert found.dtype == dtype
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 2e-3}.get(dtype, 1e-5)
    assert (found.double() - expected).abs().max() <= tolerance * expected.abs().max()
    assert torch.equal(module(x.reshape(1, rows, 172))[0], found)


@pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rounds", [False, True])
def test_a_row_has_the_same_bits_alone_and_in_a_batch(dtype: torch.dtype, rounds: bool) -> None:
    module = CompressedLinear.from_packed(with_part(IntegerCoding(3, 32), (40, 96)), rounds=rounds)
    x = normal(20, 96).to(dtype)
    together = module(x)
    assert torch.equal(together, torch.cat([module(row) for row in x.split(1)]))
    assert torch.equal(together[3:11], module(x[3:11]))


@given(coding=CODINGS, order=st.booleans(), rows=st.integers(1, 9), rank=st.sampled_from([0, 3]))
@settings(max_examples=30, deadline=None)
def test_the_gradient_of_the_input_is_that_of_the_weight(
    coding: GroupedCoding, order: bool, rows: int, rank: int
) -> None:
    packed = with_part(coding, order=order, rank=rank)
    module = CompressedLinear.from_packed(packed)
    x = normal(rows, 172).requires_grad_()
    gradient = normal(rows, 24, seed=4)
    module(x).backward(gradient)
    assert x.grad is not None
    expected = gradient.double() @ exact(packed)
    assert (x.grad.double() - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_changed_values_count_from_the_next_call_on() -> None:
    module = CompressedLinear.from_packed(with_part(IntegerCoding(4, 32), (24, 96)))
    x = normal(2, 96)
    before, base = module(x), CompressedLinear.from_packed(module.packed().base)(x)
    assert module.values is not None
    module.values.mul_(2)
    torch.testing.assert_close(module(x) - base, 2 * (before - base), rtol=1e-3, atol=1e-2)
    assert torch.equal(copy.deepcopy(module)(x), module(x))


def test_what_is_saved_is_loaded() -> None:
    packed = with_part(IntegerCoding(4, 32), (24, 96))
    module = CompressedLinear.from_packed(packed)
    assert list(module.state_dict()) == ["codes", "scales", "zeros", "counts", "columns", "values"]
    other = CompressedLinear(96, 24, packed.coding, bias=False, sparse=packed.sparse)
    other.load_state_dict(module.state_dict())
    x = normal(3, 96)
    assert torch.equal(other(x), module(x))
    halved = other.half()
    assert halved.values is not None
    assert halved.values.dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="values"):
        CompressedLinear(96, 24, packed.coding, bias=False).load_state_dict(module.state_dict())


def test_columns_of_a_wide_weight_take_32_bits() -> None:
    layouts = [Sparse(3).tensor_layout(2, width) for width in ((1 << 16) - 1, 1 << 16)]
    for layout, dtype in zip(layouts, (torch.uint16, torch.int32), strict=True):
        assert (layout["counts"], layout["columns"]) == (((2,), dtype), ((3,), dtype))
    mask = torch.zeros(2, 1 << 16, dtype=torch.bool)
    mask[1] = True
    packed = random_packed(IntegerCoding(2, 0), (2, 1 << 16)).with_sparse(mask.float(), mask)
    assert packed.tensors["counts"].tolist() == [0, 1 << 16]
    x = torch.zeros(1, 1 << 16)
    x[0, -1] = 2
    plain = CompressedLinear.from_packed(packed.base)
    assert (CompressedLinear.from_packed(packed)(x) - plain(x)).tolist() == [[0, 2]]


def damaged() -> dict[str, dict[str, Tensor]]:
    """Sparse parts of ``[4, 96]`` weights that can't be read."""
    good = {"counts": [2, 0, 1, 1], "columns": [5, 90, 7, 0]}

    def part(**change: list[int]) -> dict[str, Tensor]:
        indices = {
            name: torch.tensor(given, dtype=torch.int32).to(torch.uint16)
            for name, given in (good | change).items()
        }
        return indices | {"values": torch.ones(4, dtype=torch.bfloat16)}

    return {
        "too few": part(counts=[2, 0, 1, 0]),
        "too many": part(counts=[2, 0, 1, 65535]),
        "an input beyond the last": part(columns=[5, 96, 7, 0]),
        "the same input twice": part(columns=[5, 5, 7, 0]),
        "falling inputs": part(columns=[90, 5, 7, 0]),
    }


@pytest.mark.parametrize("kind", damaged())
def test_damaged_rows_are_refused(kind: str) -> None:
    base = random_packed(IntegerCoding(4, 32), (4, 96))
    part = damaged()[kind]
    with pytest.raises(CheckpointError, match=r"counts|columns"):
        PackedWeight(base.coding, 4, 96, base.tensors | part)
    module = CompressedLinear(96, 4, base.coding, bias=False, sparse=Sparse(4))
    with pytest.raises(RuntimeError, match=r"the sparse part"):
        module.load_state_dict(base.tensors | part)
    for name, tensor in (base.tensors | part).items():
        setattr(module, name, tensor)
    with pytest.raises(CheckpointError, match=r"`some\.linear`: `(counts|columns)`"):
        module.check_parts("some.linear")


@pytest.mark.parametrize(
    "change",
    [
        {"counts": None},
        {"columns": None},
        {"values": None},
        {"counts": torch.zeros(5, dtype=torch.uint16)},
        {"columns": torch.zeros(3, dtype=torch.int32)},
        {"values": torch.zeros(3)},
        {"values": torch.zeros(3, 1, dtype=torch.bfloat16)},
    ],
    ids=["no counts", "no columns", "no values", "many counts", "wide columns", "32 bits", "a matrix"],
)
def test_tensors_that_do_not_fit_are_refused(change: dict[str, Tensor | None]) -> None:
    base = random_packed(IntegerCoding(4, 32), (4, 96))
    mask = torch.zeros(4, 96, dtype=torch.bool)
    mask[0, :3] = True
    tensors = base.with_sparse(mask.float(), mask).tensors | change
    with pytest.raises(CheckpointError, match=r"counts|columns|values"):
        PackedWeight(base.coding, 4, 96, {name: one for name, one in tensors.items() if one is not None})


def test_floats_and_embeddings_have_none() -> None:
    weight = PackedWeight.from_float(normal(24, 96), FloatCoding())
    with pytest.raises(CheckpointError, match="unknown tensor `columns`"):
        weight.with_sparse(normal(24, 96), mask_of(0.1, (24, 96)))
    with pytest.raises(SettingsError, match="sparse"):
        CompressedEmbedding.from_packed(with_part(IntegerCoding(4, 32), (24, 96)))


def test_a_mask_without_places_leaves_a_weight_as_it_is() -> None:
    packed = random_packed(IntegerCoding(4, 32), (24, 96))
    assert packed.with_sparse(normal(24, 96), torch.zeros(24, 96, dtype=torch.bool)) is packed


@pytest.mark.parametrize(
    "stated",
    [None, 8, {"nonzeros": 8}, {"nonzeros": 0, "dtype": "bfloat16"}, {"nonzeros": True, "dtype": "bfloat16"},
     {"nonzeros": 1 << 31, "dtype": "bfloat16"}, {"nonzeros": 8, "dtype": "float32"},
     {"nonzeros": 8, "dtype": []}, {"nonzeros": 8, "dtype": "bfloat16", "rows": 3}],
)  # fmt: skip
def test_what_is_stated_of_it_is_exactly_nonzeros_and_dtype(stated: object) -> None:
    with pytest.raises(CheckpointError, match="sparse"):
        sparse_from_dict(stated)


def test_other_formats_refuse_it_by_name() -> None:
    packed = with_part(IntegerCoding(4, 32, True, "float16"), (24, 96))
    for module in (gguf, compressed_tensors):
        assert module.refusal(packed.coding, 96) is None
        assert "sparse" in str(module.refusal(packed.coding, 96, False, packed.named_part))
