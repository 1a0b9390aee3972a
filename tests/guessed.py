"""What tests of guessers share: an engine on a small model, what it writes, and random guesses."""

from __future__ import annotations

import random
from collections.abc import Sequence as Many
from pathlib import Path
from typing import Any

from torch import Tensor

from compressed import INT4, save_compressed
from tailorbird.serve.engine import Engine
from tailorbird.serve.guess.guessing import Guessing, _Load
from tailorbird.serve.guess.pace import Pace
from tailorbird.serve.guess.switch import Switch
from tailorbird.serve.guess.tree import Guess
from tailorbird.serve.request import Request
from tailorbird.serve.sequence import Sequence
from tiny import byte_tokenizer, make_model


def model(directory: Path, architecture: str = "llama", **config: Any) -> str:
    """A compressed model with a tokenizer, whose texts may be 256 tokens."""
    long = {} if architecture in ("gpt2", "falcon") else {"max_position_embeddings": 256}
    save_compressed(directory, make_model(architecture, **(long | config)), INT4)
    byte_tokenizer().save_pretrained(directory)
    return str(directory)


class AlwaysAsked(Guessing):
    """Guesses that are always made, whether they pay or not: as many as `widths` says, from one guesser."""

    def __init__(self, guesser: Any, widths: Any) -> None:
        super().__init__([guesser])
        self.widths = widths

    @property
    def wants_hidden(self) -> bool:
        """See `Guessing`."""
        return self.guessers[0].wants_hidden

    def guess(self, sequences: Many[Sequence], most: int, left: Any) -> dict[Sequence, Guess]:
        """See `Guessing`."""
        self._by.clear()
        widths = [self.widths()[: max(0, left(sequence) - 1)] for sequence in sequences]
        asked = [(text, width) for text, width in zip(sequences, widths, strict=True) if width]
        if not asked:
            return {}
        made = self.guessers[0].guess([text for text, _ in asked], [width for _, width in asked])
        self._by.update({text: self.guessers[0].name for text, _ in asked})
        return {text: guess for (text, _), guess in zip(asked, made, strict=True)}


class _Steady(Pace):
    """As if more tokens took no longer."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._always = seconds

    def seconds(self, tokens: int) -> float:
        """See `Pace`."""
        return self._always


class _InTurns(Switch):
    """Every way, one after the other, whether it pays or not."""

    def way(self, sequences: int) -> int | None:
        """See `Switch`."""
        self._steps += 1
        return self._steps % len(self._ways)

    def plain_seconds(self, sequences: int) -> float:
        """See `Switch`."""
        return 1.0

    def plain(self, sequences: int, seconds: float) -> None:
        """See `Switch`."""

    def guessed(self, *_: Any) -> None:
        """See `Switch`."""


def guess_always(guessing: Guessing) -> None:
    """Let guesses be made in every step, by all in turns, as if they cost nothing."""
    load = _Load(_InTurns(len(guessing._ways)), _Steady(1.0))
    guessing._load = lambda sequences: load  # type: ignore[method-assign]
    for record in guessing._records.values():
        record.pace = _Steady(0.0)


class RandomGuesser:
    """Trees of any form that are right by chance: it knows what the texts will be."""

    name, ranks, wants_hidden, caught_up = "random", 3, False, True

    def __init__(self, rng: random.Random, texts: dict[tuple[str, int], list[int]], chains: bool) -> None:
        self.rng, self.texts, self.chains = rng, texts, chains

    def guess(self, sequences: Many[Sequence], widths: Many[Many[int]]) -> list[Guess]:
        """See `Guesser`."""
        return [
            self._one(sequence, sum(width), len(width))
            for sequence, width in zip(sequences, widths, strict=True)
        ]

    def _one(self, sequence: Sequence, most: int, depth: int) -> Guess:
        """The right token follows a right parent with chance 0.7; others anywhere."""
        text = self.texts.get((sequence.request.id, sequence.index), [])[sequence.written :]
        tokens: list[int] = []
        parents: list[int] = []
        depths: list[int] = []
        right = {-1: 0}  # nodes of the right path, and how many of its tokens they stand for
        for node in range(most):
            parent = node - 1 if self.chains else self.rng.randrange(-1, node)
            below = 1 if parent < 0 else depths[parent] + 1
            if below > depth:
                break
            taken = {tokens[other] for other in range(node) if parents[other] == parent}
            token = self.rng.randrange(200)
            if parent in right and right[parent] < len(text) and self.rng.random() < 0.7:
                token = text[right[parent]]
            if token in taken:
                break
            if parent in right and text[right[parent] : right[parent] + 1] == [token]:
                right[node] = right[parent] + 1
            tokens.append(token)
            parents.append(parent)
            depths.append(below)
        return Guess(tuple(tokens), () if self.chains else tuple(parents))

    def saw(self, sequence: Sequence, hidden: Tensor) -> None:
        """See `Guesser`."""

    def forget(self, sequence: Sequence) -> None:
        """See `Guesser`."""


def texts_of(
    made: Engine, requests: Many[Request], rng: random.Random | None = None, cancelled: Many[str] = ()
) -> dict[tuple[str, int], list[int]]:
    """What an engine writes; with `rng` requests come at random moments, and some are cancelled."""
    found: dict[tuple[str, int], list[int]] = {}

    def step() -> None:
        for output in made.step():
            assert output.error is None
            found.setdefault((output.id, output.index), []).extend(output.tokens)

    for request in requests:
        made.add(request)
        for _ in range(rng.randrange(4) if rng else 0):
            step()
        if request.id in cancelled:
            made.cancel(request.id)
    for _ in range(20_000):
        if not made.busy:
            return {key: text for key, text in found.items() if key[0] not in cancelled}
        step()
    raise AssertionError("it doesn't end")
