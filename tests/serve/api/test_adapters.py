"""Publishing over HTTP: what is counted of held-out text, where it may come from, and how it is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tailorbird.errors import TextError
from tailorbird.serve.api import adapters
from tailorbird.serve.api.held_out import scored
from tailorbird.serve.api.text import Texts

PUBLISH, ROLLBACK = "/v1/adapters/publish", "/v1/adapters/rollback"
CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Directories of adapters, of which the fake engine takes the one with the shortest name for the best."""
    for name in ("v", "vv", "vvv"):
        (tmp_path / "allowed" / name).mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "text.jsonl").write_text('{"text": "secret"}')
    (tmp_path / "allowed" / "link.jsonl").symlink_to(tmp_path / "outside" / "text.jsonl")
    return tmp_path / "allowed"


@pytest.fixture
def open_server(make: Callable[..., Any], folder: Path) -> Any:
    return make(adapter_directory=folder)


def body(path: str, held_out: Any = ("some text",), name: str = "x") -> dict[str, Any]:
    return {"name": name, "path": path, "held_out": held_out if isinstance(held_out, str) else list(held_out)}


def test_a_better_version_is_let_in_and_a_worse_one_refused_with_both_losses(open_server: Any) -> None:
    answer = open_server.post(PUBLISH, body("vv"))
    assert answer.json() == {"name": "x", "version": 2, "loss": 2.0, "loss_before": None}
    assert "x" in [one["id"] for one in open_server.get("/v1/models").json()["data"]]
    refused = open_server.post(PUBLISH, body("vvv"))
    assert refused.status_code == 409
    assert refused.json()["error"]["code"] == "gate_refused"
    assert "loss of 3" in refused.json()["error"]["message"]
    assert "at most 2" in refused.json()["error"]["message"]
    assert open_server.post(PUBLISH, body("v")).json()["loss_before"] == 2.0
    assert open_server.post(ROLLBACK, {"name": "x"}).json() == {"name": "x", "version": 0}
    assert open_server.post(ROLLBACK, {"name": "y"}).status_code == 404
    assert open_server.post(ROLLBACK, {"name": "demo"}).status_code == 400


def test_rights_are_those_of_loading(
    server: Any, open_server: Any, make: Callable[..., Any], folder: Path
) -> None:
    for path, sent in ((PUBLISH, body("v")), (ROLLBACK, {"name": "tuned"})):
        assert server.post(path, sent).status_code == 403
        assert make(keys=("secret",), adapter_directory=folder).post(path, sent).status_code == 401
    for wrong, status in (
        ("../outside", 403),
        (".", 403),
        ("a\0b", 403),
        ("x" * 4000, 403),
        ("missing", 404),
    ):
        assert open_server.post(PUBLISH, body(wrong)).status_code == status
    assert open_server.post(PUBLISH, body("v", name="demo")).status_code == 409
    assert open_server.post(PUBLISH, body("v", name="../x")).status_code == 400
    assert open_server.engine.names == {"tuned": "somewhere"}


@pytest.mark.parametrize("keys", [("talks",), ()], ids=["keys", "everybody"])
def test_only_admin_keys_change_adapters_where_there_are_any(
    make: Callable[..., Any], folder: Path, keys: tuple[str, ...]
) -> None:
    server = make(keys=keys, admin_keys=("admin",), adapter_directory=folder)
    server.headers = {"Authorization": "Bearer talks"}
    assert len(adapters.router.routes) == 4
    for route in adapters.router.routes:
        answer = server.post(route.path, {})  # type: ignore[attr-defined]
        error = answer.json()["error"]
        assert (answer.status_code, error["type"]) == (403, "permission_error")
        assert error["code"] == "missing_right"
        assert "the right to change adapters is missing" in error["message"]
    sent = {"lora_name": "x", "lora_path": "v"}
    assert server.post("/v1/load_lora_adapter", sent).status_code == 403
    assert server.engine.names == {"tuned": "somewhere"}
    assert server.post("/v1/completions", {"model": "tuned", "prompt": "x"}).status_code == 200
    assert server.get("/v1/models").status_code == 200
    server.headers = {"Authorization": "Bearer admin"}
    assert server.post("/v1/completions", {"model": "tuned", "prompt": "x"}).status_code == 200
    assert server.post("/v1/load_lora_adapter", sent).status_code == 200
    assert server.post(PUBLISH, body("v")).status_code == 200
    assert server.post(ROLLBACK, {"name": "x"}).status_code == 200
    assert server.post("/v1/unload_lora_adapter", {"lora_name": "x"}).status_code == 200


def test_held_out_text_may_be_a_file_of_the_directory(open_server: Any, folder: Path) -> None:
    texts = open_server.service.texts
    lines = [{"text": "one two"}, {"prompt": "three", "completion": " four"}]
    (folder / "held.jsonl").write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    (folder / "held.txt").write_text("one\ntwo")
    assert open_server.post(PUBLISH, body("v", "held.jsonl")).status_code == 200
    tokens, first = open_server.engine.held_out[0]
    assert (tokens, first) == (texts.encode("one two"), 1)
    assert texts.decode(open_server.engine.held_out[1][0]) == "three four"
    assert open_server.post(PUBLISH, body("v", "held.txt")).status_code == 200
    assert open_server.engine.held_out == [(texts.encode("one\ntwo"), 1)]
    (folder / "bad.jsonl").write_text('{"text": "a b"}\n{"text": \n')
    (folder / "bytes.txt").write_bytes(b"\xff\xfe\xfa")
    for name, status, said in (
        ("link.jsonl", 403, "held_out leads out"), ("none.jsonl", 404, "no such file"),
        ("v", 404, "no such file"),
        ("bad.jsonl", 400, "line 2"), ("bytes.txt", 400, "UnicodeDecodeError"),
    ):  # fmt: skip
        answer = open_server.post(PUBLISH, body("vv", name, name="y"))
        assert answer.status_code == status, answer.text
        assert said in answer.json()["error"]["message"]
        assert "secret" not in answer.text
    assert "y" not in open_server.engine.names


@pytest.mark.parametrize(
    "wrong",
    [
        1, "", {}, [], {"text": None}, {"text": "a b", "prompt": "x"}, {"prompt": "a b"},
        {"completion": "a b"}, {"text": 5}, {"messages": []},
        {"messages": [{"role": "user", "content": "hello you"}]},
        {"messages": [{"role": "assistant", "content": "hello you"}]}, {"prompt": "a b", "completion": ""},
        {"prompt": "x " * 600, "completion": "y"},
    ],
    ids=lambda wrong: str(wrong)[:30],
)  # fmt: skip
def test_text_that_cannot_be_measured_is_named_by_its_number(open_server: Any, wrong: Any) -> None:
    answer = open_server.post(PUBLISH, body("v", ["some text", wrong]))
    assert answer.status_code == 400
    assert "2" in answer.json()["error"]["message"]
    assert "x" not in open_server.engine.names


def test_too_much_text_is_refused(open_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "MOST_TOKENS", 20)
    answer = open_server.post(PUBLISH, body("v", ["def one(): return 1"] * 20))
    assert answer.status_code == 400
    assert "more than 20 tokens" in answer.json()["error"]["message"]
    assert "x" not in open_server.engine.names


@pytest.mark.parametrize("held_out", [1, None, {}, []])
def test_held_out_text_of_another_type_is_refused(open_server: Any, held_out: Any) -> None:
    answer = open_server.post(PUBLISH, {"name": "x", "path": "v", "held_out": held_out})
    assert (answer.status_code, answer.json()["error"]["param"][:8]) == (400, "held_out")


@pytest.mark.parametrize("template", [None, CHATML])
def test_only_the_answer_is_counted(
    texts: Texts, template: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts.tokenizer, "chat_template", template)
    monkeypatch.setattr(texts, "has_template", template is not None)
    messages = [{"role": "user", "content": "return what?"}, {"role": "assistant", "content": "the value"}]
    ((tokens, first),) = scored(texts, {"messages": messages}, 1, 512)
    asked = texts.chat(messages[:1], [])
    answer = " the value" if template is None else "the value<|end|>"
    assert texts.decode(tokens) == asked + answer
    assert asked.startswith(texts.decode(tokens[:first]))
    assert len(asked) - len(texts.decode(tokens[:first])) <= 12  # at most what shares a token with the answer


def test_a_token_across_the_border_counts_to_the_completion(texts: Texts) -> None:
    ((tokens, first),) = scored(texts, {"prompt": "import o", "completion": "s"}, 1, 512)
    assert texts.decode(tokens) == "import os"
    assert "import o".startswith(texts.decode(tokens[:first]))
    assert first < len(tokens)


def test_a_long_plain_text_is_cut_and_a_long_completion_refused(texts: Texts) -> None:
    text = "def one(): return 1\n" * 30
    ids = texts.encode(text)
    parts = scored(texts, text, 1, 50)
    assert [token for tokens, _ in parts for token in tokens] == ids[: 50 * len(parts)]
    assert all(first == 1 and len(tokens) <= 50 for tokens, first in parts)
    with pytest.raises(TextError, match="at most 50"):
        scored(texts, {"prompt": "x", "completion": text}, 3, 50)
