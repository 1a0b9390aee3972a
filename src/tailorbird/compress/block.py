"""A block while it is compressed: its linears so far, what they will be stored as, what they learn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tailorbird.calibrate.kept import KeptOutputs
from tailorbird.compress.blocks.beside import begin
from tailorbird.compress.blocks.method import BlockMethod, LearnedWeight
from tailorbird.compress.folds import BlockFolding
from tailorbird.compress.streams import Passing, as_is
from tailorbird.formats.packed import PARTS, Coding, IntegerCoding, PackedWeight
from tailorbird.model.anatomy import BlockAnatomy, LinearPlace


@dataclass(frozen=True)
class SourceInputs:
    """What the linears of a block of the source read.

    Attributes
    ----------
    read : callable
        From the ``shares_input`` of linears, and windows from one to another, ``[..., in_features]``.
    drop : callable
        Called when none is read any more.
    """

    read: Callable[[str, int, int], torch.Tensor]
    drop: Callable[[], None]


class Learning:
    """What a block method learns in one block: by the names of linears, beside where it began."""

    def __init__(self) -> None:
        self.places: dict[str, LinearPlace] = {}
        self.originals: dict[str, torch.Tensor] = {}
        self.rounded: dict[str, PackedWeight] = {}
        self.weights: dict[str, LearnedWeight] = {}

    def add(
        self, method: BlockMethod, place: LinearPlace, weight: torch.Tensor, packed: PackedWeight,
        coding: IntegerCoding,
    ) -> None:  # fmt: skip
        """Take in a linear that was rounded."""
        self.places[place.name], self.originals[place.name] = place, weight
        self.rounded[place.name] = packed
        self.weights[place.name] = begin(method, weight, packed, coding)

    def packed(self, better: bool) -> Iterator[tuple[str, PackedWeight]]:
        """The linears as they are stored: as learned where that is better, else as they began."""
        for name, weight in self.weights.items():
            yield name, weight.packed() if better else weight.kept(self.rounded[name])


class Block:
    """A block that is being compressed.

    Attributes
    ----------
    module : nn.Module
        As far as it is compressed.
    tensors : dict
        What its file will hold.
    done, rows : dict
        What was measured: what the step records, and the relative errors of rows.
    folding : BlockFolding or None
    kept : KeptOutputs or None
        Of linears that were rounded, while others are.
    """

    #: In a state: before the names of tensors, errors of rows, weights before they were rounded, scales.
    KEPT = ("tensors", "rows", "originals", "folds")

    def __init__(self, anatomy: BlockAnatomy, module: torch.nn.Module) -> None:
        self.anatomy, self.module = anatomy, module
        self.tensors: dict[str, torch.Tensor] = {}
        self.done: dict[str, Any] = {}
        self.rows: dict[str, torch.Tensor] = {}
        self.folding: BlockFolding | None = None
        self.kept: KeptOutputs | None = None
        self.learning = Learning()
        self._folds: dict[str, torch.Tensor] = {}

    @property
    def folds(self) -> dict[str, torch.Tensor]:
        """Scales by which it was folded."""
        return self._folds if self.folding is None else self.folding.found

    @property
    def passing(self) -> Passing:
        """How the block runs: with what is kept of it."""
        return as_is if self.kept is None else self.kept.passing

    def drop_kept(self) -> None:
        """Run all of the block from now on."""
        if self.kept is not None:
            self.kept.drop()
        self.kept = None

    def state(self) -> dict[str, torch.Tensor]:
        """All that it takes to learn the block once more."""
        parts = (self.tensors, self.rows, self.learning.originals, self.folds)
        return {
            f"{part}/{name}": tensor
            for part, tensors in zip(self.KEPT, parts, strict=True)
            for name, tensor in tensors.items()
        }

    def take_state(self, state: dict[str, torch.Tensor]) -> None:
        """Be what `state` was made of; linears yet have to begin to learn."""
        parts = (self.tensors, self.rows, self.learning.originals, self._folds)
        for key, tensor in state.items():
            part, _, name = key.partition("/")
            parts[self.KEPT.index(part)][name] = tensor


def sharing_input(places: list[LinearPlace]) -> list[list[LinearPlace]]:
    """`places` grouped by the input they read, in forward order."""
    groups: dict[str, list[LinearPlace]] = {}
    for place in places:
        groups.setdefault(place.shares_input, []).append(place)
    return list(groups.values())


def stored(place: LinearPlace, packed: PackedWeight) -> dict[str, torch.Tensor]:
    """Tensors of a compressed linear under their names in the file."""
    parts = dict(packed.tensors)
    if place.transposed and "weight" in parts:
        parts["weight"] = parts["weight"].t().contiguous()
    return {f"{place.name}.{part}": tensor for part, tensor in parts.items()}


def read_back(place: LinearPlace, coding: Coding, tensors: Mapping[str, torch.Tensor]) -> PackedWeight:
    """The linear of which `stored` made `tensors`, among others."""
    names = {part: f"{place.name}.{part}" for part in ("weight", *PARTS)}
    parts = {part: tensors[name] for part, name in names.items() if name in tensors}
    if place.transposed and "weight" in parts:
        parts["weight"] = parts["weight"].t().contiguous()
    return PackedWeight(coding, place.out_features, place.in_features, parts)
