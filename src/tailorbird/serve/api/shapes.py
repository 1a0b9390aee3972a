"""Answers in OpenAI's shapes, whole or as the chunks of a stream
(https://platform.openai.com/docs/api-reference/chat, …/completions)."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any, Protocol

from tailorbird.serve.api.generation import Piece
from tailorbird.serve.api.text import Texts, ToolCall, ToolText
from tailorbird.serve.request import TokenLogprob

#: What stands for a log-probability of minus infinity, which JSON doesn't have.
LEAST_LOGPROB = -9999.0


class Shape(Protocol):
    """Turns pieces into what is sent."""

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """The chunks of a stream that a piece becomes, often one."""

    def whole(self, pieces: Sequence[Piece], usage: dict[str, Any]) -> dict[str, Any]:
        """The answer that all pieces together are."""

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The chunk with the numbers of tokens."""


class ChatShape:
    """Answers of ``/v1/chat/completions``.

    Parameters
    ----------
    texts : Texts
    id : str
    model : str
        As the client called it.
    tools : sequence of str
        Names of the functions that may be called.
    with_usage : bool
        Chunks say that the numbers of tokens will come.
    """

    def __init__(
        self, texts: Texts, id: str, model: str, tools: Sequence[str] = (), with_usage: bool = False
    ) -> None:
        self._texts = texts
        self._head = {"id": f"chatcmpl-{id}", "created": int(time.time()), "model": model}
        self._tools = tools
        self._usage = {"usage": None} if with_usage else {}
        self._choices: dict[int, ToolText] = {}

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """See `Shape`."""
        found = []
        if piece.choice not in self._choices:
            self._choices[piece.choice] = ToolText(self._tools)
            found.append(self._chunk(piece.choice, {"role": "assistant", "content": ""}))
        choice = self._choices[piece.choice]
        text, call = choice.push(piece.text), None
        if piece.finish is not None:
            rest, call = choice.finish()
            text += rest
        logprobs = self._logprobs(piece)
        if text or logprobs is not None:
            found.append(self._chunk(piece.choice, {"content": text}, logprobs))
        if call is not None:
            found.append(self._chunk(piece.choice, {"tool_calls": [{"index": 0} | _call(call)]}))
        if piece.finish is not None:
            finish = piece.finish if call is None else "tool_calls"
            found.append(self._chunk(piece.choice, {}, finish=finish))
        return found

    def whole(self, pieces: Sequence[Piece], usage: dict[str, Any]) -> dict[str, Any]:
        """See `Shape`."""
        choices = []
        for number in sorted({piece.choice for piece in pieces}):
            mine = [piece for piece in pieces if piece.choice == number]
            watch = ToolText(self._tools)
            text = "".join(watch.push(piece.text) for piece in mine)
            rest, call = watch.finish()
            message: dict[str, Any] = {"role": "assistant", "content": text + rest}
            if call is not None:
                message |= {"content": None, "tool_calls": [_call(call)]}
            together = Piece(number, "", tuple(item for piece in mine for item in piece.logprobs))
            choices.append(
                {
                    "index": number,
                    "message": message,
                    "logprobs": self._logprobs(together),
                    "finish_reason": mine[-1].finish if call is None else "tool_calls",
                }
            )
        return self._head | {"object": "chat.completion", "choices": choices, "usage": usage}

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        """See `Shape`."""
        return self._head | {"object": "chat.completion.chunk", "choices": [], "usage": usage}

    def _chunk(
        self, choice: int, delta: dict[str, Any], logprobs: Any = None, finish: str | None = None
    ) -> dict[str, Any]:
        item = {"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return self._head | {"object": "chat.completion.chunk", "choices": [item]} | self._usage

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if not piece.logprobs:
            return None
        content = [
            self._token(item.token, item.logprob)
            | {"top_logprobs": [self._token(token, logprob) for token, logprob in item.top]}
            for _, item in piece.logprobs
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._texts.token_text(token),
            "logprob": max(logprob, LEAST_LOGPROB),
            "bytes": self._texts.token_bytes(token),
        }


class CompletionShape:
    """Answers of ``/v1/completions``; parameters as those of `ChatShape`."""

    def __init__(self, texts: Texts, id: str, model: str, with_usage: bool = False) -> None:
        self._texts = texts
        self._head = {
            "id": f"cmpl-{id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self._usage = {"usage": None} if with_usage else {}

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """See `Shape`."""
        return [self._head | {"choices": [self._choice([piece])]} | self._usage]

    def whole(self, pieces: Sequence[Piece], usage: dict[str, Any]) -> dict[str, Any]:
        """See `Shape`."""
        numbers = sorted({piece.choice for piece in pieces})
        choices = [self._choice([piece for piece in pieces if piece.choice == number]) for number in numbers]
        return self._head | {"choices": choices, "usage": usage}

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        """See `Shape`."""
        return self._head | {"choices": [], "usage": usage}

    def _choice(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        items = [item for piece in pieces for item in piece.logprobs]
        return {
            "index": pieces[0].choice,
            "text": "".join(piece.text for piece in pieces),
            "logprobs": self._logprobs(items) if items else None,
            "finish_reason": pieces[-1].finish,
        }

    def _logprobs(self, items: Sequence[tuple[int, TokenLogprob]]) -> dict[str, Any]:
        text = self._texts.token_text
        return {
            "tokens": [text(item.token) for _, item in items],
            "token_logprobs": [max(item.logprob, LEAST_LOGPROB) for _, item in items],
            "top_logprobs": [
                {text(token): max(logprob, LEAST_LOGPROB) for token, logprob in item.top} for _, item in items
            ],
            "text_offset": [offset for offset, _ in items],
        }


def _call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
