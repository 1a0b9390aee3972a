"""What enters a model's first block: rows of its embeddings, looked up by one compiled call.

They have the bits that the model's modules give. Embeddings that aren't known here are left to these.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from tailorbird.formats.modules import CompressedEmbedding
from tailorbird.formats.packed import DoubleCoding, EntropyCoding, VectorCoding, unpacking
from tailorbird.kernels import native
from tailorbird.model.skeleton import scale_output

#: (ids, positions), both ``[tokens]``, to what enters the first block: float32 ``[tokens, hidden_size]``
Embed = Callable[[Tensor, Tensor], Tensor]


class Rows:
    """Rows of an embedding, in float32.

    Parameters
    ----------
    table : EmbeddingStructure
    dtype : torch.dtype
        What the module would give them in.
    kept : tuple
        Tensors to which `table` points.
    """

    def __init__(self, table: native.EmbeddingStructure, dtype: torch.dtype, kept: tuple[Any, ...]) -> None:
        self.table, self.dtype = table, dtype
        self._kept = kept

    def __call__(self, ids: Tensor) -> Tensor:
        """Rows ``[tokens, width]`` of ids ``[tokens]``; raises IndexError for an id that has none."""
        return native.look_up(self.table, ids)


def rows_of(module: nn.Module) -> Rows | None:
    """What looks rows up in place of an embedding; None for one that isn't known.

    Known are plain, scaled (Gemma's) and compressed ones on the CPU, without hooks of others. Their tensors
    are shared and must stay as they are.
    """
    if not native.available() or module._forward_pre_hooks:
        return None
    if type(module) is CompressedEmbedding:
        return _packed_rows(module)
    scaled = type(module).__name__.endswith("TextScaledWordEmbedding")
    if not (type(module) is nn.Embedding or scaled) or module._forward_hooks or module.max_norm is not None:
        return None
    weight = module.weight.detach()
    # Gemma rounds the factor to the dtype of the rows.
    return _dense_rows(weight, float(module.embed_scale.to(weight.dtype)) if scaled else 1.0)


def embed_by(tokens: nn.Module, places: Tensor | None = None) -> Embed:
    """What gives an embedding's rows, plus those of positions.

    Parameters
    ----------
    tokens : nn.Module
    places : Tensor[positions, hidden_size], optional
        A row for every position.
    """
    rows = rows_of(tokens)
    if rows is not None and places is None:
        return lambda ids, _: rows(ids)
    added = None if places is None else _dense_rows(places.detach())
    if rows is not None and added is not None and rows.dtype == added.dtype:
        return partial(_sum, rows, added)

    @torch.no_grad()
    def embed(ids: Tensor, positions: Tensor) -> Tensor:
        hidden = tokens(ids)
        if places is not None:
            hidden = hidden + nn.functional.embedding(positions.long(), places)
        return hidden.float().contiguous()

    return embed


def _sum(tokens: Rows, places: Rows, ids: Tensor, positions: Tensor) -> Tensor:
    """Rows of tokens and of positions, whose sums are rounded to the dtype that both have."""
    hidden = tokens(ids).add_(places(positions.long()))
    return hidden if tokens.dtype == torch.float32 else hidden.to(tokens.dtype).float()


def _dense_rows(weight: Tensor, factor: float = 1.0) -> Rows | None:
    if weight.device.type != "cpu" or weight.dtype not in native.KINDS or not weight.is_contiguous():
        return None
    return Rows(native.dense_embedding(weight, factor), weight.dtype, (weight,))


def scales_rows(hook: Any) -> TypeGuard[partial[Tensor]]:
    """Whether a hook is the one by which packed embeddings of Gemma are scaled."""
    return isinstance(hook, partial) and hook.func is scale_output


def _packed_rows(module: CompressedEmbedding) -> Rows | None:
    factor, dtype = 1.0, module.compute_dtype
    for hook in module._forward_hooks.values():
        if not scales_rows(hook) or len(module._forward_hooks) > 1:
            return None
        factor = float(torch.tensor(hook.args[0], dtype=dtype, device="cpu"))
    if module.scales is None or isinstance(module.coding, EntropyCoding | DoubleCoding | VectorCoding):
        return None
    stored = [module.codes, module.scales, *([] if module.zeros is None else [module.zeros])]
    if module.order is not None or dtype not in native.KINDS or module.codes.device.type != "cpu":
        return None
    if not native.serves(module.coding, module.embedding_dim) or not all(t.is_contiguous() for t in stored):
        return None
    told = unpacking(module.coding)
    if "levels" in told and module.coding.bits != native.CODEBOOK_BITS:
        return None
    if "levels" in told:
        told["levels"] = told["levels"].float()
    packed = native.described_as_stored(
        module.codes, module.scales, module.zeros, in_features=module.embedding_dim, **told
    )
    return Rows(native.packed_embedding(packed, dtype, factor), dtype, (*stored, told))
