"""The anatomy is complete, its claims hold in the running model, and what it can't read is named."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from tailorbird.errors import CheckpointError, UnsupportedArchitecture
from tailorbird.model.anatomy import Anatomy, is_linear, read_anatomy
from tailorbird.model.checkpoint import open_checkpoint
from tiny import ARCHITECTURES, make_model, save_model

BASE = {"vocab_size": 258, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 257}
WIDTHS = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL: dict[str, Any] = {**BASE, **WIDTHS, "intermediate_size": 160, "max_position_embeddings": 128}

#: name of a case -> architecture and changes to its config
CASES: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in ARCHITECTURES}
CASES |= {
    "llama, all heads, biases": (
        "llama",
        {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True},
    ),
    "olmo, all heads, clipped": ("olmo", {"num_key_value_heads": 4, "clip_qkv": 0.05}),
    "gemma2, all heads": ("gemma2", {"num_key_value_heads": 4}),
    "qwen3, all heads": ("qwen3", {"num_key_value_heads": 4}),
    "olmo2, all heads": ("olmo2", {"num_key_value_heads": 4}),
    "stablelm, parallel": ("stablelm", {"use_parallel_residual": True, "use_qkv_bias": True}),
    "stablelm, head norms": ("stablelm", {"qk_layernorm": True}),
    "gpt_neox, serial": ("gpt_neox", {"use_parallel_residual": False}),
    "opt, norm after, projected": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    "falcon, first kind": ("falcon", {"new_decoder_architecture": False, "multi_query": True, "bias": True}),
}

#: (norm groups, scale pairs) of a block
GROUPS = {
    "llama": (2, 1),
    "mistral": (2, 1),
    "qwen2": (2, 1),
    "qwen3": (2, 1),
    "gemma2": (2, 1),
    "gemma3_text": (2, 1),
    "phi3": (2, 0),
    "gpt2": (2, 0),
    "gpt_neox": (2, 0),
    "opt": (2, 1),
    "falcon": (2, 0),
    "stablelm": (2, 1),
    "olmo": (0, 1),
    "olmo2": (0, 1),
    "llama, all heads, biases": (2, 2),
    "olmo, all heads, clipped": (0, 1),
    "gemma2, all heads": (2, 2),
    "qwen3, all heads": (2, 2),
    "olmo2, all heads": (0, 2),
    "stablelm, parallel": (1, 1),
    "stablelm, head norms": (2, 1),
    "gpt_neox, serial": (2, 0),
    "opt, norm after, projected": (0, 1),
    "falcon, first kind": (1, 0),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small run slower on several threads, and much slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Case:
    name: str
    directory: Path
    anatomy: Anatomy
    model: Any


def anatomy_of(directory: Path) -> Anatomy:
    return read_anatomy(open_checkpoint(str(directory)))


def load(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    architecture, changes = CASES[request.param]
    directory = save_model(tmp_path_factory.mktemp("case"), architecture, **changes)
    return Case(request.param, directory, anatomy_of(directory), load(directory))


def scale_columns(module: nn.Module, s: torch.Tensor) -> None:
    module.weight.mul_(s if isinstance(module, nn.Linear) else s[:, None])


def test_every_linear_and_every_tensor_has_one_place(case: Case) -> None:
    checkpoint = open_checkpoint(str(case.directory))
    anatomy, model = read_anatomy(checkpoint), case.model

    ends = {anatomy.embedding, anatomy.head, "model.decoder.project_in", "model.decoder.project_out"}
    linears = {name for name, m in model.named_modules() if is_linear(m)} - ends
    places = list(anatomy.linears())
    assert {p.name for p in places} == linears
    assert len(places) == len(linears)
    for place in places:
        module = model.get_submodule(place.name)
        shape = (place.out_features, place.in_features)
        assert tuple(module.weight.shape) == (shape[::-1] if place.transposed else shape)
        assert place.bias == (module.bias is not None)

    named = [p.weight_name for p in places] + list(anatomy.other) + [f"{anatomy.embedding}.weight"]
    named += [name for block in anatomy.blocks for name in block.other]
    if not anatomy.tied:
        named.append(f"{anatomy.head}.weight")
    assert sorted(named) == checkpoint.weights.names
    assert anatomy.end_shape(anatomy.embedding) == tuple(model.get_input_embeddings().weight.shape)
    assert anatomy.tied == model.config.tie_word_embeddings


def test_linears_share_an_input_exactly_where_they_read_equal_values(case: Case) -> None:
    anatomy, model = case.anatomy, copy.deepcopy(case.model)
    seen: dict[str, torch.Tensor] = {}
    for place in anatomy.linears():
        model.get_submodule(place.name).register_forward_pre_hook(
            lambda module, inputs, name=place.name: seen.__setitem__(name, inputs[0].clone())
        )
    with torch.no_grad():
        model(torch.arange(40)[None])
    assert list(seen) == [place.name for place in anatomy.linears()]
    for block in anatomy.blocks:
        for one in block.linears:
            for other in block.linears:
                equal = seen[one.name].numel() == seen[other.name].numel() and torch.equal(
                    seen[one.name].flatten(), seen[other.name].flatten()
                )
                assert equal == (one.shares_input == other.shares_input)


@torch.no_grad()
def test_scaling_a_norm_group_or_pair_leaves_the_model_unchanged(case: Case) -> None:
    anatomy, model = case.anatomy, copy.deepcopy(case.model)
    ids = torch.arange(2 * 24).reshape(2, 24)
    expected = model(ids).logits
    generator = torch.Generator().manual_seed(1)

    def check() -> None:
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)

    for block in anatomy.blocks:
        assert (len(block.norm_groups), len(block.scale_pairs)) == GROUPS[case.name]
        for group in block.norm_groups:
            norm = model.get_submodule(group.norm)
            s = torch.rand(norm.weight.numel(), generator=generator) + 0.5
            norm.weight.copy_((norm.weight + int(group.offset)) / s - int(group.offset))
            assert group.has_bias == (getattr(norm, "bias", None) is not None)
            if group.has_bias:
                norm.bias.div_(s)
            for linear in group.linears:
                scale_columns(model.get_submodule(linear), s)
            check()
        for pair in block.scale_pairs:
            source, target = model.get_submodule(pair.source), model.get_submodule(pair.target)
            s = torch.rand(source.out_features, generator=generator) + 0.5
            source.weight.div_(s[:, None])
            if source.bias is not None:
                source.bias.div_(s)
            scale_columns(target, s)
            check()


def test_only_gemma_norms_have_an_offset(tmp_path: Path) -> None:
    for architecture in ("gemma2", "gemma3_text", "llama", "gpt2"):
        anatomy = anatomy_of(save_model(tmp_path / architecture, architecture))
        offsets = {group.offset for block in anatomy.blocks for group in block.norm_groups}
        assert offsets == {architecture.startswith("gemma")}


@torch.no_grad()
def test_cache_bytes_are_those_of_the_running_model(case: Case) -> None:
    anatomy = case.anatomy
    cache = case.model(torch.arange(2 * 12).reshape(2, 12), use_cache=True).past_key_values
    values = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert anatomy.kv_bytes(12, 2) == 2 * values
    assert anatomy.kv_bytes_per_token == values // 12


def test_a_sliding_window_bounds_the_cache_of_its_blocks_only(tmp_path: Path) -> None:
    mistral = anatomy_of(save_model(tmp_path / "mistral", "mistral"))
    assert mistral.kv_bytes(100) == mistral.kv_bytes(16) == 16 * mistral.kv_bytes_per_token
    gemma = anatomy_of(save_model(tmp_path / "gemma2", "gemma2"))
    assert [block.window for block in gemma.blocks] == [16, None]
    assert 2 * gemma.kv_bytes(100, 3) == 3 * (16 + 100) * gemma.kv_bytes_per_token


def edit_tensors(directory: Path, change: Any) -> Path:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return directory


def rename(old: str, new: str) -> Any:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            if name.startswith(old):
                tensors[new + name.removeprefix(old)] = tensors.pop(name)

    return change


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), r"layers\.1\.mlp\.up_proj\.weight` .*missing"),
        (lambda t: t.pop("lm_head.weight"), r"`lm_head\.weight` .*missing"),
        (lambda t: t.update(strange=torch.zeros(3)), r"`strange` \[3\] belongs to no module"),
        (lambda t: t.update({"model.norm.weight": torch.ones(63)}), r"norm\.weight` is \[63\], not \[64\]"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}),
            r"norm\.weight` is stored as torch\.int8",
        ),
        (rename("model.layers.1.", "model.layers.2."), r"layers\.1\.input_layernorm\.weight` .*missing"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(tmp_path: Path, change: Any, named: str) -> None:
    directory = edit_tensors(save_model(tmp_path / "model"), change)
    with pytest.raises(CheckpointError, match=named):
        anatomy_of(directory)


def test_files_of_a_bare_decoder_are_read_under_the_full_names(tmp_path: Path) -> None:
    whole = save_model(tmp_path / "whole", "gpt2")
    bare = edit_tensors(save_model(tmp_path / "bare", "gpt2"), rename("transformer.", ""))
    one, other = open_checkpoint(str(whole)), open_checkpoint(str(bare))
    assert "h.0.attn.c_attn.weight" in other.weights
    assert read_anatomy(one) == read_anatomy(other)
    assert one.weights.names == other.weights.names
    for name in one.weights.names:
        assert torch.equal(one.weights.read(name), other.weights.read(name))


def test_an_old_name_of_the_head_is_understood(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(save_model(tmp_path / "model", "gpt_neox")))
    assert "embed_out.weight" in checkpoint.weights
    anatomy = read_anatomy(checkpoint)
    expected = load(checkpoint.directory).get_output_embeddings().weight
    assert torch.equal(checkpoint.weights.read(f"{anatomy.head}.weight"), expected)


def test_computed_buffers_of_old_files_are_ignored(tmp_path: Path) -> None:
    buffers = {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 128, 128, dtype=torch.bool),
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
    }
    plain = anatomy_of(save_model(tmp_path / "plain", "gpt2"))
    anatomy = anatomy_of(edit_tensors(save_model(tmp_path / "old", "gpt2"), lambda t: t.update(buffers)))
    assert anatomy.ignored == tuple(sorted(buffers))
    assert anatomy.blocks == plain.blocks


def test_a_tied_head_that_is_stored_must_be_a_copy(tmp_path: Path) -> None:
    def copied(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    directory = edit_tensors(save_model(tmp_path / "model", "qwen2"), copied)
    anatomy = anatomy_of(directory)
    assert anatomy.tied
    assert anatomy.ignored == ("lm_head.weight",)
    edit_tensors(directory, lambda t: t["lm_head.weight"].mul_(2))
    with pytest.raises(CheckpointError, match=r"ties `lm_head\.weight`"):
        anatomy_of(directory)


@pytest.mark.parametrize(
    ("architecture", "changes", "named"),
    [
        ("mixtral", {"num_local_experts": 2}, r"layers\.\*\.mlp\.experts \(MixtralExperts\)"),
        ("lfm2", {}, r"layers\.\*\.feed_forward\.w1 \(Linear\)"),
        ("recurrent_gemma", {}, r"temporal_block\.conv_1d \(Conv1d\)"),
    ],
)
def test_modules_that_are_not_understood_are_named(
    tmp_path: Path, architecture: str, changes: dict[str, Any], named: str
) -> None:
    config = AutoConfig.for_model(architecture, **{**SMALL, "num_key_value_heads": 2, **changes})
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedArchitecture, match=named):
        anatomy_of(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 3),
        ("num_hidden_layers", 4000),
        ("hidden_size", 1 << 20),
        ("num_attention_heads", 3),
        ("num_key_value_heads", 3),
        ("head_dim", 60000),
        ("pad_token_id", 100000),
        ("hidden_act", "none such"),
        ("rope_parameters", {"rope_type": "yarn"}),
        ("_attn_implementation", "flash_attention_2"),
    ],
)
def test_a_config_that_does_not_belong_to_the_weights_is_a_typed_error(
    tmp_path: Path, field: str, value: Any
) -> None:
    directory = save_model(tmp_path / "model")
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
    if field == "_attn_implementation":  # a wish for speed, which changes no value
        assert anatomy_of(directory).blocks
        return
    with pytest.raises((CheckpointError, UnsupportedArchitecture)):
        anatomy_of(directory)


def test_reading_needs_no_weights(tmp_path: Path) -> None:
    """The bodies of the tensors may be anything, even NaN, and are never looked at."""
    directory = edit_tensors(
        save_model(tmp_path / "model", "gemma3_text"), lambda t: [x.fill_(float("nan")) for x in t.values()]
    )
    assert len(anatomy_of(directory).blocks) == 2


def test_other_decoders_are_read_by_the_same_mechanism(tmp_path: Path) -> None:
    for architecture in ("phi", "starcoder2", "granite", "nemotron"):
        config = AutoConfig.for_model(architecture, **{**SMALL, "num_key_value_heads": 4})
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / architecture)
        anatomy = anatomy_of(tmp_path / architecture)
        assert len(list(anatomy.linears())) >= 10
        assert all(block.norm_groups for block in anatomy.blocks)


def test_make_model_is_the_model_of_its_files(tmp_path: Path) -> None:
    """The tests above compare with files on disk; these hold what `make_model` makes."""
    directory = save_model(tmp_path / "model", "olmo2")
    stored = load_file(directory / "model.safetensors")
    for name, tensor in make_model("olmo2").state_dict().items():
        assert torch.equal(stored[name], tensor)
