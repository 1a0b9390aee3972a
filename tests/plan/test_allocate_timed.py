"""With seconds beside bytes, plans are the best of those that keep within both."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tailorbird.errors import BudgetError
from tailorbird.formats.packed import IntegerCoding
from tailorbird.plan.allocate import Option, PlaceOptions, allocate
from tailorbird.plan.allocate_timed import RELATIVE_GAP, allocate_timed

CODINGS = [IntegerCoding(bits, 64) for bits in (2, 3, 4, 8)]


def random_places(seed: int, count: int = 6, together: bool = False) -> list[PlaceOptions]:
    """Options whose bytes, losses and seconds have little to do with each other."""
    random = np.random.default_rng(seed)
    places = []
    for index in range(count):
        options = tuple(
            Option(
                coding, int(random.integers(10, 100)), float(random.random()), float(random.integers(1, 50))
            )
            for coding in CODINGS
        )
        places.append(PlaceOptions(f"p{index}", options, "both" if together and index < 2 else None))
    return places


def brute_force(places: list[PlaceOptions], size: int, seconds: float) -> float:
    """Least loss of all plans within both; infinite where there is none."""
    best = math.inf
    for plan in itertools.product(*(place.options for place in places)):
        bound = {p.together: o.coding for p, o in zip(places, plan, strict=True) if p.together}
        fits = sum(o.bytes for o in plan) <= size and sum(o.seconds for o in plan) <= seconds
        if fits and all(
            bound.get(p.together, o.coding) == o.coding for p, o in zip(places, plan, strict=True)
        ):
            best = min(best, math.fsum(o.loss for o in plan))
    return best


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), size=st.integers(100, 500), seconds=st.integers(20, 250))
def test_no_plan_within_both_is_better(seed: int, size: int, seconds: int) -> None:
    places = random_places(seed, together=seed % 2 == 0)
    try:
        plan = allocate_timed(places, size, seconds)
    except BudgetError:
        assert brute_force(places, size, math.inf) == math.inf
        return
    best = brute_force(places, size, seconds)
    assert plan.bytes <= size
    if best == math.inf:
        assert plan.seconds > seconds
    else:
        assert plan.seconds <= seconds
        assert plan.loss == pytest.approx(best, rel=RELATIVE_GAP, abs=1e-9)
        assert plan.loss * (1 - plan.gap) <= best + 1e-9


def test_a_plan_that_is_fast_enough_is_the_one_of_bytes_alone() -> None:
    places = random_places(1)
    assert allocate_timed(places, 300, 1e9) == allocate(places, 300)


def test_where_none_is_fast_enough_the_fastest_comes_back() -> None:
    places = random_places(2)
    least = sum(min(option.seconds for option in place.options) for place in places)
    assert allocate_timed(places, 10_000, least / 2).seconds == least


def test_many_places_are_planned_close_to_the_best() -> None:
    """200 places of a model: less time costs loss, never more than the bound says."""
    random = np.random.default_rng(0)
    places = []
    for index in range(200):
        weight = float(np.exp(random.normal()))
        options = tuple(
            Option(c, 1000 * c.bits, weight * 4.0**-c.bits, 1e-6 * (c.bits + random.random()))
            for c in CODINGS
        )
        places.append(PlaceOptions(f"p{index}", options))
    plans = [allocate_timed(places, 900_000, seconds) for seconds in (1.2e-3, 9e-4, 7e-4)]
    assert [plan.seconds for plan in plans] == sorted((plan.seconds for plan in plans), reverse=True)
    assert [plan.loss for plan in plans] == sorted(plan.loss for plan in plans)
    assert all(plan.gap <= 1e-3 for plan in plans)
