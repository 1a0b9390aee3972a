"""Fast products with packed weights on x86 processors, through operators that PyTorch ships.

Two operators are fast with bfloat16 activations and few rows, and slow with anything else:

- `_weight_int4pack_mm_for_cpu` multiplies by `(nibble - 8) * scale + zero`, scale and zero in bfloat16
  per group of 32, 64, 128 or 256 inputs. Codes of 2, 3 and 4 bits are one plane of nibbles; 5, 6 and 8
  bits are two planes, `16 * (high - 8) + (low - 8)`, laid side by side along the inputs and multiplied by
  the activations twice over, so that one call sums both in float32.
- `_weight_int8pack_mm` multiplies by signed bytes with one scale per row.

Both compute in float32 and round once, at the end. What reaches the operator is the stored weight
exactly, with two exceptions, each no larger than the rounding of a weight to bfloat16: float16 scales are
rounded to bfloat16, and for 4 bits with zero points so is the offset `scale * (8 - zero)`; the nibble
then has no room to absorb the zero point. (For 2 and 3 bits `code - zero` fits into a nibble; for 5 and 6
bits into two; for 8 bits the offset is split over the zeros of both planes, whose sum is exact.)

The layouts made here live in memory only and are never stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tailorbird.kernels.packing import CHUNK_VALUES, unpack_codes
from tailorbird.kernels.reference import group_layout

#: group sizes of the int4 operator
_OPERATOR_GROUPS = (256, 128, 64, 32)
#: both operators read past the end of a row that is no multiple of this (or refuse it)
_IN_MULTIPLE = 32
_OUT_MULTIPLE = 16
#: the int4 operator lays rows out in blocks of 64 at most, so that pieces of 64 can be joined
_ROW_BLOCK = 64


@dataclass(frozen=True)
class NibblePlanes:
    """Weight for `_weight_int4pack_mm_for_cpu`.

    Parameters
    ----------
    packed : Tensor[out', planes * in' / 2], uint8
        Nibbles in the operator's own order; `out'` and `in'` are padded.
    scales_and_zeros : Tensor[planes * in' / group, out', 2], bfloat16
    group : int
        Inputs per scale: 32, 64, 128 or 256.
    planes : int
        1, or 2 (the high plane before the low one).
    out_features, padding : int
        Real outputs, and zeros that are appended to each row of activations.
    """

    packed: Tensor
    scales_and_zeros: Tensor
    group: int
    planes: int
    out_features: int
    padding: int


@dataclass(frozen=True)
class SignedBytes:
    """Weight for `_weight_int8pack_mm`.

    Parameters
    ----------
    values : Tensor[out', in'], int8
        `code - zero`, padded with zeros.
    scales : Tensor[out'], bfloat16
    out_features, padding : int
        Real outputs, and zeros that are appended to each row of activations.
    """

    values: Tensor
    scales: Tensor
    out_features: int
    padding: int


def has_vector_kernels() -> bool:
    """Whether both operators have vector code for this processor; the generic code is slower than dense."""
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def operator_group(in_features: int, group_size: int) -> tuple[int, int]:
    """(group, padded inputs) with which the int4 operator sees a row.

    The group divides the coding's, so that scales are repeated and never mixed; a row with one scale takes
    the group that pads least.
    """
    groups, _ = group_layout(in_features, group_size)
    if groups > 1:
        group = next(g for g in _OPERATOR_GROUPS if group_size % g == 0)
    else:
        group = min(_OPERATOR_GROUPS, key=lambda g: (-(-in_features // g) * g, -g))
    return group, -(-in_features // group) * group


def nibble_planes(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    *,
    bits: int,
    group_size: int,
    in_features: int,
) -> NibblePlanes:
    """Repack a stored weight for `linear_nibbles`; arguments as in `reference.dequantize`.

    Works through the rows in chunks, so that it takes a few megabytes beyond its result.
    """
    out_features = codes.shape[0]
    groups, size = group_layout(in_features, group_size)
    group, columns = operator_group(in_features, group_size)
    planes = 1 if bits <= 4 else 2
    rows_padded = -(-out_features // _OUT_MULTIPLE) * _OUT_MULTIPLE
    per_plane = columns // group
    group_of = torch.arange(per_plane, device=codes.device) * group // size
    tables = torch.zeros((planes * per_plane, rows_padded, 2), dtype=torch.bfloat16, device=codes.device)
    packed = torch.empty((rows_padded, planes * columns // 2), dtype=torch.uint8, device=codes.device)
    step = max(1, CHUNK_VALUES // columns // _ROW_BLOCK) * _ROW_BLOCK
    for start in range(0, out_features, step):
        rows = slice(start, min(start + step, out_features))
        count = rows.stop - start
        scale = scales[rows].bfloat16().float()[:, group_of]
        if zeros is None:
            zero = torch.full_like(scale, 1 << (bits - 1), dtype=torch.int16)
        else:
            zero = unpack_codes(zeros[rows], bits, groups).short()[:, group_of]
        # weight = scale * (value - zero) = scale * (value + shift - 8 + offset)
        if bits == 4:
            offset = 8 - zero
        elif bits == 8:
            offset = 136 - zero
        else:
            offset = torch.zeros_like(zero)
        shift = (8 - zero - offset).to(torch.uint8)
        # rows and columns of padding hold code 0, which is a nibble as good as any; they meet zeros
        values = unpack_codes(codes[rows], bits, in_features)
        values = torch.nn.functional.pad(values, (0, columns - in_features, 0, -count % _OUT_MULTIPLE))
        # bytes wrap around: for two planes the sum is a signed byte, and flipping its top bit adds 128
        values[:count].view(count, per_plane, group).add_(shift.unsqueeze(-1))
        total = offset * scale
        coarse = total.bfloat16()
        if planes == 1:
            nibbles = values
            parts = [(scale, coarse)]
        else:
            nibbles = torch.cat([(values ^ 128) >> 4, values & 15], dim=1)
            parts = [(scale * 16, coarse), (scale, total - coarse)]
        for plane, (plane_scale, plane_zero) in enumerate(parts):
            table = tables[plane * per_plane : (plane + 1) * per_plane, rows]
            table[..., 0] = plane_scale.t()
            table[..., 1] = plane_zero.t()
        piece = torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles.int(), 1)
        packed[start : start + len(piece)] = piece
    return NibblePlanes(packed, tables, group, planes, out_features, columns - in_features)


def linear_nibbles(x: Tensor, layout: NibblePlanes) -> Tensor:
    """`x [rows, in_features]` bfloat16 times the weight: `[rows, out_features]` bfloat16."""
    if layout.padding:
        x = torch.nn.functional.pad(x, (0, layout.padding))
    if layout.planes == 2:
        x = torch.cat([x, x], dim=1)
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(
        x.contiguous(), layout.packed, layout.group, layout.scales_and_zeros
    )
    return y[:, : layout.out_features]


def signed_bytes(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    *,
    bits: int,
    group_size: int,
    in_features: int,
) -> SignedBytes:
    """Repack a stored weight with one group per row for `linear_bytes`.

    `code - zero` must fit into a signed byte: 6 bits at most, or 8 bits and symmetric. Arguments as in
    `reference.dequantize`.
    """
    out_features = codes.shape[0]
    rows_padded = -(-out_features // _OUT_MULTIPLE) * _OUT_MULTIPLE
    columns = -(-in_features // _IN_MULTIPLE) * _IN_MULTIPLE
    values = torch.zeros((rows_padded, columns), dtype=torch.int8, device=codes.device)
    step = max(1, CHUNK_VALUES // in_features)
    for start in range(0, out_features, step):
        rows = slice(start, min(start + step, out_features))
        code = unpack_codes(codes[rows], bits, in_features).short()
        zero = 1 << (bits - 1) if zeros is None else unpack_codes(zeros[rows], bits, 1).short()
        values[rows, :in_features] = code - zero
    padded = torch.zeros(rows_padded, dtype=torch.bfloat16, device=codes.device)
    padded[:out_features] = scales[:, 0]
    return SignedBytes(values, padded, out_features, columns - in_features)


def linear_bytes(x: Tensor, layout: SignedBytes) -> Tensor:
    """`x [rows, in_features]` bfloat16 times the weight: `[rows, out_features]` bfloat16."""
    if layout.padding:
        x = torch.nn.functional.pad(x, (0, layout.padding))
    y = torch.ops.aten._weight_int8pack_mm(x.contiguous(), layout.values, layout.scales)
    return y[:, : layout.out_features]
