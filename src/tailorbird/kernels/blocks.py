"""Whole decoder blocks over packed tokens, compiled: what `cpp/block.h` describes, for Python to fill in.

Structures hold addresses; whoever fills them keeps the tensors. Tokens of all sequences stand one after
the other, and keys and values lie in pages of `PAGE` tokens.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor

from tailorbird.kernels.adapters import Adapter, Segment, check_segments, segment_structures
from tailorbird.kernels.native import WeightStructure, best_version, library

#: Tokens whose keys and values share a page.
PAGE = 32
#: Head sizes are multiples of this.
HEAD_MULTIPLE = 16
NORM_KINDS = {"none": 0, "root_mean_square": 1, "layer": 2}
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2, "relu": 3}

#: What a block spends its time on: norms and rounding to bytes, rotary angles and the cache, and so on.
STEPS = (
    "norms", "attention_in", "rotary", "attention", "attention_out", "mlp_in", "activation", "mlp_out",
)  # fmt: skip

_pointer, _float, _int, _size = ctypes.c_void_p, ctypes.c_float, ctypes.c_int32, ctypes.c_int64


class NormStructure(ctypes.Structure):
    """`Norm`: float32 weight and bias ``[width]``, or null."""

    _fields_ = [("weight", _pointer), ("bias", _pointer), ("epsilon", _float), ("kind", _int)]


class TurnStructure(ctypes.Structure):
    """`Turn`: what `walsh.rotate` does to inputs; int8 signs ``[blocks, block]``."""

    _fields_ = [("signs", _pointer), ("blocks", _size), ("block", _size), ("factor", _float)]


class LinearStructure(ctypes.Structure):
    """`Linear`: a packed weight, or a dense one ``[out_features, in_features]``; a float32 bias or null.

    `low_rank` is the address of a `LinearAdapterStructure` of two factors alone, `turn` that of a
    `TurnStructure`, `sparse` that of a `SparseStructure`, or null. Linears that read the same inputs have
    equal signs, or none. `apart`: int32 ``[apart_count]``, inputs that are zeros where they are rounded to
    bytes; who has the same ones has the same address.
    """

    _fields_ = [
        ("weight", WeightStructure), ("dense", _pointer), ("bias", _pointer), ("dense_float32", _int),
        ("int8", _int), ("low_rank", _pointer), ("turn", _pointer),
        ("sparse", _pointer), ("apart", _pointer), ("apart_count", _size),
    ]  # fmt: skip


class HeadsStructure(ctypes.Structure):
    """`Heads`: where a head lies among what the projections give for a token.

    Heads that share a key are `stride` apart, their groups `group_stride`.
    """

    _fields_ = [("first", _size), ("group_stride", _size), ("stride", _size)]


class BlockStructure(ctypes.Structure):
    """`Block`."""

    _fields_ = [
        *((name, NormStructure) for name in ("before_attention", "after_attention", "before_mlp")),
        *((name, NormStructure) for name in ("after_mlp", "query", "key")),
        ("attention_in", LinearStructure * 3), ("attention_out", LinearStructure),
        ("mlp_in", LinearStructure * 2), ("mlp_out", LinearStructure),
        *((name, HeadsStructure) for name in ("queries", "keys", "values")),
        *((name, _int) for name in ("heads", "kv_heads", "head_dim", "rotary_dim", "attention_linears")),
        *((name, _int) for name in ("mlp_linears", "gated", "parallel", "parallel_norm")),
        *((name, _int) for name in ("whole_norms", "window", "activation")),
        ("scale", _float), ("softcap", _float),
        *((name, _pointer) for name in ("cosine", "sine", "key_pages", "value_pages")),
    ]  # fmt: skip


class _BatchStructure(ctypes.Structure):
    _fields_ = [
        *((name, _pointer) for name in ("positions", "slots", "sequences", "pages")),
        *((name, _pointer) for name in ("ancestors", "tree_start")),
        *((name, _size) for name in ("tokens", "most_pages", "width")), ("segments", _pointer),
        ("segment_count", _size), ("most_rank", _size), ("cache_float32", _int), ("seconds", _pointer),
    ]  # fmt: skip


class Batch:
    """Tokens that run together, described once: their tensors stay, and what they hold counts when it runs.

    Parameters
    ----------
    positions, sequences, pages, cache_dtype, slots, ancestors, tree_start, seconds
        As in `run_blocks`; contiguous.
    segments : sequence of Segment
        Checked.
    """

    def __init__(
        self,
        positions: Tensor,
        sequences: Tensor,
        pages: Tensor,
        cache_dtype: torch.dtype,
        slots: Tensor | None = None,
        ancestors: Tensor | None = None,
        tree_start: Tensor | None = None,
        segments: Sequence[Segment] = (),
        seconds: Tensor | None = None,
    ) -> None:
        self.positions, self.sequences, self.pages, self.seconds = positions, sequences, pages, seconds
        structures = segment_structures(segments)
        self._kept = slots, ancestors, tree_start, structures, segments
        self.described = _BatchStructure(
            positions.data_ptr(), (positions if slots is None else slots).data_ptr(), sequences.data_ptr(),
            pages.data_ptr(),
            None if ancestors is None else ancestors.data_ptr(),
            None if tree_start is None else tree_start.data_ptr(),
            positions.shape[0], pages.shape[1], 0, ctypes.addressof(structures), len(segments),
            max((cast(Adapter, segment.adapter).rank for segment in segments), default=0),
            int(cache_dtype == torch.float32), None if seconds is None else seconds.data_ptr(),
        )  # fmt: skip

    def run(
        self,
        blocks: ctypes.Array[BlockStructure],
        hidden: Tensor,
        first: int,
        last: int,
        version: int | None = None,
    ) -> None:
        """Run the tokens through blocks ``first`` to ``last - 1``; the rest is as of `run_blocks`."""
        _check_hidden(hidden)
        described = self.described
        tokens, described.width = hidden.shape
        if tokens != described.tokens:
            raise ValueError(f"hidden states of {tokens} tokens; expected those of {described.tokens}")
        library().tailorbird_run_blocks(
            blocks, first, last, ctypes.addressof(described), hidden.data_ptr(), torch.get_num_threads(),
            best_version() if version is None else version,
        )  # fmt: skip


def run_blocks(
    blocks: ctypes.Array[BlockStructure],
    hidden: Tensor,
    positions: Tensor,
    sequences: Tensor,
    pages: Tensor,
    cache_dtype: torch.dtype,
    first: int = 0,
    last: int | None = None,
    slots: Tensor | None = None,
    ancestors: Tensor | None = None,
    tree_start: Tensor | None = None,
    segments: Iterable[Segment] = (),
    version: int | None = None,
    seconds: Tensor | None = None,
) -> None:
    """Run some blocks over packed tokens; their keys and values go into the pages.

    A token's results have the same bits whatever runs beside it, and a token without an adapter those that
    it has in a batch without adapters.

    Parameters
    ----------
    blocks : array of BlockStructure
        All blocks of the model.
    hidden : Tensor[tokens, width], float32, contiguous
        What enters block `first`; what leaves block ``last - 1`` afterwards.
    positions, sequences : Tensor[tokens], int32
        Where a token stands, and in which sequence; tokens of a sequence are neighbours, in order.
    pages : Tensor[sequences, most_pages], int32
        The page of each `PAGE` tokens of a sequence.
    cache_dtype : torch.dtype
        Of keys and values: bfloat16 or float32.
    first, last : int
        Blocks to run, all by default.
    slots : Tensor[tokens], int32, optional
        Where in the pages a token's key lies; its position, unless given.
    ancestors, tree_start : Tensor[tokens], int64 and int32, optional
        For trees of tokens, whose siblings share a position and not a slot. A token whose slot is its
        position sees all slots up to it. Any other sees the slots before ``tree_start[i]``, and of the slots
        ``tree_start[i] + j`` those whose bit `j` is set, its own among them, which stand for the positions
        from ``tree_start[i]`` on: its results have the bits that they have where its branch is read alone.
        A tree has at most 63 tokens.
    segments : iterable of Segment
        Which tokens have an adapter, which was made for `blocks`; others have none.
    version : int, optional
        Instructions to use, one of `native.versions()`; the fastest by default.
    seconds : Tensor[len(STEPS)], float64, optional
        What each of `STEPS` takes is added here.

    Raises
    ------
    ValueError
        For hidden states or segments that the compiled code can't take.
    """
    checked = check_segments(segments, len(hidden), blocks)
    batch = Batch(
        positions, sequences, pages, cache_dtype, slots, ancestors, tree_start, checked, seconds
    )  # fmt: skip
    batch.run(blocks, hidden, first, len(blocks) if last is None else last, version)


def run_attention(
    block: BlockStructure, batch: Batch, projected: Tensor, version: int | None = None
) -> Tensor:
    """Attention of a block without its linears, norms and rotary angles; keys and values go into its pages.

    Parameters
    ----------
    block : BlockStructure
        With its pages, heads, window, scale and soft cap, and where in `projected` they lie.
    batch : Batch
    projected : Tensor[tokens, (heads + 2 * kv_heads) * head_dim], float32, contiguous
        Queries, keys and values.
    version : int, optional
        As of `run_blocks`.

    Returns
    -------
    Tensor[tokens, heads * head_dim], float32
    """
    _check_hidden(projected)
    outputs = torch.empty(len(projected), block.heads * block.head_dim, dtype=torch.float32, device="cpu")
    library().tailorbird_run_attention(
        ctypes.byref(block), ctypes.addressof(batch.described), projected.data_ptr(), projected.shape[1],
        outputs.data_ptr(), torch.get_num_threads(), best_version() if version is None else version,
    )  # fmt: skip
    return outputs


def check_no_gradient(hidden: Tensor) -> None:
    """Raise ValueError where a gradient by `hidden` is asked for, of which compiled code knows nothing."""
    if hidden.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "hidden states that need a gradient, which compiled blocks don't compute: call the model itself, "
            "or go on under torch.no_grad()"
        )


def _check_hidden(hidden: Tensor) -> None:
    """What the compiled code takes for granted."""
    check_no_gradient(hidden)
    if hidden.dtype != torch.float32 or hidden.device.type != "cpu" or not hidden.is_contiguous():
        raise ValueError(
            f"hidden states of {hidden.dtype} on {hidden.device}, not contiguous float32 on the CPU"
        )


def run_head(
    norm: NormStructure, head: LinearStructure, hidden: Tensor, version: int | None = None
) -> Tensor:
    """Logits ``[tokens, vocab_size]`` float32 of ``hidden [tokens, width]`` that left the last block."""
    _check_hidden(hidden)
    logits = torch.empty(len(hidden), head.weight.rows, dtype=torch.float32, device="cpu")
    library().tailorbird_run_head(
        ctypes.byref(norm), ctypes.byref(head), hidden.data_ptr(), *hidden.shape, logits.data_ptr(),
        torch.get_num_threads(), best_version() if version is None else version,
    )  # fmt: skip
    return logits


def fill_pages(blocks: Sequence[BlockStructure], keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Let block `i` keep its keys in ``keys[i]`` and its values in ``values[i]``."""
    for block, key, value in zip(blocks, keys, values, strict=True):
        block.key_pages, block.value_pages = key.data_ptr(), value.data_ptr()
