"""Scales that move between an input and the weights that read it: what a fold does with them.

A linear computes the same when its input `j` is divided by `s_j` and column `j` of its weight multiplied by
it; its rounded weight, or a rounded input, doesn't. The division has to happen before the linear: in the norm
that feeds it, or in the rows of a linear whose outputs reach the input one by one (value to output
projection, up to down projection). `apply_norm_fold` and `apply_pair_fold` do both sides at once. Likewise a
shift moves from the bias of a norm into those of its readers (`apply_norm_shift`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tailorbird.calibrate.statistics import LinearStatistics

#: scales are at least this fraction of the greatest
LEAST_SCALE = 1e-4


class FoldedNorm(NamedTuple):
    """A norm and the linears behind it after a fold.

    Parameters
    ----------
    weight : Tensor[in_features]
        Of the norm, in the dtype that it had.
    bias : Tensor[in_features] or None
        Of the norm, in the dtype that it had.
    linears : list of Tensor[out_features, in_features], float32
        Weights of the linears, in the order given.
    scales : Tensor[in_features], float32
        Those in effect: by these, and not by the scales asked for, the inputs are divided.
    """

    weight: Tensor
    bias: Tensor | None
    linears: list[Tensor]
    scales: Tensor


class ShiftedNorm(NamedTuple):
    """Biases of a norm and of the linears behind it after a shift, in the dtypes that they had.

    Parameters
    ----------
    bias : Tensor[in_features]
        Of the norm.
    readers : list of Tensor[out_features]
        Of the linears, in the order given.
    shift : Tensor[in_features], float32
        The one in effect: by this, and not by the shift asked for, the input is lessened.
    """

    bias: Tensor
    readers: list[Tensor]
    shift: Tensor


class FoldedPair(NamedTuple):
    """Two linears after a fold between them.

    Parameters
    ----------
    weight : Tensor[source_out, source_in], float32
        Of the source, its rows divided.
    bias : Tensor[source_out] or None
        Of the source, divided likewise, in the dtype that it had.
    target : Tensor[out_features, in_features], float32
        Weight of the target, its columns multiplied.
    """

    weight: Tensor
    bias: Tensor | None
    target: Tensor


def greatest_inputs(statistics: LinearStatistics) -> Tensor:
    """`max |x|` of every input, ``[in_features]``.

    Raises
    ------
    ValueError
        When the statistics don't hold it.
    """
    if statistics.max_abs is None:
        raise ValueError("statistics without the greatest magnitudes, of which scales are made")
    return statistics.max_abs


def centred_scales(wanted: Tensor, live: Tensor) -> Tensor:
    """Scales up to a common factor, which changes nothing: over the geometric mean of their extremes.

    Parameters
    ----------
    wanted : Tensor[in_features], float32, non-negative
        Raised to `LEAST_SCALE` times the greatest where they are smaller.
    live : Tensor[in_features], bool
        Inputs to be scaled; 1 for all others.

    Returns
    -------
    Tensor[in_features], float32
        Positive.
    """
    if not bool(live.any()):
        return torch.ones_like(wanted)
    scales = (wanted / wanted[live].max()).clamp(min=LEAST_SCALE)
    least, greatest = scales[live].min(), scales[live].max()
    return torch.where(live, scales / (least * greatest).sqrt(), 1.0)


def scale_statistics(statistics: LinearStatistics, scales: Tensor) -> LinearStatistics:
    """The statistics of an input that has been divided by `scales` `[in_features]`."""
    inverse = 1 / scales
    return LinearStatistics(
        gram=(statistics.gram * inverse).mul_(inverse[:, None]),
        cross=None if statistics.cross is None else (statistics.cross * inverse).mul_(inverse[:, None]),
        mean_abs=statistics.mean_abs * inverse,
        tokens=statistics.tokens,
        max_abs=None if statistics.max_abs is None else statistics.max_abs * inverse,
    )


def apply_norm_fold(
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    linears: Sequence[Tensor],
    scales: Tensor,
    offset: bool = False,
) -> FoldedNorm:
    """Divide a norm's output by `scales` and multiply the columns of all its readers by them.

    The norm keeps its dtype, so its divided weight is rounded; the readers are multiplied by the ratio of
    the norm's old weight to its new one instead of by `scales`, so that the two still cancel. Without a
    bias the function of the block is then the same in exact arithmetic; a bias is rounded once more. A
    channel whose divided weight the dtype can't tell from none at all stays as it is.

    Parameters
    ----------
    norm_weight : Tensor[in_features], float
        Not modified, like all arguments.
    norm_bias : Tensor[in_features], float, or None
    linears : sequence of Tensor[out_features, in_features], float
        Weights of all linears that read the norm's output.
    scales : Tensor[in_features], float, positive
    offset : bool
        The norm multiplies by one plus its weight (Gemma).

    Returns
    -------
    FoldedNorm
        The same bits for the same arguments.
    """
    gain = norm_weight.float() + 1 if offset else norm_weight.float()
    divided = gain / scales.float()
    weight = (divided - 1 if offset else divided).to(norm_weight.dtype)
    stored_gain = weight.float() + 1 if offset else weight.float()
    lost = (gain != 0) & (stored_gain == 0)
    weight = torch.where(lost, norm_weight, weight)
    cancels = (gain != 0) & ~lost
    effective = torch.where(cancels, gain / torch.where(cancels, stored_gain, 1.0), scales.float())
    effective = torch.where(lost, 1.0, effective)
    bias = None if norm_bias is None else (norm_bias.float() / effective).to(norm_bias.dtype)
    return FoldedNorm(weight, bias, [linear.float() * effective for linear in linears], effective)


def apply_norm_shift(
    norm_bias: Tensor, readers: Iterable[tuple[Tensor, Tensor]], shift: Tensor
) -> ShiftedNorm:
    """Take `shift` from a norm's output, and add what its readers lose by it to their biases.

    The norm keeps its dtype, so that its new bias is rounded; the readers get what that makes of the shift.

    Parameters
    ----------
    norm_bias : Tensor[in_features], float
        Not modified, like all arguments.
    readers : iterable of (Tensor[out_features, in_features], Tensor[out_features])
        Weights and biases of all linears that read the norm's output.
    shift : Tensor[in_features], float
    """
    bias = (norm_bias.double() - shift.double()).to(norm_bias.dtype)
    effective = norm_bias.double() - bias.double()
    moved = [(own.double() + weight.double() @ effective).to(own.dtype) for weight, own in readers]
    return ShiftedNorm(bias, moved, effective.float())


def apply_pair_fold(
    source_weight: Tensor,
    source_bias: Tensor | None,
    target_weight: Tensor,
    scales: Tensor,
    first_row: int = 0,
) -> FoldedPair:
    """Divide a linear's output channels by `scales` and multiply another's input channels by them.

    Parameters
    ----------
    source_weight : Tensor[source_out, source_in], float
        Not modified, like all arguments.
    source_bias : Tensor[source_out], float, or None
    target_weight : Tensor[out_features, in_features], float
    scales : Tensor[in_features], float, positive
    first_row : int
        Where the channels start among the source's rows, when it is fused with others (`qkv`, `gate_up`).

    Returns
    -------
    FoldedPair

    Raises
    ------
    ValueError
        When the source doesn't have `in_features` rows from `first_row` on.
    """
    rows = slice(first_row, first_row + len(scales))
    if len(scales) != target_weight.shape[1] or rows.stop > source_weight.shape[0]:
        raise ValueError(
            f"{len(scales)} scales from row {first_row} on, for a source {list(source_weight.shape)} and a "
            f"target {list(target_weight.shape)}"
        )
    inverse = 1 / scales.float()
    weight = source_weight.float().clone()
    weight[rows] *= inverse[:, None]
    bias = None
    if source_bias is not None:
        divided = source_bias.float().clone()
        divided[rows] *= inverse
        bias = divided.to(source_bias.dtype)
    return FoldedPair(weight, bias, target_weight.float() * scales.float())
