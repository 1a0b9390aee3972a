"""An example as people read it, with what is learned of it marked."""

from __future__ import annotations

import itertools
from typing import Any

from tailorbird.adapt.data.examples import Examples
from tailorbird.adapt.data.spans import decode_plain
from tailorbird.adapt.rows import Row

LONGEST_RUN = 2000  # characters of one part that are shown
BEGINNING = 60  # characters of a text that only have to tell it from others
CONTEXT, LEARNED, GOES_ON = "  | ", "  > ", "  … "


def preview(examples: Examples, tokenizer: Any, index: int = 0) -> str:
    """An example as lines of text, those that are learned marked by ``>``.

    Each part (learned or not) begins a line, and ``⏎`` shows where the text itself breaks one. Characters
    that a terminal would obey are written as escapes.

    Returns
    -------
    str
        A line that tells how many tokens it has, then the example, without a newline at the end.
    """
    example = examples[index]
    learned = example.learned.tolist()
    lines = [
        f"example {index + 1} of {len(examples)}: {len(example)} tokens, {sum(learned)} of them learned (>)"
    ]
    pairs = zip(learned, example.ids.tolist(), strict=True)
    for is_learned, run in itertools.groupby(pairs, key=lambda pair: pair[0]):
        mark = LEARNED if is_learned else CONTEXT
        for part in _shortened(decode_plain(tokenizer, [token for _, token in run])):
            lines += (
                [mark + _printable(line) for line in part.splitlines(keepends=True)] if part else [GOES_ON]
            )
    return "\n".join(lines)


def beginning(row: Row, tokenizer: Any) -> str:
    """How the text of a row begins, on one line; learned tokens before it aren't shown."""
    text = decode_plain(tokenizer, row.ids[row.ids >= 0][:BEGINNING].tolist())
    lines = [_printable(line) for line in text[:BEGINNING].splitlines(keepends=True)]
    return "".join(lines) + ("…" if len(text) > BEGINNING or len(row) > BEGINNING else "")


def _shortened(text: str) -> list[str]:
    """The text, or its two ends with an empty part between them."""
    if len(text) <= LONGEST_RUN:
        return [text] if text else []
    return [text[: LONGEST_RUN // 2], "", text[-LONGEST_RUN // 2 :]]


def _printable(line: str) -> str:
    body = line.rstrip("\r\n")
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in body)
    return shown + "⏎" if body != line else shown
