"""rsLoRA: LoRA divided by the root of its rank, so that larger ranks learn as fast as small ones.

Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA" (arXiv:2312.03732).

    y = W x + (alpha / sqrt(r)) B A x

With LoRA's `alpha / r` the gradients shrink as the rank grows; with the root neither they nor what is added
depend on it. PEFT calls it `use_rslora`. The scaling is written into `B`, as that of every method here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from tailorbird.adapt.methods.adapter import Addition, Attached, Place
from tailorbird.adapt.methods.checks import require_fit, require_rank
from tailorbird.adapt.methods.low_rank import LowRank, attach_each


@dataclass(frozen=True)
class RsLora:
    """rsLoRA.

    Parameters
    ----------
    rank : int
    alpha : float
        The addition is scaled by `alpha / sqrt(rank)`.
    """

    name: ClassVar[str] = "rslora"
    family: ClassVar[str] = "adapter"
    kind: ClassVar[str] = "low rank, scaled by its root"
    paper: ClassVar[str] = "Kalajdzievski 2023, arXiv:2312.03732"
    needs: ClassVar[str] = "nothing"

    rank: int = 32
    alpha: float = 8.0

    def __post_init__(self) -> None:
        require_rank(self.name, self.rank, self.alpha)

    def attach(self, places: Mapping[str, Place], generator: torch.Generator) -> Attached:
        """`rank * (out_features + in_features)` learned numbers per linear."""

        def addition(place: Place) -> Addition:
            require_fit(self.name, self.rank, place)
            return LowRank.beginning(place, self.rank, self.alpha / math.sqrt(self.rank), generator)

        return attach_each(places, addition)
