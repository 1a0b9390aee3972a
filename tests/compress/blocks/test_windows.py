"""Windows of blocks: every block is new once and finished once, and each window shares what it should."""

from __future__ import annotations

from itertools import pairwise

import pytest

from tailorbird.compress.blocks.windows import windows_of


@pytest.mark.parametrize("blocks", [1, 2, 3, 6, 7])
@pytest.mark.parametrize(("size", "overlap"), [(1, 0), (2, 0), (2, 1), (3, 1), (4, 2), (4, 3), (9, 1)])
def test_every_block_is_new_once_and_finished_once(blocks: int, size: int, overlap: int) -> None:
    windows = windows_of(blocks, size, overlap)
    assert [window.number for window in windows] == list(range(len(windows)))
    assert [i for window in windows for i in range(window.new, window.stop)] == list(range(blocks))
    assert [i for window in windows for i in range(window.start, window.kept)] == list(range(blocks))
    for window in windows:
        assert window.start <= window.new < window.stop
        assert window.stop - window.start == min(size, blocks - window.start)
    for before, after in pairwise(windows):
        assert before.stop - after.start == overlap
        assert after.new == before.stop
        assert before.kept == after.start
