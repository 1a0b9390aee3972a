"""Guessing what follows a text from the text itself: what stood behind its last words before.

Prompt lookup (https://github.com/apoorvumang/prompt-lookup-decoding), which costs next to nothing.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

#: Tokens at the end of a text that are looked for, most first.
LENGTHS = (4, 3, 2)
#: Guesses of a step.
MOST_DRAFTS = 6
#: Tokens back from the end that are searched.
SEARCHED = 4096


def lookup(tokens: Sequence[int], most: int) -> list[int]:
    """At most so many tokens that followed the last place where the text went on as it ends now."""
    most = min(most, MOST_DRAFTS)
    if most <= 0:
        return []
    text = array("i", tokens[-SEARCHED:])
    size, searched = text.itemsize, text[:-1].tobytes()
    for length in LENGTHS:
        if len(text) > length:
            at = _last(searched, text[-length:].tobytes(), size)
            if at is not None:
                return list(text[at + length : at + length + most])
    return []


def _last(searched: bytes, end: bytes, size: int) -> int | None:
    """Where `end` stands last, in items of `size` bytes."""
    found = searched.rfind(end)
    while found > 0 and found % size:  # a match of bytes that belong to different tokens
        found = searched.rfind(end, 0, found + len(end) - 1)
    return None if found < 0 else found // size
