"""Numbers as texts keep their value; the shared rows leave out what wasn't measured."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sample_report import sample
from tailorbird.report.table import (
    ABSENT,
    change_text,
    coding_bits,
    coding_text,
    dense_bytes,
    duration_text,
    is_loud,
    machine_facts,
    number_text,
    paths_text,
    rate_text,
    result_rows,
    size_text,
)

UNITS = {"B": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3, "TiB": 1024**4}


@given(st.integers(0, 900 * 1024**4))
def test_a_size_is_the_bytes_to_three_digits(count: int) -> None:
    value, unit = size_text(count).split()
    assert math.isclose(float(value) * UNITS[unit], count, rel_tol=0.006)
    assert len(value.replace(".", "")) <= 4


@given(st.floats(0.001, 1e6))
def test_a_duration_is_the_seconds_within_five_percent(seconds: float) -> None:
    factor = {"h": 3600, "min": 60, "s": 1}
    total = sum(
        float(n) * factor[unit] for n, unit in re.findall(r"([\d.e-]+) (h|min|s)", duration_text(seconds))
    )
    assert math.isclose(total, seconds, rel_tol=0.051)


@given(st.floats(-1e12, 1e12).filter(lambda x: abs(x) > 1e-12))
def test_a_number_reads_back_to_three_digits(value: float) -> None:
    assert math.isclose(float(number_text(value).replace(",", "")), value, rel_tol=0.0051)


@pytest.mark.parametrize("nothing", [None, math.nan, math.inf, "text", True, [1]])
def test_what_is_no_number_is_never_shown_as_zero(nothing: object) -> None:
    for shown in (
        size_text(nothing),
        duration_text(nothing),
        number_text(nothing),
        change_text(nothing, 2),
        change_text(2, nothing),
        rate_text(nothing, "B"),
    ):
        assert shown == ABSENT


def test_a_change_has_its_sign_unless_it_is_none() -> None:
    assert [change_text(100, after) for after in (103.14, 96.86, 99.99, 100.01)] == [
        *("+3.1 %", "−3.1 %", "±0.0 %", "±0.0 %")
    ]


def test_the_dense_size_follows_from_bits_per_weight() -> None:
    assert dense_bytes({"weight_bytes": 400, "bits_per_weight": 4.0}) == 1600
    assert dense_bytes({"weight_bytes": 400}) is None


def test_rows_hold_before_predicted_and_after() -> None:
    rows = {row.name: row for row in result_rows(sample()["result"])}
    assert (rows["perplexity"].source, rows["perplexity"].result) == ("5.813", "5.942")
    assert (rows["KL, mean"].predicted, rows["KL, mean"].result) == ("0.0161", "0.0183")
    assert rows["decoding, batch 1"].remark.endswith("1.87×")


def test_rows_without_a_result_are_left_out() -> None:
    assert result_rows({}) == []
    names = [row.name for row in result_rows({"kl_mean": 0.5, "perplexity_before": 3.0, "speed": None})]
    assert names == ["KL, mean"]


def test_codings_are_named_as_the_formats_name_them() -> None:
    packed = pytest.importorskip("tailorbird.formats.packed")
    for coding in (
        packed.IntegerCoding(4, 64),
        packed.IntegerCoding(8, 0),
        packed.IntegerCoding(3, 32, symmetric=True),
        packed.CodebookCoding("nf4", 64),
        packed.TableCoding(3),
        packed.TableCoding(4, "float16"),
        packed.BinaryCoding(64),
        packed.BinaryCoding(0, "float16"),
        packed.FloatCoding("bfloat16"),
        packed.FloatCoding("float32"),
    ):
        fields = packed.coding_to_dict(coding)
        assert coding_text(fields) == coding.label
        assert coding_bits(fields) == coding.bits


@pytest.mark.parametrize("odd", [None, {}, "int4", {"kind": "lattice"}])
def test_an_unknown_coding_is_shown_as_absent(odd: object) -> None:
    assert coding_text(odd) == ABSENT
    assert coding_bits(odd) is None


def test_only_warnings_in_capitals_are_loud() -> None:
    assert is_loud("SLOWER than the source")
    assert not any(map(is_loud, ["Slower", "A note", "", "KL is high"]))


def test_machine_facts_carry_units_and_devices() -> None:
    facts = dict(
        machine_facts(
            {
                "memory_bytes": 2**30,
                "read_bandwidth": 5e9,
                "matmul": {"bf16": 2e12, "int8": None},
                "devices": [{"name": "H200", "memory_bytes": 2**37}],
            }
        )
    )
    assert facts["memory"] == "1.00 GiB"
    assert facts["read bandwidth"] == "5.00 GB/s"
    assert facts["matmul, bf16"] == "2.00 TOP/s"
    assert facts["device: name"] == "H200"
    assert facts["device: memory"] == "128 GiB"


def test_paths_are_listed_with_their_counts() -> None:
    assert paths_text({"b": 2, "a": 1}) == "a (1), b (2)"
    assert paths_text(["x"]) == "x"
    assert paths_text(None) == "unknown paths"


def test_rows_say_what_methods_gained_that_measure_it() -> None:
    learned = [{"name": "gptq"}, {"name": "signround", "block_error_before": 0.02, "block_error_after": 0.01}]
    (row,) = result_rows({"methods": [*learned, {"name": "distil", "kl_before": None}]})
    assert (row.name, row.result) == ("after signround", "0.0100")
    assert "0.0200 before, −50.0 %" in row.remark
    assert "dropped" not in row.remark


def test_rows_say_what_was_tried_and_dropped() -> None:
    blocks = {
        "name": "signround", "block_error_before": 0.02, "block_error_after": 0.01, "tried": 6, "kept": 4,
    }  # fmt: skip
    whole = {"name": "distil", "kl_before": 0.1, "kl_after": 0.1, "tried": 1, "kept": 0}
    first, second = result_rows({"methods": [blocks, whole]})
    assert first.remark.endswith("mean error of blocks; dropped in 2 of 6")
    assert second.remark.endswith("kept-back text; dropped")
