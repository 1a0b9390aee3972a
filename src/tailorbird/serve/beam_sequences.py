"""The beams of a request as sequences: they share the pages of what they have in common.

A beam that has been read rests until all others have been, too; then all choose together. The first
continuation of a beam goes on in its place, others get a sequence of their own on the same full pages, with a
copy of the last one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tailorbird.errors import CheckpointError
from tailorbird.serve.beam import Path, Search
from tailorbird.serve.request import Output, TokenLogprob
from tailorbird.serve.runner import Runner
from tailorbird.serve.scheduler import Scheduler
from tailorbird.serve.sequence import Sequence


class BeamSequences:
    """The sequences of a request that is searched.

    Parameters
    ----------
    first : Sequence
        Its prompt.
    search : Search
    stop : frozenset of int
        Tokens that end a text.
    scheduler : Scheduler
    runner : Runner

    Attributes
    ----------
    sequences : list of Sequence
        One for each beam.
    """

    def __init__(
        self, first: Sequence, search: Search, stop: frozenset[int], scheduler: Scheduler, runner: Runner
    ) -> None:
        self.sequences = [first]
        self._search, self._scheduler, self._runner = search, scheduler, runner
        self._request = first.request
        self._stop = torch.tensor(sorted(stop), dtype=torch.int64, device="cpu")
        self._tops: dict[Sequence, list[TokenLogprob]] = {}
        self._cached: int | None = None
        first.beams = self

    def take(self, sequence: Sequence, logits: Tensor) -> list[Output]:
        """A beam was read, and has these logits ``[vocab_size]`` behind it; the answers at the end."""
        if self._cached is None:
            self._cached = sequence.cached or 0
        logprobs = logits.to("cpu", torch.float32).log_softmax(-1)
        if not bool(logprobs.max().isfinite()):
            return [self._failed(index) for index in range(self._request.n)]
        self._tops[sequence] = self._top(logprobs, sequence.written)
        if len(self._tops) < len(self.sequences):
            return []
        self._search.advance([self._tops[beam] for beam in self.sequences])
        self._tops.clear()
        if not self._search.beams:
            best = self._search.ended[: self._request.n]
            return [self._output(index, path) for index, path in enumerate(best)]
        self._go_on()
        return []

    def _top(self, logprobs: Tensor, written: int) -> list[TokenLogprob]:
        """The likeliest tokens of a row."""
        wanted = self._request.sampling.logprobs
        beside: tuple[tuple[int, float], ...] = ()
        if wanted:
            beside = _pairs(logprobs, wanted)
        if written < self._request.sampling.min_tokens:
            logprobs[self._stop] = -torch.inf
        pairs = _pairs(logprobs, self._search.looked_at)
        return [TokenLogprob(token, value, beside) for token, value in pairs if value > -torch.inf]

    def _go_on(self) -> None:
        """Give each beam a sequence."""
        parents = self.sequences
        kept = {path.parent for path in self._search.beams}
        for number, sequence in enumerate(parents):
            if number not in kept:
                self._drop(sequence)
        free = set(range(len(self._search.beams))) - {parents[number].index for number in kept}
        first: dict[int, Path] = {}
        going_on: list[Sequence] = []
        for path in self._search.beams:
            parent = parents[path.parent]
            if path.parent in first:
                going_on.append(self._branch(parent, path, min(free)))
                free.discard(going_on[-1].index)
            else:
                first[path.parent] = path
                going_on.append(parent)
        for number, path in first.items():  # last, since the others begin with what these have read
            self._continue(parents[number], path)
        self.sequences[:] = going_on

    def _drop(self, sequence: Sequence) -> None:
        if sequence in self._scheduler.running:
            self._scheduler.remove(sequence)
        self._runner.forget(sequence)

    def _continue(self, sequence: Sequence, path: Path) -> None:
        sequence.tokens.append(path.tokens[-1].token)
        if sequence not in self._scheduler.running:  # its pages went to others while it rested
            self._scheduler.add(sequence)

    def _branch(self, parent: Sequence, path: Path, index: int) -> Sequence:
        """A sequence that goes on where its parent has come to."""
        scheduler, length = self._scheduler, len(parent.tokens)
        full, rest = divmod(length, scheduler.page_tokens)
        branch = replace(
            parent, index=index, tokens=[*parent.tokens, path.tokens[-1].token], keys=parent.keys[:full],
            computed=0, pages=[],
        )  # fmt: skip
        own = None
        if scheduler.shares_prefixes and parent in scheduler.running and scheduler.has_place:
            own = scheduler.pool.take(1 if rest else 0)
        if own is None:
            scheduler.add(branch)  # it reads everything again, or finds it
            return branch
        if rest:
            self._runner.copy(parent.pages[full], own[0])
        scheduler.pool.share(parent.pages[:full])
        branch.pages, branch.computed = parent.pages[:full] + own, length
        scheduler.fork(branch)
        return branch

    def _output(self, index: int, path: Path) -> Output:
        shown = self._request.sampling.logprobs is not None
        return Output(
            self._request.id, index, tuple(item.token for item in path.text), path.text if shown else (),
            path.finish, None, self._cached or 0, path.logprob,
        )  # fmt: skip

    def _failed(self, index: int) -> Output:
        error = CheckpointError(
            "logits that are infinite or no numbers", "finite logits", "check the checkpoint with `evaluate`"
        )
        return Output(self._request.id, index, finish="error", error=str(error))


def _pairs(logprobs: Tensor, count: int) -> tuple[tuple[int, float], ...]:
    """Tokens and log-probabilities of the likeliest, falling."""
    best: Any = logprobs.topk(min(count, len(logprobs)))
    return tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
