"""Keys and values of sequences, in pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tailorbird.kernels.blocks import PAGE, fill_pages


class Pages:
    """Keys and values of some sequences in pages that are added as they grow.

    Parameters
    ----------
    shapes : sequence of (int, int)
        Key heads and channels of a head, for every block.
    dtype : torch.dtype
        bfloat16 or float32.
    sequences : int
    """

    def __init__(self, shapes: Sequence[tuple[int, int]], dtype: torch.dtype, sequences: int) -> None:
        self.shapes, self.dtype = shapes, dtype
        self.sequences = sequences
        self.tables = torch.empty(sequences, 0, dtype=torch.int32, device="cpu")
        self.keys: list[Tensor] = [self._pool(*shape, 0) for shape in self.shapes]
        self.values: list[Tensor] = [self._pool(*shape, 0) for shape in self.shapes]

    def _pool(self, kv_heads: int, head_dim: int, pages: int) -> Tensor:
        # zeros: what was never written is weighed with 0, which would make NaN of some values
        return torch.zeros(pages, kv_heads, head_dim * PAGE, dtype=self.dtype, device="cpu")

    def reach(self, positions: int) -> None:
        """Make room for so many positions of every sequence."""
        needed, have = -(-positions // PAGE), self.tables.shape[1]
        if needed <= have:
            return
        per_sequence = max(needed, have + max(4, have // 2))
        pages = torch.arange(
            self.sequences * have, self.sequences * per_sequence, dtype=torch.int32, device="cpu"
        )
        added = pages.view(self.sequences, per_sequence - have)
        self.tables = torch.cat([self.tables, added], dim=1).contiguous()
        for pools in (self.keys, self.values):
            for index, shape in enumerate(self.shapes):
                pool = self._pool(*shape, self.sequences * per_sequence)
                pool[: len(pools[index])] = pools[index]
                pools[index] = pool

    def use(self, blocks: Any) -> None:
        """Let `blocks` read and write these pages."""
        fill_pages(blocks, self.keys, self.values)
