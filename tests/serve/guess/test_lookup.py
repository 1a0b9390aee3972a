"""Guesses from the text itself."""

from __future__ import annotations

import random

from tailorbird.serve.guess.lookup import LENGTHS, SEARCHED, Past


def lookup(tokens: list[int], most: int) -> list[int]:
    """In a text that was never searched before."""
    return Past().lookup(tokens, most)


def test_a_text_that_repeats_itself_is_continued() -> None:
    assert lookup([1, 2, 3, 4, 5, 9, 1, 2, 3], 3) == [4, 5, 9]
    assert lookup([1, 2, 3, 4, 5, 9, 1, 2, 3], 1) == [4]
    assert lookup([7, 7, 7, 7], 6) == [7]


def test_what_never_stood_there_is_not_guessed() -> None:
    assert lookup([1, 2, 3, 4, 5], 4) == []
    assert lookup([1], 4) == []
    assert lookup([1, 2, 1, 2], 0) == []


def test_the_longest_and_latest_match_counts() -> None:
    assert lookup([1, 2, 3, 8, 5, 2, 3, 9, 1, 2, 3], 1) == [8]  # three tokens match there, two later on
    assert lookup([2, 3, 8, 2, 3, 9, 2, 3], 1) == [9]


def test_guesses_always_stood_behind_what_the_text_ends_with() -> None:
    rng = random.Random(0)
    for _ in range(300):
        text = [rng.randrange(4) for _ in range(rng.randrange(1, 60))]
        guess = lookup(text, rng.randrange(7))
        if guess:
            before = text[-min(LENGTHS) :]
            starts = range(len(before), len(text))
            assert any(text[at : at + len(guess)] == guess and text[at - 2 : at] == before for at in starts)


def test_a_text_that_grows_is_searched_as_if_it_were_new() -> None:
    rng = random.Random(1)
    for _ in range(30):
        past, text = Past(), [rng.randrange(-3, 3) << rng.choice([0, 8, 16]) for _ in range(5)]
        for _ in range(40):
            most = rng.randrange(7)
            assert past.lookup(text, most) == lookup(text, most)
            text += [rng.randrange(-3, 3) << rng.choice([0, 8, 16]) for _ in range(rng.randrange(4))]


def test_what_stands_too_far_back_is_not_found() -> None:
    once = [70_001, 70_002, 70_003]
    between = list(range(SEARCHED - 4))
    assert lookup([*once, *between, 70_001, 70_002], 1) == []
    assert lookup([*once, *between[4:], 70_001, 70_002], 1) == [70_003]
