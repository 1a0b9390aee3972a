"""The best of several continuations are those with the likeliest tokens."""

from __future__ import annotations

import random

import pytest

from tailorbird.serve.api.generation import Piece, best_pieces
from tailorbird.serve.request import TokenLogprob


@pytest.mark.parametrize("seed", range(10))
def test_the_best_of_each_prompt_are_answered_whole_and_in_order(seed: int) -> None:
    rng = random.Random(seed)
    prompts, written = rng.randrange(1, 4), rng.randrange(2, 7)
    n = rng.randrange(1, written)
    timed: list[tuple[float, Piece]] = []
    means = {}
    for choice in range(prompts * written):
        values = [-rng.random() for _ in range(rng.randrange(1, 5))]
        means[choice] = sum(values) / len(values)
        for at, value in enumerate(values):
            timed.append(
                (rng.random() + at, Piece(choice, f"{choice}.{at} ", ((0, TokenLogprob(at, value)),)))
            )
        timed.append((9.0, Piece(choice, f"{choice} ends", finish="stop")))
    pieces = [piece for _, piece in sorted(timed, key=lambda one: one[0])]
    found = best_pieces(pieces, n, written)
    for prompt in range(prompts):
        mine = range(prompt * written, (prompt + 1) * written)
        for place, choice in enumerate(sorted(mine, key=lambda choice: -means[choice])[:n]):
            text = "".join(piece.text for piece in found if piece.choice == prompt * n + place)
            assert text == "".join(piece.text for piece in pieces if piece.choice == choice)
    assert {piece.choice for piece in found} == set(range(prompts * n))


def test_a_text_without_a_token_is_the_last() -> None:
    empty, bad = Piece(0, "", finish="stop"), Piece(1, "a", ((0, TokenLogprob(1, -50.0)),), "stop")
    assert [piece.text for piece in best_pieces([empty, bad], 1, 2)] == ["a"]
