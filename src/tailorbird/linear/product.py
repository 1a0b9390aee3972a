"""A matrix of low rank as the product of its two factors, ``up @ down``: what an adapter adds to a linear."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Product:
    """``up @ down``, scale included.

    Attributes
    ----------
    up : Tensor[out_features, rank], float32
    down : Tensor[rank, in_features], float32
    """

    up: Tensor
    down: Tensor

    def delta(self) -> Tensor:
        """The product itself, ``[out_features, in_features]``."""
        return self.up @ self.down

    def energy(self) -> float:
        """Squared Frobenius norm of the product, which isn't formed; in double precision."""
        up, down = self.up.double(), self.down.double()
        return max(0.0, float(((up.T @ up) * (down @ down.T)).sum()))

    def is_finite(self) -> bool:
        """Whether all numbers of both factors are."""
        return bool(self.up.isfinite().all() & self.down.isfinite().all())

    def first(self, rank: int) -> Self:
        """The product of the first columns and rows."""
        return replace(self, up=self.up[:, :rank].contiguous(), down=self.down[:rank].contiguous())
