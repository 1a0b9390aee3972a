"""Inputs that a recipe has rounded, and the folds before them: stated, kept, of use, refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compressed import linears
from compressing import compress, killed_at_block
from results import digests
from tailorbird.compress import planning
from tailorbird.errors import ResourceError, SettingsError
from tailorbird.formats.modules import CompressedLinear
from tailorbird.kernels import native
from tailorbird.linear.folds import FOLDS_FILE, read_folds
from tailorbird.model.anatomy import read_anatomy
from tailorbird.model.checkpoint import open_checkpoint
from tailorbird.model.load import load
from tailorbird.model.weights import Weights
from tailorbird.model.writing import write_tensors
from tailorbird.plan.planfile import load_plan
from tailorbird.run.fused import obstacle
from tiny import save_model

built = pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model some of whose channels leave their norms far larger than others."""
    directory = save_model(
        tmp_path_factory.mktemp("model"), "llama", num_hidden_layers=2, initializer_range=0.1
    )
    weights = Weights.open(directory)
    tensors = {name: weights.read(name) for name in weights.names}
    for name, tensor in tensors.items():
        if "layernorm" in name:
            tensor[::16] *= 40
        if "q_proj" in name or "gate_proj" in name:
            tensor[:, ::16] /= 40  # else all attention is to one token
    write_tensors(directory / "model.safetensors", tensors, hashes=False)
    return directory


@built
@pytest.mark.parametrize("coding", ["bits=8,group=0", "codebook=fp4,group=64,embedding_bits=8"])
def test_all_linears_of_blocks_round_and_no_other_does(
    coding: str, model: Path, text: Path, tmp_path: Path
) -> None:
    compress(model, text, tmp_path / "out", f"fptq+rtn:{coding},activation=int8")
    result = load(tmp_path / "out")
    rounding = {n for n, m in result.named_modules() if isinstance(m, CompressedLinear) and m.rounds}
    assert rounding == set(linears(load(model)))
    plan = load_plan(tmp_path / "out" / "plan.yaml")
    assert {place.name for place in plan.places if place.activation == "int8"} == rounding
    assert {m.path(1, torch.float32) for n, m in result.named_modules() if n in rounding} == {"native-int8"}
    compress(model, text, tmp_path / "again", plan=tmp_path / "out" / "plan.yaml")
    assert digests(tmp_path / "again") == digests(tmp_path / "out")


@built
@pytest.mark.parametrize("fold", ["smoothing", "fptq", "outliertune"])
def test_a_fold_lowers_the_divergence_where_channels_are_outliers(
    fold: str, model: Path, text: Path, tmp_path: Path
) -> None:
    recipe = "rtn:bits=8,group=0,activation=int8"
    plain = compress(model, text, tmp_path / "plain", recipe)
    folded = compress(model, text, tmp_path / "folded", f"{fold}+{recipe}")
    assert folded.kl_mean < 0.7 * plain.kl_mean


@pytest.mark.parametrize("fold", ["smoothing", "fptq", "outliertune"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_a_folded_model_has_the_logits_of_its_source(
    fold: str, architecture: str, text: Path, tmp_path: Path
) -> None:
    """What the recorded scales make of the source, of which nothing is rounded."""
    source = save_model(tmp_path / "model", architecture)
    compress(source, text, tmp_path / "out", f"{fold}+rtn:bits=8,group=32")
    stored = Weights.open(source)
    folded = load(source).double()
    state = folded.state_dict()
    anatomy = read_anatomy(open_checkpoint(str(source)))
    folds = read_folds(tmp_path / "out", anatomy)
    assert all(block.norms for block in folds)
    shifts = fold == "outliertune" and architecture != "llama"  # which has no biases
    assert all(len(block.shifts) == (2 if shifts else 0) for block in folds)
    for block, found in zip(anatomy.blocks, folds, strict=True):
        changed = dict(found.others(stored))
        for place in block.linears:
            weight = stored.read(place.weight_name).float()
            after = found.weight(place.name, weight.t() if place.transposed else weight, stored)
            changed[place.weight_name] = after.t() if place.transposed else after
        for name, tensor in changed.items():
            owner = next(key for key in state if key.endswith(name))
            state[owner].copy_(tensor)
    ids = torch.randint(200, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, after = load(source).double()(ids).logits, folded(ids).logits
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    assert not torch.equal(after, before)
    assert (tmp_path / "out" / FOLDS_FILE).exists()


@pytest.mark.parametrize(
    "recipe",
    [
        "hadamard+outliertune+gptq:bits=4,group=32",
        "outliertune+rtn+eora:bits=4,group=32,eora.rank=4",
        "outliertune+gptq+signround:bits=3,group=32,signround.steps=5",
        "outliertune+rtn+omniquant:bits=3,group=32,omniquant.steps=20,omniquant.transform=true",
    ],
)
def test_shifts_stand_with_what_turns_corrects_and_learns(recipe: str, text: Path, tmp_path: Path) -> None:
    source = save_model(tmp_path / "model", "opt")
    compress(source, text, tmp_path / "out", recipe)  # and its gate
    folds = read_folds(tmp_path / "out", read_anatomy(open_checkpoint(str(source))))
    assert all(len(block.shifts) == 2 for block in folds)
    if "transform" in recipe:
        assert all(block.pairs for block in folds)


def test_a_killed_run_with_shifts_ends_with_the_same_bytes(text: Path, tmp_path: Path) -> None:
    source = save_model(tmp_path / "model", "gpt2")
    recipe = "outliertune+gptq:bits=4,group=32"
    compress(source, text, tmp_path / "whole", recipe)
    with killed_at_block(1):
        compress(source, text, tmp_path / "out", recipe)
    compress(source, text, tmp_path / "out", recipe, resume=True)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


@built
def test_inputs_apart_lower_the_divergence_where_channels_are_outliers(
    model: Path, text: Path, tmp_path: Path
) -> None:
    recipe = "{}:bits=8,group=0,symmetric=true,activation=int8"
    plain = compress(model, text, tmp_path / "plain", recipe.format("rtn"))
    apart = compress(model, text, tmp_path / "apart", recipe.format("llm-int8") + ",outliers=0.07")
    assert apart.kl_mean < 0.5 * plain.kl_mean
    assert apart.accepted, apart.checks
    compress(model, text, tmp_path / "again", plan=tmp_path / "apart" / "plan.yaml")
    assert digests(tmp_path / "again") == digests(tmp_path / "apart")


@pytest.mark.parametrize("to", ["fp8", "int4"])
def test_what_is_simulated_is_measured_and_said(to: str, model: Path, text: Path, tmp_path: Path) -> None:
    exact = compress(model, text, tmp_path / "exact", "rtn:bits=8,group=64", activations="exact")
    result = compress(model, text, tmp_path / "out", f"rtn:bits=8,group=64,activation={to}")
    assert result.kl_mean > exact.kl_mean
    assert result.accepted, result.checks  # the divergence is near the prediction
    assert any(f"rounded to {to}, simulated" in remark for remark in result.warnings)
    plan = load_plan(tmp_path / "out" / "plan.yaml")
    loaded = load(tmp_path / "out")
    rounding = {n for n, m in loaded.named_modules() if isinstance(m, CompressedLinear) and m.simulated == to}
    assert rounding == set(linears(load(model)))
    assert {place.name for place in plan.places if place.activation == to} == rounding
    assert plan.remarks is not None
    assert "simulated" in plan.remarks[-1]
    reason = obstacle(loaded)
    assert reason is not None
    assert f"rounded to {to}" in reason or not native.available()
    compress(model, text, tmp_path / "again", plan=tmp_path / "out" / "plan.yaml")
    assert digests(tmp_path / "again") == digests(tmp_path / "out")


def test_coarser_inputs_cost_more(model: Path, text: Path, tmp_path: Path) -> None:
    lost = {
        to: compress(model, text, tmp_path / to, f"rtn:bits=8,group=64,activation={to}")
        for to in ("fp8", "int4")
    }
    assert lost["int4"].kl_mean > 3 * lost["fp8"].kl_mean


def test_exact_activations_contradict_the_recipe(model: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="`exact` with activation=int8"):
        compress(model, text, tmp_path / "out", "rtn:bits=8,activation=int8", activations="exact")
    assert not list(tmp_path.iterdir())


def test_what_nothing_here_multiplies_is_refused_before_work(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning.dispatch, "find", lambda *given, **settings: None)
    with pytest.raises(ResourceError, match=r"activation int8 for .*leave out activation"):
        compress(model, text, tmp_path / "out", "rtn:bits=8,activation=int8")
    assert not list(tmp_path.iterdir())


@built
def test_a_plan_for_another_machine_is_carried_out_and_says_what_was_measured(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = compress(model, text, tmp_path / "here", "rtn:bits=8,group=0,activation=int8")
    assert not any("bytes" in warning for warning in made.warnings)
    monkeypatch.setattr(planning.dispatch, "find", lambda *given, **settings: None)
    plan = tmp_path / "here" / "plan.yaml"
    found = compress(model, text, tmp_path / "there", plan=plan)
    (said,) = (warning for warning in found.warnings if "bytes" in warning)
    assert "inputs of 14 linears" in said
    assert "exact inputs" in said
    stated = {place.name for place in load_plan(tmp_path / "there" / "plan.yaml").places if place.activation}
    assert stated == {place.name for place in load_plan(plan).places if place.activation}
