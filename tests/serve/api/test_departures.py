"""How long a full queue takes to have room."""

from __future__ import annotations

import pytest

from tailorbird.serve.api.departures import LATELY, LONGEST_WAIT, UNKNOWN_WAIT, Departures


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_wait_follows_from_the_pace_and_from_how_many_are_before() -> None:
    clock = Clock()
    departures = Departures(clock)
    assert departures.wait(1) == UNKNOWN_WAIT
    for _ in range(200):
        clock.now += 0.5
        departures.ended()
    assert departures.wait(1) == pytest.approx(0.5)
    assert departures.wait(12) == pytest.approx(6)
    clock.now += 63 * 0.5  # nothing ends any more
    assert departures.wait(12) == pytest.approx(12)
    assert departures.wait(10**6) == LONGEST_WAIT
    clock.now += LATELY + 1
    assert departures.wait(12) == UNKNOWN_WAIT
