"""What a grammar can't hold of a pattern is refused; anchors that say nothing are left out."""

from __future__ import annotations

import random
import re

import pytest

from tailorbird.errors import SettingsError
from tailorbird.serve.pattern import held


@pytest.mark.parametrize(
    "pattern",
    ["", "a", "^a$", "^a|b$", r"\^\$", "[$^]a", r"[\]^]+$", r"(?:a|b)*\d{2,3}", r"a\\", r"\w\W\x41"],
)
def test_other_patterns_are_the_same_afterwards(pattern: str) -> None:
    assert held(pattern) == pattern


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("^a$|^b$", "^a|b$"), ("(^a|^b)c$", "(a|b)c$"), ("a((b|c$)|d$)", "a((b|c)|d)"),
        ("a|^", "a|"), ("$|a", "|a"), ("(?:^(?:^a))|b", "(?:(?:a))|b"), ("(?<n>^a)$", "(?<n>a)$"),
    ],
)  # fmt: skip
def test_anchors_at_the_ends_of_the_text_say_nothing(pattern: str, expected: str) -> None:
    assert held(pattern) == expected


@pytest.mark.parametrize(
    "pattern",
    [
        "a^b",
        "a$b",
        "x*^a",
        "(^a)*",
        "(^a)?b^",
        "(a$)b",
        "((a$)|b)c",
        "a(^|b)",
        "$^",
        r"\Aa",
        r"a\Z",
        r"[\qa]",
        r"\e",
    ],
)
def test_what_xgrammar_would_pass_over_is_refused(pattern: str) -> None:
    with pytest.raises(SettingsError, match="where a grammar can't hold it"):
        held(pattern)


@pytest.mark.parametrize("seed", range(40))
def test_what_is_held_fits_the_same_texts(seed: int) -> None:
    rng = random.Random(seed)

    def drawn(depth: int) -> str:
        """A pattern with anchors anywhere."""
        branches = []
        for _ in range(rng.choice([1, 1, 2])):
            parts = rng.choices(["a", "b", "^", "$", "[^b]", r"\$", "G"], k=rng.randrange(4))
            groups = (
                f"({drawn(depth - 1)}){rng.choice(['', '', '*', '?'])}"
                for part in parts
                if part == "G" and depth
            )
            branches.append("".join(next(groups, "") if part == "G" else part for part in parts))
        return "|".join(branches)

    texts = ["".join(rng.choices("ab$^", k=rng.randrange(5))) for _ in range(300)]
    kept = 0
    for _ in range(60):
        pattern = drawn(2)
        try:
            found = held(pattern)
        except SettingsError:
            continue
        kept += 1
        inside = re.sub(r"\\.|\[\^b\]", "", found).removeprefix("^").removesuffix("$")
        assert not {"^", "$"} & set(inside)
        assert [bool(re.fullmatch(found, text)) for text in texts] == [
            bool(re.fullmatch(pattern, text)) for text in texts
        ]
    assert kept > 10
