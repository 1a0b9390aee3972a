"""What a model consists of: its blocks, their linears, which norm feeds them, what may be rescaled.

Read from `config.json` and the names and shapes of the tensors alone. Any dense decoder of
transformers is understood whose blocks are made of linears with the names below; what isn't
understood is refused by name rather than left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tailorbird.errors import CheckpointError, UnsupportedArchitecture
from tailorbird.formats.packed import ENTROPY_PARTS, SCALE_PARTS
from tailorbird.formats.transform import TRANSFORM_PARTS
from tailorbird.model.checkpoint import Checkpoint
from tailorbird.model.layout import ModelLayout
from tailorbird.model.naming import check_tensors, translate
from tailorbird.model.outline import Outline, block_returns_tuple, build_outline, hollow, own_tensors, walk
from tailorbird.model.trace import BlockFlow, cached_width, trace_block

ATTENTION_ROLES = {
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "o",
    "out_proj": "o",
    "dense": "o",
    "c_proj": "o",
    "qkv_proj": "qkv",
    "query_key_value": "qkv",
    "c_attn": "qkv",
    "Wqkv": "qkv",
}
FEED_FORWARD_ROLES = {
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "gate_up_proj": "gate_up",
    "fc1": "fc1",
    "fc2": "fc2",
    "fc_in": "fc1",
    "fc_out": "fc2",
    "c_fc": "fc1",
    "c_proj": "fc2",
    "dense_h_to_4h": "fc1",
    "dense_4h_to_h": "fc2",
}
#: linears between a narrower embedding and the blocks
END_PROJECTIONS = ("project_in", "project_out")
#: tensors that depend on the shape of a batch only, so that they may be found once per shape
BATCH_ARGUMENTS = frozenset(
    {"attention_mask", "causal_mask", "position_ids", "position_embeddings", "cache_position", "alibi",
     "position_bias"}
)  # fmt: skip
WEIGHT_PARTS = (
    "weight", "codes", "scales", *SCALE_PARTS, "tables", "zeros", "order", *TRANSFORM_PARTS, *ENTROPY_PARTS,
)  # fmt: skip
CONTEXT_FIELDS = ("max_position_embeddings", "max_seq_len", "seq_length", "max_sequence_length")
#: 16-bit keys and values
BYTES_PER_CACHED_VALUE = 2


@dataclass(frozen=True)
class LinearPlace:
    """One linear of a block.

    Attributes
    ----------
    name : str
        Module path, such as ``model.layers.0.self_attn.q_proj``.
    role : str
        ``q k v o qkv`` in attention, ``gate up down gate_up fc1 fc2`` in the feed-forward sublayer.
    in_features, out_features : int
    bias : bool
    transposed : bool
        The stored weight is ``[in_features, out_features]`` (GPT-2).
    shares_input : str
        Linears of a block with equal value read the same tensor.
    """

    name: str
    role: str
    in_features: int
    out_features: int
    bias: bool
    transposed: bool
    shares_input: str

    @property
    def weight_name(self) -> str:
        """Name of the dense weight's tensor."""
        return f"{self.name}.weight"


@dataclass(frozen=True)
class NormGroup:
    """A norm whose output is read by linears of its block and by nothing else.

    Dividing its weight (one plus it where `offset`) and bias by s, channel by channel, and multiplying
    the linears' input columns by s leaves the block as it was.

    Attributes
    ----------
    norm : str
        Module path.
    linears : tuple of str
        All readers.
    offset : bool
        The norm multiplies by one plus its weight (Gemma).
    has_bias : bool
    """

    norm: str
    linears: tuple[str, ...]
    offset: bool
    has_bias: bool


@dataclass(frozen=True)
class ScalePair:
    """Two linears between which a scale per channel can move.

    Dividing the rows (and bias) of `source` by s and multiplying the input columns of `target` by s
    leaves the block as it was.

    Attributes
    ----------
    source, target : str
        Module paths.
    kind : str
        ``v->o`` or ``up->down``.
    """

    source: str
    target: str
    kind: str


@dataclass(frozen=True)
class BlockAnatomy:
    """One block.

    Attributes
    ----------
    index : int
    name : str
        Module path.
    linears : tuple of LinearPlace
        In the order in which data reaches them.
    norm_groups : tuple of NormGroup
    scale_pairs : tuple of ScalePair
    other : tuple of str
        Stored tensors that are no weight of a linear: norms, biases.
    cached_width : int
        Values that the KV cache keeps per token, keys and values together.
    window : int or None
        Tokens that attention looks back at; None for all.
    """

    index: int
    name: str
    linears: tuple[LinearPlace, ...]
    norm_groups: tuple[NormGroup, ...]
    scale_pairs: tuple[ScalePair, ...]
    other: tuple[str, ...]
    cached_width: int
    window: int | None


@dataclass(frozen=True)
class Anatomy:
    """A whole model.

    Attributes
    ----------
    architecture : str
        `model_type` of the config.
    blocks : tuple of BlockAnatomy
    embedding, head : str
        Module paths of the token embedding and of the output head.
    tied : bool
        Both use the embedding's values, which are stored once.
    vocab_size : int
        Rows of the embedding.
    embedding_width : int
        Columns of the embedding.
    hidden_size : int
        Width of the hidden states between blocks.
    context : int
        Tokens that the model was made for.
    other : tuple of str
        Stored tensors outside the blocks that are neither the embedding, nor an untied head with its
        bias: the final norm, position embeddings.
    ignored : tuple of str
        Tensors in the files that the model doesn't need.
    """

    architecture: str
    blocks: tuple[BlockAnatomy, ...]
    embedding: str
    head: str
    tied: bool
    vocab_size: int
    embedding_width: int
    hidden_size: int
    context: int
    other: tuple[str, ...]
    ignored: tuple[str, ...]

    def linears(self) -> Iterator[LinearPlace]:
        """All linears of all blocks, in forward order."""
        for block in self.blocks:
            yield from block.linears

    def end_shape(self, name: str) -> tuple[int, int]:
        """``(out_features, in_features)`` of the embedding or head: vocabulary by width.

        Raises
        ------
        KeyError
            `name` is neither.
        """
        if name not in (self.embedding, self.head):
            raise KeyError(name)
        return self.vocab_size, self.embedding_width

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that the KV cache takes per token in 16 bits, as long as no window is full."""
        return BYTES_PER_CACHED_VALUE * sum(block.cached_width for block in self.blocks)

    def kv_bytes(self, context: int, concurrency: int = 1) -> int:
        """Bytes of the KV cache in 16 bits for `concurrency` sequences of `context` tokens.

        A block with a sliding window keeps no more than the window.
        """
        values = sum(
            block.cached_width * (context if block.window is None else min(context, block.window))
            for block in self.blocks
        )
        return BYTES_PER_CACHED_VALUE * values * concurrency


def read_anatomy(checkpoint: Checkpoint) -> Anatomy:
    """Find out what a model consists of, without reading its weights.

    Where the files use older tensor names, `checkpoint.weights` is replaced by one that knows the
    tensors by the names of the modules.

    Parameters
    ----------
    checkpoint : Checkpoint
        Dense or compressed.

    Returns
    -------
    Anatomy

    Raises
    ------
    UnsupportedArchitecture
        Some module of the model isn't understood; names it.
    CheckpointError
        The config describes no model, or tensors are missing, extra or of another shape; names them.
    """
    config = checkpoint.config
    count = config.get_text_config(decoder=True).num_hidden_layers
    if count > len(checkpoint.weights.names):
        raise CheckpointError(
            f"config.json states {count} blocks, and there are {len(checkpoint.weights.names)} tensors",
            "a config that belongs to the weights",
            "take config.json from the original model",
        )
    dense = build_outline(config)
    _refuse_unknown(dense)
    layout = layout_of(checkpoint)
    stored = dense if layout is None else build_outline(config, layout)

    expected = stored.model.state_dict()
    prefix = stored.model.base_model_prefix
    checkpoint.weights = translate(checkpoint.weights, expected, prefix)
    tied = dict(stored.model.all_tied_weights_keys)
    ignored = check_tensors(checkpoint.weights, expected, tied)

    flows = _trace(dense)
    blocks = tuple(
        _read_block(dense, stored, index, flow, [n for n in expected if n not in tied])
        for index, flow in enumerate(flows)
    )
    inside = stored.blocks_name + "."
    ends = {f"{end}.{part}" for end in (stored.embedding, stored.head) for part in WEIGHT_PARTS}
    if not stored.tied:
        ends.add(f"{stored.head}.bias")
    other = [n for n in expected if not n.startswith(inside) and n not in ends and n not in tied]
    embedding = dense.model.get_input_embeddings()
    return Anatomy(
        architecture=config.model_type,
        blocks=blocks,
        embedding=stored.embedding,
        head=stored.head,
        tied=stored.tied,
        vocab_size=embedding.weight.shape[0],
        embedding_width=embedding.weight.shape[1],
        hidden_size=config.get_text_config(decoder=True).hidden_size,
        context=_context(config),
        other=tuple(sorted(other)),
        ignored=ignored,
    )


def layout_of(checkpoint: Checkpoint) -> ModelLayout | None:
    """The layout that a compressed checkpoint's config states; None of a dense one."""
    if not checkpoint.compressed:
        return None
    stated = checkpoint.config.quantization_config
    return ModelLayout.from_dict(stated if isinstance(stated, dict) else stated.to_dict())


def is_linear(module: nn.Module) -> bool:
    """Whether a module is one weight matrix with an optional bias: Linear, or Conv1D of transformers."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _role(path: str) -> str | None:
    """Role of the linear at `path` within its block; None where the name isn't known."""
    *parents, leaf = path.split(".")
    attention = any("attn" in p.lower() or "attention" in p.lower() for p in parents)
    return (ATTENTION_ROLES if attention else FEED_FORWARD_ROLES).get(leaf)


def _refuse_unknown(outline: Outline) -> None:
    """Raise where a module holds parameters that this file has no word for."""
    unknown: dict[str, None] = {}
    for index, block in enumerate(outline.blocks):
        for path, module in block.named_modules():
            if is_linear(module):
                understood = _role(path) is not None
            else:
                understood = _is_norm(module) or all(
                    t.ndim < 2 for _, t in module.named_parameters(recurse=False)
                )
            if not understood:
                where = path or "the block itself"
                unknown[f"{outline.blocks_name}.*.{where} ({type(module).__name__})"] = None
        for path, module in block.named_modules():
            _refuse_loose_tensors(f"{outline.block_name(index)}.{path}", module)
    for name, module in outline.outside():
        leaf = name.rpartition(".")[2]
        if name in (outline.embedding, outline.head):
            continue
        if isinstance(module, nn.Embedding):
            understood = leaf == "wpe" or "pos" in leaf
        elif is_linear(module):
            understood = leaf in END_PROJECTIONS
        else:
            understood = all(t.ndim < 2 for _, t in module.named_parameters(recurse=False))
        if not understood:
            unknown[f"{name} ({type(module).__name__})"] = None
        _refuse_loose_tensors(name, module)
    if unknown:
        names = list(unknown)
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        raise UnsupportedArchitecture(
            f"{type(outline.model).__name__} has modules that are not understood: "
            + ", ".join(names[:8])
            + more,
            "a dense decoder whose blocks hold linears with known roles, and norms",
            "give a model without experts, recurrences or other modalities",
        )


def _refuse_loose_tensors(name: str, module: nn.Module) -> None:
    for attribute, value in vars(module).items():
        if isinstance(value, Tensor):
            raise UnsupportedArchitecture(
                f"`{name}` keeps a tensor `{attribute}` that is neither parameter nor buffer",
                "tensors that are registered with their module",
                "give another model",
            )


def _trace(outline: Outline) -> list[BlockFlow]:
    """One flow per block; blocks that are built alike share one."""
    hollow(outline)
    try:
        ids = torch.zeros(1, 4, dtype=torch.long)
        with torch.no_grad():
            returns_tuple = block_returns_tuple(outline)
            hidden, arguments = walk(outline, ids, returns_tuple)
            with_cache = walk(outline, ids, returns_tuple, use_cache=True)[1]
        flows: dict[Any, BlockFlow] = {}
        result = []
        for block, given, cached in zip(outline.blocks, arguments, with_cache, strict=True):
            key = _signature(block)
            if key not in flows:
                linears, norms = _traced_modules(block)
                flows[key] = trace_block(block, hidden, given, linears, norms)
                flows[key].cached_width = cached_width(block, hidden, cached)
            result.append(flows[key])
    except UnsupportedArchitecture:
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:300]
        raise UnsupportedArchitecture(
            f"{type(outline.model).__name__} does not run without weights ({type(error).__name__}: {said})",
            "a decoder whose config is consistent, and whose blocks run one after the other",
            "check config.json, or give another model",
        ) from error
    _refuse_flows(outline, result)
    return result


def _refuse_flows(outline: Outline, flows: list[BlockFlow]) -> None:
    for index, (block, flow) in enumerate(zip(outline.blocks, flows, strict=True)):
        linears, _ = _traced_modules(block)
        unused = [name for name in linears if flow.order.count(name) != 1]
        strange = [name for name in flow.arguments if name not in BATCH_ARGUMENTS]
        if unused or strange:
            what = [f"linear `{name}` runs {flow.order.count(name)} times" for name in unused]
            what += [f"the argument `{name}` is not understood" for name in strange]
            raise UnsupportedArchitecture(
                f"block `{outline.block_name(index)}`: " + ", ".join(what),
                "each linear once, and arguments that depend on the shape of the batch only",
                "give another model",
            )


def _traced_modules(block: nn.Module) -> tuple[list[str], list[str]]:
    linears = [name for name, module in block.named_modules() if is_linear(module)]
    norms = [name for name, module in block.named_modules() if _is_norm(module)]
    return linears, norms


def _signature(block: nn.Module) -> Any:
    return tuple((name, tuple(tensor.shape)) for name, tensor in block.named_parameters())


def _read_block(
    dense: Outline, stored: Outline, index: int, flow: BlockFlow, expected: list[str]
) -> BlockAnatomy:
    block, name = stored.blocks[index], stored.block_name(index)
    places: dict[str, LinearPlace] = {}
    for path in flow.order:
        try:
            module = block.get_submodule(path)
        except AttributeError:
            continue  # the sublayer was removed
        if is_linear(module):
            places[path] = _place(f"{name}.{path}", path, module, f"{name}.{flow.reads[path]}")
    weights = {f"{p.name}.{part}" for p in places.values() for part in WEIGHT_PARTS}
    other = [n for n in expected if n.startswith(name + ".") and n not in weights]
    groups = []
    for path, readers in flow.consumers.items():
        norm = block.get_submodule(path)
        if not all(reader in places for reader in readers):
            continue
        has_bias = any(own == "bias" for own, _ in own_tensors(norm))
        linears = tuple(places[reader].name for reader in readers)
        groups.append(NormGroup(f"{name}.{path}", linears, flow.offsets[path], has_bias))
    return BlockAnatomy(
        index=index,
        name=name,
        linears=tuple(places.values()),
        norm_groups=tuple(groups),
        scale_pairs=tuple(_scale_pairs(places, flow)),
        other=tuple(sorted(other)),
        cached_width=_projected_width(block)
        * flow.cached_width
        // max(_projected_width(dense.blocks[index]), 1),
        window=_window(stored.model.config.get_text_config(decoder=True), index),
    )


def _place(name: str, path: str, module: Any, shares_input: str) -> LinearPlace:
    out_features, in_features = _shape(module)
    role = _role(path)
    assert role is not None  # others were refused
    transposed = not isinstance(module, nn.Linear)
    return LinearPlace(
        name, role, in_features, out_features, module.bias is not None, transposed, shares_input
    )


def _shape(linear: Any) -> tuple[int, int]:
    """``(out_features, in_features)``."""
    if isinstance(linear, nn.Linear):
        return linear.out_features, linear.in_features
    return linear.weight.shape[1], linear.weight.shape[0]


def _scale_pairs(places: dict[str, LinearPlace], flow: BlockFlow) -> Iterator[ScalePair]:
    by_role = {place.role: path for path, place in places.items()}
    v, o, up, down = (by_role.get(role) for role in ("v", "o", "up", "down"))
    # With fewer value heads than heads a channel of v reaches several channels of o.
    if v and o and places[v].out_features == places[o].in_features and flow.passes_values(v, o):
        yield ScalePair(places[v].name, places[o].name, "v->o")
    if up and down and flow.passes_factor(up, down):
        yield ScalePair(places[up].name, places[down].name, "up->down")


def _projected_width(block: nn.Module) -> int:
    """Keys and values that a block's projections make per token."""
    modules = {_role(path): module for path, module in block.named_modules() if is_linear(module)}
    if "qkv" in modules:
        return _shape(modules["qkv"])[0] - _shape(modules["o"])[1]  # less the queries
    return sum(_shape(modules[role])[0] for role in ("k", "v") if role in modules)


def _window(config: Any, index: int) -> int | None:
    """Tokens that block `index` looks back at."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return getattr(config, "sliding_window", None) or None
    kind = kinds[index] if index < len(kinds) else None
    if kind == "full_attention":
        return None
    field = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}.get(
        str(kind)
    )
    window = getattr(config, field, None) if field else None
    if not isinstance(window, int):
        raise UnsupportedArchitecture(
            f"block {index} has attention of the kind `{kind}`",
            "full_attention, or sliding_attention with a sliding_window",
            "give another model",
        )
    return window


def _context(config: Any) -> int:
    text = config.get_text_config(decoder=True)
    for field in CONTEXT_FIELDS:
        value = getattr(text, field, None)
        if isinstance(value, int) and value > 0:
            return value
    raise UnsupportedArchitecture(
        "config.json doesn't say how many tokens the model was made for",
        "one of " + ", ".join(CONTEXT_FIELDS),
        "add max_position_embeddings to config.json",
    )
