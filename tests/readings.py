"""Logits of a model by its modules and by its compiled blocks."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from tailorbird.kernels.blocks import PAGE
from tailorbird.run.fused import FusedModel, obstacle
from tailorbird.run.pages import SharedPages, page_table

LENGTH = 70


def tokens(sequences: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (sequences, LENGTH), generator=torch.Generator().manual_seed(seed))


def by_modules(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits.float()


def in_pieces(model: Any, ids: Tensor, cuts: list[int], fused: FusedModel | None = None) -> Tensor:
    """Logits of all tokens, read in pieces that end at `cuts`."""
    fused = fused or FusedModel(model)
    sequences, length = ids.shape
    pages = fused.pages(sequences)
    found = []
    for start, stop in zip([0, *cuts], [*cuts, length], strict=True):
        pages.reach(stop)
        count = stop - start
        positions = torch.arange(start, stop, dtype=torch.int32).repeat(sequences)
        owners = torch.arange(sequences, dtype=torch.int32).repeat_interleave(count)
        part = fused.step(
            ids[:, start:stop].reshape(-1), positions, owners, pages, torch.arange(sequences * count)
        )
        found.append(part.view(sequences, count, -1))
    return torch.cat(found, dim=1)


def in_random_pieces(fused: FusedModel, texts: list[Tensor], shared: int, rng: random.Random) -> list[Tensor]:
    """Logits after the tokens of texts; in each step some of them, in any order, get pieces of any length.

    All begin with the same `shared` tokens, whole pages of which are read in the first text only; of the
    others there are the logits after the rest.
    """
    counts = [-(-len(text) // PAGE) for text in texts]
    cache = SharedPages(fused.page_shapes, fused.cache_dtype, sum(counts))
    free = rng.sample(range(sum(counts)), sum(counts))
    pages = [[free.pop() for _ in range(count)] for count in counts]
    for row in pages[1:]:
        row[: shared // PAGE] = pages[0][: shared // PAGE]
    done = [0, *[shared] * (len(texts) - 1)]
    found: list[list[Tensor]] = [[] for _ in texts]
    while any(at < len(text) for at, text in zip(done, texts, strict=True)):
        ready = range(len(texts)) if done[0] >= shared else range(1)
        waiting = [number for number in ready if done[number] < len(texts[number])]
        chosen = rng.sample(waiting, rng.randint(1, len(waiting)))
        pieces = [
            range(done[number], min(len(texts[number]), done[number] + rng.choice([1, 1, 2, 7, 40])))
            for number in chosen
        ]
        cache.tables = page_table([pages[number] for number in chosen])
        logits = fused.step(
            torch.cat(
                [
                    texts[number][piece.start : piece.stop]
                    for number, piece in zip(chosen, pieces, strict=True)
                ]
            ),
            torch.tensor([at for piece in pieces for at in piece], dtype=torch.int32),
            torch.tensor([row for row, piece in enumerate(pieces) for _ in piece], dtype=torch.int32),
            cache,
        )
        for number, piece, part in zip(chosen, pieces, logits.split([*map(len, pieces)]), strict=True):
            done[number] = piece.stop
            found[number].append(part)
    return [torch.cat(parts) for parts in found]


def assert_alike(model: Any, ids: Tensor, cuts: list[int]) -> None:
    """Compiled blocks suit the model, and give what its modules give up to rounding."""
    assert obstacle(model) is None
    torch.testing.assert_close(in_pieces(model, ids, cuts), by_modules(model, ids), atol=2e-5, rtol=1e-4)
