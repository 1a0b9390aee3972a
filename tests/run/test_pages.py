"""Pages of sequences grow, keep what they hold, and aren't copied where it was foreseen how far they go."""

from __future__ import annotations

import pytest
import torch

from tailorbird.kernels.blocks import PAGE
from tailorbird.run.pages import Pages

SHAPES = [(2, 16), (1, 32)]


@pytest.mark.parametrize("foreseen", [0, 6 * PAGE + 1, 100 * PAGE])
def test_what_pages_hold_stays_where_its_table_says(foreseen: int) -> None:
    pages = Pages(SHAPES, torch.float32, sequences=3, positions=foreseen)
    written: dict[tuple[int, int], float] = {}
    for reached in range(1, 12 * PAGE, 37):
        pages.reach(reached)
        assert pages.tables.shape[1] * PAGE >= reached
        assert len(pages.tables.unique()) == pages.tables.numel()
        for (sequence, number), value in written.items():
            assert (pages.keys[1][int(pages.tables[sequence, number])] == value).all()
        for sequence in range(3):
            number = (reached - 1) // PAGE
            written[sequence, number] = value = float(len(written) + 1)
            pages.keys[1][int(pages.tables[sequence, number])] = value


def test_foreseen_positions_are_not_copied() -> None:
    foreseen = Pages(SHAPES, torch.bfloat16, sequences=2, positions=200)
    foreseen.reach(130)
    before = foreseen.keys[0].data_ptr()
    for reached in range(131, 201):
        foreseen.reach(reached)
    assert foreseen.keys[0].data_ptr() == before
    assert foreseen.tables.shape[1] * PAGE < 200 + PAGE


def test_a_far_end_takes_no_more_than_twice_what_is_needed() -> None:
    pages = Pages(SHAPES, torch.bfloat16, sequences=1, positions=1 << 20)
    pages.reach(300)
    assert pages.tables.shape[1] <= 2 * -(-300 // PAGE)
