"""Static scales of inputs that a recipe asks for: those of what the result reads, kept, priced, refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from compressed import linears
from compressing import compress, killed_at_block, modules_of
from results import digests
from tailorbird.calibrate.input_scales import InputScale
from tailorbird.compress.export import export
from tailorbird.compress.pipeline import Pipeline
from tailorbird.compress.planning import codings_of_recipe, rounded_inputs_of_recipe
from tailorbird.compress.recipe import parse_recipe
from tailorbird.compress.work import foresee, open_work
from tailorbird.errors import CheckpointError, ExportError, SettingsError
from tailorbird.formats.modules import CompressedLinear
from tailorbird.kernels import native
from tailorbird.model.load import load
from tailorbird.model.weights import Weights
from tailorbird.model.writing import write_tensors
from tailorbird.plan import predict
from tailorbird.plan.planfile import load_plan
from tailorbird.run.fused import obstacle
from tiny import save_model

PLAIN = "rtn:bits=8,group=0,activation=int8-static"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "llama", num_hidden_layers=2, initializer_range=0.1)


@pytest.fixture(scope="module")
def plain(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A model with static scales, and what compressing it gave."""
    output = tmp_path_factory.mktemp("plain") / "out"
    return output, compress(model, text, output, PLAIN)


@pytest.mark.parametrize(
    "recipe",
    [
        PLAIN,
        "smoothing+gptq:bits=4,group=32,activation=int8-static",
        "higgs:codebook=gauss3,group=32,block=16,activation=int8-static",
        "llm-int8:bits=8,group=0,symmetric=true,outliers=0.05,activation=int8-static",
        "gptq+cbq:bits=4,group=32,cbq.steps=2,cbq.batch=2,activation=int8-static",
    ],
)
def test_scales_are_the_best_for_what_the_result_reads(
    recipe: str, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    run = Pipeline.run

    def recorded(self: Pipeline) -> Any:
        assert self.compression.ids is not None
        seen.append(self.compression.ids)
        return run(self)

    monkeypatch.setattr(Pipeline, "run", recorded)
    compress(model, text, tmp_path / "out", recipe)
    modules = modules_of(tmp_path / "out")
    assert {name for name, entry in modules.items() if "input_scale" in entry} == set(linears(load(model)))
    result = load(tmp_path / "out", dtype=torch.float32)
    searches: dict[str, InputScale] = {}

    def take(step: Any, name: str) -> Any:
        return lambda module, inputs: step(searches[name], module.to_be_rounded(inputs[0]))

    for step in (InputScale.widen, InputScale.add):
        hooks = []
        for name, module in result.named_modules():
            if isinstance(module, CompressedLinear):
                searches.setdefault(name, InputScale(module.in_features))
                hooks.append(module.register_forward_pre_hook(take(step, name)))
                module.simulated = None  # inputs as they were when their scales were found
        with torch.no_grad():
            result(seen[0])
        for hook in hooks:
            hook.remove()
    for name, search in searches.items():
        assert modules[name]["input_scale"] == pytest.approx(search.scale, rel=1e-3), name


def test_the_result_says_so_and_costs_what_was_predicted(
    plain: tuple[Path, Any], model: Path, text: Path, tmp_path: Path
) -> None:
    output, result = plain
    exact = compress(model, text, tmp_path / "exact", "rtn:bits=8,group=0", activations="exact")
    assert result.kl_mean > exact.kl_mean
    assert result.predicted["kl"] > exact.predicted["kl"]
    assert result.accepted, result.checks
    assert any("rounded to int8-static, simulated" in remark for remark in result.warnings)
    plan = load_plan(output / "plan.yaml")
    assert {p.name for p in plan.places if p.activation == "int8-static"} == set(linears(load(model)))
    loaded = load(output)
    paths = {m.path(1, torch.float32) for m in loaded.modules() if isinstance(m, CompressedLinear)}
    assert all(path.endswith("inputs in int8-static simulated") for path in paths)
    reason = obstacle(loaded)
    assert reason is not None
    assert "rounded to int8-static" in reason or not native.available()


@pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")
def test_one_scale_for_all_costs_more_than_one_for_a_token_where_tokens_differ(
    text: Path, tmp_path: Path
) -> None:
    source = save_model(tmp_path / "model", "llama", num_hidden_layers=2, initializer_range=0.1)
    weights = Weights.open(source)
    tensors = {name: weights.read(name) for name in weights.names}
    name = next(name for name in tensors if "embed_tokens" in name)
    for key, tensor in tensors.items():
        if "up_proj" in key:
            tensor[:8] *= 50  # whose products with the gate differ from token to token
    tensors[name][::2] *= 5
    write_tensors(source / "model.safetensors", tensors, hashes=False)
    recipe = "rtn:bits=8,group=0,activation={}"
    dynamic, static = (
        compress(source, text, tmp_path / to, recipe.format(to)) for to in ("int8", "int8-static")
    )
    assert static.kl_mean > 2 * dynamic.kl_mean


def test_a_plan_gives_the_same_and_so_does_a_run_that_was_killed(
    plain: tuple[Path, Any], model: Path, text: Path, tmp_path: Path
) -> None:
    output, _ = plain
    compress(model, text, tmp_path / "again", plan=output / "plan.yaml")
    assert digests(tmp_path / "again") == digests(output)
    with killed_at_block(1):
        compress(model, text, tmp_path / "out", PLAIN)
    compress(model, text, tmp_path / "out", PLAIN, resume=True)
    assert digests(tmp_path / "out") == digests(output)


def test_what_is_saved_again_gives_the_same_logits(plain: tuple[Path, Any], tmp_path: Path) -> None:
    ids = torch.randint(200, (2, 24), generator=torch.Generator().manual_seed(0))
    first = load(plain[0])
    first.save_pretrained(tmp_path / "b")
    second = load(tmp_path / "b")
    with torch.no_grad():
        assert torch.equal(first(ids).logits, second(ids).logits)
    assert modules_of(tmp_path / "b") == modules_of(plain[0])


@pytest.mark.parametrize("scale", [None, float("nan"), 0.0, "absent"])
def test_a_file_without_a_scale_to_use_is_refused(
    scale: object, plain: tuple[Path, Any], tmp_path: Path
) -> None:
    for file in plain[0].glob("*"):
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    entry = next(iter(config["quantization_config"]["modules"].values()))
    entry["input_scale"] = scale
    if scale == "absent":
        del entry["input_scale"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"input_scale|NaN"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("recipe", "named"),
    [
        ("gptq+distil:bits=4,group=32", "distil"),
        ("rtn+flatquant:bits=4,group=32", "flatquant"),
    ],
)
def test_what_learns_inputs_later_is_refused_before_work(
    recipe: str, named: str, model: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=f"int8-static with `{named}`.*leave out `{named}`"):
        compress(model, text, tmp_path / "out", f"{recipe},activation=int8-static")
    assert not list(tmp_path.iterdir())


def test_a_plan_has_no_static_scale_at_the_head(
    plain: tuple[Path, Any], model: Path, text: Path, tmp_path: Path
) -> None:
    compress(model, text, tmp_path / "whole", f"{PLAIN},embedding_bits=8")
    plan = (tmp_path / "whole" / "plan.yaml").read_text().splitlines()
    head = next(i for i, line in enumerate(plan) if "name: lm_head" in line)
    plan.insert(head + 1, plan[head].partition("name:")[0].replace("-", " ") + "activation: int8-static")
    (tmp_path / "plan.yaml").write_text("\n".join(plan))
    with pytest.raises(SettingsError, match=r"`activation: int8-static` at `lm_head`.*only at linears"):
        compress(model, text, tmp_path / "out", plan=tmp_path / "plan.yaml")


def test_an_export_would_lose_it_and_is_refused(plain: tuple[Path, Any], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"rounded to int8-static.*anew without activation=int8-static"):
        export(plain[0], "dense", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_forecast_counts_the_search_for_scales(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "matmul_rate", lambda: 1e11)
    work = open_work(
        str(model), parse_recipe(PLAIN), calibration=str(text), evaluation=None, sequences=8, length=32,
        context=None, target=None, seed=0, progress=None,
    )  # fmt: skip
    stated = rounded_inputs_of_recipe(work, codings_of_recipe(work))
    assert stated is not None
    seconds = []
    for rounded in (dict.fromkeys(stated, "int4"), stated):
        work.rounded_inputs = rounded
        seconds.append({stage.name: stage.seconds for stage in foresee(work, tmp_path / "out").stages})
    without, found = seconds
    assert found["compress"] > without["compress"]
    assert {**found, "compress": 0.0} == {**without, "compress": 0.0}
