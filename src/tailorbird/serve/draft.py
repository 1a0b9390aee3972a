"""Guessing what follows a text from the text itself: what stood behind its last words before.

Prompt lookup (https://github.com/apoorvumang/prompt-lookup-decoding), which costs nothing: guesses are
checked in the step that would have been taken anyway. What is chosen stays what it would have been, since a
token depends on the tokens before it and on its own random number only.
"""

from __future__ import annotations

from collections.abc import Sequence

#: Tokens at the end of a text that are looked for, most first.
LENGTHS = (4, 3, 2)
#: Guesses of a step.
MOST_DRAFTS = 6
#: Tokens back from the end that are searched.
SEARCHED = 4096
#: How fast what is thought of a step's time follows the last one.
RATE = 0.2


class Pace:
    """What steps take, by their number of tokens: whether checking guesses pays on this machine now."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}

    def record(self, tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long."""
        known = self._seconds.get(tokens)
        self._seconds[tokens] = seconds if known is None else known + RATE * (seconds - known)

    def _of(self, tokens: int) -> float | None:
        """What such a step took, or the nearest smaller and larger ones let expect."""
        if tokens in self._seconds:
            return self._seconds[tokens]
        below = max((known for known in self._seconds if known < tokens), default=None)
        above = min((known for known in self._seconds if known > tokens), default=None)
        if below is None or above is None:
            return None
        share = (tokens - below) / (above - below)
        return self._seconds[below] + share * (self._seconds[above] - self._seconds[below])

    def worth(self, luck: float, writing: int) -> int:
        """How many guesses one of `writing` sequences should make, each right with chance `luck`.

        That many for which tokens per second are expected to be most; unknown steps are tried.
        """
        alone = self._of(writing)
        if alone is None:
            return MOST_DRAFTS
        best, most = writing / alone, 0
        for drafts in range(1, MOST_DRAFTS + 1):
            seconds = self._of(writing + drafts)
            if seconds is None:
                return drafts
            rate = (writing + sum(luck**i for i in range(1, drafts + 1))) / seconds
            if rate > best:
                best, most = rate, drafts
        return most


def lookup(tokens: Sequence[int], most: int) -> list[int]:
    """At most so many tokens that followed the last place where the text went on as it ends now."""
    most = min(most, MOST_DRAFTS)
    if most <= 0:
        return []
    begin = max(0, len(tokens) - SEARCHED)
    for length in LENGTHS:
        if len(tokens) - begin <= length:
            continue
        end = list(tokens[-length:])
        for at in range(len(tokens) - length - 1, begin - 1, -1):
            if tokens[at] == end[0] and list(tokens[at : at + length]) == end:
                return list(tokens[at + length : at + length + most])
    return []
