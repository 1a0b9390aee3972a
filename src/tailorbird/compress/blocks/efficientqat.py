"""EfficientQAT's first phase, Block-AP: learn all that a block's linears consist of.

Chen et al. 2024, "EfficientQAT: Efficient Quantization-Aware Training for Large Language Models"
(arXiv:2407.11062). With a weight `w`, and the scale `s` and zero point `z` of its group, what is stored is
``s (clamp(round(w / s) + round(z), 0, 2^bits - 1) - round(z))``; weights, scales and zero points are all
learned, by Adam, and each rounding lets gradients through. Zero points thus end as whole numbers.

The paper's rates are absolute; here those of weights and zero points are in steps of the grid, and those of
scales relative to themselves, so that one rate fits all models. Learning begins at the codes of the linear
method before it: `w` is moved to where they are the nearest. The paper's second phase learns scales of
the whole model alone, by the loss of text; `distil`, a model method, learns codes and scales together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tailorbird.compress.blocks.method import LearnedWeight, SquaredError, check_settings
from tailorbird.compress.blocks.steps import anchored, rounded
from tailorbird.compress.blocks.straight_through import StraightThroughWeight
from tailorbird.formats.packed import IntegerCoding, PackedWeight

#: Scales keep their sign, and so much of their size.
LEAST_FACTOR = 0.01


@dataclass(frozen=True)
class EfficientQat(SquaredError):
    """Weights, scales and zero points.

    Parameters
    ----------
    steps : int
        Updates in each block.
    batch : int
        Calibration windows in an update.
    rate : float
        Of weights, in steps of their grid.
    scale_rate : float
        Of scales, relative to themselves.
    zero_rate : float
        Of zero points, in steps; symmetric grids have none to learn.
    """

    family: ClassVar[str] = "quantize"
    kind: ClassVar[str] = "block method"
    paper: ClassVar[str] = "Chen et al. 2024, arXiv:2407.11062"
    requirements: ClassVar[frozenset[str]] = frozenset({"outputs"})

    steps: int = 200
    batch: int = 8
    rate: float = 0.007
    scale_rate: float = 0.002
    zero_rate: float = 0.002

    def __post_init__(self) -> None:
        check_settings("efficientqat", self)

    def begin(self, weight: Tensor, rounded: PackedWeight, coding: IntegerCoding) -> LearnedWeight:
        """The weight on the side of its code where it came from; scales and zero points as they are."""
        return EfficientQatWeight(weight, rounded, coding)

    def optimizer(self, weights: Sequence[LearnedWeight]) -> Optimizer:
        """Adam over weights, scales and zero points."""
        found = [one for one in weights if isinstance(one, EfficientQatWeight)]
        return torch.optim.Adam(
            [
                {"params": [one.weight for one in found], "lr": self.rate},
                {"params": [one.factors for one in found], "lr": self.scale_rate},
                {"params": [one.zeros for one in found], "lr": self.zero_rate},
            ]
        )


class EfficientQatWeight(StraightThroughWeight):
    """One linear: its weights in steps of the grid where learning begins, factors of scales, zero points."""

    def __init__(self, weight: Tensor, packed: PackedWeight, coding: IntegerCoding) -> None:
        super().__init__(packed, coding)
        self.weight = nn.Parameter(anchored(weight, self.began, coding) - self.each(self.began.zeros))
        self.factors = nn.Parameter(torch.ones_like(self.began.scales))
        self.zeros = nn.Parameter(self.began.zeros.clone(), requires_grad=not coding.symmetric)

    def from_zero(self) -> tuple[Tensor, Tensor, Tensor]:
        scales = self.began.scales * self.factors
        return self.weight / self.each(self.factors), scales, rounded(self.zeros)

    @torch.no_grad()
    def limit(self) -> None:
        self.factors.clamp_(min=LEAST_FACTOR)
        self.zeros.clamp_(0, self.top)
