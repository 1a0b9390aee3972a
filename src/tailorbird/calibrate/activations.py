"""Hidden states on disk: one fixed-shape float32 array per file, read and written window by window.

Nothing is mapped or cached: what is read lands in fresh memory, and the file gives back the very bits
that were written. Such files carry the hidden states of all calibration windows from one block to the
next, and outlive a killed run.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from tailorbird.errors import ResourceError

VALUE_BYTES = 4


class ActivationFile:
    """Array ``[windows, length, width]`` of float32 in one file.

    A file that exists with the right size is opened as it is; else one is made, at full size and
    sparse, so that windows never written read as zeros.

    Parameters
    ----------
    path : Path
    windows, length, width : int

    Raises
    ------
    ResourceError
        The disk has no room, the file can't be made, or a file of another size stands in its place.
    """

    def __init__(self, path: Path, windows: int, length: int, width: int) -> None:
        if min(windows, length, width) < 1:
            raise ValueError(f"an activation file of shape [{windows}, {length}, {width}]")
        self.path = path
        self.windows = windows
        self.length = length
        self.width = width
        self._window_bytes = length * width * VALUE_BYTES
        self._handle = -1
        try:
            if not path.exists() or path.stat().st_size == 0:
                self._check_room()
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            size = os.fstat(self._handle).st_size
            if size == 0:
                os.ftruncate(self._handle, self.nbytes)
        except OSError as error:
            self._abandon()
            raise self._refused(error) from error
        if size not in (0, self.nbytes):
            self._abandon()
            raise ResourceError(
                f"{path} has {size} bytes",
                f"{self.nbytes} bytes, float32 [{windows}, {length}, {width}]",
                "remove the file",
            )

    @property
    def nbytes(self) -> int:
        """Size of the whole array in bytes."""
        return self.windows * self._window_bytes

    def write(self, start: int, tensor: torch.Tensor) -> None:
        """Store windows from `start` on.

        Parameters
        ----------
        start : int
        tensor : Tensor, float32 ``[n, length, width]``

        Raises
        ------
        ResourceError
            The disk is full.
        ValueError
            Shape, dtype or range don't fit the file.
        """
        if tensor.ndim != 3 or tensor.shape[1:] != (self.length, self.width) or tensor.dtype != torch.float32:
            raise ValueError(
                f"{tensor.dtype} {list(tensor.shape)} for windows of float32 [{self.length}, {self.width}]"
            )
        self._check_range(start, start + len(tensor))
        view = tensor.detach().cpu().contiguous().numpy().data.cast("B")
        position, done = start * self._window_bytes, 0
        while done < len(view):
            try:
                done += os.pwrite(self._handle, view[done:], position + done)
            except OSError as error:
                raise self._refused(error) from error

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Windows `start` to `stop` (exclusive), float32 ``[stop - start, length, width]``.

        Raises
        ------
        ResourceError
            The file can't be read, or became shorter.
        ValueError
            The range lies outside the file.
        """
        self._check_range(start, stop)
        result = torch.empty(stop - start, self.length, self.width)
        view = result.numpy().data.cast("B")
        position, done = start * self._window_bytes, 0
        while done < len(view):
            try:
                count = os.preadv(self._handle, [view[done:]], position + done)
            except OSError as error:
                raise self._refused(error) from error
            if count == 0:
                raise ResourceError(
                    f"{self.path} became shorter than {self.nbytes} bytes",
                    "a file that nobody else writes",
                    "start again with another output",
                )
            done += count
        return result

    def close(self) -> None:
        """Bring everything to the disk and let go of the file; the second call does nothing.

        Raises
        ------
        ResourceError
            The disk refused what was written.
        """
        if self._handle < 0:
            return
        try:
            os.fsync(self._handle)
        except OSError as error:
            raise self._refused(error) from error
        finally:
            self._abandon()

    def drop(self) -> None:
        """Let go of the file and delete it."""
        self._abandon()
        self.path.unlink(missing_ok=True)

    def _abandon(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def __del__(self) -> None:
        self._abandon()

    def _check_range(self, start: int, stop: int) -> None:
        if not 0 <= start < stop <= self.windows:
            raise ValueError(f"windows {start} to {stop} of {self.windows}")
        if self._handle < 0:
            raise ValueError(f"{self.path} is closed")

    def _check_room(self) -> None:
        free = shutil.disk_usage(self.path.parent).free
        if free < self.nbytes:
            raise ResourceError(
                f"{free} bytes are free on the disk of {self.path.parent}",
                f"{self.nbytes} bytes for the hidden states",
                "free some space, choose an output on another disk, or use fewer calibration tokens",
            )

    def _refused(self, error: OSError) -> ResourceError:
        return ResourceError(
            f"{self.path}: {error.strerror}",
            f"a writable disk with room for {self.nbytes} bytes",
            "free some space, or choose an output on another disk",
        )
