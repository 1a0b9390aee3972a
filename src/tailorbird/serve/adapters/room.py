"""Room for adapters in the memory of keys and values: one budget for both, as S-LoRA has it.

Adapters that are laid out borrow as many pages from the pool as their bytes fill. The pages' memory is given
back to the system, since adapters lie elsewhere; a page that was never written to had none. A text of full
length always keeps its pages, so that whoever runs alone can end.

Source: https://arxiv.org/abs/2311.03285 (S-LoRA, unified paging).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tailorbird.hardware.memory import trim_heap
from tailorbird.serve.page_pool import PagePool


class AdapterRoom:
    """The pages that a pool lends to adapters.

    Parameters
    ----------
    pool : PagePool
    page_bytes : int
    most_pages : int
        Most that are lent.
    discard : callable
        Gives back the memory of pages that are lent.
    """

    def __init__(
        self, pool: PagePool, page_bytes: int, most_pages: int, discard: Callable[[Sequence[int]], None]
    ) -> None:
        self._pool, self._page_bytes, self._most = pool, page_bytes, most_pages
        self._discard = discard
        self._pages: list[int] = []

    @property
    def most_bytes(self) -> int:
        """Most bytes of all adapters together."""
        return self._most * self._page_bytes

    def fits(self, nbytes: int, insist: bool) -> bool:
        """Whether `hold` would find the pages, once adapters that nobody uses were dropped.

        Parameters
        ----------
        nbytes : int
        insist : bool
            Texts that begin leave it so many pages until the next step (`PagePool.wanted`).
        """
        pages = -(-nbytes // self._page_bytes)
        short = pages - len(self._pages) - self._pool.available
        if insist and pages <= self._most:
            self._pool.wanted = max(0, pages - len(self._pages))
        return pages <= self._most and short <= 0

    def hold(self, nbytes: int) -> bool:
        """Let all adapters together have so many bytes; False, and nothing changes, where pages are short."""
        more = -(-nbytes // self._page_bytes) - len(self._pages)
        if more == 0:
            return True
        if more < 0:
            kept = len(self._pages) + more
            self._pool.take_back(self._pages[kept:])
            del self._pages[kept:]
            trim_heap()  # what is written to these pages now was an adapter's
            return True
        if len(self._pages) + more > self._most:
            return False
        lent = self._pool.lend(more)
        if lent is None:
            return False
        self._discard(lent)
        trim_heap()  # reading an adapter takes several times its bytes
        self._pages += lent
        return True
