"""Optimizer states in memory-mapped files: in RAM only while their parameters are updated.

Each state is a file of its own, which has no name left once it's mapped: it vanishes with the tensor, and
with the process however that ends. Room on the disk is taken when a state is made. Once a state was used its
pages leave the process; the system writes them to the disk when it wants to, and what it still has in its
cache needs no reading.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from tailorbird.adapt.optimizers.rule import Array, Rule
from tailorbird.errors import ResourceError
from tailorbird.hardware.memory import PAGE, leave_pages

#: Elements of the parameters that are updated together, so that what is held for a moment stays small.
TOGETHER = 1 << 22


class MappedStates:
    """Makes states in files.

    Parameters
    ----------
    directory : Path
        Made where it is missing; on a disk, not in a file system that lies in RAM.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def make(self, array: Array) -> Tensor:
        """A state as it begins; one that is smaller than a page lies in RAM.

        Raises
        ------
        ResourceError
            The disk is full or can't be written to.
        """
        if not _is_mapped(array):
            return torch.full(array.shape, array.fill, dtype=array.dtype)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.directory, prefix=".states-") as file:
                os.posix_fallocate(file.fileno(), 0, array.bytes)
                size = array.bytes // array.dtype.itemsize
                flat = torch.from_file(file.name, shared=True, size=size, dtype=array.dtype)
        except OSError as error:
            raise self._refusal(array.bytes, error) from None
        found = flat.view(array.shape)
        if array.fill:
            found.fill_(array.fill)
        return found

    def leave(self, states: Iterable[Tensor]) -> None:
        """Let the pages of states leave this process; their values stay.

        Tensors that lie in no file are left alone: their pages would come back as zeros.
        """
        for state in states:
            if state.untyped_storage().filename is not None:
                leave_pages(state.data_ptr(), state.nbytes)

    def _refusal(self, size: int, error: OSError) -> ResourceError:
        return ResourceError(
            f"{size:,} bytes for a state of the optimizer in {self.directory}: {error.strerror}",
            "a directory that can be written to, on a disk with room",
            "give another --offload-states, or free room; the same command goes on from the last state",
        )


def resident_state_bytes(rule: Rule, shapes: Iterable[tuple[int, ...]]) -> int:
    """Most bytes of mapped states that are in RAM at once: those that are updated together, and small ones.

    Parameters
    ----------
    rule : Rule
    shapes : iterable of tuple of int
        Of the parameters, in order.
    """
    shapes = list(shapes)
    small, most, together, elements = 0, 0, 0, 0
    for shape in shapes:
        arrays = rule.layout(shape).values()
        small += sum(array.bytes for array in arrays if not _is_mapped(array))
        count = torch.Size(shape).numel()
        if elements and elements + count > TOGETHER:
            together, elements = 0, 0
        together += sum(array.bytes for array in arrays if _is_mapped(array))
        elements += count
        most = max(most, together)
    return small + most + rule.shared_bytes(shapes)


def _is_mapped(array: Array) -> bool:
    return array.bytes >= PAGE
