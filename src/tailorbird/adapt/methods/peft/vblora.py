"""VB-LoRA: the factors of every linear are put together from one bank of vectors.

Each part of a factor is a mixture of the `top` vectors of the bank with the largest learned logits, weighted
by their softmax. The bank and the logits are learned. Both factors begin with random numbers: tuning begins
near the model, not at it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from tailorbird.adapt.methods.adapter import Attached, Place
from tailorbird.adapt.methods.checks import require, require_fit
from tailorbird.adapt.methods.peft.injected import Injected, library
from tailorbird.errors import SettingsError


@dataclass(frozen=True)
class VbLora:
    """VB-LoRA.

    Parameters
    ----------
    rank : int
    vectors : int
        In the bank.
    length : int
        Of a vector; divides the sizes of all linears.
    top : int
        Vectors in a mixture.
    compact : bool
        Only the mixtures are written, as in the paper: far smaller, but nobody can tune on from there.
    """

    name: ClassVar[str] = "vblora"
    family: ClassVar[str] = "adapter"
    kind: ClassVar[str] = "low rank from a shared bank"
    paper: ClassVar[str] = "Li et al. 2024, arXiv:2405.15179"
    needs: ClassVar[str] = "nothing"
    #: where none is given; between those of the paper for vectors, 1e-3, and logits, 1e-2
    rate: ClassVar[float] = 5e-3

    rank: int = 4
    vectors: int = 256
    length: int = 256
    top: int = 2
    compact: bool = True

    def __post_init__(self) -> None:
        require(self.rank >= 1, self.name, "rank", self.rank, "at least 1")
        require(self.length >= 1, self.name, "length", self.length, "at least 1")
        require(
            2 <= self.top <= self.vectors, self.name, "top", self.top, "from 2 to the number of `vectors`"
        )

    def attach_to(
        self, model: nn.Module, places: Mapping[str, Place], generator: torch.Generator
    ) -> Attached:
        """As of `ModelMethod`."""
        for place in places.values():
            require_fit(self.name, self.rank, place)
        divisor = math.gcd(*(size for one in places.values() for size in (one.in_features, one.out_features)))
        if divisor % self.length:
            raise SettingsError(
                f"length {self.length} of vblora", f"one that divides {divisor}, as the linears' sizes are",
                "set another `length`, or leave some linears out",
            )  # fmt: skip
        config = library().VBLoRAConfig(
            task_type="CAUSAL_LM", r=self.rank, num_vectors=self.vectors, vector_length=self.length,
            topk=self.top, target_modules=list(places), save_only_topk_weights=self.compact,
        )  # fmt: skip
        return Injected(model, config, places, generator, adds=True)
