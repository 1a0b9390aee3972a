"""The project's own compiled products with packed weights, if they were built.

They run what `cpp/library.cpp` says, through plain C functions. Without a compiler at the time of
installation they are absent, and `dispatch` does without.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import math
import mmap
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tailorbird.kernels.packing import pack_codes, unpack_codes
from tailorbird.kernels.reference import group_layout, points_of

#: Rows of a tile, and columns of a step, of the layout in `cpp/layout.h`.
LANES, STEP = 16, 32
#: Bytes that are read at once where a row has a table.
READ = 8
#: Of a code that a table reads.
CODEBOOK_BITS = 4
#: Products of a code and an activation up to which one thread is faster than waking others.
ONE_THREAD = 1 << 18
#: Layouts that stay share pieces of memory of this size, in large pages where the system has them.
ARENA_BYTES = 16 << 20
#: What the system calls large; less than that begins anywhere.
LARGE_PAGE = 2 << 20
#: What values of an embedding are, as `Kind` of `cpp/layout.h` counts.
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class WeightStructure(ctypes.Structure):
    """`Weight` of `cpp/layout.h`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "zeros")),
        *((name, ctypes.c_int64) for name in ("rows", "in_features", "columns", "groups", "group_columns")),
        *((name, ctypes.c_int32) for name in ("bits", "half")),
        ("table", ctypes.c_void_p), ("tables", ctypes.c_void_p),
    ]  # fmt: skip


class StoredStructure(ctypes.Structure):
    """`Stored` of `cpp/layout.h`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "zeros")),
        *((name, ctypes.c_int64) for name in ("rows", "in_features", "groups", "group_columns")),
        *((name, ctypes.c_int32) for name in ("bits", "half")),
        ("levels", ctypes.c_void_p),
    ]


class EmbeddingStructure(ctypes.Structure):
    """`Embedding` of `cpp/layout.h`."""

    _fields_ = [
        ("dense", ctypes.c_void_p), ("packed", StoredStructure), ("rows", ctypes.c_int64),
        ("width", ctypes.c_int64), ("factor", ctypes.c_float), ("kind", ctypes.c_int32),
    ]  # fmt: skip


@dataclass(frozen=True, eq=False)
class Tiles:
    """A weight as the native products read it.

    Parameters
    ----------
    codes : Tensor[tiles, steps, bits, LANES], int32
        `bits` as they are stored.
    scales : Tensor[tiles, groups, LANES], float16 or bfloat16
    zeros : Tensor[tiles, groups, LANES], uint8, or None
        None means symmetric.
    table : Tensor[16], uint8, or None
        Levels of a codebook plus 128, and zeros behind them; None means that codes are integers.
    out_features, in_features : int
    described : WeightStructure
        The C structure that describes them.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    table: Tensor | None
    out_features: int
    in_features: int
    described: WeightStructure


@dataclass(frozen=True, eq=False)
class TableRows:
    """A weight of tables as the native products read it.

    Parameters
    ----------
    codes : Tensor[int32]
        Rows as they are stored, and at least `READ` bytes behind them.
    tables : Tensor[out_features, LANES], float32
        What every code of 4 bits stands for; those of fewer bits are repeated.
    described : WeightStructure
        The C structure that describes them.
    """

    codes: Tensor
    tables: Tensor
    described: WeightStructure


@functools.cache
def library() -> Any:
    """The compiled functions, or None where they weren't built or can't be loaded."""
    folder = Path(__file__).parent
    for path in (folder / f"_native{suffix}" for suffix in EXTENSION_SUFFIXES):
        if path.exists():
            try:
                found = ctypes.CDLL(str(path))
                found.tailorbird_best_version.restype = ctypes.c_int
                found.tailorbird_runs_version.restype = ctypes.c_int
                found.tailorbird_runs_version.argtypes = [ctypes.c_int]
                multiply, lay_out = found.tailorbird_linear, found.tailorbird_lay_out
            except (OSError, AttributeError):
                return None
            pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
            multiply.restype = lay_out.restype = None
            multiply.argtypes = [pointer, pointer, pointer, size, number, number, number, number]
            lay_out.argtypes = [pointer, size, size, number, pointer, number]
            unpack = found.tailorbird_dequantize
            unpack.restype = None
            unpack.argtypes = [pointer, size, size, size, size, pointer, number, number, number]
            look_up = found.tailorbird_look_up
            look_up.restype = size
            look_up.argtypes = [pointer, pointer, size, pointer, number, number]
            run_blocks, run_head = found.tailorbird_run_blocks, found.tailorbird_run_head
            run_blocks.restype = run_head.restype = None
            run_blocks.argtypes = [pointer, size, size, pointer, pointer, number, number]
            run_head.argtypes = [pointer, pointer, pointer, size, size, pointer, number, number]
            run_attention = found.tailorbird_run_attention
            run_attention.restype = None
            run_attention.argtypes = [pointer, pointer, pointer, size, pointer, number, number]
            adapt, add_sparse = found.tailorbird_adapt, found.tailorbird_add_sparse
            adapt.restype = add_sparse.restype = None
            adapt.argtypes = [pointer, pointer, size, pointer, size, size, number, number]
            add_sparse.argtypes = [pointer, pointer, pointer, size, number, number]
            table_linear = found.tailorbird_table_linear
            table_linear.restype = None
            table_linear.argtypes = [pointer, pointer, pointer, size, number, number]
            choose = found.tailorbird_choose
            choose.restype = None
            choose.argtypes = [pointer, size, size, number, number]
            decode, encode = found.tailorbird_decode_entropy, found.tailorbird_encode_entropy
            decode.restype, encode.restype = size, None
            decode.argtypes = [pointer, pointer, pointer, pointer, size, size, pointer, number]
            encode.argtypes = [pointer, pointer, pointer, size, size, pointer, pointer, number]
            for name in ("norm", "gate", "softmax", "cross_entropy", "walsh"):
                run_pass = getattr(found, f"tailorbird_{name}")
                run_pass.restype = None
                run_pass.argtypes = [pointer, number, number]
            return found
    return None


class Arena:
    """Memory for layouts that are used together and for long; reading large pages is faster."""

    def __init__(self) -> None:
        self._piece = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._used = 0
        self._files = _mapped_files()

    def empty(self, *shape: int) -> Tensor:
        """An int32 tensor that isn't filled."""
        size = 4 * math.prod(shape)
        if size > ARENA_BYTES // 4:
            return zeros_in_large_pages(size)[:size].view(torch.int32).view(shape)
        if self._used + size > len(self._piece):
            self._piece, self._used = zeros_in_large_pages(ARENA_BYTES), 0
        start, self._used = self._used, self._used + -(-size // 64) * 64
        return self._piece[start : start + size].view(torch.int32).view(shape)

    def let_go(self, tensor: Tensor) -> None:
        """Take the pages of a tensor that mirror a file, and were never written to, out of memory.

        The system keeps them in its cache, and they come back when they are read. Other tensors stay.
        """
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        inside = any(first <= start and end <= last for first, last in self._files)
        if not inside or tensor.is_inference() or tensor._version:
            return
        _let_go(start, end)


def _mapped_files() -> list[tuple[int, int]]:
    """Addresses at which this process mirrors safetensors files; none where the system doesn't tell."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    ranges = (line.split(maxsplit=1)[0].split("-") for line in lines if line.endswith(".safetensors"))
    return [(int(first, 16), int(last, 16)) for first, last in ranges]


def _let_go(start: int, end: int) -> None:
    """Take whole pages between two addresses out of memory."""
    page = mmap.PAGESIZE
    start, end = -(-start // page) * page, end // page * page
    if end > start and hasattr(mmap, "MADV_DONTNEED"):
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(start), ctypes.c_size_t(end - start), ctypes.c_int(mmap.MADV_DONTNEED)
        )


def forget(tensor: Tensor) -> None:
    """Give back the memory of a part of `zeros_in_large_pages` that nobody reads any more."""
    if tensor.untyped_storage().nbytes() >= LARGE_PAGE:
        _let_go(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)


def zeros_in_large_pages(size: int) -> Tensor:
    """Bytes, all 0, that begin where a large page does; memory that isn't written to isn't taken.

    What is left behind the last whole large page lies in small ones. The system is free to ignore the advice.
    """
    if not hasattr(mmap, "MAP_PRIVATE") or size < LARGE_PAGE:
        return torch.zeros(size, dtype=torch.uint8, device="cpu")
    mapped = mmap.mmap(-1, size + LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = torch.frombuffer(mapped, dtype=torch.uint8)
    start = -whole.data_ptr() % LARGE_PAGE
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a system built without them
            mapped.madvise(mmap.MADV_HUGEPAGE, start, size // LARGE_PAGE * LARGE_PAGE)
    return whole[start : start + size]


def available() -> bool:
    """Whether the native products were built."""
    return library() is not None


@functools.cache
def fingerprint() -> str:
    """What tells this build of the compiled functions from others; empty where there is none."""
    found = library()
    return "" if found is None else hashlib.blake2b(Path(found._name).read_bytes(), digest_size=8).hexdigest()


@functools.cache
def best_version() -> int:
    """The fastest of `versions`."""
    found = library()
    return 0 if found is None else int(found.tailorbird_best_version())


def versions() -> tuple[int, ...]:
    """Which instructions products can use here.

    0 none in particular, 1 AVX2, 2 AVX-512 with VNNI, 3 AVX2 with AVX-VNNI, 4 NEON with dot products,
    5 AVX-512 with VNNI and products of bfloat16.
    """
    found = library()
    return tuple(i for i in range(6) if found is not None and found.tailorbird_runs_version(i))


def serves(coding: Any, in_features: int) -> bool:
    """Whether weights of such a coding can be laid out: one group a row, or groups of whole steps.

    Those of signs and magnitudes can't.
    """
    groups, size = group_layout(in_features, coding.group_size)
    return coding.kind != "binary" and (groups == 1 or size % STEP == 0)


def tiles(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    *,
    bits: int,
    group_size: int,
    in_features: int,
    levels: Tensor | None = None,
    arena: Arena | None = None,
) -> Tiles:
    """Lay a stored weight out for `linear`; other arguments as in `reference.dequantize`.

    Groups are one per row, or hold a multiple of `STEP` columns. With `arena` the codes lie there. Codes of
    a codebook take 4 bits, however few they are stored in; of a vector codebook there are bytes, a
    coordinate each.
    """
    out_features = codes.shape[0]
    groups, size = group_layout(in_features, group_size)
    steps, count = -(-in_features // STEP), -(-out_features // LANES)
    if levels is not None and levels.dim() == 2:
        coordinates = points_of(codes, bits, in_features, (levels.short() + 128).to(torch.uint8))
        codes, bits, levels = coordinates, 8, None
    if levels is not None and bits < CODEBOOK_BITS:
        codes, bits = pack_codes(unpack_codes(codes, bits, in_features), CODEBOOK_BITS), CODEBOOK_BITS
    codes = codes.contiguous()
    shape = count, steps, bits, LANES
    words = (
        torch.empty(shape, dtype=torch.int32, device=codes.device) if arena is None else arena.empty(*shape)
    )
    library().tailorbird_lay_out(
        codes.data_ptr(), out_features, in_features, bits, words.data_ptr(), torch.get_num_threads()
    )
    by_tile = rows_by_tile(scales)
    zero = None if zeros is None else rows_by_tile(unpack_codes(zeros, bits, groups))
    table = None
    if levels is not None:
        table = torch.zeros(1 << CODEBOOK_BITS, dtype=torch.uint8, device=levels.device)
        table[: len(levels)] = (levels.short() + 128).to(torch.uint8)
    described = _described(
        words, by_tile, zero, table, out_features, in_features, steps * STEP if groups == 1 else size
    )
    return Tiles(words, by_tile, zero, table, out_features, in_features, described)


def _described(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    table: Tensor | None,
    out_features: int,
    in_features: int,
    group_columns: int,
) -> WeightStructure:
    """The C structure of tensors as in `Tiles`."""
    steps, bits = codes.shape[1:3]
    return WeightStructure(
        codes.data_ptr(), scales.data_ptr(), None if zeros is None else zeros.data_ptr(), out_features,
        in_features, steps * STEP, scales.shape[1], group_columns, bits if table is None else 8,
        int(scales.dtype == torch.float16), None if table is None else table.data_ptr(),
    )  # fmt: skip


def rows_by_tile(values: Tensor) -> Tensor:
    """`[out_features, groups]` to `[tiles, groups, LANES]`, filled up with zeros."""
    padded = torch.nn.functional.pad(values, (0, 0, 0, -len(values) % LANES))
    return padded.view(-1, LANES, values.shape[1]).transpose(1, 2).contiguous()


def linear(x: Tensor, layout: Tiles, int8: bool = False, version: int | None = None) -> Tensor:
    """`x [rows, in_features]` times the weight: `[rows, out_features]` in the dtype of `x`.

    A row has the same bits alone and among others, with any number of threads.

    Parameters
    ----------
    x : Tensor[rows, in_features], float32 or bfloat16
    layout : Tiles
    int8 : bool
        Whether `x` is first rounded to bytes (`reference.to_bytes`), for products of integers.
    version : int, optional
        Instructions to use, one of `versions()`; the fastest by default.
    """
    return _multiply(x, layout.described, int8, best_version() if version is None else version)


def table_rows(
    codes: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    *,
    bits: int,
    group_size: int,
    in_features: int,
    tables: Tensor,
    levels: Tensor | None = None,
    arena: Arena | None = None,
) -> TableRows:
    """Lay a stored weight of tables out for `table_linear`; arguments as in `reference.dequantize`.

    There are no scales, zero points and levels, and a row is one group. With `arena` the codes lie there.
    """
    out_features, width = codes.shape
    words = -(-(codes.numel() + READ) // 4)
    kept = torch.empty(words, dtype=torch.int32, device=codes.device) if arena is None else arena.empty(words)
    behind = kept.view(torch.uint8)
    behind[: codes.numel()].view(out_features, width).copy_(codes)
    behind[codes.numel() :] = 0
    repeated = tables.float().repeat(1, LANES >> bits).contiguous()
    described = WeightStructure(
        codes=kept.data_ptr(), rows=out_features, in_features=in_features,
        columns=-(-in_features // STEP) * STEP, groups=1, group_columns=-(-in_features // STEP) * STEP,
        bits=bits, tables=repeated.data_ptr(),
    )  # fmt: skip
    return TableRows(kept, repeated, described)


def table_linear(x: Tensor, layout: TableRows, version: int | None = None) -> Tensor:
    """`x [rows, in_features]` times a weight of tables: `[rows, out_features]` in the dtype of `x`.

    Computed in float32. A row has the same bits alone and among others, with any number of threads.

    Parameters
    ----------
    x : Tensor[rows, in_features], float32 or bfloat16
    layout : TableRows
    version : int, optional
        Instructions to use, one of `versions()`; the fastest by default.
    """
    wide, described = x.float().contiguous(), layout.described
    y = torch.empty(len(x), described.rows, dtype=torch.float32, device=x.device)
    work = len(x) * described.in_features * described.rows
    library().tailorbird_table_linear(
        ctypes.addressof(described), wide.data_ptr(), y.data_ptr(), len(x),
        1 if work <= ONE_THREAD else torch.get_num_threads(),
        best_version() if version is None else version,
    )  # fmt: skip
    return y.to(x.dtype)


def described_as_stored(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    levels: Tensor | None = None,
) -> StoredStructure:
    """The C structure of a stored weight, for `dequantize`; its tensors must be contiguous and stay.

    Tensors are as in `reference.dequantize`, `levels` in float32.
    """
    groups, size = group_layout(in_features, group_size)
    return StoredStructure(
        codes.data_ptr(), scales.data_ptr(), None if zeros is None else zeros.data_ptr(), codes.shape[0],
        in_features, groups, size, bits, int(scales.dtype == torch.float16),
        None if levels is None else levels.data_ptr(),
    )  # fmt: skip


def dequantize(
    weight: StoredStructure, row: int, column: int, to: Tensor, version: int | None = None
) -> Tensor:
    """Fill `to [rows, columns]` with the weight's values from `row` and `column` on; returns it.

    They have the bits of `reference.dequantize`. Groups are as in `serves`.

    Parameters
    ----------
    weight : StoredStructure
    row, column : int
        Where the rectangle begins; `column` is a multiple of `LANES`.
    to : Tensor[rows, columns], float32 or bfloat16, contiguous
    version : int, optional
        Instructions to use, up to `best_version()`, which is the default.
    """
    library().tailorbird_dequantize(
        ctypes.addressof(weight), row, to.shape[0], column, to.shape[1], to.data_ptr(),
        to.dtype == torch.bfloat16, 1 if to.numel() <= ONE_THREAD else torch.get_num_threads(),
        best_version() if version is None else version,
    )  # fmt: skip
    return to


def look_up(table: EmbeddingStructure, ids: Tensor, version: int | None = None) -> Tensor:
    """Rows of an embedding: float32 ``[tokens, width]``.

    Stored codes are dequantized to the bits of `reference.dequantize` in the table's dtype.

    Parameters
    ----------
    table : EmbeddingStructure
        Made by `dense_embedding` or `packed_embedding`.
    ids : Tensor[tokens], int64
        On the CPU.
    version : int, optional
        Instructions to use, one of `versions()`; the fastest by default.

    Raises
    ------
    IndexError
        An id has no row.
    ValueError
        `ids` are of another dtype, device or number of dimensions.
    """
    if ids.dtype != torch.int64 or not ids.is_cpu or ids.dim() != 1:
        raise ValueError(f"ids {list(ids.shape)} of {ids.dtype} on {ids.device}; expected int64 on the CPU")
    ids = ids.contiguous()
    tokens = ids.shape[0]
    rows = torch.empty(tokens, table.width, dtype=torch.float32, device="cpu")
    missed = library().tailorbird_look_up(
        ctypes.addressof(table), ids.data_ptr(), tokens, rows.data_ptr(),
        1 if tokens * table.width <= ONE_THREAD else torch.get_num_threads(),
        best_version() if version is None else version,
    )  # fmt: skip
    if missed >= 0:
        raise IndexError(f"token id {int(ids[missed])}; expected one from 0 to {table.rows - 1}")
    return rows


def dense_embedding(weight: Tensor, factor: float = 1.0) -> EmbeddingStructure:
    """An embedding for `look_up`; its tensor must be contiguous and stay.

    Parameters
    ----------
    weight : Tensor[rows, width], one of `KINDS`, on the CPU
    factor : float
        What rows are multiplied by, the products rounded to the dtype of `weight`.
    """
    rows, width = weight.shape
    return EmbeddingStructure(weight.data_ptr(), StoredStructure(), rows, width, factor, KINDS[weight.dtype])


def packed_embedding(packed: StoredStructure, dtype: torch.dtype, factor: float = 1.0) -> EmbeddingStructure:
    """An embedding for `look_up`, of stored codes.

    Parameters
    ----------
    packed : StoredStructure
        Made by `described_as_stored`.
    dtype : torch.dtype
        What its values are rounded to, one of `KINDS`.
    factor : float
        What rows are multiplied by afterwards, the products rounded again.
    """
    return EmbeddingStructure(None, packed, packed.rows, packed.in_features, factor, KINDS[dtype])


def traced_linear(x: Tensor, layout: Tiles, int8: bool) -> Tensor:
    """`linear` as an operator that `torch.compile` takes into its graph; `x` may have more dimensions."""
    described = layout.described
    return torch.ops.tailorbird.packed_linear(
        x, layout.codes, layout.scales, layout.zeros, layout.table, layout.out_features,
        layout.in_features, described.group_columns, int8,
    )  # fmt: skip


def _multiply(x: Tensor, described: WeightStructure, int8: bool, version: int) -> Tensor:
    x = x.contiguous()
    rows = x.shape[0]
    y = torch.empty(rows, described.rows, dtype=x.dtype, device=x.device)
    work = rows * described.in_features * described.rows
    library().tailorbird_linear(
        ctypes.addressof(described), x.data_ptr(), y.data_ptr(), rows, x.dtype == torch.bfloat16, int8,
        1 if work <= ONE_THREAD else torch.get_num_threads(), version,
    )  # fmt: skip
    return y


torch.library.define(
    "tailorbird::packed_linear",
    "(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, Tensor? table, SymInt out_features, "
    "SymInt in_features, SymInt group_columns, bool int8) -> Tensor",
)


@torch.library.impl("tailorbird::packed_linear", "cpu")
def _packed_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    table: Tensor | None,
    out_features: int,
    in_features: int,
    group_columns: int,
    int8: bool,
) -> Tensor:
    described = _described(codes, scales, zeros, table, out_features, in_features, group_columns)
    y = _multiply(x.reshape(-1, in_features), described, int8, best_version())
    return y.view(*x.shape[:-1], out_features)


@torch.library.register_fake("tailorbird::packed_linear")
def _packed_linear_shape(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, table: Tensor | None, rows: int, *_: Any
) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


library()  # now, so that it hears of the first fork (`cpp/forking.h`)
