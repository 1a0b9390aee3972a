"""Which page of keys and values belongs to whom: counts only, no tensors.

Pages are shared: by the continuations of one prompt, and by prompts that begin alike. A full page is known by
a key that stands for all tokens up to its end and for whom they were read (`prefix_key`), so that whoever
begins with the same tokens finds it. A page that nobody uses stays findable until its room is needed; the one
that was let go longest ago is taken first.

Paging: https://arxiv.org/abs/2309.06180 (PagedAttention). Finding prefixes by the hash of their pages is how
vLLM does it (https://docs.vllm.ai/en/latest/design/prefix_caching/).
"""

from __future__ import annotations

import hashlib
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
        self._evicted = evicted
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
        return self.pages - self.available

    def take(self, count: int) -> list[int] | None:
        """So many pages for one user, with anything in them; None where there are fewer."""
        if count > self.available:
            return None
        taken = []
        for _ in range(count):
            if self._blank:
                page = self._blank.pop()
            else:
                page, _ = self._idle.popitem(last=False)
                key = self._key_of.pop(page)
                del self._page_of[key]
                if self._evicted is not None:
                    self._evicted(page, key)
            self._users[page] = 1
            taken.append(page)
        return taken

    def share(self, pages: Iterable[int]) -> None:
        """One more user of pages that are in use."""
        for page in pages:
            if not self._users[page]:
                raise ValueError(f"page {page} is shared, and nobody uses it")
            self._users[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """One user less. Findable pages stay findable, the last ones of a sequence are taken first."""
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
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The pages with these keys, up to the first that isn't there; the caller becomes a user of them."""
        found = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            if not self._users[page]:
                del self._idle[page]
            self._users[page] += 1
            found.append(page)
        return found

    def forget(self) -> None:
        """Nothing is findable any more; pages in use stay with their users."""
        self._blank.extend(self._idle)
        self._idle.clear()
        self._key_of.clear()
        self._page_of.clear()
