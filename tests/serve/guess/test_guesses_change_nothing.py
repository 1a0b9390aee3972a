"""Whatever is guessed, by whom and in which form: the same tokens as without, and no page is lost."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from engines import engine
from guessed import AlwaysAsked, RandomGuesser, model, texts_of
from tailorbird.kernels import native
from tailorbird.run.parts import ARCHITECTURES
from tailorbird.serve.request import Grammar, Request, Sampling

pytestmark = pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")


def requests_of(rng: random.Random, count: int, grammars: bool = False) -> list[Request]:
    """Texts of all kinds."""
    found = []
    openings = [tuple(rng.randrange(200) for _ in range(rng.randrange(1, 50))) for _ in range(2)]
    for number in range(count):
        sampling = rng.choice(
            [
                Sampling(temperature=0, ignore_end=True),
                Sampling(temperature=1.0, seed=rng.randrange(99)),
                Sampling(temperature=0.8, top_p=0.9, seed=3, repetition_penalty=1.2, frequency_penalty=0.3),
                Sampling(temperature=0.7, top_k=9, seed=number, logprobs=2, ignore_end=True),
                *(
                    [Sampling(temperature=1.0, seed=1, grammar=Grammar("regex", "[ab]{3,40}"))]
                    if grammars
                    else []
                ),
            ]
        )
        found.append(
            Request(
                str(number), (*rng.choice(openings), number), rng.randrange(1, 50), sampling,
                n=rng.choice([1, 1, 3]), priority=rng.randrange(2), tenant=rng.choice("ab"),
            )
        )  # fmt: skip
    return found


@pytest.mark.parametrize("chains", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_random_guesses_in_random_schedules(seed: int, chains: bool, tmp_path: Path) -> None:
    path, rng = model(tmp_path / "m"), random.Random(seed)
    requests = requests_of(rng, 10)
    plain = texts_of(engine(path, speculative=False), requests)
    most, step_tokens = rng.choice([(3, 9), (6, 64)])
    made = engine(path, max_sequences=most, step_tokens=step_tokens)
    made.pool.take(made.pool.pages - 5)  # hold the others, so that sequences are preempted
    held = made.pool.used
    guesser = RandomGuesser(rng, plain, chains)
    made.guessing = AlwaysAsked(guesser, lambda: [4] * rng.randrange(1, 7))
    cancelled = [request.id for request in requests if rng.random() < 0.15]
    found = texts_of(made, requests, rng, cancelled)
    assert found == {key: text for key, text in plain.items() if key[0] not in cancelled}
    assert made.pool.used == held
    stats = made.stats()
    assert 0 < stats["accepted_tokens/random"] < stats["drafted_tokens/random"]


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_trees_of_every_architecture(architecture: str, tmp_path: Path) -> None:
    path, rng = model(tmp_path / "m", architecture), random.Random(4)
    requests = [
        Request(
            str(number), tuple(rng.randrange(200) for _ in range(28)), 40, Sampling(temperature=1.0, seed=5)
        )
        for number in range(3)
    ]
    plain = texts_of(engine(path, speculative=False), requests)
    made = engine(path)
    made.guessing = AlwaysAsked(RandomGuesser(rng, plain, chains=False), lambda: [3] * 5)
    assert texts_of(made, requests, rng) == plain
    assert made.stats()["accepted_tokens/random"] > 0


def test_grammars_hold_along_trees(tmp_path: Path) -> None:
    pytest.importorskip("xgrammar")
    path, rng = model(tmp_path / "m"), random.Random(0)
    requests = requests_of(rng, 12, grammars=True)
    assert any(request.sampling.grammar for request in requests)
    plain = texts_of(engine(path, speculative=False), requests)
    made = engine(path)
    made.guessing = AlwaysAsked(RandomGuesser(rng, plain, chains=False), lambda: [4] * 4)
    assert texts_of(made, requests, rng) == plain
