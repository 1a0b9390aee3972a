"""JSON holds exactly what JSON can hold; tables that go to a file are not folded."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailorbird.cli.output import plain, print_json, print_table, working

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(values)
def test_json_values_stay_what_they_are(value: Any) -> None:
    assert json.loads(json.dumps(plain(value), allow_nan=False)) == value


def test_dataclasses_paths_and_numbers_that_json_lacks_are_converted() -> None:
    @dataclass(frozen=True)
    class Inner:
        path: Path
        size: float

    assert plain({"a": (Inner(Path("x"), math.nan), Inner(Path("y"), math.inf)), "b": {2, 1}}) == {
        "a": [{"path": "x", "size": None}, {"path": "y", "size": None}],
        "b": [1, 2],
    }


def test_what_has_no_form_in_json_is_an_error() -> None:
    with pytest.raises(TypeError, match="object"):
        plain({"a": object()})


def test_output_of_the_work_never_mixes_with_results(capsys: pytest.CaptureFixture[str]) -> None:
    with working():
        print("chatter")
    print_json([1])
    captured = capsys.readouterr()
    assert json.loads(captured.out) == [1]
    assert "chatter" in captured.err


def test_long_cells_stay_on_one_line_in_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("name", "text"), [("a" * 60, "[b]" + "c" * 100)], texts=(0, 1))
    assert any(
        "a" * 60 in line and "[b]" + "c" * 100 in line for line in capsys.readouterr().out.splitlines()
    )
