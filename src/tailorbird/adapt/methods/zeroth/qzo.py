"""QZO: a packed model learns by the scales of its groups, codes unchanged, from two losses a step.

Shang et al. 2025, "Fine-tuning Quantized Neural Networks with Zeroth-order Optimization" (arXiv:2505.13430).
With scales `s`, and `z` of standard normal numbers:

    d = (L(s + eps z) - L(s - eps z)) / (2 eps)        s <- s - rate clip(d, -C, C) z

No scale comes to zero: the authors' code keeps them from 1e-7 on, and here those below zero, which some
grids have, stay as far on their side. Scales are learned in float32, and rounded to their stored dtype
wherever the model computes with them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tailorbird.adapt.methods.adapter import Attached, Place
from tailorbird.adapt.methods.checks import require
from tailorbird.adapt.methods.zeroth.direction import Direction
from tailorbird.adapt.methods.zeroth.moved import Moved
from tailorbird.errors import SettingsError
from tailorbird.formats.modules import CompressedLinear
from tailorbird.formats.packed import GroupedCoding

#: Least magnitude of a scale.
LEAST = 1e-7


class MovedScales(Moved):
    """The scales of packed linears.

    Attributes
    ----------
    scales : nn.ParameterList
        float32 ``[out_features, groups]`` of each linear; the linear's own are these, rounded.

    Raises
    ------
    SettingsError
        No linear is packed.
    """

    def __init__(
        self,
        places: Mapping[str, Place],
        epsilon: float,
        rate: float,
        generator: torch.Generator,
        clip: float,
    ) -> None:
        super().__init__(Attached(), epsilon, rate, generator, clip)
        packed = {
            path: place.module
            for path, place in places.items()
            if isinstance(place.module, CompressedLinear) and isinstance(place.module.coding, GroupedCoding)
        }
        if not packed:
            raise SettingsError(
                "qzo on a model without packed weights that have scales",
                "a model that `fit` or `compress` made, of integers or a codebook",
                "compress it first, or use mezo",
            )
        self.paths = list(packed)
        # not children: the model isn't part of what is learned
        self.__dict__["linears"] = list(packed.values())
        self.scales = nn.ParameterList([nn.Parameter(_scales(one).float()) for one in packed.values()])

    @contextmanager
    def moved(self, direction: Direction, by: float) -> Iterator[None]:
        """As of `Moved`."""
        try:
            for number, (linear, scales) in enumerate(self._pairs()):
                _scales(linear).copy_(direction.part(number, scales).mul_(by).add_(scales.detach()))
            yield
        finally:
            self._round()

    @torch.no_grad()
    def move(self, direction: Direction, by: float) -> None:
        """As of `Moved`."""
        for number, (_, scales) in enumerate(self._pairs()):
            below = scales < 0
            scales.add_(direction.part(number, scales), alpha=by)
            scales.copy_(torch.where(below, scales.clamp(max=-LEAST), scales.clamp(min=LEAST)))
        self._round()

    def _round(self) -> None:
        """Let the linears have the scales that are learned."""
        for linear, scales in self._pairs():
            _scales(linear).copy_(scales.detach())

    def _pairs(self) -> list[tuple[CompressedLinear, nn.Parameter]]:
        return list(zip(self.__dict__["linears"], self.scales, strict=True))

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As of `nn.Module`; the linears follow."""
        found = super().load_state_dict(state_dict, strict, assign)
        self._round()
        return found

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """As of `Moved`: the rounded scales."""
        linears = self.__dict__["linears"]
        return {f"{path}.scales": _scales(linear) for path, linear in zip(self.paths, linears, strict=True)}


def _scales(linear: CompressedLinear) -> Tensor:
    """The stored scales of a linear that has some."""
    assert linear.scales is not None
    return linear.scales


@dataclass(frozen=True)
class Qzo:
    """QZO.

    Parameters
    ----------
    epsilon : float
        How far from the scales the losses are taken.
    clip : float
        Greatest directional derivative that an update follows.
    """

    name: ClassVar[str] = "qzo"
    family: ClassVar[str] = "adapter"
    kind: ClassVar[str] = "zeroth order, scales"
    paper: ClassVar[str] = "Shang et al. 2025, arXiv:2505.13430"
    needs: ClassVar[str] = "packed weights"

    epsilon: float = 1e-3
    clip: float = 100.0

    def __post_init__(self) -> None:
        require(0 < self.epsilon < math.inf, self.name, "epsilon", self.epsilon, "a number above 0")
        require(self.clip > 0, self.name, "clip", self.clip, "a number above 0")

    def attach_to(
        self, model: nn.Module, places: Mapping[str, Place], generator: torch.Generator
    ) -> Attached:
        """As of `ModelMethod`."""
        return MovedScales(places, self.epsilon, 1e-7, generator, self.clip)
