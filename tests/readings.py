"""Logits of a model by its modules and by its compiled blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tailorbird.run.fused import FusedModel, obstacle

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


def assert_alike(model: Any, ids: Tensor, cuts: list[int]) -> None:
    """Compiled blocks suit the model, and give what its modules give up to rounding."""
    assert obstacle(model) is None
    torch.testing.assert_close(in_pieces(model, ids, cuts), by_modules(model, ids), atol=2e-5, rtol=1e-4)
