"""Which launch of a Triton kernel is fastest on this GPU: tried at first use, kept in the cache directory.

A kernel states a few launches, none of which changes the order in which anything is summed, so that the
choice is one of speed alone. The first is the default: it is taken where nothing can be timed, in Triton's
interpreter and while a CUDA graph is recorded.
"""

from __future__ import annotations

import functools
import json
import math
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tailorbird.hardware.cache import launches_path, write_entry
from tailorbird.kernels.triton_runtime import interpreted, triton

#: raised when what is kept gets another meaning
SCHEMA = 1

#: from a call to the time that it takes, in any unit
Timer = Callable[[Callable[[], Any]], float]


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched.

    Parameters
    ----------
    warps, stages : int
        Warps of a program; loads in flight of its loop.
    tile : tuple of int
        Outputs and rows of a program; empty where a kernel's are fixed.
    """

    warps: int
    stages: int
    tile: tuple[int, ...] = ()


def magnitude(count: int) -> int:
    """The next power of two: sizes up to it share a choice."""
    return 1 << max(0, count - 1).bit_length()


def choose(
    kernel: str,
    case: tuple[Any, ...],
    launches: Sequence[Launch],
    run: Callable[[Launch], Any],
    device: torch.device,
    timer: Timer | None = None,
) -> Launch:
    """The fastest of some launches, timed unless that is known.

    Parameters
    ----------
    kernel : str
        Its name.
    case : tuple
        What else the choice depends on: shapes, dtypes; of things whose `str` tells them apart.
    launches : sequence of Launch
        At least one, the default first.
    run : callable
        Launches the kernel; may be called many times.
    device : torch.device
        Where it runs.
    timer : callable, optional
        By default the median of `triton.testing.do_bench`
        (https://triton-lang.org/main/python-api/generated/triton.testing.do_bench.html). A launch for which
        it raises Triton's `OutOfResources` doesn't fit this device.
    """
    if len(launches) == 1 or (timer is None and interpreted()):
        return launches[0]
    name, table = _key(kernel, case), _table(device)
    known = table.launches.get(name)
    if known is not None and known in launches:
        return known
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return launches[0]
    with table.lock:
        known = table.launches.get(name)
        if known is None or known not in launches:
            known = min(launches, key=lambda launch: _time(launch, run, timer or _median))
            table.keep(name, known)
    return known


def _key(kernel: str, case: tuple[Any, ...]) -> str:
    return " ".join(map(str, (kernel, *case)))


def _median(call: Callable[[], Any]) -> float:
    return float(triton.testing.do_bench(call, warmup=5, rep=20, return_mode="median"))


def _time(launch: Launch, run: Callable[[Launch], Any], timer: Timer) -> float:
    """What the timer says of a launch, infinite where it needs more than the device has."""
    try:
        return timer(lambda: run(launch))
    except triton.runtime.errors.OutOfResources:
        return math.inf


class _Table:
    """The choices for one kind of device, in memory and in a file."""

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path, self.identity = path, identity
        self.lock = threading.Lock()
        self.launches = self._read()

    def keep(self, name: str, launch: Launch) -> None:
        # Another process may have added to the file since.
        self.launches = {**self._read(), **self.launches, name: launch}
        stored = {key: [found.warps, found.stages, found.tile] for key, found in self.launches.items()}
        write_entry(self.path, {"schema": SCHEMA, "identity": self.identity, "launches": stored})

    def _read(self) -> dict[str, Launch]:
        """What the file holds; nothing where it is of another device or Triton, or can't be understood."""
        try:
            entry = json.loads(self.path.read_text())
            if entry["schema"] != SCHEMA or entry["identity"] != self.identity:
                return {}
            return {
                name: Launch(int(warps), int(stages), tuple(map(int, tile)))
                for name, (warps, stages, tile) in entry["launches"].items()
            }
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return {}


def _table(device: torch.device) -> _Table:
    # by the variable that decides the directory: making a path takes longer than looking a launch up
    return _table_in(os.environ.get("TAILORBIRD_CACHE"), device)


@functools.cache
def _table_in(stated: str | None, device: torch.device) -> _Table:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return _Table(launches_path(name), {"device": name, "triton": triton.__version__})
