"""FlatQuant in a compression: bytes known beforehand, resumed alike; run, tuned, merged and exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from compressing import compress, copied, killed_at_block, modules_of
from results import digests
from tailorbird import api
from tailorbird.adapt.merged import merge_tuned, tune_to_merge
from tailorbird.adapt.settings import TuneSettings
from tailorbird.adapt.tune import Data
from tailorbird.errors import CheckpointError, ExportError, SettingsError
from tailorbird.evaluate.speed import linear_paths
from tailorbird.formats.modules import CompressedLinear
from tailorbird.model.checkpoint import open_checkpoint
from tailorbird.model.load import load
from tailorbird.run.fused import obstacle
from tailorbird.run.generate import decode
from tiny import save_model

LEARNING = "flatquant.steps=30,flatquant.batch=4,flatquant.rate=0.01"
FLAT = f"rtn+flatquant:bits=2,group=32,activation=int4,embedding_bits=8,{LEARNING}"


@pytest.fixture(scope="module")
def flat(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("flat") / "out"
    compress(model, text, output, FLAT)
    return output


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_matrices_are_all_that_it_adds(architecture: str, text: Path, tmp_path: Path) -> None:
    source = save_model(tmp_path / "model", architecture)
    coding = "bits=2,group=32,activation=int4"
    plain = compress(source, text, tmp_path / "plain", f"rtn:{coding}")
    result = compress(source, text, tmp_path / "flat", f"rtn+flatquant:{coding},{LEARNING}")
    stated = {path: module["transform"] for path, module in modules_of(tmp_path / "flat").items()}
    added = 0
    for path, transform in stated.items():
        width = modules_of(tmp_path / "flat")[path]["in"]
        assert transform["matrices"] == "bfloat16"
        added += 2 * (transform["block"] ** 2 + (width // transform["block"]) ** 2)
    assert added > 0
    assert result.weight_bytes == plain.weight_bytes + added
    assert result.kl_mean < 0.9 * plain.kl_mean
    checkpoint = open_checkpoint(str(tmp_path / "flat"))
    assert checkpoint.parameters == open_checkpoint(str(source)).parameters


def test_linears_of_one_input_store_the_same_matrices(flat: Path) -> None:
    weights = open_checkpoint(str(flat)).weights
    queries = [name for name in weights.names if name.endswith("q_proj.left")]
    learned = [name for name in queries if not torch.equal(weights.read(name).diag(), torch.ones(8))]
    assert learned
    for name in learned:
        query, value, out = (
            weights.read(name.replace("q_proj", role)) for role in ("q_proj", "v_proj", "o_proj")
        )
        assert torch.equal(query, value)
        assert not torch.equal(query, out)


def test_a_killed_run_ends_with_the_same_bytes(model: Path, flat: Path, text: Path, tmp_path: Path) -> None:
    with killed_at_block(1):
        compress(model, text, tmp_path / "out", FLAT)
    compress(model, text, tmp_path / "out", FLAT, resume=True)
    assert digests(tmp_path / "out") == digests(flat)


def test_a_plan_states_the_matrices(model: Path, flat: Path, text: Path, tmp_path: Path) -> None:
    compress(model, text, tmp_path / "again", plan=flat / "plan.yaml")
    assert digests(tmp_path / "again") == digests(flat)
    plan = yaml.safe_load((flat / "plan.yaml").read_text())
    stated = {place["name"]: place["transform"] for place in plan["places"] if "transform" in place}
    assert stated == {name: m["transform"] for name, m in modules_of(flat).items() if "transform" in m}
    place = next(place for place in plan["places"] if "transform" in place)
    place["transform"]["block"] = 1
    (tmp_path / "plan.yaml").write_text(json.dumps(plan))
    with pytest.raises(SettingsError, match="blocks of 1 and matrices in bfloat16"):
        compress(model, text, tmp_path / "out", plan=tmp_path / "plan.yaml")


def test_learning_that_doesn_t_help_leaves_what_was_rounded(model: Path, text: Path, tmp_path: Path) -> None:
    coding = "bits=8,group=32"
    compress(model, text, tmp_path / "plain", f"rtn:{coding}")
    wild = "flatquant.steps=1,flatquant.batch=1,flatquant.clip_rate=60"
    compress(model, text, tmp_path / "flat", f"rtn+flatquant:{coding},{wild}")
    plain, kept = (load(tmp_path / name, dtype=torch.float32) for name in ("plain", "flat"))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, kept(ids).logits)


@pytest.mark.parametrize(
    "recipe",
    [
        "gptq+flatquant:bits=4",
        "rtn+eora+flatquant:bits=4",
        "rtn+flatquant+distil:bits=4",
        "rtn+flatquant:codebook=nf4",
        "rtn+flatquant:bits=4,flatquant.steps=0",
        "rtn+flatquant:bits=4,flatquant.clip_rate=-1",
    ],
)
def test_what_goes_with_it_in_no_way_is_refused_before_work(recipe: str) -> None:
    with pytest.raises(SettingsError, match="flatquant"):
        api.compress("demo", "nowhere", recipe=recipe)


def test_budgets_of_speed_and_other_formats_refuse_it(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--target gguf with inputs that are mixed"):
        api.fit("demo", "60%", tmp_path / "out", method="rtn+flatquant", target="gguf")


def test_a_fold_and_a_rotation_go_before_it(model: Path, text: Path, tmp_path: Path) -> None:
    recipe = "hadamard+smoothing+rtn+flatquant:bits=4,group=32,activation=int4,flatquant.steps=3"
    assert compress(model, text, tmp_path / "out", recipe).kl_mean is not None
    assert (tmp_path / "out" / "folds.safetensors").exists()


def test_it_runs_by_its_modules(flat: Path) -> None:
    model = load(flat, dtype=torch.float32)
    assert "mixed inputs" in str(obstacle(model))
    assert any("int2 g32 · mixed " in path for path in linear_paths(model, 1))
    ids = torch.arange(40)[None] * 5
    with torch.no_grad():
        expected = model(ids).logits[:, -1].float()
    found = decode(model).read(ids)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_it_is_tuned_and_merged_and_keeps_its_format(flat: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"{n} plus {n} is ", "completion": f"{2 * n}, always"} for n in range(60)]
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = TuneSettings(
        method_settings={"rank": 2}, steps=6, batch=2, length=32, rate=2e-2, evaluate_every=2, save_every=1
    )
    tuned = tune_to_merge(str(flat), Data(str(data)), tmp_path / "out", settings)
    result = merge_tuned(tuned, str(flat), Data(str(data)), tmp_path / "out", settings, None)
    assert result.loss_after < result.loss_before
    before, after = (open_checkpoint(str(path)).weights for path in (flat, tmp_path / "out"))
    assert set(before.names) == set(after.names)
    matrices = [name for name in before.names if name.endswith((".left", ".right"))]
    assert matrices
    assert all(torch.equal(before.read(name), after.read(name)) for name in matrices)


def test_exports_hold_it_or_refuse_it_by_name(model: Path, flat: Path, text: Path, tmp_path: Path) -> None:
    exact = tmp_path / "exact"
    compress(model, text, exact, FLAT.replace("activation=int4,", ""))
    for to in ("compressed-tensors", "gguf"):
        with pytest.raises(ExportError):
            api.export(exact, to, tmp_path / to)
    with pytest.raises(ExportError, match="inputs are rounded to int4"):
        api.export(flat, "dense", tmp_path / "dense")
    api.export(exact, "dense", tmp_path / "dense")
    dense = dict(load(tmp_path / "dense", dtype=torch.float32).named_modules())
    for name, module in load(exact, dtype=torch.float32).named_modules():
        if isinstance(module, CompressedLinear) and module.transform is not None:
            torch.testing.assert_close(dense[name].weight, module.packed().dequantize(), rtol=1e-2, atol=1e-4)


def test_saved_by_transformers_it_is_the_same_model(flat: Path, tmp_path: Path) -> None:
    first = load(flat, dtype=torch.bfloat16)
    first.save_pretrained(tmp_path)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(load(tmp_path, dtype=torch.bfloat16)(ids).logits, first(ids).logits)
    parts = [module.transform for module in first.modules() if isinstance(module, CompressedLinear)]
    assert any(part is not None and part.matrices == "bfloat16" for part in parts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block": 2, "matrices": "bfloat16"}, "left|right|shape"),
        ({"block": 7, "matrices": "bfloat16"}, "divide the inputs"),
        ({"block": 8, "matrices": "int8"}, "matrices"),
        ({"matrices": "bfloat16"}, "transform"),
    ],
    ids=["other orders", "orders that don't divide", "an unknown dtype", "no order"],
)
def test_what_the_config_states_wrongly_is_refused(
    flat: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    copied(flat, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    modules = config["quantization_config"]["modules"].values()
    next(module for module in modules if "transform" in module)["transform"] = change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_damaged_matrix_is_refused_when_it_is_loaded(flat: Path, tmp_path: Path, value: float) -> None:
    copied(flat, tmp_path)
    name = next(name for name, module in modules_of(flat).items() if "transform" in module)
    for file in tmp_path.glob("*.safetensors"):
        tensors = load_file(file)
        if f"{name}.left" in tensors:
            tensors[f"{name}.left"][0] = value
            save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"`{name}"):
        load(tmp_path)
