"""Who guesses, how much, and whether it pays: decided anew for each step from what was measured.

Looking a text up in itself costs next to nothing, so it is always asked. Another guesser is asked where its
guesses, by how often they were right and what they take, let the step write more tokens per second.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from tailorbird.serve.guess.lookup import lookup
from tailorbird.serve.guess.luck import FIRST_CHANCES, FORGETTING, RECOVERY, Luck
from tailorbird.serve.guess.pace import Pace
from tailorbird.serve.guess.tree import Guess
from tailorbird.serve.guess.worth import MOST_PLACES, Worth, candidates, weigh
from tailorbird.serve.sequence import Sequence

#: Every so many steps one has no guesses, so that it stays known what such a step takes.
PLAIN_EVERY = 64
#: The name under which guesses from the text itself are counted.
LOOKUP = "lookup"


class Guesser(Protocol):
    """Guesses what follows sequences, for all of them in one go.

    Attributes
    ----------
    name : str
        Under which its guesses are counted.
    ranks : int
        Tokens that it can give for one place.
    wants_hidden : bool
        Whether it must be told what left the model's last block (`saw`).
    caught_up : bool
        Whether what the last `guess` took is what it takes usually: nothing else had to be read first.
    """

    name: str
    ranks: int
    wants_hidden: bool
    caught_up: bool

    def guess(self, sequences: Many[Sequence], widths: Many[Many[int]]) -> list[Guess]:
        """Guesses for each sequence: so many tokens for each place, or fewer."""

    def saw(self, sequence: Sequence, hidden: Tensor) -> None:
        """What left the last block, ``[hidden_size]``, where the sequence's last token was chosen."""

    def forget(self, sequence: Sequence) -> None:
        """A sequence ended."""


@dataclass
class _Record:
    """What is known of one guesser."""

    overall: Luck = field(default_factory=Luck)
    of: dict[Sequence, Luck] = field(default_factory=dict)
    pace: Pace = field(default_factory=Pace)
    drafted: int = 0
    accepted: int = 0

    def luck(self, sequence: Sequence) -> Luck:
        """Of one sequence; that of all so far, where it is new."""
        if sequence not in self.of:
            self.of[sequence] = Luck(list(self.overall.chances))
        return self.of[sequence]


class Guessing:
    """The guessers of an engine.

    Parameters
    ----------
    guessers : sequence of Guesser
        Beside the text itself.
    """

    def __init__(self, guessers: Many[Guesser] = ()) -> None:
        self.guessers, self.pace = tuple(guessers), Pace()
        self.wants_hidden = any(guesser.wants_hidden for guesser in guessers)
        self._records = {name: _Record() for name in (LOOKUP, *(guesser.name for guesser in guessers))}
        self._by: dict[Sequence, str] = {}  # whose guesses are being checked
        self._steps = 0

    def guess(
        self, sequences: Many[Sequence], most: int, left: Callable[[Sequence], int]
    ) -> dict[Sequence, Guess]:
        """Guesses that pay, at most `most` together.

        Parameters
        ----------
        sequences : sequence of Sequence
            All that write.
        most : int
        left : callable
            Tokens that a sequence may still write.
        """
        self._by.clear()
        self._steps += 1
        places = [min(MOST_PLACES, left(sequence) - 1) for sequence in sequences]
        self.pace.passed()
        for record in self._records.values():
            record.pace.passed()
            record.overall.approach(FIRST_CHANCES, FORGETTING)
            for sequence in sequences:
                record.luck(sequence).approach(record.overall.chances, RECOVERY)
        if self._steps % PLAIN_EVERY == 0 or not self.pace.knows(len(sequences)):
            return {}
        found = [
            lookup(sequence.tokens, most) for sequence, most in zip(sequences, places, strict=True)
        ]  # fmt: skip
        best, by = self._weigh(sequences, found, places, most, None), None
        for guesser in self.guessers:
            other = self._weigh(sequences, found, places, most, guesser)
            if other.rate > best.rate:
                best, by = other, guesser
        return self._made(sequences, found, best, by)

    def _weigh(
        self,
        sequences: Many[Sequence],
        found: Many[list[int]],
        places: Many[int],
        most: int,
        by: Guesser | None,
    ) -> Worth:
        """What is expected where a guesser is asked for the sequences that the text itself serves worse."""
        possible, drafted = [], set()
        for owner, (sequence, text) in enumerate(zip(sequences, found, strict=True)):
            if self._drafts(by, sequence, text):
                assert by is not None
                drafted.add(owner)
                chances = self._records[by.name].luck(sequence).falling(by.ranks)
                possible += candidates(owner, chances, places[owner])
            else:
                chance = self._records[LOOKUP].luck(sequence).falling(1)
                possible += candidates(owner, chance, min(places[owner], len(text)))
        seconds = 0.0 if by is None else self._records[by.name].pace.seconds(len(drafted))
        return weigh(possible, len(sequences), most, self.pace.seconds, drafted, seconds)

    def _drafts(self, by: Guesser | None, sequence: Sequence, found: list[int]) -> bool:
        """Whether a guesser is asked for a sequence for which the text itself gives these tokens."""
        if by is None or not found:
            return by is not None
        mine, texts = (self._records[name].luck(sequence).chances[0] for name in (by.name, LOOKUP))
        return mine > texts

    def _made(
        self, sequences: Many[Sequence], found: Many[list[int]], worth: Worth, by: Guesser | None
    ) -> dict[Sequence, Guess]:
        """The guesses that are worth it."""
        guesses: dict[Sequence, Guess] = {}
        asked, widths = [], []
        for sequence, text, width in zip(sequences, found, worth.widths, strict=True):
            if not width:
                continue
            if self._drafts(by, sequence, text):
                asked.append(sequence)
                widths.append(width)
            else:
                guesses[sequence], self._by[sequence] = Guess(tuple(text[: len(width)])), LOOKUP
        if by is not None and asked:
            began = time.perf_counter()
            made = by.guess(asked, widths)
            if by.caught_up:
                taken = (time.perf_counter() - began) / max(map(len, widths))
                self._records[by.name].pace.record(len(asked), taken)
            guesses.update(zip(asked, made, strict=True))
            self._by.update(dict.fromkeys(asked, by.name))
        return guesses

    def checked(self, sequence: Sequence, guess: Guess, chosen: list[int]) -> None:
        """These guesses were checked, and these tokens chosen from where they begin on."""
        name = self._by.pop(sequence, None)
        if name is None or not len(guess):
            return
        record = self._records[name]
        record.luck(sequence).learn(guess, chosen)
        record.overall.learn(guess, chosen)
        record.drafted += len(guess)
        node: int | None = -1
        for token in chosen:
            node = guess.child(node, token) if node is not None else None
            record.accepted += node is not None

    def saw(self, sequence: Sequence, hidden: Tensor) -> None:
        """See `Guesser`."""
        for guesser in self.guessers:
            guesser.saw(sequence, hidden)

    def forget(self, sequence: Sequence) -> None:
        """A sequence ended."""
        self._by.pop(sequence, None)
        for record in self._records.values():
            record.of.pop(sequence, None)
        for guesser in self.guessers:
            guesser.forget(sequence)

    def stats(self) -> dict[str, float]:
        """Guesses that were checked, and those that were right: of all, and of each guesser by its name."""
        found: dict[str, float] = {
            "drafted_tokens": sum(record.drafted for record in self._records.values()),
            "accepted_tokens": sum(record.accepted for record in self._records.values()),
        }
        for name, record in self._records.items():
            found |= {f"drafted_tokens/{name}": record.drafted, f"accepted_tokens/{name}": record.accepted}
        return found
