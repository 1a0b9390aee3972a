"""Hadamard matrices by blocks, with signs before them: in and out, in sums and differences alone.

Sylvester's Hadamard matrix `H` of a power of two is applied by the fast Walsh-Hadamard transform: in each of
its rounds two values give way to their sum and their difference. Each row is summed in one order, whatever
rows are beside it. Where the project's code is compiled it does this on processors, with the same bits; each
way is the other's gradient.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from tailorbird.kernels import native, training_rows


class _WalshStructure(ctypes.Structure):
    """`WalshPass` of `cpp/walsh.h`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "signs", "to")),
        *((name, ctypes.c_int64) for name in ("rows", "blocks", "block")),
        ("factor", ctypes.c_float), ("back", ctypes.c_int32),
    ]  # fmt: skip


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
    return _turned(x, signs, back=False)


def rotate_back(x: Tensor, signs: Tensor) -> Tensor:
    """The inverse of `rotate`, which is its transpose: ``diag(signs) blockdiag(H / sqrt(block)) x``."""
    return _turned(x, signs, back=True)


def _turned(x: Tensor, signs: Tensor, back: bool) -> Tensor:
    if x.shape[-1] != signs.numel():
        raise ValueError(f"{x.shape[-1]} inputs for {signs.numel()} signs")
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    compiled = wide.dtype == torch.float32 and wide.is_cpu and native.available()
    if not compiled or torch.compiler.is_compiling():
        return by_operators(wide, signs, back).to(x.dtype)
    turned: Tensor = _Turned.apply(wide, signs, back)
    return turned.to(x.dtype)


def by_operators(x: Tensor, signs: Tensor, back: bool) -> Tensor:
    """The exact `rotate`, or with `back` `rotate_back`, by PyTorch's operators."""
    blocks = x.unflatten(-1, signs.shape)
    return (_hadamard(blocks) * signs if back else _hadamard(blocks * signs)).flatten(-2)


def _hadamard(x: Tensor) -> Tensor:
    """``H x / sqrt(block)`` of the last axis, a power of two."""
    shape, block = x.shape, x.shape[-1]
    span = 1
    while span < block:
        first, second = x.reshape(*shape[:-1], block // (2 * span), 2, span).unbind(-2)
        x = torch.stack((first + second, first - second), -2)
        span *= 2
    return x.reshape(shape) * (1 / math.sqrt(block))


class _Turned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, signs: Tensor, back: bool) -> Tensor:
        ctx.save_for_backward(signs)
        ctx.back = back
        return by_library(x, signs, back)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (signs,) = ctx.saved_tensors
        return _turned(gradient, signs, not ctx.back), None, None


def by_library(x: Tensor, signs: Tensor, back: bool, version: int | None = None) -> Tensor:
    """`by_operators` of float32 on the CPU, compiled.

    Parameters
    ----------
    version : int, optional
        Instructions to use, one of `native.versions()`; the fastest by default.
    """
    x, signs = x.contiguous(), signs.contiguous()
    to = torch.empty_like(x)
    blocks, block = signs.shape
    described = _WalshStructure(
        x.data_ptr(), signs.data_ptr(), to.data_ptr(), x.numel() // signs.numel(), blocks, block,
        1 / math.sqrt(block), back,
    )  # fmt: skip
    training_rows.run(native.library().tailorbird_walsh, described, x.numel(), version)
    return to
