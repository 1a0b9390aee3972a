"""Keys and values of sequences, in pages."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from tailorbird.kernels import native
from tailorbird.kernels.blocks import PAGE, fill_pages

CPU = torch.device("cpu")


class Cache(Protocol):
    """Keys and values of all blocks."""

    #: of every block, ``[pages, kv_heads, head_dim * PAGE]``
    keys: list[Tensor]
    values: list[Tensor]
    #: int32 ``[sequences, most_pages]``, the page of each `PAGE` tokens of a sequence
    tables: Tensor

    def use(self, blocks: Any) -> None:
        """Let `blocks` read and write these pages."""


def page_bytes(shapes: Sequence[tuple[int, int]], dtype: torch.dtype) -> int:
    """Bytes of a page, over all blocks, of `PAGE` tokens; arguments as of `Pages`."""
    return 2 * PAGE * dtype.itemsize * sum(kv_heads * head_dim for kv_heads, head_dim in shapes)


def page_table(pages: Sequence[Sequence[int]]) -> Tensor:
    """The tables of a `Cache` for sequences that have these pages; shorter rows end in zeros."""
    most, rows = max(map(len, pages), default=0), array("i")
    for row in pages:
        rows.extend(row)
        rows.extend([0] * (most - len(row)))
    if not rows:
        return torch.empty(len(pages), 0, dtype=torch.int32, device="cpu")
    return torch.frombuffer(rows, dtype=torch.int32).view(len(pages), most)


def _pools(
    shapes: Sequence[tuple[int, int]], dtype: torch.dtype, pages: int, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """Room for so many pages: keys, and values, of every block, one after the other in one memory.

    Zeros: what was never written is weighed with 0, which would make NaN of some values.
    """
    sizes = [pages * kv_heads * head_dim * PAGE for kv_heads, head_dim in shapes]
    size = 2 * sum(sizes) * dtype.itemsize
    on_cpu = device.type == "cpu"
    room = (
        native.zeros_in_large_pages(size) if on_cpu else torch.zeros(size, dtype=torch.uint8, device=device)
    )
    memory = room.view(dtype)
    shaped = zip(memory.split([*sizes, *sizes]), [*shapes] * 2, strict=True)
    pools = [pool.view(pages, kv_heads, head_dim * PAGE) for pool, (kv_heads, head_dim) in shaped]
    return pools[: len(sizes)], pools[len(sizes) :]


class Pages:
    """Keys and values of some sequences in pages that are added as they grow.

    Parameters
    ----------
    shapes : sequence of (int, int)
        Key heads and channels of a head, for every block.
    dtype : torch.dtype
        bfloat16 or float32; on a GPU also float16.
    sequences : int
    device : torch.device, optional
        The CPU by default.
    positions : int
        How many of a sequence are foreseen. Whoever says it spares the copy that more pages take, as far as
        twice of what is needed suffices.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        dtype: torch.dtype,
        sequences: int,
        device: torch.device = CPU,
        positions: int = 0,
    ) -> None:
        self.shapes, self.dtype, self.device = shapes, dtype, device
        self.sequences = sequences
        self._foreseen = -(-positions // PAGE)
        self.tables = torch.empty(sequences, 0, dtype=torch.int32, device="cpu")
        self.keys, self.values = _pools(shapes, dtype, 0, device)

    def reach(self, positions: int) -> None:
        """Make room for so many positions of every sequence."""
        needed, have = -(-positions // PAGE), self.tables.shape[1]
        if needed <= have:
            return
        more = max(4, have // 2)
        if self._foreseen >= needed:
            more = min(self._foreseen, 2 * needed) - have
        per_sequence = max(needed, have + more)
        pages = torch.arange(
            self.sequences * have, self.sequences * per_sequence, dtype=torch.int32, device="cpu"
        )
        added = pages.view(self.sequences, per_sequence - have)
        self.tables = torch.cat([self.tables, added], dim=1).contiguous()
        larger = _pools(self.shapes, self.dtype, self.sequences * per_sequence, self.device)
        for old, new in zip((self.keys, self.values), larger, strict=True):
            for pool, target in zip(old, new, strict=True):
                target[: len(pool)] = pool
                if pool.device == CPU:
                    native.forget(pool)
        self.keys, self.values = larger

    def use(self, blocks: Any) -> None:
        """Let `blocks` read and write these pages."""
        fill_pages(blocks, self.keys, self.values)


class SharedPages:
    """A fixed number of pages that sequences share; who has which is the caller's business.

    Parameters
    ----------
    shapes, dtype, device
        As of `Pages`.
    pages : int
        On the CPU, memory is taken as they are written.

    Attributes
    ----------
    tables : Tensor[sequences, most_pages], int32
        Of the sequences of the next step; set by the caller.
    """

    def __init__(
        self, shapes: Sequence[tuple[int, int]], dtype: torch.dtype, pages: int, device: torch.device = CPU
    ) -> None:
        self.keys, self.values = _pools(shapes, dtype, pages, device)
        self.tables = torch.empty(0, 0, dtype=torch.int32, device="cpu")

    @classmethod
    def of_one(
        cls, shapes: Sequence[tuple[int, int]], dtype: torch.dtype, positions: int, device: torch.device = CPU
    ) -> SharedPages:
        """Pages for so many positions of one sequence, in order."""
        made = cls(shapes, dtype, -(-positions // PAGE), device)
        made.tables = page_table([range(-(-positions // PAGE))])
        return made

    def copy(self, source: int, target: int) -> None:
        """Give page `target` what page `source` holds."""
        for pool in (*self.keys, *self.values):
            pool[target] = pool[source]

    def move(self, pages: Sequence[int], sources: Sequence[int], targets: Sequence[int]) -> None:
        """Move keys and values of one sequence, which has `pages`, from slots to slots."""
        places = torch.tensor([sources, targets], device="cpu")
        (source_pages, target_pages), (sources_in, targets_in) = (
            torch.tensor(pages)[places // PAGE],
            places % PAGE,
        )
        for pool in self.keys:
            columns = pool.view(*pool.shape[:2], -1, PAGE)
            columns[target_pages, :, :, targets_in] = columns[source_pages, :, :, sources_in]
        for pool in self.values:
            rows = pool.view(*pool.shape[:2], PAGE, -1)
            rows[target_pages, :, targets_in] = rows[source_pages, :, sources_in]

    def discard(self, pages: Sequence[int]) -> None:
        """Give the memory of some pages back to the system, as far as it is whole pages of the system's.

        They hold zeros, or what they held, until they are written again.
        """
        ordered = sorted(pages)
        runs = [[page, page + 1] for page in ordered[:1]]
        for page in ordered[1:]:
            if page == runs[-1][1]:
                runs[-1][1] += 1
            else:
                runs.append([page, page + 1])
        for pool in (*self.keys, *self.values):
            for begin, end in runs:
                native.forget(pool[begin:end])

    def save(self, page: int) -> Tensor:
        """What a page holds, over all blocks: uint8 ``[page_bytes]`` on the CPU, a copy."""
        parts = [pool[page].reshape(-1) for pool in (*self.keys, *self.values)]
        return torch.cat(parts).view(torch.uint8).cpu()

    def restore(self, page: int, data: Tensor) -> None:
        """Let a page hold what `save` gave."""
        pools = [*self.keys, *self.values]
        parts = data.view(pools[0].dtype).split([pool[page].numel() for pool in pools])
        for pool, part in zip(pools, parts, strict=True):
            pool[page].copy_(part.view_as(pool[page]))

    def use(self, blocks: Any) -> None:
        """Let `blocks` read and write these pages."""
        fill_pages(blocks, self.keys, self.values)
