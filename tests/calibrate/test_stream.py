"""A model run block by block gives what the whole model gives, and holds no more than it says."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from tailorbird.calibrate.stream import StreamingModel
from tailorbird.formats.modules import CompressedLinear
from tailorbird.formats.packed import IntegerCoding, PackedWeight
from tailorbird.model.anatomy import Anatomy, read_anatomy
from tailorbird.model.checkpoint import open_checkpoint, write_json, write_tensors
from tailorbird.model.layout import ModelLayout, ModuleLayout
from tiny import ARCHITECTURES, save_model

CASES: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in ARCHITECTURES}
CASES |= {
    "opt, norm after, projected": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    "falcon, positions as biases": ("falcon", {"alibi": True, "new_decoder_architecture": False}),
    "gemma3_text, both kinds": ("gemma3_text", {"layer_types": ["sliding_attention", "full_attention"]}),
    "gemma2, capped": ("gemma2", {"final_logit_softcapping": 0.2, "attn_logit_softcapping": 0.3}),
    "llama, one block": ("llama", {"num_hidden_layers": 1}),
    "phi3, long": (
        "phi3",
        {
            "max_position_embeddings": 64,
            "original_max_position_embeddings": 32,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0 + 0.1 * i for i in range(8)],
                "long_factor": [2.0 + 0.3 * i for i in range(8)],
                "original_max_position_embeddings": 32,
            },
        },
    ),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small run slower on several threads, and much slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def stream(directory: Path, dtype: torch.dtype = torch.float32) -> StreamingModel:
    checkpoint = open_checkpoint(str(directory))
    return StreamingModel(checkpoint, read_anatomy(checkpoint), dtype)


def load(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(3))


def run_all(model: StreamingModel, ids: torch.Tensor) -> torch.Tensor:
    hidden = model.embed(ids)
    model.release_ends()
    for index in range(len(model.anatomy.blocks)):
        hidden = model.run_block(model.load_block(index), index, hidden)
    logits = model.logits(hidden)
    model.release_ends()
    return logits


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_logits_are_those_of_the_whole_model(tmp_path: Path, case: str, stored: torch.dtype) -> None:
    architecture, changes = CASES[case]
    directory = save_model(tmp_path, architecture, dtype=stored, **changes)
    model, whole = stream(directory), load(directory)
    for ids in (tokens(2, 40), tokens(1, 23), tokens(2, 40)):
        expected = whole(ids).logits
        found = run_all(model, ids)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_blocks_and_ends_each_agree_with_the_whole_model(tmp_path: Path) -> None:
    directory = save_model(tmp_path, "gemma2")
    model, ids = stream(directory), tokens(2, 40)
    states = load(directory)(ids, output_hidden_states=True).hidden_states
    hidden = model.embed(ids)
    torch.testing.assert_close(hidden, states[0])
    torch.testing.assert_close(model.run_block(model.load_block(0), 0, hidden), states[1])
    last = model.run_block(model.load_block(1), 1, states[1])
    torch.testing.assert_close(model.head_input(last), states[2])


@torch.no_grad()
def test_a_block_may_be_run_first_and_in_any_order(tmp_path: Path) -> None:
    """As a resumed run does: no embedding was read, and masks depend on the shape alone."""
    directory = save_model(tmp_path, "mistral")
    hidden = torch.randn(2, 40, 64)
    fresh, used = stream(directory), stream(directory)
    run_all(used, tokens(2, 40))
    for index in (1, 0):
        first = fresh.run_block(fresh.load_block(index), index, hidden)
        assert torch.equal(first, used.run_block(used.load_block(index), index, hidden))


@torch.no_grad()
def test_logits_of_some_positions_are_those_positions_of_the_logits(tmp_path: Path) -> None:
    model = stream(save_model(tmp_path, "gemma3_text"))
    hidden = torch.randn(2, 40, 64)
    torch.testing.assert_close(model.logits(hidden[:, 7:19]), model.logits(hidden)[:, 7:19])


@torch.no_grad()
def test_the_same_inputs_give_the_same_bits(tmp_path: Path) -> None:
    directory, ids = save_model(tmp_path, "qwen3"), tokens(2, 40)
    assert torch.equal(run_all(stream(directory), ids), run_all(stream(directory), ids))


@torch.no_grad()
def test_another_compute_dtype_is_that_of_the_whole_model(tmp_path: Path) -> None:
    directory, ids = save_model(tmp_path, "gemma2", dtype=torch.bfloat16), tokens(1, 40)
    model = stream(directory, torch.bfloat16)
    assert model.embed(ids).dtype == torch.bfloat16
    expected = load(directory, torch.bfloat16)(ids).logits.float()
    torch.testing.assert_close(run_all(model, ids), expected, rtol=0, atol=0.02)


def test_a_dropped_block_leaves_nothing_behind(tmp_path: Path) -> None:
    model = stream(save_model(tmp_path, "llama"))
    block = model.load_block(0)
    with torch.no_grad():
        model.run_block(block, 0, torch.randn(1, 8, 64))
    parameters = [weakref.ref(p) for p in block.parameters()]
    assert not any(p.requires_grad for p in block.parameters())
    del block
    gc.collect()
    assert not any(reference() is not None for reference in parameters)


def test_released_ends_take_no_memory(tmp_path: Path) -> None:
    for architecture in ("llama", "qwen2"):
        model = stream(save_model(tmp_path / architecture, architecture))
        model.load_ends()
        ends = [weakref.ref(model.end_weight(n).untyped_storage()) for n in ("model.embed_tokens", "lm_head")]
        model.release_ends()
        gc.collect()
        assert not any(storage() is not None for storage in ends)
        outside = [t for _, t in model._outline.model.named_parameters() if not t.is_meta]
        stored = sum(t.untyped_storage().nbytes() for t in outside)
        assert stored < 1000


def test_a_tied_pair_is_read_once(tmp_path: Path) -> None:
    model = stream(save_model(tmp_path, "qwen2"))
    model.load_ends()
    one, other = model.end_weight("model.embed_tokens"), model.end_weight("lm_head")
    assert one.data_ptr() == other.data_ptr()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3", "opt"])
@torch.no_grad()
def test_each_distinct_input_is_shown_once_in_forward_order(tmp_path: Path, architecture: str) -> None:
    directory = save_model(tmp_path, architecture)
    model, whole, ids = stream(directory), load(directory), tokens(2, 24)
    expected: dict[str, torch.Tensor] = {}
    for place in model.anatomy.linears():
        whole.get_submodule(place.name).register_forward_pre_hook(
            lambda module, inputs, name=place.name: expected.__setitem__(name, inputs[0])
        )
    whole(ids)
    hidden = model.embed(ids)
    for index, anatomy in enumerate(model.anatomy.blocks):
        block, shown = model.load_block(index), []
        output = model.capture_inputs(block, index, hidden, lambda key, x, to=shown: to.append((key, x)))
        assert torch.equal(output, model.run_block(block, index, hidden))
        assert [key for key, _ in shown] == list(dict.fromkeys(p.shares_input for p in anatomy.linears))
        for key, x in shown:
            torch.testing.assert_close(x.flatten(), expected[key].flatten())
        assert not any(m._forward_pre_hooks for m in block.modules())
        hidden = output


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
@torch.no_grad()
def test_a_replaced_weight_is_used_and_the_old_one_kept(tmp_path: Path, architecture: str) -> None:
    directory = save_model(tmp_path, architecture)
    model, hidden = stream(directory), torch.randn(1, 8, 64)
    block = model.load_block(0)
    before = model.run_block(block, 0, hidden)
    for place in model.anatomy.blocks[0].linears:
        weight = model.weight_of(block, place)
        assert weight.shape == (place.out_features, place.in_features)
        stored = load_file(directory / "model.safetensors")[place.weight_name]
        assert torch.equal(weight, stored.t() if place.transposed else stored)
        model.set_weight(block, place, weight * 1.5)
        assert not torch.equal(model.run_block(block, 0, hidden), before)
        model.set_weight(block, place, weight)
        assert torch.equal(model.run_block(block, 0, hidden), before)
        with pytest.raises(ValueError, match="a weight"):
            model.set_weight(block, place, weight[1:])


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@torch.no_grad()
def test_a_replaced_end_is_used_until_it_is_released(tmp_path: Path, architecture: str) -> None:
    model, ids, hidden = stream(save_model(tmp_path, architecture)), tokens(1, 8), torch.randn(1, 8, 64)
    anatomy = model.anatomy
    embedded, logits = model.embed(ids), model.logits(hidden)
    original = model.end_weight(anatomy.embedding)
    model.set_end_weight(anatomy.embedding, original * 2)
    torch.testing.assert_close(model.embed(ids), 2 * embedded)
    assert torch.equal(model.logits(hidden), logits) == (not anatomy.tied)
    model.set_end_weight(anatomy.head, original * 3)
    torch.testing.assert_close(model.embed(ids), (3 if anatomy.tied else 2) * embedded)
    model.release_ends()
    assert torch.equal(model.embed(ids), embedded)
    assert torch.equal(model.logits(hidden), logits)


def compress(source: Path, target: Path, bits: int) -> Anatomy:
    """Round every linear, the embedding and an untied head of `source`, and write the checkpoint `target`."""
    checkpoint = open_checkpoint(str(source))
    anatomy = read_anatomy(checkpoint)
    coding = IntegerCoding(bits, 32)
    modules: dict[str, ModuleLayout] = {}
    tensors = {name: checkpoint.weights.read(name) for name in checkpoint.weights.names}

    def pack(name: str, transposed: bool, bias: bool) -> None:
        weight = tensors.pop(f"{name}.weight").float()
        packed = rounded(weight.t() if transposed else weight, coding)
        tensors.update({f"{name}.{part}": tensor for part, tensor in packed.tensors.items()})
        modules[name] = ModuleLayout(packed.out_features, packed.in_features, coding, bias)

    for place in anatomy.linears():
        pack(place.name, place.transposed, place.bias)
    for name in {anatomy.embedding} if anatomy.tied else {anatomy.embedding, anatomy.head}:
        pack(name, False, False)
    target.mkdir()
    layout = ModelLayout(modules, anatomy.embedding, anatomy.head, anatomy.tied)
    config = json.loads((source / "config.json").read_text())
    write_json(target / "config.json", {**config, "quantization_config": layout.to_dict()})
    write_tensors(target / "model.safetensors", tensors)
    return anatomy


def rounded(weight: torch.Tensor, coding: IntegerCoding) -> PackedWeight:
    rows, columns = weight.shape
    groups = -(-columns // coding.group_size)
    scales = torch.full((rows, groups), float(weight.abs().max()) / 2 ** (coding.bits - 1)).bfloat16()
    zeros = torch.full((rows, groups), 2 ** (coding.bits - 1), dtype=torch.uint8)
    codes = (weight / scales[0, 0].float()).round() + 2 ** (coding.bits - 1)
    codes = codes.clamp(0, 2**coding.bits - 1).to(torch.uint8)
    return PackedWeight.from_codes(codes, scales, zeros, coding)


@pytest.fixture(params=["llama", "qwen2", "gpt2", "gpt_neox", "gemma2", "falcon"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    source = save_model(tmp_path / "source", request.param)
    compress(source, tmp_path / "compressed", bits=8)
    return source, tmp_path / "compressed"


def test_a_compressed_checkpoint_has_the_anatomy_of_its_source(pair: tuple[Path, Path]) -> None:
    source, target = (read_anatomy(open_checkpoint(str(d))) for d in pair)
    for field in ("embedding", "head", "tied", "vocab_size", "hidden_size", "other", "kv_bytes_per_token"):
        assert getattr(source, field) == getattr(target, field)
    for one, other in zip(source.blocks, target.blocks, strict=True):
        assert (one.other, one.norm_groups, one.scale_pairs) == (
            other.other,
            other.norm_groups,
            other.scale_pairs,
        )
        for a, b in zip(one.linears, other.linears, strict=True):
            assert (a.name, a.role, a.in_features, a.out_features, a.bias, a.shares_input) == (
                b.name,
                b.role,
                b.in_features,
                b.out_features,
                b.bias,
                b.shares_input,
            )
            assert not b.transposed


@torch.no_grad()
def test_a_compressed_checkpoint_streams_like_the_whole_model(pair: tuple[Path, Path]) -> None:
    source, target = pair
    model, ids = stream(target), tokens(2, 40)
    block = model.load_block(0)
    packed = [m for m in block.modules() if isinstance(m, nn.Linear)]
    assert packed
    assert all(isinstance(m, CompressedLinear) for m in packed)
    from tailorbird.model.load import load as load_compressed

    expected = load_compressed(target, dtype=torch.float32)(ids).logits
    for _ in range(2):
        torch.testing.assert_close(run_all(model, ids), expected, rtol=1e-4, atol=1e-4)
    assert (expected - load(source)(ids).logits).abs().mean() < 0.05


@torch.no_grad()
def test_weights_of_a_compressed_checkpoint_are_unpacked_and_not_replaced(pair: tuple[Path, Path]) -> None:
    source, target = (stream(d) for d in pair)
    dense, packed = source.load_block(1), target.load_block(1)
    for place in source.anatomy.blocks[1].linears:
        one, other = source.weight_of(dense, place), target.weight_of(packed, place)
        assert (one - other).abs().max() < 0.02 * one.abs().max()
        with pytest.raises(ValueError, match="packed"):
            target.set_weight(packed, place, one)
    name = source.anatomy.embedding
    one, other = source.end_weight(name), target.end_weight(name)
    assert (one - other).abs().max() < 0.02 * one.abs().max()
    with pytest.raises(ValueError, match="packed"):
        target.set_end_weight(name, one)
