"""Kronecker products of two small matrices, applied without being formed.

A vector of `a b` inputs is read as a matrix ``X [a, b]``, row by row, and becomes ``A^T X B``, which is
``(A ⊗ B)^T x``: `a b (a + b)` products in place of `(a b)^2`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mix(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``T x`` for every vector of the last axis, ``T = (A ⊗ B)^T``.

    Each vector is multiplied by itself, so that its result has the same bits whatever vectors are beside it.

    Parameters
    ----------
    x : Tensor[..., in_features], floating point
        What is narrower than float32 is mixed in float32.
    left : Tensor[a, a]
        `A`.
    right : Tensor[b, b]
        `B`; `a b` is `in_features`.

    Returns
    -------
    Tensor[..., in_features]
        In the dtype of `x`, which it is rounded to once.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = x.to(wide).reshape(-1, len(left), len(right))
    with torch.autocast(x.device.type, enabled=False):
        half = torch.bmm(rows, right.to(wide).expand(len(rows), -1, -1))
        mixed = torch.bmm(left.to(wide).t().expand(len(rows), -1, -1), half)
    return mixed.reshape(x.shape).to(x.dtype)


def mix_rows(weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``W T^T`` of a weight ``[out_features, in_features]``: as `mix`, all rows in one product."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    rows = weight.to(wide).unflatten(-1, (len(left), len(right)))
    with torch.autocast(weight.device.type, enabled=False):
        mixed = left.to(wide).t() @ (rows @ right.to(wide))
    return mixed.flatten(-2).to(weight.dtype)


def behind(weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``W T^-1``, what multiplies mixed inputs in the place of `weight`; inverses are taken in float64."""
    inverses = [torch.linalg.inv(matrix.double()).t().to(weight) for matrix in (left, right)]
    return mix_rows(weight, *inverses)


def in_front(weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``V T``, the weight that `behind` made `V` of."""
    return mix_rows(weight, left.t(), right.t())
