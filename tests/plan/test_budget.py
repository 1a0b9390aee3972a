"""Sizes are read exactly, and a budget that can't work or isn't needed is refused with the way out."""

from __future__ import annotations

import contextlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailorbird.errors import BudgetError, SettingsError
from tailorbird.plan.budget import Budget, enough_size, format_size, parse_size, read_budget, with_last_unit

DENSE, PARAMETERS = 2_000_000, 1_000_000


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1.5GiB", 3 * 2**29),
        ("1.5gib", 3 * 2**29),
        (" 2 KiB ", 2048),
        ("800MB", 800_000_000),
        ("800mb", 800_000_000),
        ("0.1kb", 100),
        ("1tib", 2**40),
        ("7B", 7),
        ("12345", 12345),
        (12345, 12345),
        ("60%", 1_200_000),
        ("33.3%", 666_000),
        (".5%", 10_000),
        ("3.25bpw", 406_250),
        ("3.25 BPW", 406_250),
    ],
)
def test_sizes_mean_what_they_say(text, size):
    assert parse_size(text, DENSE, PARAMETERS) == size


@pytest.mark.parametrize(
    "text",
    ["", "GiB", "0", "0GiB", "0.0%", "-1GiB", "nan", "inf", "NaN%", "1e9", "1,5GiB", "1.5", "4G", "4 g",
     "5XB", "1.2.3MB", "0.4B", "12 34", "١٢GiB", "9" * 50, "5%%", "0x10", "3 bits", None, True],
)  # fmt: skip
def test_anything_else_is_refused_with_an_example(text):
    with pytest.raises(SettingsError) as caught:
        parse_size(text, DENSE, PARAMETERS)
    assert re.search(r"GiB", str(caught.value))


@pytest.mark.parametrize(
    ("texts", "read"),
    [
        (["2.25", "3", "4.25bpw"], ["2.25bpw", "3bpw", "4.25bpw"]),
        (["30", "1MB", "60 %"], ["30%", "1MB", "60 %"]),
        ([".5", "1.", "2MiB"], [".5MiB", "1.MiB", "2MiB"]),
        (["8B", "1MB"], ["8B", "1MB"]),
        (["2.25bpw", "3.25"], ["2.25bpw", "3.25"]),
        (["two", "3bpw"], ["two", "3bpw"]),
        ([], []),
    ],
)
def test_numbers_of_a_list_have_the_unit_of_the_last(texts, read):
    assert with_last_unit(texts) == read


@given(st.text(max_size=20))
def test_no_text_does_anything_but_parse_or_refuse(text):
    with contextlib.suppress(SettingsError):
        assert parse_size(text, DENSE, PARAMETERS) >= 1


@given(st.integers(1, 2**43))
def test_the_size_that_is_advised_is_enough_and_close(size):
    advised = parse_size(enough_size(size), DENSE, PARAMETERS)
    assert size <= advised <= size * 1.01 + 1


@given(st.integers(1, 2**52))
def test_sizes_are_shown_within_half_of_the_last_digit(size):
    value, unit = format_size(size).split()
    factor = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}[unit]
    assert abs(float(value) * factor - size) <= 0.005 * factor * 1.001
    assert float(value) < 1024 or unit == "TiB"


def budget(text, **changes):
    return read_budget(
        text,
        **{
            "dense_bytes": DENSE,
            "parameters": PARAMETERS,
            "smallest_bytes": 400_000,
            "kv_bytes": lambda context, concurrency: 1000 * context * concurrency,
            "longest_context": 4096,
            **changes,
        },
    )


def test_the_kv_cache_is_taken_from_the_weights():
    assert budget("1MB", context=100, concurrency=2) == Budget("1MB", 1_000_000, 100, 2, 200_000)
    assert budget("1MB", context=100, concurrency=2).weight_bytes == 800_000
    assert budget("1MB").weight_bytes == 1_000_000


def test_a_model_that_fits_needs_no_plan():
    assert budget(DENSE - 1).total_bytes == DENSE - 1
    with pytest.raises(BudgetError, match="already fits"):
        budget(DENSE)
    with pytest.raises(BudgetError, match="already fits"):
        budget("100%")
    assert budget("100%", context=1).weight_bytes == DENSE - 1000
    with pytest.raises(BudgetError, match="already fits"):
        budget(DENSE + 1000, context=1)


def test_below_the_smallest_plan_the_advice_is_exactly_enough():
    with pytest.raises(BudgetError, match="smallest possible") as caught:
        budget(399_999)
    assert "400000 bytes" in str(caught.value)
    advised = re.search(r"--memory (\S+)", caught.value.remedy)
    assert advised
    assert budget(advised[1]).weight_bytes >= 400_000
    assert budget(400_000).weight_bytes == 400_000


@pytest.mark.parametrize("concurrency", [1, 3])
@pytest.mark.parametrize("context", [700, 2000])
def test_where_the_kv_cache_leaves_too_little_the_longest_context_that_fits_is_named(context, concurrency):
    with pytest.raises(BudgetError, match="KV cache of") as caught:
        budget("1MB", context=context, concurrency=concurrency)
    fits = int(re.search(r"--context (\d+) would fit", caught.value.remedy)[1])
    assert budget("1MB", context=fits, concurrency=concurrency).weight_bytes >= 400_000
    with pytest.raises(BudgetError):
        budget("1MB", context=fits + 1, concurrency=concurrency)


def test_where_no_context_fits_it_says_so():
    with pytest.raises(BudgetError, match="no context fits"):
        budget(400_100, context=10)
    with pytest.raises(BudgetError, match="lower it"):
        budget(401_100, context=10, concurrency=1000)


@pytest.mark.parametrize(
    "options",
    [
        {"concurrency": 2},
        {"concurrency": 0, "context": 5},
        {"context": 0},
        {"context": -3},
        {"context": 4097},
    ],
)
def test_context_and_concurrency_that_make_no_sense_are_refused(options):
    with pytest.raises(SettingsError, match="--con"):
        budget("1MB", **options)
