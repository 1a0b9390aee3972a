"""OmniQuant: learn how far the grid of each group reaches, up and down, and scales between the linears.

Shao et al. 2023, "OmniQuant: Omnidirectionally Calibrated Quantization for Large Language Models"
(arXiv:2308.13137). With the least and the greatest weight of a group, the grid spans from ``b min`` to
``g max``: ``s = (g max - b min) / (2^bits - 1)``, ``z = -round(b min / s)``, and a weight becomes
``s (clamp(round(w / s) + z, 0, 2^bits - 1) - z)``. What is learned, by Adam, are two numbers for each group,
of which `g` and `b` are the sigmoids, so that the grid can't outgrow the weights and the rate has no unit;
the weights stay. A symmetric grid has one of them for both sides.

The paper begins at sigmoids of 0.98. Here learning begins at the grid and the codes of the linear method
before it, which may have narrowed the grid already; 0.98 is where it spans all weights of the group. Where
that method chose another code than the nearest, the code takes the place of the weight. ``rtn+omniquant`` is
the paper's; a grid can't move without codes moving, so that little is left of what GPTQ balanced among them.

With ``transform: true`` the scales of `transform.py` are learned beside the reaches: a weight is multiplied
by the scale of its input first, and the ends of its grid move with the outmost weights of the group. Scales
begin at one, or where a fold before this method left them, as in ``awq+rtn+omniquant``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tailorbird.compress.blocks.method import LearnedWeight, SquaredError, check_settings
from tailorbird.compress.blocks.steps import rounded
from tailorbird.compress.blocks.straight_through import StraightThroughWeight
from tailorbird.compress.blocks.transform import LearnedScales
from tailorbird.formats.packed import IntegerCoding, PackedWeight
from tailorbird.kernels.reference import group_layout

#: The sigmoid at which a grid spans all weights, and the paper begins: that of 4.
WIDEST = 1 / (1 + math.exp(-4))


@dataclass(frozen=True)
class OmniQuant(SquaredError):
    """How far grids reach, and scales between linears.

    Parameters
    ----------
    steps : int
        Updates in each block.
    batch : int
        Calibration windows in an update.
    rate : float
        Of what the sigmoid is taken of.
    transform : bool
        Whether scales are learned, too.
    transform_rate : float
        Of the logarithms of scales.
    """

    family: ClassVar[str] = "quantize"
    kind: ClassVar[str] = "block method"
    paper: ClassVar[str] = "Shao et al. 2023, arXiv:2308.13137"
    requirements: ClassVar[frozenset[str]] = frozenset({"outputs"})

    steps: int = 200
    batch: int = 8
    rate: float = 0.1
    transform: bool = False
    transform_rate: float = 0.005

    def __post_init__(self) -> None:
        check_settings("omniquant", self)

    def begin(self, weight: Tensor, rounded: PackedWeight, coding: IntegerCoding) -> LearnedWeight:
        """The reach that the grid has."""
        return OmniQuantWeight(weight, rounded, coding)

    def optimizer(self, weights: Sequence[LearnedWeight]) -> Optimizer:
        """Adam over the reaches of all groups, and over scales."""
        found = [one for one in weights if isinstance(one, OmniQuantWeight)]
        scales = dict.fromkeys(one.inputs for one in found if one.inputs is not None)
        return torch.optim.Adam(
            [
                {"params": [reach for one in found for reach in one.reaches], "lr": self.rate},
                {"params": [each.logarithms for each in scales], "lr": self.transform_rate},
            ]
        )


class OmniQuantWeight(StraightThroughWeight):
    """One linear: what sigmoids are taken of, for both sides of zero ``[out_features, groups]``.

    Reaches are relative to those where learning begins, which are exactly one then.

    Attributes
    ----------
    inputs, outputs : LearnedScales or None
        By which columns are multiplied and rows divided; `forward` gives the weight without them.
    """

    def __init__(self, weight: Tensor, packed: PackedWeight, coding: IntegerCoding) -> None:
        super().__init__(packed, coding)
        own = weight.float() / self.each(self.began.scales)
        self.weight = self._fixed(own)
        self.inputs: LearnedScales | None = None
        self.outputs: LearnedScales | None = None
        sides = self.top - self.began.zeros, self.began.zeros
        ends = self._of_groups(own), self._of_groups(-own)
        wider = [widest(outmost, side) for outmost, side in zip(ends, sides, strict=True)]
        if coding.symmetric:
            wider = [torch.maximum(*wider)]
        self.reaches = nn.ParameterList((WIDEST / one).logit() for one in wider)
        self.begins = [reach.detach().sigmoid() for reach in self.reaches]
        self.outmost = self._outmost(self.weight)

    def _fixed(self, own: Tensor) -> Tensor:
        """Weights in steps from zero: their own, but where the linear method chose another code, that one."""
        zeros = self.each(self.began.zeros)
        nearest = (own.round() + zeros).clamp(0, self.top)
        return torch.where(nearest == self.began.codes, own, self.began.codes - zeros)

    def _of_groups(self, values: Tensor) -> Tensor:
        """The greatest value of each group, ``[out_features, groups]``."""
        groups, size = group_layout(self.in_features, self.coding.group_size)
        padding = groups * size - self.in_features
        padded = nn.functional.pad(values, (0, padding), value=-torch.inf)
        return padded.view(len(values), groups, size).amax(2)

    def _outmost(self, values: Tensor) -> list[Tensor]:
        """How far the weights of each group lie from zero, on each side that has a reach of its own."""
        if self.coding.symmetric:
            return [self._of_groups(values.abs())]
        return [self._of_groups(values).clamp(min=0), self._of_groups(-values).clamp(min=0)]

    def from_zero(self) -> tuple[Tensor, Tensor, Tensor]:
        found = [reach.sigmoid() / begin for reach, begin in zip(self.reaches, self.begins, strict=True)]
        values = self.weight
        if self.inputs is not None:
            values = values * self.inputs()
            grown = map(growth, self._outmost(values), self.outmost)
            found = [reach * factor for reach, factor in zip(found, grown, strict=True)]
        up, down = found[0], found[-1]
        zeros = self.began.zeros
        factors = (up * (self.top - zeros) + down * zeros) / self.top
        zeros = rounded(down * zeros / factors)
        scales = self.began.scales * factors
        if self.outputs is not None:
            scales = scales / self.outputs()[:, None]
        return values / self.each(factors), scales, zeros

    def forward(self) -> Tensor:
        weight = super().forward()
        if self.outputs is not None:
            weight = weight * self.outputs()[:, None]
        return weight if self.inputs is None else weight / self.inputs()

    def limit(self) -> None:
        for scales in (self.inputs, self.outputs):
            if scales is not None:
                scales.limit()

    def settle(self) -> None:
        for scales in (self.inputs, self.outputs):
            if scales is not None:
                scales.settle()


def growth(now: Tensor, before: Tensor) -> Tensor:
    """How many times as far from zero the outmost weights lie; 1 where there were none."""
    return torch.where(before > 0, now / before.clamp(min=torch.finfo(before.dtype).tiny), 1.0)


def widest(outmost: Tensor, side: Tensor) -> Tensor:
    """How many times as far a side of the grid may reach: to the outmost weight, at least where it does now.

    Parameters
    ----------
    outmost, side : Tensor[out_features, groups], float32
        The outmost weight, and where the grid ends, in steps from zero; a side may have none.
    """
    return torch.where(side > 0, outmost / side.clamp(min=1), 1.0).clamp(min=1.0)
