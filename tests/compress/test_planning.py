"""Planning: how the sensitivity of a large model is found."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

import tailorbird
from tailorbird.compress import work as work_module
from tailorbird.progress import Silent
from tiny import save_model


class Notes(Silent):
    """Remembers the remarks."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def text_file(folder: Path) -> str:
    rng = random.Random(0)
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
    text = folder / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": " ".join(rng.choices(words, k=60))}) for _ in range(40)))
    return str(text)


def test_a_large_model_is_planned_from_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = save_model(tmp_path / "model"), text_file(tmp_path)
    predicted = {}
    for limit in (work_module.MOST_MEASURED_FLOPS, 0.0):
        monkeypatch.setattr(work_module, "MOST_MEASURED_FLOPS", limit)
        notes = Notes()
        result = tailorbird.fit(
            str(model), "40%", tmp_path / f"out-{limit}", calibration=text, sequences=8, length=32,
            measure_speed=False, measure_spread=False, progress=notes,
        )  # fmt: skip
        assert any("gradients" in line for line in notes.lines) == (limit == 0)
        predicted[limit] = result.predicted["kl"]
    measured, gradients = predicted.values()
    assert 0.5 * measured < gradients < 2 * measured


def test_a_fit_begins_with_what_every_stage_will_take_and_samples_nothing_to_know_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(work: work_module.Work) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(work_module, "open_texts", refuse)
    model, notes = save_model(tmp_path / "model"), Notes()
    dry = tailorbird.fit(str(model), "40%", dry_run=True)
    assert [stage["name"] for stage in dry.stages] == ["statistics", "sensitivity", "compress", "gate"]
    with pytest.raises(KeyboardInterrupt):
        tailorbird.fit(str(model), "40%", tmp_path / "out", progress=notes)
    for stage in dry.stages:
        assert any(line.startswith(f"predicted for {stage['name']}: ") for line in notes.lines)
    assert not (tmp_path / "out.partial").exists()


def test_a_recipe_uses_the_scores_that_a_fit_of_the_same_model_left(tmp_path: Path) -> None:
    model, text = save_model(tmp_path / "model"), text_file(tmp_path)
    quiet: dict[str, Any] = {"measure_speed": False, "measure_spread": False, "sequences": 8, "length": 32}
    tailorbird.fit(str(model), "40%", tmp_path / "fitted", calibration=text, **quiet)
    notes = Notes()
    tailorbird.compress(
        str(model),
        tmp_path / "known",
        recipe="gptq:bits=4,group=64",
        calibration=text,
        progress=notes,
        **quiet,
    )
    assert any("are known" in line for line in notes.lines)
    for recipe in ("rtn:bits=4,group=64", "gptq:bits=4,group=64,symmetric=true"):  # others, never measured
        notes = Notes()
        output = tmp_path / recipe.replace(":", "-")
        tailorbird.compress(str(model), output, recipe=recipe, calibration=text, progress=notes, **quiet)
        assert not any("are known" in line for line in notes.lines)
