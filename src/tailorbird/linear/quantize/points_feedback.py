"""Rounding to points with error feedback: a vector of columns at a time.

As GPTQ does (`gptq.py`), with `d` columns in place of one. With `U^T U = H^-1` the weights `w_B` of a vector
move the error

    e = (w_B - s p) U_BB^-1,        w_R <- w_R - e U_BR,

the latter what makes up for it in the columns `R` after it, and the share of the vector in the output error
is `|e|^2`. So the point is the one nearest in this measure: of those times `U_BB^-1` the nearest to
`w_B / s U_BB^-1`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tailorbird.formats.packed import PackedWeight, VectorCoding
from tailorbird.kernels.reference import group_layout
from tailorbird.linear.quantize.gptq import Gptq, GptqRounding

#: columns that are rounded before those after them hear of it, in one matrix product
BLOCK = 128
#: Columns in their own order, as a vector is one of neighbours.
IN_ORDER = Gptq(asymmetric=False, act_order=False)


def points_by_feedback(
    rounding: GptqRounding, target: Tensor, scales: Tensor, coding: VectorCoding
) -> PackedWeight:
    """Round a target to points, vector by vector, and let the columns that follow make up for each error.

    Parameters
    ----------
    rounding : GptqRounding
        Of `IN_ORDER`; gives the factor.
    target : Tensor[out_features, in_features], float32
        Not modified.
    scales : Tensor[out_features, groups]
        As they are stored; not zero.
    coding : VectorCoding
    """
    columns, factor, dimension = target.t().clone(), rounding.factor, coding.dimension
    in_features = len(columns)
    _, size = group_layout(in_features, coding.group_size)
    points, by_group = coding.levels.to(target.device).float(), scales.float().t()
    codes = torch.empty(
        (-(-in_features // dimension), columns.shape[1]), dtype=torch.uint8, device=columns.device
    )
    for start in range(0, in_features, BLOCK):
        stop = min(start + BLOCK, in_features)
        errors = torch.empty_like(columns[start:stop])
        for first in range(start, stop, dimension):
            last = min(first + dimension, stop)
            inside = slice(first, last)
            inverse = torch.linalg.inv(factor[inside, inside])
            candidates, scale = points[:, : last - first] @ inverse, by_group[first // size]
            values = (columns[inside] / scale).t() @ inverse
            code = torch.addmm(-candidates.square().sum(1), values, candidates.t(), alpha=2).argmax(1)
            codes[first // dimension] = code.to(torch.uint8)
            error = errors[first - start : last - start]
            error.copy_(((values - candidates[code]) * scale[:, None]).t())
            columns[last:stop].addmm_(factor[inside, last:stop].t(), error, alpha=-1)
        columns[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    return PackedWeight.from_points(codes.t(), scales, coding, in_features)
