"""The reader printed in docs/formats.md reads what the package writes."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packed_weights import random_packed
from tailorbird.formats.codebooks import GRIDS, LEVELS, POINTS, UNITS, VECTOR_UNITS
from tailorbird.formats.packed import (
    GROUP_SIZES,
    BinaryCoding,
    CodebookCoding,
    CodesCoding,
    DoubleCoding,
    EntropyCoding,
    IntegerCoding,
    LowRank,
    PackedWeight,
    TableCoding,
    VectorCoding,
    stored_bytes,
)
from tailorbird.formats.sparse import Sparse
from tailorbird.formats.transform import Transform, kronecker_transform
from tailorbird.kernels import dynamic_codes
from tailorbird.kernels.packing import BITS, pack_codes

PAGE = Path(__file__).parents[2] / "docs" / "formats.md"


@pytest.fixture(scope="module")
def reader() -> dict[str, Any]:
    listings = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec("\n".join(listings), names)
    return names


GROUPS, SCALES = st.sampled_from(GROUP_SIZES), st.sampled_from(["bfloat16", "float16"])


@given(
    coding=st.builds(IntegerCoding, st.sampled_from(BITS), GROUPS, st.booleans(), SCALES)
    | st.builds(CodebookCoding, st.sampled_from(sorted(LEVELS)), GROUPS, SCALES)
    | st.builds(DoubleCoding, st.sampled_from(sorted(LEVELS)), GROUPS)
    | st.builds(VectorCoding, st.sampled_from(sorted(POINTS)), GROUPS, SCALES)
    | st.builds(TableCoding, st.sampled_from([2, 3, 4]), SCALES)
    | st.builds(BinaryCoding, GROUPS, SCALES),
    order=st.booleans(),
    shape=st.tuples(st.integers(1, 5), st.sampled_from([1, 31, 64, 172, 513])),
)
@settings(max_examples=60, deadline=None)
def test_it_gives_the_same_weight(reader, coding: CodesCoding, order: bool, shape: tuple[int, int]) -> None:
    packed = random_packed(coding, shape, order)
    tensors = {
        name: (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
        for name, tensor in packed.tensors.items()
    }
    levels, bits = None, coding.bits
    if isinstance(coding, CodebookCoding | DoubleCoding):
        levels = reader[coding.codebook.upper()]
    elif isinstance(coding, VectorCoding):
        lines = (GRIDS / f"{coding.codebook}.txt").read_text().splitlines()
        levels, bits = [list(map(int, line.split())) for line in lines], coding.code_bits
    weight = reader["read_weight"](tensors, bits, coding.group_size, coding.symmetric, shape[1], levels)
    assert torch.equal(torch.from_numpy(weight), packed.dequantize())


def test_its_steps_of_scales_are_those_that_are_stored(reader: dict[str, Any]) -> None:
    assert torch.equal(torch.from_numpy(reader["STEPS"]), dynamic_codes.levels(True))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_it_adds_a_low_rank_part(reader: dict[str, Any], dtype: str) -> None:
    coding = IntegerCoding(3, 64)
    packed = random_packed(coding, (5, 172)).with_low_rank(torch.randn(5, 3), torch.randn(3, 172), dtype)
    tensors = {
        name: (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
        for name, tensor in packed.tensors.items()
    }
    weight = reader["read_weight"](tensors, 3, 64, False, 172)
    torch.testing.assert_close(torch.from_numpy(weight), packed.dequantize())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("rank", [0, 3])
def test_it_adds_a_sparse_part(reader: dict[str, Any], dtype: str, rank: int) -> None:
    packed = random_packed(IntegerCoding(3, 64), (5, 172), order=True)
    if rank:
        packed = packed.with_low_rank(torch.randn(5, rank), torch.randn(rank, 172), dtype)
    packed = packed.with_sparse(torch.randn(5, 172), torch.rand(5, 172) < 0.1, dtype)
    tensors = {
        name: (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
        for name, tensor in packed.tensors.items()
    }
    weight = reader["read_weight"](tensors, 3, 64, False, 172)
    torch.testing.assert_close(torch.from_numpy(weight), packed.dequantize())


@pytest.mark.parametrize("block", [1, 4, 64])
def test_it_turns_inputs_back(reader: dict[str, Any], block: int) -> None:
    signs = torch.randint(0, 2, (192 // block, block), generator=torch.Generator().manual_seed(0)) * 2 - 1
    packed = random_packed(CodebookCoding("gauss3", 64), (5, 192)).with_transform(signs)
    packed = packed.with_low_rank(torch.randn(5, 3), torch.randn(3, 192))
    tensors = {
        name: (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
        for name, tensor in packed.tensors.items()
    }
    weight = reader["read_weight"](tensors, 3, 64, True, 192, reader["GAUSS3"])
    torch.testing.assert_close(torch.from_numpy(weight), packed.dequantize())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_it_undoes_two_matrices(reader: dict[str, Any], dtype: str) -> None:
    left, right = (torch.eye(n) + 0.1 * torch.randn(n, n) for n in (12, 16))
    packed = random_packed(IntegerCoding(3, 64), (5, 192)).with_matrices(left, right, dtype)
    tensors = {
        name: (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
        for name, tensor in packed.tensors.items()
    }
    weight = reader["read_weight"](tensors, 3, 64, False, 192)
    torch.testing.assert_close(torch.from_numpy(weight), packed.dequantize(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (65, 172), (2, 4500)])
def test_it_reads_entropy_coded_floats(reader: dict[str, Any], shape: tuple[int, int]) -> None:
    packed = PackedWeight.from_bfloat16(
        torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    )
    tensors = {name: tensor.numpy() for name, tensor in packed.tensors.items()}
    assert torch.equal(torch.from_numpy(reader["read_entropy_coded"](tensors)), packed.dequantize())


def test_the_numbers_of_its_examples() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert "bytes `0x8D 0x01`" in page
    assert pack_codes(torch.tensor([5, 1, 6]), 3).tolist() == [0x8D, 0x01]
    assert "16,640 + 1,536 + 512 + 688 bytes" in page
    assert stored_bytes(IntegerCoding(3, 64), 256, 172, has_order=True) == 16640 + 1536 + 512 + 688
    assert "4,096 + 2,752 bytes" in page
    assert LowRank(8).tensor_layout(256, 172) == {
        "up": ((256, 8), torch.bfloat16),
        "down": ((8, 172), torch.bfloat16),
    }
    assert (2 * 256 * 8, 2 * 8 * 172) == (4096, 2752)
    assert "16,640 + 4,096 bytes" in page
    assert stored_bytes(TableCoding(3), 256, 172) == 16640 + 4096
    assert "512 + 880 + 880 bytes" in page
    sizes = [
        math.prod(shape) * dtype.itemsize for shape, dtype in Sparse(440).tensor_layout(256, 172).values()
    ]
    assert sizes == [512, 880, 880]
    assert "256 + 44 + 14,540 + 44,032 bytes, 67 %" in page
    assert stored_bytes(EntropyCoding(14540), 256, 172) == 256 + 44 + 14540 + 44032
    assert round(100 * (256 + 44 + 14540 + 44032) / (2 * 256 * 172)) == 67
    assert "172 bytes beside those of the codes" in page
    plain, turned = (
        stored_bytes(IntegerCoding(3, 64), 256, 172, transform=part) for part in (None, Transform(4))
    )
    assert turned - plain == 172
    assert "of orders 4 and 43, 3,730" in page
    mixed = stored_bytes(IntegerCoding(3, 64), 256, 172, transform=kronecker_transform(172, "bfloat16"))
    assert mixed - plain == 2 * (4**2 + 43**2) == 3730
    assert f"{UNITS['gauss2']:.4f}, {UNITS['gauss3']:.4f} and {UNITS['gauss4']:.4f} levels" in page
    assert "22,016 + 1,536 bytes" in page
    assert stored_bytes(CodebookCoding("nf4", 64), 256, 172) == 22016 + 1536
    assert "11,008 + 1,536 bytes" in page
    assert stored_bytes(VectorCoding("gauss2x4", 64), 256, 172) == 11008 + 1536
    assert stored_bytes(BinaryCoding(64), 256, 172) == 11008 + 3072
    for name, unit in VECTOR_UNITS.items():
        coding = VectorCoding(name, 64)
        numbers = coding.bits, coding.dimension, coding.code_bits, len(coding.levels), f"{unit:.3f}"
        assert f"| `{name}` | {' | '.join(map(str, numbers))} |" in page
    assert "22,016 + 768 + 12 + 4 bytes" in page
    assert stored_bytes(DoubleCoding("nf4", 64), 256, 172) == 22016 + 768 + 12 + 4


@pytest.mark.parametrize("name", LEVELS)
def test_the_levels_of_its_table_are_those_of_the_reader(reader: dict[str, Any], name: str) -> None:
    (row,) = re.findall(rf"\| `{name}` \| (.*) \|", PAGE.read_text(encoding="utf-8"))
    assert [int(level.replace("−", "-")) for level in row.split(",")] == reader[name.upper()]
    assert reader[name.upper()] == CodebookCoding(name, 64).levels.tolist()
