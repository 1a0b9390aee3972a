"""Methods that keep outliers, in a compression: bytes known beforehand, resumed alike, run and exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from compressed import linears
from compressing import compress, copied, killed_at_block, modules_of
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

SPQR = "spqr:bits=2,group=32,outliers=0.02"


@pytest.fixture(scope="module")
def kept(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("kept") / "out"
    compress(model, text, output, SPQR)
    return output


@pytest.mark.parametrize(
    ("architecture", "name", "plain"), [("llama", "spqr", "gptq"), ("gpt2", "quantease", "quantease")]
)
def test_it_is_nearer_and_the_bytes_are_those_of_the_parts(
    text: Path, tmp_path: Path, architecture: str, name: str, plain: str
) -> None:
    source = save_model(tmp_path / "model", architecture)
    before = compress(source, text, tmp_path / "plain", f"{plain}:bits=2,group=32,embedding_bits=8")
    recipe = f"{name}:bits=2,group=32,embedding_bits=8,outliers=0.05"
    after = compress(source, text, tmp_path / "kept", recipe)
    assert after.kl_mean < before.kl_mean
    added = 0
    for path, module in modules_of(tmp_path / "kept").items():
        rows, columns = module["out"], module["in"]
        if "sparse" in module:
            assert module["sparse"] == {"nonzeros": round(0.05 * rows * columns), "dtype": "bfloat16"}
            added += 2 * rows + 4 * module["sparse"]["nonzeros"]
        else:
            assert "h." not in path
            assert "layers" not in path
    assert added > 0
    assert after.weight_bytes == before.weight_bytes + added
    loaded = load(tmp_path / "kept")
    parts = [module.sparse for module in loaded.modules() if isinstance(module, CompressedLinear)]
    stated = ["sparse" in module for module in modules_of(tmp_path / "kept").values()]
    assert sum(part is not None for part in parts) == sum(stated)
    checkpoint = open_checkpoint(str(tmp_path / "kept"))
    assert checkpoint.parameters == open_checkpoint(str(source)).parameters


def test_a_killed_run_ends_with_the_same_bytes(model: Path, kept: Path, text: Path, tmp_path: Path) -> None:
    with killed_at_block(1):
        compress(model, text, tmp_path / "out", SPQR)
    compress(model, text, tmp_path / "out", SPQR, resume=True)
    assert digests(tmp_path / "out") == digests(kept)


def test_a_plan_states_the_parts(model: Path, kept: Path, text: Path, tmp_path: Path) -> None:
    compress(model, text, tmp_path / "again", plan=kept / "plan.yaml")
    assert digests(tmp_path / "again") == digests(kept)
    plan = yaml.safe_load((kept / "plan.yaml").read_text())
    stated = {place["name"]: place["sparse"] for place in plan["places"] if "sparse" in place}
    assert stated == {name: m["sparse"] for name, m in modules_of(kept).items() if "sparse" in m}
    for place in plan["places"]:
        place.pop("sparse", None)
    plan["method"]["outliers"] = 0.01
    (tmp_path / "plan.yaml").write_text(json.dumps(plan))
    compress(model, text, tmp_path / "fewer", plan=tmp_path / "plan.yaml")
    fewer = modules_of(tmp_path / "fewer")
    for name, part in stated.items():
        assert abs(2 * fewer[name]["sparse"]["nonzeros"] - part["nonzeros"]) <= 1


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("gptq", {}, "none"),
        ("spqr", {"sparse": {"nonzeros": 7, "dtype": "bfloat16"}}, "7 nonzeros"),
        ("spqr", {"sparse": {"nonzeros": 0, "dtype": "bfloat16"}}, "nonzeros 0"),
        ("spqr", {"coding": {"kind": "float", "dtype": "bfloat16"}, "activation": None}, "none"),
    ],
)
def test_a_plan_that_contradicts_itself_is_refused(
    model: Path, kept: Path, text: Path, tmp_path: Path, method: str, change: dict[str, Any], message: str
) -> None:
    plan = yaml.safe_load((kept / "plan.yaml").read_text())
    plan["method"] = {"name": method} | ({"outliers": 0.02} if method == "spqr" else {})
    for place in plan["places"]:
        if "sparse" in place:
            place.update(change)
    (tmp_path / "plan.yaml").write_text(json.dumps(plan))
    with pytest.raises(SettingsError, match=message):
        compress(model, text, tmp_path / "out", plan=tmp_path / "plan.yaml")


def test_a_correction_and_what_learns_stand_beside_it(model: Path, text: Path, tmp_path: Path) -> None:
    learning = "signround.steps=100,signround.batch=4,signround.rate=0.005,distil.steps=20,distil.batch=4"
    recipe = "spqr+{}:bits=2,group=32,outliers=0.02,eora.rank=2"
    before = compress(model, text, tmp_path / "before", recipe.format("eora"))
    after = compress(model, text, tmp_path / "after", recipe.format("eora+signround+distil") + "," + learning)
    block, whole = after.methods[-2:]
    assert block["block_error_after"] <= block["block_error_before"]
    assert whole["kl_after"] <= whole["kl_before"]
    assert after.kl_mean < 2 * before.kl_mean  # both are tiny, on a model that hardly tells tokens apart
    models = [load(tmp_path / output) for output in ("before", "after")]
    pairs = [tuple(model.get_submodule(name) for model in models) for name in linears(models[0])]
    assert any(not torch.equal(one.codes, other.codes) for one, other in pairs)
    first, then = pairs[0]  # whose inputs nothing before it changed
    assert (first.low_rank, then.low_rank) == (LowRank(2), LowRank(2))
    assert first.sparse == then.sparse is not None
    for part in ("counts", "columns", "values", "up", "down"):
        assert torch.equal(getattr(first, part), getattr(then, part))


def test_saved_by_transformers_it_is_the_same_model(kept: Path, tmp_path: Path) -> None:
    first = load(kept, dtype=torch.bfloat16)
    first.save_pretrained(tmp_path)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(load(tmp_path, dtype=torch.bfloat16)(ids).logits, first(ids).logits)


@pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")
def test_it_generates_in_compiled_blocks(kept: Path) -> None:
    model = load(kept, dtype=torch.float32)
    assert obstacle(model) is None
    ids = torch.arange(40)[None] * 5
    with torch.no_grad():
        expected = model(ids).logits[:, -1].float()
    found = decode(model).read(ids)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_exports_hold_it_or_refuse_it_by_name(kept: Path, tmp_path: Path) -> None:
    for to in ("compressed-tensors", "gguf"):
        with pytest.raises(ExportError, match="sparse part"):
            api.export(kept, to, tmp_path / to)
    assert api.export(kept, "dense", tmp_path / "dense").kl_mean < 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sparse": {"nonzeros": 8}}, "nonzeros"),
        ({"sparse": {"nonzeros": 7, "dtype": "bfloat16"}}, "columns|values|shape"),
        ({"sparse": {"nonzeros": 1 << 30, "dtype": "bfloat16"}}, "at most as many"),
        ({"coding": {"kind": "float", "dtype": "bfloat16"}}, "beside float values"),
    ],
    ids=["without its dtype", "of another number", "more than there are weights", "beside floats"],
)
def test_what_the_config_states_wrongly_is_refused(
    kept: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    copied(kept, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    next(iter(config["quantization_config"]["modules"].values())).update(change)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_a_damaged_file_is_refused_when_it_is_loaded(kept: Path, tmp_path: Path) -> None:
    copied(kept, tmp_path)
    name = next(name for name, module in modules_of(kept).items() if "sparse" in module)
    for file in tmp_path.glob("*.safetensors"):
        tensors = load_file(file)
        if f"{name}.counts" in tensors:
            tensors[f"{name}.counts"][1] = 60000
            save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"`{name}`.*counts"):
        load(tmp_path)
