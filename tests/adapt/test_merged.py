"""Tuning and merging in one call: the same checkpoint as by two, at any stop, and what is refused at once."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tailorbird
from compressed import INT4, save_compressed
from forked import in_child
from tailorbird.adapt.data.store import prepare
from tailorbird.adapt.merge.gate import Survival
from tailorbird.adapt.merge.merge import MANIFEST
from tailorbird.adapt.merged import adapter_beside, merge_tuned, tune_to_merge, windows_of
from tailorbird.adapt.result import TuneResult
from tailorbird.adapt.settings import TuneSettings
from tailorbird.adapt.tune import Data, preview_tuning
from tailorbird.errors import GateRefused, ResumeError, SettingsError
from tailorbird.formats.peft import WEIGHTS_FILE
from tailorbird.model.checkpoint import open_checkpoint
from tailorbird.model.load import load
from tailorbird.progress import Silent
from tiny import byte_tokenizer, make_model, save_model

SHORT = TuneSettings(
    method_settings={"rank": 2}, steps=6, batch=2, length=48, rate=2e-2, evaluate_every=2, save_every=1
)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("dense") / "m"))


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("packed") / "m"
    save_compressed(directory, make_model("llama"), INT4, tokenizer=byte_tokenizer())
    return str(directory)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    file = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [{"prompt": f"{n} plus {n} is ", "completion": f"{2 * n}, always"} for n in range(60)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Data(str(file))


def run(model: str, data: Data, output: Path, settings: TuneSettings = SHORT, **more: Any) -> Any:
    tuned = tune_to_merge(model, data, output, settings, **more)
    return merge_tuned(tuned, model, data, output, settings, more.get("progress"))


def tensors(directory: Path | str) -> dict[str, torch.Tensor]:
    weights = open_checkpoint(str(directory)).weights
    return {name: weights.read(name) for name in weights.names}


def test_a_dense_model_takes_in_what_the_adapter_beside_it_adds(
    dense: str, data: Data, tmp_path: Path
) -> None:
    result = run(dense, data, tmp_path / "out")
    assert (result.output, result.adapter) == (str(tmp_path / "out"), str(tmp_path / "out.adapter"))
    assert result.merged["gain_kept"] == pytest.approx(1, abs=0.02)
    assert result.loss_after < result.loss_before
    peft = pytest.importorskip("peft")
    ids = torch.arange(40)[None]
    expected = peft.PeftModel.from_pretrained(load(dense), result.adapter)(ids).logits
    torch.testing.assert_close(load(tmp_path / "out")(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_packed_model_keeps_its_format(packed: str, data: Data, tmp_path: Path) -> None:
    result = run(packed, data, tmp_path / "out")
    assert result.merged["gain_kept"] >= 0.95
    before, after = tensors(packed), tensors(tmp_path / "out")
    assert {name: (one.shape, one.dtype) for name, one in before.items()} == {
        name: (one.shape, one.dtype) for name, one in after.items()
    }


class Killing(Silent):
    """Kills the process at the end of a stage's first steps."""

    def __init__(self, stage: str, after: int) -> None:
        self.wanted, self.left, self.now = stage, after, ""

    def stage(self, name: str, total: int) -> None:
        self.now = name

    def advance(self, n: int = 1, note: str = "") -> None:
        self.left -= self.now == self.wanted
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def test_killed_anywhere_it_ends_with_the_same_bytes(packed: str, data: Data, tmp_path: Path) -> None:
    run(packed, data, tmp_path / "whole")
    out = tmp_path / "out"
    for stage, after in (("tune", 3), ("merge", 1), ("measure", 1)):
        kill = Killing(stage, after)
        assert in_child(lambda kill=kill: run(packed, data, out, progress=kill)) == -signal.SIGKILL
        assert not out.exists()
    tuned = adapter_beside(out)
    result = run(packed, data, out, resume=True)
    files = [path.name for path in (tmp_path / "whole").iterdir() if path.suffix == ".safetensors"]
    assert files
    for name in files:
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    whole = adapter_beside(tmp_path / "whole")
    assert (tuned / WEIGHTS_FILE).read_bytes() == (whole / WEIGHTS_FILE).read_bytes()
    assert result.steps == 6
    assert result.loss_after is not None


def test_an_adapter_of_other_inputs_isnt_merged(dense: str, data: Data, tmp_path: Path) -> None:
    tune_to_merge(dense, data, tmp_path / "out", SHORT)
    with pytest.raises(ResumeError, match=r"out\.adapter"):
        tune_to_merge(dense, data, tmp_path / "out", replace(SHORT, seed=1))
    (tmp_path / "out").mkdir()
    with pytest.raises(SettingsError, match="exists already"):
        tune_to_merge(dense, data, tmp_path / "out", SHORT)


@pytest.mark.parametrize("method", ["mixlora", "goat", "full", "lomo", "mezo", "dora", "ia3", "layernorm"])
def test_what_cant_be_merged_is_refused_before_work(
    method: str, dense: str, data: Data, tmp_path: Path
) -> None:
    settings = replace(SHORT, method=method, method_settings={})
    with pytest.raises(SettingsError, match="a merge of what"):
        tune_to_merge(dense, data, tmp_path / "out", settings)
    with pytest.raises(SettingsError, match="a merge of what"):
        preview_tuning(dense, data, settings, to_merge=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["pissa", "loca", "elalora", "kasa"])
def test_other_changes_of_low_rank_are_merged(method: str, dense: str, data: Data, tmp_path: Path) -> None:
    settings = replace(SHORT, method=method, method_settings={}, steps=2)
    assert run(dense, data, tmp_path / "out", settings).merged["residual_rank"] == 0


@pytest.mark.parametrize("around", [None, "ist"])
def test_glora_is_merged_into_dense_and_packed_models(
    around: str | None, dense: str, packed: str, data: Data, tmp_path: Path
) -> None:
    own = {"rank": 2, "population": 2, "generations": 1, "kept": 1}
    named: dict[str, Any] = {"method": "glora"} if around is None else {"method": around}
    inner: dict[str, Any] = own if around is None else own | {"method": "glora"}
    settings = replace(SHORT, **named, method_settings=inner)
    for name, model in (("dense", dense), ("packed", packed)):
        result = run(model, data, tmp_path / name, settings)
        assert result.merged["gain_kept"] is None or result.merged["gain_kept"] >= 0.95
        assert result.merged["kl_base"] > 0
    ids = torch.arange(40)[None]
    peft = pytest.importorskip("peft")
    expected = peft.PeftModel.from_pretrained(load(dense), adapter_beside(tmp_path / "dense"))(ids).logits
    torch.testing.assert_close(load(tmp_path / "dense")(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_too_little_is_refused_and_the_adapter_stays(
    packed: str, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Survival, "share", 0.94)
    with pytest.raises(GateRefused, match=r"out\.adapter") as refused:
        run(packed, data, tmp_path / "out")
    result: Any = refused.value
    assert result.result.output == str(tmp_path / "out.rejected")
    assert (tmp_path / "out.rejected" / MANIFEST).exists()
    assert (tmp_path / "out.adapter" / WEIGHTS_FILE).exists()
    assert not (tmp_path / "out").exists()


def test_windows_hold_the_examples_in_order(data: Data, tmp_path: Path) -> None:
    examples, _ = prepare(
        data.source, byte_tokenizer(), tmp_path, length=48, validation=None, validation_share=0, seed=0,
        progress=Silent(),
    )  # fmt: skip
    order = torch.arange(len(examples)).numpy()[::-1].copy()
    stream = torch.cat([examples[int(index)].ids for index in order])
    windows = windows_of(examples, order, 16, 5)
    assert torch.equal(windows.ids, stream[:80].view(5, 16))
    whole = windows_of(examples, order, 1 << 20, 1)
    assert torch.equal(whole.ids[0], stream)


def test_the_call_and_the_command_do_both(dense: str, data: Data, tmp_path: Path) -> None:
    result = tailorbird.tune(dense, data.source, tmp_path / "out", steps=2, batch=2, length=48, merge=True)
    assert isinstance(result, TuneResult)
    assert result.report is not None
    assert Path(result.report) == tmp_path / "out.adapter" / "report.html"
    assert Path(result.report).exists()
    assert load(result.output) is not None
