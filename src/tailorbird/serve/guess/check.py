"""Choosing tokens along guesses: for as long as what is chosen was guessed, the next one can be chosen too.

Each token is chosen from the logits after the tokens before it, as without guesses, so it is the same token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tailorbird.serve.guess.tree import NOTHING, Guess
from tailorbird.serve.sampling import Choice, Sampler, choose


@dataclass(eq=False)
class Walk:
    """One sequence's way along its guesses.

    Attributes
    ----------
    rows : Tensor[1 + guesses, vocab_size]
        Logits after its last token and after each guess.
    guess : Guess
    path : list of int
        Guesses that were right, in order.
    choices : list of Choice
        One more than `path`; the last one may be an error.
    """

    rows: Tensor
    sampler: Sampler
    guess: Guess = NOTHING
    path: list[int] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)

    @property
    def row(self) -> int:
        """Of `rows`, from which the next or the last token is chosen."""
        return self.path[-1] + 1 if self.path else 0


def choose_along(walks: Sequence[Walk], ends: Sequence[Callable[[int, int], bool]]) -> None:
    """Choose tokens for all, one more for each guess that turns out right; samplers accept them.

    Parameters
    ----------
    walks : sequence of Walk
    ends : sequence of callable
        For each: whether nothing may follow its n-th choice, counted from 1, which is such a token.
    """
    choosing = list(zip(walks, ends, strict=True))
    while choosing:
        chosen = choose(
            [walk.rows[walk.row] for walk, _ in choosing],
            [walk.sampler for walk, _ in choosing],
            torch.get_num_threads(),
        )
        going_on = []
        for (walk, is_end), choice in zip(choosing, chosen, strict=True):
            walk.choices.append(choice)
            if choice.error is not None:
                continue
            walk.sampler.accept(choice.token)
            node = walk.guess.child(walk.path[-1] if walk.path else -1, choice.token)
            if node is not None and not is_end(len(walk.choices), choice.token):
                walk.path.append(node)
                going_on.append((walk, is_end))
        choosing = going_on
