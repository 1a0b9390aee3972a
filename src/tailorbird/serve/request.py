"""What a client asks of the engine, and what it gets back; tokens only, text is the API's business."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from tailorbird.errors import SettingsError

#: Why a sequence ended: a stop token, `max_tokens` (or the context), the client's wish, settings that let
#: nothing follow, a failure, or the death of its engine, which wasn't its fault as far as is known.
Finish = Literal["stop", "length", "cancelled", "refused", "error", "lost"]

GRAMMAR_KINDS = ("json", "json_schema", "regex", "ebnf")


@dataclass(frozen=True)
class Grammar:
    """What the text must look like.

    Parameters
    ----------
    kind : str
        One of `GRAMMAR_KINDS`.
    text : str
        The schema (JSON), pattern or grammar; empty for ``json``, any JSON value.
    """

    kind: str
    text: str = ""

    def __post_init__(self) -> None:
        if self.kind not in GRAMMAR_KINDS:
            raise SettingsError(
                f"a grammar of kind {self.kind!r}", "one of " + ", ".join(GRAMMAR_KINDS), "choose one of them"
            )


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Parameters
    ----------
    temperature : float
        0 takes the likeliest token; otherwise logits are divided by it.
    top_k : int
        Only so many of the likeliest tokens are drawn from; 0 is all.
    top_p : float
        Only the likeliest tokens that together have this much probability, in (0, 1].
    min_p : float
        Only tokens with at least this share of the likeliest one's probability, in [0, 1].
    typical_p : float
        Only the tokens whose surprise is nearest to the entropy, with this much probability together
        (https://arxiv.org/abs/2202.00666), in (0, 1].
    repetition_penalty : float
        Logits of tokens that occur in prompt or output are divided by it where positive, multiplied where
        negative (https://arxiv.org/abs/1909.05858). From 0.01 to 100; 1 is none.
    presence_penalty, frequency_penalty : float
        Taken off the logits of tokens of the output, once and per occurrence; in [-2, 2].
    logit_bias : mapping of int to float
        Token -> what is added to its logit, in [-100, 100].
    seed : int or None
        The same seed gives the same tokens whatever else is served; None lets the engine choose one.
    logprobs : int or None
        How many of the likeliest tokens to give back with their log-probabilities beside the chosen one's;
        of the model's own distribution, before penalties and filters. None gives none at all.
    grammar : Grammar or None
        What the text must look like.
    ignore_end : bool
        Stop tokens don't end the text.
    min_tokens : int
        Stop tokens are not drawn before so many tokens.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    logprobs: int | None = None
    grammar: Grammar | None = None
    ignore_end: bool = False
    min_tokens: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("temperature", 0, 100), ("top_p", 0, 1), ("min_p", 0, 1), ("typical_p", 0, 1),
            ("repetition_penalty", 0.01, 100), ("presence_penalty", -2, 2), ("frequency_penalty", -2, 2),
        ):  # fmt: skip
            value = getattr(self, name)
            open_below = name in ("top_p", "typical_p")
            if not (_is_number(value) and low <= value <= high) or (open_below and value == 0):
                raise SettingsError(
                    f"{name} {value!r}",
                    f"a number {'above' if open_below else 'from'} {low}, at most {high}",
                    f"set {name} within that range",
                )
        for name, low, high in (("top_k", 0, 1 << 30), ("min_tokens", 0, 1 << 30), ("logprobs", 0, 20)):
            value = getattr(self, name)
            if value is None and name == "logprobs":
                continue
            if not _is_whole(value) or not low <= value <= high:
                raise SettingsError(
                    f"{name} {value!r}",
                    f"a whole number from {low} to {high}",
                    f"set {name} within that range",
                )
        if self.seed is not None and not (_is_whole(self.seed) and -(1 << 63) <= self.seed < 1 << 63):
            raise SettingsError(f"seed {self.seed!r}", "a whole number of 64 bits", "choose another seed")
        for token, bias in self.logit_bias.items():
            if not _is_whole(token) or token < 0 or not _is_number(bias) or not -100 <= bias <= 100:
                raise SettingsError(
                    f"logit_bias {token!r}: {bias!r}",
                    "token ids, each with a number from -100 to 100",
                    "correct it",
                )

    @property
    def is_greedy(self) -> bool:
        """The likeliest token is taken each time."""
        return self.temperature == 0

    @property
    def is_plain(self) -> bool:
        """Logits are used as they are: nothing is added, taken off or forbidden before the temperature."""
        return (
            self.repetition_penalty == 1 and self.presence_penalty == 0 and self.frequency_penalty == 0
            and not self.logit_bias and self.grammar is None and self.min_tokens == 0
        )  # fmt: skip


@dataclass(frozen=True)
class BeamSearch:
    """How the likeliest texts are searched (`serve.beam`); names and defaults are those of transformers.

    Parameters
    ----------
    num_beams : int
        Texts that are followed at a time.
    length_penalty : float
        Above 0 prefers longer texts.
    early_stopping : bool or "never"
        True ends the search when `num_beams` texts have ended; False when none that is still written is
        better for its length now; "never" when none could become better.
    """

    num_beams: int
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self) -> None:
        if not _is_whole(self.num_beams) or not 1 <= self.num_beams <= 128:
            raise SettingsError(
                f"num_beams {self.num_beams!r}",
                "a whole number from 1 to 128",
                "set num_beams within that range",
            )
        if not _is_number(self.length_penalty) or not -10 <= self.length_penalty <= 10:
            raise SettingsError(
                f"length_penalty {self.length_penalty!r}",
                "a number from -10 to 10",
                "set length_penalty within that range",
            )
        if self.early_stopping not in (True, False, "never"):
            raise SettingsError(
                f"early_stopping {self.early_stopping!r}", "true, false or `never`", "choose one of them"
            )


@dataclass(frozen=True)
class Request:
    """A prompt to be continued.

    Parameters
    ----------
    id : str
        Chosen by the caller; no two that run at the same time share it.
    prompt : tuple of int
        At least one token.
    max_tokens : int
        Most tokens to generate, for each of `n`.
    sampling : Sampling
    stop : frozenset of int
        Tokens that end the text and don't belong to it; the model's own, unless given.
    n : int
        Continuations; they share the prompt's keys and values.
    adapter : str or None
        Name of a loaded adapter.
    tenant : str
        Whose request this is; tenants get equal shares of a busy engine, and share no cached prefixes.
    priority : int
        Lower goes first, and is preempted last.
    beams : BeamSearch or None
        Search for the `n` likeliest texts, instead of drawing tokens: temperature and what filters tokens
        don't count, and what changes their probabilities can't be asked for.
    """

    id: str
    prompt: tuple[int, ...]
    max_tokens: int = 128
    sampling: Sampling = field(default_factory=Sampling)
    stop: frozenset[int] | None = None
    n: int = 1
    adapter: str | None = None
    tenant: str = ""
    priority: int = 0
    beams: BeamSearch | None = None

    def __post_init__(self) -> None:
        if not self.prompt:
            raise SettingsError("an empty prompt", "a prompt of at least one token", "give a longer prompt")
        for name, value, high in (("max_tokens", self.max_tokens, 1 << 30), ("n", self.n, 128)):
            if not _is_whole(value) or not 1 <= value <= high:
                raise SettingsError(
                    f"{name} {value!r}", f"a whole number from 1 to {high}", f"set {name} within that range"
                )
        if self.beams is None:
            return
        if self.n > self.beams.num_beams:
            raise SettingsError(
                f"n {self.n} with num_beams {self.beams.num_beams}",
                "at most num_beams",
                "ask for fewer texts",
            )
        if not replace(self.sampling, min_tokens=0).is_plain:
            raise SettingsError(
                "beam search with penalties, logit_bias or a grammar",
                "beam search without them",
                "leave them out",
            )

    def to_wire(self) -> dict[str, Any]:
        """As plain values, for a message."""
        found = {name: getattr(self, name) for name in self.__dataclass_fields__}
        sampling = {name: getattr(self.sampling, name) for name in self.sampling.__dataclass_fields__}
        grammar = self.sampling.grammar
        sampling["grammar"] = None if grammar is None else [grammar.kind, grammar.text]
        sampling["logit_bias"] = [[token, bias] for token, bias in self.sampling.logit_bias.items()]
        stop = None if self.stop is None else sorted(self.stop)
        beams = self.beams
        searched = None if beams is None else [beams.num_beams, beams.length_penalty, beams.early_stopping]
        return found | {
            "prompt": list(self.prompt), "sampling": sampling, "stop": stop, "beams": searched
        }  # fmt: skip

    @classmethod
    def from_wire(cls, message: Mapping[str, Any]) -> Request:
        """The request that `to_wire` made plain."""
        sampling = dict(message["sampling"])
        sampling["logit_bias"] = dict(sampling["logit_bias"])
        if sampling["grammar"] is not None:
            sampling["grammar"] = Grammar(*sampling["grammar"])
        fields = dict(message) | {"prompt": tuple(message["prompt"]), "sampling": Sampling(**sampling)}
        fields["stop"] = None if message["stop"] is None else frozenset(message["stop"])
        fields["beams"] = None if message["beams"] is None else BeamSearch(*message["beams"])
        return cls(**fields)


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability, and those of the likeliest in its place, falling."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Output:
    """What one step brought to one continuation of a request.

    Attributes
    ----------
    id : str
        The request.
    index : int
        Which of its `n` continuations.
    tokens : tuple of int
        New ones; a stop token that ended the text isn't among them.
    logprobs : tuple of TokenLogprob
        One per token where they were asked for, else empty.
    finish : str or None
        Why it ended; None while it goes on.
    error : str or None
        What went wrong, where `finish` is ``refused`` or ``error``.
    cached_tokens : int
        Tokens of the prompt whose keys and values were at hand.
    cumulative_logprob : float or None
        Of a text that was searched: of all its tokens, and the stop token, together.
    """

    id: str
    index: int
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: Finish | None = None
    error: str | None = None
    cached_tokens: int = 0
    cumulative_logprob: float | None = None

    def to_wire(self) -> list[Any]:
        """As plain values, for a message."""
        logprobs = [[item.token, item.logprob, [list(pair) for pair in item.top]] for item in self.logprobs]
        return [
            self.id, self.index, list(self.tokens), logprobs, self.finish, self.error, self.cached_tokens,
            self.cumulative_logprob,
        ]  # fmt: skip

    @classmethod
    def from_wire(cls, message: list[Any]) -> Output:
        """The output that `to_wire` made plain."""
        id, index, tokens, logprobs, finish, error, cached, cumulative = message
        items = tuple(
            TokenLogprob(token, value, tuple((other, least) for other, least in top))
            for token, value, top in logprobs
        )
        return cls(id, index, tuple(tokens), items, finish, error, cached, cumulative)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
