"""Who guesses: those whose guesses pay, by a clock that the tests hold in their hands."""

from __future__ import annotations

from collections.abc import Sequence as Many

import pytest
from torch import Tensor

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


def steps(
    monkeypatch: pytest.MonkeyPatch,
    guessers: list[tuple[str, bool, float]],
    per_token: float,
    count: int = 400,
) -> tuple[Guessing, list[Steady], int]:
    """Two sequences that always write token 1; a step takes 1 s and so much for each token more."""
    clock = Clock()
    monkeypatch.setattr("tailorbird.serve.guess.guessing.time.perf_counter", clock)
    made = [Steady(name, clock, right, seconds) for name, right, seconds in guessers]
    guessing, written, texts = Guessing(made), 0, [text(0), text(1)]
    for _ in range(count):
        guesses = guessing.guess(texts, 100, lambda _: 50)
        tokens = sum(1 + len(guesses.get(one, Guess())) for one in texts)
        guessing.pace.record(tokens, 1 + per_token * tokens)
        for one in texts:
            guess = guesses.get(one, Guess())
            right = len(guess) if all(token == 1 for token in guess.tokens) else 0
            guessing.checked(one, guess, [1] * (right + 1))
            written += right + 1
    return guessing, made, written


def test_a_guesser_that_is_right_and_quick_is_asked_nearly_always(monkeypatch: pytest.MonkeyPatch) -> None:
    guessing, (good,), written = steps(monkeypatch, [("good", True, 0.01)], 0.01)
    assert good.asked > 380
    assert written > 4 * 800
    stats = guessing.stats()
    assert stats["accepted_tokens"] == stats["drafted_tokens/good"] == stats["drafted_tokens"] > 0


@pytest.mark.parametrize(
    ("right", "seconds", "per_token"), [(False, 0.1, 0.1), (True, 2.0, 0.1), (True, 3.0, 9.0)]
)
def test_one_that_is_wrong_or_slow_is_seldom_asked(
    right: bool, seconds: float, per_token: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, (bad,), _ = steps(monkeypatch, [("bad", right, seconds)], per_token)
    assert 0 < bad.asked < 40  # now and then, since things may change


def test_of_several_the_one_that_pays_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    _, made, _ = steps(
        monkeypatch, [("slow", True, 0.5), ("wrong", False, 0.01), ("good", True, 0.05)], 0.01
    )  # fmt: skip
    slow, wrong, good = (guesser.asked for guesser in made)
    assert good > 300
    assert slow < 40
    assert wrong < 40


def test_what_the_text_itself_gives_is_preferred_where_it_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    guessing = Guessing()
    repeated = text(0)
    repeated.tokens = [1] * 20
    right = 0
    for _ in range(50):
        guesses = guessing.guess([repeated], 100, lambda _: 50)
        guess = guesses.get(repeated, Guess())
        guessing.pace.record(1 + len(guess), 1 + 0.01 * len(guess))
        guessing.checked(repeated, guess, [1] * (len(guess) + 1))
        right += len(guess)
    assert guessing.stats()["accepted_tokens/lookup"] == right > 40
    guessing.forget(repeated)
    assert not guessing._records["lookup"].of


def test_no_more_is_guessed_than_may_be_written_or_read(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("tailorbird.serve.guess.guessing.time.perf_counter", clock)
    guessing, texts = Guessing([Steady("good", clock, True, 0.0)]), [text(number) for number in range(3)]
    guessing.pace.record(1, 1.0)
    for most, left in ((0, 9), (2, 9), (9, 1), (9, 2), (9, 3), (1000, 1000)):
        guesses = guessing.guess(texts, most, lambda _, left=left: left)
        assert sum(map(len, guesses.values())) <= most
        assert all(len(guess) < left for guess in guesses.values())
