"""The exact, slow path of weights of codes: dequantize, then multiply.

Every fast kernel is tested against these two functions. A dequantized float32 value is exact: the
difference of code and zero point has at most 9 significant bits, a level 7, and a 16-bit scale at most 11;
the values of a row's own table are stored as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tailorbird.kernels.packing import row_chunks, unpack_codes

#: Activations that share a scale, at most, where they are rounded.
SEGMENT = 128
#: What activations may be rounded to -> the value at which the largest of a segment is put.
INT8, INT4, FP8 = "int8", "int4", "fp8"
LARGEST = {INT8: 127.0, INT4: 7.0, FP8: 448.0}
#: Bytes, too, with one scale for all activations, fixed beforehand.
INT8_STATIC = "int8-static"
#: All that activations may be rounded to.
ROUNDED_TO = (*LARGEST, INT8_STATIC)
#: those of which nothing computes products here: the rounding is done, the product is one of floats
SIMULATED = (FP8, INT4, INT8_STATIC)


def group_layout(in_features: int, group_size: int) -> tuple[int, int]:
    """(groups per row, values per group); the last group may be shorter.

    `group_size` 0, or one longer than the row, means one group per row.
    """
    size = in_features if group_size == 0 else min(group_size, in_features)
    return -(-in_features // size), size


def dequantize(
    codes: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    *,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype = torch.float32,
    order: Tensor | None = None,
    levels: Tensor | None = None,
    tables: Tensor | None = None,
) -> Tensor:
    """Weight `scale * (code - zero)`, `scale * levels[code]`, or a value of `tables`, rounded to `dtype`.

    The rounding is one of float32 values. Works through the rows in chunks: beyond the result it takes a few
    megabytes, or a few copies of one row where that is more.

    Parameters
    ----------
    codes : Tensor[out_features, ceil(in_features * bits / 8)], uint8
        Packed codes.
    scales : Tensor[out_features, groups], float16 or bfloat16, or None
        None exactly where there are tables.
    zeros : Tensor[out_features, ceil(groups * bits / 8)], uint8, or None
        Packed zero points; None means symmetric, a zero point of `2**(bits - 1)` everywhere.
    bits, group_size, in_features : int
        As in the coding; `group_size` 0 is one group per row.
    dtype : torch.dtype
        Of the result.
    order : Tensor[in_features], integer, or None
        Column `j` of the stored codes belongs to input `order[j]`.
    levels : Tensor[2**bits] or [2**bits, dimension], int8, or None
        What codes stand for where they aren't integers; then there are no zero points. With a second
        dimension each code stands for that many neighbouring columns.
    tables : Tensor[out_features, 2**bits] or [out_features, groups, 2], float16 or bfloat16, or None
        What the codes of each row stand for, without scales and zero points: `tables[row, code]`; or of each
        group, two magnitudes, which the lower bit of a code chooses, positive where its upper bit is 1.

    Returns
    -------
    Tensor[out_features, in_features]
        In the order of the inputs.
    """
    rows_total = codes.shape[0]
    groups, size = group_layout(in_features, group_size)
    weight = torch.empty((rows_total, in_features), dtype=dtype, device=codes.device)
    position = None if order is None else torch.argsort(order)
    table = None if levels is None else levels.to(codes.device).float()
    for rows in row_chunks(rows_total, in_features):
        if table is not None and table.dim() == 2:
            values = points_of(codes[rows], bits, in_features, table)
        else:
            values = unpack_codes(codes[rows], bits, in_features)
        if scales is None:
            assert tables is not None
            own = tables[rows].float()
            flat = own.gather(1, values.long()) if own.dim() == 2 else signed_magnitudes(values, own, size)
            weight[rows] = flat if position is None else flat[:, position]
            continue
        if groups * size != in_features:
            values = torch.nn.functional.pad(values, (0, groups * size - in_features))
        chunk = values.view(-1, groups, size).float()
        if table is not None and table.dim() == 1:
            chunk = table.index_select(0, values.flatten().int()).view(-1, groups, size)
        elif table is None and zeros is None:
            chunk.sub_(float(1 << (bits - 1)))
        elif zeros is not None:
            chunk.sub_(unpack_codes(zeros[rows], bits, groups).unsqueeze(-1))
        chunk.mul_(scales[rows].float().unsqueeze(-1))
        flat = chunk.view(-1, groups * size)[:, :in_features]
        weight[rows] = flat if position is None else flat[:, position]
    return weight


def signed_magnitudes(codes: Tensor, tables: Tensor, size: int) -> Tensor:
    """Values of codes of two bits, a sign and one of two magnitudes: ``[rows, in_features]`` float32.

    Parameters
    ----------
    codes : Tensor[rows, in_features], uint8
    tables : Tensor[rows, groups, 2], float32
    size : int
        Columns of a group, but for the last.
    """
    values = torch.cat([-tables, tables], -1)  # by the codes of a group
    group = torch.arange(codes.shape[1], device=codes.device) // size
    return values.flatten(1).gather(1, codes.long() + 4 * group)


def points_of(codes: Tensor, bits: int, in_features: int, points: Tensor) -> Tensor:
    """Coordinates of the points of packed codes, ``[out_features, in_features]`` in the dtype of `points`.

    Parameters
    ----------
    codes : Tensor[out_features, ceil(count * bits / 8)], uint8
        `count` is `ceil(in_features / dimension)`.
    points : Tensor[2**bits, dimension]
    """
    found = unpack_codes(codes, bits, -(-in_features // points.shape[1]))
    values = points.index_select(0, found.flatten().int())
    return values.view(len(found), found.shape[1] * points.shape[1])[:, :in_features]


def to_bytes(x: Tensor, group_size: int) -> Tensor:
    """Activations as the products of integers see them: rounded to bytes, the largest of a segment at 127.

    A segment is `SEGMENT` inputs of one group of the weight, the last of a group may be shorter. What isn't
    finite makes its segment so.

    Parameters
    ----------
    x : Tensor[..., in_features], floating point
    group_size : int
        Of the weight; 0 is one group per row.

    Returns
    -------
    Tensor[..., in_features], float32
        The bytes times their scales.
    """
    return round_inputs(x, group_size, INT8)


def round_inputs(x: Tensor, group_size: int, to: str) -> Tensor:
    """Activations rounded to one of `LARGEST`, segments as in `to_bytes`, each with a scale of its own.

    Integers are symmetric; FP8 are floats of four bits of exponent and three of mantissa (e4m3). Halves go
    to even.

    Parameters
    ----------
    x : Tensor[..., in_features], floating point
    group_size : int
        Of the weight; 0 is one group per row.
    to : {"int8", "int4", "fp8"}

    Returns
    -------
    Tensor[..., in_features], float32
    """
    _, size = group_layout(x.shape[-1], group_size)
    pieces = [segment for group in x.float().split(size, dim=-1) for segment in group.split(SEGMENT, dim=-1)]
    return torch.cat([_rounded(piece, to) for piece in pieces], dim=-1)


def _rounded(segment: Tensor, to: str) -> Tensor:
    largest = segment.abs().amax(-1, keepdim=True)
    infinite = largest.isinf()
    values = torch.where(infinite, segment.isinf() * segment.sign(), segment)
    scale = torch.where(infinite, 1.0, largest)
    # PyTorch divides a number by a tensor, and on GPUs a tensor by a number, with two roundings.
    top = torch.full_like(scale, LARGEST[to])
    inverse = torch.where(scale < 1e-30, 0.0, top / scale)
    finer = values * inverse
    rounded = torch.where(
        infinite, values, finer.to(torch.float8_e4m3fn).float() if to == FP8 else finer.round()
    )
    return rounded * torch.where(infinite, largest, torch.where(inverse == 0, 0.0, scale / top))


def round_to_scale(x: Tensor, scale: float) -> Tensor:
    """Activations rounded to bytes with one scale for all: `scale * clamp(round(x / scale), -127, 127)`.

    In float32, halves to even. What isn't finite stays so.

    Parameters
    ----------
    x : Tensor, floating point
    scale : float
        Above 0.

    Returns
    -------
    Tensor, float32
        In the shape of `x`.
    """
    values = x.float()
    # On GPUs PyTorch divides by a number as by its inverse, with two roundings.
    step = torch.full_like(values[..., :1], scale)
    codes = (values / step).round_().clamp_(-LARGEST[INT8], LARGEST[INT8])
    return torch.where(values.isfinite(), codes * step, values)


def linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    *,
    bits: int,
    group_size: int,
    in_features: int,
    bias: Tensor | None = None,
    order: Tensor | None = None,
    levels: Tensor | None = None,
    tables: Tensor | None = None,
) -> Tensor:
    """`x @ weight.T + bias` with the weight dequantized to the dtype of `x`.

    Parameters
    ----------
    x : Tensor[..., in_features], floating point
    bias : Tensor[out_features] or None
    codes, scales, zeros, bits, group_size, in_features, order, levels, tables
        As for `dequantize`.

    Returns
    -------
    Tensor[..., out_features], dtype of `x`
    """
    weight = dequantize(
        codes,
        scales,
        zeros,
        bits=bits,
        group_size=group_size,
        in_features=in_features,
        dtype=x.dtype,
        order=order,
        levels=levels,
        tables=tables,
    )
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
