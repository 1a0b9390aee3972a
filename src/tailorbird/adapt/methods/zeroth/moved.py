"""What methods are to a step of zeroth order: parameters that are moved along a random direction."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from tailorbird.adapt.methods.adapter import Attached
from tailorbird.adapt.methods.draws import draw_seed
from tailorbird.adapt.methods.wrapped import Wrapped
from tailorbird.adapt.methods.zeroth.direction import Direction
from tailorbird.errors import SettingsError

#: Hooks of methods that may read or change gradients, or replace parameters.
_OF_GRADIENTS = ("after_gradients", "after_update", "resized")


class Moved(Wrapped, ABC):
    """A method on a model that learns from losses alone.

    Parameters
    ----------
    inner : Attached
        What is attached beside, empty where nothing is.
    epsilon : float
        How far along the direction the two losses are taken.
    rate : float
        Of learning, where none is stated.
    generator : torch.Generator
        From which the seed of all directions is drawn.
    clip : float
        Greatest slope along the direction that an update follows; steeper ones are cut off.
    """

    seed: Tensor

    def __init__(
        self,
        inner: Attached,
        epsilon: float,
        rate: float,
        generator: torch.Generator,
        clip: float = math.inf,
    ) -> None:
        super().__init__(inner)
        self.epsilon, self.rate, self.clip = epsilon, rate, clip
        self.register_buffer("seed", draw_seed(generator))

    def direction(self, step: int) -> Direction:
        """The direction of a step."""
        return Direction(int(self.seed), step)

    @abstractmethod
    def moved(self, direction: Direction, by: float) -> AbstractContextManager[None]:
        """Let the model compute with parameters `by` times the direction away, until the end of the block.

        Afterwards every parameter has the bits that it had before.
        """

    @abstractmethod
    def move(self, direction: Direction, by: float) -> None:
        """Move the parameters for good."""

    def begin_from(self, read: Callable[[str, torch.dtype], Tensor]) -> None:
        """Be told how the model's tensors are read as they were before tuning, by stored name and dtype."""

    def checkpoint_tensors(self) -> dict[str, Tensor] | None:
        """The tensors of the model's checkpoint that changed, by their stored names.

        None where what is learned is an adapter.
        """
        return None


class MovedParameters(Moved):
    """The parameters of another method, which are few: a copy is kept while they are moved.

    Parameters beside those of `Moved`:

    Parameters
    ----------
    name : str
        Of the other method.

    Raises
    ------
    SettingsError
        The other method takes part in updates, or changes the model's own weights.
    """

    def __init__(
        self, inner: Attached, epsilon: float, rate: float, generator: torch.Generator, name: str
    ) -> None:
        super().__init__(inner, epsilon, rate, generator)
        if inner.changed() is not None:
            raise SettingsError(
                f"`{name}`, which changes the model's own weights, under a method of zeroth order",
                "a method that adds something of its own, whose result is an adapter",
                "choose another `method`, such as lora, or none: the weights are moved then",
            )
        if any(getattr(type(inner), hook) is not getattr(Attached, hook) for hook in _OF_GRADIENTS):
            raise SettingsError(
                f"`{name}` under a method of zeroth order",
                "a method that takes no part in updates, and so may do without gradients",
                "choose another `method`, such as lora",
            )

    def _learned(self) -> list[nn.Parameter]:
        return [one for one in self.inner.parameters() if one.requires_grad]

    @contextmanager
    def moved(self, direction: Direction, by: float) -> Iterator[None]:
        """As of `Moved`."""
        own = [parameter.detach().clone() for parameter in self._learned()]
        try:
            self.move(direction, by)
            yield
        finally:
            for parameter, before in zip(self._learned(), own, strict=True):
                parameter.data.copy_(before)

    @torch.no_grad()
    def move(self, direction: Direction, by: float) -> None:
        """As of `Moved`."""
        for number, parameter in enumerate(self._learned()):
            parameter.add_(direction.part(number, parameter), alpha=by)
