"""Guessed tokens that branch: alternatives for the same place, of which one at most is right.

Checking a tree in one step is SpecInfer's (https://arxiv.org/abs/2305.09781) and Medusa's
(https://arxiv.org/abs/2401.10774).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Guess:
    """What may follow a sequence: at most 63 tokens.

    Attributes
    ----------
    tokens : tuple of int
    parents : tuple of int
        Which of the guesses, all before it, each one follows; -1 is the sequence's last token. Empty where
        each follows the one before. A chain that stands first has its keys where they stay; what stands
        beside it costs attention more, and is moved where it was right.
    """

    tokens: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.tokens)

    def parent(self, node: int) -> int:
        """What guess `node` follows."""
        return self.parents[node] if self.parents else node - 1

    def children(self, node: int) -> list[int]:
        """Guesses that follow guess `node`, or the sequence's last token where it is -1; likeliest first."""
        if not self.parents:
            return [node + 1] if node + 1 < len(self.tokens) else []
        return [child for child, parent in enumerate(self.parents) if parent == node]

    def child(self, node: int, token: int) -> int | None:
        """The guess after `node` that is `token`."""
        return next((child for child in self.children(node) if self.tokens[child] == token), None)

    def first(self, count: int) -> Guess:
        """At most so many guesses, the first ones."""
        return self if count >= len(self) else Guess(self.tokens[:count], self.parents[:count])

    def depths(self) -> list[int]:
        """How many tokens after the sequence's last one each guess stands."""
        found: list[int] = []
        for node in range(len(self)):
            parent = self.parent(node)
            found.append(1 if parent < 0 else found[parent] + 1)
        return found

    def ancestors(self) -> list[int]:
        """For each guess, bits of the guesses that lead to it and its own."""
        found: list[int] = []
        for node in range(len(self)):
            parent = self.parent(node)
            found.append(1 << node | (0 if parent < 0 else found[parent]))
        return found


#: No guess.
NOTHING = Guess()


def comb(places: Sequence[Sequence[int]]) -> Guess:
    """A chain of the first token of each place, with the other tokens of each place beside it."""
    chain = [place[0] for place in places]
    beside = [(token, depth - 1) for depth, place in enumerate(places) for token in place[1:]]
    if not beside:
        return Guess(tuple(chain))
    return Guess(
        (*chain, *(token for token, _ in beside)),
        (*range(-1, len(chain) - 1), *(parent for _, parent in beside)),
    )
