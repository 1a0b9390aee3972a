"""The account of a start: every second once, and what nobody explains shows."""

from __future__ import annotations

import pytest

from tailorbird.hardware.age import process_age
from tailorbird.serve.startup import account


def test_parts_and_what_they_leave_unexplained_make_up_the_whole() -> None:
    start = account(launched=0.5, loaded=4.5, opened=5.0, engine={"imports": 1.0, "weights": 2.5})
    assert start.parts == {"program": 0.5, "engine: imports": 1.0, "engine: weights": 2.5, "http": 0.5}
    assert start.seconds == 5.0
    assert start.accounted == pytest.approx(0.9)
    assert start.told() == {"seconds": 5.0, "accounted": 0.9, "parts": start.parts}


def test_a_process_grows_older() -> None:
    first = process_age()
    assert 0 < first < process_age() + 0.02 < first + 10
