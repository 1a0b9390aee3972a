"""Files appear whole or not at all, with the same bytes every time."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tailorbird.errors import ResourceError
from tailorbird.model.safetensors_header import DTYPES
from tailorbird.model.weights import Weights
from tailorbird.model.writing import tensor_hash, write_json, write_tensors, write_text

PROGRAM = """
import sys
from pathlib import Path
import torch
from tailorbird.model.writing import write_tensors
generator = torch.Generator().manual_seed(0)
names = [f"model.layers.{i}.weight" for i in range(20)]
if sys.argv[2] == "backwards":
    names.reverse()
tensors = {}
for name in names:
    number = int(name.split(".")[2])
    dtype = [torch.float32, torch.bfloat16, torch.uint8][number % 3]
    tensors[name] = (torch.arange(number + 1) * 7 % 5).to(dtype)
write_tensors(Path(sys.argv[1]), tensors)
"""


def test_bytes_are_the_same_in_every_process_and_order(tmp_path: Path) -> None:
    digests = set()
    for order in ("forwards", "backwards"):
        path = tmp_path / f"{order}.safetensors"
        environment = {**os.environ, "PYTHONHASHSEED": str(len(order))}
        subprocess.run([sys.executable, "-c", PROGRAM, str(path), order], check=True, env=environment)
        digests.add(hashlib.sha256(path.read_bytes()).hexdigest())
    assert len(digests) == 1


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    tensors = {name: torch.ones(3, 5).to(dtype) for name, dtype in DTYPES.items()}
    tensors |= {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 3), "turned": torch.randn(5, 3).t()}
    tensors |= {'quoted " \\ {}': torch.arange(4), "strided": torch.arange(20).view(4, 5)[1:3, ::2]}
    path = tmp_path / "model.safetensors"
    write_tensors(path, tensors)
    read = load_file(path)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
        assert tensor_hash(read[name]) == tensor_hash(tensor)
    with safe_open(path, "pt") as file:
        recorded = file.metadata()
    assert recorded.pop("format") == "pt"
    assert recorded.pop("tailorbird") == "1"
    assert recorded == {f"sha256:{name}": tensor_hash(tensor) for name, tensor in tensors.items()}
    assert Weights.open(tmp_path).recorded_hashes() == {
        name: tensor_hash(tensors[name]) for name in sorted(tensors)
    }
    Weights.open(tmp_path).verify()


def test_the_hash_is_that_of_the_stored_bytes() -> None:
    tensor = torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8)
    assert tensor_hash(tensor) == hashlib.sha256(b"\1\2\3\4").hexdigest()
    assert tensor_hash(tensor.t()) == hashlib.sha256(b"\1\3\2\4").hexdigest()


@pytest.mark.parametrize("name", ["", "é", "a\nb", "__metadata__", "x" * 513])
def test_names_that_could_not_be_read_back_are_not_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError):
        write_tensors(tmp_path / "model.safetensors", {name: torch.zeros(1)})
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plan.json"
    write_json(path, {"a": 1})
    old = path.read_bytes()

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="No space left"):
        write_tensors(path, {"a": torch.zeros(5)})
    with pytest.raises(ResourceError, match="free some space"):
        write_text(path, "new")
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["plan.json"]


def test_a_missing_directory_is_a_typed_error(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="create the directory"):
        write_text(tmp_path / "none" / "a.txt", "x")


def test_what_a_killed_process_left_is_cleared(tmp_path: Path) -> None:
    kill = (
        "import os, sys; from pathlib import Path; from tailorbird.model import writing\n"
        "writing.os.fsync = lambda handle: os.kill(os.getpid(), 9)\n"
        "writing.write_text(Path(sys.argv[1]), 'half')"
    )
    path = tmp_path / "plan.yaml"
    assert subprocess.run([sys.executable, "-c", kill, str(path)], check=False).returncode == -9
    assert len(os.listdir(tmp_path)) == 1
    assert not path.exists()
    own = tmp_path / f".plan.yaml.{os.getppid()}.unfinished"  # another process, still at work
    own.touch()
    write_text(path, "whole")
    assert sorted(os.listdir(tmp_path)) == sorted([own.name, "plan.yaml"])


def test_json_is_plain_and_refuses_what_json_has_no_word_for(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"b": "é", "a": [1]})
    assert path.read_text(encoding="utf-8") == '{\n  "b": "é",\n  "a": [\n    1\n  ]\n}\n'
    with pytest.raises(ValueError):
        write_json(path, {"x": float("nan")})
