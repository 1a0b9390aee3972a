"""An effort is a recipe, gives way where memory is short, and says what each method gained."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tailorbird
from results import text_file
from tailorbird.compress import effort as efforts
from tailorbird.compress.effort import EFFORTS, methods_run, recipe_of
from tailorbird.compress.recipe import make_recipe
from tailorbird.errors import SettingsError
from tailorbird.plan import predict
from tailorbird.plan.predict import Prediction
from tiny import save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "model", "llama", num_hidden_layers=1)


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    """Texts, and nothing that takes long."""
    return {
        "calibration": str(text_file(tmp_path)), "sequences": 16, "length": 32, "max_kl": 100.0,
        "measure_speed": False, "measure_spread": False,
    }  # fmt: skip


@pytest.fixture
def short_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which all fits but learning the whole model."""
    foresee = efforts.foresee

    def foreseen(work: Any, output: Path) -> Prediction:
        found = foresee(work, output)
        return replace(found, available_bytes=1000) if work.recipe.whole is not None else found

    monkeypatch.setattr(efforts, "foresee", foreseen)


def test_each_effort_adds_a_method_to_that_below() -> None:
    fast, balanced, best = (EFFORTS[name] for name in ("fast", "balanced", "best"))
    assert balanced.startswith(fast + "+")
    assert best.startswith(balanced + "+")
    assert recipe_of(None, None) == recipe_of("fast", None) == make_recipe("gptq")
    assert recipe_of(None, "rtn") == make_recipe("rtn")


@pytest.mark.parametrize(("effort", "method"), [("fast", "gptq"), ("best", "rtn"), ("good", None)])
def test_an_effort_beside_a_method_and_an_unknown_one_are_refused(
    effort: str, method: str | None, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError):
        tailorbird.fit("demo", "30%", tmp_path / "out", effort=effort, method=method)
    assert not list(tmp_path.glob("out*"))


def test_a_dry_run_foresees_more_for_more(
    model: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "resident_bytes", lambda: 10**9)  # at each of them
    runs = [tailorbird.fit(str(model), "45%", dry_run=True, effort=effort, **settings) for effort in EFFORTS]
    assert [run.method for run in runs] == list(EFFORTS.values())
    stages = [{stage["name"]: stage for stage in run.stages}["compress"] for run in runs]
    assert sorted(stages, key=lambda stage: stage["seconds"]) == stages
    assert sorted(stages, key=lambda stage: stage["peak_rss_bytes"]) == stages


def test_the_best_gives_way_to_balanced_where_memory_is_short(
    model: Path, settings: dict[str, Any], short_of_memory: None, tmp_path: Path
) -> None:
    foreseen = tailorbird.fit(str(model), "45%", dry_run=True, effort="best", **settings)
    assert foreseen.method == EFFORTS["balanced"]
    result = tailorbird.fit(str(model), "45%", tmp_path / "out", effort="best", **settings)
    assert [method["name"] for method in result.methods] == ["gptq", "signround"]
    assert any("balanced was chosen" in warning for warning in result.warnings)
    learned = result.methods[1]
    assert learned["block_error_after"] < learned["block_error_before"]


def test_what_a_model_method_gained_is_in_result_report_and_plan(
    model: Path, settings: dict[str, Any], tmp_path: Path
) -> None:
    recipe = "gptq+signround+distil:bits=2,group=32,signround.steps=20,distil.steps=20,distil.batch=4"
    result = tailorbird.compress(str(model), tmp_path / "out", recipe=recipe, **settings)
    gptq, signround, distil = result.methods
    assert gptq == {"name": "gptq"}
    assert signround["block_error_after"] <= signround["block_error_before"]
    assert distil["kl_after"] <= distil["kl_before"]
    data = json.loads((tmp_path / "out" / "report.json").read_text())
    assert data["result"]["methods"] == data["plan"]["result"]["methods"] == result.methods
    page = (tmp_path / "out" / "report.html").read_text()
    assert "after signround" in page
    assert "after distil" in page


def test_a_block_that_was_left_as_it_was_gained_nothing() -> None:
    measured = {
        "layers.0": {"block_error_before": 0.5, "block_error_after": 0.25},
        "layers.1": {"block_error_before": 0.5, "block_error_after": 0.75},
        "layers.0.q": {"error": 0.1},
    }
    (_, learned) = methods_run(make_recipe("rtn+signround"), measured)
    assert learned == {
        "name": "signround", "block_error_before": 0.5, "block_error_after": 0.375, "tried": 2, "kept": 1,
    }  # fmt: skip
    measured["whole"] = {"kl_before": 0.1, "kl_after": 0.1}
    (*_, whole) = methods_run(make_recipe("rtn+distil"), measured)
    assert whole == {"name": "distil", "kl_before": 0.1, "kl_after": 0.1, "tried": 1, "kept": 0}
