"""`formats` lists what the api lists, and says which are behind."""

from __future__ import annotations

import json
from typing import Any


def test_rows_are_shown_with_what_they_take_and_hold(command: Any, api: Any) -> None:
    out = command("formats").out
    assert api.calls == [("formats", {})]
    for text in ("int3 g64", "3.297", "0.031", "0.777", "0.877", "less than above"):
        assert text in out


def test_json_is_the_list(command: Any, api: Any) -> None:
    (row,) = json.loads(command("formats", "--json").out)
    assert list(row) == ["name", "bits_per_weight", "gaussian_error", "capacity", "bound", "ahead"]
