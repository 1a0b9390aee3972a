"""Products with packed weights for training: the forward one, and the gradient of its input.

A panel is a rectangle of the weight, dequantized by the compiled library into a buffer of a few megabytes, in
the dtype of the activations. PyTorch's dense product multiplies by it, and the next panel takes its place.
Forward a panel is some rows and all columns, backward all rows and some columns, so that each result is one
sum; only where a weight has too many rows for that, as a vocabulary's has, partial gradients are added in
float32. The dense weight exists nowhere, and the backward pass needs nothing but the stored tensors. Both
products are linear, and each is the other's gradient, so that they can be differentiated any number of times.

How a sum is ordered is up to PyTorch's product, which may take another order for another number of rows.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tailorbird.kernels import native
from tailorbird.kernels.operands import OF_WEIGHT, check, check_inputs, contiguous

#: Size of the dequantized panel.
PANEL_BYTES = 4 << 20
#: Rows of a forward panel and columns of a backward one are a multiple of this.
MULTIPLE = 16
#: Columns of a backward panel, at least where there are so many: with fewer the dense product is slow.
FEWEST_COLUMNS = 64


@dataclass(frozen=True, eq=False)
class StoredWeight:
    """A packed weight as it is stored; tensors and numbers as in `reference.dequantize`.

    Parameters
    ----------
    codes : Tensor[out_features, ceil(in_features * bits / 8)], uint8
    scales : Tensor[out_features, groups], float16 or bfloat16
    zeros : Tensor[out_features, ceil(groups * bits / 8)], uint8, or None
    bits, group_size, in_features : int
        Groups are as in `native.serves`.
    order : Tensor[in_features], integer, or None
    levels : Tensor[16], int8, or None
        Of a codebook, whose codes have 4 bits; None where codes are integers.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    group_size: int
    in_features: int
    order: Tensor | None = None
    levels: Tensor | None = None


def serves(coding: Any, in_features: int) -> bool:
    """Whether the compiled library dequantizes pieces of such a weight."""
    return native.serves(coding, in_features) and (
        coding.levels is None or (coding.kind != "vector" and coding.bits == native.CODEBOOK_BITS)
    )


def linear(x: Tensor, weight: StoredWeight) -> Tensor:
    """`x [rows, in_features]` times the weight: `[rows, out_features]` in the dtype of `x`.

    Can be differentiated by `x`.

    Parameters
    ----------
    x : Tensor[rows, in_features], float32 or bfloat16
        The weight is rounded to this dtype; sums are float32.
    weight : StoredWeight
    """
    return torch.ops.tailorbird.panel_linear(
        x, weight.codes, weight.scales, weight.zeros, weight.order, weight.levels,
        weight.bits, weight.group_size, weight.in_features,
    )  # fmt: skip


def _pieces(total: int, step: int) -> Iterator[tuple[int, int]]:
    """(begin, length) of consecutive pieces of `step`; the last may be shorter."""
    for begin in range(0, total, step):
        yield begin, min(step, total - begin)


def _fitting(length: int, dtype: torch.dtype) -> int:
    """How many vectors of `length` values fit into a panel: a multiple of `MULTIPLE`, and at least that."""
    return max(PANEL_BYTES // (length * dtype.itemsize) // MULTIPLE, 1) * MULTIPLE


def _linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    order: Tensor | None,
    levels: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
) -> Tensor:
    x, codes, scales, zeros, order = contiguous(x, codes, scales, zeros, order)
    table = None if levels is None else levels.float()
    weight = native.described_as_stored(codes, scales, zeros, bits, group_size, in_features, table)
    check_inputs(x, (*x.shape[:1], in_features))
    x = _rearranged(x, order)
    out_features = codes.shape[0]
    y = x.new_empty(len(x), out_features)
    step = min(_fitting(in_features, x.dtype), out_features)
    buffer = x.new_empty(step * in_features)
    for row, count in _pieces(out_features, step):
        panel = buffer[: count * in_features].view(count, in_features)
        native.dequantize(weight, row, 0, panel)
        torch.mm(x, panel.t(), out=y[:, row : row + count])
    return y


def _linear_gradient(
    gradient: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    order: Tensor | None,
    levels: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
) -> Tensor:
    """`gradient [rows, out_features]` of the output to that of the input `[rows, in_features]`.

    Where rows of the weight are cut too, each piece's sums are rounded to the dtype and added in float32.
    """
    gradient, codes, scales, zeros, order = contiguous(gradient, codes, scales, zeros, order)
    table = None if levels is None else levels.float()
    weight = native.described_as_stored(codes, scales, zeros, bits, group_size, in_features, table)
    out_features, dtype = codes.shape[0], gradient.dtype
    check_inputs(gradient, (*gradient.shape[:1], out_features), "`gradient`")
    x = gradient.new_empty(len(gradient), in_features)
    length = min(out_features, _fitting(FEWEST_COLUMNS, dtype))
    step = min(_fitting(length, dtype), in_features)
    buffer = gradient.new_empty(length * step)
    for column, count in _pieces(in_features, step):
        products = (
            gradient[:, row : row + rows]
            @ native.dequantize(weight, row, column, buffer[: rows * count].view(rows, count))
            for row, rows in _pieces(out_features, length)
        )
        x[:, column : column + count] = functools.reduce(lambda total, next: total.float() + next, products)
    return _rearranged(x, None if order is None else order.argsort())


def _rearranged(x: Tensor, order: Tensor | None) -> Tensor:
    """Columns of `x` in another order."""
    if order is None:
        return x
    check("`order`", order, (x.shape[1],), (torch.int32, torch.int64), OF_WEIGHT)
    # `gather` moves 16-bit values several times as fast as `index_select`
    return x.gather(1, order.long().expand(x.shape))


_WEIGHT = (
    "Tensor codes, Tensor scales, Tensor? zeros, Tensor? order, Tensor? levels, "
    "int bits, int group_size, int in_features"
)
torch.library.define("tailorbird::panel_linear", f"(Tensor x, {_WEIGHT}) -> Tensor")
torch.library.define("tailorbird::panel_linear_gradient", f"(Tensor gradient, {_WEIGHT}) -> Tensor")
torch.library.impl("tailorbird::panel_linear", "cpu", _linear)
torch.library.impl("tailorbird::panel_linear_gradient", "cpu", _linear_gradient)


@torch.library.register_fake("tailorbird::panel_linear")
def _shape_of_linear(x: Tensor, codes: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[0])


@torch.library.register_fake("tailorbird::panel_linear_gradient")
def _shape_of_gradient(gradient: Tensor, *weight: Any) -> Tensor:
    return gradient.new_empty(gradient.shape[0], weight[-1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:6])
    ctx.numbers = inputs[6:]


def _gradient_of_linear(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    gradient = torch.ops.tailorbird.panel_linear_gradient(gradient, *ctx.saved_tensors, *ctx.numbers)
    return gradient, *[None] * 8


def _gradient_of_gradient(ctx: Any, x: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.tailorbird.panel_linear(x, *ctx.saved_tensors, *ctx.numbers), *[None] * 8


torch.library.register_autograd("tailorbird::panel_linear", _gradient_of_linear, setup_context=_keep)
torch.library.register_autograd(
    "tailorbird::panel_linear_gradient", _gradient_of_gradient, setup_context=_keep
)
