"""Damaged checkpoints end in typed errors, never in a traceback, and never in much memory."""

from __future__ import annotations

import json
import os
import random
import shutil
import traceback
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tailorbird.errors import TailorbirdError
from tailorbird.model.checkpoint import open_checkpoint, write_tensors
from tailorbird.model.weights import Weights
from tiny import save_model

#: a config object, the libraries' caches and error messages, whatever the file's size
CONSTANT = 2 << 20

STRANGE: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 7, 1 << 31, 1 << 40, 1 << 63, -(1 << 70), 10**400, 0.0, -0.5, 1e308,
    float("inf"), float("nan"), "", "0", "4", "llama", "gpt2", "t5", "../../etc/passwd", "/dev/zero", "\x00",
    "é😀", "__import__('os')", "a" * 5000, [], [[]], [0], [1, -1], ["x"], [1 << 62, 1 << 62], {}, {"x": 1},
    {"0": {}}, {"rope_type": "linear"}, {"rope_type": "yarn", "factor": "x"}, {"quant_method": "gptq"},
    {"quant_method": "tailorbird"}, {"quant_method": "tailorbird", "modules": {"a": {"in": -1, "out": 1}}},
    "F64", "F8_E4M3", "BF16", "F4", "bfloat16", "nn", "float8_e8m0fnu",
]  # fmt: skip
NAMES = [
    "auto_map", "is_encoder_decoder", "architectures", "quantization_config", "attn_implementation", "dtype",
    "torch_dtype", "rope_scaling", "rope_theta", "rope_parameters", "layer_types", "text_config",
    "num_labels", "id2label", "to_dict", "__class__", "_name_or_path", "sliding_window", "head_dim",
    "per_layer_config", "num_experts", "configuration_files", "pruned_heads", "tie_word_embeddings",
    "attribute_map", "sub_configs", "base_model_tp_plan", "return_dict", "hidden_act",
    "partial_rotary_factor", "model_type",
]  # fmt: skip


def mutate_value(value: Any, chance: random.Random) -> Any:
    """Change one thing somewhere in a JSON value."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        value = dict(value)
        key = chance.choice(sorted(value))
        kind = chance.random()
        if kind < 0.1:
            del value[key]
        elif kind < 0.2:
            value[chance.choice([*NAMES, key + "x", ""])] = chance.choice(STRANGE)
        elif kind < 0.3:
            value[chance.choice(sorted(value))] = value[key]
        elif kind < 0.6:
            value[key] = chance.choice(STRANGE)
        else:
            value[key] = mutate_value(value[key], chance)
        return value
    if isinstance(value, list) and value and chance.random() < 0.9:
        value = list(value)
        place = chance.randrange(len(value))
        if chance.random() < 0.2:
            value.insert(place, chance.choice(STRANGE))
        else:
            value[place] = mutate_value(value[place], chance)
        return value
    if type(value) is int and chance.random() < 0.7:
        return chance.choice([value + 1, value - 1, -value, value * 2, value << 20, value << 60, str(value)])
    return chance.choice(STRANGE)


def mutate_bytes(data: bytes, chance: random.Random) -> bytes:
    """Flip, cut, repeat or insert bytes."""
    changed = bytearray(data)
    for _ in range(chance.choice([1, 1, 2, 8])):
        place = chance.randrange(len(changed) + 1)
        kind = chance.randrange(5)
        if kind == 0 and place < len(changed):
            changed[place] ^= 1 << chance.randrange(8)
        elif kind == 1 and place < len(changed):
            changed[place] = chance.choice(b'{}[],:"\\0-9e.\x00\xff\n')
        elif kind == 2:
            del changed[place : place + chance.choice([1, 4, 100])]
        elif kind == 3:
            changed[place:place] = chance.choice(
                [b"{" * 3000, b"[" * 3000, b'"', b"\\u0000", b"9" * 5000, b"1e999"]
            )
        else:
            changed[place:place] = changed[place : place + 64]
    return bytes(changed)


def dumps(value: Any) -> bytes:
    return json.dumps(value).encode()


def with_header(data: bytes, header: bytes) -> bytes:
    """A safetensors file with another header before the same bodies."""
    length = int.from_bytes(data[:8], "little")
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def mutate_file(data: bytes, name: str, chance: random.Random) -> bytes:
    kind = chance.random()
    if name.endswith(".json"):
        return dumps(mutate_value(json.loads(data), chance)) if kind < 0.75 else mutate_bytes(data, chance)
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length]
    if kind < 0.4:
        return with_header(data, dumps(mutate_value(json.loads(header), chance)))
    if kind < 0.6:
        return with_header(data, mutate_bytes(header, chance))
    if kind < 0.7:
        return (
            chance.choice([0, 1, length - 1, length + 9, 1 << 20, 1 << 40, (1 << 64) - 1]).to_bytes(
                8, "little"
            )
            + data[8:]
        )
    if kind < 0.8:
        return data[: chance.randrange(len(data))]
    if kind < 0.9:
        place = chance.randrange(8 + length, len(data))
        return data[:place] + bytes(chance.randrange(256) for _ in range(64)) + data[place + 64 :]
    return mutate_bytes(data, chance)


@pytest.fixture(scope="module")
def victims(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three small checkpoints: one file, shards with an index, and one with recorded hashes."""
    root = tmp_path_factory.mktemp("victims")
    single = save_model(root / "single", "llama")
    sharded = shutil.copytree(single, root / "sharded")
    weights = Weights.open(single)
    parts = {
        "model-00001-of-00002.safetensors": weights.names[::2],
        "model-00002-of-00002.safetensors": weights.names[1::2],
    }
    (sharded / "model.safetensors").unlink()
    for file, names in parts.items():
        write_tensors(sharded / file, {name: weights.read(name) for name in names}, hashes=False)
    index = {
        "metadata": {"total_size": weights.total_bytes},
        "weight_map": {n: f for f, ns in parts.items() for n in ns},
    }
    (sharded / "model.safetensors.index.json").write_bytes(dumps(index))
    hashed = save_model(root / "hashed", "gpt2")
    write_tensors(
        hashed / "model.safetensors", {n: Weights.open(hashed).read(n) for n in Weights.open(hashed).names}
    )
    return [single, sharded, hashed]


def use(directory: Path) -> None:
    """Everything that a damaged file could reach."""
    checkpoint = open_checkpoint(str(directory))
    for name in checkpoint.weights.names:
        checkpoint.weights.read(name)
    checkpoint.weights.verify()
    _ = checkpoint.licence


def fuzz(victims: list[Path], tmp_path: Path, count: int, seed: int) -> Counter[str]:
    """Mutate, open and read `count` times; returns how often it ended in what."""
    outcomes: Counter[str] = Counter()
    for number in range(count):
        chance = random.Random(f"{seed} {number}")
        victim = victims[number % len(victims)]
        directory = tmp_path / "mutant"
        directory.mkdir()
        files = [p for p in sorted(victim.iterdir()) if p.name == "config.json" or p.name.startswith("model")]
        # the config takes most turns: what it says goes through the most code
        chosen = chance.choice([victim / "config.json", *files])
        size = 0
        for path in files:
            data = path.read_bytes()
            if path == chosen:
                data = mutate_file(data, path.name, chance)
            (directory / path.name).write_bytes(data)
            size += len(data)
        tracemalloc.start()
        try:
            use(directory)
            outcomes["read"] += 1
        except TailorbirdError as error:
            outcomes[type(error).__name__ if len(str(error)) < 3000 else "endless message"] += 1
        except Exception:
            kept = shutil.copytree(
                directory,
                Path(os.environ.get("TAILORBIRD_FUZZ_KEEP", tmp_path)) / f"failed-{number}",
                dirs_exist_ok=True,
            )
            pytest.fail(f"mutation {number} of {chosen.name}, kept in {kept}:\n{traceback.format_exc()}")
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < 2 * size + CONSTANT, f"mutation {number} of {chosen.name}: {peak} bytes for {size}"
        shutil.rmtree(directory)
    return outcomes


def test_hundred_mutations_end_typed(victims: list[Path], tmp_path: Path) -> None:
    for victim in victims:
        use(victim)
    outcomes = fuzz(victims, tmp_path, 100, seed=1)
    assert "endless message" not in outcomes
    # a fuzzer that breaks nothing, or everything, tests nothing
    assert outcomes["read"] > 5
    assert outcomes["CheckpointError"] > 30


@pytest.mark.full
def test_two_thousand_mutations_end_typed(victims: list[Path], tmp_path: Path) -> None:
    for victim in victims:
        use(victim)
    outcomes = fuzz(victims, tmp_path, 2000, seed=2)
    assert "endless message" not in outcomes
    assert outcomes["read"] > 100
    assert outcomes["CheckpointError"] > 600
