"""When a full queue will have room: once as many answers have ended as it takes, at the pace of late."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

#: Ends that the pace is taken from, and seconds after which they say nothing any more.
REMEMBERED, LATELY = 64, 300.0
#: Seconds where no pace is known, and at most.
UNKNOWN_WAIT, LONGEST_WAIT = 5.0, 120.0


class Departures:
    """Ends of answers.

    Parameters
    ----------
    clock : callable
        Seconds, never falling.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._times: deque[float] = deque(maxlen=REMEMBERED)

    def ended(self) -> None:
        """One has ended now."""
        self._times.append(self._clock())

    def wait(self, count: int) -> float:
        """Seconds until `count` more will have ended; the time since the last one counts as slowness."""
        now = self._clock()
        known = [when for when in self._times if now - when <= LATELY]
        if len(known) < 2:
            return UNKNOWN_WAIT
        each = (now - known[0]) / (len(known) - 1)
        return min(LONGEST_WAIT, count * each)
