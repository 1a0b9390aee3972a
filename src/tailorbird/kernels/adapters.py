"""Adapters of compiled blocks: what tokens of a batch add to the linears that they share.

    y = outputs ⊙ (W (inputs ⊙ x) + scale · B (C (ranks ⊙ A (inputs ⊙ x)))) + bias

Any part may be absent: LoRA (https://arxiv.org/abs/2106.09685) is A, B and a scale, DoRA
(https://arxiv.org/abs/2402.09353) has `outputs` besides, IA3 (https://arxiv.org/abs/2205.05638) factors
only, and of adapters in a shared basis (https://arxiv.org/abs/2407.00066) each has a core C of its own
between an A and a B that are everybody's. `x` are float32 activations, also where the product of W rounds
them to bytes.

`A x` is summed as a dense linear is: each of 16 lanes sums every sixteenth input, then the lanes are added
in pairs 8, 4, 2 and 1 apart. `C` and `B` are summed from the first rank to the last, and the last sum is
added to the product. So a token's result has the same bits whatever runs beside it, and a token without an
adapter those that it has without any.
"""

from __future__ import annotations

import copy
import ctypes
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from tailorbird.kernels.native import LANES, rows_by_tile, zeros_in_large_pages

#: The linears of a block in the order of their structures: three for q, k and v (or one for all), and two for
#: gate and up (or one).
LINEARS = 7

#: Which of them run together.
_TOGETHER = (0, 0, 0, 1, 2, 2, 3)

#: of matrices, in the order of `Matrix` in `cpp/block.h`
_DTYPES = (torch.bfloat16, torch.float32, torch.int8)
_pointer, _float, _int, _size = ctypes.c_void_p, ctypes.c_float, ctypes.c_int32, ctypes.c_int64


class LinearAdapterStructure(ctypes.Structure):
    """`LinearAdapter` of `cpp/block.h`."""

    _fields_ = [
        *((name, _pointer) for name in ("down", "up", "core", "ranks", "inputs", "outputs", "bias")),
        ("rank", _size),
        ("scale", _float), ("down_kind", _int), ("up_kind", _int),
    ]  # fmt: skip


BlockAdapterStructure = LinearAdapterStructure * LINEARS


class TiledRows:
    """A matrix as `LinearAdapter` takes it for `up`, laid out once for all adapters that share it.

    Parameters
    ----------
    matrix : Tensor[out_features, rank], float32, bfloat16 or int8
    """

    def __init__(self, matrix: Tensor) -> None:
        self.shape, self.dtype = matrix.shape, matrix.dtype
        self.tiles = rows_by_tile(matrix.detach())

    @property
    def nbytes(self) -> int:
        """Bytes of the tiles."""
        return self.tiles.nbytes

    def to(self, device: torch.device) -> TiledRows:
        """The same on a device."""
        return self if self.tiles.device == device else self.moved(lambda tiles: tiles.to(device))

    def times(self, low: Tensor) -> Tensor:
        """``low @ matrix.T`` for ``low [tokens, rank]``, float32."""
        return torch.einsum("tr,nrl->tnl", low, self.tiles.float()).flatten(1)[:, : self.shape[0]]

    def moved(self, take: Callable[[Tensor], Tensor]) -> TiledRows:
        """The same with tiles in the memory that `take` copies them to."""
        moved = copy.copy(self)
        moved.tiles = take(self.tiles)
        return moved


class BasisPart(TiledRows):
    """A and B of one linear, which many adapters share.

    Parameters
    ----------
    up : Tensor[out_features, rank]
        B, which is tiled.
    down : Tensor[rank, in_features]
        A.
    key : hashable
        The same for those with the same content, and for no others.
    """

    def __init__(self, up: Tensor, down: Tensor, key: Hashable) -> None:
        super().__init__(up)
        self.down, self.key = down, key


def shared_bytes(linears: Iterable[LinearAdapter]) -> dict[Hashable, int]:
    """Bytes of what other adapters may have, too, by the keys of the parts."""
    parts = (linear.up for linear in linears if isinstance(linear.up, BasisPart))
    return {part.key: part.nbytes + part.down.nbytes for part in parts}


class SegmentStructure(ctypes.Structure):
    """`Segment` of `cpp/block.h`."""

    _fields_ = [("begin", _size), ("end", _size), ("blocks", _pointer)]


@dataclass(frozen=True, eq=False)
class LinearAdapter:
    """What an adapter makes of one linear `W [out_features, in_features]`; contiguous tensors on the CPU.

    Parameters
    ----------
    down, up : Tensor[rank, in_features] and Tensor[out_features, rank], float32, bfloat16 or int8, optional
        A and B, both or neither. `up` is copied when it is laid out, unless it is `TiledRows`.
    core : Tensor[rank, rank], float32, optional
        C, the identity if absent; copied when it is laid out.
    ranks : Tensor[rank], float32, optional
        Factors of what A gives.
    scale : float
        What their product is multiplied by.
    inputs, outputs : Tensor[in_features] and Tensor[out_features], float32, optional
        Factors. Inputs that several linears of a block read can't have any.
    bias : Tensor[out_features], float32, optional
        In place of the linear's own. No factor applies to either bias.
    """

    down: Tensor | None = None
    up: Tensor | TiledRows | None = None
    scale: float = 1.0
    inputs: Tensor | None = None
    outputs: Tensor | None = None
    bias: Tensor | None = None
    core: Tensor | None = None
    ranks: Tensor | None = None

    def check(self, out_features: int, in_features: int, where: str) -> None:
        """Raise ValueError unless this fits a linear of such a shape, which messages call `where`."""
        if (self.down is None) != (self.up is None):
            raise ValueError(f"{where}: an adapter with one of `down` and `up`; expected both or neither")
        if self.down is None and (self.core is not None or self.ranks is not None):
            raise ValueError(f"{where}: an adapter with `core` or `ranks` and without `down`; expected both")
        if self.down is not None and self.up is not None:
            rank = len(self.down) if self.down.dim() else 0
            _check(self.down, (rank, in_features), _DTYPES, f"{where}: `down`")
            if not isinstance(self.up, TiledRows):
                _check(self.up, (out_features, rank), _DTYPES, f"{where}: `up`")
            elif self.up.shape != (out_features, rank):
                given = list(self.up.shape)
                raise ValueError(f"{where}: tiled `up` is {given}; expected {[out_features, rank]}")
            if self.core is not None:
                _check(self.core, (rank, rank), (torch.float32,), f"{where}: `core`")
            if self.ranks is not None:
                _check(self.ranks, (rank,), (torch.float32,), f"{where}: `ranks`")
        for name, factors, size in (
            ("inputs", self.inputs, in_features), ("outputs", self.outputs, out_features),
            ("bias", self.bias, out_features),
        ):  # fmt: skip
            if factors is not None:
                _check(factors, (size,), (torch.float32,), f"{where}: `{name}`")

    def described(self, kept: list[Tensor | TiledRows]) -> LinearAdapterStructure:
        """The structure for this; what it points to is added to `kept`."""

        def address(one: Tensor | TiledRows | None) -> int | None:
            if one is None:
                return None
            kept.append(one)
            return (one.tiles if isinstance(one, TiledRows) else one).data_ptr()

        down = None if self.down is None else self.down.detach()
        up = TiledRows(self.up) if isinstance(self.up, Tensor) else self.up
        core = None if self.core is None else self.core.detach().t().contiguous()
        return LinearAdapterStructure(
            address(down), address(up), address(core), address(self.ranks), address(self.inputs),
            address(self.outputs), address(self.bias), 0 if down is None else len(down), self.scale,
            0 if down is None else _DTYPES.index(down.dtype), 0 if up is None else _DTYPES.index(up.dtype),
        )  # fmt: skip


class Adapter:
    """An adapter laid out for the blocks of one model, which it doesn't change.

    Matrices that belong to one linear alone are copied to one piece of memory, in the order in which blocks
    read them: many adapters in a batch are read once a step each, as fast as memory allows.

    Parameters
    ----------
    blocks : array of BlockStructure
        All blocks of the model.
    linears : mapping of (block, linear) to LinearAdapter
        Where it changes something. Linears of a block are counted as `BlockStructure` has them: 0 to 2 are
        `attention_in`, 3 `attention_out`, 4 and 5 `mlp_in`, 6 `mlp_out`.

    Raises
    ------
    ValueError
        For a block or linear that isn't there, or what doesn't fit it.
    """

    def __init__(self, blocks: Any, linears: Mapping[tuple[int, int], LinearAdapter]) -> None:
        self.blocks = blocks
        self.rank = 0
        #: as of `LaidOut`
        self.shared = shared_bytes(linears.values())
        self._kept: list[Tensor | TiledRows] = []
        self._table = (BlockAdapterStructure * len(blocks))()
        for (block, number), linear in linears.items():
            if not 0 <= block < len(blocks):
                raise ValueError(f"an adapter for block {block}; expected one from 0 to {len(blocks) - 1}")
            places = _linears_of(blocks[block])
            where = f"block {block}, linear {number}"
            if number not in places:
                raise ValueError(f"{where}: there is none; expected one of {sorted(places)}")
            weight, alone = places[number]
            linear.check(weight.rows, weight.in_features, where)
            if linear.inputs is not None and not alone:
                raise ValueError(
                    f"{where}: factors for inputs that other linears of the block read, too; expected none"
                )
        for (block, number), linear in _side_by_side(linears).items():
            self._table[block][number] = linear.described(self._kept)
            self.rank = max(self.rank, self._table[block][number].rank)

    @property
    def nbytes(self) -> int:
        """Bytes that it takes; a tensor that several linears share counts once."""
        kept = [one.tiles if isinstance(one, TiledRows) else one for one in self._kept]
        tensors = {tensor.data_ptr(): tensor.nbytes for tensor in kept}
        return ctypes.sizeof(self._table) + sum(tensors.values())

    @property
    def address(self) -> int:
        """Of the structures, one for each block."""
        return ctypes.addressof(self._table)


def _side_by_side(linears: Mapping[tuple[int, int], LinearAdapter]) -> dict[tuple[int, int], LinearAdapter]:
    """The same, with the matrices that no other linear has in one piece of memory.

    Linears of a block that run together have theirs together: first all `down`, then all `up`.
    """
    users = Counter(linear.down.data_ptr() for linear in linears.values() if linear.down is not None)
    # what is tiled already is there for other adapters, too, and so is what it goes with
    own = {at: one for at, one in linears.items() if not isinstance(one.up, TiledRows)}
    ups = {at: one.up.detach() for at, one in own.items() if isinstance(one.up, Tensor)}
    downs = {at: one.down.detach() for at, one in own.items() if one.down is not None}
    downs = {at: matrix for at, matrix in downs.items() if users[matrix.data_ptr()] == 1}
    sizes = [matrix.nbytes for matrix in downs.values()]
    sizes += [-(-len(matrix) // LANES) * LANES * matrix.nbytes // len(matrix) for matrix in ups.values()]
    memory, used = zeros_in_large_pages(sum(map(_whole_lines, sizes))), 0

    def take(matrix: Tensor) -> Tensor:
        nonlocal used
        start, used = used, used + _whole_lines(matrix.nbytes)
        return memory[start : start + matrix.nbytes].view(matrix.dtype).view(matrix.shape).copy_(matrix)

    placed = dict(linears)
    for _, together in groupby(sorted(linears), key=lambda at: (at[0], _TOGETHER[at[1]])):
        group = list(together)
        for at in group:
            if at in downs:
                placed[at] = replace(placed[at], down=take(downs[at]))
        for at in group:
            if at in ups:
                placed[at] = replace(placed[at], up=TiledRows(ups[at]).moved(take))
    return placed


def _whole_lines(size: int) -> int:
    """Bytes of the lines of a cache that `size` bytes take."""
    return -(-size // 64) * 64


class LaidOut(Protocol):
    """An adapter that a model laid out for itself: `Adapter`, or another model's kind."""

    @property
    def blocks(self) -> Any:
        """What it was made for; no other model has the same object."""

    @property
    def nbytes(self) -> int:
        """Bytes that it takes, with those that it shares."""

    @property
    def shared(self) -> Mapping[Hashable, int]:
        """Bytes of each part that is in memory once for all adapters that have its key."""


class Segment(NamedTuple):
    """Tokens `begin` to ``end - 1`` of a batch, which share an adapter."""

    begin: int
    end: int
    adapter: LaidOut


def check_segments(segments: Iterable[Segment], tokens: int, blocks: Any) -> list[Segment]:
    """The segments by their first token.

    Raises
    ------
    ValueError
        Where one is empty, leaves the batch of so many tokens, overlaps another, or was made for other
        blocks.
    """
    found = sorted(segments, key=lambda segment: segment[:2])
    reached = 0
    for begin, end, adapter in found:
        if not 0 <= begin < end <= tokens:
            raise ValueError(
                f"a segment of tokens {begin} to {end}; expected at least one token within 0 to {tokens}"
            )
        if begin < reached:
            raise ValueError(
                f"a segment that begins at token {begin}, where another reaches {reached}; "
                "expected segments that don't overlap"
            )
        if adapter.blocks is not blocks:
            raise ValueError("an adapter that was made for other blocks; expected one for those that run")
        reached = end
    return found


def within(segments: Iterable[Segment], start: int, stop: int) -> list[Segment]:
    """What lies in tokens `start` to ``stop - 1``, counted from `start`."""
    return [
        Segment(max(begin, start) - start, min(end, stop) - start, adapter)
        for begin, end, adapter in segments
        if begin < stop and start < end
    ]


def segment_structures(segments: Sequence[Segment]) -> ctypes.Array[SegmentStructure]:
    """The structures of segments that were checked, of compiled blocks."""
    return (SegmentStructure * len(segments))(
        *(SegmentStructure(begin, end, cast(Adapter, adapter).address) for begin, end, adapter in segments)
    )


def _linears_of(block: Any) -> dict[int, tuple[Any, bool]]:
    """The weight of every linear of a block by its number, and whether it reads its inputs alone."""
    first = {i: block.attention_in[i] for i in range(block.attention_linears)}
    second = {4 + i: block.mlp_in[i] for i in range(block.mlp_linears)}
    places = {i: (linear.weight, len(part) == 1) for part in (first, second) for i, linear in part.items()}
    return places | {3: (block.attention_out.weight, True), 6: (block.mlp_out.weight, True)}


def _check(tensor: Any, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], what: str) -> None:
    """What the compiled code takes for granted."""
    if not isinstance(tensor, Tensor) or tensor.shape != shape or 0 in shape:
        given = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"{what} is {given}; expected a tensor of {list(shape)}, nothing of it empty")
    if tensor.dtype not in dtypes or tensor.device.type != "cpu" or not tensor.is_contiguous():
        expected = " or ".join(str(dtype) for dtype in dtypes)
        kind = "contiguous" if tensor.is_contiguous() else "not contiguous"
        raise ValueError(
            f"{what} is {tensor.dtype} on {tensor.device}, {kind}; expected contiguous {expected} on the CPU"
        )
