"""What is chosen for a memory budget: the first way that fits, and a line about all that came before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from tailorbird.adapt import room
from tailorbird.adapt.probe import Cost
from tailorbird.adapt.room import Room, find_room
from tailorbird.adapt.rows import Row
from tailorbird.errors import BudgetError
from tuning import examples

MIB = 1 << 20
FIXED, KEPT, AGAIN, STATES, BLOCKS = 100 * MIB, MIB, MIB // 4, 20 * MIB, 8
WORST = [Row.of(examples((600,), 100))]

Way = tuple[int, int]


def taken(way: Way, row: int) -> int:
    """Bytes of a pass of `row` tokens read in this way: they grow with tokens, less where computed again."""
    tokens, recomputed = way
    share = recomputed / BLOCKS
    return FIXED + int(((1 - share) * KEPT + share * AGAIN) * min(tokens, row))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[Way, int]:
    """In place of passes: what they would take, and bytes more than that for the ways in here."""
    more: dict[Way, int] = {}

    def measure(way: Any, rows: Sequence[Row]) -> Cost:
        longest = max(map(len, rows))
        peak = taken(way, longest) + more.get(way, 0)
        return Cost(longest, 1.0, peak - FIXED, peak)

    monkeypatch.setattr(room, "measure", measure)
    return more


def found(memory: int | None, **changed: Any) -> Room:
    given: dict[str, Any] = {"blocks": BLOCKS, "tokens": 4000, "chunks": True, "states": STATES}

    def step_of(tokens: int, recomputed: int) -> Any:
        return tokens, recomputed

    return find_room(step_of, WORST, memory=memory, **{**given, **changed})


def total(way: Way) -> int:
    return taken(way, max(way[0], 600)) + STATES


def test_without_a_budget_nothing_is_tried(measured: dict[Way, int]) -> None:
    chosen = found(None)
    assert (chosen.pass_tokens, chosen.recomputed) == (2048, 0)
    assert chosen.refused == ()
    assert chosen.why == []


@pytest.mark.parametrize("memory", [4000, 2168, 1500, 700, 500, 400, 300, 250, 190, 160, 150, 130])
def test_the_cheapest_way_that_fits_is_chosen_and_the_others_are_told(
    memory: int, measured: dict[Way, int]
) -> None:
    ways = [(size, quarter * 2) for quarter in range(5) for size in (2048, 1024, 512, 256)]
    ways += [(size, BLOCKS) for size in (128, 64, 32)]
    fitting = [way for way in ways if total(way) <= memory * MIB]
    chosen = found(memory * MIB)
    assert (chosen.pass_tokens, chosen.recomputed) == fitting[0]
    assert chosen.bytes == total(fitting[0])
    before = ways[: ways.index(fitting[0])]
    assert [(one.pass_tokens, one.recomputed) for one in chosen.refused] == before
    assert all(
        one.bytes == pytest.approx(total(way)) for one, way in zip(chosen.refused, before, strict=True)
    )
    *lines, last = chosen.why
    tokens, recomputed = fitting[0]
    assert last.startswith(f"chosen: {tokens:,} tokens at a time, {room._kept(recomputed)}, which takes ")
    assert len(lines) == len({recomputed for _, recomputed in before})
    told = "\n".join(lines)
    for one in chosen.refused:
        assert f"{room.format_size(one.bytes)} for {one.pass_tokens:,} tokens at a time" in told
    assert told.count("tokens at a time") == len(before)


def test_what_takes_more_than_foreseen_is_told_as_measured(measured: dict[Way, int]) -> None:
    memory = total((1024, 0))
    measured[1024, 0] = 7 * MIB
    chosen = found(memory)
    assert (chosen.pass_tokens, chosen.recomputed) == (512, 0)
    assert [(one.pass_tokens, one.measured) for one in chosen.refused] == [(2048, False), (1024, True)]
    assert chosen.why == [
        "no block computed again, more than 1.12 GiB: 2.12 GiB for 2,048 tokens at a time, "
        "1.12 GiB for 1,024 tokens at a time (measured)",
        "chosen: 512 tokens at a time, no block computed again, "
        "which takes 632.00 MiB of 1.12 GiB (measured)",
    ]


def test_where_nothing_fits_the_least_that_was_seen_is_told(measured: dict[Way, int]) -> None:
    least = (32, BLOCKS)
    measured[least] = MIB
    with pytest.raises(BudgetError, match=r"but tuning takes 129\.00 MiB at least"):
        found(total(least))
    with pytest.raises(BudgetError, match=r"but tuning takes 128\.00 MiB at least"):
        found(100 * MIB)


def test_a_step_that_is_one_pass_is_only_computed_again(measured: dict[Way, int]) -> None:
    chosen = found(total((4000, 4)), one_pass=True)
    assert (chosen.pass_tokens, chosen.recomputed) == (4000, 4)
    assert [(one.pass_tokens, one.recomputed) for one in chosen.refused] == [(4000, 0), (4000, 2)]


def test_what_cannot_be_read_in_chunks_is_read_whole(measured: dict[Way, int]) -> None:
    with pytest.raises(BudgetError, match=r"at least"):
        found(total((256, BLOCKS)), chunks=False)
    chosen = found(total((1024, BLOCKS)), chunks=False)
    assert (chosen.pass_tokens, chosen.recomputed) == (1024, BLOCKS)
