"""Limits that a container sets below what the machine has: Linux control groups, versions 1 and 2.

Each group is bound by its own limits and by those of all groups above it, so every question here walks from
the process's own group up to the root and takes the tightest answer. A file that is missing or unreadable
limits nothing (other systems, or a container that hides its own group).

Source: the kernel's documentation of ``cgroup-v1/memory`` and ``cgroup-v2``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

#: Version 1 writes the absence of a limit as a number near 2^63.
UNLIMITED = 1 << 60


def cpu_quota(root: Path = Path("/")) -> float | None:
    """How many cores' time this process may use, or None without a limit.

    Parameters
    ----------
    root : Path
        Root of the file system to read.

    Returns
    -------
    float or None
        CPU seconds per second, such as 1.5.
    """
    quotas = []
    for group in _groups(root, "cpu"):
        words = _text(group / "cpu.max").split()
        if len(words) == 2 and words[0].isdigit() and int(words[1]) > 0:
            quotas.append(int(words[0]) / int(words[1]))
        quota, period = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
        if quota and period:
            quotas.append(quota / period)
    return min(quotas, default=None)


def memory_limit(root: Path = Path("/")) -> int | None:
    """Most bytes of memory that this process's groups may hold together, or None without a limit."""
    limits = [limit for group in _groups(root, "memory") if (limit := _limit(group)) is not None]
    return min(limits, default=None)


def memory_headroom(root: Path = Path("/")) -> int | None:
    """Bytes of memory that can still be taken below the tightest limit, or None without a limit.

    File pages that the kernel would drop first (``inactive_file``) count as free.
    """
    rooms = []
    for group in _groups(root, "memory"):
        limit = _limit(group)
        if limit is None:
            continue
        used = _number(group / "memory.current") or _number(group / "memory.usage_in_bytes") or 0
        rooms.append(max(0, limit - used + _droppable(group)))
    return min(rooms, default=None)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Directories of this process's group for `controller` and of all groups above it."""
    mounts = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            tops = [mounts, mounts / "unified"]
        elif controller in controllers.split(","):
            tops = [mounts / controller, mounts / controllers]
        else:
            continue
        top = next((t for t in tops if t.is_dir()), None)
        if top is None:
            continue
        group = top / path.lstrip("/")
        # Inside a container the named group may lie above the mount: then the mount itself is the group.
        while group != top:
            if group.is_dir():
                yield group
            group = group.parent
        yield top


def _limit(group: Path) -> int | None:
    values = (_number(group / "memory.max"), _number(group / "memory.limit_in_bytes"))
    return min((v for v in values if v is not None and v < UNLIMITED), default=None)


def _droppable(group: Path) -> int:
    for line in _text(group / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file") and value.isdigit():
            return int(value)
    return 0


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
