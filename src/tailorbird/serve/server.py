"""`tailorbird serve`: the port, the two processes, and a stop that lets running answers end.

The HTTP process holds the tokenizer and all connections; the engine computes in a process of its own
(`supervisor`). On SIGTERM or Ctrl-C new requests are refused with 503 while those that run get time to end; a
second signal stops at once. What takes long to import is imported while the engine starts.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn

from tailorbird.errors import ResourceError, SettingsError
from tailorbird.hardware.age import process_age
from tailorbird.serve.api.access import log_line
from tailorbird.serve.interface import ENGINE, EngineOptions
from tailorbird.serve.startup import account
from tailorbird.serve.supervisor import HANG_SECONDS, Supervisor

if TYPE_CHECKING:
    from fastapi import FastAPI

    from tailorbird.serve.api.generation import Service

#: Seconds that connections get to close when nothing is generated any more.
_CLOSING = 5
_POLL = 0.05


@dataclass(frozen=True)
class Served:
    """What a server did in its life.

    Attributes
    ----------
    url : str
    seconds : float
        From ready to the end.
    generated_tokens : int
    restarts : int
        How often the engine was started again.
    """

    url: str
    seconds: float
    generated_tokens: int
    restarts: int


def serve(
    options: EngineOptions,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    keys: Sequence[str] = (),
    admin_keys: Sequence[str] = (),
    queue: int = 256,
    timeout: float = 600.0,
    requests_per_minute: float | None = None,
    hang_limit: float = HANG_SECONDS,
    drain: float = 30.0,
    engine: str = ENGINE,
) -> Served:
    """Serve a model until SIGTERM or Ctrl-C.

    Parameters
    ----------
    options : EngineOptions
    host : str
        Name or address to listen on.
    port : int
        0 lets the system choose; the log says which.
    keys : sequence of str
        API keys; none lets in everybody who reaches the port.
    admin_keys : sequence of str
        API keys that alone may change adapters; with none everybody who is let in may.
    queue : int
        Continuations that may wait beside those that run.
    timeout : float
        Seconds that an answer may take.
    requests_per_minute : float, optional
        For each key.
    hang_limit : float
        Seconds that the engine may stand still before it is started again.
    drain : float
        Seconds that running answers get to end.
    engine : str
        ``module:callable`` that makes the engine, in its own process.

    Raises
    ------
    ResourceError
        The port is taken or not allowed, or the host isn't this machine's.
    TailorbirdError
        The model can't be loaded.
    """
    all_keys = [*keys, *admin_keys]
    check_settings(all_keys, queue, timeout, requests_per_minute, hang_limit, options.adapter_directory)
    supervisor = Supervisor(options, engine, lambda text: log_line("engine", text=text), hang_limit)
    with listen(host, port) as listening:
        return asyncio.run(
            _run(options, supervisor, listening, keys, admin_keys, queue, timeout, requests_per_minute, drain)
        )


def check_settings(
    keys: Sequence[str],
    queue: int,
    timeout: float,
    requests_per_minute: float | None,
    hang_limit: float,
    adapter_directory: str | None,
) -> None:
    """Refuse settings that can't work, before anything is loaded.

    Raises
    ------
    SettingsError
    """
    if not all(key.strip() == key and key.isascii() and key.isprintable() and key for key in keys):
        raise SettingsError(
            "an API key that is empty, or has spaces around it or letters beyond ASCII",
            "keys that fit into an HTTP header",
            "choose another key, for example with `openssl rand -hex 32`",
        )
    for name, value, low in (
        ("--queue", queue, 0), ("--timeout", timeout, 1),
        ("--requests-per-minute", requests_per_minute, 1), ("--hang-limit", hang_limit, 5),
    ):  # fmt: skip
        if value is not None and not low <= value < float("inf"):
            raise SettingsError(
                f"{name} {value}", f"a number of at least {low}", f"set {name} to {low} or more"
            )
    if adapter_directory is not None and not Path(adapter_directory).is_dir():
        raise SettingsError(
            f"--adapter-directory {adapter_directory}",
            "a directory that exists",
            "make it, or correct the path",
        )


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to host and port, not listening yet.

    Raises
    ------
    ResourceError
        As `serve`.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError, OverflowError) as error:
        raise ResourceError(
            f"--host {host}: {error}",
            "a name or address of this machine",
            "use 127.0.0.1, or 0.0.0.0 for all",
        ) from error
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError) as error:
        bound.close()
        raise ResourceError(
            f"port {port} of {host} can't be used: {getattr(error, 'strerror', None) or error}",
            "a free port of this machine, above 1023 without special rights",
            "choose another one with --port, or stop the program that has it",
        ) from error
    return bound


async def _run(
    options: EngineOptions,
    supervisor: Supervisor,
    listening: socket.socket,
    keys: Sequence[str],
    admin_keys: Sequence[str],
    queue: int,
    timeout: float,
    requests_per_minute: float | None,
    drain: float,
) -> Served:
    host, port = listening.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    launched = process_age()

    async def start() -> float:
        await supervisor.start()
        return process_age()

    starting = asyncio.create_task(start())
    try:
        service, app = await asyncio.to_thread(
            _application, options, supervisor, keys, admin_keys, queue, timeout, requests_per_minute
        )
        loaded = await starting
        config = uvicorn.Config(
            app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=_CLOSING,
            server_header=False, ws="none",
        )  # fmt: skip
        started = time.monotonic()

        def opened() -> None:
            startup = account(launched, loaded, process_age(), supervisor.info["startup"])
            service.startup = startup.told()
            for part, seconds in service.startup["parts"].items():
                log_line("startup", part=part, seconds=seconds)
            told = {"startup_seconds": service.startup["seconds"], "accounted": service.startup["accounted"]}
            log_line("ready", url=url, model=options.model, **_told(supervisor.info), **told)
            if not keys and host not in ("127.0.0.1", "::1"):
                log_line("warning", text="anybody who reaches this port may use it; --api-key asks for a key")

        server = _Server(config, opened)
        with _library_log(), _signals(service, server, drain):
            await server.serve(sockets=[listening])
    finally:
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await supervisor.close()
    seconds = time.monotonic() - started
    log_line("stopped", seconds=round(seconds, 3))
    return Served(url, seconds, service.metrics.generated, supervisor.restarts)


def _application(
    options: EngineOptions,
    supervisor: Supervisor,
    keys: Sequence[str],
    admin_keys: Sequence[str],
    queue: int,
    timeout: float,
    requests_per_minute: float | None,
) -> tuple[Service, FastAPI]:
    """The API, and what its routes work with; imports what the API needs."""
    from tailorbird.model.load import load_tokenizer
    from tailorbird.serve.api.app import create_app
    from tailorbird.serve.api.generation import Service
    from tailorbird.serve.api.metrics import Metrics
    from tailorbird.serve.api.text import Texts

    texts = Texts(load_tokenizer(options.model))
    metrics = Metrics(lambda: supervisor.stats, lambda: supervisor.ready, lambda: supervisor.restarts)
    directory = None if options.adapter_directory is None else Path(options.adapter_directory)
    service = Service(supervisor, texts, metrics, options.model, queue, timeout, directory)
    return service, create_app(service, keys, requests_per_minute, admin_keys=admin_keys)


def _told(info: dict[str, object]) -> dict[str, object]:
    return {name: info.get(name) for name in ("context", "max_sequences", "kv_tokens", "path", "note")}


class _Server(uvicorn.Server):
    """uvicorn, with signals left to `_signals`; calls `opened` when the port is open."""

    def __init__(self, config: uvicorn.Config, opened: Callable[[], None]) -> None:
        super().__init__(config)
        self._opened = opened

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._opened()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _LogLines(logging.Handler):
    """What a library says, as lines of the log, without tracebacks, which may quote a prompt."""

    def emit(self, record: logging.LogRecord) -> None:
        log_line("http", text=record.getMessage())


@contextlib.contextmanager
def _library_log() -> Iterator[None]:
    """uvicorn speaks in lines of the log."""
    logger, handler = logging.getLogger("uvicorn.error"), _LogLines()
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


@contextlib.contextmanager
def _signals(service: Service, server: uvicorn.Server, drain: float) -> Iterator[None]:
    """SIGTERM and Ctrl-C drain the service, then stop the server; the second one stops it at once."""
    loop = asyncio.get_running_loop()
    draining: list[asyncio.Task[None]] = []

    async def wait() -> None:
        until = time.monotonic() + drain
        while service.supervisor.in_flight and time.monotonic() < until:
            await asyncio.sleep(_POLL)
        await service.supervisor.close()  # answers that still run are told so
        server.should_exit = True

    def stop() -> None:
        if service.draining:
            for task in draining:
                task.cancel()
            server.should_exit = server.force_exit = True
            return
        service.draining = True
        log_line("stopping", in_flight=service.supervisor.in_flight)
        draining.append(loop.create_task(wait()))

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
        for task in draining:
            task.cancel()
