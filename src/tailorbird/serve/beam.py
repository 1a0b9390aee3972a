"""Beam search: texts of large probability, found by going on with the likeliest few of each length.

At each length the `num_beams` best of all continuations of all beams go on. One that ends is kept if it is
among the `num_beams` best of its length; its score is its log-probability, divided by its number of tokens to
the power `length_penalty`. What ends the search and which candidates are looked at is as in transformers
(https://huggingface.co/docs/transformers/main_classes/text_generation), so that both find the same texts.
This file knows probabilities only; sequences and pages are `beam_sequences`' business.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from operator import attrgetter

from tailorbird.serve.request import BeamSearch, Finish, TokenLogprob


@dataclass(frozen=True)
class Path:
    """A text that the search has come to.

    Attributes
    ----------
    tokens : tuple of TokenLogprob
        A stop token that ended it is among them.
    logprob : float
        Of all tokens together.
    parent : int
        Which of the beams of the length before it continues.
    score : float
        By which ended texts are compared.
    finish : str or None
        Why it ended.
    """

    tokens: tuple[TokenLogprob, ...] = ()
    logprob: float = 0.0
    parent: int = 0
    score: float = 0.0
    finish: Finish | None = None

    @property
    def text(self) -> tuple[TokenLogprob, ...]:
        """The tokens that belong to the text."""
        return self.tokens[:-1] if self.finish == "stop" else self.tokens


class Search:
    """One search.

    Parameters
    ----------
    settings : BeamSearch
    stop : collection of int
        Tokens that end a text.
    max_tokens : int
        At which every text ends, a stop token counted.

    Attributes
    ----------
    beams : list of Path
        Those that go on, the best first; empty when the search is over.
    ended : list of Path
        At most `num_beams`, the best first.
    """

    def __init__(self, settings: BeamSearch, stop: Collection[int], max_tokens: int) -> None:
        self._settings, self._stop, self._max_tokens = settings, frozenset(stop), max_tokens
        self._length = 0
        self.beams = [Path()]
        self.ended: list[Path] = []

    @property
    def looked_at(self) -> int:
        """Candidates of a length, of all beams together: enough to go on if `num_beams` of them end."""
        return max(2, 1 + len(self._stop)) * self._settings.num_beams

    def advance(self, tops: Sequence[Sequence[TokenLogprob]]) -> None:
        """Go on to the next length.

        Parameters
        ----------
        tops : sequence of sequences of TokenLogprob
            For each beam its `looked_at` likeliest tokens, or all.
        """
        width = self._settings.num_beams
        self._length += 1
        candidates = [
            Path((*beam.tokens, token), beam.logprob + token.logprob, parent)
            for parent, (beam, top) in enumerate(zip(self.beams, tops, strict=True))
            for token in top
        ]
        candidates.sort(key=attrgetter("logprob"), reverse=True)
        closed = self._settings.early_stopping is True and len(self.ended) >= width
        going_on = []
        for rank, path in enumerate(candidates[: self.looked_at]):
            finish = self._finish(path)
            if finish is None:
                going_on.append(path)
            elif rank < width and not closed:
                score = self._score(path.logprob, self._length)
                self.ended.append(Path(path.tokens, path.logprob, path.parent, score, finish))
        self.ended.sort(key=attrgetter("score"), reverse=True)
        del self.ended[width:]
        self.beams = [] if self._over(going_on) else going_on[:width]

    def _finish(self, path: Path) -> Finish | None:
        if path.tokens[-1].token in self._stop:
            return "stop"
        return "length" if self._length == self._max_tokens else None

    def _score(self, logprob: float, length: int) -> float:
        return float(logprob / length**self._settings.length_penalty)

    def _over(self, going_on: Sequence[Path]) -> bool:
        """Whether no text that is still written is expected to become better than those that ended."""
        if not going_on:
            return True
        if len(self.ended) < self._settings.num_beams:
            return False
        if self._settings.early_stopping is True:
            return True
        longest = self._settings.early_stopping == "never" and self._settings.length_penalty > 0
        length = self._max_tokens if longest else self._length
        return self._score(going_on[0].logprob, length) <= self.ended[-1].score
