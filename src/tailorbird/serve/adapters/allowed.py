"""The one place that says whether a path may be used: it leads into the directory that is allowed, or not."""

from __future__ import annotations

from pathlib import Path

from tailorbird.errors import SettingsError


def within(path: Path, allowed: Path | None) -> Path:
    """Where `path` leads, links followed; SettingsError unless it is below `allowed`, if that is given."""
    try:
        found = path.expanduser().resolve()
        inside = allowed is None or found.is_relative_to(allowed.expanduser().resolve())
    except (OSError, RuntimeError, ValueError):  # a loop of links, no home, a NUL
        inside = False
    if not inside:
        where = "a path that can be followed" if allowed is None else f"a path below {allowed}"
        raise SettingsError(f"a path to {str(path)[:300]!r}", where, "put it there, links included")
    return found
