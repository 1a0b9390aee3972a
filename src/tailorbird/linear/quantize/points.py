"""Vectors of neighbouring weights, rounded to the nearest points of a grid that all groups share.

A group's scale is the root of its mean square, in the unit of the grid, so that what is rounded has the
deviation that the grid is for (Malinovskii et al. 2024, arXiv:2411.17525). The nearest point is the one with
the greatest ``2 x p - |p|^2``, the first of equals.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from tailorbird.errors import SettingsError
from tailorbird.formats.codebooks import UNITS, VECTOR_UNITS
from tailorbird.formats.packed import SCALE_DTYPES, CodebookCoding, PackedWeight, VectorCoding
from tailorbird.kernels.reference import group_layout
from tailorbird.linear.quantize.grid import stored_scales

#: products of vectors and points that live at a time
CHUNK_PRODUCTS = 1 << 22


def round_to_points(weight: Tensor, coding: VectorCoding) -> PackedWeight:
    """Round a weight to points, by scales of its groups' mean squares.

    Parameters
    ----------
    weight : Tensor[out_features, in_features], float32
        Not modified.
    coding : VectorCoding

    Raises
    ------
    SettingsError
        When weights are too large for the scales.
    """
    scales = scales_by_deviation(weight, coding)
    return PackedWeight.from_points(nearest_points(weight, scales, coding), scales, coding, weight.shape[1])


def nearest_points(weight: Tensor, scales: Tensor, coding: VectorCoding) -> Tensor:
    """Codes of the points nearest to vectors of a weight, uint8 ``[out_features, ceil(in / dimension)]``.

    Parameters
    ----------
    weight : Tensor[out_features, in_features], float32
    scales : Tensor[out_features, groups]
        Not zero.
    coding : VectorCoding
    """
    columns, dimension = weight.shape[1], coding.dimension
    _, size = group_layout(columns, coding.group_size)
    group_of = torch.arange(columns, device=weight.device) // size
    points = coding.levels.to(weight.device).float()
    norms = points.square().sum(1)
    count = -(-columns // dimension)
    codes = torch.empty((len(weight), count), dtype=torch.uint8, device=weight.device)
    step = max(1, CHUNK_PRODUCTS // (count * len(points)))
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        values = pad(weight[rows] / scales[rows].float()[:, group_of], (0, count * dimension - columns))
        products = torch.addmm(-norms, values.reshape(-1, dimension), points.t(), alpha=2)
        codes[rows] = products.argmax(1).to(torch.uint8).view(-1, count)
    return codes


def scales_by_deviation(weight: Tensor, coding: CodebookCoding | VectorCoding) -> Tensor:
    """What a level stands for in every group, by its mean square: float32 as stored, ``[out, groups]``.

    Raises
    ------
    SettingsError
        No scale holds it.
    """
    deviation = deviations(weight, coding.group_size)
    unit = VECTOR_UNITS[coding.codebook] if isinstance(coding, VectorCoding) else UNITS[coding.codebook]
    scales, most = deviation / unit, torch.finfo(SCALE_DTYPES[coding.scale_dtype]).max
    if not float(scales.max()) <= most:
        raise SettingsError(
            f"weights of mean square {float(deviation.max()) ** 2:.3g} for {coding.label}",
            f"scales of at most {most:.3g}",
            "choose bfloat16 scales",
        )
    return stored_scales(scales, coding)


def deviations(weight: Tensor, group_size: int) -> Tensor:
    """Root of the mean square of every group, float32 ``[out_features, groups]``."""
    columns = weight.shape[1]
    groups, size = group_layout(columns, group_size)
    counts = torch.full((groups,), size, device=weight.device)
    counts[-1] = columns - (groups - 1) * size
    sums = pad(weight.square(), (0, groups * size - columns)).unflatten(1, (groups, size)).sum(2)
    return (sums / counts).sqrt()
