"""Reads a JSON file written by a stranger: bounded memory, no duplicate keys, typed errors only.

What the values mean is not judged here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tailorbird.errors import CheckpointError

#: bytes; the largest index of a published model takes about 9 MB
MAX_BYTES = 16 << 20
#: values in one file; a Python object takes about 100 bytes, however short its text is
MAX_VALUES = 250_000
#: values in a short file, and bytes of text that each further value must come with
SMALL_FILE_VALUES = 16_384
BYTES_PER_VALUE = 8


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key[:80]!r} occurs twice in one object")
            seen.add(key)
    return result


def parse_json(text: str) -> Any:
    """Parse JSON and refuse duplicate keys.

    Raises
    ------
    ValueError
        The text is not JSON, nests too deeply or repeats a key; the message says which.
    """
    try:
        return json.loads(text, object_pairs_hook=_no_duplicates)
    except RecursionError:
        raise ValueError("values nest too deeply") from None


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Memory stays below twice the file's size plus about 100 bytes per value, and values are counted
    before any of them is made.

    Raises
    ------
    CheckpointError
        The file is missing, unreadable, too large, not UTF-8, not JSON, repeats a key or holds
        something other than an object.
    """

    def refuse(problem: str) -> CheckpointError:
        return CheckpointError(
            f"{path}: {problem}",
            "a UTF-8 file with one JSON object",
            "download the file again or save the model anew with `save_pretrained`",
        )

    try:
        if path.exists() and not path.is_file():  # a FIFO would wait for ever
            raise refuse("not a regular file")
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise refuse(f"larger than {MAX_BYTES >> 20} MiB")
        with path.open("rb") as file:
            data = file.read(size)
    except FileNotFoundError:
        raise refuse("the file is missing") from None
    except OSError as error:
        raise refuse(f"cannot be read ({error.strerror})") from None
    most_values = min(MAX_VALUES, SMALL_FILE_VALUES + len(data) // BYTES_PER_VALUE)
    if sum(data.count(mark) for mark in (b",", b"[", b"{")) > most_values:
        raise refuse(f"more than {most_values} values in {len(data)} bytes")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise refuse(f"byte {error.start} is not UTF-8") from None
    del data
    try:
        value = parse_json(text)
    except ValueError as error:
        raise refuse(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise refuse(f"holds a JSON {type(value).__name__}")
    return value
