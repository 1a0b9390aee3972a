"""LoHa: the change of a weight is the Hadamard product of two changes of low rank.

    y = W x + (alpha / rank) ((B_1 A_1) ⊙ (B_2 A_2)) x

Its rank is up to the square of `rank`. `A_2` begins as zero: tuning begins at the model as it is. The product
is that of FedPara (Hyeon-Woo et al. 2021, arXiv:2108.06098).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from tailorbird.adapt.methods.adapter import Attached, Place
from tailorbird.adapt.methods.checks import require_fit, require_rank
from tailorbird.adapt.methods.peft.checks import refuse_transposed
from tailorbird.adapt.methods.peft.injected import Injected, library


@dataclass(frozen=True)
class LoHa:
    """LoHa.

    Parameters
    ----------
    rank : int
        Of each of the two.
    alpha : float
        The change is scaled by ``alpha / rank``.
    """

    name: ClassVar[str] = "loha"
    family: ClassVar[str] = "adapter"
    kind: ClassVar[str] = "Hadamard product of low ranks"
    paper: ClassVar[str] = "Yeh et al. 2023, arXiv:2309.14859"
    needs: ClassVar[str] = "nothing"

    rank: int = 8
    alpha: float = 8.0

    def __post_init__(self) -> None:
        require_rank(self.name, self.rank, self.alpha)

    def attach_to(
        self, model: nn.Module, places: Mapping[str, Place], generator: torch.Generator
    ) -> Attached:
        """As of `ModelMethod`."""
        refuse_transposed(places, self.name)
        for place in places.values():
            require_fit(self.name, self.rank, place)
        config = library().LoHaConfig(
            task_type="CAUSAL_LM", r=self.rank, alpha=self.alpha, target_modules=list(places)
        )
        return Injected(model, config, places, generator, adds=True)
