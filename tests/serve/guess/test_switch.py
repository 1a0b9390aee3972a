"""Guessing that doesn't pay costs little, that which pays is used, and what changes is noticed."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence as Many
from dataclasses import dataclass

import pytest

from tailorbird.serve.guess.switch import LONGEST_PAUSE, PAUSE, PLAIN_RUN, SHARE, Switch

#: The share of steps that something else makes slow.
SPIKES = 0.003
#: Seconds of a step without guesses, by the number of sequences.
PLAIN = {4: 0.5, 5: 0.55, 6: 0.7, 7: 0.7}


@dataclass
class Way:
    """What a step of it takes, in steps without guesses, and the mean number of tokens for each sequence."""

    cost: float
    tokens: float

    @property
    def rate(self) -> float:
        return self.tokens / self.cost


class Simulated:
    """Steps whose times vary, some of which something else makes slow."""

    def __init__(self, ways: Many[Way], seed: int, noise: float = 0.1) -> None:
        self.ways, self.rng, self.noise = list(ways), random.Random(seed), noise
        self.switch = Switch(len(ways))
        self.seconds = self.unguessed = 0.0  # and what the same tokens would have taken without guesses
        self.used: list[int | None] = []

    def step(self) -> None:
        sequences, rng = self.rng.choice([4, 4, 4, 4, 5, 6, 7]), self.rng
        seconds = PLAIN[sequences] * rng.lognormvariate(0, self.noise) * (10 if rng.random() < SPIKES else 1)
        number = self.switch.way(sequences)
        self.used.append(number)
        if number is None:
            self.switch.plain(sequences, seconds)
            self.seconds += seconds
            self.unguessed += seconds
            return
        way = self.ways[number]
        more = sum(rng.random() < (way.tokens - 1) / 6 for _ in range(6 * sequences))
        written = sequences + more
        self.switch.guessed(sequences, 3, written, seconds * way.cost)
        self.seconds += seconds * way.cost
        self.unguessed += seconds * written / sequences

    def steps(self, count: int) -> list[int | None]:
        """Whose guesses these steps had."""
        for _ in range(count):
            self.step()
        return self.used[-count:]


@pytest.mark.parametrize("seed", range(40))
def test_ways_that_do_not_pay_cost_less_than_a_twentieth(seed: int) -> None:
    rng = random.Random(seed)
    ways = []
    for _ in range(rng.randrange(1, 5)):
        cost = rng.choice([rng.uniform(1.02, 1.2), rng.uniform(1.2, 4), rng.uniform(4, 30)])
        ways.append(Way(cost, max(1.0, min(6.0, cost * rng.uniform(0.2, 0.98)))))
    simulated = Simulated(ways, seed)
    simulated.steps(5000)
    assert simulated.seconds <= 1.05 * simulated.unguessed


@pytest.mark.parametrize("seed", range(40))
def test_where_guessing_pays_little_is_missed_of_the_best_way(seed: int) -> None:
    rng = random.Random(seed)
    ways = [Way(cost := rng.uniform(1.02, 3), cost * rng.uniform(0.4, 1.1)) for _ in range(rng.randrange(3))]
    cost = rng.uniform(1.1, 3)
    ways.insert(rng.randrange(len(ways) + 1), Way(cost, cost * rng.uniform(1.2, 2)))
    ways = [Way(way.cost, max(1.0, min(6.5, way.tokens))) for way in ways]
    simulated = Simulated(ways, seed)
    simulated.steps(5000)
    best = max(way.rate for way in ways)
    assert simulated.unguessed / simulated.seconds >= 0.9 * best


@pytest.mark.parametrize("seed", range(10))
def test_when_guesses_begin_to_pay_they_are_made_and_when_they_cease_to_they_are_not(seed: int) -> None:
    simulated = Simulated([Way(1.5, 1.1), Way(2.0, 1.2)], seed)
    assert simulated.steps(6000).count(None) > 5500
    simulated.ways[0] = Way(1.5, 2.5)
    simulated.steps(LONGEST_PAUSE + 500)  # it is tried again before then
    assert simulated.steps(500).count(0) > 450
    simulated.ways[0] = Way(1.5, 1.1)
    simulated.steps(100)
    assert simulated.steps(500).count(None) > 400


def test_pauses_between_trials_double() -> None:
    switch, begun = Switch(1), []
    for number in range(30_000):
        if switch.way(1) is None:
            switch.plain(1, 1.0)
            continue
        if switch.begins:
            begun.append(number)
        switch.guessed(1, 3, 1, 1.5)
    pauses = [later - sooner for sooner, later in itertools.pairwise(begun)]
    assert pauses[0] >= PAUSE
    assert all(later >= 1.5 * sooner for sooner, later in itertools.pairwise(pauses) if 300 < sooner < 4000)
    assert all(LONGEST_PAUSE <= pause < LONGEST_PAUSE + 50 for pause in pauses[-2:])


def test_a_trial_waits_until_what_others_lost_is_a_small_share() -> None:
    switch = Switch(2)

    def plain(count: int) -> int:
        """Steps until somebody guesses."""
        return next(number for number in range(count) if switch.way(1) is not None or switch.plain(1, 1.0))

    assert plain(99) == PLAIN_RUN
    switch.guessed(1, 3, 1, 4.0, ready=False)  # what is read first proves nothing, but was spent
    assert switch.trying
    while switch.trying:
        switch.guessed(1, 3, 1, 3.0)
    assert plain(999) >= (3.0 + 4.0) / SHARE - 30


def test_what_is_read_first_is_not_held_against_a_guesser() -> None:
    switch = Switch(1)
    while switch.way(1) is None:
        switch.plain(1, 1.0)
    for _ in range(5):
        switch.guessed(1, 0, 1, 20.0, ready=False)
    while switch.trying:
        switch.guessed(1, 3, 3, 1.5)
    assert switch.way(1) == 0
    for _ in range(400):
        if switch.way(1) is None:
            switch.plain(1, 1.0)
        else:
            switch.guessed(1, 3, 3, 1.5)
    assert switch.way(1) == 0


def test_nobody_guesses_for_a_number_of_sequences_of_which_nothing_is_known() -> None:
    simulated = Simulated([Way(1.0, 3.0)], 0)
    simulated.steps(500)
    assert simulated.switch.way(4) == 0
    assert simulated.switch.way(9) is None


@pytest.mark.parametrize("slow", [1.5, 3.0, 10.0])
def test_slow_steps_before_a_trial_do_not_deceive_for_long(slow: float) -> None:
    switch, seconds, unguessed = Switch(1), 0.0, 0.0
    for number in range(1500):
        plain = slow if number < PLAIN_RUN + 1 else 1.0
        if switch.way(1) is None:
            switch.plain(1, plain)
            seconds += plain
            unguessed += plain
            continue
        written = 2 if number % 5 == 0 else 1  # 1.2 in the mean
        switch.guessed(1, 3, written, 1.7 * plain)
        seconds += 1.7 * plain
        unguessed += written * plain
    assert seconds <= 1.05 * unguessed


def test_a_trial_has_lost_what_its_few_dear_steps_took() -> None:
    switch, seconds, guessed = Switch(3), 0.0, 0
    for _ in range(3000):
        if switch.way(1) is None:
            switch.plain(1, 1.0)
            seconds += 1
            continue
        guessed += 1
        cost = 1.0 if guessed % 3 else 3.5
        switch.guessed(1, 3, 1, cost)
        seconds += cost
    assert seconds <= 1.035 * 3000
