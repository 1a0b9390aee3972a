"""How many guesses pay: those with which tokens per second are expected to be most.

A guess is worth the chance that it is right together with all that lead to it. Taking the most valuable ones
until the rate falls is Sequoia's and EAGLE-2's way to a tree (https://arxiv.org/abs/2402.12374,
https://arxiv.org/abs/2406.16858), here over all sequences of a step and with times that were measured.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

#: Places after a text for which tokens are guessed.
MOST_PLACES = 6


class Candidate(NamedTuple):
    """A guess that might be made: `value` is the chance that it is right; `place` counts from 1."""

    value: float
    owner: int
    place: int
    rank: int


@dataclass(frozen=True)
class Worth:
    """The guesses that pay.

    Attributes
    ----------
    rate : float
        Tokens per second that are expected with them.
    widths : list of list of int
        For each owner, how many tokens are guessed for each place.
    """

    rate: float
    widths: list[list[int]]


def candidates(owner: int, chances: Sequence[float], places: int) -> list[Candidate]:
    """What may be guessed for one sequence, whose places have tokens with these falling chances."""
    found, reached = [], 1.0
    for place in range(1, min(places, MOST_PLACES) + 1):
        found += [Candidate(reached * chance, owner, place, rank) for rank, chance in enumerate(chances)]
        reached *= chances[0]
    return found


def weigh(
    possible: Sequence[Candidate],
    owners: int,
    most: int,
    seconds: Callable[[int], float],
    drafted: Collection[int] = (),
    place_seconds: float = 0.0,
) -> Worth:
    """The guesses, at most `most`, that let `owners` sequences write most tokens per second.

    Parameters
    ----------
    possible : sequence of Candidate
    owners, most : int
    seconds : callable
        What a step of so many tokens takes.
    drafted : collection of int
        Owners whose guesses take time to make.
    place_seconds : float
        How much, for one more place of all of these.
    """
    ordered = sorted(possible, key=lambda one: (-one.value, one.place, one.rank))[:most]
    best, count, expected, deepest = owners / max(seconds(owners), 1e-9), 0, float(owners), 0
    for number, one in enumerate(ordered, 1):
        expected += one.value
        if one.owner in drafted:
            deepest = max(deepest, one.place)
        rate = expected / max(seconds(owners + number) + deepest * place_seconds, 1e-9)
        if rate > best:
            best, count = rate, number
    widths: list[list[int]] = [[] for _ in range(owners)]
    for one in ordered[:count]:
        row = widths[one.owner]
        if len(row) < one.place:
            row.append(0)
        row[one.place - 1] += 1
    return Worth(best, widths)
