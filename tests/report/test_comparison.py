"""The page of a comparison: one row per cell, the best of each budget, a figure that stands alone."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from tailorbird.errors import ResourceError
from tailorbird.report.comparison import (
    COLOURS,
    FIGURE,
    PAGE_NAME,
    SHAPES,
    comparison_rows,
    kl_by_bytes,
    standalone,
    write_comparison,
)

HOSTILE = "<script>alert('x')</script>"


def cell(method: str, budget: str, size: int | None, kl: float | None, **more: Any) -> dict[str, Any]:
    return {"method": method, "budget": budget, "total_bytes": size, "kl_mean": kl, **more}


CELLS = [
    cell("rtn", "2bpw", 2000, 0.5),
    cell("gptq", "2bpw", 2000, 0.25),
    cell("rtn", "3bpw", 3000, 0.03),
    cell("gptq", "3bpw", None, None, failure="no memory"),
]


def test_the_best_of_each_budget_is_marked() -> None:
    assert [row.best for row in comparison_rows(CELLS)] == [False, True, True, False]


def test_what_failed_says_why_and_shows_no_numbers() -> None:
    failed = comparison_rows(CELLS)[-1].texts
    assert failed[:2] == ("3bpw", "gptq")
    assert set(failed[2:-1]) == {"–"}
    assert failed[-1] == "no memory"


def test_the_figure_alone_is_xml_with_colours_of_its_own() -> None:
    many = [cell(f"method {n}", "2bpw", 2000, 0.1 + n) for n in range(len(COLOURS) * len(SHAPES) + 1)]
    for cells in (CELLS, many):
        figure = standalone(kl_by_bytes(cells))
        assert "var(" not in figure
        assert ElementTree.fromstring(figure).tag == "{http://www.w3.org/2000/svg}svg"


def test_colours_and_shapes_pair_differently_for_many_methods() -> None:
    pairs = [(n % len(COLOURS), n % len(SHAPES)) for n in range(len(COLOURS) * len(SHAPES))]
    assert len(set(pairs)) == len(pairs)


@pytest.mark.parametrize("cells", [[], CELLS[3:], [cell("rtn", "2bpw", 2000, 0.0)]])
def test_nothing_measured_gives_no_figure(cells: list[dict[str, Any]]) -> None:
    assert kl_by_bytes(cells) == ""


def test_texts_are_escaped_and_the_same_data_give_the_same_page(tmp_path: Path) -> None:
    data = {"model": HOSTILE, "cells": [*CELLS, cell(HOSTILE, HOSTILE, 10, 1.0, failure=HOSTILE)]}
    data |= {"warnings": [HOSTILE], "command": HOSTILE, "versions": {HOSTILE: HOSTILE}}
    (tmp_path / "comparison.json").write_text(json.dumps(data))
    page = write_comparison(tmp_path)
    first = page.read_bytes(), (tmp_path / "kl-by-bytes.svg").read_bytes()
    assert b"<script" not in first[0] + first[1]
    write_comparison(tmp_path)
    assert (page.read_bytes(), (tmp_path / "kl-by-bytes.svg").read_bytes()) == first


@pytest.mark.parametrize("name", [PAGE_NAME, FIGURE])
def test_a_page_or_figure_that_cannot_be_written_is_no_fault_of_ours(tmp_path: Path, name: str) -> None:
    (tmp_path / "comparison.json").write_text(json.dumps({"cells": CELLS}))
    (tmp_path / name).mkdir()
    with pytest.raises(ResourceError, match=f"{re.escape(name)} cannot be written"):
        write_comparison(tmp_path)
