"""Recorded folds of a checkpoint: scales and shifts that moved between its norms and linears, read back.

They stand in one file beside the weights; `BlockFolds` says what the source's tensors are after them, to the
bit. How folds are found and applied while a block is compressed stands in `compress/folds.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tailorbird.errors import CheckpointError
from tailorbird.linear.scaling import ShiftedNorm, apply_norm_fold, apply_norm_shift, apply_pair_fold
from tailorbird.model.anatomy import Anatomy, LinearPlace, NormGroup, ScalePair
from tailorbird.model.weights import Weights

#: beside the weights, and not in their index: a loader needs no scales
FOLDS_FILE = "folds.safetensors"


def scales_name(fold: NormGroup | ScalePair) -> str:
    """Name of the scales of a fold in the file: ``NORM.scales``, or ``SOURCE->TARGET.scales``."""
    start = fold.norm if isinstance(fold, NormGroup) else f"{fold.source}->{fold.target}"
    return f"{start}.scales"


def shift_name(group: NormGroup) -> str:
    """Name of the shift of a norm's output in the file."""
    return f"{group.norm}.shift"


def can_shift(group: NormGroup, readers: Sequence[LinearPlace]) -> bool:
    """Whether a norm and all its readers have the biases that a shift changes."""
    return group.has_bias and all(place.bias for place in readers)


def shifted(group: NormGroup, readers: Sequence[LinearPlace], shift: Tensor, stored: Weights) -> ShiftedNorm:
    """What a shift ``[in_features]`` makes of the biases of a norm and of its readers in the source."""

    def weights_and_biases() -> Iterator[tuple[Tensor, Tensor]]:
        for place in readers:  # one at a time, for the memory
            weight = stored.read(place.weight_name, torch.float32)
            yield weight.T if place.transposed else weight, stored.read(f"{place.name}.bias")

    return apply_norm_shift(stored.read(f"{group.norm}.bias"), weights_and_biases(), shift)


@dataclass(frozen=True)
class BlockFolds:
    """Recorded folds of one block.

    Attributes
    ----------
    pairs : tuple of (ScalePair, Tensor[in_features], float32)
        In the order in which they were applied, before `norms`.
    norms : tuple of (NormGroup, Tensor[in_features], float32)
    shifts : tuple of (NormGroup, tuple of LinearPlace, Tensor[in_features], float32)
        With the readers; of the source, before all scales.
    """

    pairs: tuple[tuple[ScalePair, Tensor], ...] = ()
    norms: tuple[tuple[NormGroup, Tensor], ...] = ()
    shifts: tuple[tuple[NormGroup, tuple[LinearPlace, ...], Tensor], ...] = ()

    def weight(self, name: str, weight: Tensor, stored: Weights) -> Tensor:
        """The weight of the linear `name` after the folds.

        Parameters
        ----------
        name : str
        weight : Tensor[out_features, in_features], float32
            In the source; not modified.
        stored : Weights
            Of the source.
        """
        for pair, scales in self.pairs:
            if name == pair.source:
                weight = apply_pair_fold(weight, None, torch.empty(0, len(scales)), scales).weight
            if name == pair.target:
                weight = apply_pair_fold(torch.empty(len(scales), 0), None, weight, scales).target
        for group, scales in self.norms:
            if name in group.linears:
                norm = stored.read(f"{group.norm}.weight")
                (weight,) = apply_norm_fold(norm, None, [weight], scales, group.offset).linears
        return weight

    def others(self, stored: Weights) -> Iterator[tuple[str, Tensor]]:
        """Name and value of every norm tensor and bias after the folds, in the dtype of the source.

        Parameters
        ----------
        stored : Weights
            Of the source.
        """
        found: dict[str, Tensor] = {}

        def before(name: str) -> Tensor:
            return found[name] if name in found else stored.read(name)

        for group, readers, shift in self.shifts:
            moved = shifted(group, readers, shift, stored)
            found[f"{group.norm}.bias"] = moved.bias
            names = (f"{place.name}.bias" for place in readers)
            found |= dict(zip(names, moved.readers, strict=True))
        for pair, scales in self.pairs:
            name = f"{pair.source}.bias"
            if name in stored:
                count = len(scales)
                empty = torch.empty(count, 0), torch.empty(0, count)
                divided = apply_pair_fold(empty[0], before(name), empty[1], scales).bias
                assert divided is not None  # one was given
                found[name] = divided
        for group, scales in self.norms:
            bias = before(f"{group.norm}.bias") if group.has_bias else None
            folded = apply_norm_fold(stored.read(f"{group.norm}.weight"), bias, [], scales, group.offset)
            found[f"{group.norm}.weight"] = folded.weight
            if folded.bias is not None:
                found[f"{group.norm}.bias"] = folded.bias
        yield from found.items()


def read_folds(directory: Path, anatomy: Anatomy) -> tuple[BlockFolds, ...]:
    """The recorded folds of every block; empty ones where the result has no such file.

    Parameters
    ----------
    directory : Path
        A result.
    anatomy : Anatomy
        Of its source.

    Raises
    ------
    CheckpointError
        The file is damaged, or records what can't be folded in this model.
    """
    path = directory / FOLDS_FILE
    if not path.exists():
        return tuple(BlockFolds() for _ in anatomy.blocks)
    weights = Weights.open_file(path)
    weights.verify()
    widths = {place.name: place.in_features for place in anatomy.linears()}
    left = set(weights.names)

    def recorded(name: str, reader: str, sound: Callable[[Tensor], Tensor], expected: str) -> Tensor | None:
        if name not in weights:
            return None
        left.discard(name)
        read = weights.read(name)
        if read.dtype != torch.float32 or read.shape != (widths[reader],) or not bool(sound(read).all()):
            raise CheckpointError(
                f"{path}: `{name}` holds nothing that fits that fold",
                f"{widths[reader]} {expected} float32 values",
                "compress the model again",
            )
        return read

    def scales(fold: NormGroup | ScalePair, reader: str) -> Tensor | None:
        return recorded(scales_name(fold), reader, lambda read: read > 0, "positive")

    blocks = []
    for block in anatomy.blocks:
        places = {place.name: place for place in block.linears}
        pairs = ((pair, scales(pair, pair.target)) for pair in block.scale_pairs)
        norms = ((group, scales(group, group.linears[0])) for group in block.norm_groups)
        readers = ((group, tuple(places[name] for name in group.linears)) for group in block.norm_groups)
        shifts = (
            (group, own, recorded(shift_name(group), own[0].name, torch.isfinite, "finite"))
            for group, own in readers
            if can_shift(group, own)
        )
        blocks.append(
            BlockFolds(
                tuple((pair, found) for pair, found in pairs if found is not None),
                tuple((group, found) for group, found in norms if found is not None),
                tuple((group, own, found) for group, own, found in shifts if found is not None),
            )
        )
    if left:
        raise CheckpointError(
            f"{path}: `{min(left)}` is no fold of this model",
            "scales of its norms and pairs of linears, and shifts of norms before biases",
            "compress the model again",
        )
    return tuple(blocks)
