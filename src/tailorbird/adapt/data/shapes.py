"""What an entry means: a conversation, a prompt with its completion, or text; recognized by its fields.

Layouts: ``messages`` as in OpenAI's chat API, ``conversations`` with ``from`` and ``value`` as ShareGPT
writes them, ``prompt`` and ``completion`` as TRL has them (https://huggingface.co/docs/trl/dataset_formats),
and ``instruction``, ``input`` and ``output`` of Stanford Alpaca
(https://github.com/tatsu-lab/stanford_alpaca).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tailorbird.adapt.data.read import Entry, Stretch
from tailorbird.errors import TextError

KNOWN_FIELDS = "`messages`, `conversations`, `prompt` and `completion`, `instruction` and `output`, or `text`"

#: How ShareGPT names who speaks, beside the names that chat templates know.
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}

#: Whose turn may come after whose; None stands for the beginning.
FOLLOWS: dict[str, tuple[str | None, ...]] = {
    "system": (None,),
    "developer": (None,),
    "user": (None, "system", "developer", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


@dataclass(frozen=True)
class Conversation:
    """Messages whose assistant turns are learned, from message `begin` on.

    Attributes
    ----------
    messages : list of dict
        Each with ``role`` and ``content``; the last one is the assistant's.
    tools : list of dict or None
        What the template is told about tools.
    begin : int
        The first message of which something may be learned.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    begin: int = 0


@dataclass(frozen=True)
class Completion:
    """A text of which only the end is learned."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Instruction:
    """A task, perhaps with something that it is about, and the answer.

    How it is laid out depends on the tokenizer: as a conversation where it has a chat template, else under
    the headings of Stanford Alpaca's prompt (``PROMPT_DICT`` in its ``train.py``), without the sentence above
    them.
    """

    instruction: str
    input: str
    output: str

    def conversation(self) -> Conversation:
        """One turn each: the instruction and below it the input, and the output."""
        asked = f"{self.instruction}\n\n{self.input}" if self.input else self.instruction
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": self.output}]
        return Conversation(turns)

    def completion(self) -> Completion:
        """Under headings, for a model without a chat template."""
        parts = [f"### Instruction:\n{self.instruction}\n\n"]
        if self.input:
            parts.append(f"### Input:\n{self.input}\n\n")
        return Completion("".join([*parts, "### Response:\n"]), self.output)


@dataclass(frozen=True)
class Text:
    """A text of which all is learned, or a part of one; `goes_on` where it continues the one before."""

    text: str
    goes_on: bool = False


Record = Conversation | Completion | Instruction | Text

#: What each kind is called where a data set is described.
NAMES: dict[type, str] = {
    Conversation: "chat",
    Completion: "prompt and completion",
    Instruction: "instruction",
    Text: "text",
}


def read_record(entry: Entry) -> Record:
    """What an entry holds.

    Raises
    ------
    TextError
        Its fields are unknown, or hold something else than they should.
    """
    value = entry.value()
    if isinstance(value, Stretch):
        return Text(value.text, value.goes_on)
    if not isinstance(value, dict):
        raise _wrong(entry.where, f"holds {_name(value)}", "an object with " + KNOWN_FIELDS)
    fields = {name: field for name, field in value.items() if field is not None}
    if "messages" in fields:
        return _conversation(fields["messages"], fields.get("tools"), entry.where)
    if "conversations" in fields:
        turns = _from_sharegpt(fields["conversations"], entry.where)
        return _conversation(turns, fields.get("tools"), entry.where)
    if "prompt" in fields and "completion" in fields:
        return _completion(fields, entry.where)
    if "instruction" in fields and "output" in fields:
        return Instruction(
            _text(fields["instruction"], "instruction", entry.where),
            _text(fields.get("input", ""), "input", entry.where, blank=True),
            _text(fields["output"], "output", entry.where),
        )
    if "text" in fields:
        return Text(_text(fields["text"], "text", entry.where))
    keys = ", ".join(
        f"`{key}`" + (" (null)" if field is None else "") for key, field in list(value.items())[:10]
    )
    remedy = "rename the fields" if len(fields) == len(value) else "rename the fields, or fill those of null"
    raise _wrong(entry.where, f"has {keys or 'no fields'}", KNOWN_FIELDS, remedy)


def _completion(fields: dict[str, Any], where: str) -> Completion | Conversation:
    prompt, completion = fields["prompt"], fields["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return _conversation([*prompt, *completion], fields.get("tools"), where, begin=len(prompt))
    if isinstance(prompt, list) or isinstance(completion, list):
        raise _wrong(
            where, "has one of `prompt` and `completion` as a list", "two texts, or two lists of messages"
        )
    return Completion(_text(prompt, "prompt", where, blank=True), _text(completion, "completion", where))


def _conversation(messages: Any, tools: Any, where: str, begin: int = 0) -> Conversation:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise _wrong(
            where, "has messages that are no list of objects", '[{"role": "user", "content": "..."}, ...]'
        )
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise _wrong(where, f"has {_name(tools)} as `tools`", "a list of objects that describe tools")
    messages = [_given(message) for message in messages]
    before: str | None = None
    for number, message in enumerate(messages, 1):
        before = _check_message(message, before, f"{where}, message {number}")
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= begin]
    if not answers:
        raise _wrong(where, "has no turn of the assistant", "one to learn from")
    return Conversation(messages[: answers[-1] + 1], tools or None, begin)


def _check_message(message: dict[str, Any], before: str | None, where: str) -> str:
    """The message's role, if it may come here and says something."""
    role = message.get("role")
    if not isinstance(role, str) or role not in FOLLOWS:
        raise _wrong(where, f"has the role {role!r}", "one of " + ", ".join(FOLLOWS))
    if before not in FOLLOWS[role]:
        raise _wrong(
            where,
            f"of the role `{role}` comes {f'after `{before}`' if before else 'first'}",
            "a system message first or none, then user and assistant in turn, tools after the assistant",
        )
    if role == "assistant" and message.get("tool_calls"):
        _text(message.get("content", ""), "content", where, blank=True)
    else:
        _text(message.get("content"), "content", where, blank=role in ("system", "developer", "tool"))
    return role


def _from_sharegpt(turns: Any, where: str) -> Any:
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise _wrong(
            where,
            "has `conversations` that are no list of objects",
            '[{"from": "human", "value": "..."}, ...]',
        )
    if all("role" in turn for turn in turns):
        return turns
    return [
        {"role": SHAREGPT_ROLES.get(str(turn.get("from")), turn.get("from")), "content": turn.get("value")}
        for turn in turns
    ]


def _given(value: Any) -> Any:
    """A value without the fields that are null, as tables write those that another row has."""
    if isinstance(value, dict):
        return {name: _given(field) for name, field in value.items() if field is not None}
    return [_given(item) for item in value] if isinstance(value, list) else value


def _text(value: Any, name: str, where: str, blank: bool = False) -> str:
    if not isinstance(value, str):
        raise _wrong(where, f"has {_name(value)} as `{name}`", "text")
    if not blank and not value.strip():
        raise _wrong(where, f"has an empty `{name}`", "some text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise _wrong(
            where, f"has half of a character (a lone surrogate) in `{name}`", "Unicode text"
        ) from None
    return value


def _name(value: Any) -> str:
    kinds: Sequence[tuple[type, str]] = (
        (bool, "true or false"), (int, "a number"), (float, "a number"), (str, "text"), (list, "a list"),
        (dict, "an object"), (type(None), "nothing"),
    )  # fmt: skip
    return next((name for kind, name in kinds if isinstance(value, kind)), type(value).__name__)


def _wrong(where: str, found: str, expected: str, remedy: str = "correct or remove it") -> TextError:
    return TextError(f"{where} {found}", expected, remedy)
