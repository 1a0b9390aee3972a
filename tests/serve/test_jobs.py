"""Jobs take turns, end once, and leave nothing behind when they are dropped."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from tailorbird.serve.jobs import Jobs


def test_jobs_take_turns_and_each_ends_with_its_value_or_its_error() -> None:
    done: list[str] = []

    def job(name: str, pieces: int, end: Any) -> Generator[None, None, Any]:
        for _ in range(pieces):
            done.append(name)
            yield
        if isinstance(end, Exception):
            raise end
        return end

    jobs, wrong = Jobs(), ValueError("wrong")
    assert jobs.advance() is None
    jobs.add(1, job("a", 3, "value"))
    jobs.add(2, job("b", 1, wrong))
    ended = []
    while jobs:
        if (end := jobs.advance()) is not None:
            ended.append(end)
    assert done == ["a", "b", "a", "a"]
    assert ended == [(2, wrong), (1, "value")]


def test_a_job_that_is_dropped_is_closed() -> None:
    closed = []

    def job() -> Generator[None, None, None]:
        try:
            while True:
                yield
        finally:
            closed.append(True)

    jobs = Jobs()
    jobs.add(7, job())
    jobs.advance()
    jobs.drop(8)
    assert not closed
    assert jobs
    jobs.drop(7)
    assert closed
    assert not jobs
