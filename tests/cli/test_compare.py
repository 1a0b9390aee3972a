"""`compare` hands lists on, prints one row for every cell, and its status says whether all have a result."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

LINE = ["compare", "m", "--budgets", "2bpw, 60%", "--methods", "rtn,awq+gptq", "-o", "d"]


def test_every_flag_reaches_the_call(command: Any, api: Any) -> None:
    flags = ["--calibration", "a.txt", "--evaluation", "b.txt", "--sequences", "4", "--length", "32"]
    assert command(*LINE, *flags, "--seed", "7").status == 0
    given = api.arguments
    assert (given["model"], given["output"]) == ("m", Path("d"))
    assert (given["budgets"], given["methods"]) == (["2bpw", "60%"], ["rtn", "awq+gptq"])
    assert (given["calibration"], given["evaluation"]) == ("a.txt", "b.txt")
    assert (given["sequences"], given["length"], given["seed"]) == (4, 32, 7)


def test_a_unit_behind_the_last_budget_counts_for_those_before_it(command: Any, api: Any) -> None:
    line = ["compare", "m", "--methods", "rtn", "-o", "d", "--budgets"]
    assert command(*line, "2.25,3.25, 4.25bpw").status == 0
    assert api.arguments["budgets"] == ["2.25bpw", "3.25bpw", "4.25bpw"]


def test_without_an_output_it_is_named_after_the_model(command: Any, api: Any) -> None:
    for model, name in (("demo", "demo"), ("hub/tiny-1.5", "tiny-1.5"), ("../models/mine/", "mine")):
        done = command("compare", model, "--budgets", "3bpw", "--methods", "rtn")
        assert done.status == 0
        assert api.calls[-1][1]["output"] == Path(f"{name}-compared")
        assert f"{name}-compared/comparison.html" in done.out


def test_a_row_for_every_cell_and_the_page_below(command: Any, api: Any) -> None:
    (cell,) = api.answers["compare"]
    api.answers["compare"] = [cell, replace(cell, budget="2bpw", failure="the gate refused")]
    done = command(*LINE)
    assert done.status == 0
    rows = [line for line in done.out.splitlines() if "gptq" in line]
    assert ["2bpw" in row for row in rows] == [False, True]
    assert "the gate refused" in rows[1]
    assert "d/comparison.html" in done.out


def test_a_cell_without_a_result_stands_there_and_exits_1(command: Any, api: Any) -> None:
    (cell,) = api.answers["compare"]
    nothing = dict.fromkeys(field.name for field in fields(cell))
    failed = replace(cell, **nothing | {"method": "rtn", "budget": "2bpw", "failure": "no memory"})
    api.answers["compare"] = [cell, failed]
    text, as_json = command(*LINE), command(*LINE, "--json")
    assert text.status == as_json.status == 1
    assert "no memory" in text.out
    assert [cell["failure"] for cell in json.loads(as_json.out)] == [None, "no memory"]
