"""Guessing place after place, for many sequences at once, from logits that something cheap gives.

What is guessed first for a place is what the sequence's own sampler chooses from these logits, with the
random number that it will choose with when the guess is checked: where both distributions are alike, so are
the tokens, at any temperature. The alternatives are the likeliest of the other tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tailorbird.serve.guess.tree import NOTHING, Guess, comb
from tailorbird.serve.sampling import Sampler, choose
from tailorbird.serve.sequence import Sequence as Text


def guess_places(
    texts: Sequence[Text],
    widths: Sequence[Sequence[int]],
    read: Callable[[list[int], list[int] | None], Tensor],
) -> list[Guess]:
    """Guesses for some sequences.

    Parameters
    ----------
    texts : sequence of Sequence
    widths : sequence of sequence of int
        For each, how many tokens are guessed for each place.
    read : callable
        Given numbers of sequences, and for each the first token of the place before, or None for the first
        place: logits ``[n, vocab_size]`` of what follows.
    """
    samplers = [text.sampler.copy(text.sampler.seed) for text in texts]
    places: list[list[list[int]]] = [[] for _ in texts]
    active = [number for number, width in enumerate(widths) if width]
    fed: list[int] | None = None
    while active:
        logits = fitting(read(active, fed), samplers[0].vocab_size)
        depth = len(places[active[0]])
        chosen = _choose(logits, [samplers[number] for number in active])
        most = max(widths[number][depth] for number in active)
        likeliest = logits.topk(min(most, logits.shape[-1])).indices.tolist() if most > 1 else None
        going_on, fed = [], []
        for row, (number, token) in enumerate(zip(active, chosen, strict=True)):
            if token is None:
                continue
            others = [] if likeliest is None else [other for other in likeliest[row] if other != token]
            places[number].append([token, *others[: widths[number][depth] - 1]])
            sampler = samplers[number]
            sampler.accept(token)
            if len(places[number]) < len(widths[number]) and not sampler.finished:
                going_on.append(number)
                fed.append(token)
        active = going_on
    return [comb(place) if place else NOTHING for place in places]


def _choose(logits: Tensor, samplers: list[Sampler]) -> list[int | None]:
    """A token for each row, or None where nothing may be chosen."""
    found = choose(logits, samplers, torch.get_num_threads())
    return [choice.token if choice.error is None else None for choice in found]


def fitting(logits: Tensor, vocab_size: int) -> Tensor:
    """Logits for a vocabulary padded otherwise: without those beyond it, −inf where there are none."""
    missing = vocab_size - logits.shape[-1]
    if missing <= 0:
        return logits[:, :vocab_size].contiguous()
    return torch.nn.functional.pad(logits, (0, missing), value=-torch.inf)
