"""Text in and out: stop strings wherever they are cut, bytes of tokens, calls of tools, conversations."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tailorbird.errors import SettingsError
from tailorbird.model.load import load_tokenizer
from tailorbird.serve.api.text import StopStrings, TextOut, Texts, ToolText, parse_tool_call

LETTERS = st.text("ab{", max_size=30)


def cut_at_first(text: str, stops: list[str]) -> tuple[str, bool]:
    """Slowly: the text before the stop string that is complete first, the longest of those that end there."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


@given(LETTERS, st.lists(st.text("ab{", min_size=1, max_size=4), max_size=3), st.lists(st.integers(0, 30)))
@settings(max_examples=400, deadline=None)
def test_stop_strings_cut_the_same_text_however_it_comes(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    watch = StopStrings(stops)
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    passed = ""
    expected, stopped = cut_at_first(text, stops)
    for start, end in itertools.pairwise(edges):
        passed += watch.push(text[start:end])
        # Whatever was passed on is right already, and nothing is held that no stop string begins with.
        assert expected.startswith(passed)
        held = text[len(passed) : end]
        assert watch.stopped or not held or any(stop.startswith(held) for stop in stops)
    assert watch.stopped == stopped
    assert passed + watch.finish() == expected


def test_tokens_become_the_text_they_came_from_with_stop_strings_across_tokens(texts: Texts) -> None:
    written = "def größe(x):\n    return '🐦' + x  # done\n"
    ids = texts.encode(written)
    out = TextOut(texts, ["never"])
    pieces = [out.push(token) for token in ids]
    assert "".join(piece for _, piece in pieces) + out.finish() == written
    assert [offset for offset, _ in pieces] == sorted(offset for offset, _ in pieces)
    for stop in ("return '", "🐦", "ße(x", "\n    r"):
        out = TextOut(texts, [stop])
        found = "".join(out.push(token)[1] for token in ids) + out.finish()
        assert found == written[: written.index(stop)]
        assert out.stopped


def test_the_bytes_of_tokens_are_the_bytes_of_the_text(texts: Texts) -> None:
    written = "naïve 🐦 – ok"
    ids = texts.encode(written)
    assert bytes(byte for token in ids for byte in texts.token_bytes(token)).decode() == written


def test_a_text_that_must_be_too_long_is_refused_before_it_is_cut_up() -> None:
    calls: list[str] = []

    class Counting:
        chat_template = None

        def get_vocab(self) -> dict[str, int]:
            return {"ab": 0}

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            calls.append(text)
            return {"input_ids": [0] * -(-len(text) // 2)}

    counting = Texts(Counting())
    assert len(counting.encode("abab", limit=2)) == 2
    with pytest.raises(SettingsError, match="5 characters"):
        counting.encode("ababa", limit=2)
    assert "ababa" not in calls


def test_a_model_without_a_template_gets_a_plain_one_and_no_tools(texts: Texts) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert texts.chat(messages, []) == "system: Be brief.\nuser: Hi\nassistant:"
    assert texts.chat_stops == ["\nuser:"]
    with pytest.raises(SettingsError, match="chat template"):
        texts.chat(messages, [{"type": "function"}])


def test_a_template_gets_messages_and_tools_and_what_it_refuses_is_a_users_mistake() -> None:
    tokenizer = load_tokenizer("demo")
    tokenizer.chat_template = (
        "{% if messages[0].role == 'tool' %}{{ raise_exception('no tool first') }}{% endif %}"
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ tools[0].function.name }}>"
    )
    texts = Texts(tokenizer)
    tool = {"type": "function", "function": {"name": "look"}}
    assert texts.chat([{"role": "user", "content": "Hi"}], [tool]) == "<user>Hilook>"
    assert texts.chat_stops == []
    with pytest.raises(SettingsError, match="no tool first"):
        texts.chat([{"role": "tool", "content": "x"}], [tool])


@pytest.mark.parametrize("key", ["arguments", "parameters"])
def test_one_object_with_name_and_arguments_is_a_call(key: str) -> None:
    call = parse_tool_call(json.dumps({"name": "look", key: {"where": "é"}}), ["look"])
    assert call is not None
    assert (call.name, json.loads(call.arguments)) == ("look", {"where": "é"})


@pytest.mark.parametrize(
    "text",
    [
        "", "look", "[]", "{}", '{"name": "look"}', '{"name": "other", "arguments": {}}', "[" * 10_000,
        '{"name": "look", "arguments": "x"}', '{"name": ["look"], "arguments": {}}',
        '{"name": "look", "arguments": {}} and more',
    ],
)  # fmt: skip
def test_anything_else_is_text(text: str) -> None:
    assert parse_tool_call(text, ["look"]) is None
    watch = ToolText(["look"])
    passed = "".join(watch.push(letter) for letter in text)
    assert (passed + watch.finish()[0]) == text


@given(LETTERS, st.booleans())
def test_text_passes_a_watch_for_calls_unchanged_and_at_once_without_a_brace(text: str, tools: bool) -> None:
    watch = ToolText(["look"] if tools else [])
    passed = [watch.push(letter) for letter in text]
    rest, call = watch.finish()
    assert call is None
    assert "".join(passed) + rest == text
    if not tools or not text.startswith("{"):
        assert passed == list(text)
