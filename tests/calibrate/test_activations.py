"""Hidden states on disk come back to the bit, and a disk that can't hold them is refused at once."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tailorbird.calibrate.activations import ActivationFile
from tailorbird.errors import ResourceError


def test_windows_come_back_to_the_bit_in_any_order_and_grouping(tmp_path: Path) -> None:
    values = torch.randn(7, 5, 3)
    values[0, 0] = torch.tensor([float("nan"), -0.0, 1e-45])
    file = ActivationFile(tmp_path / "a", 7, 5, 3)
    for start, stop in ((4, 7), (0, 1), (1, 4)):
        file.write(start, values[start:stop])
    for start, stop in ((0, 7), (3, 5), (6, 7)):
        found = file.read(start, stop)
        assert torch.equal(found.view(torch.int32), values[start:stop].view(torch.int32))


def test_a_closed_file_is_opened_again_with_what_it_held(tmp_path: Path) -> None:
    values = torch.randn(2, 4, 3)
    file = ActivationFile(tmp_path / "a", 2, 4, 3)
    file.write(0, values)
    file.close()
    file.close()
    assert torch.equal(ActivationFile(tmp_path / "a", 2, 4, 3).read(0, 2), values)


def test_what_is_read_is_fresh_memory(tmp_path: Path) -> None:
    file = ActivationFile(tmp_path / "a", 1, 2, 2)
    file.write(0, torch.ones(1, 2, 2))
    file.read(0, 1).zero_()
    assert torch.equal(file.read(0, 1), torch.ones(1, 2, 2))


def test_strided_tensors_are_stored_in_row_major_order(tmp_path: Path) -> None:
    values = torch.randn(3, 2, 4).transpose(0, 1)
    file = ActivationFile(tmp_path / "a", 2, 3, 4)
    file.write(0, values)
    assert torch.equal(file.read(0, 2), values)


def test_a_new_file_has_its_full_size_but_takes_no_room(tmp_path: Path) -> None:
    file = ActivationFile(tmp_path / "a", 64, 128, 128)
    status = file.path.stat()
    assert status.st_size == file.nbytes == 64 * 128 * 128 * 4
    assert status.st_blocks * 512 < file.nbytes // 8
    assert not file.read(63, 64).any()


def test_a_disk_without_room_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=4 * 8 * 16 * 16 - 1))
    with pytest.raises(ResourceError, match="8192 bytes for the hidden states"):
        ActivationFile(tmp_path / "a", 8, 16, 16)
    assert not list(tmp_path.iterdir())


def test_a_file_of_another_shape_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    with pytest.raises(ResourceError, match="has 5 bytes"):
        ActivationFile(tmp_path / "a", 2, 2, 2)
    assert (tmp_path / "a").read_bytes() == b"12345"


def test_a_missing_directory_is_a_typed_error(tmp_path: Path) -> None:
    with pytest.raises(ResourceError):
        ActivationFile(tmp_path / "none" / "a", 2, 2, 2)


def test_a_file_that_shrank_is_a_typed_error(tmp_path: Path) -> None:
    file = ActivationFile(tmp_path / "a", 2, 2, 2)
    with open(file.path, "r+b") as other:
        other.truncate(20)
    with pytest.raises(ResourceError, match="became shorter"):
        file.read(0, 2)


@pytest.mark.parametrize(
    "tensor", [torch.zeros(2, 2, 3), torch.zeros(1, 2, 2, dtype=torch.bfloat16), torch.zeros(3, 2, 2)]
)
def test_what_does_not_fit_is_refused(tmp_path: Path, tensor: torch.Tensor) -> None:
    file = ActivationFile(tmp_path / "a", 2, 2, 2)
    with pytest.raises(ValueError):
        file.write(0, tensor)
