"""Guesses of a smaller model, the draft model (https://arxiv.org/abs/2211.17192).

It reads what the sequences wrote since it was last asked, then writes on by itself, one token for every
sequence in each of its steps. Its keys and values lie in pages of its own, found again by prefixes as the
engine's are. It knows no adapters.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tailorbird.kernels.blocks import PAGE
from tailorbird.run.fused import FusedModel
from tailorbird.run.pages import SharedPages, page_table
from tailorbird.serve.guess.stepwise import guess_places
from tailorbird.serve.guess.tree import NOTHING, Guess
from tailorbird.serve.page_pool import PagePool
from tailorbird.serve.sequence import Sequence

#: Most tokens of texts that are read before guessing, in one go; who isn't through then waits.
CATCH_UP = 512


@dataclass(eq=False)
class _Reading:
    """How far a text was read: its first `read` tokens, and then guesses, from token `known` on."""

    pages: list[int]
    read: int
    known: int = 0
    guessed: list[int] = field(default_factory=list)

    def keep(self, tokens: list[int]) -> None:
        """Of the guesses, keep those as read that turned out right."""
        for token, guessed in zip(tokens[self.known :], self.guessed, strict=False):
            if token != guessed:
                break
            self.read += 1
        self.guessed = []


class DraftModel:
    """A guesser that is a model with the same vocabulary.

    Parameters
    ----------
    name : str
    model : FusedModel
    pages : int
        For keys and values.
    context : int
        Tokens of a sequence that the model can read.
    """

    ranks, wants_hidden = 3, False

    def __init__(self, name: str, model: FusedModel, pages: int, context: int) -> None:
        self.name, self.model, self.context = name, model, context
        self.pool = PagePool(pages)
        self.cache = SharedPages(model.page_shapes, model.cache_dtype, pages)
        self.caught_up = False
        self._readings: dict[Sequence, _Reading] = {}

    def saw(self, sequence: Sequence, hidden: Tensor) -> None:
        """See `Guesser`; it needs to see nothing."""

    def forget(self, sequence: Sequence) -> None:
        """See `Guesser`."""
        reading = self._readings.pop(sequence, None)
        if reading is not None:
            self.pool.release(reading.pages)

    def guess(self, sequences: Many[Sequence], widths: Many[Many[int]]) -> list[Guess]:
        """See `Guesser`; none for sequences that it couldn't read yet."""
        ready = [
            number
            for number, (sequence, width) in enumerate(zip(sequences, widths, strict=True))
            if len(sequence.tokens) + len(width) <= self.context
            and self._reach(sequence, len(sequence.tokens) + len(width), sequences)
        ]
        self.caught_up = len(ready) == len(sequences)
        logits = self._catch_up([sequences[number] for number in ready])
        through = [number for number, row in zip(ready, logits, strict=True) if row is not None]
        first = [row for row in logits if row is not None]
        texts = [sequences[number] for number in through]

        def read(owners: list[int], tokens: list[int] | None) -> Tensor:
            if tokens is None:
                return torch.stack(first)
            starts = []
            for owner, token in zip(owners, tokens, strict=True):
                reading = self._readings[texts[owner]]
                starts.append(reading.known + len(reading.guessed))
                reading.guessed.append(token)
            pages = [self._readings[texts[owner]].pages for owner in owners]
            return self._read(pages, [[token] for token in tokens], starts)

        found = [NOTHING] * len(sequences)
        made = guess_places(texts, [widths[number] for number in through], read) if texts else []
        for number, guess in zip(through, made, strict=True):
            found[number] = guess
        return found

    def _reach(self, sequence: Sequence, tokens: int, wanted: Many[Sequence]) -> bool:
        """Pages for so many tokens, from texts that nobody asks about now if need be."""
        reading = self._readings.get(sequence)
        if reading is None:
            pages = self.pool.find(sequence.keys_of_full_pages(PAGE, len(sequence.tokens) - 1))
            reading = self._readings[sequence] = _Reading(pages, len(pages) * PAGE)
        needed = max(0, -(-tokens // PAGE) - len(reading.pages))
        if needed > self.pool.available:
            for other in [other for other in self._readings if other not in wanted]:
                self.forget(other)
        taken = self.pool.take(needed)
        if taken is None:
            return False
        reading.pages += taken
        return True

    def _catch_up(self, sequences: Many[Sequence]) -> list[Tensor | None]:
        """Read what the texts have more than was read; logits after those that are read whole."""
        room = CATCH_UP
        readings, pieces = [], []
        for sequence in sequences:
            reading = self._readings[sequence]
            reading.keep(sequence.tokens)
            reading.read = min(reading.read, len(sequence.tokens) - 1)
            piece = sequence.tokens[reading.read : reading.read + room]
            room -= len(piece)
            readings.append(reading)
            pieces.append(piece)
        self.caught_up = self.caught_up and CATCH_UP - room <= 3 * len(sequences)
        some = [number for number, piece in enumerate(pieces) if piece]
        if not some:
            return [None] * len(sequences)
        rows = self._read(
            [readings[number].pages for number in some],
            [pieces[number] for number in some],
            [readings[number].read for number in some],
        )  # fmt: skip
        found: list[Tensor | None] = [None] * len(sequences)
        for number, row in zip(some, rows, strict=True):
            reading, sequence = readings[number], sequences[number]
            self._publish(sequence, reading, reading.read + len(pieces[number]))
            if reading.read == len(sequence.tokens):
                reading.known = reading.read
                found[number] = row
        return found

    def _publish(self, sequence: Sequence, reading: _Reading, read: int) -> None:
        """So many tokens are read; let the pages be found that they fill."""
        keys = sequence.keys_of_full_pages(PAGE, read)
        for page in range(reading.known // PAGE, read // PAGE):
            self.pool.publish(reading.pages[page], keys[page])
        reading.read = read

    def _read(self, pages: list[list[int]], pieces: list[list[int]], starts: list[int]) -> Tensor:
        """Logits after the last token of each piece, which begins at a start of its own."""
        ids: list[int] = []
        positions: list[int] = []
        owners: list[int] = []
        ends = []
        for number, (piece, start) in enumerate(zip(pieces, starts, strict=True)):
            ids += piece
            positions += range(start, start + len(piece))
            owners += [number] * len(piece)
            ends.append(len(ids) - 1)
        self.cache.tables = page_table(pages)
        return self.model.step(
            torch.tensor(ids), torch.tensor(positions, dtype=torch.int32),
            torch.tensor(owners, dtype=torch.int32), self.cache, torch.tensor(ends), reach=max(positions) + 1,
        )  # fmt: skip
