"""Where tailorbird keeps what it may compute again: probes and sensitivities, nothing that is missed."""

from __future__ import annotations

import contextlib
import json
import os
import re
from pathlib import Path
from typing import Any


def cache_directory() -> Path:
    """Directory of the cache: ``$TAILORBIRD_CACHE``, else ``~/.cache/tailorbird``.

    It is not created here; whoever writes into it does that.
    """
    stated = os.environ.get("TAILORBIRD_CACHE")
    return Path(stated).expanduser() if stated else Path.home() / ".cache" / "tailorbird"


def kernel_times_path(threads: int) -> Path:
    """Where the times of kernels with so many threads are kept."""
    return cache_directory() / f"kernels-{threads}.json"


def launches_path(device: str) -> Path:
    """Where the launches of GPU kernels that were fastest on such a device are kept."""
    return cache_directory() / f"kernels-{re.sub('[^A-Za-z0-9]+', '-', device)}.json"


def forget_kernel_times() -> None:
    """Let the kernels be timed again, on processors and GPUs."""
    for path in cache_directory().glob("kernels-*.json"):
        with contextlib.suppress(OSError):
            path.unlink()


def write_entry(path: Path, entry: Any) -> None:
    """Write JSON whole or not at all; a cache that can't be written costs time next time, nothing else."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(entry, indent=1))
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
