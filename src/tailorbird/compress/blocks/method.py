"""What a block method is to the pipeline: weights that are learned inside one block.

A linear method has rounded every linear of the block before. From there a block method makes for each a
`LearnedWeight`, a differentiable way from what it learns to the weight that the grid can hold; `training`
moves all of them together so that the block's outputs come near those of the source's block, and each then
gives the packed weight that it stands for.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from tailorbird.errors import SettingsError
from tailorbird.formats.packed import IntegerCoding, PackedWeight


class LearnedWeight(nn.Module, ABC):
    """A weight under training; its parameters are what is learned."""

    @abstractmethod
    def forward(self) -> Tensor:
        """The weight ``[out_features, in_features]``, float32, just as it would be stored."""

    @abstractmethod
    def packed(self) -> PackedWeight:
        """The weight as it is stored; dequantized, it is what `forward` gives."""

    @property
    def own(self) -> LearnedWeight:
        """What its method made, which `BlockMethod.optimizer` knows; of one that wraps another, the other."""
        return self

    @property
    def reads(self) -> Callable[[Tensor], Tensor] | None:
        """What inputs go through before the weight; None where they don't."""
        return None

    @property
    def began_with(self) -> Callable[[Tensor], Tensor] | None:
        """Likewise before the weight where learning begins."""
        return None

    def kept(self, rounded: PackedWeight) -> PackedWeight:
        """What is stored where learning didn't help: what the linear method left."""
        return rounded

    def limit(self) -> None:
        """Bring parameters back into their range after an update."""

    def settle(self) -> None:
        """After the last update: take the values that can be stored beside the weight."""


class LearningMethod(Protocol):
    """What every method offers that learns linears after they were rounded.

    Attributes
    ----------
    family : str
        The folder of what it learns: "quantize".
    kind : str
        "block method" or "model method".
    paper : str
        Authors, year and number of the paper.
    requirements : frozenset of str
        What it reads beside the block: "outputs" of the source's block.
    steps : int
        Updates of all that is learned together.
    batch : int
        Calibration windows that an update reads.
    """

    family: ClassVar[str]
    kind: ClassVar[str]
    paper: ClassVar[str]
    requirements: ClassVar[frozenset[str]]
    __dataclass_fields__: ClassVar[dict]

    @property
    def steps(self) -> int: ...

    @property
    def batch(self) -> int: ...

    def begin(self, weight: Tensor, rounded: PackedWeight, coding: IntegerCoding) -> LearnedWeight:
        """What is learned for one linear.

        Parameters
        ----------
        weight : Tensor[out_features, in_features], float32
            Before it was rounded.
        rounded : PackedWeight
            By a linear method; where learning begins.
        coding : IntegerCoding
            Of `rounded`.
        """
        ...

    def optimizer(self, weights: Sequence[LearnedWeight]) -> Optimizer:
        """Over the parameters of all linears that are learned together, at the highest rates."""
        ...


class BlockMethod(LearningMethod, Protocol):
    """What every block method offers.

    Attributes
    ----------
    window, overlap : int
        Blocks that are learned together, and how many of them once more with those after them.
    transform : bool
        Whether scales between the linears are learned, too (`blocks/transform.py`).
    """

    @property
    def window(self) -> int: ...

    @property
    def overlap(self) -> int: ...

    @property
    def transform(self) -> bool: ...

    def loss(self, outputs: Tensor, targets: Tensor, weights: Sequence[LearnedWeight], done: float) -> Tensor:
        """What an update makes less.

        Parameters
        ----------
        outputs, targets : Tensor[windows, length, hidden_size], float32
            Of what is learned, and of the source.
        weights : sequence of LearnedWeight
            All that are learned together.
        done : float
            Share of the updates before this one.
        """
        ...


class SquaredError:
    """What learns one block at a time, by the mean squared difference of its outputs."""

    @property
    def window(self) -> int:
        """One block."""
        return 1

    @property
    def overlap(self) -> int:
        """None."""
        return 0

    @property
    def transform(self) -> bool:
        """Not learned."""
        return False

    def loss(self, outputs: Tensor, targets: Tensor, weights: Sequence[LearnedWeight], done: float) -> Tensor:
        """As `BlockMethod.loss`."""
        return nn.functional.mse_loss(outputs, targets)


def check_settings(name: str, method: LearningMethod, may_be_none: frozenset[str] = frozenset()) -> None:
    """Refuse counts below one, and rates below zero or without end.

    Parameters
    ----------
    name : str
        Of the method, for the message.
    method : LearningMethod
        Its settings are switches, counts, whose defaults are whole numbers, and rates.
    may_be_none : frozenset of str
        Counts that may be 0.

    Raises
    ------
    SettingsError
        Naming the first setting that is out of range.
    """
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        if isinstance(value, bool):
            continue
        counts = isinstance(field.default, int)
        least = 1 if counts and field.name not in may_be_none else 0
        if not least <= value < math.inf:
            raise SettingsError(
                f"{field.name} {value} of {name}",
                "at least 1" if least else "0 or more",
                f"set `{field.name}` higher" if counts else f"set another `{field.name}`",
            )
