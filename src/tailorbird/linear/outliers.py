"""Outliers of a linear method: the weights that it keeps in a sparse part, a share that is fixed beforehand.

How many they are follows from the share and the shape alone, so that the bytes of a linear are known before
anything is rounded. The share is all outliers of the linear over all of its weights, not of every row alike.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tailorbird.formats.packed import PackedWeight
from tailorbird.formats.sparse import VALUE_DTYPES, Sparse
from tailorbird.linear.settings import check_setting

if TYPE_CHECKING:
    from tailorbird.linear import LinearMethod

#: more would be dearer than codes of more bits
MOST = 0.25


def check_outliers(method: str, share: float) -> None:
    """Refuse a share that no method can keep."""
    check_setting(method, "outliers", share, 0 <= share <= MOST, f"a share of the weights, 0 to {MOST}")


def count_outliers(share: float, out_features: int, in_features: int) -> int:
    """How many weights a share of them is, rounded to a whole number."""
    return round(share * out_features * in_features)


def count_inputs(share: float, in_features: int) -> int:
    """How many inputs a share of them is, rounded to a whole number."""
    return round(share * in_features)


def sparse_of(method: LinearMethod, out_features: int, in_features: int) -> Sparse | None:
    """The sparse part that a method puts beside the codes of a linear of this shape; None for nothing.

    A method that `keeps_inputs` puts whole columns there.
    """
    if getattr(method, "keeps_inputs", False):
        count = out_features * count_inputs(method.outliers, in_features)
    else:
        count = count_outliers(method.outliers, out_features, in_features)
    return Sparse(count) if count else None


def without_outliers(method: LinearMethod) -> LinearMethod:
    """The method for embeddings and heads, which have no sparse part."""
    return dataclasses.replace(method, outliers=0.0) if method.outliers else method


def largest(scores: Tensor, count: int) -> Tensor:
    """A mask of the `count` largest values of a matrix."""
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[torch.topk(scores.flatten(), count, sorted=False).indices] = True
    return mask.view_as(scores)


def rounded_values(values: Tensor) -> Tensor:
    """Values as the sparse part stores them, in float32."""
    return values.to(VALUE_DTYPES[Sparse.dtype]).float()


def beside_base(base: PackedWeight, values: Tensor, mask: Tensor) -> PackedWeight:
    """A base with `values` ``[out_features, in_features]`` beside it where `mask` is true."""
    return base.with_sparse(values, mask, Sparse.dtype)
