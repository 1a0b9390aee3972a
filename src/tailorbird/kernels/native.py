"""The project's own compiled products with packed weights, if they were built: float32 in and out.

They run what `cpp/linear.cpp` says, through plain C functions. Without a compiler at the time of
installation they are absent, and `dispatch` does without.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tailorbird.kernels.packing import unpack_codes
from tailorbird.kernels.reference import group_layout

#: Rows of a tile, and columns of a step, of the layout that `cpp/linear.cpp` reads.
LANES, STEP = 16, 32
#: How many bits of a code lie together, the lowest first.
PARTS = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (4, 4)}
#: Products of a code and an activation up to which one thread is faster than waking others.
ONE_THREAD = 1 << 18
#: Weights laid out at once.
CHUNK_VALUES = 1 << 18


@dataclass(frozen=True, eq=False)
class Tiles:
    """A weight as the native products read it.

    Parameters
    ----------
    codes : Tensor[tiles, steps, bits, LANES], int32
    scales, zeros : Tensor[tiles, groups, LANES], float32
    bits, group_columns : int
        Bits of a code, and columns of a group.
    out_features, columns : int
        Real outputs; inputs rounded up to whole steps.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    bits: int
    group_columns: int
    out_features: int
    columns: int


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled functions, or None where they weren't built or can't be loaded."""
    folder = Path(__file__).parent
    for path in (folder / f"_native{suffix}" for suffix in EXTENSION_SUFFIXES):
        if path.exists():
            try:
                found = ctypes.CDLL(str(path))
                found.tailorbird_best_version.restype = ctypes.c_int
            except (OSError, AttributeError):
                return None
            found.tailorbird_linear.restype = None
            pointers, sizes, numbers = [ctypes.c_void_p] * 5, [ctypes.c_int64] * 5, [ctypes.c_int] * 3
            found.tailorbird_linear.argtypes = [*pointers, *sizes, *numbers]
            return found
    return None


def available() -> bool:
    """Whether the native products were built."""
    return library() is not None


@functools.cache
def best_version() -> int:
    """Which instructions this processor has: 0 none in particular, 1 AVX2, 2 AVX-512."""
    found = library()
    return 0 if found is None else int(found.tailorbird_best_version())


def tiles(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    *,
    bits: int,
    group_size: int,
    in_features: int,
) -> Tiles:
    """Lay a stored weight out for `linear`; arguments as in `reference.dequantize`.

    Groups are one per row, or hold a multiple of `STEP` columns.
    """
    out_features = codes.shape[0]
    groups, size = group_layout(in_features, group_size)
    columns = -(-in_features // STEP) * STEP
    count, steps = -(-out_features // LANES), columns // STEP
    words = torch.empty(count, steps, bits, LANES, dtype=torch.int32)
    step = max(1, CHUNK_VALUES // (columns * LANES))
    for start in range(0, count, step):
        values = unpack_codes(codes[start * LANES : (start + step) * LANES], bits, in_features)
        missing = -len(values) % LANES
        values = torch.nn.functional.pad(values, (0, columns - in_features, 0, missing)).int()
        values = values.view(-1, LANES, steps, STEP)
        first, shift = 0, 0
        for width in PARTS[bits]:
            part = ((values >> shift) & ((1 << width) - 1)).unflatten(-1, (width, STEP // width))
            part = part << torch.arange(0, STEP, width, dtype=torch.int32)
            packed = part.sum(-1, dtype=torch.int32)  # bits don't overlap: their sum is their union
            words[start : start + step, :, first : first + width] = packed.permute(0, 2, 3, 1)
            first, shift = first + width, shift + width
    zero = torch.full((out_features, groups), float(1 << (bits - 1)))
    if zeros is not None:
        zero = unpack_codes(zeros, bits, groups).float()
    return Tiles(
        words, _by_tile(scales.float()), _by_tile(zero), bits, columns if groups == 1 else size,
        out_features, columns,
    )  # fmt: skip


def _by_tile(values: Tensor) -> Tensor:
    """`[out_features, groups]` to `[tiles, groups, LANES]`, filled up with zeros."""
    padded = torch.nn.functional.pad(values, (0, 0, 0, -len(values) % LANES))
    return padded.view(-1, LANES, values.shape[1]).transpose(1, 2).contiguous()


def linear(x: Tensor, layout: Tiles, version: int | None = None) -> Tensor:
    """`x [rows, in_features]` float32 times the weight: `[rows, out_features]` float32.

    A row has the same bits alone and among others, with any number of threads.

    Parameters
    ----------
    x : Tensor[rows, in_features], float32
    layout : Tiles
    version : int, optional
        Instructions to use, up to `best_version()`, which is the default.
    """
    found: Any = library()
    if x.shape[1] != layout.columns:
        x = torch.nn.functional.pad(x, (0, layout.columns - x.shape[1]))
    x = x.contiguous()
    rows = x.shape[0]
    y = torch.empty(rows, layout.out_features)
    work = rows * layout.columns * layout.out_features
    threads = 1 if work <= ONE_THREAD else torch.get_num_threads()
    tensors = (layout.codes, layout.scales, layout.zeros, x, y)
    found.tailorbird_linear(
        *(tensor.data_ptr() for tensor in tensors),
        layout.out_features, layout.columns, layout.scales.shape[1], layout.group_columns, rows,
        layout.bits, threads, best_version() if version is None else version,
    )  # fmt: skip
    return y
