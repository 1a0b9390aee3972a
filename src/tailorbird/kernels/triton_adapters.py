"""Low-rank additions of several adapters in one batch, on the GPU: each row takes its own adapter's.

    y[r] += scale[a] * B[a] @ (A[a] @ x[r]),  a = adapter of row r

Rows of one adapter are gathered into tiles of `TILE`, so that an adapter's matrices are read once per tile.
A first kernel makes `A x` of each part of `PART` inputs, a second adds the parts, first to last, and
multiplies by `B`. What lies between is float32, and a row's result doesn't depend on the other rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tailorbird.kernels.triton_runtime import DTYPES, jit, operand, require, tl

#: rows of a tile; inputs of a program and of one of its steps; outputs of a program
TILE, PART, STEP, BLOCK_OUT = 16, 1024, 64, 64
#: ranks that are handled at once: 16, 32, or multiples of this
BLOCK_RANK = 64


@dataclass(frozen=True, eq=False)
class Adapters:
    """The low-rank matrices of all adapters of one linear; ranks below the largest are filled up with zeros.

    Parameters
    ----------
    down : Tensor[adapters, rank, in_features], bfloat16, float16 or float32
    up : Tensor[adapters, out_features, rank], dtype of `down`
    scales : Tensor[adapters], float32
    """

    down: Tensor
    up: Tensor
    scales: Tensor


@dataclass(frozen=True, eq=False)
class Tiles:
    """Which rows stand together; made once for a batch, for all linears.

    Parameters
    ----------
    rows : Tensor[tiles, TILE], int32
        Numbers of rows; -1 where there is none.
    adapters : Tensor[tiles], int32
        Adapter of each tile; that of a tile without rows is any.
    """

    rows: Tensor
    adapters: Tensor


def stack(adapters: Sequence[tuple[Tensor, Tensor, float]]) -> Adapters:
    """Adapters of one linear, whose ranks may differ, in one tensor each.

    Parameters
    ----------
    adapters : sequence of (Tensor[rank, in_features], Tensor[out_features, rank], float)
        Down and up matrices, of one dtype and on one device, and the scale of their product.

    Raises
    ------
    ValueError
        Without adapters, or where shapes don't fit each other.
    """
    if not adapters:
        raise ValueError("no adapters; expected at least one")
    first_down, first_up, _ = adapters[0]
    inputs, outputs = first_down.shape[1], first_up.shape[0]
    largest = max(len(down) for down, _, _ in adapters)
    rank = next((n for n in (16, 32) if largest <= n), -(-largest // BLOCK_RANK) * BLOCK_RANK)
    down_all = first_down.new_zeros(len(adapters), rank, inputs)
    up_all = first_down.new_zeros(len(adapters), outputs, rank)
    for number, (down, up, _) in enumerate(adapters):
        if down.shape != (len(down), inputs) or up.shape != (outputs, len(down)):
            raise ValueError(
                f"adapter {number} has matrices {list(down.shape)} and {list(up.shape)}; expected "
                f"[rank, {inputs}] and [{outputs}, rank]"
            )
        down_all[number, : len(down)], up_all[number, :, : len(down)] = down, up
    scales = torch.tensor([scale for _, _, scale in adapters], dtype=torch.float32, device=down_all.device)
    return Adapters(down_all, up_all, scales)


def tile_rows(of_row: Tensor, adapters: int) -> Tiles:
    """Gather the rows of each adapter into tiles, in their order, without waiting for the GPU.

    Parameters
    ----------
    of_row : Tensor[rows], integer
        Adapter of each row; -1 for none.
    adapters : int
        How many there are.
    """
    rows = len(of_row)
    # A tile that isn't full is its adapter's last.
    tiles = min(rows, rows // TILE + adapters)
    of_row = of_row.long()
    counts = torch.zeros(adapters + 1, dtype=torch.long, device=of_row.device)
    counts.index_add_(0, of_row + 1, torch.ones_like(of_row))
    per_adapter = (counts[1:] + TILE - 1) // TILE
    ends = per_adapter.cumsum(0)
    order = torch.argsort(of_row, stable=True)
    sorted_adapter = of_row[order]
    before = counts.cumsum(0) - counts
    place = torch.arange(rows, device=of_row.device) - before[sorted_adapter + 1]
    place += TILE * (ends - per_adapter)[sorted_adapter.clamp(min=0)]
    # Rows without an adapter go behind the last tile, which is cut off.
    place = torch.where(sorted_adapter < 0, tiles * TILE, place)
    numbers = torch.full((tiles * TILE + 1,), -1, dtype=torch.int32, device=of_row.device)
    numbers[place] = order.int()
    numbers = numbers[:-1].view(tiles, TILE)
    tile = torch.arange(tiles, device=of_row.device)
    owner = torch.searchsorted(ends, tile, right=True).clamp(max=adapters - 1)
    return Tiles(numbers.contiguous(), owner.int())


def add(y: Tensor, x: Tensor, adapters: Adapters, tiles: Tiles) -> Tensor:
    """Add to each row of `y`, in place, what its adapter makes of that row of `x`; returns `y`.

    Rows without an adapter stay as they are.

    Parameters
    ----------
    y : Tensor[rows, out_features], contiguous, dtype of `x`
    x : Tensor[rows, in_features], bfloat16, float16 or float32
    adapters : Adapters
        Of the dtype of `x`.
    tiles : Tiles
        Of these rows (`tile_rows`).

    Raises
    ------
    ResourceError
        Without Triton, or where not all tensors are on one CUDA device.
    ValueError
        For shapes or dtypes that don't fit.
    """
    require(y, x, adapters.down, adapters.up, adapters.scales, tiles.rows, tiles.adapters)
    _, rank, inputs = adapters.down.shape
    outputs = adapters.up.shape[1]
    if x.dim() != 2 or x.shape[1] != inputs or y.shape != (len(x), outputs) or not y.is_contiguous():
        raise ValueError(
            f"x {list(x.shape)} and y {list(y.shape)}; expected [rows, {inputs}] and contiguous "
            f"[rows, {outputs}]"
        )
    if x.dtype not in DTYPES or {y.dtype, adapters.down.dtype, adapters.up.dtype} != {x.dtype}:
        raise ValueError(
            f"x {x.dtype}, y {y.dtype}, adapters {adapters.down.dtype}; expected one of float16, bfloat16, "
            "float32 for all"
        )
    count, parts, block_rank = len(tiles.rows), -(-inputs // PART), min(rank, BLOCK_RANK)
    if rank not in (16, 32) and rank % BLOCK_RANK:
        raise ValueError(f"adapters of rank {rank}; expected 16, 32 or a multiple of {BLOCK_RANK} (`stack`)")
    if count == 0 or outputs == 0:
        return y
    middle = torch.empty(parts, count, TILE, rank, dtype=torch.float32, device=x.device)
    _go_down[(count, parts, rank // block_rank)](
        x.contiguous(), adapters.down, tiles.rows, tiles.adapters, middle, inputs, rank, count, TILE,
        block_rank, PART, STEP, operand(x.dtype), num_warps=4,
    )  # fmt: skip
    _go_up[(count, -(-outputs // BLOCK_OUT))](
        y, adapters.up, adapters.scales, tiles.rows, tiles.adapters, middle, outputs, rank, count, parts,
        TILE, block_rank, BLOCK_OUT, num_warps=4,
    )  # fmt: skip
    return y


@jit
def _go_down(
    x, down, tile_rows, tile_adapters, middle, inputs, ranks, tiles,
    TILE: tl.constexpr, RANK: tl.constexpr, PART: tl.constexpr, STEP: tl.constexpr,
    OPERAND: tl.constexpr,
):  # fmt: skip
    """`A x` of one tile over one part of the inputs, for `RANK` ranks."""
    tile, part = tl.program_id(0), tl.program_id(1)
    i, k = tl.arange(0, TILE), tl.arange(0, STEP)
    rank = tl.program_id(2) * RANK + tl.arange(0, RANK)
    row = tl.load(tile_rows + tile * TILE + i)
    if tl.max(row) >= 0:
        adapter = tl.load(tile_adapters + tile).to(tl.int64)
        from_x = x + row.to(tl.int64)[:, None] * inputs
        from_down = down + (adapter * ranks + rank)[None, :] * inputs
        total = tl.zeros([TILE, RANK], tl.float32)
        for start in range(part * PART, tl.minimum((part + 1) * PART, inputs), STEP):
            at = start + k
            there = at < inputs
            activation = tl.load(from_x + at[None, :], mask=(row >= 0)[:, None] & there[None, :], other=0.0)
            factor = tl.load(from_down + at[:, None], mask=there[:, None], other=0.0)
            total = tl.dot(activation.to(OPERAND), factor.to(OPERAND), total, input_precision="ieee")
        target = middle + ((part * tiles + tile) * TILE + i)[:, None] * ranks + rank[None, :]
        tl.store(target, total)


@jit
def _go_up(
    y, up, scales, tile_rows, tile_adapters, middle, outputs, ranks, tiles, parts,
    TILE: tl.constexpr, RANK: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """Adds `scale * B (A x)` of one tile to some outputs."""
    tile = tl.program_id(0)
    i, rank, n = tl.arange(0, TILE), tl.arange(0, RANK), tl.program_id(1) * OUT + tl.arange(0, OUT)
    row = tl.load(tile_rows + tile * TILE + i)
    if tl.max(row) >= 0:
        adapter = tl.load(tile_adapters + tile).to(tl.int64)
        addition = tl.zeros([TILE, OUT], tl.float32)
        for first in range(0, ranks, RANK):
            at = first + rank
            low = tl.zeros([TILE, RANK], tl.float32)
            for part in range(0, parts):
                low += tl.load(middle + ((part * tiles + tile) * TILE + i)[:, None] * ranks + at[None, :])
            from_up = up + (adapter * outputs + n)[None, :] * ranks + at[:, None]
            factor = tl.load(from_up, mask=(n < outputs)[None, :], other=0.0).to(tl.float32)
            addition = tl.dot(low, factor, addition, input_precision="ieee")
        target = y + row.to(tl.int64)[:, None] * outputs + n[None, :]
        there = (row >= 0)[:, None] & (n < outputs)[None, :]
        before = tl.load(target, mask=there, other=0.0).to(tl.float32)
        total = before + tl.load(scales + adapter) * addition
        tl.store(target, total.to(y.dtype.element_ty), mask=there)
