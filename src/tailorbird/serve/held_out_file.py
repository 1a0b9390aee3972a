"""Held-out text in a file, before anybody looks at what its lines say (`api.held_out`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tailorbird.errors import TextError

#: Most bytes of a file.
MOST_BYTES = 16 << 20


def read_file(path: Path) -> list[Any]:
    """Texts of a file: an object in each line of a ``.jsonl``, any other is one plain text.

    Raises
    ------
    TextError
        It can't be read, is longer than `MOST_BYTES`, or a line is no JSON.
    """
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise TextError(
                f"{path.name}, {size} bytes of held-out text",
                f"at most {MOST_BYTES} bytes",
                "give a part of it",
            )
        found = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(
            f"{path.name} can't be read: {type(error).__name__}", "a file of text in UTF-8", "correct it"
        ) from error
    if path.suffix != ".jsonl":
        return [found]
    return _values(found)


def _values(lines: str) -> list[Any]:
    """The JSON values of the lines that aren't empty."""
    found = []
    for number, line in enumerate(lines.split("\n"), 1):
        if not line.strip():
            continue
        try:
            found.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise TextError(
                f"line {number} of the held-out text, which is no JSON",
                "a JSON object in each line",
                "correct it",
            ) from error
    return found
