"""A loaded model read into compiled blocks: which models that works for, and one step over packed tokens.

The blocks compute what transformers' modules compute, with float32 between the linears. A model whose
parts aren't exactly the ones known here, because they were wrapped, hooked, replaced or are being trained,
is left to its modules: `obstacle` says what stands in the way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tailorbird.formats.modules import CompressedEmbedding, CompressedLinear
from tailorbird.kernels import blocks as native_blocks
from tailorbird.kernels import native
from tailorbird.kernels.blocks import (
    ACTIVATIONS,
    HEAD_MULTIPLE,
    NORM_KINDS,
    PAGE,
    BlockStructure,
    HeadsStructure,
    LinearStructure,
    NormStructure,
)

#: Tokens that go through the blocks in one call; a longer prompt is read in such pieces.
MOST_TOKENS = 512
#: What configs call an activation function -> what it is.
_FUNCTIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu",
}  # fmt: skip
#: Ways in which transformers computes the same attention.
_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
#: Rotary embeddings whose angles depend on the position only.
_STATIC_ROTARY = ("default", "linear", "llama3", "yarn", "proportional")


@dataclass(frozen=True)
class _Parts:
    """Where a model keeps what; modules of transformers."""

    layers: Any
    embed: Callable[[Tensor, Tensor], Tensor]
    norm: nn.Module
    head: nn.Module
    rotary: nn.Module | None
    read_layer: Callable[[Any, int], _Layer]


@dataclass(frozen=True)
class _Layer:
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
    #: first, stride of queries, keys and values; None: one kind after the other
    places: tuple[tuple[int, int], ...] | None = None
    parallel: bool = False
    window: int = 0
    softcap: float = 0.0


class Unsuited(Exception):
    """This model is left to its modules; the message says why."""


def obstacle(model: Any) -> str | None:
    """What keeps a model of transformers from running fused here, or None."""
    try:
        if not native.available():
            raise Unsuited("tailorbird was installed without a C++ compiler")
        _parts_of(model)
    except Unsuited as reason:
        return str(reason)
    return None


class FusedModel:
    """The compiled blocks of a model, and the pages in which it keeps keys and values.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        On the CPU. Its tensors are shared and must stay as they are.

    Raises
    ------
    Unsuited
        As `obstacle` says.
    """

    def __init__(self, model: Any) -> None:
        if not native.available():
            raise Unsuited("tailorbird was installed without a C++ compiler")
        self.model = model
        self.parts = _parts_of(model)
        self.width = model.config.get_text_config().hidden_size
        self.cache_dtype = torch.float32 if model.dtype == torch.float32 else torch.bfloat16
        self._kept: list[Any] = []
        self._arena = native.Arena()
        self._angles: tuple[Tensor, Tensor] | None = None
        self._used: tuple[Pages, torch.Size] | None = None
        layers = [self.parts.read_layer(layer, index) for index, layer in enumerate(self.parts.layers)]
        self.page_shapes = [(layer.kv_heads, layer.head_dim) for layer in layers]
        self.blocks = (BlockStructure * len(layers))(*(self._block(layer) for layer in layers))
        self.norm, self.head = self._norm(self.parts.norm), self._linear(self.parts.head)
        config = model.config.get_text_config()
        self.final_softcap: float | None = (
            config.final_logit_softcapping if config.model_type == "gemma2" else None
        )

    @torch.no_grad()
    def step(
        self,
        ids: Tensor,
        positions: Tensor,
        sequences: Tensor,
        cache: Pages,
        wanted: Tensor,
    ) -> Tensor:
        """Logits after some of the tokens that are read now.

        Parameters
        ----------
        ids, positions, sequences : Tensor[tokens], int64, int32, int32
            Tokens of a sequence are neighbours, in order.
        cache : Pages
            With room for all positions.
        wanted : Tensor[n], int64
            Tokens after which logits are wanted.

        Returns
        -------
        Tensor[n, vocab_size], float32
        """
        if self._used != (cache, cache.tables.shape):
            cache.use(self.blocks)
            self._used = cache, cache.tables.shape
        hidden = torch.empty(len(ids), self.width, dtype=torch.float32, device="cpu")
        for start in range(0, len(ids), MOST_TOKENS):
            here = slice(start, start + MOST_TOKENS)
            part = self.parts.embed(ids[here], positions[here]).float().contiguous()
            self._reach(int(positions[here].max()) + 1)
            native_blocks.run_blocks(
                self.blocks, part, positions[here].contiguous(), sequences[here].contiguous(), cache.tables,
                self.cache_dtype,
            )  # fmt: skip
            hidden[here] = part
        logits = native_blocks.run_head(self.norm, self.head, hidden[wanted])
        if self.final_softcap is not None:
            logits = torch.tanh(logits / self.final_softcap) * self.final_softcap
        return logits

    def _reach(self, positions: int) -> None:
        """Let every block know the rotary angles of so many positions."""
        rotary = self.parts.rotary
        if rotary is None or (self._angles is not None and len(self._angles[0]) >= positions):
            return
        count = max(positions, 256 if self._angles is None else 2 * len(self._angles[0]))
        cosine, sine = rotary(
            torch.empty(0, dtype=torch.float32, device="cpu"), torch.arange(count, device="cpu")[None]
        )
        self._angles = cosine[0].float().contiguous(), sine[0].float().contiguous()
        for block in self.blocks:
            block.cosine, block.sine = (angles.data_ptr() for angles in self._angles)
            block.rotary_dim = cosine.shape[-1]

    def _block(self, layer: _Layer) -> BlockStructure:
        q, k = layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
        places = layer.places or ((0, layer.head_dim), (q, layer.head_dim), (q + k, layer.head_dim))
        linears, mlp = layer.attention_in, layer.mlp_in
        block = BlockStructure(
            before_attention=self._norm(layer.before_attention), before_mlp=self._norm(layer.before_mlp),
            after_attention=self._norm(layer.after_attention), after_mlp=self._norm(layer.after_mlp),
            query=self._norm(layer.query), key=self._norm(layer.key),
            attention_out=self._linear(layer.attention_out), mlp_out=self._linear(layer.mlp_out),
            queries=HeadsStructure(*places[0]), keys=HeadsStructure(*places[1]),
            values=HeadsStructure(*places[2]), heads=layer.heads, kv_heads=layer.kv_heads,
            head_dim=layer.head_dim, attention_linears=len(linears), mlp_linears=len(mlp),
            gated=layer.gated, parallel=layer.parallel, parallel_norm=layer.before_mlp is not None,
            window=layer.window, activation=ACTIVATIONS[layer.activation], scale=layer.scale,
            softcap=layer.softcap,
        )  # fmt: skip
        for index, module in enumerate(linears):
            block.attention_in[index] = self._linear(module)
        for index, module in enumerate(mlp):
            block.mlp_in[index] = self._linear(module)
        return block

    def _keep(self, tensor: Tensor) -> int:
        """Address of a tensor that lives as long as this model."""
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _norm(self, module: nn.Module | None) -> NormStructure:
        if module is None:
            return NormStructure(None, None, 0.0, NORM_KINDS["none"])
        kind, offset = _norm_kind(module)
        weight, bias = (getattr(module, name, None) for name in ("weight", "bias"))
        return NormStructure(
            None if weight is None else self._keep((weight.detach().float() + offset).contiguous()),
            None if bias is None else self._keep(bias.detach().float().contiguous()),
            _epsilon(module),
            NORM_KINDS[kind],
        )

    def _linear(self, module: Any) -> LinearStructure:
        bias = None if module.bias is None else self._keep(module.bias.detach().float().contiguous())
        if isinstance(module, CompressedLinear):
            layout = module.native_layout(self._arena)
            self._kept.append(layout)
            return LinearStructure(layout.described, None, bias, 0, int(module.rounds))
        weight = module.weight.detach()
        if not isinstance(module, nn.Linear):  # Conv1D stores [in, out]
            weight = weight.t()
        if weight.dtype == torch.float16:
            weight = weight.float()
        weight = weight.contiguous()
        rows, columns = weight.shape
        described = native.WeightStructure(rows=rows, in_features=columns, columns=columns, groups=1)
        return LinearStructure(described, self._keep(weight), bias, int(weight.dtype == torch.float32), 0)


class Pages:
    """Keys and values of some sequences in pages that are added as they grow.

    Parameters
    ----------
    model : FusedModel
    sequences : int
    """

    def __init__(self, model: FusedModel, sequences: int) -> None:
        self.shapes, self.dtype = model.page_shapes, model.cache_dtype
        self.sequences = sequences
        self.tables = torch.empty(sequences, 0, dtype=torch.int32, device="cpu")
        self.keys: list[Tensor] = [self._pool(*shape, 0) for shape in self.shapes]
        self.values: list[Tensor] = [self._pool(*shape, 0) for shape in self.shapes]

    def _pool(self, kv_heads: int, head_dim: int, pages: int) -> Tensor:
        # zeros: what was never written is weighed with 0, which would make NaN of some values
        return torch.zeros(pages, kv_heads, head_dim * PAGE, dtype=self.dtype, device="cpu")

    def reach(self, positions: int) -> None:
        """Make room for so many positions of every sequence."""
        needed, have = -(-positions // PAGE), self.tables.shape[1]
        if needed <= have:
            return
        per_sequence = max(needed, have + max(4, have // 2))
        pages = torch.arange(
            self.sequences * have, self.sequences * per_sequence, dtype=torch.int32, device="cpu"
        )
        added = pages.view(self.sequences, per_sequence - have)
        self.tables = torch.cat([self.tables, added], dim=1).contiguous()
        for pools in (self.keys, self.values):
            for index, shape in enumerate(self.shapes):
                pool = self._pool(*shape, self.sequences * per_sequence)
                pool[: len(pools[index])] = pools[index]
                pools[index] = pool

    def use(self, blocks: Any) -> None:
        """Let `blocks` read and write these pages."""
        native_blocks.fill_pages(blocks, self.keys, self.values)


# --- what is known of transformers' models ----------------------------------------------------------------


def _parts_of(model: Any) -> _Parts:
    """Where `model` keeps what, once all of it is known to be what it seems."""
    kind = getattr(model.config.get_text_config(), "model_type", None)
    reader = _READERS.get(str(kind))
    if reader is None:
        raise Unsuited(f"no fused block for `{kind}`")
    if model.device.type != "cpu":
        raise Unsuited(f"the model is on `{model.device.type}`")
    _check_untouched(model)
    if not any(isinstance(module, CompressedLinear) for module in model.modules()):
        raise Unsuited("no linear is compressed")
    try:
        parts = reader(model)
        layers = [parts.read_layer(layer, index) for index, layer in enumerate(parts.layers)]
    except AttributeError as error:
        raise Unsuited(f"a part of this model isn't where it was expected: {error}") from None
    width = model.config.get_text_config().hidden_size
    for layer in layers:
        _check_layer(layer, width)
    _check_norm(parts.norm, width)
    _check_kind(parts.head)
    _check_linear(parts.head, (model.config.get_text_config().vocab_size, width))
    rotary = parts.rotary
    if rotary is not None and getattr(rotary, "rope_type", "default") not in _STATIC_ROTARY:
        raise Unsuited(f"rotary angles of type `{rotary.rope_type}`")
    return parts


def _check_untouched(model: Any) -> None:
    """Every module as transformers or tailorbird made it, none of them hooked."""
    everywhere = nn.modules.module
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
        raise Unsuited("there are hooks on all modules")
    attention = model.config.get_text_config()._attn_implementation
    if attention not in _ATTENTION:
        raise Unsuited(f"attention of kind `{attention}`")
    for name, module in model.named_modules():
        hooks = (
            module._forward_hooks, module._forward_pre_hooks, module._backward_hooks,
            module._backward_pre_hooks,
        )  # fmt: skip
        scaled = isinstance(module, CompressedEmbedding) and len(module._forward_hooks) == 1
        if any(hooks) and not scaled:
            raise Unsuited(f"`{name}` has hooks")
        if "forward" in vars(module):
            raise Unsuited(f"the forward of `{name}` was replaced")
        if module.training:
            raise Unsuited("the model is in training mode")
        origin = type(module).__module__
        if not origin.startswith(("transformers.", "torch.nn.", "tailorbird.")):
            raise Unsuited(f"`{name}` is a {type(module).__name__} of `{origin}`")


def _check_layer(layer: _Layer, width: int) -> None:
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
    inner = _shape(layer.mlp_out)[1]
    rows = 2 * inner if layer.gated and len(layer.mlp_in) == 1 else inner
    pairs += [(module, (rows, width)) for module in layer.mlp_in]
    pairs.append((layer.mlp_out, (width, inner)))
    for module, shape in pairs:
        _check_linear(module, shape)
    for norm in (layer.before_attention, layer.before_mlp, layer.after_attention, layer.after_mlp):
        _check_norm(norm, width)
    for norm in (layer.query, layer.key):
        _check_norm(norm, d)


def _check_kind(module: Any) -> None:
    """A linear that the compiled blocks know."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, CompressedLinear):
        if module.order is not None:
            raise Unsuited("a linear with reordered inputs")
        if not native.serves(module.coding, module.in_features):
            raise Unsuited(f"a linear of coding {module.coding.label}")
    elif type(module) not in (nn.Linear, Conv1D):
        raise Unsuited(f"a {type(module).__name__} in place of a linear")
    elif module.weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise Unsuited(f"a linear of {module.weight.dtype}")


def _check_linear(module: Any, shape: tuple[int, int]) -> None:
    """A linear of `shape` ``(out_features, in_features)``."""
    found = _shape(module)
    if found != shape or (module.bias is not None and module.bias.shape != shape[:1]):
        raise Unsuited(f"a linear {found} where {shape} fits")


def _shape(module: Any) -> tuple[int, int]:
    """``(out_features, in_features)`` of a linear of either kind."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    rows, columns = module.weight.shape  # Conv1D stores [in, out]
    return columns, rows


def _check_norm(module: Any, width: int) -> None:
    """A norm over `width` channels that the compiled blocks know, or none."""
    if module is None:
        return
    _norm_kind(module)
    for name in ("weight", "bias"):
        values = getattr(module, name, None)
        if values is not None and tuple(values.shape) != (width,):
            raise Unsuited(f"a norm over {tuple(values.shape)} where {width} channels are")


def _norm_kind(module: nn.Module) -> tuple[str, float]:
    """(Kind, what is added to the weight) of a norm."""
    name = type(module).__name__
    if type(module) is nn.LayerNorm or name == "OlmoLayerNorm":
        return "layer", 0.0
    if name.endswith("RMSNorm"):
        return "root_mean_square", 1.0 if name.startswith("Gemma") else 0.0
    raise Unsuited(f"a norm of type {name}")


def _epsilon(module: Any) -> float:
    for name in ("variance_epsilon", "eps", "epsilon"):
        if hasattr(module, name):
            return float(getattr(module, name))
    return 1e-5  # OLMo's, which states none


def _function(name: str) -> str:
    if name not in _FUNCTIONS:
        raise Unsuited(f"activation function `{name}`")
    return _FUNCTIONS[name]


def _llama_like(model: Any) -> _Parts:
    """Llama and what descends from it: RMSNorm or LayerNorm, rotary angles, a gated MLP."""
    body, config = model.model, model.config.get_text_config()
    # Configs keep keys that their model doesn't know, so each is read for the models that do.
    kind = config.model_type
    if (kind == "olmo" and config.clip_qkv is not None) or (kind == "stablelm" and config.qk_layernorm):
        raise Unsuited("clipped projections or norms of every head")

    def read_layer(layer: Any, index: int) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        apart = ("q_proj", "k_proj", "v_proj")
        projections = ("qkv_proj",) if hasattr(attention, "qkv_proj") else apart
        sandwich = hasattr(layer, "pre_feedforward_layernorm")
        before_mlp = layer.pre_feedforward_layernorm if sandwich else layer.post_attention_layernorm
        head_dim = attention.head_dim
        parallel = kind == "stablelm" and bool(config.use_parallel_residual)
        return _Layer(
            attention_in=[getattr(attention, name) for name in projections],
            attention_out=attention.o_proj,
            mlp_in=[mlp.gate_up_proj] if hasattr(mlp, "gate_up_proj") else [mlp.gate_proj, mlp.up_proj],
            mlp_out=mlp.down_proj,
            before_attention=layer.input_layernorm,
            before_mlp=None if parallel else before_mlp,
            after_attention=layer.post_attention_layernorm if sandwich else None,
            after_mlp=layer.post_feedforward_layernorm if sandwich else None,
            query=getattr(attention, "q_norm", None),
            key=getattr(attention, "k_norm", None),
            activation=_function(config.hidden_activation if kind == "gemma2" else config.hidden_act),
            gated=True,
            heads=_rows(attention, "q_proj", config.num_attention_heads, head_dim),
            kv_heads=_rows(attention, "k_proj", config.num_key_value_heads, head_dim),
            head_dim=head_dim,
            scale=float(attention.scaling),
            parallel=parallel,
            window=_window(config, index),
            softcap=float(config.attn_logit_softcapping or 0.0) if kind == "gemma2" else 0.0,
        )  # fmt: skip

    return _Parts(
        body.layers, lambda ids, positions: body.embed_tokens(ids), body.norm, model.lm_head, body.rotary_emb,
        read_layer,
    )  # fmt: skip


def _rows(attention: Any, name: str, stated: int, head_dim: int) -> int:
    """Heads of a projection: those that are left in a pruned one."""
    module = getattr(attention, name, None)
    return stated if module is None else module.out_features // head_dim


def _window(config: Any, index: int) -> int:
    """Keys that block `index` looks back on; 0 for all."""
    kind = config.model_type
    if kind not in ("mistral", "phi3", "qwen2", "qwen3", "gemma2") or config.sliding_window is None:
        return 0
    if kind in ("qwen2", "qwen3", "gemma2") and config.layer_types[index] != "sliding_attention":
        return 0
    return int(config.sliding_window)


def _gpt2(model: Any) -> _Parts:
    body, config = model.transformer, model.config
    if config.scale_attn_by_inverse_layer_idx or config.reorder_and_upcast_attn:
        raise Unsuited("attention scaled by the layer")

    def read_layer(layer: Any, index: int) -> _Layer:
        attention, mlp, width = layer.attn, layer.mlp, config.n_embd
        head_dim = width // config.n_head
        return _Layer(
            attention_in=[attention.c_attn], attention_out=attention.c_proj,
            mlp_in=[mlp.c_fc], mlp_out=mlp.c_proj, before_attention=layer.ln_1, before_mlp=layer.ln_2,
            activation=_function(config.activation_function), gated=False, heads=config.n_head,
            kv_heads=config.n_head, head_dim=head_dim,
            scale=head_dim**-0.5 if config.scale_attn_weights else 1.0,
        )  # fmt: skip

    def embed(ids: Tensor, positions: Tensor) -> Tensor:
        return body.wte(ids) + body.wpe(positions.long())

    return _Parts(body.h, embed, body.ln_f, model.lm_head, None, read_layer)


def _gpt_neox(model: Any) -> _Parts:
    body, config = model.gpt_neox, model.config

    def read_layer(layer: Any, index: int) -> _Layer:
        attention, mlp, heads = layer.attention, layer.mlp, config.num_attention_heads
        head_dim = config.hidden_size // heads
        return _Layer(
            attention_in=[attention.query_key_value], attention_out=attention.dense,
            mlp_in=[mlp.dense_h_to_4h], mlp_out=mlp.dense_4h_to_h, before_attention=layer.input_layernorm,
            before_mlp=layer.post_attention_layernorm, activation=_function(config.hidden_act), gated=False,
            heads=heads, kv_heads=heads, head_dim=head_dim, scale=float(attention.scaling),
            places=tuple((i * head_dim, 3 * head_dim) for i in range(3)),
            parallel=bool(config.use_parallel_residual),
        )  # fmt: skip

    return _Parts(
        body.layers, lambda ids, positions: body.embed_in(ids), body.final_layer_norm,
        model.get_output_embeddings(), body.rotary_emb, read_layer,
    )  # fmt: skip


def _opt(model: Any) -> _Parts:
    body, config = model.model.decoder, model.config
    if body.project_in is not None or not config.do_layer_norm_before or body.final_layer_norm is None:
        raise Unsuited("norms after the sublayers, or a projected embedding")

    def read_layer(layer: Any, index: int) -> _Layer:
        attention = layer.self_attn
        return _Layer(
            attention_in=[attention.q_proj, attention.k_proj, attention.v_proj],
            attention_out=attention.out_proj, mlp_in=[layer.fc1], mlp_out=layer.fc2,
            before_attention=layer.self_attn_layer_norm, before_mlp=layer.final_layer_norm,
            activation=_function(config.activation_function), gated=False, heads=attention.num_heads,
            kv_heads=attention.num_heads, head_dim=attention.head_dim, scale=float(attention.scaling),
        )  # fmt: skip

    def embed(ids: Tensor, positions: Tensor) -> Tensor:
        table = body.embed_positions
        return body.embed_tokens(ids) + nn.functional.embedding(positions.long() + table.offset, table.weight)

    return _Parts(body.layers, embed, body.final_layer_norm, model.lm_head, None, read_layer)


_READERS: dict[str, Callable[[Any], _Parts]] = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "stablelm", "olmo"), _llama_like
    ),
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "opt": _opt,
}
