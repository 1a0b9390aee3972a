"""Methods that learn, inside a compression: nearer to the source, and a kill leaves no half of a result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from results import digests
from tailorbird import api
from tailorbird.compress.whole import stage
from tailorbird.model.writing import write_tensors
from tiny import save_model


def compress(model: Path, text: Path, output: Path, recipe: str, **settings: Any) -> api.FitResult:
    return api.compress(
        str(model), output, recipe=recipe, calibration=str(text), sequences=24, length=48,
        measure_speed=False, measure_spread=False, max_kl=100.0, max_perplexity_increase=1e9, **settings,
    )  # fmt: skip


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_each_stage_brings_a_result_nearer_to_its_source(
    text: Path, tmp_path: Path, architecture: str
) -> None:
    model = save_model(tmp_path / "model", architecture)
    learning = "distil.steps=60,distil.batch=4,distil.rate=0.02,distil.scale_rate=0.01"
    found = {
        name: compress(model, text, tmp_path / name.replace(":", "-"), recipe).kl_mean or 0.0
        for name, recipe in {
            "rtn": "rtn:bits=2,group=32",
            **{
                name: f"rtn+{name}:bits=2,group=32,{name}.steps=60,{name}.batch=4"
                for name in ("signround", "flexround", "efficientqat", "omniquant", "cbq")
            },
            "distil": f"rtn+distil:bits=2,group=32,{learning}",
        }.items()
    }
    for name in found.keys() - {"rtn"}:
        assert found[name] < 0.9 * found["rtn"], found


def test_a_fold_and_both_ways_of_learning_go_together(text: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "llama")
    recipe = "awq+gptq+signround+distil:bits=3,group=32,signround.steps=5,distil.steps=5"
    result = compress(model, text, tmp_path / "out", recipe)
    assert result.kl_mean is not None
    again = api.compress(
        str(model), tmp_path / "again", plan=tmp_path / "out" / "plan.yaml", calibration=str(text),
        sequences=24, length=48, measure_speed=False, measure_spread=False, max_kl=100.0,
        max_perplexity_increase=1e9,
    )  # fmt: skip
    assert again.kl_mean == result.kl_mean
    assert digests(tmp_path / "again") == digests(tmp_path / "out")


def test_a_method_that_chooses_its_own_grids_goes_between_a_fold_and_learning(
    text: Path, tmp_path: Path
) -> None:
    model = save_model(tmp_path / "model", "llama")
    recipe = "awq+decoupleq+signround:bits=3,group=32,rounds=1,signround.steps=2"
    assert compress(model, text, tmp_path / "out", recipe).kl_mean is not None


def test_a_kill_while_files_are_replaced_ends_with_the_same_bytes(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_model(tmp_path / "model", "llama")
    recipe = "gptq+signround+distil:bits=2,group=32,signround.steps=5,distil.steps=8"
    compress(model, text, tmp_path / "whole", recipe)
    left = 1

    def killed(path: Path, tensors: Any) -> None:
        nonlocal left
        if path.parent.name.endswith(".partial"):
            if not left:
                raise KeyboardInterrupt
            left -= 1
        write_tensors(path, tensors)

    with monkeypatch.context() as patched:
        patched.setattr(stage, "write_tensors", killed)
        with pytest.raises(KeyboardInterrupt):
            compress(model, text, tmp_path / "broken", recipe)
    compress(model, text, tmp_path / "broken", recipe, resume=True)
    assert digests(tmp_path / "broken") == digests(tmp_path / "whole")


def test_the_plan_tells_what_learning_did(text: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "llama")
    compress(model, text, tmp_path / "out", "rtn+signround:bits=2,group=32,signround.steps=3")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["plan"]["method"]["block_settings"]["steps"] == 3
