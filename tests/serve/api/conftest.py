"""The API over an engine in this process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from fake_engine import FakeEngine, InProcess
from tailorbird.model.load import load_tokenizer
from tailorbird.serve.api.app import create_app
from tailorbird.serve.api.generation import Service
from tailorbird.serve.api.metrics import Metrics
from tailorbird.serve.api.text import Texts
from tailorbird.serve.interface import EngineOptions


@dataclass
class Server:
    """One API, asked without a network."""

    service: Service
    app: Any
    supervisor: InProcess
    lines: list[dict[str, Any]]
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def engine(self) -> FakeEngine:
        return self.supervisor.engine

    def script(self, text: str) -> None:
        """Let the engine write this."""
        self.engine.script = self.service.texts.encode(text)

    def request(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
                return await client.request(method, path, **arguments)

        arguments["headers"] = self.headers | arguments.pop("headers", {})
        return asyncio.run(ask())

    def get(self, path: str, **arguments: Any) -> httpx.Response:
        return self.request("GET", path, **arguments)

    def post(self, path: str, body: Any = None, **arguments: Any) -> httpx.Response:
        return self.request("POST", path, **(arguments if body is None else {"json": body} | arguments))

    def events(self, path: str, body: Any) -> list[Any]:
        """What a stream carried, `[DONE]` as text."""
        answer = self.post(path, body | {"stream": True})
        assert answer.headers["content-type"].startswith("text/event-stream"), answer.text
        blocks = answer.text.split("\n\n")
        assert blocks.pop() == ""
        assert all(block.startswith("data: ") for block in blocks)
        found = [block.removeprefix("data: ") for block in blocks]
        return [one if one == "[DONE]" else json.loads(one) for one in found]


@pytest.fixture(scope="session")
def texts() -> Texts:
    return Texts(load_tokenizer("demo"))


@pytest.fixture
def make(texts: Texts) -> Callable[..., Server]:
    """Make a server; settings of the service, and those of the API."""

    def build(
        keys: tuple[str, ...] = (),
        per_minute: float | None = None,
        max_sequences: int = 4,
        admin_keys: tuple[str, ...] = (),
        **settings: Any,
    ) -> Server:
        directory: Path | None = settings.get("adapter_directory")
        options = EngineOptions("demo", {"tuned": "somewhere"}, max_sequences=max_sequences)
        supervisor = InProcess(FakeEngine(options))
        metrics = Metrics(lambda: supervisor.engine.stats(), lambda: supervisor.ready, lambda: 0)
        lines: list[dict[str, Any]] = []
        settings["adapter_directory"] = directory
        service = Service(supervisor, texts, metrics, "demo", **settings)  # type: ignore[arg-type]

        def log(event: str, **facts: Any) -> None:
            lines.append({"event": event} | facts)

        return Server(service, create_app(service, keys, per_minute, log, admin_keys), supervisor, lines)

    return build


@pytest.fixture
def server(make: Callable[..., Server]) -> Server:
    return make()
