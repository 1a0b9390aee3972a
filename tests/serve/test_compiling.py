"""Requests that wait for their grammars: in turn, for so long, and no longer than their clients."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tailorbird.errors import EngineError, SettingsError
from tailorbird.serve.compiling import THREADS, Compiling
from tailorbird.serve.request import Grammar, Request, Sampling


class Slow:
    """A stand-in that compiles when it is allowed to."""

    def __init__(self) -> None:
        self.allowed = threading.Event()
        self.begun: list[str] = []

    def prepare(self, request: Request) -> str:
        self.begun.append(request.id)
        if request.id == "wrong":
            raise SettingsError("a grammar that is wrong", "another", "correct it")
        if request.id != "quick":
            assert self.allowed.wait(10)
        return f"start of {request.id}"


@pytest.fixture
def slow() -> Iterator[Slow]:
    made = Slow()
    yield made
    made.allowed.set()


def request(id: str) -> Request:
    return Request(id, (1,), sampling=Sampling(grammar=Grammar("json")))


def wait(true: Callable[[], bool]) -> None:
    until = time.monotonic() + 10
    while not true():
        assert time.monotonic() < until
        time.sleep(0.005)


def taken(compiling: Compiling, count: int) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def enough() -> bool:
        found.update((request.id, what) for request, what in compiling.take())
        return len(found) == count

    wait(enough)
    return found


def test_each_gets_what_was_prepared_for_it_or_why_not(slow: Slow) -> None:
    compiling = Compiling(slow.prepare)
    for id in ("slow", "quick", "wrong"):
        compiling.add(request(id))
    found = taken(compiling, 2)
    assert found["quick"] == "start of quick"
    assert isinstance(found["wrong"], SettingsError)
    assert len(compiling) == 1
    slow.allowed.set()
    assert taken(compiling, 1) == {"slow": "start of slow"}
    assert len(compiling) == 0


def test_one_that_takes_too_long_is_refused_and_one_that_found_no_thread_may_come_again(slow: Slow) -> None:
    compiling = Compiling(slow.prepare, limit=0.2)
    for number in range(THREADS + 1):
        compiling.add(request(str(number)))
    found = taken(compiling, THREADS + 1)
    assert [type(found[str(number)]) for number in range(THREADS)] == [SettingsError] * THREADS
    assert "0.2 seconds" in str(found["0"])
    assert isinstance(found[str(THREADS)], EngineError)
    slow.allowed.set()
    compiling.add(request("next"))
    assert taken(compiling, 1) == {"next": "start of next"}
    assert str(THREADS) not in slow.begun


def test_a_client_that_left_waits_for_nothing(slow: Slow) -> None:
    compiling = Compiling(slow.prepare)
    for number in range(THREADS + 1):
        compiling.add(request(str(number)))
    wait(lambda: len(slow.begun) == THREADS)
    for number in range(THREADS + 1):
        compiling.cancel(str(number))
    compiling.cancel("unknown")
    assert len(compiling) == 0
    slow.allowed.set()
    compiling.add(request("next"))
    assert taken(compiling, 1) == {"next": "start of next"}
    assert str(THREADS) not in slow.begun
