"""Adapters of a source on its folded checkpoint: the source's logits, or a refusal that says what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from folded_models import save_folded
from peft_adapters import change_config, prompt, save, wrapped
from tailorbird.errors import SettingsError
from tailorbird.kernels import native
from tailorbird.linear.folds import FOLDS_FILE, shift_name
from tailorbird.linear.rotate.weights import ROTATION_FILE
from tailorbird.model.anatomy import read_anatomy
from tailorbird.model.checkpoint import open_checkpoint
from tailorbird.model.load import load
from tailorbird.model.writing import write_tensors
from tailorbird.serve.adapters.folded import folds_of
from tailorbird.serve.engine import Engine
from tailorbird.serve.interface import EngineOptions
from tiny import save_model

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")

TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
LORA = peft.LoraConfig(r=3, target_modules=TARGETS)
IDS = prompt(20)


@pytest.fixture(scope="module", params=["qwen2", "gemma2"])
def models(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source and its folded checkpoint."""
    folder = tmp_path_factory.mktemp(request.param)
    source = save_model(folder / "source", request.param, num_key_value_heads=4)
    save_folded(source, folder / "folded")
    return source, folder / "folded"


def adapter(source: Path, directory: Path, config: Any = LORA, **changes: Any) -> Path:
    save(wrapped(load(source), config), directory)
    change_config(directory, {"base_model_name_or_path": str(source)} | changes)
    return directory


def hidden(model: Path, path: Path | None) -> Tensor:
    """What leaves the last norm, under an adapter."""
    engine = Engine(EngineOptions(str(model)), log=lambda _: None)
    assert engine.store is not None
    if path is None:
        return engine.runner.hidden(IDS.tolist(), None)
    engine.store.register("a", path)
    return engine.runner.hidden(IDS.tolist(), engine.store.acquire("a"))


@pytest.mark.parametrize(
    "config",
    [
        LORA,
        peft.VeraConfig(r=8, target_modules=["q_proj", "v_proj"]),
        peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ],
    ids=lambda config: type(config).__name__,
)
def test_an_adapter_of_the_source_does_on_the_folded_model_what_it_does_there(
    models: tuple[Path, Path], config: Any, tmp_path: Path
) -> None:
    source, folded = models
    path = adapter(source, tmp_path / "a", config)
    expected, plain = hidden(source, path), hidden(source, None)
    torch.testing.assert_close(hidden(folded, None), plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(hidden(folded, path), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, plain, rtol=1e-2, atol=1e-2)


def test_an_adapter_of_the_folded_model_is_left_as_it_is(models: tuple[Path, Path], tmp_path: Path) -> None:
    _, folded = models
    tuned = wrapped(load(folded), LORA)
    path = save(tuned, tmp_path / "a", base_model_name_or_path=str(folded))
    with torch.no_grad():
        expected = tuned.base_model.model(IDS[None], output_hidden_states=True).hidden_states[-1][0]
    torch.testing.assert_close(hidden(folded, path), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("config", "changes", "said"),
    [
        (LORA, {"base_model_name_or_path": None}, "base_model_name_or_path"),
        (LORA, {"base_model_name_or_path": "elsewhere"}, "elsewhere"),
        (peft.LoraConfig(r=3, target_modules=TARGETS, use_dora=True), {}, "DoRA"),
        (peft.LoraConfig(r=3, target_modules=["v_proj"], lora_bias=True), {}, "biases"),
    ],
)
def test_one_that_may_not_fit_is_refused_when_it_is_registered(
    models: tuple[Path, Path], config: Any, changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    source, folded = models
    path = adapter(source, tmp_path / "a", config, **changes)
    engine = Engine(EngineOptions(str(folded)), log=lambda _: None)
    assert engine.store is not None
    with pytest.raises(SettingsError, match=said):
        engine.store.register("a", path)
    assert engine.adapters() == []
    unfolded = Engine(EngineOptions(str(source)), log=lambda _: None)
    assert unfolded.store is not None
    unfolded.store.register("a", path)


def test_one_of_the_source_is_refused_where_that_was_rotated(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    source, _ = models
    rotated = Path(shutil.copytree(source, tmp_path / "rotated"))
    (rotated / ROTATION_FILE).write_text("{}")
    engine = Engine(EngineOptions(str(rotated)), log=lambda _: None)
    assert engine.store is not None
    for named in (str(source), "elsewhere", None):
        with pytest.raises(SettingsError, match="rotated against those of its source"):
            engine.store.register("a", adapter(source, tmp_path / "a", base_model_name_or_path=named))
    engine.store.register("a", adapter(source, tmp_path / "b", base_model_name_or_path=str(rotated)))


def test_one_of_the_source_is_refused_where_inputs_were_shifted(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", "opt")
    shifted = Path(shutil.copytree(source, tmp_path / "shifted"))
    group = read_anatomy(open_checkpoint(str(source))).blocks[0].norm_groups[0]
    write_tensors(shifted / FOLDS_FILE, {shift_name(group): torch.ones(64)})
    engine = Engine(EngineOptions(str(shifted)), log=lambda _: None)
    assert engine.store is not None
    config = peft.LoraConfig(r=3, target_modules=["q_proj", "fc2"])
    for named in (str(source), "elsewhere", None):
        path = adapter(source, tmp_path / "a", config, base_model_name_or_path=named)
        with pytest.raises(SettingsError, match="shifted against those of its source"):
            engine.store.register("a", path)
    engine.store.register("a", adapter(source, tmp_path / "b", config, base_model_name_or_path=str(shifted)))
    config = peft.LoraConfig(r=3, target_modules=["fc2"])  # reads no norm
    engine.store.register("b", adapter(source, tmp_path / "c", config))


def test_a_checkpoint_without_folds_has_none(models: tuple[Path, Path]) -> None:
    source, folded = models
    assert folds_of(open_checkpoint(str(source))) is None
    found = folds_of(open_checkpoint(str(folded)))
    assert found is not None
    assert (found.served, found.source) == (str(folded), str(source))
    config = json.loads((source / "config.json").read_text())
    assert len(found.inputs) == 7 * config["num_hidden_layers"]
