"""The API over an engine in a process of its own, asked without a network."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import httpx

from tailorbird.model.load import load_tokenizer
from tailorbird.serve.api.app import create_app
from tailorbird.serve.api.generation import Service
from tailorbird.serve.api.metrics import Metrics
from tailorbird.serve.api.text import Texts
from tailorbird.serve.interface import EngineOptions
from tailorbird.serve.supervisor import Supervisor


@contextlib.asynccontextmanager
async def asked(options: EngineOptions) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a server that is started for it; the model is called `m`."""
    supervisor = Supervisor(options)
    await supervisor.start()
    try:
        metrics = Metrics(lambda: supervisor.stats, lambda: supervisor.ready, lambda: supervisor.restarts)
        service = Service(supervisor, Texts(load_tokenizer(options.model)), metrics, "m")
        transport = httpx.ASGITransport(create_app(service, log=lambda *_, **__: None))
        async with httpx.AsyncClient(transport=transport, base_url="http://here", timeout=None) as client:
            yield client
    finally:
        await supervisor.close()
