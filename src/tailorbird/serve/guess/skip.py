"""Guesses of the model itself with blocks left out (https://arxiv.org/abs/2309.08168, Draft & Verify).

What is left out is spread evenly and the same for all tokens (https://arxiv.org/abs/2404.06954, Unified
Layer Skipping). There is no second memory: the blocks that run read what the whole model left in the pages,
and what they write there for guessed tokens is written anew when these are checked.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Many

import torch
from torch import Tensor

from tailorbird.kernels.adapters import Segment
from tailorbird.run.pages import page_table
from tailorbird.serve.guess.stepwise import guess_places
from tailorbird.serve.guess.tree import NOTHING, Guess
from tailorbird.serve.runner import FusedRunner
from tailorbird.serve.sequence import Sequence


def evenly(blocks: int, kept: int) -> list[range]:
    """Runs of `kept` blocks of so many, spread evenly; the first and the last one are among two or more."""
    chosen = [round(at) for at in torch.linspace(0, blocks - 1, max(1, min(kept, blocks))).tolist()]
    found: list[range] = []
    for block in chosen:
        if found and found[-1].stop == block:
            found[-1] = range(found[-1].start, block + 1)
        else:
            found.append(range(block, block + 1))
    return found


class SkippingSelf:
    """A guesser that is some of the model's own blocks.

    Parameters
    ----------
    name : str
    runner : FusedRunner
    spans : sequence of range
        Blocks that run.
    room : callable
        Whether a sequence has, or gets, pages for so many tokens (`Scheduler.has_room`).
    """

    ranks, wants_hidden, caught_up = 3, False, True

    def __init__(
        self, name: str, runner: FusedRunner, spans: Many[range], room: Callable[[Sequence, int], bool]
    ) -> None:
        self.name, self.runner, self.spans = name, runner, list(spans)
        self._room = room

    def saw(self, sequence: Sequence, hidden: Tensor) -> None:
        """See `Guesser`; it needs to see nothing."""

    def forget(self, sequence: Sequence) -> None:
        """See `Guesser`; it keeps nothing."""

    def guess(self, sequences: Many[Sequence], widths: Many[Many[int]]) -> list[Guess]:
        """See `Guesser`; none for sequences that get no pages for them."""
        ready = [
            number
            for number, (sequence, width) in enumerate(zip(sequences, widths, strict=True))
            if self._room(sequence, len(sequence.tokens) + len(width))
        ]
        texts = [sequences[number] for number in ready]
        depth = 0

        def read(owners: list[int], tokens: list[int] | None) -> Tensor:
            nonlocal depth
            read_now = [texts[owner] for owner in owners]
            ids = [text.tokens[-1] for text in read_now] if tokens is None else tokens
            positions = [len(text.tokens) - 1 + depth for text in read_now]
            depth += 1
            cache = self.runner.cache
            cache.tables = page_table([text.pages for text in read_now])
            segments = [
                Segment(number, number + 1, text.adapter.adapter)
                for number, text in enumerate(read_now)
                if text.adapter is not None
            ]
            left = self.runner.model.read(
                torch.tensor(ids), torch.tensor(positions, dtype=torch.int32),
                torch.arange(len(ids), dtype=torch.int32), cache, None, segments, max(positions) + 1,
                self.spans,
            )  # fmt: skip
            return self.runner.model.logits(left)

        found = [NOTHING] * len(sequences)
        made = guess_places(texts, [widths[number] for number in ready], read) if texts else []
        for number, guess in zip(ready, made, strict=True):
            found[number] = guess
        return found
