"""A checkpoint is opened without running anything, and copied and fingerprinted faithfully."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tailorbird.errors import CheckpointError
from tailorbird.model.checkpoint import Checkpoint, open_checkpoint, write_tensors
from tailorbird.model.weights import Weights
from tiny import ARCHITECTURES, save_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("saved") / "llama", "llama")


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    """A fresh copy that a test may damage."""
    return shutil.copytree(saved, tmp_path / "model")


def change_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(directory))
    assert caught.value.exit_status == 2
    return str(caught.value)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_counts_the_parameters_of_every_architecture(tmp_path: Path, architecture: str) -> None:
    from transformers import AutoModelForCausalLM

    checkpoint = open_checkpoint(str(save_model(tmp_path, architecture)))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert checkpoint.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert not checkpoint.compressed
    assert checkpoint.config.model_type == architecture
    assert checkpoint.tokenizer().decode(checkpoint.tokenizer()("a nest").input_ids) == "a nest"


def test_a_packed_module_counts_as_what_it_was(model: Path) -> None:
    whole = open_checkpoint(str(model))
    weights = {name: whole.weights.read(name) for name in whole.weights.names}
    name = "model.layers.0.mlp.up_proj"
    rows, columns = weights.pop(f"{name}.weight").shape
    weights[f"{name}.codes"] = torch.zeros(rows, columns // 2, dtype=torch.uint8)
    weights[f"{name}.scales"] = torch.ones(rows, 1, dtype=torch.bfloat16)
    write_tensors(model / "model.safetensors", weights)
    module = {"out": rows, "in": columns, "bias": False, "coding": {}}
    change_config(
        model, quantization_config={"quant_method": "tailorbird", "schema": 1, "modules": {name: module}}
    )
    packed = open_checkpoint(str(model))
    assert packed.compressed
    assert packed.parameters == whole.parameters


@pytest.mark.parametrize("modules", [[], 3, {"a": 1}, {"a": {"in": 4}}, {"a": {"in": "4", "out": 4}}])
def test_a_damaged_table_of_modules_is_refused(model: Path, modules: Any) -> None:
    change_config(model, quantization_config={"quant_method": "tailorbird", "modules": modules})
    assert "quantization_config" in refused(model)


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_files_are_named(model: Path, name: str) -> None:
    (model / name).unlink()
    assert name in refused(model)


def test_a_missing_tokenizer_is_refused_when_it_is_asked_for(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        open_checkpoint(str(model)).tokenizer()


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"model": {"type": "no"}}', '{"model": null, "version": 3}']
)
def test_a_damaged_tokenizer_is_refused(model: Path, content: str) -> None:
    (model / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match="tokenizer"):
        open_checkpoint(str(model)).tokenizer()


def test_a_tokenizer_of_a_larger_vocabulary_is_refused(model: Path, tmp_path: Path) -> None:
    small = save_model(
        tmp_path / "small", "llama", vocab_size=100, bos_token_id=1, eos_token_id=2, pad_token_id=2
    )
    with pytest.raises(CheckpointError, match="at most 100"):
        open_checkpoint(str(small)).tokenizer()


def test_a_tokenizer_that_brings_code_is_refused(model: Path) -> None:
    path = model / "tokenizer_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["evil.Tok", None]}})
    )
    with pytest.raises(CheckpointError, match="`auto_map` asks to run"):
        open_checkpoint(str(model)).tokenizer()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_pickled_weights_are_refused_with_the_way_out(model: Path, name: str) -> None:
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(b"\x80\x04")
    message = refused(model)
    assert name in message
    assert "safe_serialization" in message


def test_safetensors_under_another_name_are_mentioned(model: Path) -> None:
    (model / "model.safetensors").rename(model / "weights.safetensors")
    assert "weights.safetensors" in refused(model)


def test_a_damaged_generation_config_is_refused(model: Path) -> None:
    (model / "generation_config.json").write_text("{")
    assert "generation_config.json" in refused(model)


def test_no_code_of_the_checkpoint_runs(model: Path, tmp_path: Path) -> None:
    """Everything a loader might be lured into: modules beside the config, pickles, templates."""
    trap = tmp_path / "sprung"
    code = f"open({str(trap)!r}, 'w').close()\n"
    for name in (
        "modeling_llama.py",
        "configuration_llama.py",
        "tokenization_llama.py",
        "sitecustomize.py",
        "json.py",
    ):
        (model / name).write_text(code)
    pickle = b"cbuiltins\nexec\n(V" + code.strip().encode() + b"\ntR."
    (model / "pytorch_model.bin").write_bytes(pickle)
    checkpoint = open_checkpoint(str(model))
    checkpoint.tokenizer()
    checkpoint.content_hash()
    change_config(
        model, auto_map={"AutoConfig": "configuration_llama.C", "AutoModelForCausalLM": "modeling_llama.M"}
    )
    message = refused(model)
    assert "modeling_llama.M" in message
    assert not trap.exists()


# --- fingerprint, hash ---------------------------------------------------------------------------


def test_the_fingerprint_changes_with_config_header_size_and_time_only(model: Path) -> None:
    first = open_checkpoint(str(model)).fingerprint
    (model / "README.md").write_text("hello")
    moved = model.rename(model.with_name("elsewhere"))
    assert open_checkpoint(str(moved)).fingerprint == first
    seen = {first}
    weights = moved / "model.safetensors"
    times = weights.stat().st_mtime_ns
    os.utime(weights, ns=(times, times + 1))
    seen.add(open_checkpoint(str(moved)).fingerprint)
    os.utime(weights, ns=(times, times))
    assert open_checkpoint(str(moved)).fingerprint == first
    change_config(moved, rms_norm_eps=1e-3)
    seen.add(open_checkpoint(str(moved)).fingerprint)
    # same length, other header
    weights.write_bytes(weights.read_bytes().replace(b"layers.0.mlp.up_proj", b"layers.0.mlp.uq_proj"))
    os.utime(weights, ns=(times, times))
    seen.add(open_checkpoint(str(moved)).fingerprint)
    assert len(seen) == 4


def test_the_content_hash_knows_values_but_not_shards(model: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(model))
    first = checkpoint.content_hash()
    tensors = {name: checkpoint.weights.read(name) for name in checkpoint.weights.names}
    (model / "model.safetensors").unlink()
    names = list(tensors)
    parts = {"one.safetensors": names[:7], "two.safetensors": names[7:]}
    for file, inside in parts.items():
        write_tensors(model / file, {name: tensors[name] for name in inside})
    index = {name: file for file, inside in parts.items() for name in inside}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert open_checkpoint(str(model)).content_hash() == first
    tensors[names[9]].view(-1)[3] += 1
    write_tensors(model / "two.safetensors", {name: tensors[name] for name in parts["two.safetensors"]})
    assert open_checkpoint(str(model)).content_hash() != first


# --- companions, licence -------------------------------------------------------------------------


def test_companions_are_copied_byte_for_byte_and_nothing_else(model: Path, tmp_path: Path) -> None:
    wanted = {
        "chat_template.jinja": b"{{ x }}\r\n",
        "additional_chat_templates/tool.jinja": b"{{ y }}",
        "merges.txt": b"a b\n",
        "LICENSE": b"Apache\n",
        "NOTICE.txt": b"N\xff\n",
        "tokenizer.model": b"\0\1\2",
        "special_tokens_map.json": b'{ "bos_token":"<s>"}',
    }
    unwanted = ["pytorch_model.bin", "modeling_x.py", "tokenizer.py", "LICENSE.py", "README.md", "data.jsonl"]
    (model / "additional_chat_templates").mkdir()
    for name, content in (wanted | dict.fromkeys(unwanted, b"x")).items():
        (model / name).write_bytes(content)
    source = open_checkpoint(str(model))
    target = tmp_path / "target"
    target.mkdir()
    copied = source.copy_companions(target)
    assert copied == sorted(copied)
    assert set(copied) == {*wanted, "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert {p.relative_to(target).as_posix() for p in target.rglob("*") if p.is_file()} == set(copied)
    for name in copied:
        assert (target / name).read_bytes() == (model / name).read_bytes()


@pytest.mark.parametrize(
    ("card", "licence", "expected"),
    [
        ("---\nlanguage: en\nlicense: apache-2.0\n---\n# hi", "MIT License\n", "apache-2.0"),
        ("---\nlicense:\n- mit\n---\n", None, "mit"),
        ('---\nlicense: other\nlicense_name: "gemma"\n---\n', None, "gemma"),
        ("---\r\nlicense: mit\r\n---\r\n", None, "mit"),
        ("# no front matter\nlicense: gpl\n", "\n\n  MIT License\n\nmore", "MIT License"),
        (None, "MIT License", "MIT License"),
        (None, None, None),
        ("---\nlicense: [\n", None, None),
    ],
)
def test_the_licence_is_read_from_card_or_file(
    model: Path, card: str | None, licence: str | None, expected: str | None
) -> None:
    for name, text in (("README.md", card), ("LICENSE.txt", licence)):
        if text is not None:
            (model / name).write_bytes(text.encode())
    assert open_checkpoint(str(model)).licence == expected


def test_opening_reads_no_body(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*arguments: Any) -> None:
        raise AssertionError("a body was read")

    monkeypatch.setattr(Weights, "_pieces", forbidden)
    checkpoint = open_checkpoint(str(model))
    assert isinstance(checkpoint, Checkpoint)
