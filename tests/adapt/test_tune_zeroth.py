"""`tune` with methods of zeroth order: what it writes, and that it goes on bit for bit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tailorbird
from compressed import INT4, save_compressed
from tailorbird.adapt.score import Scorer
from tailorbird.adapt.settings import TuneSettings
from tailorbird.adapt.tune import Data, tune
from tailorbird.adapt.zeroth import ZerothStep
from tailorbird.errors import SettingsError
from tailorbird.model.checkpoint import open_checkpoint
from tailorbird.report.tuning import write_tuning_report
from tiny import byte_tokenizer, make_model, save_model


@pytest.fixture
def data(tmp_path: Path) -> Data:
    file = tmp_path / "data.jsonl"
    entries = [{"prompt": f"{n} + {n} =", "completion": f" {2 * n}"} for n in range(40)]
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return Data(str(file))


def settings(name: str, **own: Any) -> TuneSettings:
    return TuneSettings(
        name, own, steps=4, batch=2, length=48, rate=1e-3, evaluate_every=2, save_every=1, schedule="constant"
    )


def base(name: str, tmp_path: Path) -> str:
    directory = tmp_path / "base"
    if name == "qzo":
        save_compressed(directory, make_model("llama"), INT4, tokenizer=byte_tokenizer())
    else:
        save_model(directory)
    return str(directory)


@pytest.mark.parametrize(("name", "part"), [("mezo", "weight"), ("sparse-mezo", "weight"), ("qzo", "scales")])
def test_the_result_is_a_checkpoint_with_other_tensors_of_the_linears(
    name: str, part: str, tmp_path: Path, data: Data
) -> None:
    model = base(name, tmp_path)
    # without held-out examples what is kept is the last state, not the best
    result = tune(model, dataclasses.replace(data, share=0.0), tmp_path / "tuned", settings(name))
    assert result.steps == 4
    assert result.best_step is None
    source, tuned = open_checkpoint(model), open_checkpoint(str(tmp_path / "tuned"))
    tuned.weights.verify()
    assert (tuned.directory / "config.json").read_bytes() == (source.directory / "config.json").read_bytes()
    assert tuned.weights.names == source.weights.names
    other = {
        one
        for one in source.weights.names
        if not torch.equal(source.weights.read(one), tuned.weights.read(one))
    }
    linears = {one for one in source.weights.names if one.endswith(f"_proj.{part}")}
    assert other == linears
    loaded = tailorbird.load(tmp_path / "tuned")
    ids = tuned.tokenizer()("1 + 1 =", return_tensors="pt").input_ids
    assert torch.isfinite(loaded(ids).logits).all()
    assert name in write_tuning_report(tmp_path / "tuned").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "tuned" / "tailorbird.json").read_text())["base_name"] == model


@pytest.mark.parametrize("name", ["mezo", "sparse-mezo", "qzo"])
def test_what_is_scored_is_the_model_as_it_was_and_the_one_that_is_written(
    name: str, tmp_path: Path, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, scorers, said = base(name, tmp_path), list[Scorer](), list[list[list[int]]]()

    def right(scorer: Scorer) -> int:
        scorers.append(scorer)
        said.append([scorer._complete(question) for question in scorer.questions])
        return len(said)

    monkeypatch.setattr(Scorer, "right", right)
    scored = dataclasses.replace(settings(name), score="number", rate=1e-2)
    held_out = dataclasses.replace(data, share=0.2)
    result = tune(model, held_out, tmp_path / "tuned", scored)
    assert (result.score_before, result.score_after) == (1, 2)
    assert result.scored == len(said[0])
    assert result.best_step
    for directory, heard in zip((model, str(tmp_path / "tuned")), said, strict=True):
        again = Scorer("number", tailorbird.load(directory), scorers[0].tokenizer, scorers[0].questions)
        assert [again._complete(question) for question in again.questions] == heard


def test_of_another_method_it_is_that_methods_adapter(tmp_path: Path, data: Data) -> None:
    tune(base("mezo", tmp_path), data, tmp_path / "tuned", settings("mezo", method="lora", rank=2))
    config = json.loads((tmp_path / "tuned" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("LORA", 2)
    assert (tmp_path / "tuned" / "README.md").is_file()


@pytest.mark.parametrize("name", ["mezo", "qzo"])
def test_an_interrupted_tuning_ends_with_the_same_bytes(
    name: str, tmp_path: Path, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = base(name, tmp_path)
    tune(model, data, tmp_path / "whole", settings(name))
    finish = ZerothStep.finish

    def interrupted(step: ZerothStep) -> Any:
        if step._number == 2:
            raise KeyboardInterrupt
        return finish(step)

    with monkeypatch.context() as patched:
        patched.setattr(ZerothStep, "finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tune(model, data, tmp_path / "resumed", settings(name))
    tune(model, data, tmp_path / "resumed", settings(name), resume=True)
    whole, resumed = (
        {file.name: file.read_bytes() for file in (tmp_path / out).glob("*.safetensors")}
        for out in ("whole", "resumed")
    )
    assert whole
    assert whole == resumed


@pytest.mark.parametrize(
    ("changed", "message"), [({"rate_ratio": 4.0}, "rate ratio"), ({"clip": 1.0}, "own clip")]
)
def test_what_it_has_no_use_for_is_refused(
    changed: dict[str, Any], message: str, tmp_path: Path, data: Data
) -> None:
    wanted = TuneSettings("mezo", {"method": "lora"}, steps=1, **changed)
    with pytest.raises(SettingsError, match=message):
        tune(base("mezo", tmp_path), data, tmp_path / "tuned", wanted)
