"""Adapters in shared bases: written, read, served; the same as before where a basis holds them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from peft_adapters import change_config, logits, opened, pair, prompt, save, wrapped
from tailorbird.errors import CheckpointError, ResourceError, SettingsError
from tailorbird.kernels import native
from tailorbird.kernels.adapters import BasisPart
from tailorbird.run.fused import FusedModel
from tailorbird.serve.adapters import share as sharing
from tailorbird.serve.adapters.kinds import open_adapter, read_linears
from tailorbird.serve.adapters.share import share, share_for_model

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the model."""
    return tmp_path_factory.mktemp("share") / "m"


@pytest.fixture(scope="module")
def model(directory: Path) -> tuple[FusedModel, Any]:
    return pair(directory, "llama")


def adapters(model: Any, folder: Path, count: int, **config: Any) -> list[Path]:
    settings = {"r": 2, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False} | config
    found = []
    for number in range(count):
        made = wrapped(model, peft.LoraConfig(**settings), seed=number)
        found.append(save(made, folder / f"a{number}"))
    return found


def read(fused: FusedModel, directory: Path, ids: Tensor) -> Tensor:
    return logits(fused, ids, opened(fused, directory))


def test_a_basis_that_is_wide_enough_changes_nothing(model: Any, tmp_path: Path) -> None:
    fused, dense = model
    directories, ids = adapters(dense, tmp_path, 3), prompt()
    found = share(fused.linears, directories, tmp_path / "out", rank=6)
    assert [one.name for one in found] == ["a0", "a1", "a2"]
    assert max(one.lost for one in found) < 1e-4  # the basis is stored with 8 bits of mantissa
    plain = logits(fused, ids, None)
    for directory in directories:
        before = read(fused, directory, ids)
        after = read(fused, tmp_path / "out" / directory.name, ids)
        assert (after - before).norm() < 0.02 * (before - plain).norm()


def test_what_is_shared_is_in_memory_once(model: Any, tmp_path: Path) -> None:
    fused, dense = model
    share(fused.linears, adapters(dense, tmp_path, 2), tmp_path / "out", rank=4)
    first, second = (
        read_linears(open_adapter(tmp_path / "out" / name, fused.linears)) for name in ("a0", "a1")
    )
    for place, one in first.items():
        assert isinstance(one.up, BasisPart)
        assert one.up is second[place].up
        assert one.down is second[place].down


def test_adapters_of_two_families_find_their_clusters(model: Any, tmp_path: Path) -> None:
    fused, dense = model
    directories = []
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    for number in range(6):
        torch.manual_seed(number % 2)
        made = wrapped(dense, config, seed=number % 2)
        with torch.no_grad():  # of a family, all are in one basis, each with another core
            for name, parameter in made.named_parameters():
                if "lora_B" in name:
                    mix = torch.randn(2, 2, generator=torch.Generator().manual_seed(10 + number))
                    parameter.copy_((parameter.float() @ mix).to(parameter.dtype))
        directories.append(save(made, tmp_path / f"a{number}"))
    found = share(fused.linears, directories, tmp_path / "out", rank=2, clusters=2)
    even, odd = ({one.cluster for one in found[begin::2]} for begin in (0, 1))
    assert len(even) == len(odd) == 1
    assert even != odd
    assert max(one.lost for one in found) < 1e-3
    alone = share(fused.linears, directories, tmp_path / "one", rank=2, clusters=1)
    assert sum(one.lost for one in alone) > 10 * sum(one.lost for one in found)


def test_what_cannot_be_shared_is_refused_by_name(model: Any, tmp_path: Path) -> None:
    fused, dense = model
    directories = adapters(dense, tmp_path, 2)
    (dora,) = adapters(dense, tmp_path / "dora", 1, use_dora=True)
    output = tmp_path / "out"
    for arguments, message in (
        ({"directories": [*directories, dora.rename(tmp_path / "d")]}, "more than a product"),
        ({"directories": [directories[0], directories[0]]}, "two adapters called 'a0'"),
        ({"rank": 0}, "a basis of rank 0"),
        ({"rank": 1000}, "a basis of rank 1000"),
        ({"clusters": 3}, "3 bases for 2 adapters"),
        ({"output": tmp_path}, "which exists"),
    ):
        with pytest.raises(SettingsError, match=message):
            share(fused.linears, **({"directories": directories, "output": output, "rank": 2} | arguments))
        assert not output.exists()


def test_a_full_disk_leaves_nothing(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fused, dense = model

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "out.partial").mkdir()  # another program's
    monkeypatch.setattr(sharing, "write_json", full)
    with pytest.raises(ResourceError, match="No space left"):
        share(fused.linears, adapters(dense, tmp_path, 2), tmp_path / "out", rank=2)
    assert [path.name for path in tmp_path.glob("out*")] == ["out.partial"]


def test_an_adapter_without_its_basis_is_refused(model: Any, tmp_path: Path) -> None:
    fused, dense = model
    directories = adapters(dense, tmp_path, 2)
    share(fused.linears, directories, tmp_path / "out", rank=2)
    share(fused.linears, directories, tmp_path / "other", rank=3)
    adapter, basis = tmp_path / "out" / "a0", tmp_path / "out" / "basis-0.safetensors"
    config = json.loads((adapter / "adapter_config.json").read_text())
    shutil.copy(tmp_path / "other" / basis.name, basis)
    with pytest.raises(CheckpointError, match="another basis"):
        open_adapter(adapter, fused.linears)
    basis.unlink()
    with pytest.raises(CheckpointError):
        open_adapter(adapter, fused.linears)
    for name in ("../../etc/passwd", "basis", 3, None):
        change_config(adapter, config | {"basis": name})
        with pytest.raises(SettingsError, match="`basis`"):
            open_adapter(adapter, fused.linears)


def test_bytes_are_those_of_all_tensors_before_and_after(model: Any, directory: Path, tmp_path: Path) -> None:
    output, count, rank = tmp_path / "out", 4, 3
    directories = adapters(model[1], tmp_path, count)
    result = share_for_model(str(directory), directories, output, rank=rank, clusters=2)
    assert (result.output, result.rank, result.clusters) == (str(output), rank, 2)
    assert [one.name for one in result.adapters] == ["a0", "a1", "a2", "a3"]
    linears = open_adapter(directories[0], model[0].linears).adapted
    sizes = [sum(placed.module.weight.shape) for placed in linears.values()]
    assert result.bytes_before == count * 4 * 2 * sum(sizes)  # float32, rank 2
    cores = count * 4 * rank * rank * len(sizes)
    assert result.bytes_after == 2 * 2 * rank * sum(sizes) + cores  # two bases in bfloat16
