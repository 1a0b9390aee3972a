"""A random direction over parameters that is never stored: its parts are drawn again where they're needed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tailorbird.adapt.optimizers.rule import seed_of

#: Elements that are drawn at a time, so that what is held for a moment stays small.
TOGETHER = 1 << 18


@dataclass(frozen=True)
class Direction:
    """Standard normal numbers `z` for every parameter, which follow from two numbers.

    Attributes
    ----------
    seed : int
        Of the tuning.
    step : int
    """

    seed: int
    step: int

    def part(self, number: int, like: Tensor) -> Tensor:
        """Of parameter `number`: float32, shape and device of `like`, the same at every call."""
        rows = like if like.dim() else like[None]
        return torch.cat([piece for _, piece in self.pieces(number, rows)]).reshape(like.shape)

    def pieces(self, number: int, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The same, some rows after the other; of what has rows."""
        generator = self._generator(number, like)
        rows = max(1, TOGETHER * len(like) // max(1, like.numel()))
        for start in range(0, len(like), rows):
            chosen = slice(start, min(start + rows, len(like)))
            yield chosen, torch.randn(like[chosen].shape, device=like.device, generator=generator)

    def rounding(self, number: int, like: Tensor) -> torch.Generator:
        """Other random numbers for the same parameter and step: those of its rounding."""
        return self._generator(-1 - number, like)

    def _generator(self, number: int, like: Tensor) -> torch.Generator:
        return torch.Generator(like.device).manual_seed(seed_of(seed_of(self.seed, self.step), number))
