"""Random packed weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from tailorbird.formats.packed import (
    SCALE_DTYPES,
    TABLE_DTYPES,
    BinaryCoding,
    CodesCoding,
    DoubleCoding,
    PackedWeight,
    TableCoding,
    VectorCoding,
    coded_scales,
    expanded_scales,
    unpacking,
)


def random_packed(coding: CodesCoding, shape: tuple[int, int], order: bool = False) -> PackedWeight:
    """Random codes, with zero points and positive scales or with tables, the same at every call."""
    generator = torch.Generator().manual_seed(shape[0] * 10007 + shape[1])
    rows, columns = shape
    if isinstance(coding, TableCoding):
        tables = torch.randn(rows, 1 << coding.bits, generator=generator).to(TABLE_DTYPES[coding.table_dtype])
        values = torch.randint(0, 1 << coding.bits, shape, generator=generator)
        permutation = torch.randperm(columns, generator=generator) if order else None
        return PackedWeight.from_tables(values, tables, coding, permutation)
    if isinstance(coding, DoubleCoding):
        plain = random_packed(coding.expanded, shape, order)
        scales = coded_scales(plain.tensors["scales"])
        return PackedWeight(coding, rows, columns, plain.tensors | scales)
    groups = 1 if coding.group_size == 0 else math.ceil(columns / coding.group_size)
    if isinstance(coding, BinaryCoding):
        tables = torch.randn(rows, groups, 2, generator=generator).to(TABLE_DTYPES[coding.table_dtype])
        values = torch.randint(0, 4, shape, generator=generator)
        permutation = torch.randperm(columns, generator=generator) if order else None
        return PackedWeight.from_tables(values, tables, coding, permutation)
    scales = torch.rand(rows, groups, generator=generator).to(SCALE_DTYPES[coding.scale_dtype])
    if coding.levels is not None:  # levels reach further than integers of as many bits
        scales /= 16
    if isinstance(coding, VectorCoding):
        count = math.ceil(columns / coding.dimension)
        values = torch.randint(0, 1 << coding.code_bits, (rows, count), generator=generator)
        packed = PackedWeight.from_points(values, scales, coding, columns)
        if order:
            packed.tensors["order"] = torch.randperm(columns, generator=generator).to(torch.int32)
        return packed
    zeros = None
    if not coding.symmetric:
        zeros = torch.randint(0, 1 << coding.bits, (rows, groups), generator=generator)
    values = torch.randint(0, 1 << coding.bits, shape, generator=generator)
    permutation = torch.randperm(columns, generator=generator) if order else None
    return PackedWeight.from_codes(values, scales, zeros, coding, permutation)


def laid_out(prepare: Callable[..., Any], packed: PackedWeight) -> Any:
    """What a fast path's `prepare` makes of the stored tensors."""
    return prepare(
        packed.tensors["codes"],
        expanded_scales(packed.tensors),
        packed.tensors.get("zeros"),
        in_features=packed.in_features,
        **unpacking(packed.coding),
    )


def at_odd_address(tensor: torch.Tensor) -> torch.Tensor:
    """The same values behind the first byte of a buffer."""
    buffer = bytearray(tensor.nbytes + 1)
    there = torch.frombuffer(buffer, dtype=torch.uint8, offset=1)
    there.copy_(tensor.flatten().view(torch.uint8))
    moved = torch.frombuffer(buffer, dtype=tensor.dtype, offset=1).view(tensor.shape)
    assert moved.data_ptr() % 2
    return moved
