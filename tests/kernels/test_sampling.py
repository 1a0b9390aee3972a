"""Tokens from logits: the fast path agrees with the exact one, draws follow the weights, rows don't meet."""

from __future__ import annotations

import math
from array import array
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tailorbird.kernels import native, sampling
from tailorbird.kernels.sampling import Rule, changed, choose, drawn, kept_weights, reference

versions = pytest.mark.parametrize("version", native.versions())
needs_native = pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")

#: A draw so close to a border between two tokens may fall on either side.
CLOSE = 1e-9

shares = st.sampled_from([1e-12, 0.1, 0.3, 0.5, 0.9, 0.95, 1 - 1e-12, 1.0]) | st.floats(1e-6, 1)
uniforms = st.floats(0, 1, exclude_max=True)
filters = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([1e-310, 1e-30, 1e-3, 0.7, 1.0, 2.5, 100.0]),
        "top_k": st.sampled_from([0, 0, 1, 2, 5, 64, 65, 300, 10**9]),
        "top_p": st.just(1.0) | shares,
        "min_p": st.just(0.0) | shares,
        "typical_p": st.just(1.0) | shares,
        "uniform": uniforms,
    }
)


@st.composite
def rows(draw: st.DrawFn) -> Tensor:
    """Logits of all sorts; the largest is finite."""
    size = draw(st.sampled_from([1, 2, 3, 31, 63, 64, 65, 128, 200, 1000, 5000]))
    normal = torch.randn(size, generator=torch.Generator().manual_seed(draw(st.integers(0, 1 << 20))))
    kind = draw(st.sampled_from(["normal", "wide", "equal", "levels", "halves", "one", "huge"]))
    logits = {
        "normal": normal,
        "wide": normal * 8,
        "equal": torch.full_like(normal, -3.5),
        "levels": normal.round(),
        "halves": torch.where(normal > 0, -math.inf, normal * 3),
        "one": torch.full_like(normal, -math.inf),
        "huge": normal * 1e37,
    }[kind]
    if not bool(logits.max().isfinite()):
        logits[draw(st.integers(0, size - 1))] = 2.0
    return logits


def possible(logits: Tensor, rule: Rule) -> set[int]:
    """Tokens that the draw comes within rounding of, with settings within rounding of the rule's."""

    def beside(value: float) -> list[float]:
        return [value] if value == 1 else [value, value * (1 - CLOSE), min(value * (1 + CLOSE), 1.0)]

    found: set[int] = set()
    for name in ("top_p", "min_p", "typical_p"):
        for value in beside(getattr(rule, name)):
            weights = kept_weights(changed(logits, rule), replace(rule, **{name: value}))
            sums = weights.cumsum(0) / weights.sum()
            near = (sums >= rule.uniform - CLOSE) & (sums - weights / weights.sum() <= rule.uniform + CLOSE)
            found |= set((near & (weights > 0)).nonzero()[:, 0].tolist())
    return found


@needs_native
@given(logits=rows(), chosen=filters, version=st.sampled_from(native.versions() or (0,)))
@settings(max_examples=300, deadline=None)
def test_the_fast_path_draws_what_the_exact_one_draws(
    logits: Tensor, chosen: dict[str, float], version: int
) -> None:
    rule = Rule(**chosen)  # type: ignore[arg-type]
    found = choose(logits[None], [rule], version=version)[0]
    expected = reference(logits, rule)
    assert found.problem is expected.problem is None
    if found.token != expected.token:
        assert found.token in possible(logits, rule)


@st.composite
def changes(draw: st.DrawFn, size: int) -> Rule:
    """Penalties, biases, forbidden tokens and a mask; a mask may leave nothing."""

    def tokens(most: int) -> array[int]:
        return array("i", draw(st.lists(st.integers(0, size - 1), max_size=most, unique=True)))

    seen, biased = tokens(40), tokens(10)
    bits = draw(st.lists(st.sampled_from([0, -1, 1 << 7, 0x5A5A5A5A]), min_size=size // 32 + 1, max_size=200))
    return Rule(
        temperature=draw(st.sampled_from([0.0, 0.8])),
        repetition=draw(st.sampled_from([1.0, 0.5, 1.3])),
        presence=draw(st.sampled_from([0.0, 1.5])),
        frequency=draw(st.sampled_from([0.0, -0.7])),
        seen=seen,
        counts=array("i", draw(st.lists(st.integers(0, 5), min_size=len(seen), max_size=len(seen)))),
        bias_tokens=biased,
        biases=array("d", draw(st.lists(st.floats(-100, 100), min_size=len(biased), max_size=len(biased)))),
        forbidden=tokens(3),
        allowed=draw(st.none() | st.just(torch.tensor(bits, dtype=torch.int32))),
        uniform=draw(uniforms),
        logprobs=draw(st.sampled_from([None, 0, 1, 20])),
    )


@needs_native
@given(data=st.data(), logits=rows(), version=st.sampled_from(native.versions() or (0,)))
@settings(max_examples=150, deadline=None)
def test_the_fast_path_changes_logits_as_the_exact_one(
    data: st.DataObject, logits: Tensor, version: int
) -> None:
    rule = data.draw(changes(len(logits)))
    before = logits.clone()
    found, expected = choose(logits[None], [rule], version=version)[0], reference(logits, rule)
    assert torch.equal(logits, before)
    assert found.problem == expected.problem
    if found.token != expected.token:
        assert rule.temperature > 0
        assert found.token in possible(logits, rule)
    elif found.problem is None and rule.logprobs is not None:
        assert found.logprob == pytest.approx(expected.logprob, rel=1e-9, abs=1e-9)
        assert [token for token, _ in found.top] == [token for token, _ in expected.top]
        assert [value for _, value in found.top] == pytest.approx(
            [value for _, value in expected.top], rel=1e-9, abs=1e-9
        )


@versions
def test_large_vocabularies_with_candidates_near_and_far(version: int) -> None:
    generator = torch.Generator().manual_seed(5)
    for scale in (0.0, 0.3, 1.0, 3.0):
        logits = torch.randn(50257, generator=generator) * scale
        for chosen in (
            {"top_p": 0.95},
            {"top_k": 2000, "top_p": 0.9},
            {"min_p": 0.01},
            {"typical_p": 0.8},
            {},
        ):
            rule = Rule(temperature=0.7, uniform=float(torch.rand(1, generator=generator)), **chosen)  # type: ignore[arg-type]
            found = choose(logits[None], [rule], version=version)[0].token
            assert found == reference(logits, rule).token or found in possible(logits, rule)


@needs_native
@pytest.mark.parametrize(
    "chosen",
    [{}, {"top_k": 7}, {"top_p": 0.8}, {"min_p": 0.1}, {"typical_p": 0.7}, {"top_k": 20, "top_p": 0.9}],
)
def test_tokens_are_as_frequent_as_they_weigh(chosen: dict[str, float]) -> None:
    """Pearson's statistic stays below what chance exceeds once in a billion (by Wilson and Hilferty)."""
    generator = torch.Generator().manual_seed(11)
    logits, draws = torch.randn(100, generator=generator) * 2, 20000
    uniform = torch.rand(draws, generator=generator, dtype=torch.float64).tolist()
    rules = [Rule(temperature=0.9, uniform=u, **chosen) for u in uniform]  # type: ignore[arg-type]
    tokens = torch.tensor([found.token for found in choose(logits.expand(draws, -1), rules)])
    weights = kept_weights(logits, rules[0])
    expected = weights / weights.sum() * draws
    counts = tokens.bincount(minlength=100).double()
    assert counts[expected == 0].sum() == 0
    often = expected >= 5
    seen = torch.cat([counts[often], counts[~often].sum(0, keepdim=True)])
    wanted = torch.cat([expected[often], expected[~often].sum(0, keepdim=True).clamp(min=1e-9)])
    freedom = len(wanted) - 1
    limit = freedom * (1 - 2 / (9 * freedom) + 6 * math.sqrt(2 / (9 * freedom))) ** 3
    assert ((seen - wanted) ** 2 / wanted).sum() < limit + 1e-6


@given(logits=rows(), chosen=filters)
@settings(max_examples=200, deadline=None)
def test_filters_keep_the_likeliest_and_no_more_than_they_need(
    logits: Tensor, chosen: dict[str, float]
) -> None:
    rule = Rule(**chosen | {"typical_p": 1.0})  # type: ignore[arg-type]
    plain = Rule(temperature=rule.temperature)
    weights, all_weights = kept_weights(logits, rule), kept_weights(logits, plain)
    kept = weights > 0
    assert torch.equal(weights[kept], all_weights[kept])
    assert logits[kept].min() >= logits.masked_fill(kept | (all_weights == 0), -math.inf).max()
    if rule.top_k:
        assert kept.sum() <= rule.top_k
    if rule.min_p:
        assert weights[kept].min() >= rule.min_p * all_weights.max()
    if not rule.top_k and not rule.min_p and rule.top_p < 1:
        share = weights.sum() / all_weights.sum()
        assert share >= rule.top_p * (1 - 1e-12)
        assert share - weights[kept].min() / all_weights.sum() <= rule.top_p + 1e-12


def test_draws_invert_the_distribution_over_rising_tokens() -> None:
    weights = torch.tensor([0.0, 1.0, 0.0, 2.0, 1.0, 0.0], dtype=torch.float64)
    found = [drawn(weights, uniform) for uniform in (0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-53)]
    assert found == [1, 1, 3, 3, 4, 4]


def test_of_equal_logits_the_first_is_taken() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 3.0, 1.0] * 40])
    for uniform in (0.0, 0.999):
        for rule in (
            Rule(temperature=0.0),
            Rule(top_k=1, uniform=uniform),
            Rule(top_p=1e-6, uniform=uniform),
        ):
            assert choose(logits, [rule])[0].token == reference(logits[0], rule).token == 1


def test_rows_have_the_same_tokens_alone_and_among_others() -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(9, 3000, generator=generator)
    rules = [
        Rule(temperature=t, top_k=k, top_p=p, uniform=u, logprobs=3)
        for t, k, p, u in zip(
            [0.0, 0.5, 1.0] * 3,
            [0, 40, 0] * 3,
            [1.0, 0.9, 0.95] * 3,
            torch.rand(9, generator=generator).tolist(),
            strict=True,
        )
    ]
    alone = [choose(logits[i : i + 1], [rules[i]])[0] for i in range(9)]
    for threads in (1, 2, 4):
        assert choose(logits, rules, num_threads=threads) == alone
        order = [4, 0, 8, 2]
        assert choose(logits[order], [rules[i] for i in order], threads) == [alone[i] for i in order]
    assert choose(torch.cat([logits, logits], 1)[:, :3000], rules) == alone


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 70, 199])
def test_a_row_that_is_not_finite_has_no_token_and_others_have(bad: float, place: int) -> None:
    logits = torch.zeros(3, 200)
    logits[1, place] = bad
    for temperature in (0.0, 1.0):
        rules = [Rule(temperature=temperature, uniform=0.5) for _ in range(3)]
        found = choose(logits, rules)
        assert [item.problem for item in found] == [None, "not finite", None]
        assert found == [reference(row, rule) for row, rule in zip(logits, rules, strict=True)]
    everything = torch.full((1, 200), -math.inf)
    assert choose(everything, [Rule()])[0].problem == reference(everything[0], Rule()).problem == "not finite"


def test_changes_come_in_the_documented_order() -> None:
    logits = torch.tensor([2.0, -2.0, 1.0, 0.0])
    rule = Rule(
        repetition=2.0, presence=0.5, frequency=0.25,
        seen=array("i", [0, 1, 2]), counts=array("i", [2, 1, 0]),
        bias_tokens=array("i", [1, 3]), biases=array("d", [4.0, 1.0]), forbidden=array("i", [3]),
    )  # fmt: skip
    assert changed(logits, rule).tolist() == [1 - 0.5 - 0.5, -4 - 0.5 - 0.25 + 4, 0.5, -math.inf]


def test_without_compiled_code_the_exact_path_serves(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    logits = torch.randn(5, 700, generator=torch.Generator().manual_seed(4))
    rules = [Rule(top_p=0.9, uniform=(i + 0.3) / 5, logprobs=2) for i in range(5)]
    expected = choose(logits, rules)
    monkeypatch.setattr(sampling, "available", lambda: False)
    sampling._say_slow.cache_clear()
    found = choose(logits, rules)
    assert found == choose(logits, rules)
    sampling._say_slow.cache_clear()
    assert [item.token for item in found] == [item.token for item in expected]
    assert [record.getMessage() for record in caplog.records if "C++ compiler" in record.getMessage()] != []
    assert len(caplog.records) == 1


def test_wrong_shapes_are_refused() -> None:
    rule, logits = Rule(), torch.zeros(1, 64)
    for rows_given, rules in (
        (logits, []), (logits.double(), [rule]), (torch.zeros(2, 64), [rule, rule]),
        (torch.zeros(1, 64)[:, ::2], [rule]),
        (torch.zeros(1, 0), [rule]), (logits, [Rule(allowed=torch.zeros(1, dtype=torch.int32))]),
    ):  # fmt: skip
        with pytest.raises(ValueError):
            choose(rows_given, rules)
    with pytest.raises(ValueError, match="logprobs"):
        Rule(logprobs=21)
