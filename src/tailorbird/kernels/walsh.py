"""Hadamard matrices by blocks, with signs before them: in and out, in sums and differences alone.

Sylvester's Hadamard matrix `H` of a power of two is applied by the fast Walsh-Hadamard transform: in each of
its rounds two values give way to their sum and their difference. Each row is summed in one order, whatever
rows are beside it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rotate(x: Tensor, signs: Tensor) -> Tensor:
    """``T x`` for every vector of the last axis, ``T = blockdiag(H / sqrt(block)) diag(signs)``.

    Parameters
    ----------
    x : Tensor[..., in_features], floating point
        What is narrower than float32 is rotated in float32.
    signs : Tensor[in_features / block, block], int8
        1 or -1.

    Returns
    -------
    Tensor[..., in_features]
        In the dtype of `x`, which it is rounded to once.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return _hadamard(wide.unflatten(-1, signs.shape) * signs).flatten(-2).to(x.dtype)


def rotate_back(x: Tensor, signs: Tensor) -> Tensor:
    """The inverse of `rotate`, which is its transpose: ``diag(signs) blockdiag(H / sqrt(block)) x``."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (_hadamard(wide.unflatten(-1, signs.shape)) * signs).flatten(-2).to(x.dtype)


def _hadamard(x: Tensor) -> Tensor:
    """``H x / sqrt(block)`` of the last axis, a power of two."""
    shape, block = x.shape, x.shape[-1]
    span = 1
    while span < block:
        first, second = x.reshape(*shape[:-1], block // (2 * span), 2, span).unbind(-2)
        x = torch.stack((first + second, first - second), -2)
        span *= 2
    return x.reshape(shape) * (1 / math.sqrt(block))
