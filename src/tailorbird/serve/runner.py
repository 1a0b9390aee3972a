"""One step of the engine on a model: packed tokens in, logits out.

`PageRunner` runs a model over shared pages: through compiled blocks, or through its own modules with their
attention replaced. `ModuleRunner` runs models that neither suits, one sequence after the other, each with a
cache of its own in one piece; pages are counted all the same, so that memory stays within its bounds.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from tailorbird.kernels.adapters import Segment
from tailorbird.kernels.blocks import PAGE, STEPS
from tailorbird.run.fused import FusedModel, Trees
from tailorbird.run.paged import PagedModel
from tailorbird.run.pages import Cache, SharedPages, page_bytes, page_table
from tailorbird.run.parts import Unsuited
from tailorbird.serve.adapters.beginnings import Beginning
from tailorbird.serve.adapters.store import Model
from tailorbird.serve.scheduler import Piece

logger = logging.getLogger("tailorbird")


class Runner(Protocol):
    """What runs steps.

    Attributes
    ----------
    path : str
        ``fused``, ``paged`` or ``modules``.
    note : str
        Why it isn't fused; empty where it is.
    page_tokens, page_bytes : int
    shares_prefixes : bool
        Whether pages of one sequence can serve another.
    takes_drafts : bool
        Whether pieces may have drafts.
    adaptable : Model or None
        What adapters are laid out for; None where there can't be any.
    hidden_states : list of Tensor
        Of the last step, what left the last norm where its logits come from; kept where `keeps_hidden` is
        set.
    """

    path: str
    note: str
    page_tokens: int
    page_bytes: int
    shares_prefixes: bool
    takes_drafts: bool
    adaptable: Model | None
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

    def discard(self, pages: Sequence[int]) -> None:
        """Give back the memory of pages, which hold anything until they are written again."""

    def save(self, page: int) -> Tensor:
        """What a page holds, uint8 ``[page_bytes]`` on the CPU, where prefixes are shared."""

    def restore(self, page: int, data: Tensor) -> None:
        """Let a page hold what `save` gave."""

    def begin(self, beginning: Beginning, pages: Sequence[int], first: int = 0) -> None:
        """Let pages hold those of a beginning, from its page `first` on."""

    def forget(self, sequence: Any) -> None:
        """A sequence ended."""

    def hidden(self, ids: Sequence[int], adapter: Any, adapted_from: int = 0) -> Tensor:
        """What leaves the last norm for each token of a text, ``[tokens, width]`` float32.

        An adapter acts from token `adapted_from` on, or stands before the first one.
        """

    def progress(self) -> float:
        """A number that changes with each block of a step; may be asked from another thread."""


class PagedTokensModel(Model, Protocol):
    """A model that reads packed tokens over pages: `FusedModel` or `PagedModel`."""

    def progress(self) -> float:
        """See `FusedModel`."""

    def step(
        self,
        ids: Tensor,
        positions: Tensor,
        sequences: Tensor,
        cache: Cache,
        wanted: Tensor | None = None,
        adapters: Iterable[Segment] = (),
    ) -> Tensor:
        """See `FusedModel`."""

    def last_hidden(
        self,
        ids: Tensor,
        positions: Tensor,
        sequences: Tensor,
        cache: Cache,
        adapters: Iterable[Segment] = (),
    ) -> Tensor:
        """See `FusedModel`."""


def runner_for(model: Any, kv_bytes_per_token: Callable[[], int]) -> Runner:
    """Compiled blocks where they suit the model, else its modules over pages, else its modules alone.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    kv_bytes_per_token : callable
        Asked where the model runs through its modules alone.
    """
    try:
        return FusedRunner(FusedModel(model))
    except Unsuited as reason:
        not_fused = str(reason)
    try:
        runner = PageRunner(PagedModel(model), "paged", not_fused)
    except Unsuited as reason:
        note = not_fused if str(reason) == not_fused else f"{not_fused}; {reason}"
        logger.info("serving through the model's modules, one sequence at a time: %s", note)
        return ModuleRunner(model, kv_bytes_per_token(), note)
    logger.info("serving through the model's modules over pages: %s", not_fused)
    return runner


class PageRunner:
    """A model over shared pages.

    Parameters
    ----------
    model : FusedModel or PagedModel
    path, note : str
        As of `Runner`.
    """

    shares_prefixes = takes_drafts = True
    page_tokens = PAGE

    def __init__(self, model: PagedTokensModel, path: str, note: str = "") -> None:
        self.model, self.path, self.note = model, path, note
        self.adaptable: Model | None = model
        self.page_bytes = page_bytes(model.page_shapes, model.cache_dtype)
        self.cache = SharedPages(model.page_shapes, model.cache_dtype, 0, model.device)
        self.keeps_hidden = False
        self.hidden_states: list[Tensor] = []

    def reserve(self, pages: int) -> None:
        """See `Runner`."""
        self.cache = SharedPages(self.model.page_shapes, self.model.cache_dtype, pages, self.model.device)

    def step(self, pieces: Sequence[Piece]) -> list[Tensor]:
        """See `Runner`."""
        row = _packed(pieces)
        self.cache.tables = page_table([piece.sequence.pages for piece in pieces])
        return list(self._logits(row, pieces).split(row.counts))

    def _logits(self, row: _Row, pieces: Sequence[Piece]) -> Tensor:
        return self.model.step(row.ids, row.positions, row.sequences, self.cache, row.wanted, row.segments)

    def copy(self, source: int, target: int) -> None:
        """See `Runner`."""
        self.cache.copy(source, target)

    def move(self, pages: Sequence[int], sources: Sequence[int], targets: Sequence[int]) -> None:
        """See `Runner`."""
        self.cache.move(pages, sources, targets)

    def discard(self, pages: Sequence[int]) -> None:
        """See `Runner`."""
        self.cache.discard(pages)

    def save(self, page: int) -> Tensor:
        """See `Runner`."""
        return self.cache.save(page)

    def restore(self, page: int, data: Tensor) -> None:
        """See `Runner`."""
        self.cache.restore(page, data)

    def begin(self, beginning: Beginning, pages: Sequence[int], first: int = 0) -> None:
        """See `Runner`."""
        for page, data in zip(pages, beginning.pages[first:], strict=False):
            self.cache.restore(page, data)

    def forget(self, sequence: Any) -> None:
        """See `Runner`; pages are all there is."""

    def hidden(self, ids: Sequence[int], adapter: Any, adapted_from: int = 0) -> Tensor:
        """See `Runner`."""
        laid_out = None if adapter is None else adapter.adapter
        beginning = laid_out if isinstance(laid_out, Beginning) else None
        begun = 0 if beginning is None else beginning.places
        model, end = self.model, begun + len(ids)
        pages = SharedPages.of_one(model.page_shapes, model.cache_dtype, end, model.device)
        for page, data in enumerate([] if beginning is None else beginning.pages):
            pages.restore(page, data)
        positions = torch.arange(begun, end, dtype=torch.int32)
        sequences = torch.zeros(len(ids), dtype=torch.int32)
        segments = []
        if laid_out is not None and beginning is None:
            segments.append(Segment(adapted_from, len(ids), laid_out))
        return model.last_hidden(torch.tensor(list(ids)), positions, sequences, pages, segments)

    def progress(self) -> float:
        """See `Runner`."""
        return self.model.progress()


class FusedRunner(PageRunner):
    """Compiled blocks over shared pages; drafts may branch, and hidden states be kept.

    Parameters
    ----------
    model : FusedModel
    """

    model: FusedModel

    def __init__(self, model: FusedModel) -> None:
        super().__init__(model, "fused")
        model.seconds = torch.zeros(len(STEPS) + 1, dtype=torch.float64)  # for its progress

    def _logits(self, row: _Row, pieces: Sequence[Piece]) -> Tensor:
        hidden = self.model.read(
            row.ids, row.positions, row.sequences, self.cache, row.wanted, row.segments, row.reach,
            trees=_trees(pieces),
        )  # fmt: skip
        kept = self.model.normed(hidden).split(row.counts) if self.keeps_hidden else ()
        self.hidden_states = list(kept)
        return self.model.logits(hidden)


class _Row(NamedTuple):
    """The tokens of a step, as `FusedModel.step` takes them, and how many logits each piece gets."""

    ids: Tensor
    positions: Tensor
    sequences: Tensor
    wanted: Tensor
    segments: list[Segment]
    reach: int
    counts: list[int]


def _packed(pieces: Sequence[Piece]) -> _Row:
    """All tokens of some pieces, one piece after the other."""
    ids: list[int] = []
    positions: list[int] = []
    of_sequence: list[int] = []
    wanted: list[int] = []
    segments: list[Segment] = []
    counts = []
    for number, piece in enumerate(pieces):
        sequence, begin = piece.sequence, len(ids)
        end = piece.start + piece.count
        ids += sequence.tokens[piece.start : end]
        ids += piece.drafts
        positions += range(piece.start, end)
        positions += (end - 1 + depth for depth in piece.guess.depths())
        of_sequence += [number] * (len(ids) - begin)
        if piece.chooses:
            counts.append(1 + len(piece.drafts))
            wanted += range(len(ids) - counts[-1], len(ids))
        adapted = begin + max(0, sequence.adapted_from - piece.start)
        if sequence.adapter is not None and not sequence.begun and adapted < len(ids):
            segments.append(Segment(adapted, len(ids), sequence.adapter.adapter))
    return _Row(
        torch.tensor(ids),
        torch.tensor(positions, dtype=torch.int32),
        torch.tensor(of_sequence, dtype=torch.int32),
        torch.tensor(wanted, dtype=torch.int64),
        segments,
        max(positions) + 1,
        counts,
    )


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

    path = "modules"
    adaptable: Model | None = None
    shares_prefixes = takes_drafts = False
    page_tokens = PAGE

    def __init__(self, model: Any, kv_bytes_per_token: int, note: str) -> None:
        self.model, self.note = model, note
        self.page_bytes = PAGE * kv_bytes_per_token
        self.keeps_hidden = False
        self.hidden_states: list[Tensor] = []
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

        for sequence in [sequence for sequence in self._caches if not sequence.pages]:
            self.forget(sequence)  # it gave its pages to others
        found = []
        for piece in pieces:
            if piece.start == 0:
                self._caches[piece.sequence] = DynamicCache(config=self.model.config)
            ids = piece.sequence.tokens[piece.start : piece.start + piece.count]
            output = self.model(
                input_ids=torch.tensor([ids], device=self.model.device),
                past_key_values=self._caches[piece.sequence], use_cache=True, logits_to_keep=1,
            )  # fmt: skip
            if piece.chooses:
                found.append(output.logits[0, -1:].float().cpu())
        return found

    def copy(self, source: int, target: int) -> None:
        """See `Runner`; caches aren't shared."""

    def move(self, pages: Sequence[int], sources: Sequence[int], targets: Sequence[int]) -> None:
        """See `Runner`; there are no drafts."""

    def discard(self, pages: Sequence[int]) -> None:
        """See `Runner`; pages are numbers only."""

    def save(self, page: int) -> Tensor:
        """See `Runner`; pages are numbers only."""
        return torch.empty(0, dtype=torch.uint8)

    def restore(self, page: int, data: Tensor) -> None:
        """See `Runner`; pages are numbers only."""

    def begin(self, beginning: Beginning, pages: Sequence[int], first: int = 0) -> None:
        """See `Runner`; there are no adapters."""

    def forget(self, sequence: Any) -> None:
        """See `Runner`."""
        self._caches.pop(sequence, None)

    @torch.no_grad()
    def hidden(self, ids: Sequence[int], adapter: Any, adapted_from: int = 0) -> Tensor:
        """See `Runner`."""
        given = torch.tensor([list(ids)], device=self.model.device)
        output = self.model(input_ids=given, output_hidden_states=True)
        return output.hidden_states[-1][0].float().cpu()

    def progress(self) -> float:
        """See `Runner`; how many blocks have been left."""
        return self._left

    def _count(self, *_: Any) -> None:
        self._left += 1
