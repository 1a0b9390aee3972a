"""The whole program over a real port: OpenAI's own client, a port that is taken, and how it stops."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from running import Running, running
from tailorbird.errors import ResourceError, SettingsError
from tailorbird.serve.server import check_settings, listen


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("adapters")) as server:
        server.read_on()
        yield server


def test_the_official_client_chats_completes_lists_and_embeds(server: Running) -> None:
    client = server.client
    messages: Any = [{"role": "user", "content": "hello"}]
    whole = client.chat.completions.create(model="demo", messages=messages, logprobs=True, top_logprobs=2)
    assert whole.choices[0].message.content == "user: hello\nassistant:"
    assert whole.choices[0].finish_reason == "stop"
    assert whole._request_id
    with client.chat.completions.stream(
        model="tuned", messages=messages, stream_options={"include_usage": True}
    ) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == whole.choices[0].message.content
    assert final.usage == whole.usage
    pieces = list(client.completions.create(model="demo", prompt="x = 1", max_tokens=50, stream=True))
    text = "".join(piece.choices[0].text for piece in pieces)
    assert (
        text
        == client.completions.create(model="demo", prompt="x = 1", max_tokens=50).choices[0].text
        == "x = 1"
    )
    assert [model.id for model in client.models.list()] == ["demo", "tuned"]
    assert client.models.retrieve("tuned").id == "tuned"
    # The client asks for base64 by itself, and reads it.
    assert client.embeddings.create(model="demo", input="x").data[0].embedding == [1.0, 0.5, -1.0]


def test_the_official_client_raises_the_errors_it_has_for_each(server: Running) -> None:
    client = server.client
    with pytest.raises(openai.NotFoundError, match="demo, tuned"):
        client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="demo", prompt="x", temperature=-1)
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


def test_langchain_streams(server: Running) -> None:
    from langchain_openai import ChatOpenAI
    from pydantic import SecretStr

    chat = ChatOpenAI(model="demo", base_url=f"{server.url}/v1", api_key=SecretStr("secret"), max_retries=0)
    assert "".join(str(piece.content) for piece in chat.stream("hello")) == "user: hello\nassistant:"


def test_bytes_that_are_no_http_and_clients_that_leave_do_no_harm(server: Running) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    for data in (
        b"\x16\x03\x01 no http\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: 100\r\n\r\n{",
    ):
        with socket.create_connection((host, int(port))) as client:
            client.sendall(data)
    header = {"Authorization": "Bearer secret"}
    body = {"model": "demo", "prompt": "x", "stream": True, "ignore_eos": True, "max_tokens": 500}
    with httpx.Client(base_url=server.url, headers=header, timeout=10) as client, client.stream(
        "POST", "/v1/completions", json=body
    ) as stream:  # fmt: skip
        next(stream.iter_lines())
    with httpx.Client(base_url=server.url, headers=header, timeout=10) as client:
        while client.get("/status").json()["in_flight"]:
            pass
        assert client.get("/health").status_code == 200


def test_a_killed_engine_ends_streams_with_an_error_and_is_replaced(server: Running) -> None:
    header = {"Authorization": "Bearer secret"}
    with httpx.Client(base_url=server.url, headers=header, timeout=20) as client:
        body = {"model": "demo", "prompt": "x", "stream": True, "ignore_eos": True, "max_tokens": 500}
        with client.stream("POST", "/v1/completions", json=body) as stream:
            lines = stream.iter_lines()
            next(lines)
            os.kill(client.get("/status").json()["info"]["process"], signal.SIGKILL)
            last = [line for line in lines if line][-1]
        assert "error" in json.loads(last.removeprefix("data: "))
        # This one is sent again to the next engine, if it meets none.
        again = client.post("/v1/completions", json={"model": "demo", "prompt": "x = 1"})
        assert again.json()["choices"][0]["text"] == "x = 1"
        assert client.get("/health/ready").status_code == 200


def test_an_answer_of_which_nothing_was_sent_is_written_anew_by_the_next_engine(server: Running) -> None:
    header = {"Authorization": "Bearer secret"}
    body = {"model": "demo", "prompt": "x", "ignore_eos": True, "max_tokens": 400}
    with (
        httpx.Client(base_url=server.url, headers=header, timeout=20) as client,
        ThreadPoolExecutor() as pool,
    ):
        answer = pool.submit(lambda: client.post("/v1/completions", json=body).json())
        while not (status := client.get("/status").json())["stats"].get("running"):
            pass
        os.kill(status["info"]["process"], signal.SIGKILL)
        whole = answer.result()
    assert whole["choices"][0]["text"] == "x" * 400
    assert whole["usage"]["completion_tokens"] == 400


def test_a_stop_lets_running_answers_end_and_takes_no_new_ones(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        body = {"model": "demo", "prompt": "x", "stream": True, "ignore_eos": True, "max_tokens": 100}
        header = {"Authorization": "Bearer secret"}
        with (
            httpx.Client(base_url=server.url, headers=header, timeout=20) as client,
            client.stream("POST", "/v1/completions", json=body) as stream,
        ):
            lines = stream.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            statuses = [200]
            while statuses[-1] == 200:
                statuses.append(client.get("/health/ready").status_code)
            refused = client.post("/v1/completions", json=body)
            rest = [line for line in lines if line]
        assert (statuses[-1], refused.status_code) == (503, 503)
        assert rest[-1] == "data: [DONE]"
        status, log, out = server.stop()
    assert (status, out) == (0, "100\n")
    assert [line["event"] for line in log if line["event"] != "request"] == ["stopping", "stopped"]
    assert "secret" not in json.dumps(log)


def test_bytes_that_are_no_http_are_told_in_a_line_of_the_log(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as client:
            client.sendall(b"no http\r\n\r\n")
            assert b"400" in client.recv(1000)
        server.process.send_signal(signal.SIGTERM)
        status, log, _ = server.stop()
    assert status == 0
    assert [line["text"] for line in log if line["event"] == "http"] == ["Invalid HTTP request received."]


@pytest.mark.full
def test_a_stop_does_not_wait_for_ever(tmp_path: Path) -> None:
    with running(tmp_path, drain=0.1) as server:
        body = {"model": "demo", "prompt": [4092], "max_tokens": 100}
        header = {"Authorization": "Bearer secret"}
        answers: list[int] = []

        def ask() -> None:
            with contextlib.suppress(httpx.HTTPError):
                answers.append(
                    httpx.post(f"{server.url}/v1/completions", json=body, headers=header).status_code
                )

        asking = threading.Thread(target=ask)
        asking.start()
        with httpx.Client(base_url=server.url, headers=header) as client:
            while not client.get("/status").json()["in_flight"]:
                pass
        started = time.monotonic()
        server.process.send_signal(signal.SIGINT)
        assert server.stop()[0] == 0
        assert time.monotonic() - started < 5
        asking.join()
        assert answers == [503]


def test_a_port_that_is_taken_is_named_before_anything_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ResourceError, match=f"port {port}"):
            listen("127.0.0.1", port)
    with listen("127.0.0.1", 0) as free:
        assert free.getsockname()[1] > 0
    for host in ("no.such.host.invalid", "203.0.113.1", "a" * 300, "\x00"):
        with pytest.raises(ResourceError):
            listen(host, 0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"keys": [""]}, {"keys": ["a "]}, {"keys": ["é"]}, {"keys": ["a\n"]}, {"queue": -1}, {"timeout": 0.0},
        {"timeout": float("nan")}, {"requests_per_minute": 0.5}, {"hang_limit": 1.0},
        {"adapter_directory": "/no/such/place"},
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused(wrong: dict[str, Any]) -> None:
    settings = {
        "keys": [],
        "queue": 1,
        "timeout": 1.0,
        "requests_per_minute": None,
        "hang_limit": 60.0,
        "adapter_directory": None,
    }
    check_settings(**settings)  # type: ignore[arg-type]
    with pytest.raises(SettingsError):
        check_settings(**settings | wrong)
