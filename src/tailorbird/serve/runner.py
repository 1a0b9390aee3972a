"""One step of the engine on a model: packed tokens in, logits out.

`FusedRunner` runs compiled blocks over shared pages. `ModuleRunner` runs models that they don't suit through
their own modules, one sequence after the other, each with a cache of its own in one piece; pages are counted
all the same, so that memory stays within its bounds.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from tailorbird.kernels.adapters import Segment
from tailorbird.kernels.blocks import PAGE
from tailorbird.run.fused import FusedModel, Trees
from tailorbird.run.pages import SharedPages, page_bytes, page_table
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
    hidden_states : list of Tensor
        Of the last step, what left the last norm where its logits come from; kept where `keeps_hidden` is
        set.
    """

    path: str
    note: str
    page_tokens: int
    page_bytes: int
    shares_prefixes: bool
    keeps_hidden: bool
    hidden_states: list[Tensor]

    def reserve(self, pages: int) -> None:
        """Make room for so many pages, once, before anything runs."""

    def step(self, pieces: Sequence[Piece]) -> list[Tensor]:
        """Read pieces; for each that chooses, in order, logits ``[1 + drafts, vocab_size]``, float32."""

    def copy(self, source: int, target: int) -> None:
        """Give page `target` what page `source` holds."""

    def move(self, pages: Sequence[int], sources: Sequence[int], targets: Sequence[int]) -> None:
        """Let keys and values of one sequence, which has `pages`, change their places."""

    def forget(self, sequence: Any) -> None:
        """A sequence ended."""

    def hidden(self, ids: Sequence[int], adapter: Any) -> Tensor:
        """What leaves the last norm for each token of a text, ``[tokens, width]`` float32."""


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
        self.page_bytes = page_bytes(model.page_shapes, model.cache_dtype)
        self.cache = SharedPages(model.page_shapes, model.cache_dtype, 0)
        self.keeps_hidden = False
        self.hidden_states: list[Tensor] = []

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
        for number, piece in enumerate(pieces):
            sequence, begin = piece.sequence, len(ids)
            end = piece.start + piece.count
            ids += sequence.tokens[piece.start : end]
            ids += piece.drafts
            positions += range(piece.start, end)
            positions += (end - 1 + depth for depth in piece.guess.depths())
            of_sequence += [number] * (len(ids) - begin)
            if piece.chooses:
                rows.append(1 + len(piece.drafts))
                wanted += range(len(ids) - rows[-1], len(ids))
            if sequence.adapter is not None:
                segments.append(Segment(begin, len(ids), sequence.adapter.adapter))
        self.cache.tables = page_table([piece.sequence.pages for piece in pieces])
        hidden = self.model.read(
            torch.tensor(ids),
            torch.tensor(positions, dtype=torch.int32),
            torch.tensor(of_sequence, dtype=torch.int32),
            self.cache,
            torch.tensor(wanted, dtype=torch.int64),
            segments,
            reach=max(positions) + 1,
            trees=_trees(pieces),
        )
        if self.keeps_hidden:
            self.hidden_states = list(self.model.normed(hidden).split(rows))
        return list(self.model.logits(hidden).split(rows))

    def copy(self, source: int, target: int) -> None:
        """See `Runner`."""
        self.cache.copy(source, target)

    def move(self, pages: Sequence[int], sources: Sequence[int], targets: Sequence[int]) -> None:
        """See `Runner`."""
        self.cache.move(pages, sources, targets)

    def forget(self, sequence: Any) -> None:
        """See `Runner`; pages are all there is."""

    def hidden(self, ids: Sequence[int], adapter: Any) -> Tensor:
        """See `Runner`."""
        pages = self.model.pages(1)
        pages.reach(len(ids))
        positions = torch.arange(len(ids), dtype=torch.int32)
        sequences = torch.zeros(len(ids), dtype=torch.int32)
        segments = [] if adapter is None else [Segment(0, len(ids), adapter.adapter)]
        entered = self.model.embed(torch.tensor(list(ids)), positions)
        left = self.model.run(entered, positions, sequences, pages, adapters=segments)
        return self.model.normed(left)


def _trees(pieces: Sequence[Piece]) -> Trees | None:
    """How the drafts of some pieces branch, where any do."""
    if not any(piece.parents for piece in pieces):
        return None
    slots: list[int] = []
    ancestors: list[int] = []
    starts: list[int] = []
    for piece in pieces:
        end, guess = piece.start + piece.count, piece.guess
        slots += range(piece.start, end + len(guess))
        ancestors += [0] * piece.count
        ancestors += guess.ancestors()
        starts += [end] * (piece.count + len(guess))
    return Trees(
        torch.tensor(slots, dtype=torch.int32),
        torch.tensor(ancestors),
        torch.tensor(starts, dtype=torch.int32),
    )


class ModuleRunner:
    """A model's own modules, with a cache in one piece for every sequence; no adapters."""

    path, shares_prefixes = "modules", False
    page_tokens = PAGE

    def __init__(self, model: Any, kv_bytes_per_token: int, note: str) -> None:
        self.model, self.note = model, note
        self.page_bytes = PAGE * kv_bytes_per_token
        self.keeps_hidden = False
        self.hidden_states: list[Tensor] = []
        self._caches: dict[Any, Any] = {}

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

    def move(self, pages: Sequence[int], sources: Sequence[int], targets: Sequence[int]) -> None:
        """See `Runner`; there are no drafts."""

    def forget(self, sequence: Any) -> None:
        """See `Runner`."""
        self._caches.pop(sequence, None)

    @torch.no_grad()
    def hidden(self, ids: Sequence[int], adapter: Any) -> Tensor:
        """See `Runner`."""
        output = self.model(input_ids=torch.tensor([list(ids)]), output_hidden_states=True)
        return output.hidden_states[-1][0].float()
