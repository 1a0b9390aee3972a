"""What config.json must not say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tailorbird.errors import CheckpointError
from tailorbird.model.checkpoint import open_checkpoint
from tiny import save_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("saved") / "llama", "llama")


CONFIGS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}, ("auto_map", "modeling_x.X", "never executed")),
    ({"text_config": {"auto_map": "x"}}, ("auto_map",)),
    ({"model_type": "lama"}, ("'lama'", "`llama`")),
    ({"model_type": None}, ("model_type",)),
    ({"model_type": ["llama"]}, ("model_type",)),
    ({"model_type": "t5"}, ("`t5` is not a causal language model",)),
    ({"model_type": "bart", "is_encoder_decoder": True, "architectures": None}, ("encoder-decoder",)),
    ({"architectures": ["LlamaForMaskedLM"]}, ("LlamaForMaskedLM", "LlamaForCausalLM")),
    ({"architectures": "LlamaForCausalLM"}, ("architectures",)),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, ("already quantized by 'gptq'",)),
    ({"quantization_config": {"load_in_4bit": True}}, ("already quantized by None",)),
    ({"quantization_config": [1]}, ("already quantized",)),
    ({"compression_config": {"format": "int"}}, ("compressed-tensors",)),
    ({"attn_implementation": "someone/kernel"}, ("attn_implementation", "fetched and run")),
    ({"_attn_implementation": "someone/kernel:x"}, ("_attn_implementation",)),
    ({"configuration_files": ["config.4.0.0.json"]}, ("configuration_files",)),
    ({"transformers_weights": "other.safetensors"}, ("transformers_weights",)),
    ({"hidden_size": -64}, ("hidden_size", "-64")),
    ({"hidden_size": "64"}, ("hidden_size", "'64'")),
    ({"hidden_size": 64.0}, ("hidden_size",)),
    ({"hidden_size": None}, ("hidden_size",)),
    ({"hidden_size": True}, ("hidden_size",)),
    ({"num_hidden_layers": 10**12}, ("num_hidden_layers",)),
    ({"num_hidden_layers": 4000}, ("num_hidden_layers",)),
    ({"num_hidden_layers": 0}, ("num_hidden_layers",)),
    ({"vocab_size": 1 << 40}, ("vocab_size",)),
    ({"num_labels": 10**9}, ("num_labels",)),
    ({"max_position_embeddings": 10**100}, ("max_position_embeddings",)),
    ({"rope_theta": float("nan")}, ("rope_theta",)),
    ({"invented": 10**400}, ("invented",)),
    ({"dtype": "nn"}, ("dtype",)),
    ({"torch_dtype": ["float32"]}, ("torch_dtype",)),
    ({"__class__": "x"}, ("__class__",)),
    ({"to_dict": 1}, ("to_dict",)),
    ({"rms_norm_eps": "small"}, ("rms_norm_eps",)),
    ({"layer_types": 3}, ("the model's config cannot be made",)),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "words"), CONFIGS, ids=[" ".join(changes) for changes, _ in CONFIGS])
def test_unsafe_and_absurd_configs_are_refused_by_name(
    saved: Path, tmp_path: Path, changes: dict[str, Any], words: tuple[str, ...]
) -> None:
    model = shutil.copytree(saved, tmp_path / "model")
    raw = json.loads((model / "config.json").read_text()) | changes
    (model / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(model))
    for word in words:
        assert word in str(caught.value)
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "holds a JSON list"),
        (b'"x"', "holds a JSON str"),
        (b"\xff{}", "not UTF-8"),
        (b'{"a": 1, "a": 2}', "'a' occurs twice"),
        (b'{"a": ' + b"[" * 10_000, "nest too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"a": [' + b"[]," * 100_000 + b"[]]}", "values in"),
        (b" " * (17 << 20), "larger than 16 MiB"),
    ],
    ids=["empty", "open", "list", "string", "encoding", "duplicate", "deep", "digits", "values", "size"],
)
def test_what_is_no_json_object_is_refused(saved: Path, tmp_path: Path, content: bytes, words: str) -> None:
    model = shutil.copytree(saved, tmp_path / "model")
    (model / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(str(model))


def test_harmless_settings_pass(saved: Path, tmp_path: Path) -> None:
    """Real configs carry these; refusing them would refuse real models."""
    model = shutil.copytree(saved, tmp_path / "model")
    raw = json.loads((model / "config.json").read_text())
    raw |= {"_name_or_path": "org/model", "torch_dtype": "bfloat16", "sliding_window": None}
    raw |= {
        "pad_token_id": -1,
        "eos_token_id": [256, 257],
        "attn_implementation": "sdpa",
        "pretraining_tp": 1,
    }
    raw |= {"transformers_version": "4.20.0", "id2label": {"0": "A", "1": "B"}, "unknown_to_all": {"x": [1]}}
    del raw["architectures"]
    (model / "config.json").write_text(json.dumps(raw))
    assert open_checkpoint(str(model)).config.hidden_size == 64
