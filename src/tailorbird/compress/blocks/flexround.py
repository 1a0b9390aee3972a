"""FlexRound: divide every weight by a learned number of its own before it is rounded.

Lee et al. 2023, "FlexRound: Learnable Rounding based on Element-wise Division for Post-Training Quantization"
(arXiv:2306.00317). A weight `w` becomes ``s1 round(w / (s1 S2 s3))``, with a step of the grid `s1`, a number
`S2` for every weight and one `s3` for every row of the output, all positive. The gradient of a divisor grows
with its weight, so that large weights may come to lie several steps away, and those near zero stay there.

The paper has one `s1` for a whole tensor; here it is the scale of each group, beside the group's zero point,
which stays. As in the authors' code the logarithms are learned, by Adam, so that rates are relative
changes. Learning begins at the codes of the linear method before it: `w` is moved to where they are the
nearest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tailorbird.compress.blocks.method import LearnedWeight, SquaredError, check_settings
from tailorbird.compress.blocks.steps import anchored
from tailorbird.compress.blocks.straight_through import StraightThroughWeight
from tailorbird.formats.packed import IntegerCoding, PackedWeight


@dataclass(frozen=True)
class FlexRound(SquaredError):
    """Divisors of weights and rows, and scales.

    Parameters
    ----------
    steps : int
        Updates in each block.
    batch : int
        Calibration windows in an update.
    rate : float
        Of the logarithms of the divisors.
    scale_rate : float
        Of the logarithms of the scales.
    """

    family: ClassVar[str] = "quantize"
    kind: ClassVar[str] = "block method"
    paper: ClassVar[str] = "Lee et al. 2023, arXiv:2306.00317"
    requirements: ClassVar[frozenset[str]] = frozenset({"outputs"})

    steps: int = 200
    batch: int = 8
    rate: float = 0.007
    scale_rate: float = 0.002

    def __post_init__(self) -> None:
        check_settings("flexround", self)

    def begin(self, weight: Tensor, rounded: PackedWeight, coding: IntegerCoding) -> LearnedWeight:
        """Divisors of one, and the scales as they are."""
        return FlexRoundWeight(weight, rounded, coding)

    def optimizer(self, weights: Sequence[LearnedWeight]) -> Optimizer:
        """Adam over all logarithms."""
        found = [one for one in weights if isinstance(one, FlexRoundWeight)]
        divisors = [each for one in found for each in (one.of_weights, one.of_rows)]
        return torch.optim.Adam(
            [
                {"params": divisors, "lr": self.rate},
                {"params": [one.of_scales for one in found], "lr": self.scale_rate},
            ]
        )


class FlexRoundWeight(StraightThroughWeight):
    """One linear: logarithms of `S2`, of `s3`, and of `s1` less that of the scales where learning begins."""

    def __init__(self, weight: Tensor, packed: PackedWeight, coding: IntegerCoding) -> None:
        super().__init__(packed, coding)
        self.undivided = anchored(weight, self.began, coding) - self.each(self.began.zeros)
        self.of_weights = nn.Parameter(torch.zeros_like(self.undivided))
        self.of_rows = nn.Parameter(self.undivided.new_zeros(len(self.undivided), 1))
        self.of_scales = nn.Parameter(torch.zeros_like(self.began.scales))

    def from_zero(self) -> tuple[Tensor, Tensor, Tensor]:
        divisors = (self.each(self.of_scales) + self.of_weights + self.of_rows).exp()
        return self.undivided / divisors, self.began.scales * self.of_scales.exp(), self.began.zeros
