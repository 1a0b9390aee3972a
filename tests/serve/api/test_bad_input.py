"""Whatever is sent: a status from 400 to 499 in the shape of OpenAI's errors, and the server goes on."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from running import running
from tailorbird.serve.api import access
from tailorbird.serve.interface import ENGINE

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = {"model": "demo", "messages": [{"role": "user", "content": "hello"}]}
PLAIN = {"model": "demo", "prompt": "hello"}
POSTS = [
    CHAT, COMPLETIONS, "/v1/embeddings", "/v1/load_lora_adapter", "/v1/unload_lora_adapter",
    "/v1/adapters/publish", "/v1/adapters/rollback", "/tokenize", "/detokenize",
]  # fmt: skip
#: tokens that drawn requests get from a model
FEW = 8
each_post = pytest.mark.parametrize("path", POSTS)


def check(answer: Any) -> dict[str, Any]:
    """A client's mistake in OpenAI's shape; the error."""
    assert 400 <= answer.status_code < 500, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert answer.headers["x-request-id"]
    return dict(error)


@each_post
@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"null", b"[]", b"1", b'"x"', b"\xff\xfe{}", b'{"model": "\xc3\x28"}', b"[" * 100_000,
        b'{"n": ' + b"9" * 5000 + b"}", b"{} {}", b"\0",
    ],
    ids=lambda body: repr(body[:12]),
)  # fmt: skip
def test_bodies_that_are_no_json_objects(server: Any, path: str, body: bytes) -> None:
    check(server.post(path, content=body, headers={"Content-Type": "application/json"}))


@each_post
@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_bodies_that_do_not_say_they_are_json(server: Any, path: str, kind: str | None) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    error = check(server.post(path, content=json.dumps(HELLO).encode(), headers=headers))
    assert "Content-Type: application/json" in error["message"]


WRONG = [
    ("model", 1), ("model", None), ("max_tokens", "5"), ("max_tokens", 1.5), ("max_tokens", True),
    ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", 10**9), ("max_tokens", 10**30),
    ("temperature", "hot"),
    ("temperature", -0.5), ("temperature", 1e308), ("top_p", 0), ("top_p", [1]), ("n", 0), ("n", 10**6),
    ("n", "2"),
    ("n", -1), ("stream", "yes"), ("stream_options", 1), ("stop", 1), ("stop", ""), ("stop", ["a"] * 17),
    ("stop", ["x" * 1001]), ("stop", [1]), ("seed", 1 << 70), ("seed", 0.5), ("presence_penalty", 3),
    ("logit_bias", {"a": 1}), ("logit_bias", {"1": 200}), ("logit_bias", {"1": "x"}), ("logit_bias", []),
    ("logit_bias", {"999999": 1}), ("logit_bias", {"-1": 1}), ("top_k", -5), ("min_p", 2), ("typical_p", 0),
    ("repetition_penalty", 0), ("repetition_penalty", 1e-300), ("min_tokens", -1), ("ignore_eos", 1),
    ("guided_regex", 5),
    ("num_beams", 0), ("num_beams", 10**6), ("num_beams", 2.5), ("use_beam_search", "yes"),

    ("response_format", "json"), ("response_format", {"type": "xml"}),
    ("response_format", {"type": "json_schema"}),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body"), [(CHAT, HELLO), (COMPLETIONS, PLAIN)], ids=["chat", "plain"])
@pytest.mark.parametrize(("field", "value"), WRONG, ids=lambda value: repr(value)[:24])
def test_fields_of_a_wrong_type_or_out_of_range(
    server: Any, path: str, body: dict[str, Any], field: str, value: Any
) -> None:
    error = check(server.post(path, body | {field: value}))
    assert field.split("_")[0] in error["message"]
    assert server.supervisor.submitted == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"messages": []}, {"messages": "hello"}, {"messages": [{}]},
        {"messages": [{"role": "king", "content": "x"}]},
        {"messages": [{"role": "user", "content": 5}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url",
        "image_url": {"url": "x"}}]}]}, {"messages": [{"role": "user", "content": "x" * 300_000}]},
        {"messages": [{"role": "user", "content": "word " * 600}]}, {"logprobs": True, "top_logprobs": 21},
        {"top_logprobs": "1"}, {"tools": [{"type": "function", "function": {"name": "x"}}]}, {"tools": ["x"]},
        {"tool_choice": "maybe"}, {"tool_choice": "required"}, {"guided_regex": "a", "guided_grammar": "b"},
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "x", "arguments": "{"}}]}]},
    ],
    ids=lambda value: repr(value)[:40],
)  # fmt: skip
def test_wrong_chats(server: Any, wrong: dict[str, Any]) -> None:
    check(server.post(CHAT, HELLO | wrong))
    check(server.post(CHAT, HELLO | wrong | {"stream": True}))


SEARCHES = [
    {"length_penalty": 1e9}, {"early_stopping": "soon"}, {"n": 4}, {"presence_penalty": 1},
    {"guided_regex": "a"},
    {"logit_bias": {"1": 1}},
]  # fmt: skip


@pytest.mark.parametrize(("path", "body"), [(CHAT, HELLO), (COMPLETIONS, PLAIN)], ids=["chat", "plain"])
@pytest.mark.parametrize("wrong", SEARCHES, ids=lambda value: repr(value)[:40])
def test_wrong_searches(server: Any, path: str, body: dict[str, Any], wrong: dict[str, Any]) -> None:
    check(server.post(path, body | {"num_beams": 3} | wrong))


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompt": ""}, {"prompt": []}, {"prompt": [[]]}, {"prompt": [""]}, {"prompt": [1, "a"]},
        {"prompt": [4096]},
        {"prompt": [-1]}, {"prompt": [1 << 80]}, {"prompt": None}, {"prompt": ["a"] * 10_000},
        {"prompt": [1] * 512},
        {"prompt": [1] * 500, "max_tokens": 13}, {"logprobs": 21}, {"logprobs": True}, {"echo": True},
        {"suffix": "x"}, {"n": 3, "best_of": 2}, {"best_of": 0},
        {"best_of": 3, "stream": True}, {"best_of": 3, "num_beams": 3},
    ],
    ids=lambda value: repr(value)[:40],
)  # fmt: skip
def test_wrong_completions(server: Any, wrong: dict[str, Any]) -> None:
    check(server.post(COMPLETIONS, PLAIN | wrong))


def test_a_prompt_longer_than_the_context_is_told_both_lengths(server: Any) -> None:
    chat = [{"role": "user", "content": "word " * 600}]
    told = server.post("/tokenize", {"messages": chat}).json()
    for path, body, length in (
        (CHAT, HELLO | {"messages": chat}, told["count"]),
        (COMPLETIONS, PLAIN | {"prompt": [1] * 600}, 600),
    ):
        answer = server.post(path, body)
        error = check(answer)
        assert answer.status_code == 400
        assert length > told["max_model_len"]
        assert {str(length), str(told["max_model_len"])} <= set(re.findall(r"\d+", error["message"]))
        assert server.supervisor.submitted == []


def test_halves_of_surrogate_pairs_are_refused_wherever_they_stand(server: Any) -> None:
    half = "\\ud800"
    for path, body in (
        (CHAT, '{"model": "demo", "messages": [{"role": "user", "content": "%s"}]}'),
        (CHAT, '{"model": "%s", "messages": [{"role": "user", "content": "x"}]}'),
        (COMPLETIONS, '{"model": "demo", "prompt": "%s"}'),
        (COMPLETIONS, '{"model": "demo", "prompt": "a", "stop": "%s"}'),
        (COMPLETIONS, '{"model": "demo", "prompt": "a", "guided_regex": "%s"}'),
        ("/tokenize", '{"prompt": "%s"}'),
    ):
        content = (body % half).encode()
        check(server.post(path, content=content, headers={"Content-Type": "application/json"}))


@each_post
def test_bodies_that_are_too_long(server: Any, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "BODY_LIMIT", 1000)
    body = json.dumps(HELLO | {"padding": "x" * 1000}).encode()

    async def parts() -> Any:
        for start in range(0, len(body), 100):
            yield body[start : start + 100]

    for content in (body, parts()):
        answer = server.post(path, content=content, headers={"Content-Type": "application/json"})
        assert check(answer)["code"] == "body_too_large"
        assert answer.status_code == 413
    for length in ("-1", "x", "9" * 30):
        headers = {"Content-Type": "application/json", "Content-Length": length}
        check(server.post(path, content=b"{}", headers=headers))


def test_routes_and_methods_that_are_not_there(server: Any) -> None:
    assert server.get("/v1/nothing").status_code == 404
    assert server.get(CHAT).status_code == 405
    for answer in (server.get("/v1/nothing"), server.get(CHAT), server.request("DELETE", "/v1/models")):
        check(answer)


def test_keys_that_are_missing_or_wrong(make: Callable[..., Any]) -> None:
    server = make(keys=("right",))
    for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": b"\xff"}):
        for path in POSTS:
            answer = server.post(path, HELLO, headers=header)
            assert check(answer)["type"] == "authentication_error"
            assert answer.status_code == 401


@pytest.mark.full
def test_requests_drawn_from_the_schema_make_no_route_fail(server: Any) -> None:
    import schemathesis

    schema = schemathesis.openapi.from_asgi("/openapi.json", server.app)
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) > 12
    for operation in operations:

        @given(operation.as_strategy())
        @settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
        def answers(case: Any) -> None:
            assert case.call().status_code < 500

        answers()


def few_tokens(body: Any) -> Any:
    """A drawn body that asks for the model that there is, and for few tokens."""
    if isinstance(body, dict) and "model" in body:
        body["model"] = "demo"
        body.setdefault("max_tokens", FEW)
        for name in ("max_tokens", "max_completion_tokens"):
            if isinstance(body.get(name), int):
                body[name] = min(body[name], FEW)
    return body


@pytest.mark.full
def test_requests_drawn_from_the_schema_do_an_engine_no_harm(tmp_path: Path) -> None:
    """Over HTTP, by the demo model."""
    import schemathesis

    with running(tmp_path, engine=ENGINE, keys=()) as server, httpx.Client(base_url=server.url) as client:
        server.read_on()
        schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
        statuses: dict[str, set[int]] = {}
        for operation in [found.ok() for found in schema.get_all_operations()]:

            @given(operation.as_strategy())
            @settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
            def answers(case: Any) -> None:
                case.body = few_tokens(case.body)
                status = case.call().status_code
                statuses.setdefault(case.operation.path, set()).add(status)
                assert status < 500

            answers()
        assert 200 in statuses[CHAT] & statuses[COMPLETIONS]
        assert "tailorbird_engine_restarts_total 0.0" in client.get("/metrics").text


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from(POSTS), st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_field_of_any_body_makes_the_server_fail(server: Any, path: str, data: Any) -> None:
    schema = server.app.openapi()
    reference = schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    fields = sorted(schema["components"]["schemas"][reference.rpartition("/")[2]]["properties"])
    base = HELLO | PLAIN | {"input": "x", "tokens": [1], "lora_name": "x", "lora_path": "x", "max_tokens": 2}
    if path == "/tokenize":
        del base["prompt"]
    body = base | data.draw(st.dictionaries(st.sampled_from(fields), json_values, max_size=3))
    # Python writes and reads NaN and infinities, which JSON doesn't have.
    content = json.dumps(body).encode()
    answer = server.post(path, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code < 500
