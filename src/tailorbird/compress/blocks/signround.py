"""SignRound: learn for every weight whether it is rounded up or down, by the signs of gradients.

Cheng et al. 2023, "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs"
(arXiv:2309.05516). A weight becomes ``s (clamp(round(w / s + z + v), 0, 2^bits - 1) - z)`` with a learned
offset `v` between -1/2 and 1/2, and a learned factor of the scale of each group. Every update moves each
number by the rate, up or down, and the rate falls to zero in equal steps: in all, an offset can just reach an
end of its range.

The paper begins at the nearest codes. Here it begins at those of the linear method before it, so that
``gptq+signround`` refines what GPTQ found and ``rtn+signround`` is the paper's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tailorbird.compress.blocks.method import LearnedWeight, SquaredError, check_settings
from tailorbird.compress.blocks.steps import anchored
from tailorbird.compress.blocks.straight_through import StraightThroughWeight
from tailorbird.formats.packed import IntegerCoding, PackedWeight

#: How far offsets reach, and factors of scales from one.
WIDEST_OFFSET, WIDEST_FACTOR = 0.5, 0.5


@dataclass(frozen=True)
class SignRound(SquaredError):
    """Offsets before the rounding, and factors of the scales, by signed gradient descent.

    Parameters
    ----------
    steps : int
        Updates in each block.
    batch : int
        Calibration windows in an update.
    rate : float
        First step of the offsets; 0 for one that lets them travel their whole range, ``1 / steps``.
    scale_rate : float
        Likewise of the scales' factors.
    """

    family: ClassVar[str] = "quantize"
    kind: ClassVar[str] = "block method"
    paper: ClassVar[str] = "Cheng et al. 2023, arXiv:2309.05516"
    requirements: ClassVar[frozenset[str]] = frozenset({"outputs"})

    steps: int = 200
    batch: int = 8
    rate: float = 0.0
    scale_rate: float = 0.0

    def __post_init__(self) -> None:
        check_settings("signround", self)

    def begin(self, weight: Tensor, rounded: PackedWeight, coding: IntegerCoding) -> LearnedWeight:
        """Offsets of zero, and the scales as they are."""
        return SignRoundWeight(weight, rounded, coding)

    def optimizer(self, weights: Sequence[LearnedWeight]) -> Optimizer:
        """Signed descent over offsets and factors."""
        rate = self.rate or 1 / self.steps
        offsets = [one.offsets for one in weights if isinstance(one, SignRoundWeight)]
        factors = [one.factors for one in weights if isinstance(one, SignRoundWeight)]
        return SignDescent(
            [{"params": offsets, "lr": rate}, {"params": factors, "lr": self.scale_rate or rate}]
        )


class SignRoundWeight(StraightThroughWeight):
    """One linear: offsets of its weights in steps of the grid, and factors of its scales less one."""

    def __init__(self, weight: Tensor, packed: PackedWeight, coding: IntegerCoding) -> None:
        super().__init__(packed, coding)
        self.weight = anchored(weight, self.began, coding) - self.each(self.began.zeros)
        self.offsets = nn.Parameter(torch.zeros_like(self.weight))
        self.factors = nn.Parameter(torch.zeros_like(self.began.scales))

    def from_zero(self) -> tuple[Tensor, Tensor, Tensor]:
        factors = 1 + self.factors
        values = self.weight / self.each(factors) + self.offsets
        return values, self.began.scales * factors, self.began.zeros

    @torch.no_grad()
    def limit(self) -> None:
        self.offsets.clamp_(-WIDEST_OFFSET, WIDEST_OFFSET)
        self.factors.clamp_(-WIDEST_FACTOR, WIDEST_FACTOR)


class SignDescent(Optimizer):
    """``p -= lr sign(gradient)``."""

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": 1e-3})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            for one in group["params"]:
                if one.grad is not None:
                    one.sub_(one.grad.sign_(), alpha=group["lr"])
