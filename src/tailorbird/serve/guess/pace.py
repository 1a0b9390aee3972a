"""What steps take, by their number of tokens: measured while they are taken."""

from __future__ import annotations

from bisect import bisect_left, insort

#: How fast what is thought of a step's time follows the last one.
RATE = 0.2
#: Steps after which a time that wasn't measured again is taken for half of what it was: it may have been an
#: unlucky one, and is measured anew once it looks worth a try.
DOUBTED = 64


class Pace:
    """Seconds of steps."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._measured: dict[int, int] = {}  # when, by the number of the step
        self._doubted: set[int] = set()
        self._counts: list[int] = []  # the keys, rising
        self._steps = 0

    def passed(self) -> None:
        """A step passes, whether it is measured or not."""
        self._steps += 1
        if self._steps % DOUBTED:
            return
        for count in self._counts:
            if self._measured[count] <= self._steps - DOUBTED:
                self._seconds[count] /= 2
                self._doubted.add(count)

    def record(self, tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long."""
        known = self._seconds.get(tokens)
        if known is None:
            insort(self._counts, tokens)
        if known is None or tokens in self._doubted:
            known = seconds
        self._seconds[tokens] = known + RATE * (seconds - known)
        self._measured[tokens] = self._steps
        self._doubted.discard(tokens)

    def knows(self, tokens: int) -> bool:
        """Whether a step of so many tokens or fewer was measured."""
        return bool(self._counts) and self._counts[0] <= tokens

    def seconds(self, tokens: int) -> float:
        """What such a step takes, judging by the nearest smaller and larger ones.

        One larger than all is taken for no slower than the largest, so that it is tried; 0 where nothing was
        measured.
        """
        at = bisect_left(self._counts, tokens)
        if at == len(self._counts):
            return self._seconds[self._counts[-1]] if self._counts else 0.0
        above = self._counts[at]
        if above == tokens or at == 0:
            return self._seconds[above]
        below = self._counts[at - 1]
        share = (tokens - below) / (above - below)
        return self._seconds[below] + share * (self._seconds[above] - self._seconds[below])
