"""An engine that repeats the prompt, for tests of what is around one; with odd prompts it misbehaves."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from pathlib import Path
from typing import Any

from tailorbird.errors import CheckpointError, GateRefused, SettingsError
from tailorbird.serve.interface import EngineOptions
from tailorbird.serve.request import Output, Request, TokenLogprob

#: First tokens of prompts: refused, failing when added, failing when first stepped, giving nothing for ever,
#: hanging in a step for ever, in a step that is long but gets on, and whose grammar takes long.
REFUSED, FAILING, DEADLY, SILENT, HANGING, LONG, SLOW = 4095, 4094, 4093, 4092, 4091, 4090, 4089
VOCAB_SIZE, CONTEXT = 4096, 512


class FakeEngine:
    """Each step gives each running continuation the prompt's next token, over and over.

    It stops after the prompt's last token unless `ignore_end` is set. `script` replaces the prompt.
    """

    def __init__(self, options: EngineOptions, log: Callable[[str], None] = lambda text: None) -> None:
        self.options = options
        self.requests: dict[str, Request] = {}
        self.done: dict[str, int] = {}
        self.cancelled: list[str] = []
        self.script: Sequence[int] | None = None
        self.pause = 0.0
        state = options.adapter_state
        self.state = None if state is None else Path(state)
        goes_on = self.state is not None and self.state.exists()
        self.names = json.loads(self.state.read_text()) if goes_on else dict(options.adapters)
        self.steps = self.blocks = 0
        self.held_out: list[tuple[Sequence[int], int]] = []
        self.dropped: list[str] = []
        log("loaded")
        self.info: dict[str, Any] = {
            "model": options.model, "context": CONTEXT, "vocab_size": VOCAB_SIZE,
            "max_sequences": options.max_sequences, "kv_tokens": 1024, "path": "modules", "note": "",
            "adapters": list(self.names), "startup": {"load": 0.0}, "process": os.getpid(),
        }  # fmt: skip

    def prepare(self, request: Request) -> None:
        if request.prompt[0] == SLOW:
            time.sleep(1.0)

    def add(self, request: Request, prepared: Any = None) -> None:
        if request.prompt[0] == REFUSED:
            raise SettingsError("a prompt that is refused", "another", "send another")
        if request.prompt[0] == FAILING:
            raise ZeroDivisionError("secret prompt")
        self.requests[request.id] = request
        self.done[request.id] = 0

    def cancel(self, id: str) -> None:
        if self.requests.pop(id, None):
            self.cancelled.append(id)

    @property
    def busy(self) -> bool:
        return bool(self.requests)

    def progress(self) -> float:
        return self.steps + self.blocks

    def step(self) -> list[Output]:
        time.sleep(self.pause)
        self.steps += 1
        found = []
        for id, request in list(self.requests.items())[: self.options.max_sequences]:
            if request.prompt[0] == DEADLY:
                raise RuntimeError("the engine is broken")
            if request.prompt[0] == HANGING:
                threading.Event().wait()
            if request.prompt[0] == LONG and self.done[id] == 0:
                for _ in range(40):
                    time.sleep(0.1)
                    self.blocks += 1
            if request.prompt[0] == SILENT:
                continue
            tokens = self.script or request.prompt
            position = self.done[id]
            self.done[id] += 1
            ended = position == len(tokens) and not request.sampling.ignore_end
            token = tokens[position % len(tokens)]
            finish = "stop" if ended else "length" if position + 1 == request.max_tokens else None
            wanted = request.sampling.logprobs
            for index in range(request.n):
                logprobs = ()
                if wanted is not None and not ended:
                    top = tuple((token + other, -0.5 - other) for other in range(wanted))
                    logprobs = (TokenLogprob(token, -0.5, top),)
                new = () if ended else (token,)
                found.append(Output(id, index, new, logprobs, finish, cached_tokens=1))
            if finish:
                del self.requests[id]
        return found

    def stats(self) -> dict[str, float]:
        running = min(len(self.requests), self.options.max_sequences)
        waiting = len(self.requests) - running
        return {"waiting": waiting, "running": running, "kv_pages": 8, "kv_pages_used": running,
                "drafted_tokens/lookup": 7, "accepted_tokens/lookup": 5,
                "cached_tokens": 0, "preemptions": 2, "step_tokens": running,
                "steps": self.steps}  # fmt: skip

    def load_adapter(self, name: str, path: str) -> None:
        self.names[name] = path
        self.save()

    def unload_adapter(self, name: str) -> None:
        del self.names[name]
        self.save()

    def save(self) -> None:
        if self.state is not None:
            self.state.write_text(json.dumps(self.names))

    def publish_adapter(
        self, name: str, path: str, held_out: Sequence[tuple[Sequence[int], int]]
    ) -> Generator[None, None, dict[str, Any]]:
        """The loss is the length of the directory's name; a text that begins with `SILENT` has no end."""
        self.held_out = list(held_out)
        try:
            yield
            while held_out[0][0][0] == SILENT:
                yield
        except GeneratorExit:
            self.dropped.append(name)
            raise
        loss, before = len(os.path.basename(path)), len(os.path.basename(self.names.get(name, "")))
        if name in self.names and loss > before:
            raise GateRefused(f"a loss of {loss}", f"at most {before}", "train it further")
        self.load_adapter(name, path)
        return {"name": name, "version": 2, "loss": float(loss), "loss_before": float(before) or None}

    def rollback_adapter(self, name: str) -> int:
        """Nothing is rolled back; how many jobs nobody waited for any more."""
        return len(self.dropped)

    def adapters(self) -> list[str]:
        return list(self.names)

    def embed(self, ids: Sequence[int], adapter: str | None) -> list[float]:
        return [float(len(ids)), 0.5, -1.0 if adapter is None else 1.0]


def paced(options: EngineOptions, log: Callable[[str], None]) -> FakeEngine:
    """An engine whose steps take a few milliseconds."""
    engine = FakeEngine(options, log)
    engine.pause = 0.005
    return engine


def warning(options: EngineOptions, log: Callable[[str], None]) -> FakeEngine:
    """An engine that isn't well."""
    logging.getLogger("tailorbird").warning("pages come back %s", "damaged")
    return FakeEngine(options, log)


def unloadable(options: EngineOptions, log: Callable[[str], None]) -> FakeEngine:
    """No engine: the model is damaged."""
    raise CheckpointError("weights that are damaged", "whole ones", "copy them again")


class InProcess:
    """Stands in for a `Supervisor`: the same calls, over an engine in this process."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.info, self.stats = engine.info, engine.stats()
        self.restarts = 0
        self.ready = True
        self.in_flight = 0
        self.submitted: list[Request] = []

    @property
    def adapters(self) -> list[str]:
        return self.engine.adapters()

    async def submit(self, *requests: Request) -> AsyncGenerator[Output, None]:
        waiting = {(request.id, index) for request in requests for index in range(request.n)}
        self.submitted += requests
        self.in_flight += len(waiting)
        try:
            for request in requests:
                self.engine.add(request)
            while waiting:
                await asyncio.sleep(0)
                for output in self.engine.step():
                    if output.finish:
                        waiting.discard((output.id, output.index))
                        self.in_flight -= 1
                    yield output
        finally:
            self.in_flight -= len(waiting)
            for request in requests:
                self.engine.cancel(request.id)

    async def load_adapter(self, name: str, path: str) -> None:
        self.engine.load_adapter(name, path)

    async def unload_adapter(self, name: str) -> None:
        self.engine.unload_adapter(name)

    async def publish_adapter(
        self, name: str, path: str, held_out: Sequence[tuple[Sequence[int], int]]
    ) -> dict[str, Any]:
        job = self.engine.publish_adapter(name, path, held_out)
        try:
            while True:
                next(job)
                await asyncio.sleep(0)
        except StopIteration as end:
            return dict(end.value)
        finally:
            job.close()

    async def rollback_adapter(self, name: str) -> int:
        return self.engine.rollback_adapter(name)

    async def embed(self, ids: Sequence[int], adapter: str | None) -> list[float]:
        return self.engine.embed(ids, adapter)
