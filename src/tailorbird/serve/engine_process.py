"""The process that computes: an engine, and a socket over which it is asked and answers.

Started by `supervisor` as ``python -m tailorbird.serve.engine_process FD``. The first message says which
engine to make and how; then messages are applied between steps. It ends when the socket closes, and leaves
signals from the terminal to the process that started it.

========================================  ====================================================
asked                                     answered
========================================  ====================================================
``{do: start, engine, options}``          ``{kind: ready, info}`` or ``{kind: failed, error}``
``{do: add, request}``                    ``{kind: outputs, outputs}``, one message per step,
                                          or ``{kind: refused, id, error}``
``{do: cancel, id}``
``{do: call, number, name, arguments}``   ``{kind: answer, number, value}`` or with ``error``
``{do: drop, number}``
``{do: stop}``
========================================  ====================================================

A call whose value is a generator is a job: a piece of it is done between two steps, its end is the answer,
and ``drop`` says that nobody waits for it any more.

Unasked come ``{kind: stats, stats}`` a few times a second while it is busy, ``{kind: log, text}``, and
``{kind: alive}`` each second in which it waited for messages or got on with a step: who hears nothing for
long knows that it hangs.
"""

from __future__ import annotations

import importlib
import logging
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator
from typing import Any

from tailorbird.errors import TailorbirdError
from tailorbird.hardware.age import process_age
from tailorbird.hardware.memory import resident_bytes
from tailorbird.serve.compiling import Compiling
from tailorbird.serve.interface import EngineFactory, EngineLike, EngineOptions
from tailorbird.serve.jobs import Jobs
from tailorbird.serve.request import Request
from tailorbird.serve.wire import Connection, error_to_wire

#: Methods of an engine that can be called by a message.
CALLS = ("load_adapter", "unload_adapter", "publish_adapter", "rollback_adapter", "adapters", "embed")
STATS_INTERVAL = 0.25  # seconds
BEAT_INTERVAL = 1.0  # seconds
#: Seconds between looks at grammars that are being compiled, while there is nothing else to do.
COMPILING_INTERVAL = 0.01


def main(descriptor: int) -> int:
    """Serve the socket with this file descriptor; the exit status."""
    for ignored in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)
    connection = Connection(socket.socket(fileno=descriptor))
    try:
        return _serve(connection)
    except ConnectionError:
        return 0  # nobody is left to answer to


def _serve(connection: Connection) -> int:
    first = connection.receive(wait=True)
    if first is None:
        return 0
    start, *later = first

    def log(text: str) -> None:
        connection.send({"kind": "log", "text": text})

    logging.getLogger("tailorbird").addHandler(_Telling(log))
    begun = process_age()
    try:
        factory = find_factory(start["engine"])
        startup = {"interpreter": begun, "imports": process_age() - begun}
        engine = factory(EngineOptions(**start["options"]), log)
    except Exception as error:
        if not isinstance(error, TailorbirdError):
            traceback.print_exc()
        connection.send({"kind": "failed", "error": error_to_wire(error)})
        return 1
    info = engine.info
    connection.send({"kind": "ready", "info": info | {"startup": startup | info["startup"]}})
    run(engine, connection, later)
    return 0


class _Telling(logging.Handler):
    """Tells what is logged in this process to the one that writes the log."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__()
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        self._tell(record.getMessage())


def find_factory(named: str) -> EngineFactory:
    """The callable that ``module:callable`` names."""
    module, _, name = named.partition(":")
    factory: Callable[..., EngineLike] = getattr(importlib.import_module(module), name)
    return factory


class Pulse:
    """Says that the engine is alive, from a thread of its own, as long as the main thread gets on.

    Parameters
    ----------
    connection : Connection
    progress : callable
        A number that changes while a step gets on.

    Attributes
    ----------
    turns : int
        How often the main thread came round; it counts them itself.
    idle : bool
        It waits for messages.
    """

    def __init__(self, connection: Connection, progress: Callable[[], float]) -> None:
        self.turns, self.idle = 0, False
        self._connection, self._progress = connection, progress
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)

    def __enter__(self) -> Pulse:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def _beat(self) -> None:
        last: tuple[int, float] | None = None
        while not self._ended.wait(BEAT_INTERVAL):
            now = self.turns, self._progress()
            if self.idle or now != last:
                try:
                    self._connection.send({"kind": "alive"})
                except OSError:
                    return  # nobody is left to be told
            last = now


def run(engine: EngineLike, connection: Connection, messages: list[Any]) -> None:
    """Apply messages and step, until the socket closes or a message asks to stop.

    Parameters
    ----------
    engine : EngineLike
    connection : Connection
    messages : list
        Those that have arrived already.

    Raises
    ------
    Exception
        Whatever a step raises: nobody knows what an engine is worth after that, so the process ends.
    """
    with Pulse(connection, engine.progress) as pulse:
        _loop(engine, connection, messages, pulse)


def _loop(engine: EngineLike, connection: Connection, messages: list[Any], pulse: Pulse) -> None:
    told = -STATS_INTERVAL
    compiling, jobs = Compiling(engine.prepare), Jobs()
    while True:
        pulse.turns += 1
        for message in messages:
            if message["do"] == "stop":
                return
            answer = _apply(engine, compiling, jobs, message)
            if answer is not None:
                connection.send(answer)
        for request, prepared in compiling.take():
            refusal = _add(engine, request, prepared)
            if refusal is not None:
                connection.send(refusal)
        if engine.busy:
            outputs = engine.step()
            if outputs:
                connection.send({"kind": "outputs", "outputs": [output.to_wire() for output in outputs]})
        ended = jobs.advance()
        if ended is not None:
            connection.send(_answer(*ended))
        now, working = time.monotonic(), engine.busy or bool(jobs)
        pulse.idle = not working and not compiling
        if pulse.idle or now - told >= STATS_INTERVAL:
            stats = engine.stats() | {"compiling": len(compiling), "memory_bytes": resident_bytes()}
            connection.send({"kind": "stats", "stats": stats})
            told = now
        if compiling and not working:
            connection.wait(COMPILING_INTERVAL)
        arrived = connection.receive(wait=pulse.idle)
        pulse.idle = False
        if arrived is None:
            return
        messages = arrived


def _apply(
    engine: EngineLike, compiling: Compiling, jobs: Jobs, message: dict[str, Any]
) -> dict[str, Any] | None:
    """Do what a message asks, and its answer; what fails, fails for this message only."""
    match message["do"]:
        case "add":
            try:
                request = Request.from_wire(message["request"])
            except Exception as error:
                return _refused(message["request"]["id"], error)
            if request.sampling.grammar is None:
                return _add(engine, request)
            compiling.add(request)
        case "cancel":
            compiling.cancel(message["id"])
            engine.cancel(message["id"])
        case "call":
            try:
                if message["name"] not in CALLS:
                    raise LookupError(f"no call {message['name']}")
                value = getattr(engine, message["name"])(*message["arguments"])
            except Exception as error:
                value = error
            if not isinstance(value, Generator):
                return _answer(message["number"], value)
            jobs.add(message["number"], value)
        case "drop":
            jobs.drop(message["number"])
    return None


def _answer(number: int, value: Any) -> dict[str, Any]:
    """The message with what a call gave, or with why it failed, where that is an exception."""
    if not isinstance(value, Exception):
        return {"kind": "answer", "number": number, "value": value}
    _show(value)
    return {"kind": "answer", "number": number, "error": error_to_wire(value)}


def _add(engine: EngineLike, request: Request, prepared: Any = None) -> dict[str, Any] | None:
    """Give a request to the engine; a refusal where that, or what had to be prepared, failed."""
    try:
        if isinstance(prepared, Exception):
            raise prepared
        engine.add(request, prepared)
    except Exception as error:
        return _refused(request.id, error)
    return None


def _refused(id: str, error: Exception) -> dict[str, Any]:
    _show(error)
    return {"kind": "refused", "id": id, "error": error_to_wire(error)}


def _show(error: Exception) -> None:
    """Print where an error came from unless it was raised on purpose; its text could quote a prompt."""
    if not isinstance(error, TailorbirdError):
        where = "".join(traceback.format_tb(error.__traceback__))
        print(f"{type(error).__name__}\n{where}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
