"""Allocation is exact, never over the capacity, and binds the places that belong together."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tailorbird.errors import BudgetError, SettingsError
from tailorbird.formats.packed import FloatCoding, IntegerCoding, stored_bytes
from tailorbird.plan.allocate import (
    RELATIVE_GAP,
    TIME_LIMIT,
    Option,
    PlaceOptions,
    allocate,
)

CODINGS = [IntegerCoding(b, g) for b in (2, 3, 4, 5, 6, 8) for g in (32, 64, 128)] + [FloatCoding()]


def brute_force(places, capacity):
    """Least loss over every combination that fits and gives one coding to each `together` group."""
    best = math.inf
    for combination in itertools.product(*(place.options for place in places)):
        if sum(option.bytes for option in combination) > capacity:
            continue
        codings: dict[str, set] = {}
        for place, option in zip(places, combination, strict=True):
            if place.together is not None:
                codings.setdefault(place.together, set()).add(option.coding)
        if all(len(found) == 1 for found in codings.values()):
            best = min(best, math.fsum(option.loss for option in combination))
    return best


def least_loss_by_bytes(places, capacity):
    """Dynamic programming over every single byte: the least loss of plans with at most `capacity` bytes."""
    best = np.zeros(capacity + 1)
    for place in places:
        following = np.full(capacity + 1, np.inf)
        for option in place.options:
            shifted = best[: capacity + 1 - option.bytes] + option.loss
            following[option.bytes :] = np.minimum(following[option.bytes :], shifted)
        best = following
    return best[capacity]


def model_places(seed, blocks=28, awkward=False):
    """Places of a 1.1 B-parameter Llama with losses that fall by four per bit, noisily."""
    random = np.random.default_rng(seed)
    shapes = [(2048, 2048), (512, 2048), (512, 2048), (2048, 2048), (5632, 2048), (5632, 2048), (2048, 5632)]
    named = [(f"{b}.{i}", shape) for b in range(blocks) for i, shape in enumerate(shapes)]
    places = []
    for name, (out, into) in [*named, ("embedding", (32000, 2048)), ("head", (32000, 2048))]:
        if awkward:
            out, into = out + int(random.integers(-50, 50)), into + int(random.integers(-50, 50))
        scale = np.exp(random.normal(0, 1.5)) * out * into
        options = []
        for coding in CODINGS:
            loss = 0.0
            if isinstance(coding, IntegerCoding):
                noise = np.exp(random.normal(0, 0.1))
                loss = (
                    scale * 2.0 ** (-2 * coding.bits) * (1 + 0.3 * math.log2(coding.group_size / 32)) * noise
                )
            options.append(Option(coding, stored_bytes(coding, out, into), 2.5e-9 * loss))
        places.append(PlaceOptions(name, tuple(options)))
    return places


def smallest_bytes(places):
    return sum(min(option.bytes for option in place.options) for place in places)


def between(places, fraction):
    """The capacity at a fraction of the way from the smallest to the largest plan."""
    least = smallest_bytes(places)
    most = sum(max(option.bytes for option in place.options) for place in places)
    return int(least + fraction * (most - least))


@st.composite
def small_instances(draw):
    magnitude = draw(st.sampled_from([1e-9, 1e-3, 1.0, 1e4]))
    step = draw(st.sampled_from([1, 7, 1024]))
    places = []
    for index in range(draw(st.integers(1, 5))):
        codings = draw(st.lists(st.sampled_from(CODINGS), min_size=1, max_size=4, unique=True))
        options = tuple(
            Option(coding, draw(st.integers(0, 300)) * step, draw(st.integers(0, 1000)) * magnitude)
            for coding in codings
        )
        places.append(PlaceOptions(f"place{index}", options, draw(st.sampled_from([None, None, "a", "b"]))))
    return places, draw(st.integers(0, 1200)) * step + draw(st.integers(0, step - 1))


@settings(max_examples=150, deadline=None)
@given(small_instances())
def test_equals_trying_every_combination(instance):
    places, capacity = instance
    expected = brute_force(places, capacity)
    if math.isinf(expected):
        with pytest.raises((BudgetError, SettingsError)):
            allocate(places, capacity)
        return
    plan = allocate(places, capacity)
    assert plan.bytes <= capacity
    assert plan.bytes == sum(option.bytes for option in plan.choices.values())
    assert plan.loss == math.fsum(option.loss for option in plan.choices.values())
    assert plan.loss <= expected * (1 + RELATIVE_GAP) + 1e-15
    assert plan.gap <= 2 * RELATIVE_GAP
    assert list(plan.choices) == [place.name for place in places]
    for place in places:
        assert plan.choices[place.name] in place.options


@pytest.mark.parametrize("seed", range(4))
def test_equals_dynamic_programming_on_more_places_than_can_be_tried(seed):
    random = np.random.default_rng(seed)
    places = [
        PlaceOptions(
            str(i),
            tuple(
                Option(coding, int(random.integers(1, 60)) + 10 * j, float(random.exponential() * 2.0**-j))
                for j, coding in enumerate(CODINGS[:6])
            ),
        )
        for i in range(30)
    ]
    for capacity in (between(places, 0.1), between(places, 0.5), between(places, 0.9)):
        expected = least_loss_by_bytes(places, capacity)
        assert allocate(places, capacity).loss == pytest.approx(expected, rel=RELATIVE_GAP)


@pytest.mark.parametrize("awkward", [False, True])
@pytest.mark.parametrize("fraction", [0.02, 0.2, 0.5])
def test_a_real_model_is_planned_in_time_and_the_budget_is_used(awkward, fraction):
    places = model_places(int(100 * fraction), awkward=awkward)
    capacity = between(places, fraction)
    start = time.process_time()
    plan = allocate(places, capacity)
    assert time.process_time() - start < TIME_LIMIT + 1
    assert 0.985 * capacity <= plan.bytes <= capacity
    assert plan.gap < 5e-3


def test_more_capacity_never_loses_more():
    places = model_places(5, blocks=3)
    capacities = [between(places, fraction) for fraction in np.linspace(0, 1.05, 22)]
    losses = [allocate(places, capacity).loss for capacity in capacities]
    assert all(b <= a * (1 + RELATIVE_GAP) for a, b in itertools.pairwise(losses))
    assert losses[0] > losses[-1] == 0.0


def test_the_plan_beats_every_uniform_one_of_its_size():
    places = model_places(6, blocks=4)
    for label in ("int2 g64", "int3 g128", "int4 g64", "int8 g32"):
        same = [option for place in places for option in place.options if option.coding.label == label]
        assert len(same) == len(places)
        plan = allocate(places, sum(option.bytes for option in same))
        assert plan.bytes <= sum(option.bytes for option in same)
        assert plan.loss < sum(option.loss for option in same)


def test_places_together_take_one_coding_and_pay_for_it():
    places = model_places(7, blocks=3)
    bound = [PlaceOptions(p.name, p.options, p.name.split(".")[0]) for p in places]
    capacity = between(places, 0.15)
    free, tied = allocate(places, capacity), allocate(bound, capacity)
    for block in "012":
        assert len({option.coding for name, option in tied.choices.items() if name[0] == block}) == 1
    assert any(len({free.choices[f"{b}.{i}"].coding for i in range(7)}) > 1 for b in range(3))
    assert free.loss <= tied.loss
    assert tied.bytes <= capacity


def test_a_group_without_a_common_coding_is_named():
    places = [
        PlaceOptions("q", (Option(CODINGS[0], 1, 1.0),), "qkv"),
        PlaceOptions("k", (Option(CODINGS[1], 1, 1.0),), "qkv"),
    ]
    with pytest.raises(SettingsError, match="`q`, `k`"):
        allocate(places, 10)


def test_the_smallest_plan_is_the_last_that_fits():
    places = model_places(8, blocks=2)
    least = smallest_bytes(places)
    assert allocate(places, least).bytes == least
    with pytest.raises(BudgetError, match=f"at least {least} bytes"):
        allocate(places, least - 1)


def test_bytes_that_buy_nothing_are_not_spent():
    useless = Option(CODINGS[5], 100, 1.0)
    place = PlaceOptions("a", (Option(CODINGS[0], 10, 1.0), useless, Option(CODINGS[6], 1000, 2.0)))
    assert allocate([place], 5000).bytes == 10


def test_standard_output_stays_clean(capfd):
    for seed in range(3):
        places = model_places(seed, blocks=8, awkward=True)
        allocate(places, between(places, 0.35))
    assert capfd.readouterr().out == ""
    print("still there", flush=True)
    assert "still there" in capfd.readouterr().out


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_losses_that_are_not_numbers_are_refused(loss):
    with pytest.raises(ValueError, match="finite"):
        allocate([PlaceOptions("a", (Option(CODINGS[0], 1, loss),))], 10)
