"""Keys, rates, and what the gate writes down."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailorbird.serve.api.access import Keys, TokenBucket


def basic(text: str) -> str:
    return "Basic " + base64.b64encode(text.encode()).decode()


def test_each_key_is_a_tenant_of_its_own() -> None:
    keys = Keys(["one", "two"])
    assert keys.tenant("Bearer one") == "1"
    assert keys.tenant("bearer  two ") == "2"
    assert keys.tenant(basic("anybody:two")) == "2"
    assert Keys([]).tenant(None) == ""
    assert Keys([]).tenant("Bearer any") == ""


def test_admin_keys_are_let_in_and_they_alone_may_change_adapters() -> None:
    keys = Keys(["one", "both"], ["admin", "both"])
    assert [keys.tenant(f"Bearer {key}") for key in ("one", "both", "admin", "none")] == ["1", "2", "3", None]
    may = {header: keys.may_change_adapters(header) for header in ("Bearer one", "Bearer both", None)}
    assert may == {"Bearer one": False, "Bearer both": True, None: False}
    assert keys.may_change_adapters(basic("any:admin"))
    assert Keys(["one"]).may_change_adapters("Bearer one")
    assert Keys([]).may_change_adapters(None)


def test_admin_keys_alone_let_in_everybody_who_changes_nothing() -> None:
    keys = Keys([], ["admin"])
    assert [keys.tenant(header) for header in (None, "Bearer any", "Bearer admin")] == ["", "", "1"]
    assert [keys.may_change_adapters(header) for header in (None, "Bearer any", "Bearer admin")] == [
        False, False, True,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "header",
    [
        None, "", "Bearer", "Bearer ", "Bearer on", "Bearer onee", "Bearer ONE", "one", "Token one", "Basic",
        "Basic !!", basic("one"), basic("one:"), "Basic /w==", "Bearer \udcff", "Bearer one two",
    ],
)  # fmt: skip
def test_anything_else_is_a_stranger(header: str | None) -> None:
    assert Keys(["one", "two"]).tenant(header) is None


@given(st.floats(1, 600), st.lists(st.floats(0, 30), max_size=200))
def test_a_bucket_lets_no_more_through_than_a_burst_and_the_rate(
    per_minute: float, gaps: list[float]
) -> None:
    bucket, now, let = TokenBucket(per_minute), 0.0, 0
    for gap in gaps:
        now += gap
        wait = bucket.take(now)
        let += wait == 0
        assert let <= per_minute + now * per_minute / 60 + 1e-6
        assert 0 <= wait <= 60 / per_minute + 1e-6
        if wait:
            # Who waits as long as it says gets through.
            assert TokenBucket.take(_copy(bucket), now + wait + 1e-6) == 0


def _copy(bucket: TokenBucket) -> TokenBucket:
    copied = TokenBucket(bucket.per_minute)
    copied.level, copied.filled = bucket.level, bucket.filled
    return copied
