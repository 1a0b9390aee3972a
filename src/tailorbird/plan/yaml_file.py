"""Reads a YAML file that people write by hand: bounded, plain values only, mistakes by line and column.

It may come from strangers, so it is built from YAML events: no tags, no aliases, no key twice, nothing
executed, bounded size and depth. Scalars are those of YAML 1.2's core schema. What the values mean is not
judged here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from yaml.reader import Reader

from tailorbird.errors import SettingsError

MAX_BYTES = 4 << 20  # a plan of some 10,000 places
MAX_DEPTH = 20
MAX_VALUES = 250_000

_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9]*)")
FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan")


def read_yaml(path: Path, kind: str) -> Any:
    """The values of a YAML file: mappings, lists and scalars; None for an empty one.

    Parameters
    ----------
    path : Path
    kind : str
        What the file holds, in the words of an error: ``plan``, ``recipe``.

    Raises
    ------
    SettingsError
        The file is missing, unreadable, too large, not UTF-8, not YAML, or holds more than plain values.
    """
    try:
        if path.exists() and not path.is_file():
            raise refuse(kind, path, "is not a regular file", "a YAML file", "check the path")
        if path.stat().st_size > MAX_BYTES:
            raise refuse(kind, path, f"is larger than {MAX_BYTES >> 20} MiB", f"a {kind}", "check the path")
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise refuse(kind, path, "does not exist", "a YAML file", "check the path") from None
    except OSError as error:
        raise refuse(
            kind, path, f"cannot be read ({error.strerror})", "a YAML file", "check its permissions"
        ) from None
    except UnicodeDecodeError as error:
        raise refuse(
            kind, path, f"byte {error.start} is not UTF-8", "UTF-8 text", "save it as UTF-8"
        ) from None
    except ValueError as error:  # a NUL in the path
        raise refuse(kind, path, f"is no path ({error})", "a YAML file", "check the path") from None
    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        return _Builder(path, kind, yaml.parse(text, Loader=loader)).document()
    except yaml.YAMLError as error:
        raise refuse(
            kind,
            path,
            f"is not YAML: reading stops at {_where(text, error)}",
            f"a {kind} of `name: value` pairs, with every bracket and quote closed",
            "correct it there",
        ) from None


def _where(text: str, error: yaml.YAMLError) -> str:
    """Line and column at which `text` stops being YAML, and of what began on a line before and is open."""
    stop, start = (getattr(error, name, None) for name in ("problem_mark", "context_mark"))
    if stop is not None:
        place = _place(stop.line, stop.column)
        if start is not None and start.line < stop.line:
            place += f", inside what begins at {_place(start.line, start.column)}"
        return place
    forbidden = Reader.NON_PRINTABLE.search(text)  # the only error without a mark
    at = forbidden.start() if forbidden else len(text)
    return _place(text.count("\n", 0, at), at - text.rfind("\n", 0, at) - 1)


def _place(line: int, column: int) -> str:
    """As an editor shows it; both are counted from 0."""
    return f"line {line + 1}, column {column + 1}"


def plain_value(text: str) -> Any:
    """The value of an unquoted scalar: None, a truth value, a number, or else the text itself.

    Raises
    ------
    ValueError
        A number of more digits than Python converts.
    """
    if _NULL.fullmatch(text):
        return None
    if text in _BOOL:
        return _BOOL[text]
    if _INT.fullmatch(text):
        return int(text)
    if FLOAT.fullmatch(text):
        return float(text.replace(".inf", "inf").replace(".nan", "nan"))
    return text


def refuse(kind: str, path: Path, given: str, expected: str, remedy: str) -> SettingsError:
    """An error about the file of this kind at `path`."""
    return SettingsError(f"{kind} {path} {given}", expected, remedy)


def shortened(value: Any) -> str:
    """`value` as Python writes it, at most 80 characters of it."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


class _Builder:
    """Builds plain values from YAML events."""

    def __init__(self, path: Path, kind: str, events: Iterator[Any]) -> None:
        self.path = path
        self.kind = kind
        self.events = events
        self.values = 0

    def document(self) -> Any:
        """The one document of the stream; None for an empty one."""
        value, documents = None, 0
        for event in self.events:
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise self._refuse(
                        event, "a second document", "one document", "remove what follows `---`"
                    )
                value = self._value(next(self.events), 1)
        return value

    def _value(self, event: Any, depth: int) -> Any:
        self.values += 1
        if self.values > MAX_VALUES or depth > MAX_DEPTH:
            raise self._refuse(
                event, "too many or too deeply nested values", f"a {self.kind}", "check the file"
            )
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise self._refuse(
                event, f"the alias or anchor `{event.anchor}`", "plain values", "write the value out"
            )
        if event.tag is not None and event.tag != "!":
            raise self._refuse(event, f"the tag `{event.tag}`", "plain values", "remove the tag")
        if isinstance(event, yaml.ScalarEvent):
            return self._scalar(event)
        if isinstance(event, yaml.SequenceStartEvent):
            return [self._value(item, depth + 1) for item in self._until(yaml.SequenceEndEvent)]
        result: dict[str, Any] = {}
        for item in self._until(yaml.MappingEndEvent):
            key = self._value(item, depth + 1)
            if not isinstance(key, str):
                raise self._refuse(item, f"the key {shortened(key)}", "a name as key", "write it in quotes")
            if key in result:
                raise self._refuse(item, f"the key `{key}` twice", "each key once", "remove one of them")
            result[key] = self._value(next(self.events), depth + 1)
        return result

    def _until(self, end: type) -> Iterator[Any]:
        for event in self.events:
            if isinstance(event, end):
                return
            yield event

    def _scalar(self, event: Any) -> Any:
        text: str = event.value
        if not event.implicit[0]:  # quoted or a block: a string whatever it looks like
            return text
        try:
            return plain_value(text)
        except ValueError:  # more digits than Python converts
            raise self._refuse(event, "a number with thousands of digits", "a number", "correct it") from None

    def _refuse(self, event: Any, given: str, expected: str, remedy: str) -> SettingsError:
        place = _place(event.start_mark.line, event.start_mark.column)
        return refuse(self.kind, self.path, f"has {given} at {place}", expected, remedy)
