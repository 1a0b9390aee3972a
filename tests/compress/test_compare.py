"""A comparison measures what `fit` measures, each cell once, and outlives cells that fail."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tailorbird
from results import text_file
from tailorbird.compress import compare as comparing
from tailorbird.compress.result import FitResult
from tailorbird.errors import BudgetError, GateRefused, SettingsError
from tailorbird.progress import Silent
from tiny import save_model


class Told(Silent):
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.stages: list[str] = []

    def stage(self, name: str, total: int) -> None:
        self.stages.append(name)

    def of(self, name: str) -> int:
        """How often a stage of that name began."""
        return sum(stage.endswith(f": {name}") for stage in self.stages)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("source") / "model", "llama", num_hidden_layers=1)


@pytest.fixture(autouse=True)
def shared_scores(source: Path, own_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores are measured by the first test that needs them."""
    monkeypatch.setenv("TAILORBIRD_CACHE", str(source.parent / "cache"))


@pytest.fixture
def settings(source: Path) -> dict[str, Any]:
    """Texts, and few windows of them."""
    return {"calibration": str(text_file(source.parent)), "sequences": 4, "length": 32}


def table(
    source: Path, folder: Path, budgets: str, methods: str, settings: dict[str, Any]
) -> tuple[Any, Told]:
    told = Told()
    cells = tailorbird.compare(
        str(source), budgets.split(), methods.split(), folder, **settings, progress=told
    )
    return cells, told


def test_a_cell_is_what_fit_measures(source: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    (cell,), _ = table(source, tmp_path / "table", "45%", "gptq", settings)
    try:
        result = tailorbird.fit(
            str(source), "45%", tmp_path / "out", **settings, measure_speed=False, measure_spread=False
        )
    except GateRefused as refused:
        result = refused.result  # type: ignore[attr-defined]
    assert isinstance(result, FitResult)
    assert (cell.total_bytes, cell.kl_mean) == (result.total_bytes, result.kl_mean)
    assert (cell.perplexity_before, cell.perplexity) == (result.perplexity_before, result.perplexity_after)
    assert cell.top1_agreement == result.top1_agreement
    assert (cell.failure is None) == result.accepted


def test_a_table_grows_without_measuring_anything_again(
    source: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    folder = tmp_path / "table"
    first, told = table(source, folder, "45%", "gptq", settings)
    assert told.of("compress") == 1
    larger, told = table(source, folder, "45% 60%", "awq+gptq gptq", settings)
    assert [(c.budget, c.method) for c in larger] == [
        ("45%", "awq+gptq"), ("45%", "gptq"), ("60%", "awq+gptq"), ("60%", "gptq"),
    ]  # fmt: skip
    assert larger[1] == first[0]
    assert told.of("compress") == 3
    assert told.of("statistics") == 0  # scores are those of the linear method, which is the same
    again, told = table(source, folder, "45% 60%", "awq+gptq gptq", settings)
    assert (again, told.of("compress")) == (larger, 0)
    assert sorted(path.name for path in folder.iterdir()) == [
        "cells", "comparison.html", "comparison.json", "kl-by-bytes.svg",
    ]  # fmt: skip
    other, told = table(source, folder, "45%", "gptq", settings | {"seed": 1})
    assert (told.of("compress"), len(other)) == (1, 1)


def test_a_damaged_cell_is_measured_again(source: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    first, _ = table(source, tmp_path / "table", "45%", "rtn", settings)
    (path,) = (tmp_path / "table" / "cells").iterdir()
    path.write_text(path.read_text()[:100])
    again, told = table(source, tmp_path / "table", "45%", "rtn", settings)
    assert told.of("compress") == 1
    assert replace(again[0], seconds=0.0, peak_rss_bytes=0) == replace(
        first[0], seconds=0.0, peak_rss_bytes=0
    )


def test_a_cell_that_fails_stops_no_other_and_is_tried_again(
    source: Path, tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    make = comparing.make

    def failing(work: Any, *rest: Any, **options: Any) -> Any:
        if work.recipe.name == "rtn":
            raise ZeroDivisionError("by zero")
        return make(work, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(comparing, "make", failing)
        cells, _ = table(source, tmp_path / "table", "45%", "rtn gptq", settings)
    assert [cell.total_bytes is None for cell in cells] == [True, False]
    assert "by zero" in cells[0].failure
    cells, told = table(source, tmp_path / "table", "45%", "rtn gptq", settings)
    assert told.of("compress") == 1
    assert all(cell.total_bytes for cell in cells)


def test_a_budget_too_small_for_one_method_is_no_reason_against_another(
    source: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    cells, _ = table(source, tmp_path / "table", "26%", "gptq+eora gptq", settings)
    assert [cell.total_bytes is None for cell in cells] == [True, False]
    assert "the smallest possible plan" in cells[0].failure


def test_an_interruption_leaves_what_is_finished(
    source: Path, tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    make = comparing.make

    def interrupted(work: Any, *rest: Any, **options: Any) -> Any:
        if work.recipe.name == "gptq":
            raise KeyboardInterrupt
        return make(work, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(comparing, "make", interrupted)
        with pytest.raises(KeyboardInterrupt):
            table(source, tmp_path / "table", "45%", "rtn gptq", settings)
    _, told = table(source, tmp_path / "table", "45%", "rtn gptq", settings)
    assert told.of("compress") == 1


@pytest.mark.parametrize(
    ("budgets", "methods", "error"),
    [
        ("45%", "gptq gptqq", SettingsError),
        ("45%", "signround+gptq", SettingsError),
        ("45% 3bits", "gptq", SettingsError),
        ("45% 0.1bpw", "gptq", BudgetError),
        ("45% 100%", "gptq", BudgetError),
        ("45%", "", SettingsError),
        ("", "gptq", SettingsError),
    ],
)
def test_what_can_not_be_is_refused_before_work(
    source: Path, tmp_path: Path, settings: dict[str, Any], budgets: str, methods: str, error: type[Exception]
) -> None:
    with pytest.raises(error):
        table(source, tmp_path / "table", budgets, methods, settings)
    assert not (tmp_path / "table").exists()


def test_a_directory_that_holds_something_else_is_left_alone(
    source: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    for path in (tmp_path / "mine", tmp_path / "mine" / "notes.txt"):
        with pytest.raises(SettingsError, match="something else"):
            table(source, path, "45%", "rtn", settings)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
