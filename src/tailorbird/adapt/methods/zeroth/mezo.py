"""MeZO: tuning from two losses a step, with no gradient and no memory beyond inference's.

Malladi et al. 2023, "Fine-Tuning Language Models with Just Forward Passes" (arXiv:2305.17333). With `z` of
standard normal numbers, drawn again from a seed wherever it is needed:

    g = (L(theta + eps z) - L(theta - eps z)) / (2 eps)        theta <- theta - rate g z

`g z` is the gradient in expectation, up to order eps^2. `theta` are the weights of the linears, or the
parameters of another method, which take a greater `eps` and rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from tailorbird.adapt.methods.adapter import Attached, Method, ModelMethod, Place
from tailorbird.adapt.methods.attach import attach
from tailorbird.adapt.methods.checks import require
from tailorbird.adapt.methods.zeroth.moved import MovedParameters
from tailorbird.adapt.methods.zeroth.weights import MovedWeights

#: eps and rate of weights, and those of another method's parameters, as in the authors' examples
WEIGHTS, PARAMETERS = (1e-3, 1e-6), (1e-2, 5e-5)


@dataclass(frozen=True)
class Mezo:
    """MeZO.

    Parameters
    ----------
    epsilon : float or None
        How far from the parameters the losses are taken; 0.001 for weights, 0.01 for another method's
        parameters if not given.
    method : Method or None
        Whose parameters are learned; None for the weights themselves.
    """

    name: ClassVar[str] = "mezo"
    family: ClassVar[str] = "adapter"
    kind: ClassVar[str] = "zeroth order"
    paper: ClassVar[str] = "Malladi et al. 2023, arXiv:2305.17333"
    needs: ClassVar[str] = "nothing"

    epsilon: float | None = None
    method: Method | ModelMethod | None = None

    def __post_init__(self) -> None:
        fits = self.epsilon is None or 0 < self.epsilon < math.inf
        require(fits, self.name, "epsilon", self.epsilon, "a number above 0")

    def attach_to(
        self, model: nn.Module, places: Mapping[str, Place], generator: torch.Generator
    ) -> Attached:
        """As of `ModelMethod`."""
        if self.method is None:
            epsilon, rate = WEIGHTS
            return MovedWeights(places, self.epsilon or epsilon, rate, generator)
        epsilon, rate = PARAMETERS
        inner = attach(self.method, model, places, generator)
        return MovedParameters(inner, self.epsilon or epsilon, rate, generator, self.method.name)
