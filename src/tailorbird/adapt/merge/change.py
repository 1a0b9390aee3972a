"""What an adapter does to a linear, whatever kind it is of: a change of its weight, and maybe of its bias.

    T = W + delta(W),    t = b + shift(W, b)

A change of low rank (`Product`) is added as it is. One that depends on the weight, or fills all of it, is
formed for some rows at a time (`glora.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor


class Change(Protocol):
    """The change of one linear."""

    def moved(self, weight: Tensor) -> Tensor:
        """The weight ``[out_features, in_features]`` with the change, in its dtype; it isn't modified."""
        ...

    def moved_bias(self, weight: Tensor, bias: Tensor) -> Tensor | None:
        """The bias ``[out_features]`` with the change, for the weight as it was; None where it stays."""
        ...

    def output(self, x: Tensor, weight: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
        """What the change adds to the output for inputs ``[..., in_features]``.

        Parameters
        ----------
        x : Tensor[..., in_features]
        weight : callable
            Gives the weight, ``[out_features, in_features]``, where the change depends on it.
        bias : Tensor[out_features] or None
        """
        ...

    def is_finite(self) -> bool:
        """Whether all of its numbers are."""
        ...


class Changes(Protocol):
    """Changes by the names of linears."""

    def change(self, name: str) -> Change | None:
        """That of one linear, or None where it stays as it is."""
        ...


class Adapter(Changes, Protocol):
    """An adapter whose files fit a checkpoint.

    Attributes
    ----------
    directory : Path
    fingerprint : str
        SHA-256 over the bytes of both files, hex.
    names : tuple of str
        The linears that it changes.
    """

    @property
    def directory(self) -> Path: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def names(self) -> tuple[str, ...]: ...


@dataclass(frozen=True, eq=False)
class Product:
    """The change of one weight, ``up @ down``.

    Attributes
    ----------
    up : Tensor[out_features, rank], float32
    down : Tensor[rank, in_features], float32
    """

    up: Tensor
    down: Tensor

    def delta(self) -> Tensor:
        """The change itself, ``[out_features, in_features]``."""
        return self.up @ self.down

    def moved(self, weight: Tensor) -> Tensor:
        """As of `Change`."""
        return weight + self.delta()

    def moved_bias(self, weight: Tensor, bias: Tensor) -> None:
        """A product changes no bias."""
        return None

    def output(self, x: Tensor, weight: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
        """As of `Change`."""
        return (x @ self.down.t()) @ self.up.t()

    def is_finite(self) -> bool:
        """As of `Change`."""
        return bool(self.up.isfinite().all() & self.down.isfinite().all())

    def first(self, rank: int) -> Product:
        """The product of the first columns and rows."""
        return Product(self.up[:, :rank].contiguous(), self.down[:rank].contiguous())
