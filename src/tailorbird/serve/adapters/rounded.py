"""Adapters whose matrices are rounded to bytes when they are laid out.

Each row of A and each column of B, that is, each rank, is divided by its largest magnitude / 127 and rounded
to the nearest integer. What they were divided by meets between A and B, in float32:

    B C diag(ranks) A ≈ B' [diag(b) C diag(ranks · a)] A'        with A ≈ diag(a) A', B ≈ B' diag(b)

Without a core C both become factors of ranks. Every number is off by half of its row's or column's step at
most. Adapters in a shared basis stay as they are, since A and B are others', too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from tailorbird.kernels.adapters import LinearAdapter
from tailorbird.model.weights import Weights

#: the largest code
_MOST = 127

_Place = TypeVar("_Place")
#: of a matrix by its identity: codes, and what its rows or columns were divided by
_Known = dict[int, tuple[Tensor, Tensor]]


def rounded(linear: LinearAdapter) -> LinearAdapter:
    """What an adapter makes of a linear with A and B as int8, where it has these for itself.

    Parameters
    ----------
    linear : LinearAdapter

    Returns
    -------
    LinearAdapter
        With `down` and `up` as int8 and their steps in `ranks` and `core`; or the same, where it has no
        matrices or shares them with other adapters.
    """
    return _rounded(linear, {})


def rounded_linears(linears: Mapping[_Place, LinearAdapter]) -> dict[_Place, LinearAdapter]:
    """`rounded` for all linears of an adapter; those that share `down` go on sharing it."""
    downs: _Known = {}
    return {place: _rounded(linear, downs) for place, linear in linears.items()}


def rounded_bytes(weights: Weights) -> int:
    """About what an adapter's file takes in memory once its matrices are rounded."""
    infos = (weights.info(name) for name in weights.names)
    return sum(info.nbytes // info.dtype.itemsize if len(info.shape) > 1 else info.nbytes for info in infos)


def _rounded(linear: LinearAdapter, downs: _Known) -> LinearAdapter:
    if linear.down is None or not isinstance(linear.up, Tensor):
        return linear
    if id(linear.down) not in downs:
        downs[id(linear.down)] = _codes(linear.down, dim=1)
    down, of_rows = downs[id(linear.down)]
    up, of_columns = _codes(linear.up, dim=0)
    ranks = of_rows if linear.ranks is None else of_rows * linear.ranks
    if linear.core is None:
        return replace(linear, down=down, up=up, ranks=ranks * of_columns)
    return replace(linear, down=down, up=up, ranks=ranks, core=of_columns[:, None] * linear.core)


def _codes(matrix: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Codes, int8, and steps, float32, of which there is one for everything along `dim`."""
    values = matrix.float()
    steps = values.abs().amax(dim, keepdim=True) / _MOST
    codes = (values / torch.where(steps > 0, steps, 1.0)).round().clamp(-_MOST, _MOST)
    return codes.to(torch.int8), steps.flatten()
