"""Who guesses, how much, and whether it pays: decided from what was measured.

The ways to guess are the text itself alone, which costs little, and the text itself with each other guesser,
which is asked for the sequences that it serves better. Which way is used, or none, trials decide (`switch`),
anew for about twice as many sequences; how much is guessed in a step, chances and times (`worth`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from tailorbird.serve.guess.lookup import Past
from tailorbird.serve.guess.luck import RECOVERY, Luck
from tailorbird.serve.guess.pace import Pace
from tailorbird.serve.guess.switch import Switch
from tailorbird.serve.guess.tree import Guess
from tailorbird.serve.guess.worth import MOST_PLACES, Worth, candidates, weigh
from tailorbird.serve.sequence import Sequence

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
        Whether it must be told what left the model's last block (`saw`) in the step before it is asked.
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

    def begin_trial(self) -> None:
        """Expect of it no less than at first."""
        self.overall.hope()
        self.of.clear()
        self.pace = Pace()


@dataclass
class _Load:
    """What is known of steps that write about as many sequences."""

    switch: Switch
    pace: Pace = field(default_factory=Pace)


class Guessing:
    """The guessers of an engine.

    Parameters
    ----------
    guessers : sequence of Guesser
        Beside the text itself.
    clock : callable
        Seconds.
    """

    def __init__(self, guessers: Many[Guesser] = (), clock: Callable[[], float] = time.perf_counter) -> None:
        self.guessers, self._clock = tuple(guessers), clock
        self._ways: tuple[Guesser | None, ...] = (None, *guessers)  # None is the text itself alone
        self._records = {name: _Record() for name in (LOOKUP, *(guesser.name for guesser in guessers))}
        self._loads: dict[int, _Load] = {}
        self._by: dict[Sequence, str] = {}  # whose guesses are being checked
        self._pasts: dict[Sequence, Past] = {}  # of those in which something was looked for
        self._way: int | None = None  # of the last step in which sequences wrote
        self._asked = False  # whether this step
        self._caught_up = self._only_wrote = True
        self._began = self._making = 0.0

    @property
    def wants_hidden(self) -> bool:
        """Whether whoever guesses now wants to be told what leaves the model's last block."""
        by = None if self._way is None else self._ways[self._way]
        return by is not None and by.wants_hidden

    def begin(self) -> None:
        """A step begins; `wrote` or `read` ends it."""
        self._began = self._clock()
        self._asked = False

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
        load = self._load(len(sequences))
        self._way = load.switch.way(len(sequences))
        # a step that reads prompts says nothing: a trial waits until there is one without
        if self._way is None or (load.switch.trying and not self._only_wrote):
            return {}
        self._by.clear()
        self._asked, self._caught_up, self._making = True, True, 0.0
        by = self._ways[self._way]
        places = [min(MOST_PLACES, left(sequence) - 1) for sequence in sequences]
        found = [
            self._pasts.setdefault(sequence, Past()).lookup(sequence.tokens, most)
            for sequence, most in zip(sequences, places, strict=True)
        ]
        if load.switch.begins:
            self._begin_trial(load, by)
        if by is None and not any(found):
            return {}
        self._expect(load, sequences, by)
        best = self._weigh(sequences, found, places, most, load.pace, None)
        if by is not None:
            other = self._weigh(sequences, found, places, most, load.pace, by)
            if other.rate > best.rate:
                return self._made(sequences, found, other, by)
        return self._made(sequences, found, best, None)

    def _load(self, sequences: int) -> _Load:
        size = sequences.bit_length()
        if size not in self._loads:
            self._loads[size] = _Load(Switch(len(self._ways)))
        return self._loads[size]

    def _of(self, by: Guesser | None) -> list[_Record]:
        """What is known of those who guess on a way."""
        return [self._records[name] for name in (LOOKUP, *([] if by is None else [by.name]))]

    def _begin_trial(self, load: _Load, by: Guesser | None) -> None:
        """Bad luck may have passed, and so may bad times."""
        load.pace = Pace()
        for record in self._of(by):
            record.begin_trial()

    def _expect(self, load: _Load, sequences: Many[Sequence], by: Guesser | None) -> None:
        """What chances and times are now."""
        load.pace.know(len(sequences), load.switch.plain_seconds(len(sequences)))
        load.pace.passed()
        for record in self._of(by):
            for sequence in sequences:
                record.luck(sequence).approach(record.overall.chances, RECOVERY)

    def _weigh(
        self,
        sequences: Many[Sequence],
        found: Many[list[int]],
        places: Many[int],
        most: int,
        pace: Pace,
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
        return weigh(possible, len(sequences), most, pace.seconds, drafted, seconds)

    def _drafts(self, by: Guesser | None, sequence: Sequence, found: list[int]) -> bool:
        """Whether a guesser is asked for a sequence for which the text itself gives these tokens.

        None knows what adapters begin with; the text itself needn't.
        """
        if by is None or sequence.begun:
            return False
        if not found:
            return True
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
            began = self._clock()
            made = by.guess(asked, widths)
            self._making, self._caught_up = self._clock() - began, by.caught_up
            if by.caught_up:
                self._records[by.name].pace.record(len(asked), self._making / max(map(len, widths)))
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

    def wrote(self, sequences: int, tokens: int, written: int) -> None:
        """A step ended that did nothing but let sequences write.

        Parameters
        ----------
        sequences, tokens, written : int
            Those that wrote, what was read of them with all guesses, and what they wrote.
        """
        seconds, load = self._clock() - self._began, self._load(sequences)
        self._only_wrote = True
        if not self._asked:
            load.switch.plain(sequences, seconds)
            return
        if tokens > sequences:
            load.pace.record(tokens, seconds - self._making)
        load.switch.guessed(sequences, tokens - sequences, written, seconds, self._caught_up)

    def read(self) -> None:
        """A step ended that read prompts, too; how long it took says nothing of guesses."""
        self._only_wrote = False

    def saw(self, sequence: Sequence, hidden: Tensor) -> None:
        """See `Guesser`."""
        for guesser in self.guessers:
            guesser.saw(sequence, hidden)

    def forget(self, sequence: Sequence) -> None:
        """A sequence ended."""
        self._by.pop(sequence, None)
        self._pasts.pop(sequence, None)
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
