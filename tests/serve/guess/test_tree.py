"""Trees of guesses."""

from __future__ import annotations

import random

from tailorbird.serve.guess.tree import Guess, comb


def random_tree(rng: random.Random, most: int) -> Guess:
    count = rng.randrange(most)
    parents = tuple(rng.randrange(-1, node) for node in range(count))
    return Guess(tuple(rng.randrange(5) for _ in range(count)), parents)


def test_ancestors_are_the_ways_to_the_root() -> None:
    rng = random.Random(0)
    for _ in range(200):
        guess = random_tree(rng, 20)
        for node, (bits, depth) in enumerate(zip(guess.ancestors(), guess.depths(), strict=True)):
            way, at = [node], guess.parent(node)
            while at >= 0:
                way.append(at)
                at = guess.parent(at)
            assert bits == sum(1 << step for step in way)
            assert depth == len(way)


def test_the_first_guesses_of_a_tree_are_a_tree() -> None:
    rng = random.Random(1)
    for _ in range(200):
        guess = random_tree(rng, 12)
        part = guess.first(rng.randrange(12))
        assert part.tokens == guess.tokens[: len(part)]
        assert all(part.parent(node) < node for node in range(len(part)))
        assert part.depths() == guess.depths()[: len(part)]


def test_a_chain_needs_no_parents_and_a_comb_has_its_chain_first() -> None:
    assert comb([[4], [5], [6]]) == Guess((4, 5, 6))
    assert Guess((4, 5, 6)).depths() == [1, 2, 3]
    made = comb([[4, 7], [5], [6, 8, 9]])
    assert made.tokens == (4, 5, 6, 7, 8, 9)
    assert [made.tokens[node] for node in made.children(-1)] == [4, 7]
    assert [made.tokens[node] for node in made.children(1)] == [6, 8, 9]
    assert made.child(1, 9) == 5
    assert made.child(0, 9) is None
