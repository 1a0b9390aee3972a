"""Which patterns a grammar can hold.

A text fits a pattern as a whole, so that an anchor where all of it begins or ends says nothing. xgrammar
passes over any other, too, and takes a letter behind a backslash that it doesn't know for that letter: text
would then be called fitting that isn't. Such patterns are refused here instead.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from tailorbird.errors import SettingsError

#: An escaped character, a class, what opens a group, or a character.
_PARTS = re.compile(r"\\.|\[(?:\\.|[^\]\\])*\]|\((?:\?(?::|<\w+>))?|.", re.DOTALL)
#: Letters that mean something behind a backslash, or that xgrammar refuses there.
_KNOWN = frozenset("bBcdDfknpPrsStuvwWx")


def held(pattern: str) -> str:
    """A pattern that a grammar can hold, without the anchors that xgrammar would warn of.

    Raises
    ------
    SettingsError
        An anchor in the middle of a text, or a letter behind a backslash where it means nothing.
    """
    parts = _PARTS.findall(pattern)
    for part in parts:
        for escaped in re.findall(r"\\.", part):
            if escaped[1].isascii() and escaped[1].isalpha() and escaped[1] not in _KNOWN:
                raise _refused(pattern, escaped)
    repeated = _repeated(parts)
    last = len(parts) - 1
    begins = _beginning(parts, repeated)
    mirrored = ["(" if part == ")" else ")" if part[0] == "(" else part for part in reversed(parts)]
    ends = {last - at for at in _beginning(mirrored, {last - at for at in repeated}, "$")}
    for at, part in enumerate(parts):
        if (part == "^" and at not in begins) or (part == "$" and at not in ends):
            raise _refused(pattern, part)
    outer = ("^", 0), ("$", last)
    return "".join(part for at, part in enumerate(parts) if part not in ("^", "$") or (part, at) in outer)


def _repeated(parts: Sequence[str]) -> set[int]:
    """Both ends of the groups that may be left out or come again."""
    found: set[int] = set()
    opened: list[int] = []
    for at, part in enumerate(parts):
        if part[0] == "(":
            opened.append(at)
        elif part == ")" and opened:
            begin = opened.pop()
            if at + 1 < len(parts) and parts[at + 1] in ("*", "+", "?", "{"):
                found |= {begin, at}
    return found


def _beginning(parts: Sequence[str], repeated: set[int], anchor: str = "^") -> set[int]:
    """Where nothing but anchors can have come before."""
    found, groups, begins = set(), [], True
    for at, part in enumerate(parts):
        if begins:
            found.add(at)
        if part[0] == "(":
            begins = begins and at not in repeated
            groups.append(begins)
        elif part == "|":
            begins = groups[-1] if groups else True
        elif part == ")":
            begins = False
            if groups:
                groups.pop()
        elif part != anchor:
            begins = False
    return found


def _refused(pattern: str, part: str) -> SettingsError:
    return SettingsError(
        f"pattern {pattern[:200]!r} with {part} where a grammar can't hold it",
        "`^` and `$` only where all of the text begins and ends, and no unknown letters behind a backslash",
        "leave it out: a text fits the pattern as a whole anyway",
    )
