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

import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tailorbird.calibrate.importance import attention_received, token_weights
from tailorbird.calibrate.input_scales import InputScale
from tailorbird.calibrate.job import Job
from tailorbird.calibrate.kept import KeptInputs, KeptOutputs, has_room, input_bytes, output_bytes
from tailorbird.calibrate.statistics import GramAccumulator, LinearStatistics
from tailorbird.calibrate.stream import StreamingModel
from tailorbird.compress.block import Block, SourceInputs, read_back, sharing_input, stored
from tailorbird.compress.blocks.flatquant import FlatQuantWeight, share_inputs
from tailorbird.compress.blocks.omniquant import OmniQuantWeight
from tailorbird.compress.blocks.training import Learned, learn
from tailorbird.compress.blocks.transform import BlockTransform
from tailorbird.compress.blocks.windows import Window, windows_of
from tailorbird.compress.compression import Compression, quantization_config
from tailorbird.compress.folds import BlockFolding
from tailorbird.compress.streams import Passing, Streams, as_is
from tailorbird.compress.whole.stage import learn_whole, put_learned
from tailorbird.formats.modules import CompressedLinear
from tailorbird.formats.packed import (
    Coding,
    IntegerCoding,
    PackedWeight,
)
from tailorbird.hardware.memory import trim_heap
from tailorbird.kernels.reference import INT8_STATIC
from tailorbird.linear.correct.eora import Corrected
from tailorbird.linear.ends import end_method
from tailorbird.linear.error import output_error, row_errors
from tailorbird.linear.folds import FOLDS_FILE
from tailorbird.linear.quantize.gptq import raised_dampings
from tailorbird.linear.quantize.rtn import Rtn
from tailorbird.linear.rotate.weights import ROTATION_FILE
from tailorbird.model.anatomy import BlockAnatomy, LinearPlace
from tailorbird.model.checkpoint import Checkpoint
from tailorbird.model.json_file import read_json
from tailorbird.model.outline import put_tensor
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
        self.streams = Streams(job, model, compression.ids)
        self.streamed = self.gathers or compression.block is not None or bool(self.static)
        self.paired = self.crossed or compression.block is not None
        self.learns_scales = compression.block is not None and compression.block.transform

    @torch.no_grad()
    def run(self) -> dict[str, dict[str, float]]:
        """Write every file of the result that is not there yet.

        Returns
        -------
        dict
            Place -> ``{"error": relative output error as measured when it was rounded}``, with ``"damping"``
            where its Gram matrix took more than the method states.
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
        ids = self.streams.ids
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
        self.progress.stage("learn the whole model", compression.whole.steps)
        found = learn_whole(
            compression.whole, self.checkpoint, self.anatomy, compression.codings, self.streams.ids,
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
            raised: list[float] = []
            with raised_dampings(raised):
                packed = end_method(own, coding)(weight, statistics, coding)
            tensors |= {f"{name}.{part}": tensor for part, tensor in packed.tensors.items()}
            replacement = packed.dequantize()
            gram = None if statistics is None else statistics.gram
            done[name] = _found(output_error(weight, replacement, gram), raised)
            self._write_row_errors("embedding", {name: row_errors(weight, replacement)})
        write_tensors(self.job.partial / file_name(self.anatomy, 0), tensors)
        if self.streamed:
            if self.paired:
                self.streams.begin("source")
            if replacement is not None:
                self.model.set_end_weight(name, replacement)
            self.streams.begin("result")
        self.model.release_ends()
        return done

    def _block(self, anatomy: BlockAnatomy) -> dict[str, Any]:
        """Compress one block, write its file, carry both streams over it."""
        block = self._rounded(anatomy)
        if self.compression.block is not None:
            block.drop_kept()  # what learns changes them once more
            self._learn_together([block])
        self._write(block)
        if self.streamed:
            self.streams.carry("result", anatomy.index, block.module, block.passing)
        block.drop_kept()
        return block.done

    def _window(self, window: Window) -> dict[str, Any]:
        """Compress the new blocks of a window, learn all of it, and finish those that the next one hasn't."""
        blocks: list[Block] = []
        for anatomy in self.anatomy.blocks[window.start : window.stop]:
            if blocks:
                self.streams.carry("result", anatomy.index - 1, blocks[-1].module, blocks[-1].passing)
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
                self.streams.carry("result", block.anatomy.index, block.module)
            else:
                write_tensors(self._between(window.number, block.anatomy), block.state())
        return done

    def _between(self, number: int, anatomy: BlockAnatomy) -> Path:
        """Where a block waits that the window of this number left to the next."""
        return self.job.part(WINDOWS).work / f"{number:05d}-{anatomy.index:05d}.safetensors"

    def _again(self, window: Window, anatomy: BlockAnatomy) -> Block:
        """A block as the window before left it, to be learned once more."""
        left = Weights.open_file(self._between(window.number - 1, anatomy))
        block = Block(anatomy, self.model.load_block(anatomy.index))
        block.take_state({name: left.read(name) for name in left.names})
        for name in anatomy.other:
            module, _, part = name.rpartition(".")
            put_tensor(
                self.model.module_of(block.module, module), part, block.tensors[name].to(self.model.dtype)
            )
        for place in anatomy.linears:
            if place.name not in self.compression.codings:
                continue
            packed = read_back(place, self.compression.codings[place.name], block.tensors)
            self.model.set_weight(block.module, place, packed.dequantize())
            self._begin(block, place, block.learning.originals.get(place.name), packed)
        return block

    def _rounded(self, anatomy: BlockAnatomy) -> Block:
        """Round the linears of a block, and carry the source's stream over it."""
        index = anatomy.index
        chosen = [p for p in anatomy.linears if p.name in self.compression.codings]
        source = self._pass_source(anatomy) if self.streamed and self.paired else None
        block = Block(anatomy, self.model.load_block(index))
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
            raised: list[float] = []
            rounded = self._prepared(statistics, raised)
            for place in together:
                if self.sketched and statistics is not None:
                    sketch = read_sketch(self.job.part(SKETCHES), place.name)
                    raised = []
                    rounded = self._prepared(replace(statistics, sketch=sketch), raised)
                weight = self.model.weight_of(working, place)
                coding = self.compression.codings[place.name]
                packed = rounded(weight, coding, self.compression.low_rank.get(place.name))
                self._begin(block, place, weight, packed)
                approximation = packed.dequantize()
                gram = None if statistics is None else statistics.gram
                block.done[place.name] = _found(output_error(weight, approximation, gram), raised)
                block.rows[place.name] = row_errors(weight, approximation)
                tensors |= stored(place, packed)
                self.model.set_weight(working, place, approximation)
                del weight, approximation, packed
                if block.kept is not None and together is not groups[-1]:
                    block.kept.keep(place, self.model.module_of(working, place.name))
            del rounded, statistics
        if source is not None:
            source.drop()
        return block

    def _pass_source(self, anatomy: BlockAnatomy) -> SourceInputs | None:
        """Carry the source's stream over a block; what its linears read, where that is asked for."""
        ids, index = self.streams.ids, anatomy.index
        module = self.model.load_block(index)
        if not self.crossed:
            self.streams.carry("source", index, module)
            return None
        if not self._has_room(input_bytes(anatomy, ids.numel())):
            self.streams.carry("source", index, module)

            def read(key: str, start: int, stop: int) -> torch.Tensor:
                return self.streams.source_input(key, index, module, start, stop)

            return SourceInputs(read, lambda: None)
        kept = KeptInputs(self.job, anatomy, *ids.shape)
        linears = {place.shares_input: self.model.module_of(module, place.name) for place in anatomy.linears}
        self.streams.carry("source", index, module, partial(kept.passing, linears))
        return SourceInputs(kept.read, kept.drop)

    def _has_room(self, size: int) -> bool:
        """Whether so many bytes are kept on the disk for a while."""
        return has_room(shutil.disk_usage(self.job.work).free, size)

    def _kept_outputs(self, anatomy: BlockAnatomy) -> KeptOutputs | None:
        """Where outputs of linears are kept while others of their block are rounded, if there is room."""
        if not self.gathers or self.compression.ids is None:
            return None
        ids = self.streams.ids
        room = self._has_room(output_bytes(anatomy, ids.numel()))
        return KeptOutputs(self.job, *ids.shape) if room else None

    def _begin(
        self, block: Block, place: LinearPlace, weight: torch.Tensor | None, packed: PackedWeight
    ) -> None:
        """Let a linear learn that was rounded, where a method learns its codes."""
        coding = self.compression.codings[place.name]
        if self.compression.block is not None and isinstance(coding, IntegerCoding):
            assert weight is not None
            block.learning.add(self.compression.block, place, weight, packed, coding)

    def _learn_together(self, blocks: list[Block]) -> None:
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
                block.tensors |= stored(place, packed)
                self.model.set_weight(block.module, place, packed.dequantize())

    def _transform(self, block: Block) -> BlockTransform:
        """Scales between the linears of a block that learn, beside what these learn."""
        assert block.folding is not None
        weights = {
            name: weight for name, weight in block.learning.weights.items()
            if isinstance(weight, OmniQuantWeight | FlatQuantWeight)
        }  # fmt: skip
        return BlockTransform(block.anatomy, weights, block.folding.effective)

    def _share_matrices(self, block: Block) -> None:
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

    def _write(self, block: Block) -> None:
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

    def _input_scales(self, block: Block) -> dict[str, torch.Tensor]:
        """Static scales of the inputs of linears, by what these read now that the block is finished."""
        index = block.anatomy.index
        searches: dict[str, InputScale] = {}
        readers: dict[str, dict[str, CompressedLinear]] = {}
        found: dict[str, InputScale] = {}
        for place in block.anatomy.linears:
            if place.name in self.static:
                packed = read_back(place, self.compression.codings[place.name], block.tensors)
                linear = CompressedLinear.from_packed(packed)
                alone = linear.transform is not None or linear.sparse is not None
                name = place.name if alone else place.shares_input
                found[place.name] = searches.setdefault(name, InputScale(place.in_features))
                readers.setdefault(place.shares_input, {})[name] = linear
        for take in (InputScale.widen, InputScale.add) if found else ():

            def show(key: str, x: torch.Tensor, take: Any = take) -> None:
                for name, linear in readers.get(key, {}).items():
                    take(searches[name], linear.to_be_rounded(x))

            for _, _, hidden in self.streams.walk("result", index):
                self.model.capture_inputs(block.module, index, hidden, show)
        return {name: torch.tensor(search.scale) for name, search in found.items()}

    def _prepared(self, statistics: LinearStatistics | None, raised: list[float]) -> Corrected:
        """The method, and the correction after it, for weights that read one input.

        A damping that is higher than the method states is added to `raised`.
        """
        prepared = self.compression.method.prepare(statistics)

        def rounded(weight: torch.Tensor, coding: Coding) -> PackedWeight:
            with raised_dampings(raised):
                return prepared(weight, coding)

        if self.compression.correction is None:
            return lambda weight, coding, part: rounded(weight, coding)
        return self.compression.correction.prepare(rounded, statistics)

    def _learn(self, blocks: list[Block]) -> Learned:
        """Learn the linears of blocks that follow one another, and whose source has its outputs already."""
        assert self.compression.block is not None
        first, last = blocks[0].anatomy.index, blocks[-1].anatomy.index
        inputs, targets = self.streams.open("result", first), self.streams.open("source", last + 1)

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
            run, inputs, targets, self.compression.seed + first, self.streams.batches(),
        )  # fmt: skip
        inputs.close()
        targets.close()
        return found

    def _statistics(
        self,
        index: int,
        place: LinearPlace,
        working: torch.nn.Module,
        source: SourceInputs | None,
        folding: BlockFolding | None,
        weights: torch.Tensor | None,
        passing: Passing = as_is,
    ) -> LinearStatistics:
        """Statistics of the input that `place` and its fellows read in the compressed block.

        What `folding` has made of that input is done to the source's too, so that both can be compared.
        `weights`, ``[windows, length]``, are those of tokens; windows run as `passing` has it.
        """
        key = place.shares_input
        accumulator = GramAccumulator(
            place.in_features, cross=source is not None, weighted=weights is not None
        )
        for start, stop, x in self.streams.inputs(key, index, working, passing):
            own = None if weights is None else weights[start:stop]
            if source is not None:
                source_x = source.read(key, start, stop)
                source_x = source_x if folding is None else folding.of_source(key, source_x)
                accumulator.add(x, source_x.view_as(x), own)
            else:
                accumulator.add(x, weights=own)
        return accumulator.finish()

    def _inputs(self, index: int, place: LinearPlace, working: torch.nn.Module) -> Iterator[torch.Tensor]:
        """Batches ``[windows, length, in_features]`` of what `place` reads in the compressed block."""
        for start, stop, x in self.streams.inputs(place.shares_input, index, working):
            yield x.reshape(stop - start, -1, place.in_features)  # some models join windows and tokens

    def _token_weights(self, index: int, working: torch.nn.Module) -> torch.Tensor:
        """Weights of all tokens, ``[windows, length]``, in a block of which nothing is rounded yet."""
        received = [
            attention_received(self.model, working, index, hidden)
            for _, _, hidden in self.streams.walk("result", index)
        ]
        return token_weights(torch.cat(received), self.compression.method.least_token)

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
            raised: list[float] = []
            with raised_dampings(raised):
                packed = end_method(self.compression.method, coding)(weight, statistics, coding)
            approximation = packed.dequantize()
            gram = None if statistics is None else statistics.gram
            done[name] = _found(output_error(weight, approximation, gram), raised)
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
        accumulator = GramAccumulator(self.model.head_width, cross=self.crossed)
        kinds = ("result", "source") if self.crossed else ("result",)
        for together in zip(*(self.streams.walk(kind, count) for kind in kinds), strict=True):
            accumulator.add(*(self.model.head_input(hidden) for _, _, hidden in together))
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


def _found(error: float, raised: list[float]) -> dict[str, float]:
    """What a step records of a place that was rounded, with the dampings that had to be raised for it."""
    return {"error": error} | ({"damping": max(raised)} if raised else {})
