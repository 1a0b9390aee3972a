"""Clocks of other threads run while these do, and stand while they sleep."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import threads

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="only Linux has such clocks")


@contextmanager
def clock_of(work: str) -> Iterator[int]:
    """Of a thread that is `busy` or `asleep`."""
    end = threading.Event()

    def run() -> None:
        while work == "busy" and not end.is_set():
            pass
        end.wait()

    before = set(threads.other_clocks())
    thread = threading.Thread(target=run)
    thread.start()
    try:
        (clock,) = set(threads.other_clocks()) - before
        time.sleep(0.05)
        yield clock
    finally:
        end.set()
        thread.join()


def test_the_clock_of_a_busy_thread_runs() -> None:
    with clock_of("busy") as clock:
        before = threads.processor_seconds([clock])
        time.sleep(0.05)
        assert threads.processor_seconds([clock]) > before


def test_the_clock_of_a_sleeping_thread_stands() -> None:
    with clock_of("asleep") as clock:
        before = threads.processor_seconds([clock])
        time.sleep(0.05)
        assert threads.processor_seconds([clock]) == before


def test_what_others_do_after_a_call_is_read_at_each_moment() -> None:
    with clock_of("busy") as clock:
        called: list[str] = []
        found = threads.after_call(lambda: called.append("once"), [clock], (1000, 20_000, 60_000))
        assert called == ["once"]
        assert len(found) == 3
        assert found == sorted(found)
        assert found[-1] > 0
