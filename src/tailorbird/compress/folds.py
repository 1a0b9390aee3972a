"""Folds of a block: found before its linears are rounded, recorded, and recomputed from the source.

`BlockFolding` asks a fold (`linear/quantize/awq.py`) for scales and applies them to the block that is
being compressed: first between pairs of linears, while nothing of the block is rounded yet, then
between each norm and its readers just before these are rounded. Only linears that become integers
take part. The scales asked for are recorded in one file beside the weights; `read_folds` reads them
back, and `BlockFolds` says what the source's tensors are after them, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from tailorbird.calibrate.statistics import LinearStatistics
from tailorbird.calibrate.stream import StreamingModel
from tailorbird.errors import CheckpointError
from tailorbird.formats.packed import Coding, GroupedCoding
from tailorbird.linear.quantize.awq import Awq, apply_norm_fold, apply_pair_fold, scale_statistics
from tailorbird.model.anatomy import Anatomy, BlockAnatomy, LinearPlace, NormGroup, ScalePair
from tailorbird.model.outline import put_tensor
from tailorbird.model.weights import Weights

#: beside the weights, and not in their index: a loader needs no scales
FOLDS_FILE = "folds.safetensors"


def scales_name(fold: NormGroup | ScalePair) -> str:
    """Name of the scales of a fold in the file: ``NORM.scales``, or ``SOURCE->TARGET.scales``."""
    start = fold.norm if isinstance(fold, NormGroup) else f"{fold.source}->{fold.target}"
    return f"{start}.scales"


@dataclass(frozen=True)
class BlockFolds:
    """Recorded folds of one block.

    Attributes
    ----------
    pairs : tuple of (ScalePair, Tensor[in_features], float32)
        In the order in which they were applied, before `norms`.
    norms : tuple of (NormGroup, Tensor[in_features], float32)
    """

    pairs: tuple[tuple[ScalePair, Tensor], ...] = ()
    norms: tuple[tuple[NormGroup, Tensor], ...] = ()

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
        for pair, scales in self.pairs:
            name = f"{pair.source}.bias"
            if name in stored:
                count = len(scales)
                empty = torch.empty(count, 0), torch.empty(0, count)
                bias = apply_pair_fold(empty[0], stored.read(name), empty[1], scales).bias
                assert bias is not None  # one was given
                yield name, bias
        for group, scales in self.norms:
            bias = stored.read(f"{group.norm}.bias") if group.has_bias else None
            folded = apply_norm_fold(stored.read(f"{group.norm}.weight"), bias, [], scales, group.offset)
            yield f"{group.norm}.weight", folded.weight
            if folded.bias is not None:
                yield f"{group.norm}.bias", folded.bias


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

    def scales(fold: NormGroup | ScalePair, reader: str) -> Tensor | None:
        name = scales_name(fold)
        if name not in weights:
            return None
        left.discard(name)
        read = weights.read(name)
        if read.dtype != torch.float32 or read.shape != (widths[reader],) or not bool((read > 0).all()):
            raise CheckpointError(
                f"{path}: `{name}` holds no scales of that fold",
                f"{widths[reader]} positive float32 values",
                "compress the model again",
            )
        return read

    blocks = []
    for block in anatomy.blocks:
        pairs = ((pair, scales(pair, pair.target)) for pair in block.scale_pairs)
        norms = ((group, scales(group, group.linears[0])) for group in block.norm_groups)
        blocks.append(
            BlockFolds(
                tuple((pair, found) for pair, found in pairs if found is not None),
                tuple((group, found) for group, found in norms if found is not None),
            )
        )
    if left:
        raise CheckpointError(
            f"{path}: `{min(left)}` is no fold of this model",
            "scales of its norms and pairs of linears",
            "compress the model again",
        )
    return tuple(blocks)


class BlockFolding:
    """Folds one block while it is compressed.

    Parameters
    ----------
    fold : Awq
        Finds scales.
    model : StreamingModel
        Of the source.
    working : nn.Module
        The block, from ``model.load_block``; its modules are changed.
    anatomy : BlockAnatomy
    codings : dict
        Place -> coding; places that aren't named, or become floats, are left alone.
    tensors : dict
        What the block's file will hold, among it norms and biases in the source's dtype; folded ones
        are replaced.

    Attributes
    ----------
    found : dict of str to Tensor[in_features], float32
        Scales of the folds so far, by `scales_name`.
    divided : dict of str to Tensor[in_features], float32
        ``shares_input`` of linears -> scales by which that input is divided in `working`, and wasn't in
        the source.
    """

    def __init__(
        self,
        fold: Awq,
        model: StreamingModel,
        working: nn.Module,
        anatomy: BlockAnatomy,
        codings: dict[str, Coding],
        tensors: dict[str, Tensor],
    ) -> None:
        self.fold = fold
        self.model = model
        self.working = working
        self.anatomy = anatomy
        self.codings = codings
        self.tensors = tensors
        self.found: dict[str, Tensor] = {}
        self.divided: dict[str, Tensor] = {}

    def fold_pairs(self, statistics: Callable[[LinearPlace], LinearStatistics]) -> None:
        """Fold between all pairs of linears; called before any of them is rounded.

        Parameters
        ----------
        statistics : callable
            Statistics of the input of a linear in `working` as it then is.
        """
        places = {place.name: place for place in self.anatomy.linears}
        for pair in self.anatomy.scale_pairs:
            if not self._rounded((pair.source, pair.target)):
                continue
            source, target = places[pair.source], places[pair.target]
            weight = self.model.weight_of(self.working, target)
            scales, alpha, *_ = self.fold([weight], statistics(target), [self.codings[target.name]])
            if alpha == 0:
                continue
            bias = self.tensors[f"{source.name}.bias"] if source.bias else None
            folded = apply_pair_fold(self.model.weight_of(self.working, source), bias, weight, scales)
            self.model.set_weight(self.working, source, folded.weight)
            self.model.set_weight(self.working, target, folded.target)
            self._put(source.name, "bias", folded.bias)
            self.found[scales_name(pair)] = scales
            self.divided[target.shares_input] = scales

    def fold_norm(self, together: list[LinearPlace], statistics: LinearStatistics) -> LinearStatistics:
        """Fold between a norm and `together`, where these are all its readers.

        Parameters
        ----------
        together : list of LinearPlace
            Linears that share an input and are about to be rounded.
        statistics : LinearStatistics
            Of that input.

        Returns
        -------
        LinearStatistics
            Of the input as it is now; `statistics` itself where nothing was folded.
        """
        names = {place.name for place in together}
        group = next((g for g in self.anatomy.norm_groups if set(g.linears) == names), None)
        if group is None or not self._rounded(names):
            return statistics
        weights = [self.model.weight_of(self.working, place) for place in together]
        inputs = replace(statistics, cross=None)  # which the search doesn't read
        scales, alpha, *_ = self.fold(weights, inputs, [self.codings[p.name] for p in together])
        if alpha == 0:
            return statistics
        norm = self.tensors[f"{group.norm}.weight"]
        bias = self.tensors[f"{group.norm}.bias"] if group.has_bias else None
        folded = apply_norm_fold(norm, bias, [], scales, group.offset)
        for place, weight in zip(together, weights, strict=True):  # one at a time, for the memory
            (multiplied,) = apply_norm_fold(norm, None, [weight], scales, group.offset).linears
            self.model.set_weight(self.working, place, multiplied)
        self._put(group.norm, "weight", folded.weight)
        self._put(group.norm, "bias", folded.bias)
        self.found[scales_name(group)] = scales
        return scale_statistics(statistics, folded.scales)

    def _rounded(self, names: Iterable[str]) -> bool:
        return all(isinstance(self.codings.get(name), GroupedCoding) for name in names)

    def _put(self, name: str, part: str, tensor: Tensor | None) -> None:
        """Replace a norm's weight or a bias in the file and in the block."""
        if tensor is not None:
            self.tensors[f"{name}.{part}"] = tensor
            put_tensor(self.model.module_of(self.working, name), part, tensor.to(self.model.dtype))
