"""Blocks that keep nothing but their input, and are computed again for their gradients.

Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost (https://arxiv.org/abs/1604.06174).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def recomputing(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Let these blocks be computed again for their gradients until the end of the block."""
    before: list[tuple[Any, Any]] = []
    try:
        for block in blocks:
            before.append((block, vars(block).get("forward")))
            block.forward = partial(_forward, block.forward)
        yield
    finally:
        for block, own in reversed(before):
            if own is None:
                del block.forward  # the class's own shows again
            else:
                block.forward = own


def _forward(own: Any, *arguments: Any, **settings: Any) -> Any:
    if not torch.is_grad_enabled():
        return own(*arguments, **settings)
    return checkpoint(own, *arguments, use_reentrant=False, preserve_rng_state=False, **settings)
