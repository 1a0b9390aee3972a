"""SpQR: weights that rounding would harm most stay in 16 bits, others are rounded with error feedback.

Dettmers et al. 2023, "SpQR: A Sparse-Quantized Representation for Near-Lossless LLM Weight Compression"
(arXiv:2306.03078). Rounding weight `q` of a row to `v_q` costs, once all others of the row have made up
for it as well as they can, `(w_q - v_q)^2 / [H^-1]_qq` with `H = E[x x^T]`. An outlier widens the grid of
its whole group besides, so that what it is judged by is how much less its group costs without it: the sum
of these errors on the group's grid, less that of the others on a grid of their own. Outliers of one group
hide each other, as the grid stays wide until all are gone: so the largest of a group are left out one, two
and four at a time (`TOGETHER`), and each is given its share. The paper leaves out each weight alone; those
that aren't among the largest move no grid, and of them only their own error is spared.

The paper keeps what lies above a threshold. Here a share of the weights that is stated beforehand is
kept, the most harmful of the linear, so that its bytes are known. Groups are those of the coding, with
scales in 16 bits: the paper's second level, scales and zero points of small groups that are rounded
themselves, has no place in the format.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from tailorbird.formats.packed import CodesCoding, GroupedCoding, PackedWeight
from tailorbird.kernels.reference import group_layout
from tailorbird.linear.outliers import check_outliers, count_outliers, largest
from tailorbird.linear.quantize.feedback import FeedbackMethod
from tailorbird.linear.quantize.gptq import Gptq, GptqRounding, inverse_diagonal
from tailorbird.linear.quantize.grid import coding_zero, fit_grid, nearest_codes, steps_of
from tailorbird.linear.settings import check_setting, on_grids

#: how many of a group's largest weights are left out together
TOGETHER = (1, 2, 4)


@dataclass(frozen=True, kw_only=True)
class Spqr(FeedbackMethod):
    """Error feedback around outliers, which stand beside the codes.

    Beyond weight, statistics and result it takes what GPTQ takes, and about eight float32 copies of the
    weight while outliers are looked for.

    Parameters
    ----------
    outliers : float
        Share of each linear's weights that is kept, 0 to 0.25. One of 0.01, about the paper's, takes some
        0.32 bits for each weight.
    rounds : int
        In how many parts they are chosen; after each, grids are fitted anew to what is left.
    damping, asymmetric, correction, least_token, clip_search
        As `Gptq`.
    """

    name: ClassVar[str] = "spqr"
    paper: ClassVar[str] = "Dettmers et al. 2023, arXiv:2306.03078"

    outliers: float = 0.01
    rounds: int = 4
    clip_search: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_outliers(self.name, self.outliers)
        check_setting(self.name, "rounds", self.rounds, self.rounds >= 1, "at least 1")

    @property
    def gptq(self) -> Gptq:
        """The error feedback around the outliers."""
        return replace(super().gptq, clip_search=self.clip_search)

    def round(self, rounding: GptqRounding, target: Tensor, coding: CodesCoding) -> PackedWeight:
        """Round what is aimed at, but for the outliers; without any it's GPTQ's rounding."""
        coding = on_grids(self.name, coding)
        count = count_outliers(self.outliers, *target.shape)
        if count == 0:
            return rounding.round(target, coding)
        sharpness = inverse_diagonal(rounding.factor, rounding.order).reciprocal().float()
        mask = torch.zeros_like(target, dtype=torch.bool)
        grids = _Grids(coding, rounding.statistics.gram.diagonal(), self.clip_search)
        for done in range(self.rounds):
            part = count * (done + 1) // self.rounds - count * done // self.rounds
            saved = savings(target.masked_fill(mask, 0), grids, sharpness)
            mask |= largest(saved.masked_fill(mask, -torch.inf), part)
        return rounding.round(target, coding, outliers=mask)


@dataclass(frozen=True)
class _Grids:
    """How the grids of a weight are fitted."""

    coding: GroupedCoding
    energies: Tensor
    clip_search: bool

    def errors(self, weight: Tensor) -> Tensor:
        """Squared error of every weight on the grid of its group, ``[out_features, in_features]``."""
        coding = self.coding
        scales, zeros = fit_grid(weight, coding, self.energies, self.clip_search)
        _, size = group_layout(weight.shape[1], coding.group_size)
        group_of = torch.arange(weight.shape[1], device=weight.device) // size
        scale = scales.float()[:, group_of]
        zero: Tensor | int = coding_zero(coding) if zeros is None else zeros.float()[:, group_of]
        codes = nearest_codes(weight, scale, zero, coding)
        return steps_of(codes, zero, coding).mul_(scale).sub_(weight).square_()


def savings(weight: Tensor, grids: _Grids, sharpness: Tensor) -> Tensor:
    """By how much the error of its group falls for each weight that is kept out of the codes.

    Parameters
    ----------
    weight : Tensor[out_features, in_features], float32
        Zero where it's kept out already: zero lies on every grid and costs nothing.
    grids : _Grids
    sharpness : Tensor[in_features], float32
        What a squared error of each input costs, ``1 / [H^-1]_qq``.

    Returns
    -------
    Tensor[out_features, in_features], float32
        Not negative.
    """
    columns = weight.shape[1]
    groups, size = group_layout(columns, grids.coding.group_size)

    def grouped(values: Tensor) -> Tensor:
        """``[out_features, groups, size]``, the last group filled up with zeros."""
        return pad(values, (0, groups * size - columns)).unflatten(1, (groups, size))

    found = grouped(grids.errors(weight).mul_(sharpness))
    before = found.sum(2)
    most = grouped(weight).abs().topk(min(max(TOGETHER), size), dim=2).indices
    for count in TOGETHER:
        places = most[:, :, :count]
        rest = grouped(weight).scatter(2, places, 0.0).flatten(1)[:, :columns]
        after = grouped(grids.errors(rest).mul_(sharpness)).sum(2)
        share = ((before - after) / count)[:, :, None].expand_as(places)
        found.scatter_(2, places, torch.maximum(found.gather(2, places), share))
    return found.flatten(1)[:, :columns]
