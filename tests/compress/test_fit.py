"""`fit` on every architecture: inside the budget, loadable as any model, repeatable from its plan."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import tailorbird
from tailorbird.calibrate.stream import StreamingModel
from tailorbird.compress.result import FitResult
from tailorbird.errors import GateRefused, SettingsError
from tailorbird.formats.modules import CompressedLinear
from tailorbird.model.anatomy import read_anatomy
from tailorbird.model.checkpoint import open_checkpoint
from tailorbird.model.weights import Weights
from tailorbird.plan.budget import parse_size
from tailorbird.plan.places import places_of
from tailorbird.plan.planfile import load_plan
from tailorbird.progress import Silent
from tiny import ARCHITECTURES, save_model

BUDGET, OTHER_BUDGET = "45%", "60%"
#: checks of the gate that a model passes whatever its quality; random models may fail the others
QUALITY = {"divergence", "max-kl", "max-perplexity-increase"}
#: one untied, one tied with biases, one of Conv1D linears and one with soft caps; the others with `full`
ALWAYS = ("llama", "qwen2", "gpt2", "gemma2")


class Stages(Silent):
    """Remembers the stages that work announces."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def stage(self, name: str, total: int) -> None:
        self.names.append(name)


@dataclass(frozen=True)
class Fitted:
    """A fit of a tiny model, and what it was made with."""

    source: Path
    text: Path
    directory: Path
    result: FitResult
    stages: list[str]


def measured(command: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[FitResult, list[str]]:
    """The result of `fit` or `compress`, accepted or not, and the stages of the work."""
    stages = Stages()
    try:
        result = command(
            *arguments, **options, sequences=4, length=32, measure_speed=False, measure_spread=False,
            progress=stages,
        )  # fmt: skip
    except GateRefused as refused:
        result = refused.result  # type: ignore[attr-defined]
    return result, stages.names


def digests(directory: Path) -> dict[str, str]:
    """Hash of every file that holds weights or says how to read them."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.iterdir()
        if path.suffix == ".safetensors" or path.name in ("config.json", "model.safetensors.index.json")
    }


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=() if name in ALWAYS else pytest.mark.full) for name in sorted(ARCHITECTURES)
    ],
)
def fitted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One fit per architecture, with a cache that all its tests share."""
    folder = tmp_path_factory.mktemp(request.param)
    rng = random.Random(0)
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
    text = folder / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": " ".join(rng.choices(words, k=60))}) for _ in range(24)))
    source = save_model(folder / "model", request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TAILORBIRD_CACHE", str(folder / "cache"))
        result, stages = measured(tailorbird.fit, str(source), BUDGET, folder / "out", calibration=str(text))
    yield Fitted(source, text, Path(result.output), result, stages)
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def shared_cache(fitted: Fitted, own_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache of `fitted`, after the one of the test was set."""
    monkeypatch.setenv("TAILORBIRD_CACHE", str(fitted.source.parent / "cache"))


def test_the_result_is_sound_and_holds_within_the_budget(fitted: Fitted) -> None:
    result = fitted.result
    checkpoint = open_checkpoint(str(fitted.source))
    stored = Weights.open(fitted.directory).total_bytes
    assert result.budget_bytes == parse_size(BUDGET, 2 * checkpoint.parameters, checkpoint.parameters)
    assert result.total_bytes == result.weight_bytes == stored <= result.budget_bytes
    failed = [check for check in result.checks if not check["passed"] and check["name"] not in QUALITY]
    assert failed == []
    assert len(result.checks) > len(QUALITY)
    assert result.accepted == all(check["passed"] for check in result.checks)


def test_the_budget_is_used_as_far_as_choices_allow(fitted: Fitted) -> None:
    # one step up at the smallest place would cost less than this
    assert fitted.result.total_bytes > 0.9 * fitted.result.budget_bytes


def test_transformers_loads_it_and_agrees_with_streaming(fitted: Fitted) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(fitted.directory).eval()
    ids = torch.randint(0, 258, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model(ids).logits.float()
        checkpoint = open_checkpoint(str(fitted.directory))
        streaming = StreamingModel(checkpoint, read_anatomy(checkpoint))
        hidden = streaming.embed(ids)
        for block in streaming.anatomy.blocks:
            hidden = streaming.run_block(streaming.load_block(block.index), block.index, hidden)
        torch.testing.assert_close(whole, streaming.logits(hidden), atol=1e-4, rtol=1e-4)


def test_its_plan_makes_the_same_bytes(fitted: Fitted, tmp_path: Path) -> None:
    plan = load_plan(fitted.directory / "plan.yaml")
    source = read_anatomy(open_checkpoint(str(fitted.source)))
    assert {place.name for place in plan.places} == {place.name for place in places_of(source)}
    result, _ = measured(
        tailorbird.compress, str(fitted.source), tmp_path / "again",
        plan=fitted.directory / "plan.yaml", calibration=str(fitted.text),
    )  # fmt: skip
    assert digests(Path(result.output)) == digests(fitted.directory)


def test_what_the_plan_says_of_inputs_is_what_the_loaded_linears_do(fitted: Fitted, tmp_path: Path) -> None:
    def rounding(directory: Path) -> set[str]:
        model = tailorbird.load(directory)
        return {n for n, m in model.named_modules() if isinstance(m, CompressedLinear) and m.rounds}

    plan = load_plan(fitted.directory / "plan.yaml")
    source = read_anatomy(open_checkpoint(str(fitted.source)))
    head = {source.embedding: source.head} if source.tied else {}
    stated = {head.get(place.name, place.name) for place in plan.places if place.activation == "int8"}
    assert stated
    assert rounding(fitted.directory) == stated
    kept = next(place.name for place in plan.places if place.activation and place.block is not None)
    edited = yaml.safe_load((fitted.directory / "plan.yaml").read_text())
    for place in edited["places"]:
        place["activation"] = "int8" if place["name"] == kept else None
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(edited))
    measured(
        tailorbird.compress, str(fitted.source), tmp_path / "out",
        plan=tmp_path / "plan.yaml", calibration=str(fitted.text),
    )  # fmt: skip
    assert rounding(tmp_path / "out") == {kept}


def test_a_plan_that_rounds_the_inputs_of_floats_is_refused(fitted: Fitted, tmp_path: Path) -> None:
    edited = yaml.safe_load((fitted.directory / "plan.yaml").read_text())
    place = next(place for place in edited["places"] if place.get("activation"))
    place["coding"] = {"kind": "float", "dtype": "float16"}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(edited))
    with pytest.raises(SettingsError, match=place["name"]):
        tailorbird.compress(
            str(fitted.source), tmp_path / "out", plan=tmp_path / "plan.yaml", calibration=str(fitted.text)
        )
    assert not list(tmp_path.glob("out*"))


def test_an_activation_where_none_can_be_rounded_is_passed_over(fitted: Fitted, tmp_path: Path) -> None:
    edited = yaml.safe_load((fitted.directory / "plan.yaml").read_text())
    for place in edited["places"]:
        if place["coding"]["kind"] == "integer":
            place["activation"] = "int8"
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(edited))
    measured(
        tailorbird.compress, str(fitted.source), tmp_path / "out",
        plan=tmp_path / "plan.yaml", calibration=str(fitted.text),
    )  # fmt: skip


def test_another_budget_is_solved_without_reading_the_model_again(fitted: Fitted, tmp_path: Path) -> None:
    assert "statistics" in fitted.stages
    result, stages = measured(
        tailorbird.fit, str(fitted.source), OTHER_BUDGET, tmp_path / "larger", calibration=str(fitted.text)
    )
    assert "statistics" not in stages
    assert "sensitivity" not in stages
    assert fitted.result.total_bytes < result.total_bytes <= result.budget_bytes
