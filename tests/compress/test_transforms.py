"""HIGGS in a compression: bytes known beforehand, resumed alike; run, served, tuned, merged and exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from compressing import compress, copied, killed_at_block, modules_of
from engines import Watched, engine
from results import digests
from tailorbird import api
from tailorbird.adapt.merged import merge_tuned, tune_to_merge
from tailorbird.adapt.settings import TuneSettings
from tailorbird.adapt.tune import Data
from tailorbird.errors import CheckpointError, ExportError, SettingsError
from tailorbird.evaluate.speed import linear_paths
from tailorbird.formats.modules import CompressedLinear
from tailorbird.kernels import native
from tailorbird.model.checkpoint import open_checkpoint
from tailorbird.model.load import load
from tailorbird.run.fused import obstacle
from tailorbird.run.generate import decode
from tailorbird.serve.request import Request, Sampling
from tiny import save_model

HIGGS = "higgs:codebook=gauss3,group=32,embedding_bits=8"


@pytest.fixture(scope="module")
def turned(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("turned") / "out"
    compress(model, text, output, HIGGS)
    return output


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_signs_are_all_that_it_adds(architecture: str, text: Path, tmp_path: Path) -> None:
    source = save_model(tmp_path / "model", architecture)
    coding = "codebook=gauss3,group=32,embedding_bits=8"
    plain = compress(source, text, tmp_path / "plain", f"rtn:{coding}")
    result = compress(source, text, tmp_path / "turned", f"higgs:{coding},block=16")
    added = 0
    for path, module in modules_of(tmp_path / "turned").items():
        inside = "layers" in path or "h." in path
        assert ("transform" in module) == inside
        if inside:
            block = module["transform"]["block"]
            assert block == min(16, module["in"] & -module["in"])
            added += module["in"]
    assert added > 0
    assert result.weight_bytes == plain.weight_bytes + added
    checkpoint = open_checkpoint(str(tmp_path / "turned"))
    assert checkpoint.parameters == open_checkpoint(str(source)).parameters
    loaded = load(tmp_path / "turned")
    parts = [module.transform for module in loaded.modules() if isinstance(module, CompressedLinear)]
    assert sum(part is not None for part in parts) == sum(
        "transform" in module for module in modules_of(tmp_path / "turned").values()
    )


def test_a_killed_run_ends_with_the_same_bytes(model: Path, turned: Path, text: Path, tmp_path: Path) -> None:
    with killed_at_block(1):
        compress(model, text, tmp_path / "out", HIGGS)
    compress(model, text, tmp_path / "out", HIGGS, resume=True)
    assert digests(tmp_path / "out") == digests(turned)


def test_a_plan_states_the_transform(model: Path, turned: Path, text: Path, tmp_path: Path) -> None:
    compress(model, text, tmp_path / "again", plan=turned / "plan.yaml")
    assert digests(tmp_path / "again") == digests(turned)
    plan = yaml.safe_load((turned / "plan.yaml").read_text())
    stated = {place["name"]: place["transform"] for place in plan["places"] if "transform" in place}
    assert stated == {name: m["transform"] for name, m in modules_of(turned).items() if "transform" in m}
    for place in plan["places"]:
        place.pop("transform", None)
    plan["method"]["block"] = 2
    (tmp_path / "plan.yaml").write_text(json.dumps(plan))
    compress(model, text, tmp_path / "small", plan=tmp_path / "plan.yaml")
    assert {name: modules_of(tmp_path / "small")[name]["transform"] for name in stated} == {
        name: {"block": 2} for name in stated
    }


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("rtn", {}, "none"),
        ("higgs", {"transform": {"block": 2}}, "blocks of 2"),
        ("higgs", {"transform": {"block": 3}}, "block 3"),
        ("higgs", {"coding": {"kind": "codebook", "codebook": "nf4", "group_size": 32}}, "codebook nf4"),
        ("higgs", {"coding": {"kind": "integer", "bits": 3, "group_size": 32}}, "codes of int3"),
        ("higgs", {"coding": {"kind": "float", "dtype": "bfloat16"}, "activation": None}, "none"),
    ],
)
def test_a_plan_that_contradicts_itself_is_refused(
    model: Path, turned: Path, text: Path, tmp_path: Path, method: str, change: dict[str, Any], message: str
) -> None:
    plan = yaml.safe_load((turned / "plan.yaml").read_text())
    plan["method"] = {"name": method}
    for place in plan["places"]:
        if "transform" in place:
            place.update(change)
    (tmp_path / "plan.yaml").write_text(json.dumps(plan))
    with pytest.raises(SettingsError, match=message):
        compress(model, text, tmp_path / "out", plan=tmp_path / "plan.yaml")


@pytest.fixture(scope="module")
def of_points(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("points") / "out"
    compress(model, text, output, "higgs:codebook=gauss2x4,group=32,embedding_bits=8")
    return output


def test_points_lose_less_than_values_one_by_one_in_as_many_bytes(
    model: Path, of_points: Path, text: Path, tmp_path: Path
) -> None:
    coding = "group=32,embedding_bits=8"
    alone = compress(model, text, tmp_path / "alone", f"higgs:codebook=gauss2,{coding}")
    points = compress(model, text, tmp_path / "again", plan=of_points / "plan.yaml")
    assert digests(tmp_path / "again") == digests(of_points)
    assert points.weight_bytes == alone.weight_bytes
    source = load(model, dtype=torch.float32)
    lost = {}
    for path in (of_points, tmp_path / "alone"):
        found = dict(load(path, dtype=torch.float32).named_modules())
        lost[path] = sum(
            float((found[name].weight - module.weight.detach()).square().sum())
            for name, module in source.named_modules()
            if isinstance(found[name], CompressedLinear) and found[name].signs is not None
        )
    assert lost[of_points] < 0.9 * lost[tmp_path / "alone"]
    kinds = {m["coding"]["kind"] for m in modules_of(of_points).values() if "transform" in m}
    assert kinds == {"vector"}


def test_points_run_are_served_exported_and_refused_where_nothing_holds_them(
    of_points: Path, tmp_path: Path
) -> None:
    model, again = (load(of_points, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    ids = torch.arange(40)[None] * 5
    with torch.no_grad():
        logits = model(ids).logits
        torch.testing.assert_close(again(ids).logits.float(), logits, rtol=0.1, atol=0.1)
        torch.testing.assert_close(model(ids[:, :7]).logits, logits[:, :7], rtol=1e-3, atol=1e-3)
    for to in ("compressed-tensors", "gguf"):
        with pytest.raises(ExportError, match=r"points of `gauss2x4`|no place in GGUF"):
            api.export(of_points, to, tmp_path / to)
    assert api.export(of_points, "dense", tmp_path / "dense").kl_mean < 1e-3


@pytest.mark.parametrize("part", ["codes", "scales"])
def test_points_that_are_damaged_are_refused_by_name(of_points: Path, tmp_path: Path, part: str) -> None:
    damaged = copied(of_points, tmp_path)
    file = next(damaged.glob("*.safetensors"))
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith(f".{part}"))
    tensors[name] = tensors[name][:, :-1].contiguous()
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=part):
        load(damaged)


@pytest.mark.parametrize("codebook", ["gauss2x4", "gauss3x2"])
def test_only_what_finds_points_goes_with_them(codebook: str) -> None:
    for recipe in ("gptq", "ganq", "awq+gptq"):
        with pytest.raises(SettingsError, match=f"codes of {codebook}"):
            api.compress("demo", "nowhere", recipe=f"{recipe}:codebook={codebook},group=64")
    with pytest.raises(SettingsError, match=f"codebook {codebook}"):
        api.compress("demo", "nowhere", recipe=f"higgs+signround:codebook={codebook},group=64")
    with pytest.raises(SettingsError, match="codebook 'gauss9x2'"):
        api.compress("demo", "nowhere", recipe="higgs:codebook=gauss9x2,group=64")


@pytest.mark.parametrize("recipe", ["higgs:bits=3", "higgs:codebook=nf4", "higgs:table=3"])
def test_other_codes_are_refused_before_work(recipe: str) -> None:
    with pytest.raises(SettingsError, match="higgs"):
        api.compress("demo", "nowhere", recipe=recipe)


def test_a_correction_stands_beside_it(model: Path, text: Path, tmp_path: Path) -> None:
    coding = "codebook=gauss2,group=32"
    before = compress(model, text, tmp_path / "before", f"higgs:{coding}")
    after = compress(model, text, tmp_path / "after", f"higgs+eora:{coding},eora.rank=16")
    assert after.kl_mean < before.kl_mean
    first, then = (
        next(m for m in load(tmp_path / name).modules() if isinstance(m, CompressedLinear))
        for name in ("before", "after")
    )  # whose inputs nothing before it changed
    assert torch.equal(first.codes, then.codes)
    assert torch.equal(first.signs, then.signs)
    assert then.low_rank is not None


@pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")
def test_it_generates_and_serves_in_compiled_blocks(turned: Path) -> None:
    model = load(turned, dtype=torch.float32)
    assert obstacle(model) is None
    assert any("gauss3 g32 · rotated fused" in path for path in linear_paths(model, 1))
    ids = torch.arange(40)[None] * 5
    with torch.no_grad():
        expected = model(ids).logits[:, -1].float()
    found = decode(model).read(ids)
    assert (found - expected).abs().max() <= 2e-2 * expected.abs().max()  # inputs in bytes
    made = engine(str(turned), max_sequences=4, step_tokens=24)
    assert made.info["path"] == "fused"
    run = Watched(made)
    for number in range(3):
        made.add(Request(str(number), (5, 9, 7 + number), 6, sampling=Sampling(temperature=0.0)))
    run.run()
    together = dict(run.tokens)
    alone = Watched(engine(str(turned), max_sequences=1, step_tokens=24))
    alone.engine.add(Request("1", (5, 9, 8), 6, sampling=Sampling(temperature=0.0)))
    alone.run()
    assert alone.tokens["1", 0] == together["1", 0]


def test_it_is_tuned_and_merged_and_keeps_its_format(turned: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"{n} plus {n} is ", "completion": f"{2 * n}, always"} for n in range(60)]
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = TuneSettings(
        method_settings={"rank": 2}, steps=6, batch=2, length=32, rate=2e-2, evaluate_every=2, save_every=1
    )
    tuned = tune_to_merge(str(turned), Data(str(data)), tmp_path / "out", settings)
    result = merge_tuned(tuned, str(turned), Data(str(data)), tmp_path / "out", settings, None)
    assert result.loss_after < result.loss_before
    assert result.merged["gain_kept"] >= 0.9
    before, after = (open_checkpoint(str(path)).weights for path in (turned, tmp_path / "out"))
    assert {name: before.info(name).shape for name in before.names} == {
        name: after.info(name).shape for name in after.names
    }
    signs = [name for name in before.names if name.endswith(".signs")]
    assert signs
    assert all(torch.equal(before.read(name), after.read(name)) for name in signs)
    assert any(
        not torch.equal(before.read(name), after.read(name))
        for name in before.names
        if name.endswith(".codes")
    )


def test_exports_hold_it_or_refuse_it_by_name(turned: Path, tmp_path: Path) -> None:
    for to, what in (("compressed-tensors", "levels of `gauss3`"), ("gguf", "no place in GGUF")):
        with pytest.raises(ExportError, match=what):
            api.export(turned, to, tmp_path / to)
    assert api.export(turned, "dense", tmp_path / "dense").kl_mean < 1e-3


def test_saved_by_transformers_it_is_the_same_model(turned: Path, tmp_path: Path) -> None:
    first = load(turned, dtype=torch.bfloat16)
    first.save_pretrained(tmp_path)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(load(tmp_path, dtype=torch.bfloat16)(ids).logits, first(ids).logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transform": {"block": 8, "signs": 1}}, "transform"),
        ({"transform": {"block": 2}}, "signs|shape"),
        ({"transform": {"block": 1 << 12}}, "divide the inputs"),
        ({"order": True}, "`order`"),
        ({"coding": {"kind": "float", "dtype": "bfloat16"}}, "beside float values"),
    ],
    ids=["more than its block", "another block", "a block that doesn't divide", "with an order", "floats"],
)
def test_what_the_config_states_wrongly_is_refused(
    turned: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    copied(turned, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    modules = config["quantization_config"]["modules"].values()
    next(module for module in modules if "transform" in module).update(change)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_a_damaged_file_is_refused_when_it_is_loaded(turned: Path, tmp_path: Path) -> None:
    copied(turned, tmp_path)
    name = next(name for name, module in modules_of(turned).items() if "transform" in module)
    for file in tmp_path.glob("*.safetensors"):
        tensors = load_file(file)
        if f"{name}.signs" in tensors:
            tensors[f"{name}.signs"][0, 0] = 0
            save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"`{name}`.*signs"):
        load(tmp_path)
