"""Rebuilds an empty transformers model so that a compressed checkpoint fits into it.

A model that transformers has made from `config.json` alone, on the meta device, gets its linears and
embeddings replaced as the layout states: other codings, other shapes, other head counts per block,
sublayers that are absent. Nothing is read here; the loader fills the empty tensors later.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tailorbird.errors import CheckpointError, UnsupportedArchitecture
from tailorbird.formats.modules import CompressedEmbedding, CompressedLinear, share
from tailorbird.formats.packed import EntropyCoding, FloatCoding, PackedCoding
from tailorbird.model.decoding import stand_for
from tailorbird.model.layout import BlockLayout, ModelLayout, ModuleLayout

#: model types whose attention takes the numbers of its heads from the shapes of q, k and v alone, so
#: that they may differ from block to block
HEADS_FROM_SHAPES = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo"})
_ATTENTION = ("self_attn", "attn", "attention", "self_attention")


class AbsentAttention(nn.Module):
    """An attention sublayer that was removed: adds zero, and keeps the cache's length right.

    transformers asks the cache of single layers how many tokens have passed, so that a layer without
    keys would put all later tokens at position 0. Here one key and one value of width 1 stand for each
    token: 4 bytes per token in 16 bits.
    """

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Zeros like the hidden states `[batch, tokens, hidden]`, and no attention weights."""
        from transformers.cache_utils import Cache

        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        for value in (*args, *kwargs.values()):
            if isinstance(value, Cache):
                token = hidden.new_zeros((*hidden.shape[:-2], 1, hidden.shape[-2], 1))
                value.update(token, token, self.layer_idx)
                break
        return torch.zeros_like(hidden), None


class AbsentMlp(nn.Module):
    """A feed-forward sublayer that was removed: adds zero."""

    def forward(self, hidden_states: Tensor, *args: Any) -> Tensor:
        """Zeros like `hidden_states`."""
        return torch.zeros_like(hidden_states)


def rebuild(model: Any, layout: ModelLayout) -> None:
    """Replace modules of `model` as `layout` states, and untie a compressed pair.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Made from `config.json`, its tensors empty. A model without head (`AutoModel`) gets what it has.
    layout : ModelLayout

    Raises
    ------
    CheckpointError
        A module or block that the layout names isn't in the model, or isn't a linear or embedding.
    UnsupportedArchitecture
        The layout asks for something that the model's own code can't do.
    """
    blocks = _blocks(model) if layout.blocks else nn.ModuleList()
    for index, block in layout.blocks.items():
        if index >= len(blocks):
            raise CheckpointError(
                f"block {index} in the layout",
                f"an index below {len(blocks)}, the number of blocks",
                "compress the model again",
            )
        _change_block(model, blocks[index], index, block)
    for name, module in layout.modules.items():
        path = find_module(model, name)
        if path is not None:
            _replace(model, path, _build(model.get_submodule(path), module, name, model))
    if layout.shares_codes and layout.embedding is not None and layout.head is not None:
        _untie(model, layout.embedding, layout.head, layout.modules[layout.embedding])


def find_module(model: Any, name: str) -> str | None:
    """Path in `model` of the module that a checkpoint calls `name`.

    Checkpoints of a bare decoder lack the prefix that the model with head has, and the other way round.
    None where the model lacks the head that the checkpoint has.

    Raises
    ------
    CheckpointError
        When there is no such module.
    """
    prefix = model.base_model_prefix + "."
    for path in (name, prefix + name, name.removeprefix(prefix)):
        try:
            model.get_submodule(path)
        except AttributeError:
            continue
        return path
    if model.get_output_embeddings() is None and "." not in name:
        return None
    raise CheckpointError(
        f"module `{name}` in the layout",
        f"a module of {type(model).__name__}",
        "check `model_type` and `quantization_config` in config.json",
    )


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _build(old: nn.Module, layout: ModuleLayout, name: str, model: Any) -> nn.Module:
    """The module that takes the place of `old`."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(old, nn.Embedding):
        return _build_embedding(old, layout, name)
    if not isinstance(old, nn.Linear | Conv1D):
        raise UnsupportedArchitecture(
            f"module `{name}` of type {type(old).__name__}",
            "a linear or an embedding",
            "leave it out of the layout",
        )
    weight = old.weight
    shape = _stored_shape(layout, isinstance(old, Conv1D))
    unchanged = tuple(weight.shape) == shape and layout.bias == (old.bias is not None)
    if isinstance(layout.coding, PackedCoding):
        new = CompressedLinear(
            layout.in_features,
            layout.out_features,
            layout.coding,
            bias=layout.bias,
            has_order=layout.order,
            device=weight.device,
            bias_dtype=weight.dtype,
            rounds=layout.rounds,
            low_rank=layout.low_rank,
            sparse=layout.sparse,
            simulated=layout.simulated,
            transform=layout.transform,
            input_scale=layout.input_scale,
        )
        if isinstance(layout.coding, EntropyCoding):
            if not unchanged:
                raise _other_shape(f"`{name}`", layout, weight)
            stand_for(new, old)
        return _ready(new, weight.dtype)
    if unchanged:
        return old
    if isinstance(old, Conv1D):
        conv = Conv1D(layout.out_features, layout.in_features).to(device=weight.device, dtype=weight.dtype)
        if not layout.bias:
            raise UnsupportedArchitecture(
                f"float module `{name}` without bias", "a bias, which Conv1D always has", "compress it again"
            )
        return conv
    return nn.Linear(
        layout.in_features, layout.out_features, layout.bias, device=weight.device, dtype=weight.dtype
    )


def _stored_shape(layout: ModuleLayout, transposed: bool) -> tuple[int, int]:
    shape = (layout.out_features, layout.in_features)
    return shape[::-1] if transposed else shape


def _build_embedding(old: nn.Embedding, layout: ModuleLayout, name: str) -> nn.Module:
    if layout.parts:
        raise CheckpointError(
            f"`{layout.parts[0]}` of the embedding `{name}`",
            "it only of linears",
            "compress it again",
        )
    unchanged = tuple(old.weight.shape) == (layout.out_features, layout.in_features)
    if not unchanged and isinstance(layout.coding, FloatCoding | EntropyCoding):
        raise _other_shape(f"embedding `{name}`", layout, old.weight)
    if isinstance(layout.coding, FloatCoding):
        return old
    scale = getattr(old, "scalar_embed_scale", None)
    if type(old) is not nn.Embedding and scale is None:
        raise UnsupportedArchitecture(
            f"embedding `{name}` of type {type(old).__name__}",
            "a plain or scaled embedding",
            "keep it in 16 bits",
        )
    new = CompressedEmbedding(
        layout.out_features,
        layout.in_features,
        layout.coding,
        padding_idx=old.padding_idx,
        has_order=layout.order,
        device=old.weight.device,
    )
    if isinstance(layout.coding, EntropyCoding):
        stand_for(new, old)
    if scale is not None:
        new.register_forward_hook(partial(scale_output, scale))
    return _ready(new, old.weight.dtype)


def _other_shape(name: str, layout: ModuleLayout, weight: Tensor) -> CheckpointError:
    return CheckpointError(
        f"{name} [{layout.out_features}, {layout.in_features}] in the layout",
        f"{list(weight.shape)}, as in config.json",
        "correct the sizes in config.json, or compress the model again",
    )


def scale_output(scale: float, module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """Multiply by the model's embedding scale, itself rounded to the dtype of the values (as Gemma does)."""
    return output * torch.tensor(scale, dtype=output.dtype, device=output.device)


def _ready(module: CompressedLinear | CompressedEmbedding, dtype: torch.dtype) -> nn.Module:
    """Let the module compute in `dtype`, and keep transformers from filling it with random values."""
    module.compute_dtype = dtype
    module._is_hf_initialized = True
    return module


def _untie(model: Any, stored_embedding: str, stored_head: str, layout: ModuleLayout) -> None:
    """Give the pair one stored tensor set and take it out of transformers' map of tied weights."""
    embedding, head = find_module(model, stored_embedding), find_module(model, stored_head)
    if embedding is None or head is None:
        return
    table, old = model.get_submodule(embedding), model.get_submodule(head)
    if not isinstance(old, nn.Linear) or not isinstance(table, CompressedEmbedding):
        raise UnsupportedArchitecture(
            f"tied `{embedding}` ({type(table).__name__}) and `{head}` ({type(old).__name__})",
            "an embedding and a linear",
            "compress them without tying",
        )
    new = CompressedLinear(
        layout.in_features,
        layout.out_features,
        table.coding,
        bias=old.bias is not None,
        has_order=layout.order,
        device=old.weight.device,
        bias_dtype=old.weight.dtype,
        rounds=layout.rounds,
        simulated=layout.simulated,
        input_scale=layout.input_scale,
    )
    share(table, new)
    if isinstance(table.coding, EntropyCoding):
        stand_for(new, old)
    _replace(model, head, _ready(new, old.weight.dtype))
    pair = {f"{embedding}.weight", f"{head}.weight"}
    model.all_tied_weights_keys = {
        target: source
        for target, source in model.all_tied_weights_keys.items()
        if not {target, source} <= pair
    }
    for prefix, part in model.named_modules():
        keys = getattr(part, "_tied_weights_keys", None)
        if isinstance(keys, dict):
            names = {key: f"{prefix}.{key}".lstrip(".") for key in (*keys, *keys.values())}
            part._tied_weights_keys = {
                target: source
                for target, source in keys.items()
                if not {names[target], names[source]} <= pair
            }


def _blocks(model: Any) -> nn.ModuleList:
    """The list of the model's blocks."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    for module in model.modules():
        if (
            isinstance(module, nn.ModuleList)
            and len(module) == count
            and _attention_name(module[0]) is not None
        ):
            return module
    raise UnsupportedArchitecture(
        f"{type(model).__name__} has no list of {count} blocks with attention",
        "a decoder made of equal blocks",
        "compress it without changing single blocks",
    )


def _attention_name(block: nn.Module) -> str | None:
    return next((name for name in _ATTENTION if isinstance(getattr(block, name, None), nn.Module)), None)


def _change_block(model: Any, block: nn.Module, index: int, layout: BlockLayout) -> None:
    name = _attention_name(block) or ""  # _blocks returns only blocks that have it
    if not layout.mlp:
        if not isinstance(getattr(block, "mlp", None), nn.Module):
            raise UnsupportedArchitecture(
                f"block {index} without feed-forward sublayer",
                "blocks that hold it as a module `mlp`",
                "keep the sublayer",
            )
        block.mlp = AbsentMlp()
    if not layout.attention:
        setattr(block, name, AbsentAttention(index))
        return
    if layout.num_attention_heads is None and layout.num_key_value_heads is None:
        return
    config = model.config.get_text_config(decoder=True)
    if config.model_type not in HEADS_FROM_SHAPES:
        raise UnsupportedArchitecture(
            f"block {index} with its own number of heads in a model of type `{config.model_type}`",
            "one of " + ", ".join(sorted(HEADS_FROM_SHAPES)),
            "keep all heads",
        )
    heads = layout.num_attention_heads or config.num_attention_heads
    shared = layout.num_key_value_heads or config.num_key_value_heads
    if heads % shared:
        raise CheckpointError(
            f"block {index} with {heads} heads and {shared} key-value heads",
            "a whole number of heads per key-value head",
            "compress the model again",
        )
    getattr(block, name).num_key_value_groups = heads // shared
