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
#: Bytes of a token.
SIZE = array("i").itemsize


class Past:
    """A text that is searched again and again while it grows; each token is turned into bytes once."""

    def __init__(self) -> None:
        self._text = bytearray()

    def lookup(self, tokens: Sequence[int], most: int) -> list[int]:
        """At most so many tokens that followed the last place where the text went on as it ends now.

        Parameters
        ----------
        tokens : sequence of int
            The text: what it was before, and what it has more now.
        most : int
        """
        most = min(most, MOST_DRAFTS)
        if most <= 0:
            return []
        text = self._text
        text += array("i", tokens[len(text) // SIZE :]).tobytes()
        start = max(0, len(text) - SEARCHED * SIZE)
        for length in LENGTHS:
            if len(text) > length * SIZE:
                at = self._last(text[-length * SIZE :], start)
                if at is not None:
                    follows = at + length * SIZE
                    return list(memoryview(text)[follows : follows + most * SIZE].cast("i"))
        return []

    def _last(self, end: bytearray, start: int) -> int | None:
        """Where `end` stands last, before the text's own end."""
        found = self._text.rfind(end, start, len(self._text) - SIZE)
        while found >= 0 and found % SIZE:  # a match of bytes that belong to different tokens
            found = self._text.rfind(end, start, found + len(end) - 1)
        return None if found < 0 else found
