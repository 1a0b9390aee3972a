"""Samplers: seeds reproduce in any batch, penalties count what was written, branches share a past."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tailorbird.errors import CheckpointError, SettingsError
from tailorbird.serve.request import Grammar, Sampling
from tailorbird.serve.sampling import Sampler, choose, uniform

VOCAB = 50


def logits_of(*tokens: int) -> Tensor:
    """Logits `[VOCAB]` that depend on some tokens, as a model's do."""
    seed = hash(tokens) & 0xFFFF
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


def written(sampler: Sampler, count: int, among: int = 0) -> list[int]:
    """Tokens of a toy model, alone or among other sequences."""
    others = [Sampler(Sampling(temperature=2.0), (), (), VOCAB, seed) for seed in range(among)]
    tokens: list[int] = []
    for _ in range(count):
        rows = torch.stack([logits_of(9, i) for i in range(among)] + [logits_of(*tokens[-2:])])
        token = choose(rows, [*others, sampler])[-1].token
        sampler.accept(token)
        tokens.append(token)
    return tokens


def test_uniform_numbers_are_spread_evenly_and_differ() -> None:
    """Over seeds and over positions: means, neighbours' correlation, and no two alike."""
    for numbers in (
        torch.tensor([uniform(7, position) for position in range(4000)], dtype=torch.float64),
        torch.tensor([uniform(seed, 3) for seed in range(4000)], dtype=torch.float64),
        torch.tensor([uniform(-(1 << 63) + k, (1 << 30) - k) for k in range(4000)], dtype=torch.float64),
    ):
        assert (numbers >= 0).all()
        assert (numbers < 1).all()
        assert len(numbers.unique()) == 4000
        counts = torch.histc(numbers.float(), 20, 0, 1)
        assert ((counts - 200) ** 2 / 200).sum() < 80  # chance exceeds it less than once in a hundred million
        centred = numbers - 0.5
        assert abs(float((centred[1:] * centred[:-1]).mean() * 12)) < 0.1


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.7, top_p=0.9, presence_penalty=1.0)])
def test_a_seed_gives_the_same_tokens_in_any_batch(sampling: Sampling) -> None:
    alone = written(Sampler(sampling, (), (), VOCAB, 5), 40)
    assert written(Sampler(sampling, (), (), VOCAB, 5), 40, among=3) == alone
    assert written(Sampler(sampling, (), (), VOCAB, 6), 40) != alone


def test_branches_share_the_past_and_go_their_own_ways() -> None:
    sampling = Sampling(temperature=1.5, frequency_penalty=2.0, repetition_penalty=1.2)
    trunk = Sampler(sampling, (1, 2), (), VOCAB, 5)
    written(trunk, 10)
    same, other = trunk.copy(5), trunk.copy(6)
    continued = written(trunk, 30)
    assert written(same, 30) == continued
    assert written(other, 30) != continued


def test_penalties_count_prompt_and_output() -> None:
    row = torch.zeros(1, VOCAB)
    row[0, :4] = torch.tensor([4.0, 3.9, 3.8, 3.0])

    def chosen(sampling: Sampling, output: list[int]) -> int:
        sampler = Sampler(sampling, (0, 0, VOCAB + 7), (), VOCAB, 0)
        for token in output:
            sampler.accept(token)
        return choose(row, [sampler])[0].token

    assert chosen(Sampling(temperature=0), []) == 0
    assert chosen(Sampling(temperature=0, repetition_penalty=1.2), []) == 1
    assert chosen(Sampling(temperature=0, repetition_penalty=1.2), [1, 2]) == 0
    assert chosen(Sampling(temperature=0, presence_penalty=1), []) == 0
    assert chosen(Sampling(temperature=0, presence_penalty=1), [0, 0]) == 1
    assert chosen(Sampling(temperature=0, frequency_penalty=0.5), [0, 1, 1]) == 2
    assert chosen(Sampling(temperature=0, frequency_penalty=-0.5), [2]) == 2
    assert chosen(Sampling(temperature=0, logit_bias={40: 100}), []) == 40


def test_stop_tokens_wait_for_the_least_number_of_tokens() -> None:
    row = torch.zeros(1, VOCAB)
    row[0, 3] = 10
    sampler = Sampler(Sampling(temperature=0, min_tokens=2), (), (3, VOCAB + 1), VOCAB, 0)
    found = []
    for _ in range(3):
        found.append(choose(row, [sampler])[0].token)
        sampler.accept(found[-1])
    assert found == [0, 0, 3]


def test_logprobs_are_of_the_models_own_distribution() -> None:
    row = logits_of(1)
    sampling = Sampling(
        temperature=0.3, top_k=1, logit_bias={int(row.argmin()): 100}, presence_penalty=2, logprobs=5
    )
    found = choose(row[None], [Sampler(sampling, (), (), VOCAB, 0)])[0].logprob
    logprobs = row.double().log_softmax(0)
    assert found is not None
    assert found.token == int(row.argmin())
    assert found.logprob == pytest.approx(float(logprobs[found.token]))
    assert [token for token, _ in found.top] == logprobs.topk(5).indices.tolist()
    assert [value for _, value in found.top] == pytest.approx(logprobs.topk(5).values.tolist())
    assert choose(row[None], [Sampler(Sampling(), (), (), VOCAB, 0)])[0].logprob is None


def test_a_row_in_error_leaves_the_others_alone() -> None:
    rows = torch.stack([logits_of(1)] * 4)
    rows[1, 7] = math.nan
    everything = dict.fromkeys(range(VOCAB), 0.0)
    samplers = [
        Sampler(sampling, (), range(VOCAB), VOCAB, 1)
        for sampling in (Sampling(), Sampling(), Sampling(min_tokens=1, logit_bias=everything), Sampling())
    ]
    found = choose(rows, samplers)
    assert found[0] == found[3] == choose(rows[:1], samplers[:1])[0]
    assert isinstance(found[1].error, CheckpointError)
    assert isinstance(found[2].error, SettingsError)
    assert [choice.token for choice in found[1:3]] == [-1, -1]


def test_what_does_not_fit_the_vocabulary_is_refused() -> None:
    with pytest.raises(SettingsError, match="logit_bias"):
        Sampler(Sampling(logit_bias={VOCAB: 1.0}), (), (), VOCAB, 0)
    with pytest.raises(ValueError, match="vocabulary"):
        choose(torch.zeros(1, VOCAB + 1), [Sampler(Sampling(), (), (), VOCAB, 0)])
    with pytest.raises(ValueError, match="matcher"):
        Sampler(Sampling(grammar=Grammar("json")), (), (), VOCAB, 0)
