"""From a client's wish to pieces of text: limits, the engine's outputs, stop strings, the clock."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from tailorbird.errors import SettingsError, TailorbirdError
from tailorbird.serve.api.failures import ApiError, EngineLost, busy, too_late
from tailorbird.serve.api.metrics import Metrics
from tailorbird.serve.api.text import TextOut, Texts
from tailorbird.serve.request import BeamSearch, Output, Request, Sampling, TokenLogprob
from tailorbird.serve.supervisor import MOST_ATTEMPTS, Supervisor

T = TypeVar("T")


@dataclass
class Service:
    """What the routes work with.

    Attributes
    ----------
    supervisor : Supervisor
    texts : Texts
    metrics : Metrics
    name : str
        What the model is called by clients.
    queue : int
        Continuations that may wait beside those that the engine runs at a time.
    timeout : float
        Seconds that an answer may take.
    adapter_directory : Path or None
        The only place from which adapters may be loaded while the server runs.
    draining : bool
        No new requests are taken.
    startup : dict
        Where the time of the start went (`serve.startup.Startup.told`).
    """

    supervisor: Supervisor
    texts: Texts
    metrics: Metrics
    name: str
    queue: int = 256
    timeout: float = 600.0
    adapter_directory: Path | None = None
    draining: bool = False
    startup: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.time)
    # One thread, because tokenizers aren't made to be used by several.
    _tokenizing: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "tokenizer"))

    @property
    def context(self) -> int:
        """Most tokens of a prompt and its continuation."""
        return int(self.supervisor.info["context"])

    @property
    def vocab_size(self) -> int:
        """Tokens are below this."""
        return int(self.supervisor.info["vocab_size"])

    @property
    def capacity(self) -> int:
        """Continuations that are taken at a time."""
        return int(self.supervisor.info["max_sequences"]) + self.queue

    def models(self) -> list[str]:
        """What clients may ask for: the model, then its adapters."""
        return [self.name, *self.supervisor.adapters]

    def adapter(self, model: str) -> str | None:
        """The adapter that a client means by `model`, None for the model itself.

        Raises
        ------
        ApiError
            404, with what there is.
        """
        known = self.models()
        if model not in known:
            raise ApiError(
                404, f"no model `{model[:200]}` here; there is {', '.join(known)}", "model_not_found", "model"
            )
        return None if model == self.name else model

    def check_open(self) -> None:
        """Raise `ApiError` 503 where the server is about to stop."""
        if self.draining:
            raise ApiError(503, "the server is stopping", "stopping", headers={"Retry-After": "5"})

    def check_room(self, wanted: int) -> None:
        """Raise where so many more can't be taken: `ApiError` 429 for now, `SettingsError` for ever."""
        if wanted > self.capacity:
            raise SettingsError(
                f"{wanted} continuations", f"at most {self.capacity}", "send others in another request"
            )
        missing = self.supervisor.in_flight + wanted - self.capacity
        if missing > 0:
            raise busy("the queue is full", self.metrics.departures.wait(missing), "queue_full")

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Let the tokenizer's thread do what may take long."""
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, work)

    async def encode(self, text: str, special: bool = True) -> list[int]:
        """Tokens of a text that may be a prompt; raises `SettingsError` where it is far too long."""
        return await self.in_thread(lambda: self.texts.encode(text, special, self.context))

    async def prompts(self, given: str | list[str] | list[int] | list[list[int]]) -> list[list[int]]:
        """Tokens of one or several prompts, texts or tokens.

        Raises
        ------
        SettingsError
            An empty list, or tokens that the model doesn't have.
        """
        several: list[Any] = (
            [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else list(given)
        )
        if not several or len(several) > self.capacity:
            raise SettingsError(
                f"{len(several)} prompts", f"1 to {self.capacity} prompts", "send others in another request"
            )
        return [await self.encode(one) if isinstance(one, str) else self.checked(one) for one in several]

    def checked(self, ids: Sequence[int]) -> list[int]:
        """These tokens, all of them the model's; raises `SettingsError` for others."""
        wrong = next((token for token in ids if not 0 <= token < self.vocab_size), None)
        if wrong is not None:
            raise SettingsError(
                f"token {wrong}", f"tokens from 0 to {self.vocab_size - 1}", "use the model's own tokenizer"
            )
        return list(ids)


@dataclass(frozen=True)
class Piece:
    """What is new of one continuation.

    Attributes
    ----------
    choice : int
        Which: first those of the first prompt.
    text : str
    logprobs : tuple of (int, TokenLogprob)
        Offset in the text, and the token there; where they were asked for.
    finish : str or None
        ``stop`` or ``length`` with the last piece.
    """

    choice: int
    text: str
    logprobs: tuple[tuple[int, TokenLogprob], ...] = ()
    finish: str | None = None


class Generation:
    """One client's request under way.

    Parameters
    ----------
    service : Service
    prompts : sequence of token lists
    sampling : Sampling
    max_tokens : int or None
        Of each continuation; None is up to the end of the context.
    n : int
        Continuations of each prompt that are answered.
    stops : sequence of str
    adapter : str or None
    tenant : str
    beams : BeamSearch, optional
    best_of : int, optional
        Continuations of each prompt, of which the `n` with the largest mean log-probability of a token are
        answered; `n` unless given.

    Raises
    ------
    ApiError, SettingsError
        Too long, or a bias of a token that there isn't.
    """

    def __init__(
        self,
        service: Service,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        max_tokens: int | None,
        n: int,
        stops: Sequence[str],
        adapter: str | None,
        tenant: str,
        beams: BeamSearch | None = None,
        best_of: int | None = None,
    ) -> None:
        service.check_open()
        self._service = service
        self._stops = stops
        self.arrived = time.monotonic()
        self.id = uuid.uuid4().hex
        self.prompt_tokens = sum(map(len, prompts))
        self.completion_tokens = self.cached_tokens = 0
        self.n, self._written = n, n if best_of is None else best_of
        self._shows_logprobs = sampling.logprobs is not None
        if self._written > n and not self._shows_logprobs:
            sampling = replace(sampling, logprobs=0)  # to compare by
        if any(token >= service.vocab_size for token in sampling.logit_bias):
            raise SettingsError(
                "a logit_bias of a token that the model doesn't have",
                f"tokens from 0 to {service.vocab_size - 1}",
                "use the model's own tokenizer",
            )
        self._requests = [
            Request(
                id=f"{self.id}-{number}",
                prompt=tuple(prompt),
                max_tokens=_room(len(prompt), max_tokens, service.context),
                sampling=sampling,
                n=self._written,
                adapter=adapter,
                tenant=tenant,
                beams=beams,
            )
            for number, prompt in enumerate(prompts)
        ]
        self._continuations = len(prompts) * (self._written if beams is None else beams.num_beams)

    async def whole(self) -> list[Piece]:
        """All that is answered: the next engine writes them anew if one dies. Raises as `pieces`."""
        for attempt in range(1, MOST_ATTEMPTS + 1):
            try:
                async with contextlib.aclosing(self._attempt(again=attempt > 1)) as pieces:
                    return self._best([piece async for piece in pieces])
            except EngineLost:
                if attempt == MOST_ATTEMPTS:
                    raise
        raise AssertionError("the last attempt returns or raises")

    def _best(self, pieces: list[Piece]) -> list[Piece]:
        """Those of the continuations that are answered."""
        if self._written == self.n:
            return pieces
        best = best_pieces(pieces, self.n, self._written)
        return best if self._shows_logprobs else [replace(piece, logprobs=()) for piece in best]

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Text as it comes, of all that is written; closing the iterator early cancels the rest.

        Should the engine die before there was any, the next one is asked.

        Raises
        ------
        EngineLost
            The engine died.
        ApiError
            400 where the settings let nothing follow, 429 where the queue is full, 503 where the engine
            failed, 504 where it took too long.
        TailorbirdError
            What the engine refused the request with, or more continuations than are ever taken.
        """
        for attempt in range(1, MOST_ATTEMPTS + 1):
            sent = False
            try:
                async with contextlib.aclosing(self._attempt(again=attempt > 1)) as pieces:
                    async for piece in pieces:
                        sent = True
                        yield piece
                return
            except EngineLost:
                if sent or attempt == MOST_ATTEMPTS:
                    raise

    async def _attempt(self, again: bool) -> AsyncGenerator[Piece, None]:
        """What one engine writes; raises as `pieces`."""
        service, metrics = self._service, self._service.metrics
        self.completion_tokens = self.cached_tokens = 0
        if not again:
            service.check_room(self._continuations)  # others may have come since this request did
            for request in self._requests:
                metrics.submitted(len(request.prompt), request.adapter)
        numbers = {request.id: number for number, request in enumerate(self._requests)}
        open = {
            choice: _Continuation(service.texts, self._stops)
            for choice in range(len(numbers) * self._written)
        }
        cached = dict.fromkeys(numbers, 0)
        observe = metrics.clock(self.arrived)
        waited = time.monotonic() - self.arrived
        deadline = asyncio.get_running_loop().time() + service.timeout - waited
        outcome = "cancelled"
        try:
            async with contextlib.aclosing(service.supervisor.submit(*self._requests)) as outputs:
                while open:
                    async with asyncio.timeout_at(deadline):
                        output = await anext(outputs)
                    observe(output)
                    choice = numbers[output.id] * self._written + output.index
                    if choice not in open:
                        continue  # it met a stop string, and others of the same request go on
                    if output.finish == "lost":
                        outcome = "lost"
                        raise EngineLost(503, output.error or "the engine died", "engine_error")
                    if output.finish in ("refused", "error"):
                        outcome = "error"
                        told = (400, "invalid_value") if output.finish == "refused" else (503, "engine_error")
                        raise ApiError(told[0], output.error or "the engine failed", told[1])
                    cached[output.id] = max(cached[output.id], output.cached_tokens)
                    self.cached_tokens = sum(cached.values())
                    count, text, logprobs, finish = open[choice].take(output)
                    self.completion_tokens += count
                    if finish is not None:
                        del open[choice]
                        metrics.ended(finish)
                    if text or logprobs or finish:
                        yield Piece(choice, text, logprobs, finish)
        except TimeoutError:
            outcome = "timeout"
            raise too_late(service.timeout) from None
        except TailorbirdError:
            outcome = "error"
            raise
        finally:
            for _ in open:
                metrics.ended(outcome)

    def usage(self) -> dict[str, Any]:
        """Numbers of tokens so far, in OpenAI's words."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


def best_pieces(pieces: Sequence[Piece], n: int, written: int) -> list[Piece]:
    """The pieces of the `n` best of each prompt's `written` continuations, the best first, numbered anew.

    Parameters
    ----------
    pieces : sequence of Piece
        With log-probabilities.
    n, written : int
    """
    of_choice: dict[int, list[Piece]] = {}
    for piece in pieces:
        of_choice.setdefault(piece.choice, []).append(piece)

    def mean(choice: int) -> float:
        values = [item.logprob for piece in of_choice[choice] for _, item in piece.logprobs]
        return sum(values) / len(values) if values else -math.inf

    found = []
    for prompt in range(len(of_choice) // written):
        ranked = sorted(range(prompt * written, (prompt + 1) * written), key=mean, reverse=True)
        for place, choice in enumerate(ranked[:n]):
            found += [replace(piece, choice=prompt * n + place) for piece in of_choice[choice]]
    return found


class _Continuation:
    """The text of one continuation, and the log-probabilities whose text is still held back."""

    def __init__(self, texts: Texts, stops: Sequence[str]) -> None:
        self._out = TextOut(texts, stops)
        self._waiting: list[tuple[int, TokenLogprob]] = []
        self._sent = 0

    def take(self, output: Output) -> tuple[int, str, tuple[tuple[int, TokenLogprob], ...], str | None]:
        """What an output adds: how many tokens, up to a stop string; text; the log-probabilities of tokens
        that begin in it; and the end."""
        count, text, finish = 0, "", output.finish
        for count, token in enumerate(output.tokens, 1):
            offset, piece = self._out.push(token)
            text += piece
            if output.logprobs:
                self._waiting.append((offset, output.logprobs[count - 1]))
            if self._out.stopped:
                break
        if finish is not None:
            text += self._out.finish()
        if self._out.stopped:
            finish = "stop"
        self._sent += len(text)
        whole = finish is not None and not self._out.stopped
        ready = [item for item in self._waiting if whole or item[0] < self._sent]
        self._waiting = self._waiting[len(ready) :]
        return count, text, tuple(ready), finish


def _room(prompt: int, max_tokens: int | None, context: int) -> int:
    """Tokens to write at most.

    Raises
    ------
    ApiError
        Prompt, or prompt and `max_tokens`, are longer than the context.
    """
    if prompt >= context or (max_tokens is not None and prompt + max_tokens > context):
        asked = "" if max_tokens is None else f" and max_tokens {max_tokens}"
        raise ApiError(
            400,
            f"a prompt of {prompt} tokens{asked}; the context is {context} tokens, both together",
            "context_length_exceeded",
            "max_tokens" if prompt < context else "messages",
        )
    return context - prompt if max_tokens is None else max_tokens
