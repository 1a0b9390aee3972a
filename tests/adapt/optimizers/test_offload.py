"""States in files: the same bits, in RAM only while they are used."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tailorbird.adapt.checkpoints import Checkpoints, State
from tailorbird.adapt.optimizers import offload
from tailorbird.adapt.optimizers.offload import MappedStates, resident_state_bytes
from tailorbird.adapt.optimizers.packing import pack_state, unpack_state
from tailorbird.adapt.optimizers.registry import OPTIMIZERS, optimizer_named
from tailorbird.adapt.optimizers.rule import state_bytes
from tailorbird.errors import ResourceError
from tailorbird.hardware.memory import PAGE, resident_bytes, trim_heap

SHAPES = ((96, 64), (64, 96), (80,))
SMALL: dict[str, dict] = {"sgg": {"interval": 2}, "galore": {"rank": 4}, "soap": {"interval": 2}}


def walk(name: str, directory: Path | None, steps: int = 5) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Parameters and states after some steps."""
    generator = torch.Generator().manual_seed(1)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    mapped = None if directory is None else MappedStates(directory)
    optimizer = optimizer_named(name, **SMALL.get(name, {})).build([{"params": parameters}], 3, mapped)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            parameter.hessian_diagonal = parameter.grad.abs()  # type: ignore[attr-defined]
        optimizer.step()
    return parameters, pack_state(optimizer)[0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_nothing_changes_but_where_states_lie(name: str, tmp_path: Path) -> None:
    expected, states = walk(name, None)
    found, mapped = walk(name, tmp_path / "new" / "states")
    assert all(map(torch.equal, expected, found))
    assert states.keys() == mapped.keys()
    assert all(torch.equal(states[key], mapped[key]) for key in states)
    assert [one for one in tmp_path.rglob("*") if one.is_file()] == []  # files have no names


def mapped_resident(tensor: Tensor) -> int:
    """Bytes of a tensor's mapping that are in RAM for this process."""
    address, inside = tensor.data_ptr(), False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            inside = begin <= address < end
        elif inside and first == "Rss:":
            return int(line.split()[1]) * 1024
    raise AssertionError("no mapping")


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's table of mappings")
def test_between_steps_no_page_of_them_is_in_ram(tmp_path: Path) -> None:
    parameters = [nn.Parameter(torch.zeros(1024, 1024)) for _ in range(12)]
    optimizer = optimizer_named("adamw").build([{"params": parameters}], 0, MappedStates(tmp_path))
    held = state_bytes(optimizer.rule, [tuple(one.shape) for one in parameters])
    once = resident_state_bytes(optimizer.rule, [tuple(one.shape) for one in parameters])
    assert (held, once) == (12 << 23, 4 << 23)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    parameters[0].grad = None
    optimizer.step()  # whatever torch itself takes at its first step
    trim_heap()
    before = resident_bytes()
    parameters[0].grad = torch.ones_like(parameters[0])
    for _ in range(2):
        optimizer.step()
    trim_heap()
    states = [one for state in optimizer.state.values() for one in state.values() if isinstance(one, Tensor)]
    assert len(states) == 24
    assert sum(map(mapped_resident, states)) == 0
    assert resident_bytes() - before < held / 2  # what other tests' threads take meanwhile is far less
    Checkpoints(tmp_path / "saved").save(State(1, pack_state(optimizer)[0], {}), optimizer.leave)
    assert sum(map(mapped_resident, states)) == 0


def test_what_lies_in_no_file_keeps_its_values(tmp_path: Path) -> None:
    """A state on disk holds parameters, too, whose pages would come back as zeros."""
    around = torch.ones(3 * PAGE)
    first = -around.data_ptr() % PAGE // around.element_size()
    parameter = nn.Parameter(around[first : first + PAGE])
    assert parameter.data_ptr() % PAGE == 0
    optimizer = optimizer_named("adamw").build(
        [{"params": [parameter]}], 0, MappedStates(tmp_path / "states")
    )
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    values = parameter.detach().clone()
    tensors = {"method.one": parameter.detach()} | pack_state(optimizer)[0]
    Checkpoints(tmp_path / "saved").save(State(1, tensors, {}), optimizer.leave)
    assert torch.equal(parameter, values)
    assert torch.count_nonzero(around) == len(around)


def test_what_was_saved_goes_on(tmp_path: Path) -> None:
    parameter, again = (nn.Parameter(torch.ones(64, 64)) for _ in range(2))
    optimizer = optimizer_named("adamw").build([{"params": [parameter]}], 0, MappedStates(tmp_path / "a"))
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tensors, facts = pack_state(optimizer)
    other = optimizer_named("adamw").build([{"params": [again]}], 0, MappedStates(tmp_path / "b"))
    unpack_state(other, tensors, facts)
    again.data.copy_(parameter)
    again.grad = parameter.grad
    for one in (optimizer, other):
        one.step()
    assert torch.equal(parameter, again)
    states = other.state[again]
    assert states["momentum"].data_ptr() % PAGE == 0
    assert states["momentum"].data_ptr() != optimizer.state[parameter]["momentum"].data_ptr()


def test_a_full_disk_changes_no_parameter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    parameter = nn.Parameter(torch.ones(64, 64))
    optimizer = optimizer_named("adamw").build([{"params": [parameter]}], 0, MappedStates(tmp_path))
    parameter.grad = torch.ones_like(parameter)
    monkeypatch.setattr(offload.os, "posix_fallocate", full)
    with pytest.raises(ResourceError, match="No space left"):
        optimizer.step()
    assert (parameter == 1).all()
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cant_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    parameter = nn.Parameter(torch.ones(64, 64))
    optimizer = optimizer_named("adamw").build([{"params": [parameter]}], 0, MappedStates(tmp_path / "file"))
    parameter.grad = torch.ones_like(parameter)
    with pytest.raises(ResourceError, match="--offload-states"):
        optimizer.step()


def test_bytes_in_ram_are_those_of_what_is_updated_together_and_of_small_states() -> None:
    adamw = optimizer_named("adamw")
    assert resident_state_bytes(adamw, [(1024, 1024)] * 8) == 4 * 8 * 1024**2
    assert resident_state_bytes(adamw, [(4096, 4096), (1024, 1024)]) == 8 * 4096**2
    assert resident_state_bytes(adamw, [(4,), (8,)]) == state_bytes(adamw, [(4,), (8,)]) == 96
