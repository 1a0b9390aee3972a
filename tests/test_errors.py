"""What an error suggests is close to what was given, or all there is."""

from __future__ import annotations

import pytest

from tailorbird.errors import nearest

KNOWN = ("group", "residual", "damping", "clip_search")


@pytest.mark.parametrize(
    ("given", "meant"), [("grup", "group"), ("dampening", "damping"), ("group", "group")]
)
def test_a_slip_is_answered_with_what_was_meant(given: str, meant: str) -> None:
    assert nearest(given, KNOWN) == f"did you mean `{meant}`?"


@pytest.mark.parametrize("given", ["grid", "", "bits", "x" * 100])
def test_what_is_close_to_nothing_is_answered_with_everything(given: str) -> None:
    assert nearest(given, KNOWN) == "choose one of `clip_search`, `damping`, `group`, `residual`"
