"""One step of the engine on a model: packed tokens in, logits out.

`FusedRunner` runs compiled blocks over shared pages. `ModuleRunner` runs models that they don't suit through
their own modules, one sequence after the other, each with a cache of its own in one piece; pages are counted
all the same, so that memory stays within its bounds.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tailorbird.kernels.adapters import Segment
from tailorbird.kernels.blocks import PAGE, STEPS
from tailorbird.run.fused import FusedModel
from tailorbird.run.pages import SharedPages, page_bytes
from tailorbird.run.parts import Unsuited
from tailorbird.serve.scheduler import Piece

logger = logging.getLogger("tailorbird")


class Runner(Protocol):
    """What runs steps.

    Attributes
    ----------
    path : str
        ``fused`` or ``modules``.
    note : str
        Why it isn't fused; empty where it is.
    page_tokens, page_bytes : int
    shares_prefixes : bool
        Whether pages of one sequence can serve another.
    """

    path: str
    note: str
    page_tokens: int
    page_bytes: int
    shares_prefixes: bool

    def reserve(self, pages: int) -> None:
        """Make room for so many pages, once, before anything runs."""

    def step(self, pieces: Sequence[Piece]) -> list[Tensor]:
        """Read pieces; for each that chooses, in order, logits ``[1 + drafts, vocab_size]``, float32."""

    def copy(self, source: int, target: int) -> None:
        """Give page `target` what page `source` holds."""

    def discard(self, pages: Sequence[int]) -> None:
        """Give back the memory of pages, which hold anything until they are written again."""

    def save(self, page: int) -> Tensor:
        """What a page holds, uint8 ``[page_bytes]`` on the CPU, where prefixes are shared."""

    def restore(self, page: int, data: Tensor) -> None:
        """Let a page hold what `save` gave."""

    def forget(self, sequence: Any) -> None:
        """A sequence ended."""

    def hidden(self, ids: Sequence[int], adapter: Any, adapted_from: int = 0) -> Tensor:
        """What leaves the last norm for each token of a text, ``[tokens, width]`` float32.

        An adapter acts from token `adapted_from` on.
        """

    def progress(self) -> float:
        """A number that changes with each block of a step; may be asked from another thread."""


def runner_for(model: Any, kv_bytes_per_token: int) -> Runner:
    """Compiled blocks where they suit the model, else its modules."""
    try:
        return FusedRunner(FusedModel(model))
    except Unsuited as reason:
        logger.info("serving through the model's modules, one sequence at a time: %s", reason)
        return ModuleRunner(model, kv_bytes_per_token, str(reason))


class FusedRunner:
    """Compiled blocks over shared pages."""

    path, note, shares_prefixes = "fused", "", True
    page_tokens = PAGE

    def __init__(self, model: FusedModel) -> None:
        self.model = model
        model.seconds = torch.zeros(len(STEPS) + 1, dtype=torch.float64)
        self.page_bytes = page_bytes(model.page_shapes, model.cache_dtype)
        self.cache = SharedPages(model.page_shapes, model.cache_dtype, 0)

    def reserve(self, pages: int) -> None:
        """See `Runner`."""
        self.cache = SharedPages(self.model.page_shapes, self.model.cache_dtype, pages)

    def step(self, pieces: Sequence[Piece]) -> list[Tensor]:
        """See `Runner`."""
        ids: list[int] = []
        positions: list[int] = []
        of_sequence: list[int] = []
        wanted: list[int] = []
        segments: list[Segment] = []
        rows = []
        most = max(len(piece.sequence.pages) for piece in pieces)
        table = array("i")
        for number, piece in enumerate(pieces):
            sequence, begin = piece.sequence, len(ids)
            end = piece.start + piece.count
            ids += sequence.tokens[piece.start : end]
            ids += piece.drafts
            count = len(ids) - begin
            positions += range(piece.start, piece.start + count)
            of_sequence += [number] * count
            if piece.chooses:
                rows.append(1 + len(piece.drafts))
                wanted += range(len(ids) - rows[-1], len(ids))
            adapted = begin + max(0, sequence.adapted_from - piece.start)
            if sequence.adapter is not None and adapted < len(ids):
                segments.append(Segment(adapted, len(ids), sequence.adapter.adapter))
            table.extend(sequence.pages)
            table.extend([0] * (most - len(sequence.pages)))
        self.cache.tables = torch.frombuffer(table, dtype=torch.int32).view(len(pieces), most)
        logits = self.model.step(
            torch.tensor(ids),
            torch.tensor(positions, dtype=torch.int32),
            torch.tensor(of_sequence, dtype=torch.int32),
            self.cache,
            torch.tensor(wanted, dtype=torch.int64),
            segments,
            reach=max(positions) + 1,
        )
        return list(logits.split(rows))

    def copy(self, source: int, target: int) -> None:
        """See `Runner`."""
        self.cache.copy(source, target)

    def discard(self, pages: Sequence[int]) -> None:
        """See `Runner`."""
        self.cache.discard(pages)

    def save(self, page: int) -> Tensor:
        """See `Runner`."""
        return self.cache.save(page)

    def restore(self, page: int, data: Tensor) -> None:
        """See `Runner`."""
        self.cache.restore(page, data)

    def forget(self, sequence: Any) -> None:
        """See `Runner`; pages are all there is."""

    def hidden(self, ids: Sequence[int], adapter: Any, adapted_from: int = 0) -> Tensor:
        """See `Runner`."""
        pages = self.model.pages(1)
        pages.reach(len(ids))
        positions = torch.arange(len(ids), dtype=torch.int32)
        sequences = torch.zeros(len(ids), dtype=torch.int32)
        segments = [] if adapter is None else [Segment(adapted_from, len(ids), adapter.adapter)]
        entered = self.model.embed(torch.tensor(list(ids)), positions)
        left = self.model.run(entered, positions, sequences, pages, adapters=segments)
        return self.model.parts.norm(left).float()

    def progress(self) -> float:
        """See `Runner`; the seconds that blocks have taken."""
        assert self.model.seconds is not None
        return float(self.model.seconds.sum())


class ModuleRunner:
    """A model's own modules, with a cache in one piece for every sequence; no adapters."""

    path, shares_prefixes = "modules", False
    page_tokens = PAGE

    def __init__(self, model: Any, kv_bytes_per_token: int, note: str) -> None:
        self.model, self.note = model, note
        self.page_bytes = PAGE * kv_bytes_per_token
        self._caches: dict[Any, Any] = {}
        self._left = 0
        for group in (module for module in model.modules() if isinstance(module, nn.ModuleList)):
            for block in group:
                block.register_forward_hook(self._count)

    def reserve(self, pages: int) -> None:
        """See `Runner`; caches grow by themselves."""

    @torch.no_grad()
    def step(self, pieces: Sequence[Piece]) -> list[Tensor]:
        """See `Runner`; there are no drafts."""
        from transformers import DynamicCache

        found = []
        for piece in pieces:
            if piece.start == 0:
                self._caches[piece.sequence] = DynamicCache(config=self.model.config)
            ids = piece.sequence.tokens[piece.start : piece.start + piece.count]
            output = self.model(
                input_ids=torch.tensor([ids]), past_key_values=self._caches[piece.sequence], use_cache=True,
                logits_to_keep=1,
            )  # fmt: skip
            if piece.chooses:
                found.append(output.logits[0, -1:].float())
        return found

    def copy(self, source: int, target: int) -> None:
        """See `Runner`; caches aren't shared."""

    def discard(self, pages: Sequence[int]) -> None:
        """See `Runner`; pages are numbers only."""

    def save(self, page: int) -> Tensor:
        """See `Runner`; pages are numbers only."""
        return torch.empty(0, dtype=torch.uint8)

    def restore(self, page: int, data: Tensor) -> None:
        """See `Runner`; pages are numbers only."""

    def forget(self, sequence: Any) -> None:
        """See `Runner`."""
        self._caches.pop(sequence, None)

    @torch.no_grad()
    def hidden(self, ids: Sequence[int], adapter: Any, adapted_from: int = 0) -> Tensor:
        """See `Runner`."""
        output = self.model(input_ids=torch.tensor([list(ids)]), output_hidden_states=True)
        return output.hidden_states[-1][0].float()

    def progress(self) -> float:
        """See `Runner`; how many blocks have been left."""
        return self._left

    def _count(self, *_: Any) -> None:
        self._left += 1
