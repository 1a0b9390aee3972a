"""Compression, one block at a time: from a source and a choice per place to the files of the result.

Two streams of hidden states walk over the blocks: one through the source, one through what has been
compressed so far. Inside a block the linears are treated in the order in which data reaches them;
after each group that shares an input the block runs again, so that every linear is rounded against
the inputs it will really see (and, for asymmetric calibration, S139, towards the outputs of the
source). Then a block method, where there is one, learns them all together; some learn several blocks at a
time (`blocks/windows.py`). When a block, or such a window, is finished its files are written, both streams
are saved at its boundary and it is marked done: a killed run continues there and ends with the same bytes.
At the end a model method may learn all blocks together.

Files are those of `model/shards.py`; with a fold (`compress/folds.py`) one more records its scales, after a
rotation (`compress/rotation.py`) one more says by what the source was rotated.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tailorbird.calibrate.activations import ActivationFile
from tailorbird.calibrate.importance import attention_received, token_weights
from tailorbird.calibrate.input_scales import InputScale
from tailorbird.calibrate.job import Job
from tailorbird.calibrate.kept import KeptInputs, KeptOutputs, has_room, input_bytes, output_bytes
from tailorbird.calibrate.statistics import GramAccumulator, LinearStatistics
from tailorbird.calibrate.stream import StreamingModel
from tailorbird.compress.blocks.beside import begin
from tailorbird.compress.blocks.flatquant import FlatQuantWeight, share_inputs
from tailorbird.compress.blocks.method import BlockMethod, LearnedWeight
from tailorbird.compress.blocks.omniquant import OmniQuantWeight
from tailorbird.compress.blocks.training import Learned, learn
from tailorbird.compress.blocks.transform import BlockTransform
from tailorbird.compress.blocks.windows import Window, windows_of
from tailorbird.compress.folds import BlockFolding
from tailorbird.compress.whole.method import ModelMethod
from tailorbird.compress.whole.stage import learn_whole, put_learned
from tailorbird.evaluate.streamed import batches
from tailorbird.formats.modules import CompressedLinear
from tailorbird.formats.packed import (
    PARTS,
    Coding,
    IntegerCoding,
    LowRank,
    PackedCoding,
    PackedWeight,
    coding_to_dict,
)
from tailorbird.formats.sparse import Sparse
from tailorbird.formats.transform import Transform, transform_to_dict
from tailorbird.hardware.memory import trim_heap
from tailorbird.kernels.reference import INT8_STATIC
from tailorbird.linear import FoldMethod, LinearMethod
from tailorbird.linear.correct import Correction
from tailorbird.linear.correct.eora import Corrected
from tailorbird.linear.ends import end_method
from tailorbird.linear.error import output_error, row_errors
from tailorbird.linear.folds import FOLDS_FILE
from tailorbird.linear.quantize.rtn import Rtn
from tailorbird.linear.rotate.weights import ROTATION_FILE
from tailorbird.model.anatomy import Anatomy, BlockAnatomy, LinearPlace
from tailorbird.model.checkpoint import Checkpoint
from tailorbird.model.json_file import read_json
from tailorbird.model.outline import Reached, put_tensor
from tailorbird.model.shards import file_count, file_name, write_index
from tailorbird.model.weights import Weights
from tailorbird.model.writing import write_json, write_tensors
from tailorbird.plan.sketches import read_sketch, sketch_linears
from tailorbird.progress import Progress

#: Of a job: where the learning of the whole model keeps its states while it lasts.
STATES = "whole-states"
#: Of a job: where the sketches of all linears lie until the blocks are done.
SKETCHES = "sketches"
#: Of a job: blocks that were learned in one window and are to be learned again in the next.
WINDOWS = "windows"
#: Of a job: ending of the files in which the static scales of a block's inputs wait.
INPUT_SCALES = "inputs.safetensors"

#: Around a block's run over windows `start` to `stop`: what is kept of it, or was kept before.
Passing = Callable[[int, int], AbstractContextManager[None]]


def _as_is(start: int, stop: int) -> AbstractContextManager[None]:
    return contextlib.nullcontext()


@dataclass(frozen=True)
class Compression:
    """What the pipeline needs to know, fixed before it starts.

    Attributes
    ----------
    codings : dict
        Place -> coding; a place that isn't named stays as it is stored.
    method : LinearMethod
        Rounds the linears inside the blocks, and the head.
    ids : LongTensor ``[windows, length]`` or None
        Calibration tokens; None only for a method that needs none, without a fold.
    tied : LinearStatistics or None
        By which a tied pair is rounded, where it is compressed (`plan.ends`).
    rotation : dict or None
        By what the source was rotated, in JSON types.
    fold : FoldMethod or None
        Moves scales inside the blocks before their linears are rounded.
    correction : Correction or None
        Puts low-rank parts beside the linears that were rounded.
    low_rank, sparse, transforms : dict
        Linear of the blocks -> its part of that kind.
    block : BlockMethod or None
        Learns the linears of a block, or of several, together, once they are rounded.
    whole : ModelMethod or None
        Learns those of all blocks together, at the end.
    seed : int
        Of what is random in it.
    rounded_inputs : dict of str to str
        Place -> what its inputs are rounded to by those who run the result (`planning.with_rounded_inputs`).
    """

    codings: dict[str, Coding]
    method: LinearMethod
    ids: torch.Tensor | None
    tied: LinearStatistics | None
    rotation: dict[str, Any] | None = None
    fold: FoldMethod | None = None
    correction: Correction | None = None
    low_rank: dict[str, LowRank] = field(default_factory=dict)
    sparse: dict[str, Sparse] = field(default_factory=dict)
    transforms: dict[str, Transform] = field(default_factory=dict)
    block: BlockMethod | None = None
    whole: ModelMethod | None = None
    seed: int = 0
    rounded_inputs: dict[str, str] = field(default_factory=dict)


class Pipeline:
    """One compression; `run` does what is left of it."""

    def __init__(
        self,
        job: Job,
        checkpoint: Checkpoint,
        model: StreamingModel,
        compression: Compression,
        progress: Progress,
    ) -> None:
        self.job = job
        self.checkpoint = checkpoint
        self.model = model
        self.anatomy = model.anatomy
        self.compression = compression
        self.progress = progress
        folds = compression.fold.needs if compression.fold is not None else frozenset()
        corrects = compression.correction.requirements if compression.correction is not None else frozenset()
        self.crossed = "cross" in compression.method.needs
        self.weighted = "attention" in compression.method.needs
        self.sketched = "sketch" in compression.method.needs
        self.gathers = "gram" in compression.method.needs | folds | corrects
        self.static = {name for name, to in compression.rounded_inputs.items() if to == INT8_STATIC}
        self.streamed = self.gathers or compression.block is not None or bool(self.static)
        self.paired = self.crossed or compression.block is not None
        self.learns_scales = compression.block is not None and compression.block.transform

    @torch.no_grad()
    def run(self) -> dict[str, dict[str, float]]:
        """Write every file of the result that is not there yet.

        Returns
        -------
        dict
            Place -> ``{"error": relative output error as measured when it was rounded}``.
        """
        measured: dict[str, dict[str, float]] = {}
        blocks = self.anatomy.blocks
        if self.sketched:
            self.job.step(SKETCHES, self._sketch)
            self.progress.stage("compress", len(blocks) + 1)
        measured |= self.job.step("embedding", self._embedding)
        method = self.compression.block
        if method is None or method.window == 1:
            for block in blocks:
                measured |= self.job.step(
                    f"block-{block.index:05d}",
                    partial(self._block, block),
                    self._stream_names(block.index + 1) if self.streamed else set(),
                )
                self.progress.advance(note=block.name)
        else:
            for window in windows_of(len(blocks), method.window, method.overlap):
                kept = {f"result-{window.kept}", f"source-{window.stop}"}
                measured |= self.job.step(f"window-{window.number:05d}", partial(self._window, window), kept)
                for waited in self.job.part(WINDOWS).work.glob(f"{window.number - 1:05d}-*"):
                    waited.unlink()
                self.progress.advance(window.kept - window.start, note=blocks[window.stop - 1].name)
            self.job.drop_part(WINDOWS)
        self.job.drop_part(SKETCHES)
        if not self.anatomy.tied:
            measured |= self.job.step("head", self._head)
        self.progress.advance()
        self.job.drop_streams(set())
        self._index()
        if self.compression.whole is not None and self._integers():
            measured |= self.job.step("whole", self._whole)
            self.job.drop_part(STATES)
            self.job.step("whole-files", self._put_whole)
        return measured

    def _sketch(self) -> dict[str, Any]:
        """Sketch the Hessian by every linear that is compressed; the sketches are files of the job."""
        ids = self.compression.ids
        assert ids is not None
        names = frozenset(place.name for place in self.anatomy.linears()) & self.compression.codings.keys()
        self.progress.stage("sketch the Hessian", 2 * len(self.anatomy.blocks) + 1)
        sketch_linears(self.model, ids, names, self.job.part(SKETCHES), self.compression.seed, self.progress)
        return {}

    def _integers(self) -> bool:
        """Whether a linear inside the blocks has codes that can learn."""
        codings = (self.compression.codings.get(place.name) for place in self.anatomy.linears())
        return any(isinstance(coding, IntegerCoding) for coding in codings)

    def _whole(self) -> dict[str, Any]:
        """Learn what all blocks hold, together."""
        compression = self.compression
        assert compression.whole is not None
        assert compression.ids is not None
        self.progress.stage("learn the whole model", compression.whole.steps)
        found = learn_whole(
            compression.whole, self.checkpoint, self.anatomy, compression.codings, compression.ids,
            compression.seed, self.job.partial, self.job.work / "done",
            self.job.work / STATES, self.progress,
        )  # fmt: skip
        trim_heap()  # of two whole models, whose tensors may be small
        return found

    def _put_whole(self) -> dict[str, Any]:
        put_learned(self.job.partial, self.job.work / "done")
        return {}

    def _stream_names(self, index: int) -> set[str]:
        return {f"result-{index}"} | ({f"source-{index}"} if self.paired else set())

    def _open_stream(self, kind: str, index: int) -> ActivationFile:
        return self.job.open_stream(f"{kind}-{index}", *self._stream_shape())

    def _new_stream(self, kind: str, index: int) -> ActivationFile:
        return self.job.new_stream(f"{kind}-{index}", *self._stream_shape())

    def _stream_shape(self) -> tuple[int, int, int]:
        ids = self.compression.ids
        assert ids is not None  # what needs statistics comes with tokens; `fit` sees to it
        windows, length = ids.shape
        return windows, length, self.anatomy.hidden_size

    def _embedding(self) -> dict[str, Any]:
        """Round the embedding, write all that lies outside the blocks, start both streams."""
        name = self.anatomy.embedding
        coding = self.compression.codings.get(name)
        weight = self.model.end_weight(name)
        tensors = {other: self.checkpoint.weights.read(other) for other in self.anatomy.other}
        done: dict[str, Any] = {}
        replacement = None
        if coding is None:
            tensors[f"{name}.weight"] = self.checkpoint.weights.read(f"{name}.weight")
        else:
            statistics = self.compression.tied
            own = self.compression.method if statistics is not None else Rtn()
            packed = end_method(own, coding)(weight, statistics, coding)
            tensors |= {f"{name}.{part}": tensor for part, tensor in packed.tensors.items()}
            replacement = packed.dequantize()
            gram = None if statistics is None else statistics.gram
            done[name] = {"error": output_error(weight, replacement, gram)}
            self._write_row_errors("embedding", {name: row_errors(weight, replacement)})
        write_tensors(self.job.partial / file_name(self.anatomy, 0), tensors)
        if self.streamed:
            assert self.compression.ids is not None
            if self.paired:
                self._embed_into("source")
            if replacement is not None:
                self.model.set_end_weight(name, replacement)
            self._embed_into("result")
        self.model.release_ends()
        return done

    def _embed_into(self, kind: str) -> None:
        ids = self.compression.ids
        assert ids is not None
        stream = self._new_stream(kind, 0)
        for start, stop in batches(*ids.shape):
            stream.write(start, self.model.embed(ids[start:stop]))
        stream.close()

    def _block(self, anatomy: BlockAnatomy) -> dict[str, Any]:
        """Compress one block, write its file, carry both streams over it."""
        block = self._rounded(anatomy)
        if self.compression.block is not None:
            block.drop_kept()  # what learns changes them once more
            self._learn_together([block])
        self._write(block)
        if self.streamed:
            self._carry("result", anatomy.index, block.module, block.passing)
        block.drop_kept()
        return block.done

    def _window(self, window: Window) -> dict[str, Any]:
        """Compress the new blocks of a window, learn all of it, and finish those that the next one hasn't."""
        blocks: list[_Block] = []
        for anatomy in self.anatomy.blocks[window.start : window.stop]:
            if blocks:
                self._carry("result", anatomy.index - 1, blocks[-1].module, blocks[-1].passing)
            learned = anatomy.index < window.new
            blocks.append(self._again(window, anatomy) if learned else self._rounded(anatomy))
        for block in blocks:
            block.drop_kept()
        self._learn_together(blocks)
        done: dict[str, Any] = {}
        for block in blocks:
            done |= block.done
            if block.anatomy.index < window.kept:
                self._write(block)
                self._carry("result", block.anatomy.index, block.module)
            else:
                write_tensors(self._between(window.number, block.anatomy), block.state())
        return done

    def _between(self, number: int, anatomy: BlockAnatomy) -> Path:
        """Where a block waits that the window of this number left to the next."""
        return self.job.part(WINDOWS).work / f"{number:05d}-{anatomy.index:05d}.safetensors"

    def _again(self, window: Window, anatomy: BlockAnatomy) -> _Block:
        """A block as the window before left it, to be learned once more."""
        stored = Weights.open_file(self._between(window.number - 1, anatomy))
        block = _Block(anatomy, self.model.load_block(anatomy.index))
        block.take_state({name: stored.read(name) for name in stored.names})
        for name in anatomy.other:
            module, _, part = name.rpartition(".")
            put_tensor(
                self.model.module_of(block.module, module), part, block.tensors[name].to(self.model.dtype)
            )
        for place in anatomy.linears:
            if place.name not in self.compression.codings:
                continue
            packed = self._read_back(place, block.tensors)
            self.model.set_weight(block.module, place, packed.dequantize())
            self._begin(block, place, block.learning.originals.get(place.name), packed)
        return block

    def _rounded(self, anatomy: BlockAnatomy) -> _Block:
        """Round the linears of a block, and carry the source's stream over it."""
        index = anatomy.index
        chosen = [p for p in anatomy.linears if p.name in self.compression.codings]
        source = self._pass_source(anatomy) if self.streamed and self.paired else None
        block = _Block(anatomy, self.model.load_block(index))
        working = block.module
        block.kept = self._kept_outputs(anatomy)
        tensors = block.tensors
        tensors |= {other: self.checkpoint.weights.read(other) for other in anatomy.other}
        for place in anatomy.linears:
            if place not in chosen:
                tensors[place.weight_name] = self.checkpoint.weights.read(place.weight_name)
        weights = self._token_weights(index, working) if self.weighted else None
        folding = None
        if self.compression.fold is not None or self.learns_scales:
            folding = block.folding = BlockFolding(
                self.compression.fold, self.model, working, anatomy, self.compression.codings, tensors
            )
            folding.fold_pairs(lambda place: self._statistics(index, place, working, None, None, weights))
        groups = sharing_input(chosen)
        for together in groups:
            statistics = None
            if self.gathers:
                if folding is not None:
                    folding.shift_norm(together, partial(self._inputs, index, together[0], working))
                statistics = self._statistics(
                    index, together[0], working, source, folding, weights, block.passing
                )
                if folding is not None:
                    statistics = folding.fold_norm(together, statistics)
            rounded = self._prepared(statistics)
            for place in together:
                if self.sketched and statistics is not None:
                    sketch = read_sketch(self.job.part(SKETCHES), place.name)
                    rounded = self._prepared(replace(statistics, sketch=sketch))
                weight = self.model.weight_of(working, place)
                coding = self.compression.codings[place.name]
                packed = rounded(weight, coding, self.compression.low_rank.get(place.name))
                self._begin(block, place, weight, packed)
                approximation = packed.dequantize()
                gram = None if statistics is None else statistics.gram
                block.done[place.name] = {"error": output_error(weight, approximation, gram)}
                block.rows[place.name] = row_errors(weight, approximation)
                tensors |= self._stored(place, packed)
                self.model.set_weight(working, place, approximation)
                del weight, approximation, packed
                if block.kept is not None and together is not groups[-1]:
                    block.kept.keep(place, self.model.module_of(working, place.name))
            del rounded, statistics
        if source is not None:
            source.drop()
        return block

    def _pass_source(self, anatomy: BlockAnatomy) -> _SourceInputs | None:
        """Carry the source's stream over a block; what its linears read, where that is asked for."""
        ids = self.compression.ids
        assert ids is not None
        index = anatomy.index
        module = self.model.load_block(index)
        if not self.crossed:
            self._carry("source", index, module)
            return None
        if not self._has_room(input_bytes(anatomy, ids.numel())):
            self._carry("source", index, module)
            return _SourceInputs(partial(self._source_input, index, module), lambda: None)
        kept = KeptInputs(self.job, anatomy, *ids.shape)
        linears = {place.shares_input: self.model.module_of(module, place.name) for place in anatomy.linears}
        self._carry("source", index, module, partial(kept.passing, linears))
        return _SourceInputs(kept.read, kept.drop)

    def _source_input(
        self, index: int, module: torch.nn.Module, key: str, start: int, stop: int
    ) -> torch.Tensor:
        stream = self._open_stream("source", index)
        x = self._input(key, index, module, stream.read(start, stop))
        stream.close()
        return x

    def _has_room(self, size: int) -> bool:
        """Whether so many bytes are kept on the disk for a while."""
        return has_room(shutil.disk_usage(self.job.work).free, size)

    def _kept_outputs(self, anatomy: BlockAnatomy) -> KeptOutputs | None:
        """Where outputs of linears are kept while others of their block are rounded, if there is room."""
        ids = self.compression.ids
        if not self.gathers or ids is None:
            return None
        room = self._has_room(output_bytes(anatomy, ids.numel()))
        return KeptOutputs(self.job, *ids.shape) if room else None

    def _begin(
        self, block: _Block, place: LinearPlace, weight: torch.Tensor | None, packed: PackedWeight
    ) -> None:
        """Let a linear learn that was rounded, where a method learns its codes."""
        coding = self.compression.codings[place.name]
        if self.compression.block is not None and isinstance(coding, IntegerCoding):
            assert weight is not None
            block.learning.add(self.compression.block, place, weight, packed, coding)

    def _learn_together(self, blocks: list[_Block]) -> None:
        """Learn the linears of blocks that are rounded, and put in what is better than it was."""
        if not any(block.learning.weights for block in blocks):
            return
        for block in blocks:
            self._share_matrices(block)
        transforms = [self._transform(block) for block in blocks if self.learns_scales]
        found = self._learn(blocks)
        blocks[-1].done[blocks[-1].anatomy.name] = {
            "block_error_before": found.before, "block_error_after": found.after,
        }  # fmt: skip
        if found.better:
            for block, transform in zip(blocks, transforms, strict=False):
                assert block.folding is not None
                for fold, scales in transform.learned():
                    block.folding.add(fold, scales)
                for name, weight in block.learning.originals.items():
                    block.learning.originals[name] = transform.transformed(name, weight)
        for block in blocks:
            learning = block.learning
            for name, packed in learning.packed(found.better):
                place = learning.places[name]
                block.rows[name] = row_errors(learning.originals[name], packed.dequantize())
                block.tensors |= self._stored(place, packed)
                self.model.set_weight(block.module, place, packed.dequantize())

    def _transform(self, block: _Block) -> BlockTransform:
        """Scales between the linears of a block that learn, beside what these learn."""
        assert block.folding is not None
        weights = {
            name: weight for name, weight in block.learning.weights.items()
            if isinstance(weight, OmniQuantWeight | FlatQuantWeight)
        }  # fmt: skip
        return BlockTransform(block.anatomy, weights, block.folding.effective)

    def _share_matrices(self, block: _Block) -> None:
        """Let linears that learn matrices share those of one input, and read it as it will be rounded."""
        groups: list[list[FlatQuantWeight]] = []
        for together in sharing_input(list(block.learning.places.values())):
            groups.append([])
            for place in together:
                weight = block.learning.weights[place.name]
                if isinstance(weight, FlatQuantWeight):
                    weight.rounds_to = self.compression.rounded_inputs.get(place.name)
                    groups[-1].append(weight)
        share_inputs(groups)

    def _write(self, block: _Block) -> None:
        """Write the file of a block that is finished, and what is known of it.

        That is how far its rows are from the source, the scales by which it was folded, and those of inputs.
        """
        index = block.anatomy.index
        write_tensors(self.job.partial / file_name(self.anatomy, index + 1), block.tensors)
        if block.rows:
            self._write_row_errors(f"block-{index:05d}", block.rows)
        if block.folds:
            write_tensors(self.job.work / "done" / f"block-{index:05d}.{FOLDS_FILE}", block.folds)
        scales = self._input_scales(block)
        if scales:
            write_tensors(self.job.work / "done" / f"block-{index:05d}.{INPUT_SCALES}", scales)

    def _input_scales(self, block: _Block) -> dict[str, torch.Tensor]:
        """Static scales of the inputs of linears, by what these read now that the block is finished."""
        index, ids = block.anatomy.index, self.compression.ids
        searches: dict[str, InputScale] = {}
        readers: dict[str, dict[str, CompressedLinear]] = {}
        found: dict[str, InputScale] = {}
        for place in block.anatomy.linears:
            if place.name in self.static:
                packed = self._read_back(place, block.tensors)
                linear = CompressedLinear.from_packed(packed)
                alone = linear.transform is not None or linear.sparse is not None
                name = place.name if alone else place.shares_input
                found[place.name] = searches.setdefault(name, InputScale(place.in_features))
                readers.setdefault(place.shares_input, {})[name] = linear
        for take in (InputScale.widen, InputScale.add) if found else ():

            def show(key: str, x: torch.Tensor, take: Any = take) -> None:
                for name, linear in readers.get(key, {}).items():
                    take(searches[name], linear.to_be_rounded(x))

            assert ids is not None  # linears that round have been given statistics
            stream = self._open_stream("result", index)
            for start, stop in batches(*ids.shape):
                self.model.capture_inputs(block.module, index, stream.read(start, stop), show)
            stream.close()
        return {name: torch.tensor(search.scale) for name, search in found.items()}

    def _prepared(self, statistics: LinearStatistics | None) -> Corrected:
        """The method, and the correction after it, for weights that read one input."""
        rounded = self.compression.method.prepare(statistics)
        if self.compression.correction is None:
            return lambda weight, coding, part: rounded(weight, coding)
        return self.compression.correction.prepare(rounded, statistics)

    def _learn(self, blocks: list[_Block]) -> Learned:
        """Learn the linears of blocks that follow one another, and whose source has its outputs already."""
        assert self.compression.block is not None
        assert self.compression.ids is not None
        first, last = blocks[0].anatomy.index, blocks[-1].anatomy.index
        inputs, targets = self._open_stream("result", first), self._open_stream("source", last + 1)

        def run(hidden: torch.Tensor) -> torch.Tensor:
            for block in blocks:
                hidden = self.model.run_block(block.module, block.anatomy.index, hidden)
            return hidden

        found = learn(
            self.compression.block,
            {
                name: self.model.module_of(block.module, name)
                for block in blocks
                for name in block.learning.places
            },
            {name: weight for block in blocks for name, weight in block.learning.weights.items()},
            run, inputs, targets, self.compression.seed + first, batches(*self.compression.ids.shape),
        )  # fmt: skip
        inputs.close()
        targets.close()
        return found

    def _stored(self, place: LinearPlace, packed: PackedWeight) -> dict[str, torch.Tensor]:
        """Tensors of a compressed linear under their names in the file."""
        parts = dict(packed.tensors)
        if place.transposed and "weight" in parts:
            parts["weight"] = parts["weight"].t().contiguous()
        return {f"{place.name}.{part}": tensor for part, tensor in parts.items()}

    def _read_back(self, place: LinearPlace, tensors: Mapping[str, torch.Tensor]) -> PackedWeight:
        """The linear of which `_stored` made `tensors`, among others."""
        names = {part: f"{place.name}.{part}" for part in ("weight", *PARTS)}
        parts = {part: tensors[name] for part, name in names.items() if name in tensors}
        if place.transposed and "weight" in parts:
            parts["weight"] = parts["weight"].t().contiguous()
        coding = self.compression.codings[place.name]
        return PackedWeight(coding, place.out_features, place.in_features, parts)

    def _statistics(
        self,
        index: int,
        place: LinearPlace,
        working: torch.nn.Module,
        source: _SourceInputs | None,
        folding: BlockFolding | None,
        weights: torch.Tensor | None,
        passing: Passing = _as_is,
    ) -> LinearStatistics:
        """Statistics of the input that `place` and its fellows read in the compressed block.

        What `folding` has made of that input is done to the source's too, so that both can be compared.
        `weights`, ``[windows, length]``, are those of tokens; windows run as `passing` has it.
        """
        key = place.shares_input
        accumulator = GramAccumulator(
            place.in_features, cross=source is not None, weighted=weights is not None
        )
        ids = self.compression.ids
        assert ids is not None
        result_stream = self._open_stream("result", index)
        for start, stop in batches(*ids.shape):
            with passing(start, stop):
                x = self._input(key, index, working, result_stream.read(start, stop))
            own = None if weights is None else weights[start:stop]
            if source is not None:
                source_x = source.read(key, start, stop)
                source_x = source_x if folding is None else folding.of_source(key, source_x)
                accumulator.add(x, source_x.view_as(x), own)
            else:
                accumulator.add(x, weights=own)
        result_stream.close()
        return accumulator.finish()

    def _inputs(self, index: int, place: LinearPlace, working: torch.nn.Module) -> Iterator[torch.Tensor]:
        """Batches ``[windows, length, in_features]`` of what `place` reads in the compressed block."""
        assert self.compression.ids is not None
        stream = self._open_stream("result", index)
        for start, stop in batches(*self.compression.ids.shape):
            x = self._input(place.shares_input, index, working, stream.read(start, stop))
            yield x.reshape(stop - start, -1, place.in_features)  # some models join windows and tokens
        stream.close()

    def _token_weights(self, index: int, working: torch.nn.Module) -> torch.Tensor:
        """Weights of all tokens, ``[windows, length]``, in a block of which nothing is rounded yet."""
        ids = self.compression.ids
        assert ids is not None
        stream = self._open_stream("result", index)
        received = [
            attention_received(self.model, working, index, stream.read(start, stop))
            for start, stop in batches(*ids.shape)
        ]
        stream.close()
        return token_weights(torch.cat(received), self.compression.method.least_token)

    def _input(self, key: str, index: int, block: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """What the linears that share the input `key` read when `hidden` enters the block."""
        found: list[torch.Tensor] = []

        def keep(name: str, x: torch.Tensor) -> None:
            if name == key:
                found.append(x)
                raise Reached  # what the block does after it is not needed

        with contextlib.suppress(Reached):
            self.model.capture_inputs(block, index, hidden, keep)
        return found[0]

    def _carry(self, kind: str, index: int, block: torch.nn.Module, passing: Passing = _as_is) -> None:
        """Run a stream through `block`, as `passing` has it, into the stream of the next boundary."""
        ids = self.compression.ids
        assert ids is not None
        before, after = self._open_stream(kind, index), self._new_stream(kind, index + 1)
        for start, stop in batches(*ids.shape):
            with passing(start, stop):
                after.write(start, self.model.run_block(block, index, before.read(start, stop)))
        before.close()
        after.close()

    def _head(self) -> dict[str, Any]:
        """Round an untied head against the inputs that reach it, and write its file."""
        name = self.anatomy.head
        coding = self.compression.codings.get(name)
        tensors: dict[str, torch.Tensor] = {}
        done: dict[str, Any] = {}
        if coding is None:
            tensors[f"{name}.weight"] = self.checkpoint.weights.read(f"{name}.weight")
        else:
            weight = self.model.end_weight(name)
            statistics = self._head_statistics() if self.gathers else None
            packed = end_method(self.compression.method, coding)(weight, statistics, coding)
            approximation = packed.dequantize()
            gram = None if statistics is None else statistics.gram
            done[name] = {"error": output_error(weight, approximation, gram)}
            self._write_row_errors("head", {name: row_errors(weight, approximation)})
            tensors |= {f"{name}.{part}": tensor for part, tensor in packed.tensors.items()}
            self.model.release_ends()
        if f"{name}.bias" in self.checkpoint.weights.names:
            tensors[f"{name}.bias"] = self.checkpoint.weights.read(f"{name}.bias")
        last = file_count(self.anatomy) - 1
        write_tensors(self.job.partial / file_name(self.anatomy, last), tensors)
        return done

    def _head_statistics(self) -> LinearStatistics:
        count = len(self.anatomy.blocks)
        ids = self.compression.ids
        assert ids is not None
        accumulator = GramAccumulator(self.model.head_width, cross=self.crossed)
        streams = [self._open_stream("result", count)]
        if self.crossed:
            streams.append(self._open_stream("source", count))
        for start, stop in batches(*ids.shape):
            accumulator.add(*(self.model.head_input(s.read(start, stop)) for s in streams))
        for stream in streams:
            stream.close()
        return accumulator.finish()

    def _write_row_errors(self, name: str, rows: dict[str, torch.Tensor]) -> None:
        write_tensors(self.job.work / "done" / f"{name}.rows.safetensors", rows)

    def _index(self) -> None:
        """Write the index of all files, what was rotated and folded, and the configuration of the result."""
        scales: dict[str, torch.Tensor] = {}
        for path in sorted((self.job.work / "done").glob(f"*.{FOLDS_FILE}")):
            recorded = Weights.open_file(path)
            scales |= {name: recorded.read(name) for name in recorded.names}
        if scales:
            write_tensors(self.job.partial / FOLDS_FILE, scales)
        if self.compression.rotation is not None:
            write_json(self.job.partial / ROTATION_FILE, self.compression.rotation)
        write_index(self.job.partial, self.anatomy)
        config = read_json(self.checkpoint.directory / "config.json") | self.checkpoint.changes
        config["quantization_config"] = quantization_config(
            self.anatomy, self.compression.codings, self.compression.rounded_inputs, self._kept_scales(),
            {
                "low_rank": self.compression.low_rank, "sparse": self.compression.sparse,
                "transform": self.compression.transforms,
            },
            self._ordered(),
        )  # fmt: skip
        write_json(self.job.partial / "config.json", config)

    def _kept_scales(self) -> dict[str, float]:
        """Linear -> static scale of its inputs, of all blocks."""
        scales: dict[str, float] = {}
        for path in sorted((self.job.work / "done").glob(f"*.{INPUT_SCALES}")):
            recorded = Weights.open_file(path)
            scales |= {name: float(recorded.read(name)) for name in recorded.names}
        return scales

    def _ordered(self) -> frozenset[str]:
        """Places whose columns the method stored in an order of its own."""
        names = Weights.open(self.job.partial).names
        return frozenset(name.removesuffix(".order") for name in names if name.endswith(".order"))


@dataclass(frozen=True)
class _SourceInputs:
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


class _Learning:
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


class _Block:
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
        self.learning = _Learning()
        self._folds: dict[str, torch.Tensor] = {}

    @property
    def folds(self) -> dict[str, torch.Tensor]:
        """Scales by which it was folded."""
        return self._folds if self.folding is None else self.folding.found

    @property
    def passing(self) -> Passing:
        """How the block runs: with what is kept of it."""
        return _as_is if self.kept is None else self.kept.passing

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


def quantization_config(
    anatomy: Anatomy,
    codings: dict[str, Coding],
    rounded_inputs: Mapping[str, str],
    input_scales: Mapping[str, float],
    parts: Mapping[str, Mapping[str, LowRank | Sparse | Transform]],
    ordered: frozenset[str],
) -> dict[str, Any]:
    """The entry of ``config.json`` by which the result is loaded; see ``docs/formats.md``.

    `parts` holds, by the key of a kind of part, which linears have one.
    """
    modules: dict[str, Any] = {}
    for place in anatomy.linears():
        coding = codings.get(place.name)
        if isinstance(coding, PackedCoding):
            modules[place.name] = {
                "out": place.out_features, "in": place.in_features, "bias": place.bias,
                "coding": coding_to_dict(coding), "order": place.name in ordered,
            }  # fmt: skip
    for name in dict.fromkeys((anatomy.embedding, anatomy.head)):
        coding = codings.get(name)
        if isinstance(coding, PackedCoding):
            out_features, in_features = anatomy.end_shape(name)
            modules[name] = {
                "out": out_features, "in": in_features, "bias": False,
                "coding": coding_to_dict(coding), "order": name in ordered,
            }  # fmt: skip
    for name in modules.keys() & rounded_inputs.keys():
        modules[name]["activation"] = rounded_inputs[name]
    for name, scale in input_scales.items():
        modules[name]["input_scale"] = scale
    for key, found in parts.items():
        for name, part in found.items():
            modules[name][key] = transform_to_dict(part) if isinstance(part, Transform) else asdict(part)
    return {
        "quant_method": "tailorbird",
        "schema": 1,
        "modules": modules,
        "embedding": anatomy.embedding,
        "head": anatomy.head,
        "tied": anatomy.tied,
    }
