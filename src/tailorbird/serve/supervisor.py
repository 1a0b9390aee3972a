"""The engine's process, as the HTTP process sees it: started, asked, watched, and started again when it dies.

An engine that says nothing for too long hangs: it is killed, and then it is one that died.

Requests that have sent nothing yet survive the engine: they are submitted again to the next one. Those whose
text has begun end as lost, because another engine's continuation needn't fit what was sent; whoever hasn't
passed it on can ask again.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tailorbird.errors import CheckpointError, EngineError, TailorbirdError
from tailorbird.serve.interface import ENGINE, EngineOptions
from tailorbird.serve.request import Finish, Output, Request
from tailorbird.serve.wire import WireError, error_from_wire, pack, read_messages

#: How many engines a request may outlive; one that ended so many is taken for the cause.
MOST_ATTEMPTS = 3
#: Calls of which a second one does no harm, where an engine died before it answered.
REPEATABLE = ("load_adapter", "unload_adapter", "adapters", "embed")
#: Seconds before a dead engine is started again: the first time, and at most.
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 30.0
#: An engine that lived so long, in seconds, died of something new: pauses begin anew.
LONG_LIFE = 60.0
#: Seconds that an engine gets to end by itself.
PATIENCE = 2.0
#: Seconds without a word after which an engine is taken for one that hangs; and how often that is looked at.
HANG_SECONDS, LOOK_INTERVAL = 60.0, 1.0


@dataclass
class _Pending:
    """A request on its way.

    Attributes
    ----------
    outputs : asyncio.Queue
        Where its outputs go, or the error that refuses it.
    open : set of int
        Continuations that haven't ended.
    begun : bool
        Something was sent to the client.
    attempts : int
        Engines that it was given to.
    """

    request: Request
    outputs: asyncio.Queue[Output | TailorbirdError]
    open: set[int]
    begun: bool = False
    attempts: int = 0


@dataclass
class _Call:
    """A call of one of the engine's methods.

    Attributes
    ----------
    name : str
    arguments : tuple
    answer : asyncio.Future
    attempts : int
        Engines that it was given to.
    """

    name: str
    arguments: tuple[Any, ...]
    answer: asyncio.Future[Any]
    attempts: int = 0


@dataclass
class _Child:
    """One engine's process and the socket to it.

    `heard` is when it last said something; `verdict` why it was killed, if it was.
    """

    process: asyncio.subprocess.Process
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    messages: AsyncIterator[Any] = field(init=False)
    heard: float = field(default_factory=time.monotonic)
    verdict: str | None = None

    def __post_init__(self) -> None:
        self.messages = read_messages(self.reader)

    def send(self, message: dict[str, Any]) -> None:
        self.writer.write(pack(message))

    async def end(self) -> str:
        """Close the socket, wait for the process, kill it if it doesn't go; how it ended, in words."""
        self.writer.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE):  # `wait_for` may swallow a cancellation before Python 3.12
                await self.process.wait()
        self.kill()
        return self.verdict or _ending(await self.process.wait())

    async def watch(self, limit: float) -> None:
        """Kill the process once it has said nothing for `limit` seconds."""
        self.heard = time.monotonic()
        while True:
            before = time.monotonic()
            await asyncio.sleep(min(LOOK_INTERVAL, limit / 4))
            now = time.monotonic()
            if now - before > 2 * LOOK_INTERVAL:  # it was this process that stood still
                self.heard = now
            elif now - self.heard > limit:
                self.verdict = f"killed because it hung: nothing was heard of it for {limit:g} seconds"
                self.kill()
                return

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()


class Supervisor:
    """Runs an engine in a process of its own.

    Parameters
    ----------
    options : EngineOptions
    engine : str
        ``module:callable`` that makes the engine, looked up in its process.
    log : callable
        Told in words what becomes of the engine.
    hang_seconds : float
        An engine that stands still for so long is killed and started again. Each block of a step counts as
        getting on; loading may take as long as it takes.

    Attributes
    ----------
    info : dict
        What the engine said of itself when it was ready.
    stats : dict of str to float
        What it said last of what goes on; ``memory_bytes`` is its process's resident memory.
    restarts : int
        How often an engine was started after the first.
    """

    def __init__(
        self,
        options: EngineOptions,
        engine: str = ENGINE,
        log: Callable[[str], None] = lambda text: None,
        hang_seconds: float = HANG_SECONDS,
    ) -> None:
        self.info: dict[str, Any] = {}
        self.stats: dict[str, float] = {}
        self.restarts = 0
        # Adapters that come and change while the server runs are those of its later engines.
        self._folder = tempfile.TemporaryDirectory(prefix="tailorbird-")
        self._state = Path(self._folder.name) / "adapters.json"
        self._options = replace(options, adapter_state=str(self._state))
        self._engine = engine
        self._log = log
        self._hang_seconds = hang_seconds
        self._child: _Child | None = None
        self._watching: asyncio.Task[None] | None = None
        self._ready = False
        self._pending: dict[str, _Pending] = {}
        self._calls: dict[int, _Call] = {}
        self._numbers = itertools.count()

    @property
    def ready(self) -> bool:
        """The engine is loaded and takes requests, and somebody looks after it."""
        return self._ready and self._watching is not None and not self._watching.done()

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters that are served."""
        return list(self.info.get("adapters", ()))

    @property
    def in_flight(self) -> int:
        """Continuations and other calls that haven't ended."""
        return sum(len(pending.open) for pending in self._pending.values()) + len(self._calls)

    async def start(self) -> None:
        """Start the engine and wait until it has loaded its model.

        Raises
        ------
        TailorbirdError
            What it failed with.
        """
        child = await self._launch()
        try:
            await self._greet(child)
        except BaseException:
            child.kill()
            await child.end()
            self._folder.cleanup()
            raise
        self._watching = asyncio.create_task(self._watch(child))

    async def close(self) -> None:
        """End the engine; what still runs ends with an error."""
        self._ready = False
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        if self._child is not None:
            await self._child.end()
            self._child = None
        self._folder.cleanup()
        self._bereave("the server is stopping", keep=False)

    async def submit(self, *requests: Request) -> AsyncGenerator[Output, None]:
        """Let requests be continued; closing the iterator early cancels them.

        Parameters
        ----------
        *requests : Request
            Their ids are told apart by `Output.id`.

        Yields
        ------
        Output
            Until each continuation of each request has one with a `finish`.

        Raises
        ------
        TailorbirdError
            The engine refused one of them; the others are cancelled.
        """
        outputs: asyncio.Queue[Output | TailorbirdError] = asyncio.Queue()
        mine = [_Pending(request, outputs, set(range(request.n))) for request in requests]
        try:
            for pending in mine:
                self._pending[pending.request.id] = pending
                self._add(pending)
            while any(pending.open for pending in mine) or not outputs.empty():
                output = await outputs.get()
                if isinstance(output, TailorbirdError):
                    raise output
                yield output
        finally:
            for pending in mine:
                if self._pending.pop(pending.request.id, None) is not None:
                    self._send({"do": "cancel", "id": pending.request.id})

    async def load_adapter(self, name: str, path: str) -> None:
        """Serve an adapter under a name, in later engines too; raises what the engine refuses it with."""
        await self._change_adapters("load_adapter", name, path)

    async def unload_adapter(self, name: str) -> None:
        """Serve an adapter no longer."""
        await self._change_adapters("unload_adapter", name)

    async def publish_adapter(
        self, name: str, path: str, held_out: Sequence[tuple[Sequence[int], int]]
    ) -> dict[str, Any]:
        """Serve a new version of an adapter if it is no worse on held-out text than the one served now.

        Arguments, value and errors as of `Engine.publish_adapter`. That the engine died is an error, too;
        the version is then served only if it died in the moment of its answer. A caller that is cancelled
        leaves nothing behind.
        """
        value: dict[str, Any] = await self._change_adapters("publish_adapter", name, path, held_out)
        return value

    async def rollback_adapter(self, name: str) -> int:
        """Serve the version of an adapter before the one that is served; its number."""
        value: int = await self._change_adapters("rollback_adapter", name)
        return value

    async def _change_adapters(self, call: str, *arguments: Any) -> Any:
        """What a call gives that changes the adapters; whatever became of it, their names are asked for."""
        try:
            return await self._call(call, *arguments)
        finally:
            if self._ready:  # else the next engine tells
                with contextlib.suppress(EngineError):
                    self.info["adapters"] = await self._call("adapters")

    async def embed(self, ids: Sequence[int], adapter: str | None) -> list[float]:
        """One vector for these tokens; raises what the engine refuses them with, or that it died."""
        value: list[float] = await self._call("embed", list(ids), adapter)
        return value

    async def _call(self, name: str, *arguments: Any) -> Any:
        """What a call gives, of the next engine where none runs now."""
        if self._watching is None or self._watching.done():
            raise _stopped("the server is stopping")
        number = next(self._numbers)
        call = self._calls[number] = _Call(name, arguments, asyncio.get_running_loop().create_future())
        try:
            self._give(number, call)
            return await call.answer
        except asyncio.CancelledError:
            self._send({"do": "drop", "number": number})
            raise
        finally:
            self._calls.pop(number, None)

    def _give(self, number: int, call: _Call) -> None:
        if self._ready:
            call.attempts += 1
            arguments = list(call.arguments)
            self._send({"do": "call", "number": number, "name": call.name, "arguments": arguments})

    def _send(self, message: dict[str, Any]) -> None:
        """Send unless there is no engine, in which case nothing needs to be sent."""
        if self._ready and self._child is not None:
            self._child.send(message)

    def _add(self, pending: _Pending) -> None:
        if self._ready:
            pending.attempts += 1
            self._send({"do": "add", "request": pending.request.to_wire()})

    async def _launch(self) -> _Child:
        """Start the process, with one end of a socket."""
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "tailorbird.serve.engine_process", str(theirs.fileno())),
                pass_fds=[theirs.fileno()],
                stdin=asyncio.subprocess.DEVNULL,
                stdout=sys.stderr.fileno() if _has_descriptor(sys.stderr) else None,
                process_group=0,  # Ctrl-C in the terminal is for this process
            )
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        self._child = _Child(process, reader, writer)
        return self._child

    async def _greet(self, child: _Child) -> None:
        """Tell the process which engine to make, and wait until it is ready."""
        child.send({"do": "start", "engine": self._engine, "options": self._options.to_wire()})
        async for message in child.messages:
            match message["kind"]:
                case "log":
                    self._log(message["text"])
                case "failed":
                    raise error_from_wire(message["error"])
                case "ready":
                    self.info = message["info"]
                    self._ready = True
                    for pending in self._pending.values():
                        self._add(pending)
                    for number, call in self._calls.items():
                        self._give(number, call)
                    return
        raise _stopped(f"the engine ended while it loaded the model, {await child.end()}")

    async def _watch(self, child: _Child) -> None:
        """Hear the engine out; when it ends, start another, for ever."""
        pause = FIRST_PAUSE
        while True:
            born = time.monotonic()
            looking = asyncio.create_task(child.watch(self._hang_seconds))
            try:
                async for message in child.messages:
                    child.heard = time.monotonic()
                    self._hear(message)
            except Exception as error:  # what it sends makes no sense, so it is of no more use
                self._log(f"a message of the engine was not understood: {type(error).__name__}")
            finally:
                looking.cancel()
            self._ready = False
            ended = await child.end()
            self.stats = {}
            self._log(f"the engine died, {ended}; it is started again")
            self._bereave(f"the engine died, {ended}", keep=True)
            if time.monotonic() - born > LONG_LIFE:
                pause = FIRST_PAUSE
            while True:
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
                self.restarts += 1
                child = await self._launch()
                try:
                    await self._greet(child)
                    break
                except (TailorbirdError, ConnectionError) as error:
                    self._log(f"the engine couldn't be started: {error}")
                    self._fail_calls(_stopped(f"the engine couldn't be started: {error}"))
                    self._drop_damaged_state()
                    child.kill()
                    await child.end()
            self._log("the engine is ready again")

    def _drop_damaged_state(self) -> None:
        """Where what is known of adapters is damaged, let the next engine begin anew."""
        from tailorbird.serve.adapters.versions import read_records

        try:
            if self._state.exists():
                read_records(self._state)
        except CheckpointError as error:
            self._log(f"what was known of adapters is lost: {error}")
            self._state.unlink(missing_ok=True)

    def _hear(self, message: dict[str, Any]) -> None:
        match message["kind"]:
            case "outputs":
                for fields in message["outputs"]:
                    self._deliver(Output.from_wire(fields))
            case "refused":
                self._refuse(message["id"], error_from_wire(message["error"]))
            case "answer":
                self._answer(message)
            case "stats":
                self.stats = message["stats"]
            case "log":
                self._log(message["text"])
            case "alive":
                pass  # that it was heard is all there is to it
            case _:
                raise WireError(f"a message of the unknown kind {message['kind']!r}")

    def _deliver(self, output: Output) -> None:
        pending = self._pending.get(output.id)
        if pending is None or output.index not in pending.open:
            return  # cancelled meanwhile
        pending.begun = pending.begun or bool(output.tokens)
        if output.finish is not None:
            pending.open.discard(output.index)
            if not pending.open:
                del self._pending[output.id]
        pending.outputs.put_nowait(output)

    def _refuse(self, id: str, error: TailorbirdError) -> None:
        pending = self._pending.pop(id, None)
        if pending is not None:
            pending.open.clear()
            pending.outputs.put_nowait(error)

    def _answer(self, message: dict[str, Any]) -> None:
        call = self._calls.get(message["number"])
        if call is None or call.answer.done():
            return
        answer = call.answer
        if "error" in message:
            answer.set_exception(error_from_wire(message["error"]))
        else:
            answer.set_result(message["value"])

    def _fail_calls(self, error: EngineError, keep: bool = False) -> None:
        """End calls with an error; with `keep`, not those that the next engine may be asked."""
        for call in self._calls.values():
            again = not call.attempts or (call.name in REPEATABLE and call.attempts < MOST_ATTEMPTS)
            if not call.answer.done() and not (keep and again):
                call.answer.set_exception(error)

    def _bereave(self, reason: str, keep: bool) -> None:
        """End what an engine that is gone can't end: calls, texts that have begun, requests that killed it.

        Parameters
        ----------
        reason : str
        keep : bool
            Requests that have sent nothing, and calls that may be made twice, wait for the next engine.
        """
        self._fail_calls(_stopped(reason), keep)
        for id, pending in list(self._pending.items()):
            if not keep or pending.begun or pending.attempts >= MOST_ATTEMPTS:
                again = keep and pending.attempts < MOST_ATTEMPTS
                for index in sorted(pending.open):
                    finish: Finish = "lost" if again else "error"
                    pending.outputs.put_nowait(Output(id, index, finish=finish, error=reason))
                pending.open.clear()
                del self._pending[id]


def _stopped(given: str) -> EngineError:
    return EngineError(given, "an engine that runs", "try again in a few seconds")


def _ending(status: int) -> str:
    return f"killed by signal {-status}" if status < 0 else f"with exit status {status}"


def _has_descriptor(stream: Any) -> bool:
    try:
        stream.fileno()
    except (AttributeError, OSError, ValueError):
        return False
    return True
