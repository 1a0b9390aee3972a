"""Numbers in 8 bits, block by block: many magnitudes, and more precision near the largest one.

Dettmers et al. 2021, "8-bit Optimizers via Block-wise Quantization" (https://arxiv.org/abs/2110.02861). A
block of values is divided by its largest magnitude, and each becomes the nearest of 256 levels. Those are
spread evenly within decades, twice as many in each decade as in the one below it, over seven decades:

    level = 10^(i − 6) · (middle of one of 2ⁱ equal parts of [0.1, 1]),    i = 0 … 6

with both signs; where there is no sign, 2ⁱ⁺¹ parts. 0 and 1 are levels, too.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

#: Values that share a scale.
BLOCK = 256
DECADES = 7


@lru_cache
def levels(signed: bool) -> Tensor:
    """The 256 levels, rising, float32."""
    found = [0.0, 1.0]
    for decade in range(DECADES):
        parts = 2 ** (decade if signed else decade + 1)
        edges = torch.linspace(0.1, 1, parts + 1, dtype=torch.float64)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - DECADES + 1)
        found += middles.tolist()
        found += (-middles).tolist() if signed else []
    return torch.tensor(sorted(found), dtype=torch.float32)


@lru_cache
def _tables(signed: bool, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """What `encode` and `decode` look up: levels, the bounds above each level, and first guesses.

    A guess is the level of the least value whose upper 16 bits are these; since bounds are farther apart than
    such values, the right level is that one or the next.
    """
    steps = levels(signed)
    bounds = (steps[1:] + steps[:-1]) / 2
    upper = torch.arange(1 << 16, dtype=torch.int32) << 16
    least = torch.where(upper < 0, upper | 0xFFFF, upper).view(torch.float32)
    guesses = torch.bucketize(least, bounds, out_int32=True)
    closed = torch.cat([bounds, torch.tensor([torch.inf])])
    return steps.to(device), closed.to(device), guesses.to(device)


def blocks_of(count: int) -> int:
    """Scales that `count` values need."""
    return -(-count // BLOCK)


def encode(values: Tensor, codes: Tensor, scales: Tensor, signed: bool) -> None:
    """Write values as codes.

    Parameters
    ----------
    values : Tensor[n]
        float32, finite.
    codes : Tensor[n]
        uint8, overwritten.
    scales : Tensor[blocks_of(n)]
        float32, overwritten: the largest magnitude of each block.
    signed : bool
        Whether values may be below zero. Where they may not, none above zero becomes zero, but the lowest
        level: these are divisors.
    """
    padded = torch.nn.functional.pad(values, (0, len(scales) * BLOCK - len(values))).view(-1, BLOCK)
    scales.copy_(padded.abs().amax(1))
    relative = (padded / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).view(-1)
    _, bounds, guesses = _tables(signed, values.device)
    nearest = guesses.index_select(0, (relative.view(torch.int32) >> 16).bitwise_and_(0xFFFF))
    nearest += relative > bounds.index_select(0, nearest)
    if not signed:
        nearest.clamp_(min=(relative > 0).int())
    codes.copy_(nearest[: len(values)])


def decode(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """The values that codes stand for, ``[n]`` float32."""
    values = _tables(signed, codes.device)[0].index_select(0, codes.int())
    return values.mul_(scales.repeat_interleave(BLOCK)[: len(codes)])
