"""Merging, one block at a time: from a checkpoint and an adapter to the files of the result.

One stream of hidden states walks over the blocks, through the model with the adapter beside it: for its
linears' inputs packed weights are rounded. Weights that the adapter changes move to their target,
one linear at a time; all other tensors are copied. When a block is finished its file is written, the stream
is saved at its boundary and the block is marked done: a killed run continues there and ends with the same
bytes.

Where a packed weight can't reach its target, what is left is kept beside the block as a product of low rank
(`residual.py`), for the gate to fall back on.
"""

from __future__ import annotations

import contextlib
import shutil
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tailorbird.adapt.merge.adapted import AdaptedModel
from tailorbird.adapt.merge.change import Adapter, LowRankChange
from tailorbird.adapt.merge.residual import best_product
from tailorbird.adapt.merge.rounding import Rounding
from tailorbird.calibrate.activations import ActivationFile
from tailorbird.calibrate.job import Job
from tailorbird.calibrate.statistics import GramAccumulator, LinearStatistics
from tailorbird.errors import SettingsError
from tailorbird.evaluate.streamed import batches
from tailorbird.formats.packed import EntropyCoding, FloatCoding, PackedWeight
from tailorbird.formats.peft import DOWN, UP
from tailorbird.linear.error import output_error
from tailorbird.linear.folds import FOLDS_FILE
from tailorbird.linear.rotate.weights import ROTATION_FILE
from tailorbird.model.anatomy import Anatomy, BlockAnatomy, LinearPlace, layout_of
from tailorbird.model.checkpoint import Checkpoint
from tailorbird.model.outline import Reached
from tailorbird.model.shards import file_count, file_name, write_index
from tailorbird.model.weights import Weights
from tailorbird.model.writing import write_tensors
from tailorbird.progress import Progress

#: of the base, and as true of the result: which codings were chosen, what was folded and rotated
KEPT_FILES = ("config.json", "plan.yaml", FOLDS_FILE, ROTATION_FILE)


class Merger:
    """One merge; `run` does what is left of it.

    Parameters
    ----------
    job : Job
    checkpoint : Checkpoint
    anatomy : Anatomy
    adapter : Adapter
    ids : LongTensor ``[windows, length]`` or None
        Calibration tokens; None only where no packed weight changes.
    residual_rank : int
        Of the products that are kept beside the blocks; 0 keeps none.
    seed : int
    progress : Progress
    """

    def __init__(
        self,
        job: Job,
        checkpoint: Checkpoint,
        anatomy: Anatomy,
        adapter: Adapter,
        ids: Tensor | None,
        residual_rank: int,
        seed: int,
        progress: Progress,
    ) -> None:
        self.job = job
        self.checkpoint = checkpoint
        self.anatomy = anatomy
        self.adapter = adapter
        self.ids = ids
        self.residual_rank = residual_rank
        self.seed = seed
        self.progress = progress
        self.model = AdaptedModel(checkpoint, anatomy, adapter)

    @torch.no_grad()
    def run(self) -> dict[str, dict[str, Any]]:
        """Write every file of the result that is not there yet.

        Returns
        -------
        dict
            Changed linear -> ``{"error": relative output error against its target, "rows": where the rows of
            a packed one came from}``.
        """
        merged: dict[str, dict[str, Any]] = {}
        self.job.step("ends", self._ends)
        for block in self.anatomy.blocks:
            keep = {f"adapted-{block.index + 1}"} if self.ids is not None else set()
            merged |= self.job.step(f"block-{block.index:05d}", partial(self._block, block), keep)
            self.progress.advance(note=block.name)
        self.job.drop_streams(set())
        write_index(self.job.partial, self.anatomy)
        for name in KEPT_FILES:
            if (self.checkpoint.directory / name).exists():
                shutil.copyfile(self.checkpoint.directory / name, self.job.partial / name)
        self.checkpoint.copy_companions(self.job.partial)
        return merged

    def _ends(self) -> dict[str, Any]:
        """Copy what lies outside the blocks, and start the stream."""
        inside = tuple(f"{block.name}." for block in self.anatomy.blocks)
        outside = [name for name in self._stored() if not name.startswith(inside)]
        head = [name for name in outside if name.startswith(f"{self.anatomy.head}.")]
        if self.anatomy.tied:
            head = []  # a bias of a tied head stands with the embedding
        self._write(0, {name: self._read(name) for name in outside if name not in head})
        if not self.anatomy.tied:
            self._write(file_count(self.anatomy) - 1, {name: self._read(name) for name in head})
        if self.ids is not None:
            stream = self._new_stream(0)
            for start, stop in batches(*self.ids.shape):
                stream.write(start, self.model.embed(self.ids[start:stop]))
            stream.close()
            self.model.release_ends()
        return {}

    def _block(self, anatomy: BlockAnatomy) -> dict[str, Any]:
        """Merge one block, write its file, carry the stream over it."""
        index = anatomy.index
        tensors = {name: self._read(name) for name in self._stored() if name.startswith(f"{anatomy.name}.")}
        working = self.model.load_block(index) if self.ids is not None else None
        done: dict[str, Any] = {}
        residual: dict[str, Tensor] = {}
        groups: dict[str, list[LinearPlace]] = {}
        for place in anatomy.linears:
            if place.name in self.adapter.names:
                groups.setdefault(place.shares_input, []).append(place)
        for key, together in groups.items():
            statistics = None
            if working is not None:
                statistics = self._statistics(index, key, together[0].in_features, working)
            rounding = None if statistics is None else Rounding(statistics)
            for place in together:
                done[place.name] = self._merge(place, tensors, statistics, rounding, residual)
        self._write(index + 1, tensors)
        if residual:
            write_tensors(self.job.work / "done" / residual_file(index), residual)
        if working is not None:
            self._carry(index, working)
        return done

    def _merge(
        self,
        place: LinearPlace,
        tensors: dict[str, Tensor],
        statistics: LinearStatistics | None,
        rounding: Rounding | None,
        residual: dict[str, Tensor],
    ) -> dict[str, Any]:
        """Move one linear to its target, in `tensors`; put what is left into `residual`."""
        change = self.adapter.change(place.name)
        assert change is not None  # only linears that the adapter changes come here
        stored = stored_weight(self.checkpoint, place, tensors)
        weight = stored.dequantize()
        target = change.moved(weight)
        if place.bias:
            name = f"{place.name}.bias"
            bias = change.moved_bias(weight, tensors[name].float())
            if bias is not None:
                tensors[name] = bias_in(place, bias, tensors[name].dtype)
        del weight
        facts: dict[str, Any] = {}
        if isinstance(stored.coding, FloatCoding):
            merged = rounded_once(place, target, stored.coding)
        else:
            assert rounding is not None  # packed weights come with calibration tokens
            rounded = rounding(stored, target)
            merged, facts["rows"] = rounded.packed, rounded.rows
        parts = dict(merged.tensors)
        if place.transposed and "weight" in parts:
            parts["weight"] = parts["weight"].t().contiguous()
        tensors |= {f"{place.name}.{part}": tensor for part, tensor in parts.items()}
        approximation = merged.dequantize()
        gram = None if statistics is None else statistics.gram
        if self.residual_rank:
            left = best_product(target - approximation, gram, self.residual_rank, self.seed)
            residual |= {f"{place.name}.{UP}": left.up, f"{place.name}.{DOWN}": left.down}
        return {"error": output_error(target, approximation, gram), **facts}

    def _statistics(self, index: int, key: str, width: int, working: nn.Module) -> LinearStatistics:
        """Statistics of the input that linears with the same `shares_input` read beside the adapter."""
        accumulator = GramAccumulator(width)

        def keep(name: str, x: Tensor) -> None:
            if name == key:
                accumulator.add(x)
                raise Reached  # what the block does after it is not needed

        assert self.ids is not None
        stream = self._open_stream(index)
        for start, stop in batches(*self.ids.shape):
            with contextlib.suppress(Reached):
                self.model.capture_inputs(working, index, stream.read(start, stop), keep)
        stream.close()
        return accumulator.finish()

    def _carry(self, index: int, working: nn.Module) -> None:
        """Run the stream through the block into that of the next boundary."""
        assert self.ids is not None
        before, after = self._open_stream(index), self._new_stream(index + 1)
        for start, stop in batches(*self.ids.shape):
            after.write(start, self.model.run_block(working, index, before.read(start, stop)))
        before.close()
        after.close()

    def _stored(self) -> list[str]:
        """Names of all tensors that the model needs."""
        return [name for name in self.checkpoint.weights.names if name not in self.anatomy.ignored]

    def _read(self, name: str) -> Tensor:
        return self.checkpoint.weights.read(name)

    def _write(self, part: int, tensors: dict[str, Tensor]) -> None:
        write_tensors(self.job.partial / file_name(self.anatomy, part), tensors)

    def _open_stream(self, index: int) -> ActivationFile:
        return self.job.open_stream(f"adapted-{index}", *self._stream_shape())

    def _new_stream(self, index: int) -> ActivationFile:
        return self.job.new_stream(f"adapted-{index}", *self._stream_shape())

    def _stream_shape(self) -> tuple[int, int, int]:
        assert self.ids is not None
        windows, length = self.ids.shape
        return windows, length, self.anatomy.hidden_size


class Residual:
    """What merging left, as products of one rank, read from beside the finished blocks.

    Parameters
    ----------
    job : Job
    anatomy : Anatomy
    rank : int
        At most that with which they were kept.
    """

    def __init__(self, job: Job, anatomy: Anatomy, rank: int) -> None:
        self.rank = rank
        self._files: dict[str, Weights] = {}
        for block in anatomy.blocks:
            path = job.work / "done" / residual_file(block.index)
            if path.exists():
                weights = Weights.open_file(path)
                self._files |= {
                    name.removesuffix(f".{UP}"): weights for name in weights.names if name.endswith(UP)
                }

    def change(self, name: str) -> LowRankChange | None:
        """That of one linear, or None where it stays as it is."""
        weights = self._files.get(name)
        if weights is None:
            return None
        return LowRankChange(weights.read(f"{name}.{UP}"), weights.read(f"{name}.{DOWN}")).first(self.rank)

    def products(self) -> dict[str, LowRankChange]:
        """All of them."""
        return {name: found for name in sorted(self._files) if (found := self.change(name)) is not None}


def residual_file(index: int) -> str:
    """Where the products of a block are kept while the job runs."""
    return f"block-{index:05d}.residual.safetensors"


def packed_places(checkpoint: Checkpoint, anatomy: Anatomy) -> frozenset[str]:
    """Linears of the blocks that are stored as codes.

    Raises
    ------
    SettingsError
        One is entropy-coded, so that other weights would take other bytes.
    """
    layout = layout_of(checkpoint)
    modules = {} if layout is None else layout.modules
    for place in anatomy.linears():
        if place.name in modules and isinstance(modules[place.name].coding, EntropyCoding):
            raise SettingsError(
                f"a merge into a model whose `{place.name}` is entropy-coded",
                "floats, or codes that can be rounded to",
                "export it to `dense`, merge there, and compress the result with --recipe df11",
            )
    return frozenset(
        place.name
        for place in anatomy.linears()
        if place.name in modules and not isinstance(modules[place.name].coding, FloatCoding)
    )


def stored_weight(checkpoint: Checkpoint, place: LinearPlace, tensors: dict[str, Tensor]) -> PackedWeight:
    """The weight of a linear in its stored form, floats as `[out_features, in_features]` too.

    Parameters
    ----------
    tensors : dict of str to Tensor
        What the file holds, by name.

    Raises
    ------
    CheckpointError
        Its tensors don't fit each other.
    """
    layout = layout_of(checkpoint)
    stated = None if layout is None else layout.modules.get(place.name)
    if stated is None or isinstance(stated.coding, FloatCoding):
        weight = tensors[place.weight_name]
        weight = weight.t().contiguous() if place.transposed else weight
        coding = FloatCoding(str(weight.dtype).removeprefix("torch."))
        return PackedWeight(coding, place.out_features, place.in_features, {"weight": weight})
    parts = {name.rpartition(".")[2]: tensors[name] for name in stated.tensor_names(place.name)}
    return PackedWeight(stated.coding, place.out_features, place.in_features, parts)


def rounded_once(place: LinearPlace, target: Tensor, coding: FloatCoding) -> PackedWeight:
    """A target in the dtype of the weight; SettingsError where that can't hold it."""
    packed = PackedWeight.from_float(target, coding)
    if not bool(packed.tensors["weight"].isfinite().all()):
        raise _too_large(place, "weights", target, coding.dtype)
    return packed


def bias_in(place: LinearPlace, target: Tensor, dtype: torch.dtype) -> Tensor:
    """The same of a bias ``[out_features]``."""
    bias = target.to(dtype)
    if not bool(bias.isfinite().all()):
        raise _too_large(place, "a bias of", target, str(dtype).removeprefix("torch."))
    return bias


def _too_large(place: LinearPlace, what: str, target: Tensor, dtype: str) -> SettingsError:
    return SettingsError(
        f"`{place.name}` with the adapter has {what} up to {float(target.abs().max()):.3g}",
        f"what {dtype} can hold",
        "check the adapter's scale (`lora_alpha`, `r`), or store the model in a wider dtype",
    )
