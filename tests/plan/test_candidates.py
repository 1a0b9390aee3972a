"""Candidates: no choice twice, only what the target can hold, and more bits never err more."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tailorbird.calibrate.statistics import GramAccumulator
from tailorbird.errors import SettingsError
from tailorbird.formats.packed import FloatCoding, IntegerCoding, stored_bytes
from tailorbird.linear.quantize.rtn import Rtn
from tailorbird.plan.candidates import (
    BITS,
    GROUPS,
    PROBE_KEY,
    candidate_codings,
    distinct,
    geometric_mean,
    probe_rounding,
    rounding_errors,
    sample_rows,
    spread,
)

CODINGS = candidate_codings(None, "bfloat16")


def weight_and_statistics(rows=40, width=128):
    """A weight with a few large inputs' columns, and inputs of unequal size that hang together."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, width, generator=generator)
    weight[:, ::17] *= 4
    mix = torch.randn(width, width, generator=generator) / width**0.5 + torch.eye(width)
    x = torch.randn(500, width, generator=generator) @ mix * torch.logspace(-1, 0.5, width)
    accumulator = GramAccumulator(width)
    accumulator.add(x)
    return weight, x, accumulator.finish()


def test_free_candidates_are_every_width_and_group_and_the_float_last():
    assert {(c.bits, c.group_size) for c in CODINGS[:-1]} == {(b, g) for b in BITS for g in GROUPS}
    assert CODINGS[-1] == FloatCoding("bfloat16")


@pytest.mark.parametrize("target", ["gguf", "compressed-tensors"])
def test_targets_allow_only_what_their_formats_hold(target):
    *integers, last = candidate_codings(target, "float16")
    assert last == FloatCoding("float16")
    assert integers
    for coding in integers:
        assert coding.symmetric
        if target == "gguf":
            assert coding.bits in (4, 5, 8)
            assert coding.group_size % 32 == 0
            assert coding.scale_dtype == "float16"
        else:
            assert coding.bits in (4, 8)


def test_an_unknown_target_is_answered_with_the_nearest():
    with pytest.raises(SettingsError, match="gguf"):
        candidate_codings("ggml", "bfloat16")


@given(st.integers(1, 600), st.integers(1, 600))
@settings(max_examples=60, deadline=None)
def test_distinct_leaves_one_of_each_price_and_loses_none(out_features, in_features):
    kept = distinct(CODINGS, out_features, in_features)
    prices = [(c.bits, stored_bytes(c, out_features, in_features)) for c in kept]
    assert len(set(prices)) == len(prices)
    assert set(prices) == {(c.bits, stored_bytes(c, out_features, in_features)) for c in CODINGS}
    assert [c for c in CODINGS if c in kept] == kept


def test_groups_beyond_the_row_are_one_choice():
    assert len(distinct(CODINGS, 10, 128)) == len(CODINGS)
    assert [c.group_size for c in distinct(CODINGS, 10, 48) if c.bits == 4] == [32, 64]


def test_errors_fall_with_bits_and_with_smaller_groups():
    weight, _, statistics = weight_and_statistics()
    errors = rounding_errors(weight, statistics, CODINGS)
    for group in GROUPS:
        by_bits = [errors[IntegerCoding(bits, group).label] for bits in BITS]
        assert all(more < fewer / 2 for fewer, more in pairwise(by_bits))
    for bits in BITS:
        assert errors[IntegerCoding(bits, 32).label] < errors[IntegerCoding(bits, 128).label]
    assert errors["bf16"] < errors[IntegerCoding(8, 128).label]


def test_error_is_the_share_of_the_outputs_energy():
    weight, x, statistics = weight_and_statistics()
    coding = IntegerCoding(3, 64)
    errors = rounding_errors(weight, statistics, [coding])
    change = Rtn()(weight, statistics, coding).dequantize() - weight
    exact = (x.double() @ change.double().T).square().sum() / (x.double() @ weight.double().T).square().sum()
    assert errors[coding.label] == pytest.approx(float(exact), rel=1e-4)
    change = probe_rounding(weight) - weight
    exact = (x.double() @ change.double().T).square().sum() / (x.double() @ weight.double().T).square().sum()
    assert errors[PROBE_KEY] == pytest.approx(float(exact), rel=1e-4)


def test_errors_on_a_sample_of_rows_are_close_to_those_on_all():
    weight, _, statistics = weight_and_statistics(rows=2000)
    few = rounding_errors(weight, statistics, CODINGS, rows=256)
    every = rounding_errors(weight, statistics, CODINGS, rows=2000)
    assert few == pytest.approx(every, rel=0.1)


@given(st.integers(1, 50), st.integers(1, 50))
def test_spread_is_even_and_reaches_both_ends(count, of):
    found = spread(count, of)
    assert found == sorted(set(found))
    assert len(found) == min(count, of)
    assert found[0] == 0
    assert count == 1 or found[-1] == of - 1


def test_rows_are_sampled_from_first_to_last():
    weight = torch.arange(1000.0)[:, None].expand(-1, 3)
    sample = sample_rows(weight, 10)
    assert sample[:, 0].tolist() == [round(i * 999 / 9) for i in range(10)]
    assert sample_rows(weight, 1000) is weight


def test_geometric_mean_is_the_exponential_of_the_mean_logarithm():
    assert geometric_mean([0.5, 2.0, 8.0]) == pytest.approx(2.0)
    assert math.isclose(geometric_mean([3.0]), 3.0)
