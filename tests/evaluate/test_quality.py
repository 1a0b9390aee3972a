"""Divergence and perplexity against formulas written out in float64, however the logits are cut."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from tailorbird.errors import TextError
from tailorbird.evaluate import quality as quality_module
from tailorbird.evaluate.quality import HISTOGRAM_EDGES, Divergence, Perplexity, Quality


def naive_kl(reference: torch.Tensor, logits: torch.Tensor) -> np.ndarray:
    """KL of each position by the definition, one value of the vocabulary after another, in float64."""
    p = np.exp(reference.double().numpy())
    p /= p.sum(-1, keepdims=True)
    q = np.exp(logits.double().numpy())
    q /= q.sum(-1, keepdims=True)
    return (p * np.log(p / q)).sum(-1)


def naive_perplexity(logits: torch.Tensor, labels: torch.Tensor) -> float:
    p = np.exp(logits.double().numpy())
    p /= p.sum(-1, keepdims=True)
    chosen = [p[b, t, labels[b, t]] for b in range(len(labels)) for t in range(labels.shape[1])]
    return float(np.exp(-np.mean(np.log(chosen))))


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of two models ``[4, 33, 61]`` and the windows ``[4, 33]`` that they read."""
    generator = torch.Generator().manual_seed(3)
    reference = 3 * torch.randn(4, 33, 61, generator=generator)
    logits = reference + 0.3 * torch.randn(4, 33, 61, generator=generator)
    return reference, logits, torch.randint(0, 61, (4, 33), generator=generator)


def whole(reference: torch.Tensor, logits: torch.Tensor, ids: torch.Tensor) -> Quality:
    metric = Divergence()
    metric.add(reference, logits, ids[:, 1:])
    return metric.finish()


def test_agrees_with_the_definitions(pair: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    reference, logits, ids = pair
    found = whole(*pair)
    kl = naive_kl(reference, logits)
    assert found.tokens == kl.size == 4 * 33
    assert found.kl_mean == pytest.approx(kl.mean(), rel=1e-5)
    assert found.kl_p99 == pytest.approx(np.sort(kl.ravel())[math.ceil(0.99 * kl.size) - 1], rel=1e-5)
    assert found.top1_agreement == (reference.argmax(-1) == logits.argmax(-1)).double().mean()
    assert 0 < found.top1_agreement < 1
    assert found.perplexity_before == pytest.approx(naive_perplexity(reference[:, :-1], ids[:, 1:]), rel=1e-5)
    assert found.perplexity_after == pytest.approx(naive_perplexity(logits[:, :-1], ids[:, 1:]), rel=1e-5)


def test_small_divergence_is_resolved() -> None:
    """A change of 1e-3 in the logits, KL near 1e-7, over a large vocabulary."""
    generator = torch.Generator().manual_seed(0)
    reference = 2 * torch.randn(1, 64, 5000, generator=generator)
    logits = reference + 1e-2 * torch.randn(1, 64, 5000, generator=generator)
    found = whole(reference, logits, torch.zeros(1, 64, dtype=torch.long))
    assert found.kl_mean == pytest.approx(naive_kl(reference, logits).mean(), rel=0.02)


@pytest.mark.parametrize("step_bytes", [1, 4 * 5 * 61 * 7, 64 << 20])
def test_pieces_and_steps_change_nothing(
    pair: tuple[torch.Tensor, torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch, step_bytes: int
) -> None:
    reference, logits, ids = pair
    expected = whole(*pair)
    monkeypatch.setattr(quality_module, "STEP_BYTES", step_bytes)
    metric, perplexity = Divergence(), Perplexity()
    for window in range(4):
        for start in range(0, 33, 10):
            stop = min(start + 10, 33)
            labels = ids[window, start + 1 : stop + 1]
            metric.add(reference[window, start:stop], logits[window, start:stop], labels)
            perplexity.add(logits[window, start:stop], labels)
    found = metric.finish()
    assert found.kl_mean == pytest.approx(expected.kl_mean, rel=1e-6)
    assert found.kl_p99 == pytest.approx(expected.kl_p99, rel=1e-6)
    assert found.histogram == expected.histogram
    assert found.perplexity_before == pytest.approx(expected.perplexity_before, rel=1e-6)
    assert perplexity.finish() == pytest.approx(expected.perplexity_after, rel=1e-6)
    assert perplexity.tokens == 4 * 32
    assert found.tokens == 4 * 33


def test_equal_logits_have_no_divergence(pair: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    reference, _, ids = pair
    found = whole(reference, reference.clone(), ids)
    assert (found.kl_mean, found.kl_p99, found.top1_agreement) == (0.0, 0.0, 1.0)
    assert found.perplexity_before == found.perplexity_after
    assert found.histogram["counts"][0] == found.tokens


def test_direction_is_source_to_result(pair: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    """KL isn't symmetric: what the source thinks likely and the result doesn't is what costs."""
    reference = torch.tensor([[[0.0, 0.0], [0.0, 0.0]]])
    sure = torch.tensor([[[20.0, 0.0], [20.0, 0.0]]])
    ids = torch.zeros(1, 2, dtype=torch.long)
    assert whole(reference, sure, ids).kl_mean == pytest.approx(10 - math.log(2), abs=1e-4)
    assert whole(sure, reference, ids).kl_mean == pytest.approx(math.log(2), abs=1e-4)


def test_bf16_logits_are_computed_in_fp32(pair: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    reference, logits, ids = (t.bfloat16() if t.is_floating_point() else t for t in pair)
    assert whole(reference, logits, ids) == whole(reference.float(), logits.float(), ids)


def test_padded_vocabulary_adds_nothing(pair: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    reference, logits, ids = pair
    pad = torch.full((4, 33, 3), -math.inf)
    padded = whole(torch.cat([reference, pad], -1), torch.cat([logits, pad], -1), ids)
    assert padded.kl_mean == pytest.approx(whole(*pair).kl_mean, rel=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_logits_never_look_good(
    pair: tuple[torch.Tensor, torch.Tensor, torch.Tensor], value: float
) -> None:
    reference, logits, ids = pair
    logits[2, 5, 7] = value
    found = whole(reference, logits, ids)
    assert found.kl_mean == math.inf
    assert found.perplexity_after == math.inf
    assert found.perplexity_before < math.inf
    assert found.histogram["counts"][-1] == 1


def test_histogram_counts_every_position(pair: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    found = whole(*pair)
    assert sum(found.histogram["counts"]) == found.tokens
    assert len(found.histogram["edges"]) == len(found.histogram["counts"]) + 1
    assert sorted(set(HISTOGRAM_EDGES)) == HISTOGRAM_EDGES
    kl = naive_kl(*pair[:2])
    expected = [((low <= kl) & (kl < high)).sum() for low, high in itertools.pairwise(HISTOGRAM_EDGES)]
    assert np.abs(np.subtract(expected, found.histogram["counts"])).sum() <= 2, "one may sit on an edge"


def test_memory_of_a_step_is_bounded() -> None:
    for vocabulary in (61, 32_000, 262_144):
        steps = quality_module._steps(5000, vocabulary)
        assert steps[0][0] == 0
        assert all(a[1] == b[0] for a, b in itertools.pairwise(steps))
        assert steps[-1][1] == 5000
        assert max(stop - start for start, stop in steps) * vocabulary * 4 * 5 <= 64 << 20


def test_nothing_to_predict_is_an_error() -> None:
    metric = Divergence()
    metric.add(torch.zeros(1, 1, 5), torch.zeros(1, 1, 5), torch.zeros(1, 0, dtype=torch.long))
    with pytest.raises(TextError, match="two tokens"):
        metric.finish()
    with pytest.raises(TextError):
        Perplexity().finish()
