"""Which versions of which adapters there are, in a small file that outlives the process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tailorbird.errors import CheckpointError
from tailorbird.model.json_file import read_json
from tailorbird.model.writing import write_json

_SCHEMA = 1


@dataclass(frozen=True)
class Record:
    """One version of a name.

    Attributes
    ----------
    number : int
        No two versions of a store have the same.
    path : str
        The adapter's directory, absolute.
    fingerprint : str
        Of the directory when it was registered (`Source.fingerprint`).
    trusted : bool
        It may lie anywhere: whoever runs the store named it.
    invocation : tuple of int or None
        Tokens that invoke it (`activation`).
    places : int
        With which it lets texts begin (`beginnings`).
    """

    number: int
    path: str
    fingerprint: str
    trusted: bool = False
    invocation: tuple[int, ...] | None = None
    places: int = 0

    def same_files(self, other: Record) -> bool:
        """Whether both are of the same files."""
        return (self.path, self.fingerprint) == (other.path, other.fingerprint)


def write_records(file: Path, last: int, records: Mapping[str, Sequence[Record]]) -> None:
    """Write the versions of every name, the one that is served first, in place of what is there.

    Parameters
    ----------
    file : Path
    last : int
        The highest number that was ever given.
    records : mapping of str to sequence of Record

    Raises
    ------
    ResourceError
        The disk or the directory refuses.
    """
    names = {name: [asdict(record) for record in records[name]] for name in sorted(records)}
    write_json(file, {"schema": _SCHEMA, "last": last, "adapters": names})


def read_records(file: Path) -> tuple[int, dict[str, list[Record]]]:
    """What `write_records` wrote: the highest number, and the versions of every name.

    0 and none where there is no file.

    Raises
    ------
    CheckpointError
        The file holds anything else.
    """
    if not file.exists():
        return 0, {}
    found = read_json(file)
    names, last = found.get("adapters"), found.get("last")
    if found.get("schema") != _SCHEMA or type(last) is not int or not isinstance(names, dict):
        raise _damaged(file, "the file")
    records = {name: _records(file, name, value) for name, value in names.items()}
    if any(record.number > last for versions in records.values() for record in versions):
        raise _damaged(file, "`last`")
    return last, records


def _records(file: Path, name: str, value: Any) -> list[Record]:
    if not isinstance(value, list) or not 1 <= len(value) <= 2:
        raise _damaged(file, f"`{name}`")
    return [_record(file, name, entry) for entry in value]


def _record(file: Path, name: str, entry: Any) -> Record:
    types = {"number": int, "path": str, "fingerprint": str, "trusted": bool, "places": int}
    if not isinstance(entry, dict) or "invocation" not in entry:
        raise _damaged(file, f"`{name}`")
    others: dict[str, Any] = {"places": 0} | entry  # older files know of no places
    tokens = others.pop("invocation")
    if {key: type(part) for key, part in others.items()} != types:
        raise _damaged(file, f"`{name}`")
    if tokens is not None:
        if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
            raise _damaged(file, f"`{name}`")
        tokens = tuple(tokens)
    return Record(**others, invocation=tokens)


def _damaged(file: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{file}: {what} isn't what tailorbird writes",
        f"schema {_SCHEMA}, and one or two versions for each adapter",
        "restore the file from a copy, or remove it and register the adapters anew",
    )
