"""Which page of keys and values belongs to whom: counts only, no tensors.

Pages are shared: by the continuations of one prompt, and by prompts that begin alike. A full page is known by
a key that stands for all tokens up to its end and for whom they were read (`prefix_key`), so that whoever
begins with the same tokens finds it. A page that nobody uses stays findable until its room is needed; the one
that was let go longest ago is taken first. Adapters borrow pages for their bytes, maybe from another thread.

Paging: https://arxiv.org/abs/2309.06180 (PagedAttention). Finding prefixes by the hash of their pages is how
vLLM does it (https://docs.vllm.ai/en/latest/design/prefix_caching/).
"""

from __future__ import annotations

import hashlib
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence


def prefix_key(before: bytes, tokens: Sequence[int]) -> bytes:
    """Key of a full page that follows the page with key `before`; the first page follows a salt."""
    return hashlib.blake2b(before + array("q", tokens).tobytes(), digest_size=16).digest()


class PagePool:
    """The pages of one model.

    Parameters
    ----------
    pages : int
        How many there are; they are numbered from 0.
    evicted : callable, optional
        Gets the number and the key of a findable page that is about to be overwritten.
    """

    def __init__(self, pages: int, evicted: Callable[[int, bytes], None] | None = None) -> None:
        self.pages = pages
        #: Pages that are lent.
        self.lent = 0
        #: Pages that somebody waits for, beside which new users must find theirs.
        self.wanted = 0
        self._evicted = evicted
        self._lock = threading.RLock()
        self._users = [0] * pages
        self._blank = list(range(pages - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # findable, used by nobody; longest ago first
        self._key_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}

    @property
    def available(self) -> int:
        """Pages that can be taken now."""
        return len(self._blank) + len(self._idle)

    @property
    def used(self) -> int:
        """Pages that somebody uses."""
        return self.pages - self.lent - self.available

    def take(self, count: int) -> list[int] | None:
        """So many pages for one user, with anything in them; None where there are fewer."""
        with self._lock:
            if count > self.available:
                return None
            taken = [self._blank.pop() if self._blank else self._evict() for _ in range(count)]
            for page in taken:
                self._users[page] = 1
            return taken

    def _evict(self) -> int:
        page, _ = self._idle.popitem(last=False)
        key = self._key_of.pop(page)
        del self._page_of[key]
        if self._evicted is not None:
            self._evicted(page, key)
        return page

    def lend(self, count: int) -> list[int] | None:
        """So many pages whose memory serves for something else; those that were never taken first."""
        with self._lock:
            if count > self.available:
                return None
            self.lent += count
            untouched = self._blank[:count]
            del self._blank[:count]
            return untouched + [self._evict() for _ in range(count - len(untouched))]

    def take_back(self, pages: Sequence[int]) -> None:
        """Lent pages, the one that was lent last first; they are lent first again."""
        with self._lock:
            self.lent -= len(pages)
            self._blank[:0] = pages

    def share(self, pages: Iterable[int]) -> None:
        """One more user of pages that are in use."""
        with self._lock:
            for page in pages:
                if not self._users[page]:
                    raise ValueError(f"page {page} is shared, and nobody uses it")
                self._users[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """One user less. Findable pages stay findable, the last ones of a sequence are taken first."""
        with self._lock:
            for page in reversed(list(pages)):
                if not self._users[page]:
                    raise ValueError(f"page {page} is released, and nobody uses it")
                self._users[page] -= 1
                if self._users[page]:
                    continue
                if page in self._key_of:
                    self._idle[page] = None
                else:
                    self._blank.append(page)

    def publish(self, page: int, key: bytes) -> None:
        """Let a full page be found; where another with this key is there already, nothing happens."""
        with self._lock:
            if key not in self._page_of and page not in self._key_of:
                self._page_of[key] = page
                self._key_of[page] = key

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The pages with these keys, up to the first that isn't there; the caller becomes a user of them."""
        found = []
        with self._lock:
            for key in keys:
                page = self._page_of.get(key)
                if page is None:
                    break
                if not self._users[page]:
                    del self._idle[page]
                self._users[page] += 1
                found.append(page)
        return found
