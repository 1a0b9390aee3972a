"""Text to tokens and tokens to text, with stop strings.

A model without a chat template gets a plain one: a line ``role: content`` for each message and ``assistant:``
at the end, and a new line that begins with ``user:`` ends the answer.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tailorbird.errors import SettingsError
from tailorbird.run.generate import REPLACEMENT, TextStream

#: What ends an answer of a model that has no chat template.
PLAIN_STOP = "\nuser:"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Texts:
    """A model's tokenizer, as the API needs it.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.has_template = bool(getattr(tokenizer, "chat_template", None))
        self._longest = max((len(token) for token in tokenizer.get_vocab()), default=1)
        # Settles truncation and padding, so that later calls, in another thread, change nothing.
        self.encode("a")

    @property
    def chat_stops(self) -> list[str]:
        """Stop strings that a chat has anyway."""
        return [] if self.has_template else [PLAIN_STOP]

    def encode(self, text: str, special: bool = True, limit: int | None = None) -> list[int]:
        """Tokens of a text.

        Parameters
        ----------
        text : str
        special : bool
            Add what the tokenizer puts around a text, such as a begin token.
        limit : int, optional
            Most tokens that would be of use: a text that must have more is refused before it is cut up.

        Raises
        ------
        SettingsError
            It must have more.
        """
        if limit is not None and len(text) > limit * self._longest:
            raise SettingsError(
                f"a text of {len(text)} characters",
                f"at most {limit} tokens, none of which is longer than {self._longest} characters",
                "shorten the prompt",
            )
        ids: list[int] = self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of tokens, special ones included."""
        text: str = self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
        return text

    def chat(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> str:
        """The text of a conversation, up to where the model answers.

        Parameters
        ----------
        messages : sequence of mappings
            Each with `role` and `content`, a text.
        tools : sequence of mappings
            In OpenAI's form; they go through the chat template.

        Raises
        ------
        SettingsError
            The chat template refuses the conversation, or there are tools and no template.
        """
        if not self.has_template:
            if tools:
                raise SettingsError(
                    "tools, for a model without a chat template",
                    "a model whose tokenizer has a chat template that knows tools",
                    "leave out tools, or describe them in a message",
                )
            return "\n".join([*_lines(messages), "assistant:"])
        return self._rendered(messages, tools, open=True)

    def conversation(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The text of a conversation that is over: that of `chat`, and the last answer."""
        return self._rendered(messages, (), open=False) if self.has_template else "\n".join(_lines(messages))

    def _rendered(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], open: bool
    ) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=list(tools) or None,
                tokenize=False,
                add_generation_prompt=open,
            )
        except Exception as error:  # a template may do and raise anything
            raise SettingsError(
                f"messages that the model's chat template refuses ({type(error).__name__}: {error})",
                "roles in the order that the template allows",
                "see the model's card for the conversations it was trained on",
            ) from error
        return text

    def token_text(self, token: int) -> str:
        """A token by itself, special ones included."""
        return self.decode([token])

    def token_bytes(self, token: int) -> list[int]:
        """UTF-8 bytes of a token; of one that is part of a character, those that it is."""
        text = self.decode([token])
        if REPLACEMENT in text:
            name = self.tokenizer.convert_ids_to_tokens(token)
            if match := _BYTE_TOKEN.fullmatch(name):
                return [int(match[1], 16)]
            table = _byte_letters()
            if all(letter in table for letter in name):
                return [table[letter] for letter in name]
        return list(text.encode())


def _lines(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    return [f"{message['role']}: {message['content']}" for message in messages]


@functools.cache
def _byte_letters() -> dict[str, int]:
    """The letters by which byte-level tokenizers write bytes.

    Printable Latin-1 stands for itself, the other bytes are counted from U+0100
    (https://github.com/openai/gpt-2/blob/master/src/encoder.py).
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + number): byte for number, byte in enumerate(others)
    }


class StopStrings:
    """Passes text on up to the first stop string, holding back what could be the beginning of one.

    The first is the one that is complete first; of those that end together, the longest.

    Parameters
    ----------
    stops : sequence of str
        None of them empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Take text; return what certainly comes before any stop string."""
        if self.stopped:
            return ""
        self._held += text
        found = [
            (start + len(stop), start)
            for stop in self._stops
            if (start := self._held.find(stop)) >= 0
        ]  # fmt: skip
        if found:
            _, start = min(found)
            self.stopped = True
            passed, self._held = self._held[:start], ""
            return passed
        kept = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        passed, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return passed

    def finish(self) -> str:
        """Return what was held back: no more text comes."""
        passed, self._held = self._held, ""
        return passed


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with, less than all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


class TextOut:
    """Turns the tokens of one continuation into text, up to the first stop string.

    Parameters
    ----------
    texts : Texts
    stops : sequence of str
    """

    def __init__(self, texts: Texts, stops: Sequence[str]) -> None:
        self._stream = TextStream(texts.tokenizer)
        self._stops = StopStrings(stops)
        self.length = 0

    @property
    def stopped(self) -> bool:
        """A stop string was met; nothing more comes."""
        return self._stops.stopped

    def push(self, token: int) -> tuple[int, str]:
        """Take one token.

        Returns
        -------
        offset : int
            Where in the text, stop strings included, its characters begin.
        text : str
            What is certain now.
        """
        offset, piece = self.length, self._stream.push(token)
        self.length += len(piece)
        return offset, self._stops.push(piece)

    def finish(self) -> str:
        """The rest, when no more tokens come."""
        if self.stopped:
            return ""
        last = self._stops.push(self._stream.finish())
        return last if self.stopped else last + self._stops.finish()


@dataclass(frozen=True)
class ToolCall:
    """A function that the model wants called; `arguments` is a JSON object as text."""

    name: str
    arguments: str


def parse_tool_call(text: str, names: Sequence[str]) -> ToolCall | None:
    """The call that a text is, or None.

    Parameters
    ----------
    text : str
        One JSON object with `name` and either `arguments` or `parameters`, an object, is a call.
    names : sequence of str
        The functions there are.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or found.get("name") not in names:
        return None
    arguments = found.get("arguments", found.get("parameters"))
    return ToolCall(found["name"], json.dumps(arguments)) if isinstance(arguments, dict) else None


class ToolText:
    """Passes the text of a continuation on unless it may be a tool call: then it waits for the end.

    Parameters
    ----------
    names : sequence of str
        The functions there are; none passes everything on.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._held = ""
        self._passing = not names

    def push(self, text: str) -> str:
        """Take text; return what is certainly no part of a call."""
        if self._passing:
            return text
        self._held += text
        beginning = self._held.lstrip()
        if not beginning or beginning.startswith("{"):
            return ""
        self._passing = True
        passed, self._held = self._held, ""
        return passed

    def finish(self) -> tuple[str, ToolCall | None]:
        """What was held back, as text or as a call."""
        held, self._held = self._held, ""
        call = parse_tool_call(held, self._names) if held else None
        return ("", call) if call else (held, None)
