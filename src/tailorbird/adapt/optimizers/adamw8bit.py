"""AdamW with averages of 8 bits.

Dettmers et al. 2021, "8-bit Optimizers via Block-wise Quantization" (https://arxiv.org/abs/2110.02861). The
averages are read from their codes (`kernels/dynamic_codes.py`), take the gradient in, give AdamW's direction
in float32, and are written as codes again. Mean squares above zero stay above zero, which the paper doesn't
ask for: a divisor that became zero would throw its weight far away. Small tensors keep averages of 32 bits,
as in the authors' code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tailorbird.adapt.optimizers.moments import Averages
from tailorbird.adapt.optimizers.rule import Array, Rule, Slot, check, check_averages, check_rates
from tailorbird.kernels.dynamic_codes import blocks_of, decode, encode


@dataclass(frozen=True)
class AdamW8bit(Rule):
    """AdamW in a quarter of its memory.

    States of a parameter of n elements: ``momentum_codes`` and ``variance_codes``, ``[n]`` uint8, with
    ``momentum_scales`` and ``variance_scales``, one float32 for 256 of them. Below `smallest` elements:
    AdamW's.

    Parameters
    ----------
    lr, betas, eps, weight_decay
        As AdamW's.
    smallest : int
        Elements from which a parameter's averages have 8 bits.
    """

    name: ClassVar[str] = "adamw8bit"
    paper: ClassVar[str] = "Dettmers et al. 2021, https://arxiv.org/abs/2110.02861"
    kind: ClassVar[str] = "adaptive, 8-bit states"

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    smallest: int = 4096

    def __post_init__(self) -> None:
        check_rates(self.lr, self.weight_decay)
        check_averages(self.betas, self.eps)
        check(self.smallest >= 0, "smallest", self.smallest, "a number of elements")

    def layout(self, shape: tuple[int, ...]) -> dict[str, Array]:
        count = math.prod(shape)
        if count < self.smallest:
            return {"momentum": Array(shape), "variance": Array(shape)}
        codes, scales = Array((count,), torch.uint8), Array((blocks_of(count),))
        return {
            "momentum_codes": codes,
            "momentum_scales": scales,
            "variance_codes": codes,
            "variance_scales": scales,
        }

    def changes(self, slots: Sequence[Slot]) -> Sequence[Tensor | None]:
        return [self._direction(slot).mul_(slot.lr) for slot in slots]

    def _direction(self, slot: Slot) -> Tensor:
        averages, state = Averages(self.betas, self.eps), slot.state
        if "momentum" in state:
            return averages.direction(state["momentum"], state["variance"], slot.gradient, slot.step)
        momentum = decode(state["momentum_codes"], state["momentum_scales"], signed=True)
        variance = decode(state["variance_codes"], state["variance_scales"], signed=False)
        direction = averages.direction(momentum, variance, slot.gradient.reshape(-1), slot.step)
        encode(momentum, state["momentum_codes"], state["momentum_scales"], signed=True)
        encode(variance, state["variance_codes"], state["variance_scales"], signed=False)
        return direction.view(slot.gradient.shape)
