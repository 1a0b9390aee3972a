"""The routes: what comes back, whole and as a stream, and what the engine is asked for."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from fake_engine import FAILING, REFUSED, SILENT
from tailorbird.serve.api.app import router
from tailorbird.serve.api.failures import CLIENT_GONE
from tailorbird.serve.request import BeamSearch, Output

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = {"model": "demo", "messages": [{"role": "user", "content": "hello"}]}
PLAIN = {"model": "demo", "prompt": "def read(path):", "max_tokens": 100}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
TEMPLATE = "{% for m in messages %}{{ m.role }}|{{ m.content }}\n{% endfor %}{{ tools }}"


@pytest.fixture
def template(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chat template that knows tools."""
    monkeypatch.setattr(server.service.texts.tokenizer, "chat_template", TEMPLATE)
    monkeypatch.setattr(server.service.texts, "has_template", True)


def test_a_completion_is_what_the_engine_wrote(server: Any) -> None:
    answer = server.post(COMPLETIONS, PLAIN).json()
    assert answer["object"] == "text_completion"
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == (PLAIN["prompt"], "stop")
    count = len(server.service.texts.encode(PLAIN["prompt"]))
    assert answer["usage"] == {
        "prompt_tokens": count, "completion_tokens": count, "total_tokens": 2 * count,
        "prompt_tokens_details": {"cached_tokens": 1},
    }  # fmt: skip


@pytest.mark.parametrize(("path", "body"), [(CHAT, HELLO), (COMPLETIONS, PLAIN)])
@pytest.mark.parametrize("extra", [{}, {"n": 2}, {"stop": ["ef", "user"]}, {"max_tokens": 2, "logprobs": 2}])
def test_a_stream_adds_up_to_the_whole_answer(server: Any, path: str, body: Any, extra: Any) -> None:
    server.script("größe 🐦 = def user(): pass")
    if path == CHAT and "logprobs" in extra:
        extra = extra | {"logprobs": True, "top_logprobs": 2}
    whole = server.post(path, body | extra).json()
    *chunks, usage, done = server.events(path, body | extra | {"stream_options": {"include_usage": True}})
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"] == whole["usage"]
    assert {chunk["id"] for chunk in chunks} == {usage["id"]}
    for choice in whole["choices"]:
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        if path == CHAT:
            text = "".join(c["delta"].get("content", "") for c in mine)
            assert text == choice["message"]["content"]
            assert mine[0]["delta"]["role"] == "assistant"
            logprobs = [item for c in mine if c["logprobs"] for item in c["logprobs"]["content"]]
            assert logprobs == (choice["logprobs"] or {"content": []})["content"]
        else:
            assert "".join(c["text"] for c in mine) == choice["text"]
            tokens = [token for c in mine if c["logprobs"] for token in c["logprobs"]["tokens"]]
            assert tokens == (choice["logprobs"] or {"tokens": []})["tokens"]
        assert [c["finish_reason"] for c in mine if c["finish_reason"]] == [choice["finish_reason"]]
    assert len(whole["choices"]) == extra.get("n", 1)


def test_a_stop_string_ends_the_text_and_the_work(server: Any) -> None:
    server.script("one two three four five six seven eight")
    answer = server.post(COMPLETIONS, PLAIN | {"stop": "ee fo", "ignore_eos": True, "max_tokens": 400}).json()
    assert answer["choices"][0]["text"] == "one two thr"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] < 400
    assert len(server.engine.cancelled) == 1


@pytest.mark.parametrize("at_once", [1, 3, 9])
def test_tokens_behind_a_stop_string_are_not_counted(
    server: Any, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = server.service.texts.encode("one two three four five six")
    before = len(server.service.texts.encode("one two three"))

    async def several(*requests: Any) -> Any:
        for start in range(0, len(tokens), at_once):
            yield Output(requests[0].id, 0, tuple(tokens[start : start + at_once]))

    monkeypatch.setattr(server.supervisor, "submit", several)
    answer = server.post(COMPLETIONS, PLAIN | {"stop": "thre"}).json()
    assert answer["choices"][0]["text"] == "one two "
    assert answer["usage"]["completion_tokens"] == before
    (*_, usage, _) = server.events(
        COMPLETIONS, PLAIN | {"stop": "thre", "stream_options": {"include_usage": True}}
    )
    assert usage["usage"]["completion_tokens"] == before


def test_log_probabilities_belong_to_the_text_that_was_sent(server: Any) -> None:
    server.script("one two three four")
    body = HELLO | {"logprobs": True, "top_logprobs": 1, "stop": ["three"]}
    (choice,) = server.post(CHAT, body).json()["choices"]
    assert choice["message"]["content"] == "one two "
    items = choice["logprobs"]["content"]
    written = [bytes(item["bytes"]).decode() for item in items]
    assert "".join(written).startswith("one two ")
    assert len("".join(written[:-1])) < len("one two ")  # the last token begins in the text, too
    assert all(len(item["top_logprobs"]) == 1 for item in items)
    (choice,) = server.post(COMPLETIONS, PLAIN | {"logprobs": 0}).json()["choices"]
    tokens, offsets = choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]
    assert all(
        choice["text"][offset:].startswith(token) for token, offset in zip(tokens, offsets, strict=True)
    )


def test_several_prompts_and_continuations_keep_their_places(server: Any) -> None:
    first, second = server.service.texts.encode("def one"), server.service.texts.encode("x = 2")
    answer = server.post(COMPLETIONS, PLAIN | {"prompt": [first, second], "n": 2}).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in answer["choices"]] == ["def one", "def one", "x = 2", "x = 2"]
    texts = server.post(COMPLETIONS, PLAIN | {"prompt": ["def one", "x = 2"]}).json()
    assert [choice["text"] for choice in texts["choices"]] == ["def one", "x = 2"]


def test_every_sampling_field_reaches_the_engine(server: Any) -> None:
    stated = {
        "temperature": 0.5, "top_p": 0.9, "seed": 4, "presence_penalty": 0.5, "frequency_penalty": -0.5,
        "top_k": 5,
        "min_p": 0.1, "typical_p": 0.8, "repetition_penalty": 1.5, "min_tokens": 1,
    }  # fmt: skip
    extra = {"ignore_eos": True, "logit_bias": {"7": 2.5}, "user": "me", "unheard_of": {}}
    assert server.post(CHAT, HELLO | stated | extra | {"max_completion_tokens": 3, "n": 2}).status_code == 200
    (request,) = server.supervisor.submitted
    assert {name: getattr(request.sampling, name) for name in stated} == stated
    assert (request.sampling.ignore_end, dict(request.sampling.logit_bias)) == (True, {7: 2.5})
    assert (request.max_tokens, request.n, request.adapter, request.tenant) == (3, 2, None, "")


@pytest.mark.parametrize(
    ("stated", "wanted"),
    [
        ({"num_beams": 4}, BeamSearch(4)),
        (
            {"num_beams": 4, "n": 2, "length_penalty": 0, "early_stopping": "never"},
            BeamSearch(4, 0.0, "never"),
        ),
        ({"use_beam_search": True, "n": 3, "early_stopping": True}, BeamSearch(3, 1.0, True)),
        ({"use_beam_search": True}, BeamSearch(1)),
        ({"num_beams": 1}, None),
        ({"use_beam_search": False, "length_penalty": 2.0}, None),
    ],
)
def test_searches_reach_the_engine(server: Any, stated: Any, wanted: Any) -> None:
    assert server.post(COMPLETIONS, PLAIN | stated).status_code == 200
    (request,) = server.supervisor.submitted
    assert request.beams == wanted
    assert request.n == stated.get("n", 1)


@pytest.mark.parametrize("logprobs", [None, 1])
def test_more_can_be_written_than_are_answered(server: Any, logprobs: int | None) -> None:
    count = len(server.service.texts.encode(PLAIN["prompt"]))
    body = PLAIN | {"prompt": [PLAIN["prompt"]] * 2, "n": 2, "best_of": 5, "logprobs": logprobs}
    answer = server.post(COMPLETIONS, body).json()
    assert [request.n for request in server.supervisor.submitted] == [5, 5]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in answer["choices"]] == [PLAIN["prompt"]] * 4
    assert all((choice["logprobs"] is None) == (logprobs is None) for choice in answer["choices"])
    assert answer["usage"]["completion_tokens"] == 10 * count  # as they are paid for


def test_null_means_the_default(server: Any) -> None:
    names = (
        "temperature",
        "top_p",
        "n",
        "stop",
        "max_tokens",
        "logit_bias",
        "seed",
        "tools",
        "response_format",
    )
    assert server.post(CHAT, HELLO | dict.fromkeys(names)).status_code == 200
    (request,) = server.supervisor.submitted
    assert request.sampling.temperature == 1
    assert request.max_tokens + len(request.prompt) == server.service.context


@pytest.mark.parametrize(
    ("field", "value", "kind", "text"),
    [
        ("response_format", {"type": "json_object"}, "json_schema", '{"type": "object"}'),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "x", "schema": {"a": 1}}},
         "json_schema", '{"a": 1}'),
        ("guided_regex", "a+", "regex", "a+"),
        ("guided_grammar", 'root ::= "a"', "ebnf", 'root ::= "a"'),
    ],
)  # fmt: skip
def test_what_the_text_must_look_like_reaches_the_engine(
    server: Any, field: str, value: Any, kind: str, text: str
) -> None:
    assert server.post(CHAT, HELLO | {field: value}).status_code == 200
    grammar = server.supervisor.submitted[0].sampling.grammar
    assert (grammar.kind, grammar.text) == (kind, text)


def test_a_chat_without_a_template_ends_where_the_user_would_speak(server: Any) -> None:
    server.script(" fine\nuser: and then?")
    answer = server.post(CHAT, HELLO).json()
    assert answer["choices"][0]["message"]["content"] == " fine"
    sent = server.service.texts.decode(server.supervisor.submitted[0].prompt)
    assert sent == "user: hello\nassistant:"


@pytest.mark.usefixtures("template")
def test_a_conversation_goes_through_the_template_with_its_tools(server: Any) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "look",
         "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "1", "content": "seen"},
    ]  # fmt: skip
    assert server.post(CHAT, {"model": "demo", "messages": messages, "tools": [TOOL]}).status_code == 200
    sent = server.service.texts.decode(server.supervisor.submitted[0].prompt)
    assert sent.startswith("system|Be brief.\nuser|ab\nassistant|\ntool|seen\n")
    assert "look" in sent
    server.post(CHAT, HELLO | {"tools": [TOOL], "tool_choice": "none"})
    assert "look" not in server.service.texts.decode(server.supervisor.submitted[1].prompt)


@pytest.mark.usefixtures("template")
def test_a_call_of_a_tool_comes_as_a_call_and_other_text_as_text(server: Any) -> None:
    server.script('{"name": "look", "parameters": {"x": 1}}')
    body = HELLO | {"tools": [TOOL]}
    (choice,) = server.post(CHAT, body).json()["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    assert call["function"]["name"] == "look"
    assert json.loads(call["function"]["arguments"]) == {"x": 1}
    *chunks, _ = server.events(CHAT, body)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert not any(delta.get("content") for delta in deltas)
    (streamed,) = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    assert streamed["function"] == call["function"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    server.script("I look {around}")
    (choice,) = server.post(CHAT, body).json()["choices"]
    assert choice["message"] == {"role": "assistant", "content": "I look {around}"}


@pytest.mark.usefixtures("template")
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "look"}}])
def test_a_tool_that_must_be_called_is_a_grammar(server: Any, choice: Any) -> None:
    other = {"type": "function", "function": {"name": "other"}}
    assert server.post(CHAT, HELLO | {"tools": [TOOL, other], "tool_choice": choice}).status_code == 200
    schema = json.loads(server.supervisor.submitted[0].sampling.grammar.text)
    names = [one["properties"]["name"]["const"] for one in schema["anyOf"]]
    assert names == (["look", "other"] if choice == "required" else ["look"])
    assert server.post(CHAT, HELLO | {"tool_choice": "required"}).status_code == 400


def test_models_are_the_model_and_its_adapters(server: Any) -> None:
    listed = server.get("/v1/models").json()["data"]
    assert [(one["id"], one["parent"]) for one in listed] == [("demo", None), ("tuned", "demo")]
    assert server.get("/v1/models/tuned").json()["root"] == "demo"
    server.post(COMPLETIONS, PLAIN | {"model": "tuned"})
    assert server.supervisor.submitted[0].adapter == "tuned"
    refused = server.post(CHAT, HELLO | {"model": "gpt-4"})
    assert refused.status_code == 404
    assert "demo, tuned" in refused.json()["error"]["message"]
    assert server.get("/v1/models/gpt-4").status_code == 404


def test_adapters_come_only_from_the_directory_that_is_allowed(
    server: Any, make: Callable[..., Any], tmp_path: Path
) -> None:
    load, unload = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
    allowed, outside = tmp_path / "allowed", tmp_path / "outside"
    for directory in (allowed / "good", outside):
        directory.mkdir(parents=True)
    (allowed / "link").symlink_to(outside)
    assert server.post(load, {"lora_name": "x", "lora_path": str(allowed / "good")}).status_code == 403
    assert server.post(unload, {"lora_name": "tuned"}).status_code == 403

    open_ = make(adapter_directory=allowed)
    for path in ("../outside", str(outside), "link", "good/../..", ".", "a\0b", "/etc", "x" * 4000):
        answer = open_.post(load, {"lora_name": "x", "lora_path": path})
        assert answer.status_code == 403, path
    assert open_.post(load, {"lora_name": "x", "lora_path": "missing"}).status_code == 404
    assert open_.post(load, {"lora_name": "demo", "lora_path": "good"}).status_code == 409
    assert open_.post(load, {"lora_name": "../x", "lora_path": "good"}).status_code == 400
    assert open_.post(load, {"lora_name": "x", "lora_path": "good"}).status_code == 200
    assert open_.engine.names["x"] == str((allowed / "good").resolve())
    assert "x" in [one["id"] for one in open_.get("/v1/models").json()["data"]]
    assert open_.post(load, {"lora_name": "x", "lora_path": "good"}).status_code == 409
    again = {"lora_path": "good", "load_inplace": True}
    assert open_.post(load, again | {"lora_name": "x"}).status_code == 200
    assert open_.post(load, again | {"lora_name": "demo"}).status_code == 409
    assert open_.post(unload, {"lora_name": "x"}).status_code == 200
    assert open_.post(unload, {"lora_name": "x"}).status_code == 404
    assert open_.post(unload, {"lora_name": "demo"}).status_code == 400


def test_embeddings_are_numbers_or_base64(server: Any) -> None:
    body = {"model": "tuned", "input": ["def one", "x"]}
    answer = server.post("/v1/embeddings", body).json()
    ids = server.service.texts.encode("def one")
    assert answer["data"][0]["embedding"] == [len(ids), 0.5, 1.0]
    assert answer["usage"]["prompt_tokens"] == len(ids) + len(server.service.texts.encode("x"))
    packed = server.post("/v1/embeddings", body | {"encoding_format": "base64"}).json()["data"]
    for one, other in zip(answer["data"], packed, strict=True):
        assert list(struct.unpack("<3f", base64.b64decode(other["embedding"]))) == one["embedding"]
    assert server.post("/v1/embeddings", body | {"dimensions": 2}).status_code == 400
    assert server.post("/v1/embeddings", body | {"input": [[]]}).status_code == 400
    assert server.post("/v1/embeddings", body | {"input": [[1] * 513]}).status_code == 400


def test_tokens_and_text_are_inverse(server: Any) -> None:
    text = "def größe():"
    answer = server.post("/tokenize", {"prompt": text}).json()
    assert answer["count"] == len(answer["tokens"])
    assert server.post("/detokenize", {"tokens": answer["tokens"]}).json() == {"prompt": text}
    chat = server.post("/tokenize", {"messages": HELLO["messages"]}).json()["tokens"]
    assert server.post("/detokenize", {"tokens": chat}).json()["prompt"] == "user: hello\nassistant:"
    assert server.post("/tokenize", {}).status_code == 400
    assert server.post("/detokenize", {"tokens": [4096]}).status_code == 400


def test_health_tells_an_engine_that_is_gone_from_a_server_that_stops(server: Any) -> None:
    assert [server.get(f"/health{end}").status_code for end in ("", "/ready", "/live")] == [200, 200, 200]
    server.service.startup = {"seconds": 2.0, "accounted": 1.0, "parts": {"program": 2.0}}
    how = {"path": "modules", "note": ""}
    assert server.get("/health").json() == {"status": "ok", "startup": server.service.startup} | how
    assert server.get("/health/live").json() == {"status": "ok"}
    server.service.draining = True
    assert [server.get(f"/health{end}").status_code for end in ("", "/ready", "/live")] == [503, 503, 200]
    server.supervisor.ready = False
    assert server.get("/health/live").status_code == 503


def test_a_server_that_stops_takes_no_more_requests(server: Any) -> None:
    server.service.draining = True
    for path, body in (
        (CHAT, HELLO),
        (COMPLETIONS, PLAIN),
        ("/v1/embeddings", {"model": "demo", "input": "x"}),
    ):
        answer = server.post(path, body)
        assert answer.status_code == 503
        assert "Retry-After" in answer.headers
    assert server.get("/health/ready").status_code == 503
    assert server.get("/metrics").status_code == 200


def test_metrics_count_what_happened(server: Any) -> None:
    answer = server.post(COMPLETIONS, PLAIN | {"model": "tuned", "n": 2}).json()
    server.post(COMPLETIONS, PLAIN | {"temperature": -1})
    read = dict(re.findall(r"^([^# ].*) ([0-9.e+-]+)$", server.get("/metrics").text, flags=re.MULTILINE))
    usage = answer["usage"]
    assert float(read["tailorbird_prompt_tokens_total"]) == usage["prompt_tokens"]
    assert float(read["tailorbird_generated_tokens_total"]) == usage["completion_tokens"]
    assert float(read["tailorbird_time_to_first_token_seconds_count"]) == 2
    assert float(read["tailorbird_inter_token_latency_seconds_count"]) == usage["completion_tokens"] - 2
    assert float(read['tailorbird_adapter_requests_total{adapter="tuned"}']) == 1
    assert float(read['tailorbird_finished_total{outcome="stop"}']) == 2
    assert float(read[f'tailorbird_requests_total{{route="{COMPLETIONS}",status="200"}}']) == 1
    assert float(read[f'tailorbird_requests_total{{route="{COMPLETIONS}",status="400"}}']) == 1
    assert float(read["tailorbird_kv_pages"]) == 8
    assert float(read["tailorbird_preemptions_total"]) == 2
    assert float(read['tailorbird_drafted_tokens_total{guesser="lookup"}']) == 7
    assert float(read['tailorbird_accepted_tokens_total{guesser="lookup"}']) == 5
    assert float(read["tailorbird_ready"]) == 1


def test_every_answer_and_its_log_line_carry_one_id_and_no_text(server: Any) -> None:
    answer = server.post(COMPLETIONS, PLAIN, headers={"X-Request-Id": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1"
    (line,) = server.lines
    assert (line["event"], line["id"], line["status"], line["path"]) == (
        "request",
        "mine-1",
        200,
        COMPLETIONS,
    )
    assert line["completion_tokens"] == line["prompt_tokens"] > 0
    assert "read" not in json.dumps(line)
    server.get("/metrics")
    assert len(server.lines) == 1  # asked for again and again, and nothing was wrong
    given = server.get("/nowhere", headers={"X-Request-Id": "a b\x7f"}).headers["x-request-id"]
    assert re.fullmatch(r"req-[0-9a-f]{32}", given)


def test_strangers_get_nothing_but_the_liveness(make: Callable[..., Any]) -> None:
    server = make(keys=("one", "two"))
    assert len(router.routes) > 12
    for route in router.routes:
        for method in route.methods:  # type: ignore[attr-defined]
            for header in ({}, {"Authorization": "Bearer three"}):
                path = route.path.replace("{name:path}", "demo")  # type: ignore[attr-defined]
                answer = server.request(method, path, headers=header)
                if path == "/health/live":
                    assert answer.status_code == 200
                else:
                    assert answer.status_code == 401, path
                    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert server.get("/openapi.json").status_code == server.get("/nowhere").status_code == 401
    assert server.get("/").headers["www-authenticate"].startswith("Basic")
    server.headers = {"Authorization": "Bearer two"}
    assert server.post(COMPLETIONS, PLAIN).status_code == 200
    assert server.supervisor.submitted[0].tenant == "2"


def test_a_key_that_asks_too_often_is_told_when_to_come_again_and_others_are_served(
    make: Callable[..., Any],
) -> None:
    server = make(keys=("one", "two"), per_minute=2)
    statuses = []
    for _ in range(3):
        answer = server.post(COMPLETIONS, PLAIN, headers={"Authorization": "Bearer one"})
        statuses.append(answer.status_code)
    assert statuses == [200, 200, 429]
    assert 1 <= int(answer.headers["Retry-After"]) <= 31
    assert server.post(COMPLETIONS, PLAIN, headers={"Authorization": "Bearer two"}).status_code == 200
    assert server.get("/v1/models", headers={"Authorization": "Bearer one"}).status_code == 200


def test_a_full_queue_is_429_and_what_never_fits_is_400(make: Callable[..., Any]) -> None:
    server = make(max_sequences=2, queue=1)
    server.supervisor.in_flight = 1
    assert server.post(COMPLETIONS, PLAIN | {"n": 2}).status_code == 200
    full = server.post(COMPLETIONS, PLAIN | {"n": 3})
    assert (full.status_code, full.json()["error"]["code"]) == (429, "queue_full")
    assert int(full.headers["Retry-After"]) >= 1
    server.supervisor.in_flight = 3
    assert server.post("/v1/embeddings", {"model": "demo", "input": "x"}).status_code == 429
    server.supervisor.in_flight = 1
    assert server.post(COMPLETIONS, PLAIN | {"n": 4}).status_code == 400


@pytest.mark.parametrize("body", [{"prompt": [1, 2]}, {"prompt": [1, 2], "stream": True}, {"input": [1]}])
def test_no_more_are_taken_of_those_that_come_at_once(make: Callable[..., Any], body: dict[str, Any]) -> None:
    server = make(max_sequences=2, queue=3)
    path = "/v1/embeddings" if "input" in body else COMPLETIONS

    async def work() -> None:
        server.supervisor.in_flight += 1
        await asyncio.sleep(0.05)
        server.supervisor.in_flight -= 1

    async def submit(*requests: Any) -> Any:
        await work()
        yield Output(requests[0].id, 0, (5,), finish="length")

    async def embed(*_: Any) -> list[float]:
        await work()
        return [1.0]

    server.supervisor.submit, server.supervisor.embed = submit, embed

    async def ask() -> list[int]:
        transport = httpx.ASGITransport(server.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            sent = [client.post(path, json=PLAIN | body) for _ in range(12)]
            return [answer.status_code for answer in await asyncio.gather(*sent)]

    assert sorted(asyncio.run(ask())) == [200] * 5 + [429] * 7
    assert server.supervisor.in_flight == 0


def test_an_answer_that_takes_too_long_is_given_up(make: Callable[..., Any]) -> None:
    server = make(timeout=0.05)
    answer = server.post(COMPLETIONS, PLAIN | {"prompt": [SILENT]})
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
    assert server.supervisor.in_flight == 0
    assert len(server.engine.cancelled) == 1


def test_what_the_engine_refuses_is_400_and_what_it_fails_at_is_a_fault(server: Any) -> None:
    for extra in ({}, {"stream": True}):
        assert server.post(COMPLETIONS, PLAIN | extra | {"prompt": [REFUSED]}).status_code == 400
        failed = server.post(COMPLETIONS, PLAIN | extra | {"prompt": [FAILING]})
        assert (failed.status_code, failed.json()["error"]["type"]) == (500, "server_error")
        assert "secret" not in failed.text + json.dumps(server.lines)
    assert {line["error"] for line in server.lines if line["event"] == "failure"} == {"ZeroDivisionError"}


def test_settings_that_let_nothing_follow_are_a_clients_mistake(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def submit(*requests: Any) -> Any:
        yield Output(requests[0].id, 0, (5,))
        yield Output(requests[0].id, 0, finish="refused", error="nothing left")

    monkeypatch.setattr(server.supervisor, "submit", submit)
    answer = server.post(COMPLETIONS, PLAIN)
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "nothing left")
    (*_, last) = server.events(COMPLETIONS, PLAIN)
    assert last["error"] == answer.json()["error"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("first", [1, SILENT])
def test_a_client_that_leaves_cancels_its_request(server: Any, stream: bool, first: int) -> None:
    body = json.dumps(
        {"model": "demo", "prompt": [first, 2], "max_tokens": 400, "ignore_eos": True, "stream": stream}
    ).encode()
    server.engine.script = [5, 6]
    received: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if received:
            return received.pop()
        while server.engine.steps < 10:
            await asyncio.sleep(0)
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        await asyncio.sleep(0)

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
        "path": COMPLETIONS,
        "raw_path": COMPLETIONS.encode(), "query_string": b"", "root_path": "", "scheme": "http",
        "app": server.app,
        "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())],
    }  # fmt: skip

    asyncio.run(server.app(scope, receive, send))
    assert len(server.engine.cancelled) == 1
    assert server.supervisor.in_flight == 0
    assert server.engine.steps < 400
    assert server.lines[-1]["status"] == CLIENT_GONE


def test_the_page_needs_nothing_from_elsewhere(server: Any) -> None:
    answer = server.get("/")
    assert answer.status_code == 200
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert not re.search(r"(?:src|href)=|https?://|@import|url\(|innerHTML", answer.text)
    asked = set(re.findall(r'"(/[a-z0-9/_]+)"', answer.text))
    assert {"/status", CHAT, COMPLETIONS} == asked & set(server.app.openapi()["paths"]) == asked
    status = server.get("/status").json()
    assert status["models"] == ["demo", "tuned"]
    assert status["stats"]["kv_pages"] == 8
