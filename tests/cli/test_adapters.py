"""`tailorbird adapters` against a server over a real port."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from fake_engine import FakeEngine, InProcess
from tailorbird.model.load import load_tokenizer
from tailorbird.serve.api.app import create_app
from tailorbird.serve.api.generation import Service
from tailorbird.serve.api.metrics import Metrics
from tailorbird.serve.api.text import Texts
from tailorbird.serve.interface import EngineOptions
from tailorbird.serve.server import listen

KEY, TALKS = "secret", "talks"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters' directories (the shortest name is the best one), and held-out text."""
    found = tmp_path_factory.mktemp("adapters")
    for name in ("v", "vv", "vvv"):
        (found / "allowed" / name).mkdir(parents=True)
    (found / "held.jsonl").write_text('{"prompt": "def one", "completion": "(): pass"}\n')
    (found / "bad.jsonl").write_text("{}\n{\n")
    return found


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    supervisor: Any = InProcess(FakeEngine(EngineOptions("demo")))
    metrics = Metrics(dict, lambda: True, lambda: 0)
    texts = Texts(load_tokenizer("demo"))
    service = Service(supervisor, texts, metrics, "demo", adapter_directory=folder / "allowed")
    app = create_app(service, [TALKS], log=lambda *_, **__: None, admin_keys=[KEY])
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", ws="none"))
    with listen("127.0.0.1", 0) as listening:
        listening.listen()  # who comes before the server waits
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])))
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.fixture
def adapters(command: Any, url: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("TAILORBIRD_API_KEY", TALKS)
    monkeypatch.setenv("TAILORBIRD_ADMIN_KEY", KEY)
    return lambda *arguments: command("adapters", *arguments, "--url", url)


def test_a_version_is_published_refused_listed_and_rolled_back(adapters: Any, folder: Path) -> None:
    text = ("--held-out", str(folder / "held.jsonl"))
    done = adapters("publish", "x", "vv", *text)
    assert done.status == 0, done.err
    assert "x, version 2" in done.out
    refused = adapters("publish", "x", "vvv", *text)
    assert (refused.status, refused.out) == (1, "")
    assert "a loss of 3\nexpected: at most 2\nwhat to do: train it further" in refused.err
    better = json.loads(adapters("publish", "x", "v", *text, "--json").out)
    assert better == {"name": "x", "version": 2, "loss": 1.0, "loss_before": 2.0}
    assert adapters("list").out == "x\n"
    assert json.loads(adapters("list", "--json").out) == ["x"]
    assert "x, version 0" in adapters("rollback", "x").out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["publish", "x", "v", "--held-out", "none.jsonl"], "none.jsonl can't be read"),
        (["publish", "x", "v", "--held-out", "bad.jsonl"], "line 2 of the held-out text"),
        (["publish", "x", "none", "--held-out", "held.jsonl"], "no such directory"),
        (["publish", "x", "../..", "--held-out", "held.jsonl"], "leads out of"),
        (["rollback", "unknown"], "no model `unknown`"),
        (["list", "--key", "wrong"], "give it with --key"),
        (["rollback", "x", "--key", TALKS], "a key without the right to change adapters"),
    ],
)
def test_mistakes_are_named(
    adapters: Any, folder: Path, arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    done = adapters(*arguments)
    assert (done.status, done.out) == (2, "")
    assert said in done.err
    assert "what to do: " in done.err


@pytest.mark.parametrize("wrong", ["here", "ftp://here", "http://", "http://here:port", "http://[1"])
def test_a_url_that_is_none(command: Any, wrong: str) -> None:
    done = command("adapters", "list", "--url", wrong)
    assert done.status == 2
    assert "--url" in done.err


def test_a_server_that_is_not_there(command: Any) -> None:
    with listen("127.0.0.1", 0) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"  # bound, and nobody listens
        done = command("adapters", "list", "--url", url)
    assert done.status == 2
    assert f"no tailorbird server answers at {url}" in done.err
