"""What is known of transformers' models: where each keeps its parts, and whether they are as expected.

Compiled blocks replace modules, so nothing is taken on trust: a model whose parts aren't exactly the ones
known here, because they were wrapped, hooked, parametrized or replaced, or don't fit together, is refused,
and so is one in training mode. Whether parameters require a gradient isn't asked: those of a model that was
just loaded do. Compiled blocks compute none and refuse hidden states that need one (`fused.FusedModel`), and
a model that is called itself runs through its modules, whatever was decoded before.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tailorbird.formats.modules import CompressedLinear
from tailorbird.kernels import native
from tailorbird.kernels.blocks import HEAD_MULTIPLE
from tailorbird.run.embedding import Embed, embed_by, scales_rows

#: What configs call an activation function -> what it is.
_FUNCTIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu",
}  # fmt: skip
#: Ways in which transformers computes the same attention.
_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
#: Where classes of modules are from, beside the file that defines the model.
_ORIGINS = (
    "torch.nn.modules.", "transformers.activations", "transformers.pytorch_utils",
    "tailorbird.formats.modules",
)  # fmt: skip
#: Rotary embeddings whose angles depend on the position only.
_STATIC_ROTARY = ("default", "linear", "llama3", "yarn", "proportional")


class Unsuited(Exception):
    """This model is left to its modules; the message says why."""


@dataclass(frozen=True)
class Parts:
    """Where a model keeps what; modules of transformers."""

    layers: list[Layer]
    embed: Embed
    norm: nn.Module
    head: nn.Module
    #: gives cosines and sines ``[1, positions, rotary_dim]``; None without rotary angles
    rotary: nn.Module | None
    #: logits are cut softly here
    final_softcap: float | None = None
    #: ``[positions, hidden_size]``, which `embed` adds to the rows of tokens
    places: Tensor | None = None


@dataclass(frozen=True)
class Layer:
    """Modules and settings of one block."""

    attention_in: list[nn.Module]
    attention_out: nn.Module
    mlp_in: list[nn.Module]
    mlp_out: nn.Module
    before_attention: nn.Module | None
    before_mlp: nn.Module | None
    activation: str
    gated: bool
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    after_attention: nn.Module | None = None
    after_mlp: nn.Module | None = None
    query: nn.Module | None = None
    key: nn.Module | None = None
    #: of queries, keys and values: where the first is, how far apart those with different keys are, and those
    #: that share one; None: one kind after the other
    places: tuple[tuple[int, int, int], ...] | None = None
    #: `query` and `key` are over all heads together
    whole_norms: bool = False
    #: what the model's rotary embedding calls the angles of this block; None where it has one kind
    rotary: str | None = None
    parallel: bool = False
    window: int = 0
    softcap: float = 0.0

    @property
    def linears(self) -> dict[str, tuple[int, nn.Module]]:
        """Number among the compiled block's structures, and module, of every linear by its role."""
        attention = ("q", "k", "v") if len(self.attention_in) == 3 else ("qkv",)
        mlp = ("fc1",) if not self.gated else ("gate", "up") if len(self.mlp_in) == 2 else ("gate_up",)
        found = {role: (i, self.attention_in[i]) for i, role in enumerate(attention)}
        found |= {role: (4 + i, self.mlp_in[i]) for i, role in enumerate(mlp)}
        return found | {"o": (3, self.attention_out), "down" if self.gated else "fc2": (6, self.mlp_out)}


class PlacedLinear(NamedTuple):
    """A linear of a block.

    Attributes
    ----------
    block : int
    role : str
        As of the anatomy: ``q k v o gate up down fc1 fc2``, ``qkv`` and ``gate_up``.
    module : nn.Module
    alone : bool
        No other linear of the block reads its inputs, or each gets its own.
    """

    block: int
    role: str
    module: Any
    alone: bool


def placed_linears(model: Any, layers: list[Layer]) -> dict[str, PlacedLinear]:
    """All linears of the blocks of a model, by the paths of their modules."""
    paths = {module: path for path, module in model.named_modules()}
    found = {}
    for block, layer in enumerate(layers):
        several = [part for part in (layer.attention_in, layer.mlp_in) if len(part) > 1]
        for role, (_, module) in layer.linears.items():
            alone = not any(module is one for part in several for one in part)
            found[paths[module]] = PlacedLinear(block, role, module, alone)
    return found


def parts_of(model: Any) -> Parts:
    """Where a model of transformers keeps what, once all of it is known to be what it seems.

    Raises
    ------
    Unsuited
        Something of it isn't known here, was changed, or doesn't fit together.
    """
    if not native.available():
        raise Unsuited("tailorbird was installed without a C++ compiler")
    kind = getattr(model.config.get_text_config(), "model_type", None)
    reader = _READERS.get(str(kind))
    if reader is None:
        raise Unsuited(f"no fused block for `{kind}`")
    if model.device.type != "cpu":
        raise Unsuited(f"the model is on `{model.device.type}`")
    _check_untouched(model)
    try:
        parts = reader(model)
    except AttributeError as error:
        raise Unsuited(f"a part of this model isn't where it was expected: {error}") from None
    width = model.config.get_text_config().hidden_size
    for layer in parts.layers:
        _check_layer(layer, width)
    _check_norm(parts.norm, width)
    _check_kind(parts.head)
    if isinstance(parts.head, CompressedLinear) and parts.head.up is not None:
        raise Unsuited("a head with a low-rank part")
    _check_linear(parts.head, (model.config.get_text_config().vocab_size, width))
    check_rotary(parts.rotary)
    return parts


def check_rotary(module: nn.Module | None) -> None:
    """Raise `Unsuited` for a rotary embedding whose angles depend on more than the position."""
    types = getattr(module, "rope_type", "default")
    for rope_type in types.values() if isinstance(types, dict) else (types,):
        if rope_type not in _STATIC_ROTARY:
            raise Unsuited(f"rotary angles of type `{rope_type}`")


def _check_untouched(model: Any) -> None:
    """Every module as transformers or tailorbird made it, none of them hooked."""
    everywhere = nn.modules.module
    if (
        everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks
        or everywhere._global_backward_hooks or everywhere._global_backward_pre_hooks
    ):  # fmt: skip
        raise Unsuited("there are hooks on all modules")
    attention = model.config.get_text_config()._attn_implementation
    if attention not in _ATTENTION:
        raise Unsuited(f"attention of kind `{attention}`")
    own = type(model).__module__
    if not own.startswith("transformers."):
        raise Unsuited(f"a model of class {type(model).__name__} of `{own}`")
    for name, module in model.named_modules():
        hooks = itertools.chain(
            module._forward_hooks.values(), module._forward_pre_hooks.values(),
            module._backward_hooks.values(), module._backward_pre_hooks.values(),
        )  # fmt: skip
        if not all(scales_rows(hook) for hook in hooks):
            raise Unsuited(f"`{name}` has hooks")
        if "forward" in vars(module):
            raise Unsuited(f"the forward of `{name}` was replaced")
        if module.training:
            raise Unsuited("the model is in training mode")
        origin = type(module).__module__
        if origin != own and not origin.startswith(_ORIGINS):
            raise Unsuited(f"`{name}` is a {type(module).__name__} of `{origin}`")
        forward = str(getattr(type(module).forward, "__module__", None))
        if not forward.startswith(("transformers.", "torch.nn.modules.", "tailorbird.")):
            raise Unsuited(f"the forward of {type(module).__name__} is one of `{forward}`")


def _check_layer(layer: Layer, width: int) -> None:
    """Modules that the compiled blocks know, in shapes that fit together."""
    heads, keys, d = layer.heads, layer.kv_heads, layer.head_dim
    if d % HEAD_MULTIPLE:
        raise Unsuited(f"heads of {d} channels")
    if min(heads, keys) < 1 or heads % keys:
        raise Unsuited(f"{heads} heads over {keys}")
    projected = [heads * d, keys * d, keys * d]
    shapes = [(rows, width) for rows in projected]
    if len(layer.attention_in) == 1:
        shapes = [(sum(projected), width)]
    pairs = [*zip(layer.attention_in, shapes, strict=True), (layer.attention_out, (width, heads * d))]
    for module in (*layer.attention_in, layer.attention_out, *layer.mlp_in, layer.mlp_out):
        _check_kind(module)
    for together in (layer.attention_in, layer.mlp_in):
        _check_turned_alike(together)
    inner = linear_shape(layer.mlp_out)[1]
    rows = 2 * inner if layer.gated and len(layer.mlp_in) == 1 else inner
    pairs += [(module, (rows, width)) for module in layer.mlp_in]
    pairs.append((layer.mlp_out, (width, inner)))
    for module, shape in pairs:
        _check_linear(module, shape)
    for norm in (layer.before_attention, layer.before_mlp, layer.after_attention, layer.after_mlp):
        _check_norm(norm, width)
    for norm, count in ((layer.query, heads), (layer.key, keys)):
        _check_norm(norm, count * d if layer.whole_norms else d)


def _check_kind(module: Any) -> None:
    """A linear that the compiled blocks know."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, CompressedLinear):
        if module.order is not None:
            raise Unsuited("a linear with reordered inputs")
        if module.transform is not None and module.signs is None:
            raise Unsuited(f"a linear with {module.transform.word} inputs")
        if module.rounds and module.signs is not None and len(module.inputs_apart()):
            raise Unsuited("a linear with rotated inputs, some of which are kept apart")
        if module.simulated is not None:
            raise Unsuited(f"a linear whose inputs are rounded to {module.simulated}")
        if module.rest is not None or not native.serves(module.coding, module.in_features):
            raise Unsuited(f"a linear of coding {module.coding.label}")
    elif type(module) not in (nn.Linear, Conv1D) and type(module).__name__ != "FalconLinear":
        raise Unsuited(f"a {type(module).__name__} in place of a linear")
    elif module.weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise Unsuited(f"a linear of {module.weight.dtype}")


def _check_turned_alike(modules: Sequence[Any]) -> None:
    """Linears that read the same inputs rotate them by the same signs, as far as they do."""
    found = [module.signs for module in modules if isinstance(module, CompressedLinear)]
    signs = [one for one in found if one is not None]
    if any(not torch.equal(one, signs[0]) for one in signs[1:]):
        raise Unsuited("linears that rotate the same inputs by different signs")


def _check_linear(module: Any, shape: tuple[int, int]) -> None:
    """A linear of `shape` ``(out_features, in_features)``."""
    found = linear_shape(module)
    if found != shape or (module.bias is not None and module.bias.shape != shape[:1]):
        raise Unsuited(f"a linear {found} where {shape} fits")


def linear_shape(module: Any) -> tuple[int, int]:
    """``(out_features, in_features)`` of a linear of either kind."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    rows, columns = module.weight.shape  # Conv1D stores [in, out]
    return columns, rows


def weight_rows(module: Any, rows: slice) -> Tensor:
    """Some rows of a linear's weight, ``[rows, in_features]`` float32; of a packed one only they are made.

    They may share memory with the module.
    """
    if isinstance(module, CompressedLinear):
        return module.weight_rows(rows)
    weight = module.weight.detach()
    return (weight[rows] if isinstance(module, nn.Linear) else weight[:, rows].t()).float()


def _check_norm(module: Any, width: int) -> None:
    """A norm over `width` channels that the compiled blocks know, or none."""
    if module is None:
        return
    norm_kind(module)
    for name in ("weight", "bias"):
        values = getattr(module, name, None)
        if values is not None and tuple(values.shape) != (width,):
            raise Unsuited(f"a norm over {tuple(values.shape)} where {width} channels are")


def norm_kind(module: nn.Module) -> tuple[str, float]:
    """(Kind, what is added to the weight) of a norm."""
    name = type(module).__name__
    if type(module) is nn.LayerNorm or name == "OlmoLayerNorm":
        return "layer", 0.0
    if name.endswith("RMSNorm"):
        return "root_mean_square", 1.0 if name.startswith("Gemma") else 0.0
    raise Unsuited(f"a norm of type {name}")


def epsilon(module: Any) -> float:
    for name in ("variance_epsilon", "eps", "epsilon"):
        if hasattr(module, name):
            return float(getattr(module, name))
    return 1e-5  # OLMo's, which states none


def _function(name: str, module: nn.Module) -> str:
    """What the activation function is that configs call `name`, and that `module` computes."""
    from transformers.activations import ACT2FN

    if name not in _FUNCTIONS:
        raise Unsuited(f"activation function `{name}`")
    if type(module) is not type(ACT2FN[name]):
        raise Unsuited(f"a {type(module).__name__} in place of the activation function `{name}`")
    return _FUNCTIONS[name]


def _llama_like(model: Any) -> Parts:
    """Llama and what descends from it: RMSNorm or LayerNorm, rotary angles, a gated MLP."""
    body, config = model.model, model.config.get_text_config()
    # Configs keep keys that their model doesn't know, so each is read for the models that do.
    kind = config.model_type
    if (kind == "olmo" and config.clip_qkv is not None) or (kind == "stablelm" and config.qk_layernorm):
        raise Unsuited("clipped projections or norms of every head")
    gemma = kind in ("gemma2", "gemma3_text")
    if gemma and config.use_bidirectional_attention:
        raise Unsuited("attention to the tokens that follow")

    def read_layer(layer: Any, index: int) -> Layer:
        attention, mlp = layer.self_attn, layer.mlp
        apart = ("q_proj", "k_proj", "v_proj")
        projections = ("qkv_proj",) if hasattr(attention, "qkv_proj") else apart
        head_dim = attention.head_dim
        parallel = kind == "stablelm" and bool(config.use_parallel_residual)
        before, after = _norms(layer, kind, parallel)
        return Layer(
            attention_in=[getattr(attention, name) for name in projections],
            attention_out=attention.o_proj,
            mlp_in=[mlp.gate_up_proj] if hasattr(mlp, "gate_up_proj") else [mlp.gate_proj, mlp.up_proj],
            mlp_out=mlp.down_proj,
            before_attention=before[0],
            before_mlp=before[1],
            after_attention=after[0],
            after_mlp=after[1],
            query=getattr(attention, "q_norm", None),
            key=getattr(attention, "k_norm", None),
            whole_norms=kind == "olmo2",
            activation=_function(
                config.hidden_activation if gemma else config.hidden_act,
                mlp.activation_fn if kind == "phi3" else mlp.act_fn,
            ),
            gated=True,
            heads=_rows(attention, "q_proj", config.num_attention_heads, head_dim),
            kv_heads=_rows(attention, "k_proj", config.num_key_value_heads, head_dim),
            head_dim=head_dim,
            scale=float(attention.scaling),
            rotary=config.layer_types[index] if kind == "gemma3_text" else None,
            parallel=parallel,
            window=_window(config, index),
            softcap=float(config.attn_logit_softcapping or 0.0) if kind == "gemma2" else 0.0,
        )  # fmt: skip

    return Parts(
        [read_layer(layer, index) for index, layer in enumerate(body.layers)],
        embed_by(body.embed_tokens), body.norm, model.lm_head, body.rotary_emb,
        config.final_logit_softcapping if gemma else None,
    )  # fmt: skip


def _norms(layer: Any, kind: str, parallel: bool) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Norms before attention and MLP, and after them."""
    if kind == "olmo2":
        return (None, None), (layer.post_attention_layernorm, layer.post_feedforward_layernorm)
    if kind in ("gemma2", "gemma3_text"):
        return (
            (layer.input_layernorm, layer.pre_feedforward_layernorm),
            (layer.post_attention_layernorm, layer.post_feedforward_layernorm),
        )
    return (layer.input_layernorm, None if parallel else layer.post_attention_layernorm), (None, None)


def _rows(attention: Any, name: str, stated: int, head_dim: int) -> int:
    """Heads of a projection: those that are left in a pruned one."""
    module = getattr(attention, name, None)
    return stated if module is None else module.out_features // head_dim


def _window(config: Any, index: int) -> int:
    """Keys that block `index` looks back on; 0 for all."""
    kind = config.model_type
    by_layer = ("qwen2", "qwen3", "gemma2", "gemma3_text")
    if kind not in ("mistral", "phi3", *by_layer) or config.sliding_window is None:
        return 0
    if kind in by_layer and config.layer_types[index] != "sliding_attention":
        return 0
    return int(config.sliding_window)


def _gpt2(model: Any) -> Parts:
    body, config = model.transformer, model.config
    if config.scale_attn_by_inverse_layer_idx or config.reorder_and_upcast_attn:
        raise Unsuited("attention scaled by the layer")

    def read_layer(layer: Any) -> Layer:
        attention, mlp, width = layer.attn, layer.mlp, config.n_embd
        head_dim = width // config.n_head
        return Layer(
            attention_in=[attention.c_attn], attention_out=attention.c_proj,
            mlp_in=[mlp.c_fc], mlp_out=mlp.c_proj, before_attention=layer.ln_1, before_mlp=layer.ln_2,
            activation=_function(config.activation_function, mlp.act), gated=False, heads=config.n_head,
            kv_heads=config.n_head, head_dim=head_dim,
            scale=head_dim**-0.5 if config.scale_attn_weights else 1.0,
        )  # fmt: skip

    embed = embed_by(body.wte, body.wpe.weight)
    layers, places = [read_layer(layer) for layer in body.h], body.wpe.weight
    return Parts(layers, embed, body.ln_f, model.lm_head, None, places=places)


def _gpt_neox(model: Any) -> Parts:
    body, config = model.gpt_neox, model.config

    def read_layer(layer: Any) -> Layer:
        attention, mlp, heads = layer.attention, layer.mlp, config.num_attention_heads
        head_dim = config.hidden_size // heads
        return Layer(
            attention_in=[attention.query_key_value], attention_out=attention.dense,
            mlp_in=[mlp.dense_h_to_4h], mlp_out=mlp.dense_4h_to_h, before_attention=layer.input_layernorm,
            before_mlp=layer.post_attention_layernorm, activation=_function(config.hidden_act, mlp.act),
            gated=False, heads=heads, kv_heads=heads, head_dim=head_dim, scale=float(attention.scaling),
            places=tuple((i * head_dim, 3 * head_dim, 0) for i in range(3)),
            parallel=bool(config.use_parallel_residual),
        )  # fmt: skip

    return Parts(
        [read_layer(layer) for layer in body.layers], embed_by(body.embed_in),
        body.final_layer_norm, model.get_output_embeddings(), body.rotary_emb,
    )  # fmt: skip


def _falcon(model: Any) -> Parts:
    """Falcon: queries of each key head, then its key and value; or one key head for all; or one for each."""
    body, config = model.transformer, model.config
    if config.alibi:
        raise Unsuited("scores that fall with distance (ALiBi)")
    grouped = bool(config.new_decoder_architecture)
    if grouped and not config.parallel_attn:
        raise Unsuited("attention and MLP one after the other in Falcon's newer blocks")

    def read_layer(layer: Any) -> Layer:
        attention, mlp, heads = layer.self_attention, layer.mlp, config.num_attention_heads
        d, keys = config.head_dim, attention.num_kv_heads
        parallel = grouped or bool(config.parallel_attn)
        if grouped and config.num_ln_in_parallel_attn == 2:
            before_attention, before_mlp = layer.ln_attn, layer.ln_mlp
        else:
            before_attention = layer.input_layernorm
            before_mlp = None if parallel else layer.post_attention_layernorm
        places = None
        if grouped or not config.multi_query:
            group = heads // keys
            together = (group + 2) * d
            places = ((0, together, d), (group * d, together, 0), ((group + 1) * d, together, 0))
        return Layer(
            attention_in=[attention.query_key_value], attention_out=attention.dense,
            mlp_in=[mlp.dense_h_to_4h], mlp_out=mlp.dense_4h_to_h, before_attention=before_attention,
            before_mlp=before_mlp, activation=_function(config.activation, mlp.act), gated=False, heads=heads,
            kv_heads=keys, head_dim=d, scale=d**-0.5, places=places, parallel=parallel,
        )  # fmt: skip

    return Parts(
        [read_layer(layer) for layer in body.h], embed_by(body.word_embeddings), body.ln_f,
        model.lm_head, body.rotary_emb,
    )  # fmt: skip


def _opt(model: Any) -> Parts:
    body, config = model.model.decoder, model.config
    if body.project_in is not None or not config.do_layer_norm_before or body.final_layer_norm is None:
        raise Unsuited("norms after the sublayers, or a projected embedding")

    def read_layer(layer: Any) -> Layer:
        attention = layer.self_attn
        return Layer(
            attention_in=[attention.q_proj, attention.k_proj, attention.v_proj],
            attention_out=attention.out_proj, mlp_in=[layer.fc1], mlp_out=layer.fc2,
            before_attention=layer.self_attn_layer_norm, before_mlp=layer.final_layer_norm,
            activation=_function(config.activation_function, layer.activation_fn), gated=False,
            heads=attention.num_heads, kv_heads=attention.num_heads, head_dim=attention.head_dim,
            scale=float(attention.scaling),
        )  # fmt: skip

    table = body.embed_positions
    places = table.weight[table.offset :]
    layers = [read_layer(layer) for layer in body.layers]
    embed = embed_by(body.embed_tokens, places)
    return Parts(layers, embed, body.final_layer_norm, model.lm_head, None, places=places)


_READERS: dict[str, Callable[[Any], Parts]] = {
    **dict.fromkeys(
        (
            "llama",
            "mistral",
            "qwen2",
            "qwen3",
            "phi3",
            "gemma2",
            "gemma3_text",
            "stablelm",
            "olmo",
            "olmo2",
        ),
        _llama_like,
    ),
    "falcon": _falcon,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "opt": _opt,
}
#: Types of models that run in compiled blocks, as configs call them.
ARCHITECTURES = frozenset(_READERS)
