"""Whole models put together from versions of their places, and how far they are from their source.

Every place is rounded beforehand in each coding that a plan may give it, by the plan's own method against
the inputs that the source gives it (`round_versions`). A plan is then judged by putting its versions into the
source, all of which is in memory, and running it over calibration text (`Stitched`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from tailorbird.calibrate.ledger import Ledger
from tailorbird.calibrate.statistics import GramAccumulator, LinearStatistics
from tailorbird.calibrate.stream import StreamingModel
from tailorbird.errors import ResourceError
from tailorbird.evaluate.streamed import batches, embed_windows, position_chunks
from tailorbird.formats.packed import Coding, PackedWeight, stored_bytes
from tailorbird.hardware.memory import available_bytes
from tailorbird.linear import LinearMethod
from tailorbird.linear.ends import end_method
from tailorbird.linear.quantize.rtn import Rtn
from tailorbird.model.anatomy import Anatomy, BlockAnatomy
from tailorbird.model.weights import Weights
from tailorbird.model.writing import write_tensors
from tailorbird.plan.budget import format_size
from tailorbird.plan.sensitivity import divergence
from tailorbird.progress import Progress

FP32 = 4
#: Place -> label of a coding -> the place in that coding.
Versions = dict[str, dict[str, PackedWeight]]
Offered = Mapping[str, Sequence[Coding]]


def needed_bytes(anatomy: Anatomy, parameters: int, offered: Offered | None, tokens: int) -> int:
    """Memory that judging takes: source, one plan beside it, all versions, hidden states.

    `offered` is None where it isn't known yet: then one version of every place in 16 bits is counted.
    """
    versions = 2 * parameters
    if offered is not None:
        shapes = {p.name: (p.out_features, p.in_features) for p in anatomy.linears()}
        ends = {name: anatomy.end_shape(name) for name in (anatomy.embedding, anatomy.head)}
        shapes = {**ends, **shapes}
        versions = sum(stored_bytes(c, *shapes[name]) for name, codings in offered.items() for c in codings)
    return 2 * FP32 * parameters + versions + 4 * FP32 * tokens * anatomy.hidden_size


def check_memory(anatomy: Anatomy, parameters: int, offered: Offered | None, tokens: int) -> None:
    """Refuse to judge whole models where this machine can't hold them.

    Raises
    ------
    ResourceError
    """
    needed, free = needed_bytes(anatomy, parameters, offered, tokens), available_bytes()
    if needed > free:
        raise ResourceError(
            f"{format_size(free)} of memory free",
            f"{format_size(needed)}, to hold the model and all versions of its places at once",
            "plan with --allocator exact, which runs one block at a time",
        )


@torch.no_grad()
def round_versions(
    model: StreamingModel,
    ids: torch.Tensor,
    method: LinearMethod,
    offered: Offered,
    ends: Mapping[str, LinearStatistics],
    ledger: Ledger,
    progress: Progress,
) -> Versions:
    """Every place in each of its codings, kept in files below `ledger` so that a killed run goes on.

    Parameters
    ----------
    model : StreamingModel
        The source.
    ids : LongTensor ``[windows, length]``
        Calibration tokens.
    method : LinearMethod
    offered : mapping
        Place -> codings.
    ends : mapping
        Statistics of the head's input, or of both uses of a tied pair, under the name of its place. An end
        without them is rounded to nearest.
    ledger : Ledger
    progress : Progress
        Advances by the number of blocks and one.
    """
    return _Rounding(model, ids, method, offered, ends, ledger).run(progress)


class _Rounding:
    """One pass over the source that rounds what it meets."""

    def __init__(
        self,
        model: StreamingModel,
        ids: torch.Tensor,
        method: LinearMethod,
        offered: Offered,
        ends: Mapping[str, LinearStatistics],
        ledger: Ledger,
    ) -> None:
        self.model, self.ids, self.method = model, ids, method
        self.offered, self.end_statistics, self.ledger = offered, ends, ledger
        self.shape = (*ids.shape, model.anatomy.hidden_size)

    def run(self, progress: Progress) -> Versions:
        self.ledger.step("ends", self._ends, keep={_boundary(0)})
        progress.advance()
        names = ["ends"]
        for block in self.model.anatomy.blocks:
            name = f"block-{block.index:05d}"
            self.ledger.step(name, partial(self._block, block), keep={_boundary(block.index + 1)})
            names.append(name)
            progress.advance()
        return {place: versions for name in names for place, versions in self._read(name).items()}

    def _path(self, name: str) -> Path:
        return self.ledger.work / f"{name}.safetensors"

    def _ends(self) -> list[str]:
        """Round the embedding and the head; write what enters the first block."""
        anatomy = self.model.anatomy
        tensors: dict[str, torch.Tensor] = {}
        for name in dict.fromkeys((anatomy.embedding, anatomy.head)):
            if name in self.offered:
                statistics = self.end_statistics.get(name)
                method = Rtn() if statistics is None else self.method
                weight = self.model.end_weight(name)
                for index, coding in enumerate(self.offered[name]):
                    packed = end_method(method, coding).prepare(statistics)(weight, coding)
                    tensors |= {f"{name}|{index}|{part}": t for part, t in packed.tensors.items()}
        self.model.release_ends()
        write_tensors(self._path("ends"), tensors, hashes=False)
        embed_windows(self.model, self.ids, self.ledger.stream(_boundary(0))).close()
        return sorted(tensors)

    def _block(self, anatomy: BlockAnatomy) -> list[str]:
        """Round the linears of a block; write what leaves it."""
        model, index = self.model, anatomy.index
        block = model.load_block(index)
        grams = {p.shares_input: GramAccumulator(p.in_features) for p in anatomy.linears}
        before = self.ledger.open_stream(_boundary(index), *self.shape)
        after = self.ledger.new_stream(_boundary(index + 1), *self.shape)
        for start, stop in batches(*self.ids.shape):
            entering = before.read(start, stop)
            after.write(start, model.capture_inputs(block, index, entering, lambda key, x: grams[key].add(x)))
        tensors: dict[str, torch.Tensor] = {}
        for key in list(grams):
            statistics = grams.pop(key).finish()
            for place in anatomy.linears:
                if place.shares_input == key and place.name in self.offered:
                    weight = model.weight_of(block, place)
                    tensors |= self._rounded(place.name, weight, statistics)
        write_tensors(self._path(f"block-{index:05d}"), tensors, hashes=False)
        before.close()
        after.close()
        return sorted(tensors)

    def _rounded(
        self, name: str, weight: torch.Tensor, statistics: LinearStatistics
    ) -> dict[str, torch.Tensor]:
        prepared = self.method.prepare(statistics)
        return {
            f"{name}|{index}|{part}": tensor
            for index, coding in enumerate(self.offered[name])
            for part, tensor in prepared(weight, coding).tensors.items()
        }

    def _read(self, file: str) -> Versions:
        weights = Weights.open_file(self._path(file))
        parts: dict[tuple[str, int], dict[str, torch.Tensor]] = {}
        for stored in weights.names:
            name, index, part = stored.split("|")
            parts.setdefault((name, int(index)), {})[part] = weights.read(stored)
        shapes = {p.name: (p.out_features, p.in_features) for p in self.model.anatomy.linears()}
        versions: Versions = {}
        for (name, at), tensors in parts.items():
            coding = self.offered[name][at]
            shape = shapes.get(name) or self.model.anatomy.end_shape(name)
            versions.setdefault(name, {})[coding.label] = PackedWeight(coding, *shape, tensors)
        return versions


class Stitched:
    """The source in memory, into which the versions of a plan are put to judge it.

    Parameters
    ----------
    model : StreamingModel
        The source; held whole from here on.
    ids : LongTensor ``[windows, length]``
        Text to judge on.
    versions : dict
        From `round_versions`.
    """

    def __init__(self, model: StreamingModel, ids: torch.Tensor, versions: Versions) -> None:
        self.model, self.ids, self.versions = model, ids, versions
        anatomy = model.anatomy
        self.blocks = [model.load_block(index) for index in range(len(anatomy.blocks))]
        self.linears = {p.name: (self.blocks[b.index], p) for b in anatomy.blocks for p in b.linears}
        self.source = {name: model.weight_of(*at) for name, at in self.linears.items()}
        self.ends = {
            name: model.end_weight(name) for name in dict.fromkeys((anatomy.embedding, anatomy.head))
        }
        self.stitched: dict[str, Coding] = {}
        self.stitched_ends = dict(self.ends)
        self.targets = [self._hidden(window) for window in range(self.windows)]

    @property
    def windows(self) -> int:
        """How many windows of text there are."""
        return len(self.ids)

    @torch.no_grad()
    def __call__(self, codings: Mapping[str, Coding], windows: Sequence[int]) -> float:
        """Mean KL from the source over these windows, nats per token; places not named stay as they are."""
        self._put(codings)
        total = sum(self._divergence(window) for window in windows)
        return max(total, 0.0) / (len(windows) * self.ids.shape[1])

    def _put(self, codings: Mapping[str, Coding]) -> None:
        for name in self.versions:
            coding = codings.get(name)
            if coding == self.stitched.get(name):
                continue
            weight = None if coding is None else self.versions[name][coding.label].dequantize()
            if name in self.linears:
                self.model.set_weight(*self.linears[name], self.source[name] if weight is None else weight)
            else:
                self._put_end(name, self.ends[name] if weight is None else weight)
            if coding is None:
                del self.stitched[name]
            else:
                self.stitched[name] = coding

    def _put_end(self, name: str, weight: torch.Tensor) -> None:
        tied = self.model.anatomy.tied
        for end in self.ends if tied else (name,):
            self.stitched_ends[end] = weight

    @torch.no_grad()
    def _hidden(self, window: int) -> torch.Tensor:
        """What leaves the last block, ``[1, length, hidden_size]``."""
        self.model.set_end_weight(
            self.model.anatomy.embedding, self.stitched_ends[self.model.anatomy.embedding]
        )
        hidden = self.model.embed(self.ids[window : window + 1])
        for index, block in enumerate(self.blocks):
            hidden = self.model.run_block(block, index, hidden)
        return hidden

    def _divergence(self, window: int) -> float:
        """KL summed over the positions of a window."""
        head = self.model.anatomy.head
        hidden, target = self._hidden(window), self.targets[window]
        total = 0.0
        for start, stop in position_chunks(self.ids.shape[1], self.model.anatomy.vocab_size):
            self.model.set_end_weight(head, self.ends[head])
            wanted = self.model.logits(target[:, start:stop])[0]
            self.model.set_end_weight(head, self.stitched_ends[head])
            moved = self.model.logits(hidden[:, start:stop])[0].sub_(wanted)
            total += divergence(wanted.softmax(-1), moved)
        return total


def _boundary(index: int) -> str:
    """Name of the hidden states that enter block `index`."""
    return f"hidden-{index}"
