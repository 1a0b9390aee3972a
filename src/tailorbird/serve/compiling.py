"""Requests that wait for their grammars, which are compiled in threads beside the engine's.

Some grammars take minutes to compile. Their requests are refused after a while; the thread can't be ended, so
that few are there, and those that find none free are told to come again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from tailorbird.errors import EngineError, SettingsError, TailorbirdError
from tailorbird.serve.request import Request

#: Seconds that a grammar may take to compile, and as many again that it may wait for a thread.
GRAMMAR_SECONDS = 10.0
#: Grammars that are compiled at a time.
THREADS = 2


@dataclass
class _Waiting:
    """A request, when it came, when its grammar was begun, and what comes of that."""

    request: Request
    came: float
    begun: float | None = None
    future: Future[Any] | None = None


class Compiling:
    """Requests whose grammars are being compiled.

    Parameters
    ----------
    prepare : callable
        What makes of a request what the engine wants beside it; called in other threads.
    limit : float
        Seconds, see `GRAMMAR_SECONDS`.
    """

    def __init__(self, prepare: Callable[[Request], Any], limit: float = GRAMMAR_SECONDS) -> None:
        self._prepare, self._limit = prepare, limit
        self._waiting: dict[str, _Waiting] = {}
        self._threads = ThreadPoolExecutor(THREADS, "grammar")

    def __len__(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    def add(self, request: Request) -> None:
        """Let a request wait for its grammar."""
        waiting = self._waiting[request.id] = _Waiting(request, time.monotonic())

        def work() -> Any:
            waiting.begun = time.monotonic()
            return self._prepare(request)

        waiting.future = self._threads.submit(work)

    def cancel(self, id: str) -> None:
        """Forget a request; unknown ids are ignored."""
        waiting = self._waiting.pop(id, None)
        if waiting is not None and waiting.future is not None:
            waiting.future.cancel()

    def take(self) -> list[tuple[Request, Any]]:
        """The requests whose waiting is over, each with what was prepared, or the error that refuses it."""
        over = []
        for id, waiting in list(self._waiting.items()):
            found = self._outcome(waiting)
            if found is not None:
                self.cancel(id)
                over.append((waiting.request, found[0]))
        return over

    def _outcome(self, waiting: _Waiting) -> tuple[Any] | None:
        assert waiting.future is not None
        if waiting.future.done():
            error = waiting.future.exception()
            return (waiting.future.result() if error is None else error,)
        since = waiting.came if waiting.begun is None else waiting.begun
        if time.monotonic() - since <= self._limit:
            return None
        return (self._crowded() if waiting.begun is None else self._too_long(waiting.request),)

    def _too_long(self, request: Request) -> TailorbirdError:
        grammar = request.sampling.grammar
        kind = "grammar" if grammar is None else grammar.kind
        return SettingsError(
            f"a {kind} that isn't compiled after {self._limit:g} seconds",
            "one that takes less",
            "simplify it; what may be left out many times in a row takes longest",
        )

    def _crowded(self) -> TailorbirdError:
        return EngineError(
            f"a grammar that waited {self._limit:g} seconds for others to be compiled",
            "a thread that is free to compile it",
            "try again in a few seconds",
        )
