"""How well an adapter foresees text that it wasn't trained on, measured window by window between steps.

The loss is the mean negative log-likelihood per token, in nats. Tokens of a prompt are read and not counted.
A text lies in pages of the engine's own pool while it is measured, and is read as requests are: a token, and
the tokens after it as guesses, whose logits a runner gives back.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from tailorbird.serve.adapters.activation import first_adapted
from tailorbird.serve.adapters.beginnings import Beginning
from tailorbird.serve.adapters.store import Handle
from tailorbird.serve.page_pool import PagePool
from tailorbird.serve.request import Request
from tailorbird.serve.runner import Runner
from tailorbird.serve.scheduler import Piece
from tailorbird.serve.sequence import Sequence as Text
from tailorbird.serve.sequence import placeholders

#: Most tokens that are read at once, so that those who wait for the next step don't wait for long.
WINDOW = 64


@dataclass(frozen=True)
class Example:
    """A text, of which the tokens from `first` on are counted; `first` is at least 1.

    Parameters
    ----------
    tokens : tuple of int
        At least ``first + 1``.
    first : int
    """

    tokens: tuple[int, ...]
    first: int = 1


def pieces(example: Example, most: int) -> list[Example]:
    """A text in pieces of at most so many tokens if it is longer and all of it is counted; else as it is."""
    if len(example.tokens) <= most or example.first > 1:
        return [example]
    found = [example.tokens[start : start + most] for start in range(0, len(example.tokens), most)]
    return [Example(piece) for piece in found if len(piece) > 1]


def mean_loss(
    examples: Sequence[Example], runner: Runner, pool: PagePool, handle: Handle
) -> Generator[None, None, float]:
    """Mean negative log-likelihood of all tokens that are counted, in nats.

    Parameters
    ----------
    examples : sequence of Example
        At least one, each no longer than the pool, with the places of the adapter.
    runner : Runner
        One that reads guesses.
    pool : PagePool
    handle : Handle
        The adapter.

    Yields
    ------
    None
        After each window, and while running requests have the pages that the next text needs.
    """
    total, count = 0.0, 0
    for example in examples:
        needed = -(-(handle.places + len(example.tokens)) // runner.page_tokens)
        while (pages := pool.take(needed)) is None:
            yield
        text = _text(example, handle, pages)
        if isinstance(handle.adapter, Beginning):
            runner.begin(handle.adapter, pages)
        try:
            for start, stop in windows(len(example.tokens), example.first):
                rows = _read(runner, text, example.tokens, start, stop, counted=start + 1 >= example.first)
                if rows is not None:
                    total += negative_log_likelihood(rows, example.tokens[start + 1 : stop + 1])
                yield
        finally:
            runner.forget(text)
            pool.release(pages)
        count += len(example.tokens) - example.first
    return total / count


def windows(length: int, first: int) -> list[tuple[int, int]]:
    """Windows ``[start, stop)`` of at most `WINDOW` tokens; none has tokens before and from ``first - 1`` on.

    The last token of a text isn't read: nothing is foretold from it.
    """
    edges = [*range(0, first - 1, WINDOW), *range(first - 1, length - 1, WINDOW), length - 1]
    return [(start, stop) for start, stop in pairwise(edges) if start < stop]


def negative_log_likelihood(rows: Tensor, tokens: Sequence[int]) -> float:
    """Sum over tokens, in nats, summed in float64.

    Parameters
    ----------
    rows : Tensor[tokens, vocab_size], float32
        Logits.
    tokens : sequence of int
        Those that came.
    """
    chosen = rows.gather(1, torch.tensor(tokens, device=rows.device)[:, None])[:, 0]
    return float((rows.logsumexp(1) - chosen).double().sum())


def _text(example: Example, handle: Handle, pages: list[int]) -> Text:
    """An example as a sequence that a runner reads; no tokens are chosen for it."""
    request, start = Request("held-out", example.tokens), first_adapted(example.tokens, handle.invocation)
    adapter = None if start is None else handle
    return Text(
        request,
        0,
        0,
        sampler=None,
        adapter=adapter,
        salt=b"",
        tokens=[],
        pages=pages,
        adapted_from=start or 0,
        begun=handle.places,
    )


def _read(
    runner: Runner, text: Text, tokens: Sequence[int], start: int, stop: int, counted: bool
) -> Tensor | None:
    """Read tokens `start` to ``stop - 1``; logits after each of them, where they are counted."""
    before = placeholders(text.begun)
    first = text.begun + start
    if not counted:
        text.tokens = [*before, *tokens]
        runner.step([Piece(text, first, stop - start)])
        return None
    text.tokens = [*before, *tokens[: start + 1]]
    return runner.step([Piece(text, first, 1, tuple(tokens[start + 1 : stop]))])[0]
