"""Held-out text as clients give it: plain, a prompt with its completion, or a conversation with its answer.

All tokens of a plain text are counted but the first, those of prompts never.
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from tailorbird.errors import TextError
from tailorbird.serve.api.schemas import HeldOutText
from tailorbird.serve.api.text import Texts

#: Most tokens of all texts together: they go to the engine in one message, and are measured twice.
MOST_TOKENS = 1 << 20
#: Tokens of a text, and how many of them, at least 1, are read without being counted.
Scored = tuple[list[int], int]


def scored(texts: Texts, given: Any, number: int, context: int) -> list[Scored]:
    """Tokens of one held-out text; a plain one that is longer than the context is cut into several.

    Parameters
    ----------
    texts : Texts
    given : Any
        What should be a text, or fields of `HeldOutText`.
    number : int
        For messages.
    context : int
        Most tokens of a text.

    Raises
    ------
    TextError
        It is something else, nothing of it would be counted, or prompt and completion don't fit the context.
    """
    try:
        entry = HeldOutText.model_validate({"text": given} if isinstance(given, str) else given)
    except ValidationError as error:
        raise TextError(
            f"held-out text {number}: {error.errors()[0]['msg']}",
            "a text, or an object with `text`, with `prompt` and `completion`, or with `messages`",
            "correct it",
        ) from error
    found = _plain(texts, entry.text, context) if entry.text is not None else [_answer(texts, entry, number)]
    if max((len(tokens) for tokens, _ in found), default=0) > context:
        raise TextError(
            f"held-out text {number} of {len(found[0][0])} tokens",
            f"at most {context}, the context",
            "shorten it",
        )
    if not found or not all(first < len(tokens) for tokens, first in found):
        raise TextError(
            f"held-out text {number}, of which no token would be counted",
            "at least two tokens, one of them in the completion",
            "give a longer text, or leave it out",
        )
    return found


def _plain(texts: Texts, text: str, context: int) -> list[Scored]:
    ids = texts.encode(text)
    parts = (ids[start : start + context] for start in range(0, len(ids), context))
    return [(part, 1) for part in parts if len(part) > 1]


def _answer(texts: Texts, entry: HeldOutText, number: int) -> Scored:
    """A prompt and what follows it; a token across the border belongs to what follows."""
    prompt, whole, special = _prompt_and_whole(texts, entry, number)
    before, ids = texts.encode(prompt, special), texts.encode(whole, special)
    pairs = enumerate(zip(before, ids, strict=False))
    alike = next((i for i, (one, other) in pairs if one != other), min(len(before), len(ids)))
    return ids, max(1, alike)


def _prompt_and_whole(texts: Texts, entry: HeldOutText, number: int) -> tuple[str, str, bool]:
    """The text before what is counted, all of it, and whether the tokenizer adds tokens around it."""
    if entry.messages is None:
        return entry.prompt or "", f"{entry.prompt}{entry.completion}", True
    messages = [message.for_template() for message in entry.messages]
    if len(messages) > 1 and messages[-1]["role"] == "assistant":
        prompt, whole = texts.chat(messages[:-1], []), texts.conversation(messages)
        if whole.startswith(prompt):
            return prompt, whole, not texts.has_template
    raise TextError(
        f"held-out conversation {number}, which doesn't end with an answer to what is before it",
        "messages of which the last is the assistant's, in a form that the chat template continues",
        "end it with the answer that is wanted",
    )
