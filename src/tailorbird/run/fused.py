"""A loaded model as compiled blocks: one step over packed tokens.

The blocks compute what transformers' modules compute, with float32 between the linears. For models that
they don't suit (`parts`), `obstacle` says what stands in the way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tailorbird.formats.modules import CompressedLinear
from tailorbird.kernels import blocks as native_blocks
from tailorbird.kernels import native
from tailorbird.kernels.blocks import (
    ACTIVATIONS,
    NORM_KINDS,
    BlockStructure,
    HeadsStructure,
    LinearStructure,
    NormStructure,
)
from tailorbird.run.pages import Pages
from tailorbird.run.parts import Layer, Unsuited, epsilon, norm_kind, parts_of

#: Tokens that go through the blocks in one call; a longer prompt is read in such pieces.
MOST_TOKENS = 512


def obstacle(model: Any) -> str | None:
    """What keeps a model of transformers from running fused here, or None."""
    try:
        parts_of(model)
    except Unsuited as reason:
        return str(reason)
    return None


class FusedModel:
    """The compiled blocks of a model, and the pages in which it keeps keys and values.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        On the CPU. Its tensors are shared and must stay as they are. Threads that run it at the same time
        take a `FusedModel` each.

    Raises
    ------
    Unsuited
        As `obstacle` says.
    """

    def __init__(self, model: Any) -> None:
        self.parts = parts_of(model)
        self.width = model.config.get_text_config().hidden_size
        self.cache_dtype = torch.float32 if model.dtype == torch.float32 else torch.bfloat16
        self._kept: list[Any] = []
        self._arena = native.Arena()
        self._angles: tuple[Tensor, Tensor] | None = None
        self._used: tuple[Pages, torch.Size] | None = None
        layers = self.parts.layers
        self.page_shapes = [(layer.kv_heads, layer.head_dim) for layer in layers]
        self.blocks = (BlockStructure * len(layers))(*(self._block(layer) for layer in layers))
        self.norm, self.head = self._norm(self.parts.norm), self._linear(self.parts.head)
        config = model.config.get_text_config()
        self.final_softcap: float | None = (
            config.final_logit_softcapping if config.model_type == "gemma2" else None
        )

    def pages(self, sequences: int) -> Pages:
        """Room for keys and values of so many sequences."""
        return Pages(self.page_shapes, self.cache_dtype, sequences)

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

    def _block(self, layer: Layer) -> BlockStructure:
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
        kind, offset = norm_kind(module)
        weight, bias = (getattr(module, name, None) for name in ("weight", "bias"))
        return NormStructure(
            None if weight is None else self._keep((weight.detach().float() + offset).contiguous()),
            None if bias is None else self._keep(bias.detach().float().contiguous()),
            epsilon(module),
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
