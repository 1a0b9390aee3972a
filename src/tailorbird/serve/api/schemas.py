"""What clients send, in OpenAI's shapes and a little more (https://platform.openai.com/docs/api-reference).

Fields that nobody here knows are ignored, as clients send many; those that are known must have the right
type. Ranges are checked where they matter, by `Sampling` and `Request`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tailorbird.errors import SettingsError
from tailorbird.serve.request import BeamSearch, Grammar, Sampling

MOST_STOPS, LONGEST_STOP = 16, 1000
_ADAPTER_NAME = r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}$"


class Schema(BaseModel):
    """Base of all: types aren't converted, other fields are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())


class StreamOptions(Schema):
    """`include_usage` adds a last chunk with the numbers of tokens."""

    include_usage: bool | None = None


class Generating(Schema):
    """What chat and plain completions share.

    Beyond OpenAI: the fields from `top_k` on, as in vLLM, and from `num_beams` on, as in transformers.
    """

    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    response_format: ResponseFormat | None = None
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    guided_regex: str | None = None
    guided_grammar: str | None = None
    use_beam_search: bool | None = None
    num_beams: int | None = None
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None

    @property
    def stops(self) -> list[str]:
        """Stop strings.

        Raises
        ------
        SettingsError
            Too many, an empty one or a long one.
        """
        found = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(found) > MOST_STOPS or not all(1 <= len(stop) <= LONGEST_STOP for stop in found):
            raise SettingsError(
                f"{len(found)} stop strings of {sorted({len(stop) for stop in found})} characters",
                f"at most {MOST_STOPS}, each of 1 to {LONGEST_STOP} characters",
                "leave out the empty, the long and the least needed ones",
            )
        return found

    def grammars(self) -> list[Grammar]:
        """What the text must look like, for each field that says so."""
        found = []
        if self.response_format is not None:
            found += self.response_format.grammars()
        if self.guided_regex is not None:
            found.append(Grammar("regex", self.guided_regex))
        if self.guided_grammar is not None:
            found.append(Grammar("ebnf", self.guided_grammar))
        return found

    def beams(self) -> BeamSearch | None:
        """How the likeliest texts are searched, where that is asked for.

        By `num_beams` above 1, or by `use_beam_search`, whose number of beams is `n` unless `num_beams` is
        given.

        Raises
        ------
        SettingsError
            A number out of range.
        """
        if not self.use_beam_search and self.num_beams in (None, 1):
            return None
        stated = {"length_penalty": self.length_penalty, "early_stopping": self.early_stopping}
        width = self.num_beams if self.num_beams is not None else self.n or 1
        return BeamSearch(width, **{name: value for name, value in stated.items() if value is not None})  # type: ignore[arg-type]

    @property
    def written(self) -> int:
        """Continuations of each prompt, of which `n` are answered."""
        return 1 if self.n is None else self.n

    def sampling(self, logprobs: int | None) -> Sampling:
        """How tokens are chosen; what is null or absent is the default.

        Parameters
        ----------
        logprobs : int or None
            How many of the likeliest tokens are wanted beside the chosen ones.

        Raises
        ------
        SettingsError
            A number out of range, or more than one field that says what the text must look like.
        """
        grammars = self.grammars()
        if len(grammars) > 1:
            raise SettingsError(
                f"{len(grammars)} fields that say what the text must look like",
                "one of response_format, guided_regex, guided_grammar and a forced tool",
                "leave out the others",
            )
        stated: dict[str, Any] = {
            "temperature": self.temperature,
            "top_k": self.top_k if self.top_k != -1 else 0,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "typical_p": self.typical_p,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "logit_bias": None if self.logit_bias is None else _token_ids(self.logit_bias),
            "ignore_end": self.ignore_eos,
            "min_tokens": self.min_tokens,
            "seed": self.seed,
            "logprobs": logprobs,
            "grammar": grammars[0] if grammars else None,
        }
        return Sampling(**{name: value for name, value in stated.items() if value is not None})


class JsonSchema(Schema):
    """The `json_schema` of a response format."""

    name: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class ResponseFormat(Schema):
    """Free text, any JSON object, or JSON by a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def grammars(self) -> list[Grammar]:
        """None or one."""
        if self.type == "text":
            return []
        if self.type == "json_object":
            return [Grammar("json_schema", '{"type": "object"}')]
        if self.json_schema is None or self.json_schema.schema_ is None:
            raise SettingsError(
                "response_format json_schema without a schema",
                "response_format.json_schema.schema",
                "give the schema there",
            )
        return [Grammar("json_schema", dumps(self.json_schema.schema_))]


class ContentPart(Schema):
    """Part of a message; only text is understood."""

    type: str
    text: str | None = None


class CalledFunction(Schema):
    """The function of a call that a model made earlier."""

    name: str
    arguments: str


class EarlierCall(Schema):
    """A call that a model made earlier in the conversation."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Schema):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[EarlierCall] | None = None
    tool_call_id: str | None = None

    def for_template(self) -> dict[str, Any]:
        """As chat templates know messages: content is one text, arguments are objects.

        Raises
        ------
        SettingsError
            A part that isn't text, or arguments that are no JSON.
        """
        found: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": _joined(self.content),
        }
        for name in ("name", "tool_call_id"):
            if (value := getattr(self, name)) is not None:
                found[name] = value
        if self.tool_calls:
            found["tool_calls"] = [
                {
                    "id": call.id,
                    "type": call.type,
                    "function": {"name": call.function.name, "arguments": _object(call.function.arguments)},
                }
                for call in self.tool_calls
            ]
        return found


class Function(Schema):
    """A function that a model may call."""

    name: str = Field(min_length=1)
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Schema):
    """A tool that a model may use; functions only."""

    type: Literal["function"]
    function: Function


class FunctionName(Schema):
    """Names a function."""

    name: str


class ToolChoice(Schema):
    """The function that must be called."""

    type: Literal["function"]
    function: FunctionName


class ChatRequest(Generating):
    """Body of ``/v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None

    @property
    def usable_tools(self) -> list[Tool]:
        """The tools that may be used: none where the client says so."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def top(self) -> int | None:
        """How many of the likeliest tokens are wanted beside the chosen ones."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def grammars(self) -> list[Grammar]:
        """See `Generating`; a tool that must be called is one, too."""
        found = super().grammars()
        choice = self.tool_choice
        if choice != "required" and not isinstance(choice, ToolChoice):
            return found
        forced = [
            tool.function
            for tool in self.usable_tools
            if choice == "required"
            or (isinstance(choice, ToolChoice) and tool.function.name == choice.function.name)
        ]
        if not forced:
            raise SettingsError(
                "a tool_choice without such a tool",
                "a tool_choice that names one of tools, or tools with `required`",
                "add the tool",
            )
        return [*found, Grammar("json_schema", dumps({"anyOf": [_call_schema(one) for one in forced]}))]


class CompletionRequest(Generating):
    """Body of ``/v1/completions``."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None

    @property
    def written(self) -> int:
        """See `Generating`."""
        return super().written if self.best_of is None else self.best_of

    def check(self) -> None:
        """Refuse the fields that would change the answer and aren't offered, and a `best_of` without sense.

        Raises
        ------
        SettingsError
        """
        for name, idle in (
            ("echo", not self.echo),
            ("suffix", not self.suffix),
        ):
            if not idle:
                raise SettingsError(f"{name} {getattr(self, name)!r}", f"no {name}", f"leave out {name}")
        n = super().written
        if self.written < n:
            raise SettingsError(f"best_of {self.best_of} for n {n}", "at least n", "raise best_of")
        if self.written > n and (self.stream or self.beams() is not None):
            raise SettingsError(
                f"best_of {self.best_of} for n {n} with `stream` or beam search",
                "neither, since the best are known at the end, and a search finds the best anyway",
                "leave out best_of",
            )


class EmbeddingRequest(Schema):
    """Body of ``/v1/embeddings``."""

    model: str
    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None


class LoadAdapterRequest(Schema):
    """Body of ``/v1/load_lora_adapter``."""

    lora_name: str = Field(pattern=_ADAPTER_NAME)
    lora_path: str = Field(min_length=1, max_length=4096)
    load_inplace: bool = False


class UnloadAdapterRequest(Schema):
    """Body of ``/v1/unload_lora_adapter``."""

    lora_name: str


class HeldOutText(Schema):
    """A text to measure an adapter on: plain, a prompt with its completion, or a conversation."""

    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: list[Message] | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def _one_form(self) -> HeldOutText:
        given = [
            name for name in ("text", "prompt", "completion", "messages") if getattr(self, name) is not None
        ]
        if given not in (["text"], ["prompt", "completion"], ["messages"]):
            raise ValueError("expected `text`, or `prompt` and `completion`, or `messages`")
        return self


class PublishAdapterRequest(Schema):
    """Body of ``/v1/adapters/publish``; `held_out` is texts (`HeldOutText`), or the path of a file."""

    name: str = Field(pattern=_ADAPTER_NAME)
    path: str = Field(min_length=1, max_length=4096)
    held_out: str | list[Any] = Field(min_length=1)


class RollbackAdapterRequest(Schema):
    """Body of ``/v1/adapters/rollback``."""

    name: str


class TokenizeRequest(Schema):
    """Body of ``/tokenize``: a text, or the messages of a conversation."""

    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    add_special_tokens: bool = True


class DetokenizeRequest(Schema):
    """Body of ``/detokenize``."""

    tokens: list[int]


def dumps(value: Any) -> str:
    """JSON of what a client sent as JSON.

    Raises
    ------
    SettingsError
        It has a number that isn't finite, which Python reads and JSON doesn't have.
    """
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError as error:
        raise SettingsError("a schema with NaN or infinity", "finite numbers", "correct it") from error


def _call_schema(function: Function) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {
            "name": {"const": function.name},
            "arguments": function.parameters or {"type": "object"},
        },
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _token_ids(bias: Mapping[str, float]) -> dict[int, float]:
    try:
        return {int(token): value for token, value in bias.items()}
    except ValueError as error:
        raise SettingsError("a logit_bias whose keys are no token ids", "token ids", "correct it") from error


def _joined(content: str | list[ContentPart] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    other = {part.type for part in content if part.type != "text" or part.text is None}
    if other:
        raise SettingsError(
            f"content of type {', '.join(sorted(other))[:80]}",
            "text, all that this model reads",
            "send text only",
        )
    return "".join(part.text or "" for part in content)


def _object(arguments: str) -> Any:
    try:
        return json.loads(arguments or "{}")
    except (ValueError, RecursionError) as error:
        raise SettingsError(
            "arguments of an earlier tool call that are no JSON", "a JSON object as text", "correct them"
        ) from error


Generating.model_rebuild()
