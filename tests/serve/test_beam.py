"""The search against one over all texts, and against a plain restatement with whole tables."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest
import torch

from tailorbird.serve.beam import Path, Search
from tailorbird.serve.request import BeamSearch, TokenLogprob


class Table:
    """Log-probabilities after every text, at random."""

    def __init__(self, vocab: int, seed: int, spread: float = 2.0) -> None:
        self.vocab, self._seed, self._spread = vocab, seed, spread
        self._known: dict[tuple[int, ...], list[float]] = {}

    def after(self, tokens: tuple[int, ...]) -> list[float]:
        if tokens not in self._known:
            generator = torch.Generator().manual_seed(hash((self._seed, tokens)) % (1 << 31))
            logits = self._spread * torch.randn(self.vocab, generator=generator, dtype=torch.float64)
            self._known[tokens] = logits.log_softmax(0).tolist()
        return self._known[tokens]

    def logprob(self, tokens: Sequence[int]) -> float:
        return sum(self.after(tuple(tokens[:at]))[token] for at, token in enumerate(tokens))


def ids(path: Path) -> tuple[int, ...]:
    return tuple(item.token for item in path.tokens)


def run(table: Table, settings: BeamSearch, stop: frozenset[int], most: int) -> Search:
    search = Search(settings, stop, most)
    while search.beams:
        tops = []
        for beam in search.beams:
            row = table.after(ids(beam))
            order = sorted(range(table.vocab), key=lambda token: -row[token])[: search.looked_at]
            tops.append([TokenLogprob(token, row[token]) for token in order])
        before = search.beams
        search.advance(tops)
        for path in (*search.beams, *search.ended):
            if len(path.tokens) == len(before[0].tokens) + 1:
                assert before[path.parent].tokens == path.tokens[:-1]
    return search


def all_texts(table: Table, stop: frozenset[int], most: int) -> list[tuple[int, ...]]:
    """Every text that has ended."""
    found = []
    for length in range(1, most + 1):
        for tokens in itertools.product(range(table.vocab), repeat=length):
            inside = not stop & set(tokens[:-1])
            if inside and (tokens[-1] in stop or length == most):
                found.append(tokens)
    return found


@pytest.mark.parametrize("penalty", [0.0, 0.7, 2.0])
@pytest.mark.parametrize("seed", range(4))
def test_a_search_that_keeps_everything_finds_the_best_of_all_texts(seed: int, penalty: float) -> None:
    table, stop, most = Table(4, seed), frozenset({3}), 4
    search = run(table, BeamSearch(128, penalty, "never"), stop, most)
    scored = {text: table.logprob(text) / len(text) ** penalty for text in all_texts(table, stop, most)}
    expected = sorted(scored, key=lambda text: -scored[text])
    assert [ids(path) for path in search.ended] == expected[:128]
    for path in search.ended:
        assert path.score == pytest.approx(scored[ids(path)])
        assert path.logprob == pytest.approx(table.logprob(ids(path)))
        assert path.finish == ("stop" if ids(path)[-1] in stop else "length")
        assert [item.token for item in path.text] == [token for token in ids(path) if token not in stop]


def slow_search(
    table: Table, settings: BeamSearch, stop: frozenset[int], most: int
) -> list[tuple[float, tuple[int, ...]]]:
    """The rules in the order in which they are told, with nothing left out and nothing remembered."""
    width, power = settings.num_beams, settings.length_penalty
    beams: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    ended: list[tuple[float, tuple[int, ...]]] = []
    for length in range(1, most + 1):
        every = [
            (score + table.after(text)[token], (*text, token))
            for score, text in beams
            for token in range(table.vocab)
        ]
        every = sorted(every, key=lambda one: -one[0])[: max(2, 1 + len(stop)) * width]
        full = len(ended) == width
        if not (full and settings.early_stopping is True):
            ended += [
                (score / length**power, text)
                for score, text in every[:width]
                if text[-1] in stop or length == most
            ]
        ended = sorted(ended, key=lambda one: -one[0])[:width]
        beams = [one for one in every if one[1][-1] not in stop][:width]
        if len(ended) == width:
            if settings.early_stopping is True:
                break
            hoped = most if settings.early_stopping == "never" and power > 0 else length
            if beams[0][0] / hoped**power <= ended[-1][0]:
                break
    return ended


@pytest.mark.parametrize("early", [True, False, "never"])
@pytest.mark.parametrize("seed", range(12))
def test_searches_follow_the_rules(seed: int, early: bool | str) -> None:
    rng = random.Random(seed)
    table = Table(rng.randrange(6, 12), seed, rng.choice([0.5, 2.0]))
    stop = frozenset(rng.sample(range(table.vocab), rng.randrange(3)))
    settings = BeamSearch(rng.randrange(1, 5), rng.choice([-1.0, 0.0, 0.5, 1.0, 2.0]), early)  # type: ignore[arg-type]
    most = rng.randrange(1, 9)
    found = run(table, settings, stop, most).ended
    expected = slow_search(table, settings, stop, most)
    assert [ids(path) for path in found] == [text for _, text in expected]
    assert [path.score for path in found] == pytest.approx([score for score, _ in expected])


def test_one_beam_takes_the_likeliest_token_each_time() -> None:
    table = Table(7, 3)
    (path,) = run(table, BeamSearch(1), frozenset(), 6).ended
    text: tuple[int, ...] = ()
    for _ in range(6):
        row = table.after(text)
        text = (*text, row.index(max(row)))
    assert ids(path) == text
