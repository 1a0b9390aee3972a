"""What an adapter does to a linear, whatever kind it is of: a change of its weight, and maybe of its bias.

    T = W + delta(W),    t = b + shift(W, b)

A change of low rank (`LowRankChange`) is added as it is. One that depends on the weight, or fills all of it,
is formed for some rows at a time (`glora.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from torch import Tensor

from tailorbird.linear.product import Product


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


class LowRankChange(Product):
    """The change of one weight that is a product of low rank."""

    def moved(self, weight: Tensor) -> Tensor:
        """As of `Change`."""
        return weight + self.delta()

    def moved_bias(self, weight: Tensor, bias: Tensor) -> None:
        """A product changes no bias."""
        return None

    def output(self, x: Tensor, weight: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
        """As of `Change`."""
        return (x @ self.down.t()) @ self.up.t()
