"""`fit` counts what stands beside codes, and chooses among tables: its budget holds whatever is made."""

from __future__ import annotations

from pathlib import Path

import pytest

import tailorbird
from compressing import compress
from tailorbird.compress.result import FitResult
from tailorbird.errors import SettingsError
from tailorbird.formats.packed import CodebookCoding, FloatCoding, IntegerCoding, TableCoding, VectorCoding
from tailorbird.model.weights import Weights
from tailorbird.plan.planfile import load_plan

#: those that count on every run, and those that count where time is no object
QUICK = ("spqr", "ganq", "higgs+eora")
METHODS = (
    *QUICK,
    *(
        pytest.param(name, marks=pytest.mark.full)
        for name in ("gptq+eora", "spqr+lq-lora", "spqr+signround", "ganq+eora", "bcq")
    ),
)


def fitted(model: Path, output: Path, method: str, **settings: object) -> FitResult:
    return tailorbird.fit(
        str(model), "45%", output, method=method, sequences=4, length=32, measure_speed=False,
        measure_spread=False, allow_slower=True, max_kl=100.0, max_perplexity_increase=1e9, **settings,
    )  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_parts_beside_codes_count_in_the_budget(model: Path, text: Path, tmp_path: Path, method: str) -> None:
    result = fitted(model, tmp_path / "out", method, calibration=str(text))
    plan = load_plan(tmp_path / "out" / "plan.yaml")
    stored = Weights.open(Path(result.output))
    assert stored.total_bytes == result.weight_bytes <= result.budget_bytes
    kinds = {type(place.coding.coding()) for place in plan.places if place.block is not None}
    special = {"ganq": TableCoding, "bcq": TableCoding, "higgs": CodebookCoding | VectorCoding}
    assert kinds - {FloatCoding}
    expected = special.get(method.split("+")[0], IntegerCoding)
    assert all(issubclass(kind, expected) for kind in kinds - {FloatCoding})
    inside = [place for place in plan.places if place.block is not None]
    packed = [place for place in inside if place.coding.coding().kind != "float"]
    assert packed
    assert all((place.low_rank is not None) == ("lora" in method or "eora" in method) for place in packed)
    assert all((place.sparse is not None) == ("spqr" in method) for place in packed)
    assert all((place.transform is not None) == ("higgs" in method) for place in packed)


def test_the_plan_of_a_method_with_parts_makes_the_same(model: Path, text: Path, tmp_path: Path) -> None:
    fitted(model, tmp_path / "out", "spqr+eora", calibration=str(text))
    plan, sequences = tmp_path / "out" / "plan.yaml", {"sequences": 4, "length": 32}
    tailorbird.compress(
        str(model), tmp_path / "again", plan=plan, calibration=str(text), measure_speed=False,
        measure_spread=False, allow_slower=True, max_kl=100.0, max_perplexity_increase=1e9, **sequences,
    )  # fmt: skip
    for file in sorted((tmp_path / "out").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name


def test_a_correction_is_foreseen_to_lower_the_loss(model: Path, text: Path, tmp_path: Path) -> None:
    plain, corrected = (
        compress(model, text, tmp_path / name, f"{name}:bits=3,group=32") for name in ("rtn", "rtn+eora")
    )
    assert corrected.predicted["kl"] < 0.9 * plain.predicted["kl"]


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("spqr", {"min_speed": "1tok/s"}, r"--min-speed with outliers.*gptq, or leave out --min-speed"),
        ("ganq", {"target": "gguf"}, "--target gguf with tables"),
        ("gptq+eora", {"max_latency": "1s"}, "--max-latency with low-rank parts"),
        ("gptq+eora", {"allocator": "evopress"}, "--allocator evopress with low-rank parts"),
        ("higgs", {"min_speed": "1tok/s"}, "--min-speed with inputs that are rotated"),
        ("df11", {}, "a method of codes"),
        ("billm", {}, "a fit by `billm`.*binary=true"),
    ],
)
def test_what_the_planner_does_not_know_of_parts_is_refused(
    model: Path, tmp_path: Path, method: str, settings: dict[str, str], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        fitted(model, tmp_path / "out", method, **settings)


@pytest.mark.parametrize("method", ["spqr", pytest.param("higgs", marks=pytest.mark.full)])
def test_points_of_the_frontier_leave_the_plans_own_parts(
    model: Path, text: Path, tmp_path: Path, method: str
) -> None:
    result = fitted(model, tmp_path / "out", method, calibration=str(text), frontier=True)
    assert Weights.open(Path(result.output)).total_bytes == result.weight_bytes <= result.budget_bytes


@pytest.mark.parametrize("method", ["ganq", pytest.param("higgs", marks=pytest.mark.full)])
def test_whole_models_are_judged_with_ends_as_they_will_be(
    model: Path, text: Path, tmp_path: Path, method: str
) -> None:
    result = fitted(model, tmp_path / "out", method, calibration=str(text), allocator="ip-calibrated")
    assert result.weight_bytes <= result.budget_bytes
