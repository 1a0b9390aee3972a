"""Windows of blocks that are learned together, each of which shares some blocks with the one before it.

Ding et al. 2023, "CBQ: Cross-Block Quantization for Large Language Models" (arXiv:2312.07950): what one
block's rounding does to the next is seen by both, and windows that overlap tie all blocks of a model
together, while only those of one window are in memory.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """Blocks from `start` to `stop`.

    Attributes
    ----------
    number : int
        Of the window, from 0.
    start, stop : int
    new : int
        The first block that no window before had.
    kept : int
        The first block that the next window has again; those before it are finished.
    """

    number: int
    start: int
    stop: int
    new: int
    kept: int


def windows_of(blocks: int, size: int, overlap: int) -> list[Window]:
    """All windows of so many blocks.

    Parameters
    ----------
    blocks : int
        Of the model.
    size : int
        Of a window; the last one may be smaller.
    overlap : int
        Blocks that a window has again of the one before, fewer than `size`.
    """
    starts = [0]
    while starts[-1] + size < blocks:
        starts.append(starts[-1] + size - overlap)
    stops = [min(start + size, blocks) for start in starts]
    return [
        Window(number, start, stop, new, kept)
        for number, (start, stop, new, kept) in enumerate(
            zip(starts, stops, [0, *stops[:-1]], [*starts[1:], blocks], strict=True)
        )
    ]
