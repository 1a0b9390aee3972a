"""Values of settings against the types of their fields, before anything is done with them."""

from __future__ import annotations

import types
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from tailorbird.errors import SettingsError

_PLAIN = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def check_types(owner: str, kind: type, settings: Mapping[str, Any]) -> None:
    """Refuse values that aren't of their fields' types; a list stands for a tuple, too.

    Parameters
    ----------
    owner : str
        Name of the method or optimizer.
    kind : type
        Its dataclass, which has a field for each of the settings.
    settings : mapping

    Raises
    ------
    SettingsError
        Naming the setting, its value, and what was expected.
    """
    hints = get_type_hints(kind)
    for name, value in settings.items():
        if not _fits(value, hints[name]):
            raise SettingsError(f"{name} {value!r} of {owner}", _words(hints[name]), "correct the setting")


def _fits(value: Any, hint: Any) -> bool:
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if kind is Literal:
        return value in parts
    if kind is tuple:
        if not isinstance(value, (tuple, list)):
            return False
        if parts[-1] is Ellipsis:
            return all(_fits(one, parts[0]) for one in value)
        return len(value) == len(parts) and all(map(_fits, value, parts))
    if hint is types.NoneType:
        return value is None
    if hint in (bool, str):
        return isinstance(value, hint)
    if hint in (int, float):
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    # another method or optimizer: a name was made to one already
    return value is not None and not isinstance(value, (bool, int, float, str, list, dict))


def _words(hint: Any) -> str:
    """A type as people say it."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, types.UnionType):
        said = [_words(part) for part in parts if part is not types.NoneType]
        return " or ".join(dict.fromkeys(said + ["null"] * (types.NoneType in parts)))
    if kind is Literal:
        return "one of " + ", ".join(f"`{part}`" for part in parts)
    if kind is tuple:
        if parts[-1] is Ellipsis:
            return f"a list, each {_words(parts[0])}"
        return f"a list of {len(parts)}, each " + " or ".join(dict.fromkeys(map(_words, parts)))
    return _PLAIN.get(hint, "a name")
