"""Where keys and values go when others need their pages: into RAM, then into a file, instead of nowhere.

A page goes there when it is evicted from the pool, by the key under which it was found, so that texts that
were preempted and prompts that begin alike find it again; the last, unfinished page of a text is computed
again. Whoever may find a page may find its copy: keys stand for tenant and adapter, too (`page_pool`). Copies
stay until the room is needed; the one that was used longest ago goes first, from RAM to the file, and from
there for good. The file has no name, so that nothing is left of it however the process ends.

Swapping against computing again: https://arxiv.org/abs/2309.06180 (PagedAttention, section 4.5).
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import tempfile
import threading
import time
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from tailorbird.errors import ResourceError, SettingsError

logger = logging.getLogger("tailorbird")

#: How fast what is thought of times follows the last one.
RATE = 0.2
#: How fast a time for which swapping was turned down is forgotten, with each time.
RECOVERY = 0.01
#: For files that may be large: unlike ``/tmp``, hardly ever in RAM.
LARGE_FILES = Path("/var/tmp")


class Contents(Protocol):
    """What gives out and takes back what pages hold."""

    def save(self, page: int) -> Tensor:
        """What a page holds, uint8 ``[page_bytes]`` on the CPU; a copy."""

    def restore(self, page: int, data: Tensor) -> None:
        """Let a page hold what `save` gave."""


class Costs:
    """What a page costs, read back or computed again, as measured on this machine lately."""

    def __init__(self, page_tokens: int) -> None:
        self._page_tokens = page_tokens
        self._steps: tuple[float, float, float, float] | None = None  # means of t, s, t * t, t * s
        self._reading: dict[str, float] = {}

    def stepped(self, tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long."""
        new = (tokens, seconds, tokens * tokens, tokens * seconds)
        known = self._steps or new
        t, s, tt, ts = (old + RATE * (value - old) for old, value in zip(known, new, strict=True))
        self._steps = (t, s, tt, ts)

    def read(self, tier: str, seconds: float) -> None:
        """A page was read back from a tier in so long."""
        known = self._reading.get(tier, seconds)
        self._reading[tier] = known + RATE * (seconds - known)

    @property
    def computing(self) -> float | None:
        """Seconds that a page's tokens add to a step, by the line through the last steps."""
        if self._steps is None:
            return None
        t, s, tt, ts = self._steps
        variance, slope = tt - t * t, ts - t * s
        per_token = slope / variance if variance > 1e-6 * tt and slope > 0 else s / t
        return per_token * self._page_tokens

    def worth(self, tier: str) -> bool:
        """Whether reading back is expected to be faster; what is unknown is tried, after a while again."""
        reading, computing = self._reading.get(tier), self.computing
        if reading is None or computing is None or reading < computing:
            return True
        self._reading[tier] = reading * (1 - RECOVERY)
        return False


class _Memory:
    """Copies in RAM."""

    name = "memory"

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self._held: OrderedDict[bytes, tuple[Tensor, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, key: bytes) -> bool:
        return key in self._held

    def use(self, key: bytes) -> None:
        """Let a copy be the last to go."""
        self._held.move_to_end(key)

    def put(self, key: bytes, data: Tensor, checksum: int) -> tuple[bytes, Tensor, int] | None:
        """Keep a copy; what had to go for it."""
        self._held[key] = data, checksum
        if len(self._held) <= self.pages:
            return None
        oldest, (gone, its_checksum) = self._held.popitem(last=False)
        return oldest, gone, its_checksum

    def get(self, key: bytes) -> tuple[Tensor, int]:
        """A copy and its checksum."""
        return self._held[key]

    def drop(self, key: bytes) -> None:
        """Keep a copy no longer."""
        del self._held[key]


class _Disk:
    """Copies in a file without a name, each in a slot of its own; the file grows until the disk is full."""

    name = "disk"

    def __init__(self, pages: int, page_bytes: int) -> None:
        self.pages, self._page_bytes = pages, page_bytes
        self._held: OrderedDict[bytes, tuple[int, int]] = OrderedDict()  # slot, checksum
        self._free: list[int] = []
        self._slots = 0
        self._file = _nameless() if pages else None

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, key: bytes) -> bool:
        return key in self._held

    def use(self, key: bytes) -> None:
        """Let a copy be the last to go."""
        self._held.move_to_end(key)

    def put(self, key: bytes, data: Tensor, checksum: int) -> None:
        """Keep a copy, in place of the oldest if need be; a disk that is full keeps what it has."""
        if len(self._held) >= self.pages:
            if not self._held:
                return
            _, (slot, _) = self._held.popitem(last=False)
        elif self._free:
            slot = self._free.pop()
        else:
            slot, self._slots = self._slots, self._slots + 1
        try:
            self._write(slot, data)
        except OSError as error:
            self.pages = len(self._held) + len(self._free)  # this slot is of no use
            logger.warning("swapping to disk stops at %d pages: %s", self.pages, error)
            return
        self._held[key] = slot, checksum

    def _write(self, slot: int, data: Tensor) -> None:
        assert self._file is not None
        left, at = data.numpy().data, slot * self._page_bytes
        while left:
            written = os.pwrite(self._file.fileno(), left, at)
            left, at = left[written:], at + written

    def get(self, key: bytes) -> tuple[Tensor, int]:
        """A copy, and its checksum; zeros where it can't be read, which fit no checksum but their own."""
        assert self._file is not None
        slot, checksum = self._held[key]
        data = torch.zeros(self._page_bytes, dtype=torch.uint8)
        left, at = data.numpy().data, slot * self._page_bytes
        with contextlib.suppress(OSError):
            while left and (count := os.preadv(self._file.fileno(), [left], at)):
                left, at = left[count:], at + count
        return data, checksum

    def drop(self, key: bytes) -> None:
        """Keep a copy no longer."""
        slot, _ = self._held.pop(key)
        self._free.append(slot)


class Swap:
    """Copies of pages that were evicted, in RAM and in a file.

    Parameters
    ----------
    contents : Contents
    page_tokens, page_bytes : int
    memory_bytes, disk_bytes : int
        Most bytes of copies in RAM and in the file; 0 is none. The file lies in ``TMPDIR``, else in
        `LARGE_FILES`, and is as large as what was put there at a time.

    Attributes
    ----------
    costs : Costs
        Pages are put and brought back only where this is worth it.
    out_pages, in_pages, damaged_pages : int
        How many were put, brought back, and found to be other than they were put.

    Raises
    ------
    SettingsError
        A budget below 0, or too small for a page.
    ResourceError
        The file can't be made.
    """

    def __init__(
        self, contents: Contents, page_tokens: int, page_bytes: int, memory_bytes: int, disk_bytes: int
    ) -> None:
        for name, value in (("swap memory", memory_bytes), ("swap disk", disk_bytes)):
            if value != 0 and value < page_bytes:
                raise SettingsError(
                    f"{name} of {value:,} bytes",
                    f"0, or at least a page of {page_bytes:,} bytes",
                    "allow more, or none",
                )
        self._contents, self._page_bytes = contents, page_bytes
        self._memory = _Memory(memory_bytes // page_bytes)
        self._disk = _Disk(disk_bytes // page_bytes, page_bytes)
        self.costs = Costs(page_tokens)
        self._lock = threading.Lock()  # pages may be evicted for an adapter that another thread reads
        self.out_pages = self.in_pages = self.damaged_pages = 0

    @property
    def pages(self) -> int:
        """Copies that are there."""
        return len(self._memory) + len(self._disk)

    def stats(self) -> dict[str, float]:
        """Copies that are there now, and what happened since the start; bytes and pages."""
        return {
            "swap_pages": self.pages,
            "swapped_out_pages": self.out_pages, "swapped_out_bytes": self.out_pages * self._page_bytes,
            "swapped_in_pages": self.in_pages, "swapped_in_bytes": self.in_pages * self._page_bytes,
            "swap_damaged_pages": self.damaged_pages,
        }  # fmt: skip

    def put(self, page: int, key: bytes) -> None:
        """Copy what a page holds, which is about to be lost, unless a copy is there or isn't worth it."""
        with self._lock:
            tier = self._tier_of(key)
            if tier is not None:
                tier.use(key)
                return
            tiers = (self._memory, self._disk)
            into = next((tier for tier in tiers if tier.pages and self.costs.worth(tier.name)), None)
            if into is None:
                return
            data = self._contents.save(page)
            gone = into.put(key, data, zlib.crc32(data.numpy().data))
            self.out_pages += 1
            if gone is not None and self._disk.pages and self.costs.worth(self._disk.name):
                self._disk.put(*gone)

    def wants(self, key: bytes) -> bool:
        """Whether a copy is there, and worth being brought back; it is the last to go then."""
        with self._lock:
            tier = self._tier_of(key)
            if tier is None or not self.costs.worth(tier.name):
                return False
            tier.use(key)
            return True

    def bring(self, key: bytes, page: int) -> bool:
        """Let a page hold what was put under a key; False where that is gone, or isn't what it was."""
        began = time.perf_counter()
        with self._lock:
            tier = self._tier_of(key)
            if tier is None:
                return False
            data, checksum = tier.get(key)
            if zlib.crc32(data.numpy().data) != checksum:
                tier.drop(key)
                self.damaged_pages += 1
                logger.warning("a page came back damaged from %s and is computed again", tier.name)
                return False
        self._contents.restore(page, data)
        self.costs.read(tier.name, time.perf_counter() - began)
        self.in_pages += 1
        return True

    def _tier_of(self, key: bytes) -> _Memory | _Disk | None:
        return next((tier for tier in (self._memory, self._disk) if key in tier), None)


def _nameless() -> io.FileIO:
    """A file that nobody else can open, and that is gone with this process."""
    stated = "TMPDIR" in os.environ or not os.access(LARGE_FILES, os.W_OK)
    try:
        return tempfile.TemporaryFile(dir=None if stated else LARGE_FILES, buffering=0)
    except OSError as error:
        raise ResourceError(
            f"no file for swapped pages: {error}", "a directory for large files", "set TMPDIR to one"
        ) from error
