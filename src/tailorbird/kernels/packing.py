"""Packing of small unsigned integers into bytes, without a wasted bit.

Each row is one little-endian bit stream: value `i` of a row occupies the bits
`[i * bits, (i + 1) * bits)`, bit `b` of a row is bit `b % 8` of byte `b // 8`, and the bits after the
last value are zero. The stream repeats after a few values (8 values of 3 bits are 3 bytes), so that all
rows are packed with a handful of byte operations per position inside that period.

What the values mean (scales, zero points) is not known here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from tailorbird.errors import SettingsError

#: widths that exist
BITS = (2, 3, 4, 5, 6, 8)
#: values handled at once; temporaries take a few bytes per value, and stay in the cache
CHUNK_VALUES = 1 << 18


def check_bits(bits: int) -> None:
    """Raise `SettingsError` unless `bits` is one of `BITS`."""
    if type(bits) is not int or bits not in BITS:
        raise SettingsError(
            f"{bits!r} bits per value",
            "one of " + ", ".join(map(str, BITS)),
            "choose another number of bits",
        )


def packed_width(count: int, bits: int) -> int:
    """Bytes that a row of `count` values of `bits` bits takes."""
    return -(-count * bits // 8)


def row_chunks(rows: int, columns: int) -> Iterator[slice]:
    """Slices that cover `rows` rows, each of about `CHUNK_VALUES` values and at least one row."""
    step = max(1, CHUNK_VALUES // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _period(bits: int) -> tuple[int, int]:
    """After how many (values, bytes) the stream is back at a byte's first bit."""
    common = math.gcd(bits, 8)
    return 8 // common, bits // common


def pack_codes(values: Tensor, bits: int) -> Tensor:
    """Pack each row of `values` into a bit stream.

    Parameters
    ----------
    values : Tensor[..., n], any integer dtype
        Values in `[0, 2**bits)`.
    bits : int
        2, 3, 4, 5, 6 or 8.

    Returns
    -------
    Tensor[..., ceil(n * bits / 8)], uint8
        One stream per row; unused bits at its end are zero.

    Raises
    ------
    SettingsError
        For another number of bits.
    ValueError
        When a value doesn't fit or `values` isn't of an integer dtype.
    """
    check_bits(bits)
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise ValueError(f"codes must be integers, not {values.dtype}")
    count = values.shape[-1]
    flat = values.reshape(math.prod(values.shape[:-1]), count)
    per_period, bytes_per_period = _period(bits)
    periods = -(-count // per_period)
    packed = torch.empty((flat.shape[0], packed_width(count, bits)), dtype=torch.uint8, device=values.device)
    for rows in row_chunks(flat.shape[0], count):
        chunk = flat[rows]
        if chunk.numel() and not chunk.is_meta:
            low, high = (int(extreme) for extreme in torch.aminmax(chunk))
            if low < 0 or high >= 1 << bits:
                raise ValueError(f"codes from {low} to {high} don't fit into {bits} bits")
        source = torch.zeros((chunk.shape[0], periods * per_period), dtype=torch.uint8, device=values.device)
        source[:, :count] = chunk
        source = source.view(-1, periods, per_period)
        stream = torch.zeros(
            (chunk.shape[0], periods, bytes_per_period), dtype=torch.uint8, device=values.device
        )
        for i in range(per_period):
            byte, shift = divmod(i * bits, 8)
            stream[..., byte] |= source[..., i] << shift
            if shift + bits > 8:
                stream[..., byte + 1] |= source[..., i] >> (8 - shift)
        packed[rows] = stream.view(-1, periods * bytes_per_period)[:, : packed.shape[1]]
    return packed.view(*values.shape[:-1], packed.shape[1])


def unpack_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of `pack_codes`.

    Parameters
    ----------
    packed : Tensor[..., ceil(count * bits / 8)], uint8
    bits : int
        2, 3, 4, 5, 6 or 8.
    count : int
        Values per row.

    Returns
    -------
    Tensor[..., count], uint8

    Raises
    ------
    SettingsError
        For another number of bits.
    ValueError
        When `packed` isn't uint8 or has another number of bytes per row.
    """
    check_bits(bits)
    width = packed_width(count, bits)
    if packed.dtype != torch.uint8 or packed.shape[-1] != width:
        raise ValueError(
            f"{count} codes of {bits} bits are uint8 rows of {width} bytes, "
            f"not {packed.dtype} rows of {packed.shape[-1]}"
        )
    flat = packed.reshape(math.prod(packed.shape[:-1]), width)
    per_period, bytes_per_period = _period(bits)
    periods = -(-count // per_period)
    values = torch.empty((flat.shape[0], count), dtype=torch.uint8, device=packed.device)
    mask = (1 << bits) - 1
    for rows in row_chunks(flat.shape[0], count):
        stream = torch.nn.functional.pad(flat[rows], (0, periods * bytes_per_period - width))
        stream = stream.view(-1, periods, bytes_per_period)
        target = torch.empty((stream.shape[0], periods, per_period), dtype=torch.uint8, device=packed.device)
        for i in range(per_period):
            byte, shift = divmod(i * bits, 8)
            value = stream[..., byte] >> shift
            if shift + bits > 8:
                value |= stream[..., byte + 1] << (8 - shift)
            torch.bitwise_and(value, mask, out=target[..., i])
        values[rows] = target.view(-1, periods * per_period)[:, :count]
    return values.view(*packed.shape[:-1], count)
