"""DoRA: a weight's direction changes as in LoRA, and the length of each row is learned beside it.

    y = m ⊙ (W + (alpha / rank) up down) x / ‖W + (alpha / rank) up down‖ + bias

The length of each row, ``‖·‖``, is taken as constant in the gradient, as in section 4.3 of the paper. `m`
begins as ``‖W‖``, so that tuning begins at the model as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from tailorbird.adapt.methods.adapter import Attached, Place
from tailorbird.adapt.methods.checks import require_fit, require_rank
from tailorbird.adapt.methods.peft.injected import ADAPTER, Injected, library


@dataclass(frozen=True)
class Dora:
    """DoRA.

    Parameters
    ----------
    rank : int
    alpha : float
        The change of direction is scaled by ``alpha / rank``.
    """

    name: ClassVar[str] = "dora"
    family: ClassVar[str] = "adapter"
    kind: ClassVar[str] = "low rank and row lengths"
    paper: ClassVar[str] = "Liu et al. 2024, arXiv:2402.09353"
    needs: ClassVar[str] = "nothing"

    rank: int = 16
    alpha: float = 32.0

    def __post_init__(self) -> None:
        require_rank(self.name, self.rank, self.alpha)

    def attach_to(
        self, model: nn.Module, places: Mapping[str, Place], generator: torch.Generator
    ) -> Attached:
        """As of `ModelMethod`."""
        for place in places.values():
            require_fit(self.name, self.rank, place)
        config = library().LoraConfig(
            task_type="CAUSAL_LM", r=self.rank, lora_alpha=self.alpha, target_modules=list(places),
            use_dora=True,
        )  # fmt: skip
        attached = Injected(model, config, places, generator, adds=False)
        with torch.no_grad():
            for path, place in places.items():
                # PEFT rounds the lengths to the weight's dtype, but not those that it divides by
                magnitude = attached.layer(path).lora_magnitude_vector[ADAPTER].weight
                magnitude.copy_(torch.linalg.vector_norm(place.weight(), dim=1))
        return attached
