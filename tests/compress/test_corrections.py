"""Corrections, inside a compression: nearer to the source, resumed to the same bytes, run and exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from compressed import linears
from compressing import compress, killed_at_block
from results import digests
from tailorbird import api
from tailorbird.errors import CheckpointError, ExportError, SettingsError
from tailorbird.formats.modules import CompressedLinear
from tailorbird.formats.packed import LowRank
from tailorbird.kernels import native
from tailorbird.model.checkpoint import open_checkpoint
from tailorbird.model.load import load
from tailorbird.run.fused import obstacle
from tailorbird.run.generate import decode
from tiny import save_model

EORA = "gptq+eora:bits=2,group=32,eora.rank=8"


@pytest.fixture(scope="module")
def corrected(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("corrected") / "out"
    compress(model, text, output, EORA)
    return output


def errors(output: Path) -> dict[str, float]:
    places = json.loads((output / "report.json").read_text())["plan"]["places"]
    return {place["name"]: place["measured"]["error"] for place in places if place["measured"]}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_every_linear_is_nearer_and_the_bytes_are_those_of_the_parts(
    text: Path, tmp_path: Path, architecture: str
) -> None:
    source = save_model(tmp_path / "model", architecture)
    recipes = {"plain": "rtn:bits=2,group=32", "eora": "rtn+eora:bits=2,group=32,eora.rank=8"}
    found = {name: compress(source, text, tmp_path / name, recipe) for name, recipe in recipes.items()}
    before, after = errors(tmp_path / "plain"), errors(tmp_path / "eora")
    first = next(iter(before))  # what comes after it reads other inputs
    assert after[first] < before[first]
    assert sum(after.values()) < sum(before.values())
    parts = [m.low_rank for m in load(tmp_path / "eora").modules() if isinstance(m, CompressedLinear)]
    assert parts == [LowRank(8)] * len(before)
    modules = json.loads((tmp_path / "eora" / "config.json").read_text())["quantization_config"]["modules"]
    added = sum(2 * 8 * (module["out"] + module["in"]) for module in modules.values())
    assert found["eora"].weight_bytes == found["plain"].weight_bytes + added
    checkpoint = open_checkpoint(str(tmp_path / "eora"))
    assert checkpoint.parameters == open_checkpoint(str(source)).parameters


def test_a_killed_run_ends_with_the_same_bytes(
    model: Path, corrected: Path, text: Path, tmp_path: Path
) -> None:
    with killed_at_block(1):
        compress(model, text, tmp_path / "out", EORA)
    compress(model, text, tmp_path / "out", EORA, resume=True)
    assert digests(tmp_path / "out") == digests(corrected)


def test_a_plan_states_the_parts_and_another_rank_where_it_is_edited(
    model: Path, corrected: Path, text: Path, tmp_path: Path
) -> None:
    compress(model, text, tmp_path / "again", plan=corrected / "plan.yaml")
    assert digests(tmp_path / "again") == digests(corrected)
    plan = yaml.safe_load((corrected / "plan.yaml").read_text())
    places = {place["name"]: place for place in plan["places"]}
    edited, bare, *_ = [name for name, place in places.items() if "low_rank" in place]
    places[edited]["low_rank"]["rank"] = 3
    del places[bare]["low_rank"]
    (tmp_path / "plan.yaml").write_text(json.dumps(plan))
    compress(model, text, tmp_path / "edited", plan=tmp_path / "plan.yaml")
    result = load(tmp_path / "edited")
    assert result.get_submodule(edited).low_rank == LowRank(3)
    assert result.get_submodule(bare).low_rank is None


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("rtn", {}, "neither"),
        ("gptq+eora", {"low_rank": None}, "neither"),
        ("gptq+eora", {"low_rank": {"rank": 1000, "dtype": "bfloat16"}}, "smaller side"),
        ("gptq+eora", {"low_rank": {"rank": 0, "dtype": "bfloat16"}}, "rank 0"),
        ("gptq+eora", {"coding": {"kind": "float", "dtype": "bfloat16"}, "activation": None}, "beside codes"),
    ],
)
def test_a_plan_that_contradicts_itself_is_refused(
    model: Path, corrected: Path, text: Path, tmp_path: Path, name: str, change: dict[str, Any], message: str
) -> None:
    plan = yaml.safe_load((corrected / "plan.yaml").read_text())
    plan["method"] = {"name": name}
    for place in plan["places"]:
        if "low_rank" in place:
            place.update(change)
    (tmp_path / "plan.yaml").write_text(json.dumps(plan))
    with pytest.raises(SettingsError, match=message):
        compress(model, text, tmp_path / "out", plan=tmp_path / "plan.yaml")


def test_what_learns_afterwards_keeps_the_part(model: Path, text: Path, tmp_path: Path) -> None:
    learning = "signround.steps=100,signround.batch=4,signround.rate=0.005,distil.steps=20,distil.batch=4"
    recipe = f"rtn+eora+signround+distil:bits=2,group=32,eora.rank=2,{learning}"
    before = compress(model, text, tmp_path / "before", "rtn+eora:bits=2,group=32,eora.rank=2")
    after = compress(model, text, tmp_path / "after", recipe)
    assert after.kl_mean < before.kl_mean
    first, then = load(tmp_path / "before"), load(tmp_path / "after")
    name = "model.layers.0.self_attn.q_proj"  # whose inputs nothing before it changed
    for part in ("up", "down"):
        assert torch.equal(getattr(first.get_submodule(name), part), getattr(then.get_submodule(name), part))
    learned = [(first.get_submodule(name), then.get_submodule(name)) for name in linears(first)]
    assert any(not torch.equal(one.codes, other.codes) for one, other in learned)
    assert any(not torch.equal(one.scales, other.scales) for one, other in learned)


def test_saved_by_transformers_it_is_the_same_model(corrected: Path, tmp_path: Path) -> None:
    first = load(corrected, dtype=torch.bfloat16)
    first.save_pretrained(tmp_path)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(load(tmp_path, dtype=torch.bfloat16)(ids).logits, first(ids).logits)


@pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_blocks_add_it(corrected: Path, dtype: torch.dtype) -> None:
    model = load(corrected, dtype=dtype)
    assert obstacle(model) is None
    for module in model.modules():
        if isinstance(module, CompressedLinear):
            module.rounds = False
    ids = torch.arange(40)[None] * 5
    found = decode(model).read(ids)
    with torch.no_grad():
        expected = model(ids).logits[:, -1].float()
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()
    pieces = decode(model)
    pieces.read(ids[:, :17])
    assert torch.equal(pieces.read(ids[:, 17:]), found)


def test_exports_hold_it_or_refuse_it_by_name(corrected: Path, tmp_path: Path) -> None:
    for to in ("compressed-tensors", "gguf"):
        with pytest.raises(ExportError, match=r"low-rank|zero points"):
            api.export(corrected, to, tmp_path / to)
    assert api.export(corrected, "dense", tmp_path / "dense").kl_mean < 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"low_rank": {"rank": 8}}, "rank"),
        ({"low_rank": {"rank": 7, "dtype": "bfloat16"}}, "up|down|shape"),
        ({"sparse": {"values": 3}}, "sparse"),
    ],
    ids=["without its dtype", "of another rank", "an unknown part"],
)
def test_a_part_that_is_not_known_or_not_there_is_refused(
    corrected: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    for file in corrected.glob("*"):
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    next(iter(config["quantization_config"]["modules"].values())).update(change)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)
