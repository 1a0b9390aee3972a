"""AWQ as a fold: scales that move the inputs that matter to where rounding hurts them less.

Lin et al. 2023, "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration"
(arXiv:2306.00978). A linear computes the same when its input `j` is divided by `s_j` and column `j` of
its weight multiplied by it, but its rounded weight doesn't: with `s_j > 1` the column gets a share of the
group's range that is larger. The scales are `s_j = E[|x_j|]^alpha`, divided by
`sqrt(max_j s_j * min_j s_j)`, and `alpha` is the one of a grid with the least output error after
rounding, summed over all linears that read the input.

The division has to happen before the linear: in the norm that feeds it, or in the rows of a linear whose
outputs reach the input one by one (value to output projection, up to down projection). `apply_norm_fold`
and `apply_pair_fold` do both sides at once. Rounding afterwards is any linear method's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from tailorbird.calibrate.statistics import LinearStatistics
from tailorbird.errors import SettingsError
from tailorbird.formats.packed import Coding
from tailorbird.linear.error import row_energies
from tailorbird.linear.quantize.rtn import Rtn

#: scales before normalisation are at least this fraction of the greatest
LEAST_SCALE = 1e-4


class Fold(NamedTuple):
    """Scales of one input and what they bring.

    Parameters
    ----------
    scales : Tensor[in_features], float32
        Positive; all one where no other were better.
    alpha : float
        Exponent that gave them; 0 for ones.
    error : float
        Relative squared output error `sum tr(D H D^T) / sum tr(W H W^T)` over the linears after the fold
        and rounding.
    error_before : float
        The same without the fold.
    """

    scales: Tensor
    alpha: float
    error: float
    error_before: float


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


@dataclass(frozen=True)
class Awq:
    """Search for the scales of one input.

    Parameters
    ----------
    grid : int
        Exponents tried: `0, 1/grid, ..., (grid - 1)/grid`.
    clip_search : bool
        Whether the rounding inside the search tries narrower grids; slower by an order of magnitude.
    """

    family: ClassVar[str] = "quantize"
    kind: ClassVar[str] = "fold"
    paper: ClassVar[str] = "Lin et al. 2023, arXiv:2306.00978"
    requirements: ClassVar[frozenset[str]] = frozenset({"gram"})

    grid: int = 20
    clip_search: bool = False

    def __post_init__(self) -> None:
        if self.grid < 1:
            raise SettingsError(f"grid {self.grid!r} of awq", "at least 1", "correct the setting")

    @property
    def needs(self) -> frozenset[str]:
        """Which statistics are read: "gram" (which comes with the mean magnitudes)."""
        return self.requirements

    def __call__(
        self, weights: Sequence[Tensor], statistics: LinearStatistics, codings: Sequence[Coding]
    ) -> Fold:
        """Find the scales.

        Parameters
        ----------
        weights : sequence of Tensor[out_features, in_features], float32
            All linears that read the input: the readers of a norm, or the target of a scale pair. Not
            modified.
        statistics : LinearStatistics
            Of that input.
        codings : sequence of Coding
            What each of the linears will be rounded to.

        Returns
        -------
        Fold
            Its error is never above that without a fold.

        Raises
        ------
        ValueError
            When there isn't one coding per weight.
        """
        method = Rtn(self.clip_search)
        energy = sum(float(row_energies(weight, statistics.gram).sum()) for weight in weights)

        def error_with(scales: Tensor) -> float:
            folded = scale_statistics(statistics, scales)
            error = 0.0
            for weight, coding in zip(weights, codings, strict=True):
                scaled = weight.float() * scales
                rounded = method(scaled, folded, coding).dequantize()
                error += float(row_energies(scaled.sub_(rounded), folded.gram).sum())
            return error / energy if energy > 0 else error

        ones = torch.ones_like(statistics.mean_abs)
        error_before = error_with(ones)
        best = Fold(ones, 0.0, error_before, error_before)
        for step in range(1, self.grid):
            alpha = step / self.grid
            scales = magnitude_scales(statistics.mean_abs, alpha)
            error = error_with(scales)
            if error < best.error:
                best = Fold(scales, alpha, error, error_before)
        return best


def magnitude_scales(mean_abs: Tensor, alpha: float) -> Tensor:
    """`mean_abs^alpha` over the geometric mean of its extremes; 1 for inputs that are always zero.

    Parameters
    ----------
    mean_abs : Tensor[in_features], float32, non-negative
    alpha : float

    Returns
    -------
    Tensor[in_features], float32
        Positive.
    """
    live = mean_abs > 0
    if not bool(live.any()):
        return torch.ones_like(mean_abs)
    powers = (mean_abs / mean_abs.max()).pow(alpha).clamp(min=LEAST_SCALE)
    least, greatest = powers[live].min(), powers[live].max()
    return torch.where(live, powers / (least * greatest).sqrt(), 1.0)


def scale_statistics(statistics: LinearStatistics, scales: Tensor) -> LinearStatistics:
    """The statistics of an input that has been divided by `scales` `[in_features]`."""
    inverse = 1 / scales
    return LinearStatistics(
        gram=(statistics.gram * inverse).mul_(inverse[:, None]),
        cross=None if statistics.cross is None else (statistics.cross * inverse).mul_(inverse[:, None]),
        mean_abs=statistics.mean_abs * inverse,
        tokens=statistics.tokens,
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
