"""Calls that take longer than one step: done piece by piece between steps, and answered at their end."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

Job = Generator[None, None, Any]


class Jobs:
    """Generators under way, by the number of the call that waits for each."""

    def __init__(self) -> None:
        self._running: dict[int, Job] = {}

    def __bool__(self) -> bool:
        return bool(self._running)

    def add(self, number: int, job: Job) -> None:
        """Begin one; nothing of it is done yet."""
        self._running[number] = job

    def drop(self, number: int) -> None:
        """End one that nobody waits for any more; one that isn't there is no mistake."""
        job = self._running.pop(number, None)
        if job is not None:
            job.close()

    def advance(self) -> tuple[int, Any] | None:
        """Do one piece of the job whose turn it is.

        Returns
        -------
        tuple or None
            Number and value of a job that came to its end, the value an `Exception` where it failed; None
            where none did.
        """
        if not self._running:
            return None
        number = next(iter(self._running))
        job = self._running.pop(number)
        try:
            next(job)
        except StopIteration as end:
            return number, end.value
        except Exception as error:
            return number, error
        self._running[number] = job  # behind the others
        return None
