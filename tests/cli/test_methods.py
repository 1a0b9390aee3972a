"""`methods` lists what the api lists."""

from __future__ import annotations

import json
from typing import Any


def test_rows_are_shown_with_their_papers(command: Any, api: Any) -> None:
    out = command("methods", "--family", "quantize").out
    assert api.arguments == {"family": "quantize"}
    for text in ("gptq", "quantize", "linear method", "2210.17323", "Gram matrix", "integers", "1x gptq"):
        assert text in out


def test_json_is_the_list(command: Any, api: Any) -> None:
    (row,) = json.loads(command("methods", "--json").out)
    assert list(row) == ["name", "family", "kind", "paper", "needs", "fills", "cost", "memory"]
