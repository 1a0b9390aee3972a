"""Who guesses: those whose guesses pay, by a clock that the tests hold in their hands."""

from __future__ import annotations

from collections.abc import Sequence as Many

import pytest
from torch import Tensor

from guessed import guess_always
from tailorbird.serve.guess.guessing import Guessing
from tailorbird.serve.guess.tree import Guess
from tailorbird.serve.request import Request
from tailorbird.serve.sequence import Sequence


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Steady:
    """Guesses one token for ever, right or wrong, in a time that is known."""

    ranks, wants_hidden, caught_up = 1, False, True

    def __init__(self, name: str, clock: Clock, right: bool, seconds: float) -> None:
        self.name, self.clock, self.right, self.seconds = name, clock, right, seconds
        self.asked = 0

    def guess(self, sequences: Many[Sequence], widths: Many[Many[int]]) -> list[Guess]:
        """See `Guesser`."""
        self.asked += 1
        self.clock.now += self.seconds * max(map(len, widths))
        return [Guess((1 if self.right else 2,) * len(width)) for width in widths]

    def saw(self, sequence: Sequence, hidden: Tensor) -> None:
        """See `Guesser`."""

    def forget(self, sequence: Sequence) -> None:
        """See `Guesser`."""


def text(arrival: int) -> Sequence:
    """One in which nothing is found: no two of its tokens are alike."""
    return Sequence(Request(str(arrival), (5,), 9), 0, arrival, None, None, b"", list(range(100, 110)))


def step(guessing: Guessing, clock: Clock, texts: list[Sequence], per_token: float) -> int:
    """How many tokens texts write that always write token 1; a step takes 1 s, and so much for each token."""
    guessing.begin()
    guesses = guessing.guess(texts, 100, lambda _: 50)
    tokens, written = sum(1 + len(guesses.get(one, Guess())) for one in texts), 0
    clock.now += 1 + per_token * tokens
    for one in texts:
        guess = guesses.get(one, Guess())
        right = len(guess) if all(token == 1 for token in guess.tokens) else 0
        guessing.checked(one, guess, [1] * (right + 1))
        written += right + 1
    guessing.wrote(len(texts), tokens, written)
    return written


def steps(
    guessers: list[tuple[str, bool, float]], per_token: float, count: int = 1000
) -> tuple[Guessing, list[Steady], int, float]:
    """Two sequences; also what they wrote and what it took, in steps without guesses."""
    clock = Clock()
    made = [Steady(name, clock, right, seconds) for name, right, seconds in guessers]
    guessing, texts = Guessing(made, clock), [text(0), text(1)]
    written = sum(step(guessing, clock, texts, per_token) for _ in range(count))
    return guessing, made, written, clock.now / (1 + 2 * per_token)


def test_a_guesser_that_is_right_and_quick_is_asked_nearly_always() -> None:
    guessing, (good,), written, _ = steps([("good", True, 0.01)], 0.01)
    assert good.asked > 800
    assert written > 4 * 2000
    stats = guessing.stats()
    assert stats["accepted_tokens"] == stats["drafted_tokens/good"] == stats["drafted_tokens"] > 0


@pytest.mark.parametrize(
    ("right", "seconds", "per_token"),
    [(False, 0.1, 0.1), (True, 2.0, 0.1), (True, 3.0, 9.0), (False, 9.0, 1)],
)
def test_one_that_is_wrong_or_slow_is_seldom_asked(right: bool, seconds: float, per_token: float) -> None:
    _, (bad,), written, took = steps([("bad", right, seconds)], per_token, 4000)
    assert 0 < bad.asked < 100  # now and then, since things may change
    assert took < 1.05 * written / 2


def test_of_several_the_one_that_pays_is_asked() -> None:
    _, made, _, _ = steps([("slow", True, 0.5), ("wrong", False, 0.01), ("good", True, 0.05)], 0.01)
    slow, wrong, good = (guesser.asked for guesser in made)
    assert good > 600
    assert slow < 200
    assert wrong < 100


def test_one_that_begins_to_be_right_is_asked_again() -> None:
    clock = Clock()
    guesser = Steady("late", clock, False, 0.05)
    guessing, texts = Guessing([guesser], clock), [text(0), text(1)]
    for _ in range(1500):
        step(guessing, clock, texts, 0.05)
    before = guesser.asked
    guesser.right = True
    for _ in range(3000):
        step(guessing, clock, texts, 0.05)
    assert before < 100
    assert guesser.asked > 1000


def test_where_nobody_guesses_nothing_is_looked_up_or_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    monkeypatch.setattr("tailorbird.serve.guess.lookup.Past.lookup", lambda *_: looked.append(1) or [])
    clock = Clock()
    hidden = Steady("heads", clock, False, 0.2)
    hidden.wants_hidden = True
    guessing, texts, wanted = Guessing([hidden], clock), [text(0), text(1)], 0
    for _ in range(2000):
        step(guessing, clock, texts, 0.2)
        wanted += guessing.wants_hidden
    assert looked
    assert wanted
    looked.clear()
    wanted = 0
    for _ in range(4000):
        step(guessing, clock, texts, 0.2)
        wanted += guessing.wants_hidden
    assert len(looked) < 0.1 * 2 * 4000  # of every two texts, where there is a trial
    assert wanted < 0.05 * 4000


def test_a_trial_waits_while_prompts_are_read() -> None:
    clock = Clock()
    guesser = Steady("good", clock, True, 0.01)
    guessing, texts = Guessing([guesser], clock), [text(0)]
    while not guesser.asked:
        step(guessing, clock, texts, 0.01)
    for _ in range(100):
        guessing.begin()
        guessing.guess(texts, 100, lambda _: 50)
        guessing.read()
    assert guesser.asked <= 2
    step(guessing, clock, texts, 0.01)
    step(guessing, clock, texts, 0.01)
    assert guesser.asked > 2


def test_what_the_text_itself_gives_is_used_where_it_is_right() -> None:
    clock = Clock()
    guessing = Guessing(clock=clock)
    repeated = text(0)
    repeated.tokens = [1] * 20
    written = sum(step(guessing, clock, [repeated], 0.01) for _ in range(100))
    stats = guessing.stats()
    assert stats["accepted_tokens/lookup"] == stats["drafted_tokens"] == written - 100 > 80
    guessing.forget(repeated)
    assert not guessing._records["lookup"].of
    assert not guessing._pasts


def test_no_more_is_guessed_than_may_be_written_or_read() -> None:
    clock = Clock()
    guessing, texts = Guessing([Steady("good", clock, True, 0.0)]), [text(number) for number in range(3)]
    guess_always(guessing)
    made = 0
    for most, left in ((0, 9), (2, 9), (9, 1), (9, 2), (9, 3), (1000, 1000)) * 2:
        guesses = guessing.guess(texts, most, lambda _, left=left: left)
        assert sum(map(len, guesses.values())) <= most
        assert all(len(guess) < left for guess in guesses.values())
        made += len(guesses)
    assert made
