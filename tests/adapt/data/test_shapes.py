"""Records are recognized by their fields; what is no example is refused with its place."""

from __future__ import annotations

import pytest

from tailorbird.adapt.data.read import Entry
from tailorbird.adapt.data.shapes import Completion, Conversation, Instruction, Text, read_record
from tailorbird.errors import TextError

ASKED = {"role": "user", "content": "2 + 2?"}
ANSWER = {"role": "assistant", "content": "4"}
SYSTEM = {"role": "system", "content": "Count."}


def record(value):
    return read_record(Entry("f, line 7", value))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"text": "a"}, Text("a")),
        ({"prompt": "a", "completion": "b"}, Completion("a", "b")),
        ({"prompt": "a", "completion": "b", "text": "c"}, Completion("a", "b")),
        ({"instruction": "a", "output": "b"}, Instruction("a", "", "b")),
        ({"instruction": "a", "input": None, "output": "b", "text": "all"}, Instruction("a", "", "b")),
        ({"instruction": "a", "input": "c", "output": "b"}, Instruction("a", "c", "b")),
        ({"messages": [SYSTEM, ASKED, ANSWER]}, Conversation([SYSTEM, ASKED, ANSWER])),
        ({"messages": [ASKED, ANSWER, ASKED]}, Conversation([ASKED, ANSWER])),
        ({"messages": [{**ASKED, "tool_calls": None}, ANSWER], "tools": None}, Conversation([ASKED, ANSWER])),
        ({"prompt": [ASKED], "completion": [ANSWER]}, Conversation([ASKED, ANSWER], None, 1)),
        (
            {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
            Conversation([ASKED, ANSWER]),
        ),
        ({"conversations": [ASKED, ANSWER]}, Conversation([ASKED, ANSWER])),
    ],
)
def test_a_record_is_what_its_fields_say(value, expected):
    assert record(value) == expected


def test_a_call_of_a_tool_and_its_result_are_turns():
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2}}}]}
    result = {"role": "tool", "content": "4"}
    tools = [{"type": "function", "function": {"name": "add"}}]
    found = record({"messages": [ASKED, call, result, result, ANSWER], "tools": tools})
    assert found == Conversation([ASKED, call, result, result, ANSWER], tools)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (7, "holds a number"),
        (["a"], "holds a list"),
        ("a", "holds text"),
        ({}, "has no fields"),
        ({"question": "a", "answer": "b"}, "has `question`, `answer`"),
        ({"prompt": "a"}, "has `prompt`"),
        ({"prompt": None, "completion": "b"}, "has `prompt` (null), `completion`"),
        ({"text": ""}, "an empty `text`"),
        ({"text": " \n"}, "an empty `text`"),
        ({"text": 7}, "a number as `text`"),
        ({"text": "\ud800"}, "half of a character"),
        ({"prompt": "a", "completion": ""}, "an empty `completion`"),
        ({"prompt": "a", "completion": [ANSWER]}, "as a list"),
        ({"instruction": "", "output": "b"}, "an empty `instruction`"),
        ({"instruction": "a", "output": ["b"]}, "a list as `output`"),
        ({"messages": "hello"}, "no list of objects"),
        ({"messages": ["hello"]}, "no list of objects"),
        ({"messages": []}, "no turn of the assistant"),
        ({"messages": [ASKED]}, "no turn of the assistant"),
        ({"prompt": [ASKED, ANSWER, ASKED], "completion": []}, "no turn of the assistant"),
        ({"messages": [ANSWER]}, "message 1 of the role `assistant` comes first"),
        ({"messages": [ASKED, ASKED, ANSWER]}, "message 2 of the role `user` comes after `user`"),
        ({"messages": [ASKED, ANSWER, ANSWER]}, "message 3 of the role `assistant` comes after `assistant`"),
        ({"messages": [ASKED, SYSTEM, ANSWER]}, "message 2 of the role `system` comes after `user`"),
        ({"messages": [{"role": "bot", "content": "a"}]}, "message 1 has the role 'bot'"),
        ({"messages": [{"content": "a"}]}, "message 1 has the role None"),
        ({"messages": [ASKED, {"role": "assistant", "content": [{"text": "4"}]}]}, "message 2 has a list"),
        ({"messages": [ASKED, {"role": "assistant", "content": " "}]}, "message 2 has an empty `content`"),
        ({"messages": [ASKED, {"role": "assistant"}]}, "message 2 has nothing as `content`"),
        ({"messages": [ASKED, ANSWER], "tools": "add"}, "has text as `tools`"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "bing", "value": "b"}]}, "'bing'"),
        ({"conversations": [["a", "b"]]}, "no list of objects"),
    ],
)
def test_what_is_no_example_is_refused_with_its_place(value, found):
    with pytest.raises(TextError) as error:
        record(value)
    assert str(error.value).startswith("f, line 7")
    assert found in str(error.value)
