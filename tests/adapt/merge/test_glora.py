"""GLoRA merged: the adapter's own forward in double precision, PEFT's merge, packed and folded models."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import tailorbird
import tuned
from compressed import INT4, save_compressed
from folded_models import save_folded
from peft_adapters import change_config, save, wrapped
from tailorbird.adapt.merge import glora
from tailorbird.adapt.merge.change import Change
from tailorbird.adapt.merge.gate import Survival
from tailorbird.adapt.merge.glora import GloraAdapter, Scaling
from tailorbird.adapt.merge.merge import MANIFEST
from tailorbird.adapt.methods.adapter import OWN_TYPE, Attached, Place
from tailorbird.adapt.methods.glora import Generalized
from tailorbird.adapt.places import places_of
from tailorbird.adapt.save import write_adapter
from tailorbird.adapt.wrap import attached as in_place
from tailorbird.errors import CheckpointError, GateRefused, SettingsError
from tailorbird.formats.packed import CodebookCoding
from tailorbird.formats.peft import CONFIG_FILE, PREFIX, WEIGHTS_FILE
from tailorbird.model.anatomy import read_anatomy
from tailorbird.model.checkpoint import open_checkpoint, write_tensors
from tailorbird.model.identity import identity
from tailorbird.model.load import load
from tailorbird.model.weights import Weights
from tiny import byte_tokenizer, make_model

IDS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(3))
#: attention with biases and feed-forward layers without, which PEFT knows; linears that it doesn't know
ARCHITECTURES = ("qwen2", "gpt2")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words, chance = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta"], random.Random(0)
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    lines = [json.dumps({"text": " ".join(chance.choices(words, k=25))}) for _ in range(12)]
    path.write_text("\n".join(lines))
    return path


@torch.no_grad()
def biased(architecture: str, **config: Any) -> Any:
    """A tiny model whose biases aren't zero."""
    model = make_model(architecture, **config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.normal_(0, 0.3, generator=generator)
    return model


def dense(directory: Path, architecture: str, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    biased(architecture, **config).to(dtype).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def packed(directory: Path, architecture: str, coding: Any = INT4) -> Path:
    save_compressed(directory, biased(architecture), coding, tokenizer=byte_tokenizer())
    return directory


def tuned_on(
    base: Path, directory: Path, size: float = 0.05, **changed: Any
) -> tuple[Any, dict[str, Place], Attached]:
    """Model, linears and a random GLoRA whose forms differ from linear to linear, written as by `tune`."""
    model, checkpoint = load(base, torch.float32).requires_grad_(False), open_checkpoint(str(base))
    places = places_of(model, read_anatomy(checkpoint))
    settings = tuned.SMALL["glora"] | changed
    method = tuned.shaken(tuned.attach(tuned.small("glora", **changed), places), size)
    method.before_step(0, 10)
    origin = {
        "base": identity(checkpoint), "base_name": str(base),
        "method": {"method": "glora", "method_settings": settings, "targets": ["all"], "seed": 1},
    }  # fmt: skip
    directory.mkdir()
    write_adapter(directory, places, method, list(places), str(base), origin)
    return model, places, method


def opened(directory: Path, base: Path) -> GloraAdapter:
    checkpoint = open_checkpoint(str(base))
    return GloraAdapter.open(directory, checkpoint, read_anatomy(checkpoint))


def merged(base: Path, adapter: Path, output: Path, text: Path, **settings: Any) -> Any:
    quick = {"data": str(text), "sequences": 8, "length": 32, "keep_share": 1e-6}
    return tailorbird.merge_adapter(str(base), adapter, output, **quick | settings)


def tensors(directory: Path) -> dict[str, Tensor]:
    weights = open_checkpoint(str(directory)).weights
    return {name: weights.read(name) for name in weights.names}


def adapted_logits(model: Any, places: dict[str, Place], method: Attached) -> Tensor:
    with in_place(model, places, method), torch.no_grad():
        logits: Tensor = model(input_ids=IDS, use_cache=False).logits
    return logits


def double(change: Change | None) -> Scaling:
    """The same change in double precision."""
    assert isinstance(change, Scaling)
    found: dict[str, Any] = {}
    for field in fields(change):
        one = getattr(change, field.name)
        found[field.name] = tuple(t.double() for t in one) if isinstance(one, tuple) else one
        if isinstance(one, Tensor):
            found[field.name] = one.double()
    return Scaling(**found)


@torch.no_grad()
def of_adapter(place: Place, addition: Any, x: Tensor) -> Tensor:
    """What a linear and the adapter beside it give, in double precision."""
    output: Tensor = copy.deepcopy(place.module).double()(x) + copy.deepcopy(addition).double()(x)
    return output


@pytest.mark.parametrize("tile", [1, 200, 1 << 20])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_in_double_precision_it_is_the_adapters_own_forward(
    architecture: str, tile: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(glora, "TILE_VALUES", tile)
    base = dense(tmp_path / "base", architecture)
    _, places, method = tuned_on(base, tmp_path / "a", 0.3)
    adapter = opened(tmp_path / "a", base)
    assert set(adapter.names) == set(places)
    own = json.loads((tmp_path / "a" / CONFIG_FILE).read_text())["peft_type"]
    assert own == ("GLORA" if architecture == "qwen2" else OWN_TYPE)
    for path, place in places.items():
        change, addition = double(adapter.change(path)), method.addition(path)
        assert isinstance(addition, Generalized)
        weight = place.weight().double()
        linear: Any = copy.deepcopy(place.module).double()
        bias = None if linear.bias is None else linear.bias.detach()
        x = torch.randn(2, 3, place.in_features, dtype=torch.float64)
        expected = of_adapter(place, addition, x)
        shifted = None if bias is None else change.moved_bias(weight, bias)
        found = torch.nn.functional.linear(x, change.moved(weight), bias if shifted is None else shifted)
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
        beside = linear(x) + change.output(x, lambda weight=weight: weight, bias)
        torch.testing.assert_close(beside, expected, atol=1e-12, rtol=1e-12)


def test_the_change_is_formed_for_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(glora, "TILE_VALUES", 100)
    change = Scaling(a=(torch.randn(40, 2), torch.randn(2, 30)))
    parts = list(change._tiles(torch.randn(40, 30)))
    assert [part.numel() for _, part in parts] == [90] * 13 + [30]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_dense_model_takes_it_in(architecture: str, dtype: torch.dtype, tmp_path: Path, text: Path) -> None:
    base = dense(tmp_path / "base", architecture, dtype)
    model, places, method = tuned_on(base, tmp_path / "a")
    plain = model(input_ids=IDS, use_cache=False).logits
    expected = adapted_logits(model, places, method)
    assert (expected - plain).norm() > 0.01 * plain.norm()
    result = merged(base, tmp_path / "a", tmp_path / "out", text)
    assert result.residual_adapter_bytes == 0
    before, after = tensors(base), tensors(tmp_path / "out")
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {
        n: (t.shape, t.dtype) for n, t in after.items()
    }
    parts = ("weight", "bias")
    changed = {f"{path}.{part}" for path in places for part in parts}
    for name in before:
        assert name in changed or torch.equal(before[name], after[name]), name
    found = load(tmp_path / "out", torch.float32)
    for path, place in places.items():
        addition, new = method.addition(path), found.get_submodule(path)
        assert isinstance(addition, Generalized)
        exact = of_adapter(place, addition, torch.eye(place.in_features, dtype=torch.float64))
        zero = of_adapter(place, addition, torch.zeros(1, place.in_features, dtype=torch.float64))
        weight = new.weight if place.transposed else new.weight.T
        step = torch.finfo(dtype).eps
        torch.testing.assert_close(weight.double(), exact - zero, atol=2e-8, rtol=step)
        if new.bias is not None:
            torch.testing.assert_close(new.bias.double(), zero[0], atol=2e-7, rtol=step)
    if dtype == torch.float32:
        logits = found(input_ids=IDS, use_cache=False).logits
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        assert result.kl_mean < 1e-7 < result.kl_base


@pytest.mark.parametrize(
    "config",
    [
        {"config_A_B": "lora", "config_C": "lora", "config_D_E": "vector"},
        {"config_A_B": "vector", "config_C": "vector", "config_D_E": "constant"},
        {"config_A_B": "constant", "config_C": "none", "config_D_E": "none"},
        {"config_A_B": "none", "config_C": "lora", "config_D_E": "constant"},
    ],
    ids=["lora", "vector", "constant", "none"],
)
def test_what_peft_trained_is_merged_as_peft_merges_it(
    config: dict[str, str], tmp_path: Path, text: Path
) -> None:
    base = dense(tmp_path / "base", "qwen2")
    targets = ["q_proj", "down_proj"]
    made = wrapped(load(base), peft.GloraConfig(r=2, target_modules=targets, **config), size=0.1)  # type: ignore[arg-type]
    merged(base, save(made, tmp_path / "a"), tmp_path / "out", text)
    expected = made.merge_and_unload().state_dict()
    found = load(tmp_path / "out").state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-5)
    assert any(not torch.equal(found[name], load(base).state_dict()[name]) for name in found)


@pytest.mark.parametrize("coding", [INT4, CodebookCoding("nf4", 32)], ids=["int4", "nf4"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_packed_model_keeps_its_format_and_comes_near_its_target(
    architecture: str, coding: Any, tmp_path: Path, text: Path
) -> None:
    base = packed(tmp_path / "base", architecture, coding)
    model, places, method = tuned_on(base, tmp_path / "a", 0.2)
    expected = adapted_logits(model, places, method)
    plain = model(input_ids=IDS, use_cache=False).logits
    result = merged(base, tmp_path / "a", tmp_path / "out", text, residual_rank=0)
    assert result.kl_mean < 0.5 * result.kl_base
    before, after = tensors(base), tensors(tmp_path / "out")
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {
        n: (t.shape, t.dtype) for n, t in after.items()
    }
    found = load(tmp_path / "out")
    logits = found(input_ids=IDS, use_cache=False).logits
    assert (logits - expected).norm() < 0.7 * (plain - expected).norm()
    for path, place in places.items():
        addition, new = method.addition(path), found.get_submodule(path)
        assert isinstance(addition, Generalized)
        delta, shift = addition.delta(), addition.bias_delta()
        left = place.weight() + delta - new.weight.detach()
        assert left.norm() < delta.norm(), path
        if shift is not None:
            old: Any = place.module.bias
            torch.testing.assert_close(new.bias, old + shift, atol=1e-6, rtol=1e-5)


def test_too_little_is_refused_and_kept(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = packed(tmp_path / "base", "qwen2")
    tuned_on(base, tmp_path / "a")
    monkeypatch.setattr(Survival, "share", 0.94)
    with pytest.raises(GateRefused):
        merged(base, tmp_path / "a", tmp_path / "out", text, keep_share=0.95, residual_rank=1)
    assert (tmp_path / "out.rejected" / MANIFEST).exists()
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_the_source_fits_its_folded_checkpoint(tmp_path: Path) -> None:
    source = dense(tmp_path / "source", "qwen2", num_key_value_heads=4)
    save_folded(source, tmp_path / "folded")
    config = peft.GloraConfig(
        r=2, target_modules=["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"], config_D_E="vector"
    )
    made = wrapped(load(source), config, size=0.1)
    saved = save(made, tmp_path / "a", base_model_name_or_path=str(source))
    adapter, folded = opened(saved, tmp_path / "folded"), load(tmp_path / "folded")
    with torch.no_grad():
        for name in adapter.names:
            change, linear = adapter.change(name), folded.get_submodule(name)
            assert change is not None
            weight, bias = change.moved(linear.weight), None
            if linear.bias is not None:
                bias = change.moved_bias(linear.weight, linear.bias)
            linear.weight.copy_(weight)
            if bias is not None:
                linear.bias.copy_(bias)
        torch.testing.assert_close(folded(IDS).logits, made(IDS).logits, atol=2e-4, rtol=2e-4)


# --- mistakes ------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Path]:
    """A model and an adapter in PEFT's layout."""
    base = dense(tmp_path / "base", "qwen2")
    tuned_on(base, tmp_path / "a")
    return base, tmp_path / "a"


def change_tensors(adapter: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    weights = Weights.open_file(adapter / WEIGHTS_FILE)
    write_tensors(adapter / WEIGHTS_FILE, change({name: weights.read(name) for name in weights.names}))


@pytest.mark.parametrize(
    ("tensors_of", "said"),
    [
        (lambda down: {f"{down}.glora_E.X": torch.zeros(64)}, "changes a bias, which"),
        (lambda down: {f"{down}.glora_A.Xd": torch.zeros(64, 5)}, r"is \[2, 160\], not \[5, 160\]"),
        (lambda down: {f"{down}.glora_B.Xu": None}, "`glora_B.Xu` of .* is missing"),
        (lambda down: {f"{down}.glora_F.X": torch.zeros(64)}, "none of GLoRA's"),
        (lambda down: {f"{PREFIX}lm_head.glora_A.X": torch.zeros(1)}, "belongs to no linear"),
        (lambda down: {f"{down}.glora_A.Xd": torch.zeros(64, 2).to(torch.float8_e4m3fn)}, "float8"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(
    tensors_of: Callable[[str], dict[str, Tensor | None]], said: str, saved: tuple[Path, Path]
) -> None:
    base, adapter = saved
    changes = tensors_of(f"{PREFIX}model.layers.0.mlp.down_proj")
    change_tensors(adapter, lambda old: {n: t for n, t in (old | changes).items() if t is not None})
    with pytest.raises(CheckpointError, match=said):
        opened(adapter, base)


def test_a_tensor_of_the_own_form_that_is_missing_is_named(tmp_path: Path) -> None:
    base = dense(tmp_path / "base", "gpt2")
    tuned_on(base, tmp_path / "a")
    name = "additions.transformer/h/0/attn/c_attn.forms"
    change_tensors(tmp_path / "a", lambda old: {n: t for n, t in old.items() if n != name})
    with pytest.raises(CheckpointError, match=r"`forms` of .* is missing"):
        opened(tmp_path / "a", base)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
    ],
)
def test_what_is_more_than_glora_is_refused_by_name(
    change: dict[str, Any], said: str, saved: tuple[Path, Path]
) -> None:
    change_config(saved[1], change)
    with pytest.raises(SettingsError) as caught:
        opened(saved[1], saved[0])
    assert said in caught.value.given


def test_another_model_and_numbers_that_are_not_finite_are_refused(
    saved: tuple[Path, Path], tmp_path: Path, text: Path
) -> None:
    base, adapter = saved
    other = dense(tmp_path / "other", "qwen2", num_hidden_layers=1)
    with pytest.raises(SettingsError, match="identity"):
        merged(other, adapter, tmp_path / "out", text)
    name = f"{PREFIX}model.layers.1.self_attn.q_proj.glora_E.X"
    change_tensors(adapter, lambda old: old | {name: torch.full((64,), float("nan"))})
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.q_proj"):
        merged(base, adapter, tmp_path / "out", text)
    assert not (tmp_path / "out.partial").exists()


def test_a_bias_that_its_dtype_cannot_hold_is_refused(tmp_path: Path, text: Path) -> None:
    base = dense(tmp_path / "base", "qwen2", torch.float16)
    tuned_on(base, tmp_path / "a")
    name = f"{PREFIX}model.layers.0.self_attn.q_proj.glora_E.X"
    change_tensors(tmp_path / "a", lambda old: old | {name: torch.full((64,), 1e5)})
    with pytest.raises(SettingsError, match=r"q_proj` with the adapter has a bias of up to 1e\+05"):
        merged(base, tmp_path / "a", tmp_path / "out", text)
