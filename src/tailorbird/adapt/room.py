"""How much goes through the model at a time, and which blocks are computed again, so that a budget is met.

What costs least time comes first: smaller passes down to a size at which products are still efficient, then
blocks that are computed again (a third more work at most), then passes shorter than an example, which is read
chunk by chunk. How memory grows with the tokens of a pass is measured on short passes, with and without
blocks computed again; what is chosen is run on the longest examples, and on the row that takes most of
attention's memory, before the first step. Every way that was looked at on the way there is kept with what it
takes, so that a user is told why this one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tailorbird.adapt.probe import Cost, measure, worst_row
from tailorbird.adapt.rows import Row
from tailorbird.adapt.step import Step
from tailorbird.errors import BudgetError
from tailorbird.plan.budget import format_size

#: Tokens of a pass that are worth no more memory, and below which products lose efficiency.
MOST, EFFICIENT = 2048, 256
#: Tokens of the shortest pass, and of those on which memory is measured.
LEAST = 32
SHORT, LONGER = 128, 384


@dataclass(frozen=True)
class Trial:
    """A way to read a step, and what it takes.

    Attributes
    ----------
    pass_tokens, recomputed : int
        As of `Room`.
    bytes : int
        Of the process once tuning is under way.
    measured : bool
        Whether the worst pass was run; else the bytes are foreseen from short ones.
    """

    pass_tokens: int
    recomputed: int
    bytes: int
    measured: bool


@dataclass(frozen=True)
class Room:
    """What was chosen.

    Attributes
    ----------
    pass_tokens : int
        Of a pass, or of a chunk of a longer example.
    recomputed : int
        Blocks that are computed again, the first ones.
    cost : Cost
        Of the longest pass.
    memory : int or None
        The budget; None where there is none.
    refused : tuple of Trial
        Ways that cost less time and didn't fit, in the order in which they were looked at.
    bytes : int
        Of the process once tuning is under way this way; 0 without a budget, where nobody asks.
    """

    pass_tokens: int
    recomputed: int
    cost: Cost
    memory: int | None = None
    refused: tuple[Trial, ...] = ()
    bytes: int = 0

    @property
    def why(self) -> list[str]:
        """What was tried, what it would take, and the choice: a line for each count of blocks, and one."""
        if self.memory is None:
            return []
        most = format_size(self.memory)
        lines = [
            f"{_kept(recomputed)}, more than {most}: "
            + ", ".join(
                f"{format_size(one.bytes)} for {one.pass_tokens:,} tokens at a time"
                + (" (measured)" if one.measured else "")
                for one in trials
            )
            for recomputed, trials in itertools.groupby(self.refused, key=lambda one: one.recomputed)
        ]
        chosen = f"{self.pass_tokens:,} tokens at a time, {_kept(self.recomputed)}"
        return [*lines, f"chosen: {chosen}, which takes {format_size(self.bytes)} of {most} (measured)"]


def find_room(
    step_of: Callable[[int, int], Step],
    worst: Sequence[Row],
    blocks: int,
    tokens: int,
    chunks: bool,
    memory: int | None,
    states: int,
    one_pass: bool = False,
) -> Room:
    """The cheapest way in which the worst pass of a step fits.

    Parameters
    ----------
    step_of : callable
        A step with so many tokens in a pass, and so many blocks computed again.
    worst : sequence of Row
        Those that take most memory, each in its own way; the first holds the longest example.
    blocks : int
        Of the model, that may be computed again.
    tokens : int
        Of a whole step at most.
    chunks : bool
        Whether an example may be read chunk by chunk.
    memory : int or None
        Most resident bytes; None takes what is best for speed.
    states : int
        Bytes that come on top once tuning is under way: the optimizer's states, and copies of the best.
    one_pass : bool
        Whether all tokens of a step have to be in one pass.

    Raises
    ------
    BudgetError
        Nothing fits.
    """
    longest = max(map(len, worst))
    most = max(tokens, longest)
    if not one_pass:
        most = min(MOST, most)
    if memory is None:
        cost = measure(step_of(most, 0), [worst_row(row, most) for row in worst])
        return Room(most, 0, cost)
    kept = again = _growth(step_of, worst, 0)
    if blocks:
        again = _growth(step_of, worst, blocks)
    least = LEAST if chunks else longest
    if one_pass:
        least = most
    refused: list[Trial] = []
    for pass_tokens, recomputed in _ways(most, least, blocks):
        share = recomputed / blocks if blocks else 0.0
        expected = sum(
            part * (fixed + slope * pass_tokens)
            for part, (fixed, slope) in ((1 - share, kept), (share, again))
        )
        needed, fits = int(expected) + states, expected + states <= memory * 1.02
        if fits:
            rows = [worst_row(row, max(pass_tokens, longest)) for row in worst]
            cost = measure(step_of(pass_tokens, recomputed), rows)
            needed = cost.peak_bytes + states
            if needed <= memory:
                return Room(pass_tokens, recomputed, cost, memory, tuple(refused), needed)
        refused.append(Trial(pass_tokens, recomputed, needed, measured=fits))
    fixed, slope = again
    measured = [one.bytes for one in refused if one.measured]
    needed = min(measured, default=int(fixed + slope * least) + states)
    raise BudgetError(
        f"{format_size(memory)} of memory, but tuning takes {format_size(needed)} at least",
        f"{format_size(needed)} or more",
        "set --memory higher, choose a method that learns less, or fit the model to fewer bits first",
    )


def _kept(recomputed: int) -> str:
    """How blocks are computed, in words."""
    if not recomputed:
        return "no block computed again"
    return f"{recomputed} block{'s' if recomputed > 1 else ''} computed again"


def _ways(most: int, least: int, blocks: int) -> Iterator[tuple[int, int]]:
    """Tokens of a pass and blocks computed again, those that cost less time first."""
    sizes = [most]
    while sizes[-1] // 2 >= least:
        sizes.append(sizes[-1] // 2)
    efficient = [size for size in sizes if size >= EFFICIENT] or sizes[:1]
    for size in efficient:
        yield size, 0
    for quarters in (1, 2, 3, 4) if blocks else ():
        for size in efficient:
            yield size, -(-blocks * quarters // 4)
    for size in sizes:
        if size not in efficient:
            yield size, blocks


def _growth(
    step_of: Callable[[int, int], Step], worst: Sequence[Row], recomputed: int
) -> tuple[float, float]:
    """Bytes of the process at a pass of no tokens, and those that each adds."""
    short, longer = (
        measure(step_of(tokens, recomputed), [worst_row(row, tokens) for row in worst])
        for tokens in (SHORT, LONGER)
    )
    slope = max(0.0, (longer.peak_bytes - short.peak_bytes) / (longer.tokens - short.tokens))
    return short.peak_bytes - slope * short.tokens, slope
