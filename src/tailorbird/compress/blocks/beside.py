"""Learned weights beside a low-rank or a sparse part: the base is learned, the part stays as it is."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from tailorbird.compress.blocks.method import LearnedWeight, LearningMethod
from tailorbird.formats.packed import IntegerCoding, PackedWeight


def begin(
    method: LearningMethod, weight: Tensor, rounded: PackedWeight, coding: IntegerCoding
) -> LearnedWeight:
    """`LearningMethod.begin`, also where `rounded` has parts beside it: of what they leave of the weight."""
    if not rounded.parts_beside:
        return method.begin(weight, rounded, coding)
    return BesideParts(method.begin(weight - rounded.beside(), rounded.base, coding), rounded)


class BesideParts(LearnedWeight):
    """A learned base and what stands beside it."""

    def __init__(self, base: LearnedWeight, rounded: PackedWeight) -> None:
        super().__init__()
        self.base = base
        self.beside = rounded.beside()
        self.parts = rounded.parts_beside

    @property
    def own(self) -> LearnedWeight:
        return self.base

    def forward(self) -> Tensor:
        found: Tensor = self.base()
        return found + self.beside

    @torch.no_grad()
    def packed(self) -> PackedWeight:
        base = self.base.packed()
        return dataclasses.replace(base, tensors=base.tensors | self.parts)

    def limit(self) -> None:
        self.base.limit()

    def settle(self) -> None:
        self.base.settle()
