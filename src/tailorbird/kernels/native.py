"""The project's own compiled products with packed weights, if they were built.

They run what `cpp/library.cpp` says, through plain C functions. Without a compiler at the time of
installation they are absent, and `dispatch` does without.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import math
import mmap
import platform
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tailorbird.errors import TensorError
from tailorbird.kernels.operands import (
    ACTIVATIONS,
    OF_WEIGHT,
    SCALES,
    check,
    check_inputs,
    contiguous,
)
from tailorbird.kernels.packing import BITS, pack_codes, packed_width, unpack_codes
from tailorbird.kernels.reference import group_layout, points_of

logger = logging.getLogger("tailorbird")

#: Rows of a tile, and columns of a step, of the layout in `cpp/layout.h`.
LANES, STEP = 16, 32
#: Bytes that are read at once where a row has a table.
READ = 8
#: Of a code that a table reads.
CODEBOOK_BITS = 4
#: Of stored codes that such a table has room for.
NARROW = (2, 3, 4)
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
    """The fastest of `versions`; that it is one without an instruction for products of bytes is logged."""
    found = library()
    if found is None:
        return 0
    best = int(found.tailorbird_best_version())
    if best in (0, 1):
        _say_slow(best)
    return best


def _say_slow(version: int) -> None:
    """Log what a faster version needs, by the names in /proc/cpuinfo."""
    if platform.machine().lower() in ("aarch64", "arm64"):
        lacks = "asimddp"
    elif version == 0:
        lacks = "avx2 with fma"
    else:
        lacks = "avx_vnni, and avx512_vnni with avx512f, avx512bw, avx512vl and avx512dq"
    logger.warning(
        "compiled products run in %s, slowly: this processor lacks %s",
        "AVX2" if version else "portable code",
        lacks,
    )


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


def _check_stored(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    dimension: int = 1,
) -> None:
    """Raise TensorError unless these are all of a stored weight, with groups as in `serves`.

    Arguments as in `reference.dequantize`; a code stands for `dimension` columns.
    """
    if bits not in BITS or in_features < 1 or group_size < 0:
        raise TensorError(
            f"{in_features} inputs in groups of {group_size} and codes of {bits} bits",
            f"1 input or more, groups of 0 (a row) or more, {', '.join(map(str, BITS))} bits",
            OF_WEIGHT,
        )
    groups, size = group_layout(in_features, group_size)
    if groups > 1 and size % STEP:
        raise TensorError(
            f"groups of {size} inputs", f"a multiple of {STEP}, or one group a row",
            "multiply by `reference.linear`",
        )  # fmt: skip
    width = packed_width(-(-in_features // dimension), bits)
    check("`codes`", codes, (*codes.shape[:1], width), (torch.uint8,), OF_WEIGHT)
    rows = codes.shape[0]
    check("`scales`", scales, (rows, groups), SCALES, OF_WEIGHT)
    if zeros is not None:
        check("`zeros`", zeros, (rows, packed_width(groups, bits)), (torch.uint8,), OF_WEIGHT)


def _check_bits(bits: int, allowed: tuple[int, ...], beside: str) -> None:
    """Raise TensorError unless codes of so many bits can stand beside a tensor."""
    if bits not in allowed:
        raise TensorError(
            f"codes of {bits} bits beside {beside}", f"{' or '.join(map(str, allowed))} bits", OF_WEIGHT
        )


def _check_laid_out(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    table: Tensor | None,
    out_features: int,
    in_features: int,
    group_columns: int,
) -> None:
    """Raise TensorError unless tensors are as in `Tiles`, groups of so many columns."""
    if in_features < 1 or out_features < 1 or group_columns < 1 or group_columns % STEP:
        raise TensorError(
            f"a weight [{out_features}, {in_features}] in groups of {group_columns} columns",
            f"1 row and input or more, and groups of a multiple of {STEP}",
            OF_WEIGHT,
        )
    count, steps = -(-out_features // LANES), -(-in_features // STEP)
    groups = -(-steps * STEP // group_columns)
    check("`codes`", codes, (count, steps, *codes.shape[2:3], LANES), (torch.int32,), OF_WEIGHT)
    allowed, beside = (BITS, "no `table`") if table is None else ((CODEBOOK_BITS,), "`table`")
    _check_bits(codes.shape[2], allowed, beside)
    check("`scales`", scales, (count, groups, LANES), SCALES, OF_WEIGHT)
    if zeros is not None:
        check("`zeros`", zeros, (count, groups, LANES), (torch.uint8,), OF_WEIGHT)
    if table is not None:
        check("`table`", table, (1 << CODEBOOK_BITS,), (torch.uint8,), OF_WEIGHT)


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

    Raises
    ------
    TensorError
        For tensors and numbers that aren't those of one stored weight, or other groups.
    """
    codes, scales, zeros = contiguous(codes, scales, zeros)
    points = levels if levels is not None and levels.dim() == 2 else None
    dimension = 1 if points is None else points.shape[1]
    _check_stored(codes, scales, zeros, bits, group_size, in_features, dimension)
    if levels is not None:
        _check_bits(bits, NARROW if points is None else BITS, "`levels`")
        check("`levels`", levels, (1 << bits, *levels.shape[1:2]), (torch.int8,), OF_WEIGHT)
    out_features = codes.shape[0]
    groups, size = group_layout(in_features, group_size)
    steps, count = -(-in_features // STEP), -(-out_features // LANES)
    if points is not None:
        coordinates = points_of(codes, bits, in_features, (points.short() + 128).to(torch.uint8))
        codes, bits, levels = coordinates.contiguous(), 8, None
    if levels is not None and bits < CODEBOOK_BITS:
        codes, bits = pack_codes(unpack_codes(codes, bits, in_features), CODEBOOK_BITS), CODEBOOK_BITS
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

    Raises
    ------
    TensorError
        `x` has another form.
    """
    x, described = x.contiguous(), layout.described
    check_inputs(x, (*x.shape[:1], described.in_features))
    return _multiply(x, described, int8, best_version() if version is None else version)


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

    Raises
    ------
    TensorError
        For tensors and numbers that aren't those of one stored weight.
    """
    codes, tables = contiguous(codes, tables)
    _check_bits(bits, NARROW, "`tables`")
    if in_features < 1:
        raise TensorError(f"{in_features} inputs", "1 or more", OF_WEIGHT)
    check("`codes`", codes, (*codes.shape[:1], packed_width(in_features, bits)), (torch.uint8,), OF_WEIGHT)
    check("`tables`", tables, (codes.shape[0], 1 << bits), tuple(KINDS), OF_WEIGHT)
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

    Raises
    ------
    TensorError
        `x` has another form.
    """
    x, described = x.contiguous(), layout.described
    check_inputs(x, (*x.shape[:1], described.in_features))
    wide = x.float()
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

    Raises
    ------
    TensorError
        For tensors and numbers that aren't those of one stored weight, or groups that aren't as in `serves`.
    """
    _check_stored(codes, scales, zeros, bits, group_size, in_features)
    if levels is not None:
        _check_bits(bits, (CODEBOOK_BITS,), "`levels`")
        check("`levels`", levels, (1 << CODEBOOK_BITS,), (torch.float32,), OF_WEIGHT)
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

    Raises
    ------
    TensorError
        `to` has another form, or the rectangle begins or ends elsewhere.
    """
    shape: tuple[int | str, ...] = to.shape if to.dim() == 2 else ("rows", "columns")
    check("`to`", to, shape, ACTIVATIONS, "give a matrix that can be filled")
    rows, columns = to.shape
    inside = 0 <= row <= weight.rows - rows and 0 <= column <= weight.in_features - columns
    if not inside or column % LANES:
        raise TensorError(
            f"{rows} rows from {row} and {columns} columns from {column} on",
            f"a part of [{weight.rows}, {weight.in_features}] from a multiple of {LANES} columns on",
            "ask for a rectangle of the weight",
        )
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
    TensorError
        `ids` are of another dtype, device or number of dimensions.
    """
    ids = ids.contiguous()
    check("`ids`", ids, (ids.numel(),), (torch.int64,), "give the ids of tokens one after the other")
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

    Raises
    ------
    TensorError
        For another tensor.
    """
    shape: tuple[int | str, ...] = weight.shape if weight.dim() == 2 else ("rows", "width")
    check("`weight`", weight, shape, tuple(KINDS), OF_WEIGHT)
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

    Raises
    ------
    TensorError
        For another dtype.
    """
    if dtype not in KINDS:
        raise TensorError(f"rows of {dtype}", " or ".join(map(str, KINDS)), "look them up in such a dtype")
    return EmbeddingStructure(None, packed, packed.rows, packed.in_features, factor, KINDS[dtype])


def traced_linear(x: Tensor, layout: Tiles, int8: bool) -> Tensor:
    """`linear` as an operator that `torch.compile` takes into its graph; `x` may have more dimensions."""
    described = layout.described
    return torch.ops.tailorbird.packed_linear(
        x, layout.codes, layout.scales, layout.zeros, layout.table, layout.out_features,
        layout.in_features, described.group_columns, int8,
    )  # fmt: skip


def _multiply(x: Tensor, described: WeightStructure, int8: bool, version: int) -> Tensor:
    """The product for inputs that were checked, and are contiguous."""
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
    _check_laid_out(codes, scales, zeros, table, out_features, in_features, group_columns)
    x = x.contiguous()
    check_inputs(x, (*x.shape[:-1], in_features))
    described = _described(codes, scales, zeros, table, out_features, in_features, group_columns)
    y = _multiply(x.reshape(-1, in_features), described, int8, best_version())
    return y.view(*x.shape[:-1], out_features)


@torch.library.register_fake("tailorbird::packed_linear")
def _packed_linear_shape(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, table: Tensor | None, rows: int, *_: Any
) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


library()  # now, so that it hears of the first fork (`cpp/forking.h`)
