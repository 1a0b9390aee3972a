"""A rotated source computes what the source does, and takes its place in a compression."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from compressing import compress, killed_at_block
from results import digests, text_file
from tailorbird import api
from tailorbird.calibrate.stream import StreamingModel
from tailorbird.compress import rotation
from tailorbird.compress.gate import examine
from tailorbird.compress.rotation import Rotated, rotate
from tailorbird.errors import SettingsError, UnsupportedArchitecture
from tailorbird.linear.rotate import weights as rotated_weights
from tailorbird.linear.rotate.hadamard import Hadamard
from tailorbird.linear.rotate.weights import ROTATION_FILE
from tailorbird.model.anatomy import read_anatomy
from tailorbird.model.checkpoint import open_checkpoint
from tailorbird.model.load import load
from tailorbird.model.weights import Weights
from tailorbird.plan.planfile import load_plan
from tailorbird.progress import Silent
from tiny import ARCHITECTURES, make_model, save_model

#: architecture -> changes of its config
ROTATED: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"hidden_size": 96, "num_attention_heads": 4, "num_key_value_heads": 1}),
    ("llama", {"tie_word_embeddings": True, "head_dim": 24}),
    ("mistral", {}),
    ("qwen2", {}),
    ("qwen3", {}),
    ("phi3", {}),
    ("gpt2", {}),
    ("gpt_neox", {}),
    ("opt", {}),
    ("falcon", {}),
    ("stablelm", {}),
    ("stablelm", {"use_qkv_bias": True}),
]
REFUSED = {
    "gemma2": "post_attention_layernorm.weight`, which acts on single channels",
    "gemma3_text": "post_attention_layernorm.weight`, which acts on single channels",
    "olmo2": "reads no norm",
    "olmo": "outside the blocks than one norm: none",
}
RECIPE = "hadamard+gptq:bits=8,group=32"


def rotated(directory: Path, seed: int = 0) -> Rotated:
    checkpoint = open_checkpoint(str(directory))
    return rotate(checkpoint, read_anatomy(checkpoint), Hadamard(seed), "hadamard")


@torch.no_grad()
def logits(model: StreamingModel, ids: torch.Tensor) -> torch.Tensor:
    hidden = model.embed(ids)
    for index in range(len(model.anatomy.blocks)):
        hidden = model.run_block(model.load_block(index), index, hidden)
    return model.logits(hidden)


def some_ids() -> torch.Tensor:
    return torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("architecture", "changes"), ROTATED)
def test_logits_are_the_sources(tmp_path: Path, architecture: str, changes: dict[str, Any]) -> None:
    save_model(tmp_path, architecture, **changes)
    before = digests(tmp_path)
    found = rotated(tmp_path)
    with torch.no_grad():
        expected = make_model(architecture, **changes)(some_ids()).logits
    actual = logits(StreamingModel(found.checkpoint, found.anatomy), some_ids())
    assert (actual - expected).abs().max() < 1e-4 * max(1.0, float(expected.abs().max()))
    assert digests(tmp_path) == before


def test_every_architecture_is_rotated_or_refused() -> None:
    assert {name for name, _ in ROTATED} | REFUSED.keys() == ARCHITECTURES.keys()


@pytest.mark.parametrize("architecture", REFUSED)
def test_models_that_would_compute_something_else_are_refused(tmp_path: Path, architecture: str) -> None:
    save_model(tmp_path, architecture)
    with pytest.raises(UnsupportedArchitecture, match=REFUSED[architecture]):
        rotated(tmp_path)


def test_hidden_states_are_rotated_and_norms_carry_no_weight(tmp_path: Path) -> None:
    save_model(tmp_path)
    found = rotated(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    plain = StreamingModel(checkpoint, read_anatomy(checkpoint))
    turned = StreamingModel(found.checkpoint, found.anatomy)
    hidden, other = plain.embed(some_ids()), turned.embed(some_ids())
    rotation = Hadamard().drawn("stream", 64)
    for index in range(2):
        assert torch.allclose(rotation(hidden), other, atol=1e-4)
        assert not torch.allclose(hidden, other, atol=0.1)
        hidden = plain.run_block(plain.load_block(index), index, hidden)
        other = turned.run_block(turned.load_block(index), index, other)
    norms = [name for name in found.checkpoint.weights.names if "norm" in name]
    assert len(norms) == 5
    for name in norms:
        assert torch.equal(found.checkpoint.weights.read(name), torch.ones(64))


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_outlying_channels_are_spread_over_all(tmp_path: Path, architecture: str) -> None:
    model = make_model(architecture)
    names = [f"model.layers.{i}.{part}_layernorm" for i in range(2) for part in ("input", "post_attention")]
    with torch.no_grad():
        for name in names:
            model.get_submodule(name).weight[7] = 40.0
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[11] *= 30.0
    model.save_pretrained(tmp_path)

    def incoherence(weights: Weights, name: str, norm: str | None) -> float:
        weight = weights.read(name)
        weight = weight if norm is None else weight * weights.read(norm)
        return float(weight.abs().max() / weight.std())

    found, source = rotated(tmp_path).checkpoint.weights, Weights.open(tmp_path)
    for layer in ("model.layers.0", "model.layers.1"):
        for name, norm in (
            (f"{layer}.self_attn.q_proj.weight", f"{layer}.input_layernorm.weight"),
            (f"{layer}.mlp.gate_proj.weight", f"{layer}.post_attention_layernorm.weight"),
            (f"{layer}.mlp.down_proj.weight", None),
        ):
            assert incoherence(found, name, norm) < 0.7 * incoherence(source, name, norm)


def test_a_tied_head_is_untied_only_where_the_final_norm_has_weights(tmp_path: Path) -> None:
    save_model(tmp_path / "weighted", "qwen2")
    untied = rotated(tmp_path / "weighted")
    assert not untied.anatomy.tied
    assert untied.untied_bytes == 258 * 64 * 4
    source = Weights.open(tmp_path / "weighted")
    assert untied.checkpoint.weights.total_bytes == source.total_bytes + untied.untied_bytes

    model = make_model("qwen2")
    with torch.no_grad():
        model.model.norm.weight.fill_(1.0)
    model.save_pretrained(tmp_path / "plain")
    tied = rotated(tmp_path / "plain")
    assert tied.anatomy.tied
    assert tied.untied_bytes == 0
    with torch.no_grad():
        expected = model(some_ids()).logits
    actual = logits(StreamingModel(tied.checkpoint, tied.anatomy), some_ids())
    assert torch.allclose(actual, expected, atol=1e-4)


def test_a_stored_copy_of_a_tied_head_stays_one(tmp_path: Path) -> None:
    model = make_model("qwen2")
    with torch.no_grad():
        model.model.norm.weight.fill_(1.0)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert rotated(tmp_path).anatomy.ignored == ("lm_head.weight",)


@pytest.mark.parametrize(("architecture", "norm"), [("gpt2", "ln_f"), ("stablelm", "input_layernorm")])
def test_a_bias_that_no_reader_takes_and_no_weight_divides_is_refused(
    tmp_path: Path, architecture: str, norm: str
) -> None:
    model = make_model(architecture)
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith(norm):
                module.weight[3] = 1e-5
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedArchitecture, match=rf"{norm}.bias`, too large beside weights near 0"):
        rotated(tmp_path)


def test_rows_are_those_of_the_whole_however_they_are_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rotated_weights, "VALUES", 256)  # four rows
    save_model(tmp_path, "gpt2")
    weights = rotated(tmp_path).checkpoint.weights
    for name in weights.names:
        whole = weights.read(name)
        assert whole.shape == weights.info(name).shape
        assert whole.is_contiguous()
        assert torch.equal(weights.read_rows(name, 3, 9), whole[3:9])


def test_rows_are_those_of_the_whole_in_any_dtype(tmp_path: Path) -> None:
    save_model(tmp_path, dtype=torch.bfloat16)
    weights = rotated(tmp_path).checkpoint.weights
    for name in ("model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight", "model.norm.weight",
                 "model.layers.1.self_attn.q_proj.weight"):  # fmt: skip
        for dtype in (None, torch.float32):
            whole = weights.read(name, dtype)
            assert whole.dtype == (dtype or torch.bfloat16)
            assert torch.equal(weights.read_rows(name, 3, 9, dtype), whole[3:9])
        assert torch.equal(weights.read(name), weights.read(name, torch.float32).bfloat16())


def test_another_seed_is_another_source(tmp_path: Path) -> None:
    save_model(tmp_path)
    first, again, other = (rotated(tmp_path, seed).checkpoint for seed in (0, 0, 1))
    source = open_checkpoint(str(tmp_path))
    hashes = [(one.fingerprint, one.content_hash()) for one in (first, again, other, source)]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    rng = random.Random(0)
    lines = [json.dumps({"text": "".join(rng.choices("abcdefgh \n", k=300))}) for _ in range(30)]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "qwen2", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def made(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    output = tmp_path_factory.mktemp("made") / "out"
    return output, compress(model, text, output, RECIPE)


def test_the_result_is_a_plain_checkpoint_near_its_source(model: Path, made: tuple[Path, Any]) -> None:
    output, result = made
    assert json.loads((output / ROTATION_FILE).read_text()) == {"name": "hadamard", "seed": 0}
    assert json.loads((output / "config.json").read_text())["tie_word_embeddings"] is False
    assert any("unties the head" in warning for warning in result.warnings)
    assert result.accepted
    with torch.no_grad():
        expected = load(model, dtype=torch.float32)(some_ids()).logits
        actual = load(output, dtype=torch.float32)(some_ids()).logits
    assert (actual - expected).norm() < 0.02 * expected.norm()


def test_the_gate_holds_the_result_to_its_own_rotation(
    model: Path, made: tuple[Path, Any], tmp_path: Path
) -> None:
    found = []
    for seed in (0, 1):
        source = rotated(
            model, seed
        )  # said to be stored as it is, which the head is and packed linears aren't
        verdict = examine(
            source.checkpoint, source.anatomy, made[0], {}, {}, some_ids(), [], 100.0, tmp_path, Silent()
        )
        unchanged = next(check for check in verdict.checks if check.name == "unchanged")
        found.append((unchanged.place, unchanged.detail))
    packed = "model.layers.0.mlp.down_proj.weight"
    assert found == [(packed, "is missing in the result"), ("lm_head.weight", "differs from the source")]


def test_a_killed_run_ends_with_the_same_bytes(
    model: Path, made: tuple[Path, Any], text: Path, tmp_path: Path
) -> None:
    with killed_at_block(1):
        compress(model, text, tmp_path / "out", RECIPE)
    compress(model, text, tmp_path / "out", RECIPE, resume=True)
    assert digests(tmp_path / "out") == digests(made[0])


def test_a_plan_gives_the_same_bytes(model: Path, made: tuple[Path, Any], text: Path, tmp_path: Path) -> None:
    output, _ = made
    plan = load_plan(output / "plan.yaml")
    assert plan.method is not None
    assert plan.method.name == "hadamard+gptq"
    compress(model, text, tmp_path / "again", plan=output / "plan.yaml")
    assert digests(tmp_path / "again") == digests(output)


def test_a_fold_and_a_block_method_stand_on_the_rotated_source(
    model: Path, text: Path, tmp_path: Path
) -> None:
    recipe = "hadamard+awq+rtn+signround:bits=3,group=32,hadamard.seed=5,signround.steps=5,awq.grid=3"
    assert compress(model, text, tmp_path / "out", recipe).accepted


def test_a_budget_counts_the_untied_head(model: Path, text: Path, tmp_path: Path) -> None:
    result = api.fit(
        str(model), "60%", tmp_path / "out", method="hadamard+rtn", calibration=str(text), sequences=8,
        length=32, measure_speed=False, measure_spread=False, max_kl=100.0, max_perplexity_increase=1e9,
    )  # fmt: skip
    stored = Weights.open(tmp_path / "out").total_bytes
    assert result.weight_bytes == stored <= result.budget_bytes  # type: ignore[union-attr]
    plan = load_plan(tmp_path / "out" / "plan.yaml")
    assert {"model.embed_tokens", "lm_head"} <= {place.name for place in plan.places}


def test_a_comparison_refuses_a_rotation(model: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"`hadamard\+rtn` in a comparison"):
        api.compare(str(model), ["60%"], ["rtn", "hadamard+rtn"], tmp_path / "out")


@pytest.mark.parametrize("architecture", ["codegen", "gpt_bigcode"])
def test_fused_projections_of_another_order_are_refused(architecture: str, tmp_path: Path) -> None:
    small: dict[str, Any] = {"n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 32, "vocab_size": 300}
    small |= {"rotary_dim": 8} if architecture == "codegen" else {"multi_query": False}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **small))
    model.save_pretrained(tmp_path / "m")
    checkpoint = open_checkpoint(str(tmp_path / "m"))
    with pytest.raises(UnsupportedArchitecture, match="a rotation of"):
        rotate(checkpoint, read_anatomy(checkpoint), Hadamard(), "hadamard")


def test_a_rotation_that_changes_the_model_is_found_before_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_model(tmp_path / "m", "gpt_neox", initializer_range=0.3)
    monkeypatch.setattr(rotation, "IN_THREE_PARTS", frozenset({"gpt_neox"}))
    with pytest.raises(UnsupportedArchitecture, match="computes something else"):
        api.compress(
            str(path), tmp_path / "out", recipe="hadamard+rtn:bits=8,group=32",
            calibration=str(text_file(tmp_path)), sequences=4, length=32,
            measure_speed=False, measure_spread=False,
        )  # fmt: skip
    assert not (tmp_path / "out").exists()
