"""What an adapter's files say is what PEFT makes of them, or is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from folded_models import save_folded
from peft_adapters import change_config, save, wrapped
from tailorbird.adapt.merge.adapter import LoraAdapter, write_lora
from tailorbird.adapt.save import ORIGIN
from tailorbird.errors import CheckpointError, SettingsError
from tailorbird.formats.peft import CONFIG_FILE, WEIGHTS_FILE
from tailorbird.linear.folds import FOLDS_FILE, shift_name
from tailorbird.linear.product import Product
from tailorbird.linear.rotate.weights import ROTATION_FILE
from tailorbird.model.anatomy import read_anatomy
from tailorbird.model.checkpoint import open_checkpoint, write_json, write_tensors
from tailorbird.model.identity import identity
from tailorbird.model.load import load
from tailorbird.model.weights import Weights
from tiny import make_model, save_model

LLAMA = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("base") / "model", "llama")


@pytest.fixture
def saved(base: Path, tmp_path: Path) -> Path:
    """A random LoRA for `base`."""
    return save(wrapped(load(base), peft.LoraConfig(r=3, target_modules=LLAMA)), tmp_path / "lora")


def opened(directory: Path, base: Path) -> LoraAdapter:
    checkpoint = open_checkpoint(str(base))
    return LoraAdapter.open(directory, checkpoint, read_anatomy(checkpoint))


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("llama", peft.LoraConfig(r=3, lora_alpha=5, target_modules=LLAMA)),
        ("llama", peft.LoraConfig(r=4, lora_alpha=5, use_rslora=True, target_modules=LLAMA)),
        (
            "llama",
            peft.LoraConfig(
                r=4, lora_alpha=5, target_modules=LLAMA,
                rank_pattern={"layers.1.self_attn.q_proj": 2, "v_proj": 6},
                alpha_pattern={"down_proj": 32, r"layers\.0\..*": 9},
            ),
        ),
        ("gpt2", peft.LoraConfig(r=3, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)),
    ],
    ids=["plain", "rslora", "patterns", "conv1d"],
)  # fmt: skip
def test_changes_are_those_that_peft_makes(architecture: str, config: Any, tmp_path: Path) -> None:
    directory = save_model(tmp_path / "model", architecture)
    made = wrapped(load(directory), config)
    adapter = opened(save(made, tmp_path / "lora"), directory)
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in made.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert set(adapter.names) == set(layers) != set()
    for name, layer in layers.items():
        expected = layer.get_delta_weight("default")
        expected = expected.T if architecture == "gpt2" else expected
        product = adapter.change(name)
        assert product is not None
        torch.testing.assert_close(product.delta(), expected)
        x = torch.randn(2, expected.shape[1])
        torch.testing.assert_close(
            product.output(x, lambda: pytest.fail("a weight was asked for"), None), x @ expected.T
        )
    assert adapter.change("model.layers.0.self_attn.o_proj") is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"peft_type": "VERA"}, "VERA"),
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"r": 0}, "`r`"),
        ({"r": 3.0}, "`r`"),
        ({"lora_alpha": "8"}, "lora_alpha"),
        ({"use_rslora": 1}, "use_rslora"),
        ({"alpha_pattern": {"(a+)+": 1}}, "alpha_pattern"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
    ],
)
def test_what_is_no_plain_lora_is_refused_by_name(
    saved: Path, base: Path, change: dict[str, Any], said: str
) -> None:
    change_config(saved, change)
    with pytest.raises(SettingsError) as caught:
        opened(saved, base)
    assert said in caught.value.given
    assert caught.value.remedy


def test_an_adapter_that_names_its_base_is_taken_for_that_alone(
    saved: Path, base: Path, tmp_path: Path
) -> None:
    other = save_model(tmp_path / "other", "llama", seed=1)
    write_json(saved / ORIGIN, {"base": identity(open_checkpoint(str(base)))})
    assert opened(saved, base).names
    with pytest.raises(SettingsError, match="identity"):
        opened(saved, other)


def test_tensors_that_do_not_fit_are_named(saved: Path, base: Path, tmp_path: Path) -> None:
    weights = Weights.open_file(saved / WEIGHTS_FILE)
    tensors = {name: weights.read(name) for name in weights.names}
    first = next(name for name in tensors if name.endswith("q_proj.lora_A.weight"))
    head = {"base_model.model.lm_head.lora_A.weight": torch.zeros(3, 64)}
    cases: dict[str, dict[str, torch.Tensor]] = {
        "is missing": {name: tensor for name, tensor in tensors.items() if name != first},
        "not \\[3, 64\\]": tensors | {first: torch.zeros(3, 63)},
        "lm_head.*belongs to no linear": tensors | head,
        "float8": tensors | {first: tensors[first].to(torch.float8_e4m3fn)},
        "there is none": {},
    }
    for said, changed in cases.items():
        write_tensors(saved / WEIGHTS_FILE, changed)
        with pytest.raises(CheckpointError, match=said):
            opened(saved, base)
    write_tensors(saved / WEIGHTS_FILE, tensors)
    other = save_model(tmp_path / "other", "llama", hidden_size=32)
    with pytest.raises(CheckpointError, match="q_proj"):
        opened(saved, other)


def test_files_that_are_not_there_or_pickled(saved: Path, base: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no directory"):
        opened(tmp_path / "none", base)
    (saved / WEIGHTS_FILE).rename(saved / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="pickled"):
        opened(saved, base)


@pytest.mark.parametrize("architecture", ["qwen2", "gemma2"])
def test_an_adapter_of_the_source_fits_its_folded_checkpoint(architecture: str, tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", architecture, num_key_value_heads=4)
    save_folded(source, tmp_path / "folded")
    made = wrapped(load(source), peft.LoraConfig(r=3, target_modules=[*LLAMA, "o_proj", "up_proj"]))
    saved = save(made, tmp_path / "lora", base_model_name_or_path=str(source))
    adapter = opened(saved, tmp_path / "folded")
    folded = load(tmp_path / "folded")
    with torch.no_grad():
        for name in adapter.names:
            product = adapter.change(name)
            assert product is not None
            folded.get_submodule(name).weight += product.delta()
        ids = torch.randint(0, 256, (1, 20), generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(folded(ids).logits, made(ids).logits, atol=2e-4, rtol=2e-4)
    change_config(saved, {"base_model_name_or_path": str(tmp_path / "folded")})
    own = opened(saved, tmp_path / "folded").change(adapter.names[0])
    layer = made.base_model.model.get_submodule(adapter.names[0])
    assert own is not None
    torch.testing.assert_close(own.delta(), layer.get_delta_weight("default"))
    change_config(saved, {"base_model_name_or_path": "somebody/else"})
    with pytest.raises(SettingsError, match="base_model_name_or_path"):
        opened(saved, tmp_path / "folded")


def test_an_adapter_of_the_source_is_refused_where_that_was_rotated(
    saved: Path, base: Path, tmp_path: Path
) -> None:
    rotated = Path(shutil.copytree(base, tmp_path / "rotated"))
    (rotated / ROTATION_FILE).write_text("{}")
    change_config(saved, {"base_model_name_or_path": str(base)})
    opened(saved, base)
    with pytest.raises(SettingsError, match="rotated against those of its source"):
        opened(saved, rotated)
    change_config(saved, {"base_model_name_or_path": str(rotated)})
    opened(saved, rotated)


def test_an_adapter_of_the_source_is_refused_where_inputs_were_shifted(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", "opt")
    shifted = Path(shutil.copytree(source, tmp_path / "shifted"))
    group = read_anatomy(open_checkpoint(str(source))).blocks[0].norm_groups[0]
    write_tensors(shifted / FOLDS_FILE, {shift_name(group): torch.ones(64)})
    made = wrapped(load(source), peft.LoraConfig(r=3, target_modules=["k_proj"]))
    saved = save(made, tmp_path / "lora", base_model_name_or_path=str(source))
    opened(saved, source)
    with pytest.raises(SettingsError, match="shifted against those of its source"):
        opened(saved, shifted)
    change_config(saved, {"base_model_name_or_path": str(shifted)})
    opened(saved, shifted)


def test_what_is_written_peft_reads_with_all_its_ranks(tmp_path: Path) -> None:
    model = make_model("llama")
    names = {"model.layers.0.self_attn.q_proj": 4, "model.layers.1.mlp.down_proj": 2}
    generator = torch.Generator().manual_seed(0)
    products = {}
    for name, rank in names.items():
        rows, columns = model.get_submodule(name).weight.shape
        up = torch.randn(rows, rank, generator=generator)
        products[name] = Product(up, torch.randn(rank, columns, generator=generator))
    size = write_lora(tmp_path / "lora", products, "base")
    assert size == Weights.open_file(tmp_path / "lora" / WEIGHTS_FILE).total_bytes
    made = peft.PeftModel.from_pretrained(model, tmp_path / "lora")
    for name, product in products.items():
        delta = made.base_model.model.get_submodule(name).get_delta_weight("default")
        torch.testing.assert_close(delta, product.delta())
    assert json.loads((tmp_path / "lora" / CONFIG_FILE).read_text())["r"] == 4
