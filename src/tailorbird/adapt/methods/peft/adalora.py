"""AdaLoRA: singular triplets that matter little are taken from one linear so that others keep more.

    y = W x + (alpha / initial) P Λ Q x

`P`, `Λ` and `Q` are learned; a penalty, `orthogonality` times the mean of ``‖PᵀP − I‖`` and ``‖QQᵀ − I‖``,
keeps `P` and `Q` near to what singular vectors are. Between the first and the last steps the number of
triplets falls from `initial` to `rank` per linear on average, ``(1 - t)³`` of the surplus being left after a
share `t` of the way. Kept are those of the largest importance: the smoothed ``|p · ∂loss/∂p|`` of their
numbers times how much it varies. `Λ` begins as zero: tuning begins at the model as it is. The default shares
of the steps are about those of the authors' runs (https://github.com/QingruZhang/AdaLoRA).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tailorbird.adapt.methods.adapter import Attached, Place
from tailorbird.adapt.methods.checks import require, require_fit
from tailorbird.adapt.methods.peft.injected import Injected, library
from tailorbird.errors import SettingsError

#: running means of the importance and of how much it varies, and what PEFT's allocator calls them
_MEANS = {"importance": "exp_avg_ipt", "variation": "exp_avg_unc"}


class Allocating(Injected):
    """PEFT's modules and its allocator, whose running means are buffers here.

    Parameters
    ----------
    model, config, places, generator
        As of `Injected`.
    first, last : float
        Shares of the steps before and after the number of triplets falls.
    """

    constants = ("ranknum",)

    def __init__(
        self,
        model: nn.Module,
        config: Any,
        places: Mapping[str, Place],
        generator: torch.Generator,
        first: float,
        last: float,
    ) -> None:
        super().__init__(model, config, places, generator, adds=True)
        self.first, self.last = first, last
        tuner = self.peft_model.base_model
        # by the names that the allocator knows
        self._triplets = {name: one for name, one in tuner.model.named_parameters() if one.requires_grad}
        for index, parameter in enumerate(self._triplets.values()):
            for kind in _MEANS:
                self.register_buffer(f"{kind}_{index}", torch.zeros_like(parameter))

    def before_step(self, step: int, steps: int) -> None:
        """The schedule in steps, known since the first; there is at least one step in which ranks fall."""
        config = self.config
        config.total_step, config.tinit = steps, min(round(self.first * steps), steps - 1)
        config.tfinal = min(round(self.last * steps), steps - 1 - config.tinit)

    def penalty(self) -> Tensor:
        """How far `P` and `Q` are from orthonormal."""
        found = []
        for name, parameter in self._triplets.items():
            if ".lora_E." not in name:
                wide = parameter if ".lora_A." in name else parameter.T
                identity = torch.eye(len(wide), device=wide.device)
                found.append(torch.linalg.matrix_norm(wide @ wide.T - identity))
        weight: float = self.config.orth_reg_weight
        return weight * torch.stack(found).mean()

    def after_update(self, step: int) -> None:
        """Update the running means by the gradients, and take away triplets.

        After the update, as in the paper's algorithm, where the pruned values are the updated ones.
        """
        tuner = self.peft_model.base_model
        allocator = tuner.rankallocator
        for kind, attribute in _MEANS.items():
            kept = {name: self.get_buffer(f"{kind}_{i}") for i, name in enumerate(self._triplets)}
            setattr(allocator, attribute, kept)
        allocator.ipt = dict.fromkeys(self._triplets)  # computed anew at each step
        tuner.update_and_allocate(step + 1)
        for kind, attribute in _MEANS.items():
            means = getattr(allocator, attribute)
            for i, name in enumerate(self._triplets):
                if name in means:  # they are dropped where the last ranks are chosen
                    self.get_buffer(f"{kind}_{i}").copy_(means[name])

    def extra(self) -> dict[str, Any]:
        """As of `Attached`: which triplets are left."""
        return {"kept": self.config.rank_pattern}

    def take_extra(self, extra: Mapping[str, Any]) -> None:
        """As of `Attached`."""
        self.config.rank_pattern = extra["kept"]

    def files(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """As of `Attached`; triplets that were taken away aren't written.

        Those of the numbers as they are: they may be from before the last ranks were chosen.
        """
        before = self.config.rank_pattern
        if before is not None:
            self.config.rank_pattern = {
                name: (one != 0).reshape(-1).tolist()
                for name, one in self._triplets.items()
                if ".lora_E." in name
            }
        try:
            return super().files()
        finally:
            self.config.rank_pattern = before


@dataclass(frozen=True)
class AdaLora:
    """AdaLoRA.

    Parameters
    ----------
    rank : int
        Triplets per linear at the end, on average.
    initial : int
        Triplets of each linear at the start.
    alpha : float
        The addition is scaled by ``alpha / initial``.
    first, last : float
        Shares of the steps before and after the number of triplets falls.
    every : int
        Steps between two times that triplets are taken away.
    orthogonality : float
        Weight of the penalty.
    """

    name: ClassVar[str] = "adalora"
    family: ClassVar[str] = "adapter"
    kind: ClassVar[str] = "low rank with allocated ranks"
    paper: ClassVar[str] = "Zhang et al. 2023, arXiv:2303.10512"
    needs: ClassVar[str] = "nothing"
    #: where none is given; about that of the paper
    rate: ClassVar[float] = 1e-3

    rank: int = 8
    initial: int = 12
    alpha: float = 32.0
    first: float = 0.1
    last: float = 0.4
    every: int = 1
    orthogonality: float = 0.1

    def __post_init__(self) -> None:
        require(self.rank >= 1, self.name, "rank", self.rank, "at least 1")
        require(self.initial > self.rank, self.name, "initial", self.initial, f"above rank {self.rank}")
        require(self.alpha > 0, self.name, "alpha", self.alpha, "above 0")
        require(self.every >= 1, self.name, "every", self.every, "at least 1")
        require(self.orthogonality >= 0, self.name, "orthogonality", self.orthogonality, "0 or more")
        if not (self.first >= 0 and self.last >= 0 and self.first + self.last < 1):
            raise SettingsError(
                f"first {self.first} and last {self.last} of adalora",
                "shares of the steps that leave some between them", "set them lower",
            )  # fmt: skip

    def attach_to(
        self, model: nn.Module, places: Mapping[str, Place], generator: torch.Generator
    ) -> Attached:
        """As of `ModelMethod`."""
        for place in places.values():
            require_fit(self.name, self.initial, place, "initial")
        config = library().AdaLoraConfig(
            task_type="CAUSAL_LM", target_r=self.rank, init_r=self.initial, lora_alpha=self.alpha,
            deltaT=self.every, orth_reg_weight=self.orthogonality, target_modules=list(places),
            total_step=1,  # until it's known
        )  # fmt: skip
        return Allocating(model, config, places, generator, self.first, self.last)
