"""Folds of a block: found before its linears are rounded, and recorded.

`BlockFolding` asks a fold (`linear.FOLDS`) for scales and applies them to the block that is
being compressed: first between pairs of linears, while nothing of the block is rounded yet, then
between each norm and its readers just before these are rounded. Only linears that become integers
take part. A block method may learn further scales once all are rounded (`blocks/transform.py`). The scales
asked for are recorded in one file beside the weights (`linear/folds.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from tailorbird.calibrate.statistics import LinearStatistics
from tailorbird.calibrate.stream import StreamingModel
from tailorbird.formats.packed import Coding, ScaledCoding
from tailorbird.linear import FoldMethod
from tailorbird.linear.folds import can_shift, scales_name, shift_name, shifted
from tailorbird.linear.quantize.outliertune import Outliertune
from tailorbird.linear.scaling import FoldedNorm, apply_norm_fold, apply_pair_fold, scale_statistics
from tailorbird.model.anatomy import BlockAnatomy, LinearPlace, NormGroup, ScalePair
from tailorbird.model.outline import put_tensor


class BlockFolding:
    """Folds one block while it is compressed.

    Parameters
    ----------
    fold : FoldMethod or None
        Finds scales; None where only learned ones are added.
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
        Scales of the folds so far, by `scales_name`, and shifts by `shift_name`.
    """

    def __init__(
        self,
        fold: FoldMethod | None,
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
        self.source = dict(tensors)
        self.found: dict[str, Tensor] = {}
        self._divided: dict[str, Tensor] = {}
        self._shifted: dict[str, Tensor] = {}

    def fold_pairs(self, statistics: Callable[[LinearPlace], LinearStatistics]) -> None:
        """Fold between all pairs of linears; called before any of them is rounded.

        Parameters
        ----------
        statistics : callable
            Statistics of the input of a linear in `working` as it then is.
        """
        if self.fold is None or isinstance(self.fold, Outliertune):
            return
        places = {place.name: place for place in self.anatomy.linears}
        for pair in self.anatomy.scale_pairs:
            if not self._rounded((pair.source, pair.target)):
                continue
            source, target = places[pair.source], places[pair.target]
            weight = self.model.weight_of(self.working, target)
            scales = self.fold.scales([weight], statistics(target), [self.codings[target.name]])
            if bool((scales == 1).all()):
                continue
            bias = self.tensors[f"{source.name}.bias"] if source.bias else None
            folded = apply_pair_fold(self.model.weight_of(self.working, source), bias, weight, scales)
            self.model.set_weight(self.working, source, folded.weight)
            self.model.set_weight(self.working, target, folded.target)
            self._put(source.name, "bias", folded.bias)
            self.found[scales_name(pair)] = scales
            self._divided[target.shares_input] = scales

    def shift_norm(self, together: list[LinearPlace], inputs: Callable[[], Iterator[Tensor]]) -> None:
        """Centre what `together` read, where the fold does that and there are biases that take it.

        Parameters
        ----------
        together : list of LinearPlace
            Linears that share an input and are about to be rounded.
        inputs : callable
            Batches ``[windows, tokens, in_features]`` of that input in `working`.
        """
        group = self._group(together)
        if not isinstance(self.fold, Outliertune) or group is None or not can_shift(group, together):
            return
        shift = self.fold.shift(inputs())
        moved = shifted(group, together, shift, self.model.checkpoint.weights)
        names = (group.norm, *(place.name for place in together))
        for name, bias in zip(names, (moved.bias, *moved.readers), strict=True):
            self.source[f"{name}.bias"] = bias  # scales come after it
            self._put(name, "bias", bias)
        self.found[shift_name(group)] = shift
        self._shifted[together[0].shares_input] = moved.shift

    def of_source(self, key: str, x: Tensor) -> Tensor:
        """An input ``[..., in_features]`` of the source as the folds before it have made it in `working`.

        `key` is the ``shares_input`` of the linears that read it.
        """
        if key in self._divided:
            return x / self._divided[key]
        return x - self._shifted[key] if key in self._shifted else x

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
        group = self._group(together)
        if self.fold is None or group is None:
            return statistics
        weights = [self.model.weight_of(self.working, place) for place in together]
        inputs = replace(statistics, cross=None)  # which no fold reads
        scales = self.fold.scales(weights, inputs, [self.codings[p.name] for p in together])
        if bool((scales == 1).all()):
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

    def effective(self, fold: NormGroup | ScalePair, scales: Tensor) -> Tensor:
        """Of scales on top of those found so far, the ones that would be in effect, ``[in_features]``."""
        if isinstance(fold, ScalePair):
            return scales
        before = self.found.get(scales_name(fold))
        whole = self._folded(fold, scales if before is None else before * scales)
        return whole.scales if before is None else whole.scales / self._folded(fold, before).scales

    def add(self, fold: NormGroup | ScalePair, scales: Tensor) -> None:
        """Fold by scales on top of those found so far: a norm or a bias; linears are the caller's."""
        name = scales_name(fold)
        self.found[name] = whole = self.found[name] * scales if name in self.found else scales
        if isinstance(fold, NormGroup):
            folded = self._folded(fold, whole)
            self._put(fold.norm, "weight", folded.weight)
            self._put(fold.norm, "bias", folded.bias)
            return
        bias = self.source.get(f"{fold.source}.bias")
        if bias is not None:
            empty = torch.empty(len(whole), 0), torch.empty(0, len(whole))
            self._put(fold.source, "bias", apply_pair_fold(empty[0], bias, empty[1], whole).bias)

    def _folded(self, group: NormGroup, scales: Tensor) -> FoldedNorm:
        """The norm of the source after a fold, without its readers."""
        bias = self.source[f"{group.norm}.bias"] if group.has_bias else None
        return apply_norm_fold(self.source[f"{group.norm}.weight"], bias, [], scales, group.offset)

    def _group(self, together: list[LinearPlace]) -> NormGroup | None:
        """The norm whose readers are these, where all of them are rounded."""
        names = {place.name for place in together}
        if not self._rounded(names):
            return None
        return next((group for group in self.anatomy.norm_groups if set(group.linears) == names), None)

    def _rounded(self, names: Iterable[str]) -> bool:
        return all(isinstance(self.codings.get(name), ScaledCoding) for name in names)

    def _put(self, name: str, part: str, tensor: Tensor | None) -> None:
        """Replace a norm's weight or a bias in the file and in the block."""
        if tensor is not None:
            self.tensors[f"{name}.{part}"] = tensor
            put_tensor(self.model.module_of(self.working, name), part, tensor.to(self.model.dtype))
