"""A tuning that begins with a start: losses, stopping and going on, and what is refused before work."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from compressed import save_compressed
from forked import in_child
from tailorbird.adapt.settings import TuneSettings
from tailorbird.adapt.starts.eora import Eora
from tailorbird.adapt.tune import Data, preview_tuning, tune
from tailorbird.errors import ModelNotFound, SettingsError
from tailorbird.formats.packed import IntegerCoding
from tailorbird.model.load import load
from tailorbird.progress import Silent
from tiny import byte_tokenizer, save_model

SHORT: dict[str, Any] = {
    "method_settings": {"rank": 2}, "steps": 4, "batch": 2, "length": 48, "rate": 5e-3, "evaluate_every": 2,
    "save_every": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("source") / "m"))


@pytest.fixture(scope="module")
def packed(source: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("packed") / "m"
    save_compressed(directory, load(source), IntegerCoding(2, 32), tokenizer=byte_tokenizer())
    return str(directory)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    file = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [{"prompt": f"{n} plus {n} is ", "completion": f"{2 * n}, always"} for n in range(40)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Data(str(file), share=0.1)


class Stopping(Silent):
    """Kills the process once so many steps are done."""

    def __init__(self, after: int) -> None:
        self.left, self.tuning = after, False

    def stage(self, name: str, total: int) -> None:
        self.tuning = name == "tune"

    def advance(self, n: int = 1, note: str = "") -> None:
        if self.tuning and note:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir() if file.name.startswith("adapter_")}


def test_losses_are_those_of_the_packed_model_and_of_the_start(
    packed: str, source: str, data: Data, tmp_path: Path
) -> None:
    plain = tune(packed, data, tmp_path / "plain", TuneSettings(**SHORT))
    started = tune(packed, data, tmp_path / "out", TuneSettings(**SHORT, init="eora", source=source))
    assert started.loss_before == plain.loss_before
    history = json.loads((tmp_path / "out" / "history.json").read_text())
    assert history["loss_before_start"] == started.loss_before
    assert history["looks"][0]["step"] == 0
    assert history["looks"][0]["loss"] != started.loss_before
    assert started.loss_after == min(look["loss"] for look in history["looks"])
    origin = json.loads((tmp_path / "out" / "tailorbird.json").read_text())
    assert origin["method"]["init"] == "eora"


def test_a_killed_tuning_goes_on_without_beginning_anew(
    packed: str, source: str, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = TuneSettings(**SHORT, init="eora", source=source)
    whole = tune(packed, data, tmp_path / "whole", settings)
    out = tmp_path / "out"
    for after in (1, 2):  # the first leaves no state
        kill = Stopping(after)
        ended = in_child(lambda kill=kill: tune(packed, data, out, settings, progress=kill))
        assert ended == -signal.SIGKILL

    def refuse(self: Eora, given: Any) -> None:
        raise AssertionError("the start was computed again")

    monkeypatch.setattr(Eora, "__call__", refuse)
    resumed = tune(packed, data, out, settings, resume=True)
    assert contents(out) == contents(tmp_path / "whole")
    assert resumed.loss_before == whole.loss_before


def test_a_planned_adapter_begins_so_too(packed: str, source: str, data: Data, tmp_path: Path) -> None:
    rest = {key: value for key, value in SHORT.items() if key != "method_settings"}
    settings = TuneSettings(**rest, budget=20_000, init="loftq", source=source)
    result = tune(packed, data, tmp_path / "out", settings)
    assert result.loss_before is not None


def test_a_preview_says_what_it_doesnt_count(packed: str, source: str, data: Data) -> None:
    found = preview_tuning(packed, data, TuneSettings(**SHORT, init="apiq", source=source))
    assert any("`apiq`" in line for line in found.why)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"init": "loft"}, "did you mean `loftq`"),
        ({"method": "hydra"}, "`lora`, `rslora`, `lora-pro`, `allora`"),
        ({"method": "ia3", "method_settings": {}}, "`lora`, `rslora`, `lora-pro`, `allora`"),
    ],
)
def test_mistakes_are_told_before_work(
    changed: dict[str, Any], message: str, packed: str, source: str, data: Data, tmp_path: Path
) -> None:
    settings = TuneSettings(**{**SHORT, "init": "eora", "source": source, **changed})
    with pytest.raises(SettingsError, match=message):
        tune(packed, data, tmp_path / "out", settings)
    assert list(tmp_path.iterdir()) == []


def test_models_that_dont_fit_together_are_refused(
    packed: str, source: str, data: Data, tmp_path: Path
) -> None:
    for model, dense, message in ((source, source, "dense"), (packed, packed, "packed itself")):
        with pytest.raises(SettingsError, match=message):
            tune(model, data, tmp_path / "out", TuneSettings(**SHORT, init="loftq", source=dense))
    settings = TuneSettings(**SHORT, init="loftq", source=str(tmp_path / "none"))
    with pytest.raises(ModelNotFound):
        tune(packed, data, tmp_path / "out", settings)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("one", "other"), [("init", "source"), ("source", "init")])
def test_one_without_the_other_is_refused(one: str, other: str) -> None:
    with pytest.raises(SettingsError, match=f"--{one} without --{other}"):
        TuneSettings(**{one: "eora"})
