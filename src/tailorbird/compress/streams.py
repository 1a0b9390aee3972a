"""The hidden states of all calibration windows at the boundaries of blocks, in files of the job.

There are two kinds: "result", which walks through what is compressed so far, and "source", which walks
through the source where a method compares the two. The stream at boundary ``i`` enters block ``i``; that of
the last boundary enters the final norm.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from torch import Tensor, nn

from tailorbird.calibrate.activations import ActivationFile
from tailorbird.calibrate.job import Job
from tailorbird.calibrate.stream import StreamingModel
from tailorbird.evaluate.streamed import batches
from tailorbird.model.outline import Reached

#: Around a block's run over windows `start` to `stop`: what is kept of it, or was kept before.
Passing = Callable[[int, int], AbstractContextManager[None]]


def as_is(start: int, stop: int) -> AbstractContextManager[None]:
    """All of the block runs."""
    return contextlib.nullcontext()


class Streams:
    """Both kinds, of one job.

    Parameters
    ----------
    job : Job
        Among whose files they lie.
    model : StreamingModel
        Whose blocks they enter.
    ids : LongTensor ``[windows, length]`` or None
        Tokens; None where nothing is asked of the streams.
    """

    def __init__(self, job: Job, model: StreamingModel, ids: Tensor | None) -> None:
        self._job, self._model, self._ids = job, model, ids

    @property
    def ids(self) -> Tensor:
        """Tokens, ``[windows, length]``."""
        assert self._ids is not None  # what needs statistics comes with tokens; `fit` sees to it
        return self._ids

    def batches(self) -> list[tuple[int, int]]:
        """Windows that run together, from one to another."""
        return batches(*self.ids.shape)

    def open(self, kind: str, index: int) -> ActivationFile:
        """The stream at a boundary, ``[windows, length, hidden_size]``, to be read."""
        return self._job.open_stream(f"{kind}-{index}", *self._shape)

    def _new(self, kind: str, index: int) -> ActivationFile:
        return self._job.new_stream(f"{kind}-{index}", *self._shape)

    @property
    def _shape(self) -> tuple[int, int, int]:
        windows, length = self.ids.shape
        return windows, length, self._model.anatomy.hidden_size

    def walk(self, kind: str, index: int) -> Iterator[tuple[int, int, Tensor]]:
        """Windows from one to another, with their hidden states at a boundary."""
        stream = self.open(kind, index)
        for start, stop in self.batches():
            yield start, stop, stream.read(start, stop)
        stream.close()

    def begin(self, kind: str) -> None:
        """Look all tokens up in the embedding."""
        stream = self._new(kind, 0)
        for start, stop in self.batches():
            stream.write(start, self._model.embed(self.ids[start:stop]))
        stream.close()

    def carry(self, kind: str, index: int, block: nn.Module, passing: Passing = as_is) -> None:
        """Run a stream through `block`, as `passing` has it, into the stream of the next boundary."""
        after = self._new(kind, index + 1)
        for start, stop, hidden in self.walk(kind, index):
            with passing(start, stop):
                after.write(start, self._model.run_block(block, index, hidden))
        after.close()

    def inputs(
        self, key: str, index: int, block: nn.Module, passing: Passing = as_is
    ) -> Iterator[tuple[int, int, Tensor]]:
        """Windows from one to another, with what the linears that share the input `key` read of "result"."""
        for start, stop, hidden in self.walk("result", index):
            with passing(start, stop):
                x = self._input(key, index, block, hidden)
            del hidden
            yield start, stop, x

    def source_input(self, key: str, index: int, block: nn.Module, start: int, stop: int) -> Tensor:
        """What the linears that share the input `key` read in the source, of some windows."""
        stream = self.open("source", index)
        x = self._input(key, index, block, stream.read(start, stop))
        stream.close()
        return x

    def _input(self, key: str, index: int, block: nn.Module, hidden: Tensor) -> Tensor:
        found: list[Tensor] = []

        def keep(name: str, x: Tensor) -> None:
            if name == key:
                found.append(x)
                raise Reached  # what the block does after it is not needed

        with contextlib.suppress(Reached):
            self._model.capture_inputs(block, index, hidden, keep)
        return found[0]
