"""A loaded model as compiled blocks: one step over packed tokens.

The blocks compute what transformers' modules compute, with float32 between the linears. For models that
they don't suit (`parts`), `obstacle` says what stands in the way.
"""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tailorbird.formats.modules import CompressedLinear
from tailorbird.kernels import blocks as native_blocks
from tailorbird.kernels import native
from tailorbird.kernels.adapters import Adapter, LinearAdapter, Segment, check_segments, within
from tailorbird.kernels.additions import LowRankFactors
from tailorbird.kernels.blocks import (
    ACTIVATIONS,
    NORM_KINDS,
    BlockStructure,
    HeadsStructure,
    LinearStructure,
    NormStructure,
    TurnStructure,
)
from tailorbird.kernels.paged_attention import NATIVE
from tailorbird.run.pages import CPU, Cache, Pages
from tailorbird.run.parts import Layer, Unsuited, epsilon, norm_kind, parts_of, placed_linears

#: Tokens that go through the blocks in one call; a longer prompt is read in such pieces.
MOST_TOKENS = 512


def obstacle(model: Any) -> str | None:
    """What keeps a model of transformers from being decoded fused here, or None.

    A dense model isn't, though it could be: its own modules give the bits that transformers gives.
    """
    try:
        parts_of(model)
    except Unsuited as reason:
        return str(reason)
    if not any(isinstance(module, CompressedLinear) for module in model.modules()):
        return "no linear is compressed"
    return None


@dataclass(frozen=True)
class Trees:
    """Tokens that branch: several guesses of what follows the same token, read at once.

    Attributes
    ----------
    slots : Tensor[tokens], int32
        Where in its sequence's pages a token's key lies; its position, unless a sibling is there.
    ancestors, starts : Tensor[tokens], int64 and int32
        As `blocks.run_blocks` takes them; of no account for tokens whose slot is their position.
    """

    slots: Tensor
    ancestors: Tensor
    starts: Tensor


class FusedModel:
    """The compiled blocks of a model, and the pages in which it keeps keys and values.

    It computes no gradients, whatever parameters require: nothing that it returns requires one, so that a
    loss made of that can't be differentiated, and where gradients are enabled, embeddings and hidden states
    that require one are refused. Training goes through the model itself, which is left as it is.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        On the CPU. Its tensors are shared and must stay as they are. Threads that run it at the same time
        take a `FusedModel` each.

    Raises
    ------
    Unsuited
        As `obstacle` says, but that a dense model suits.
    """

    #: embeddings can be given in place of tokens
    takes_embeddings = True

    def __init__(self, model: Any) -> None:
        self.parts = parts_of(model)
        self.device = CPU
        #: all linears of the blocks by the paths of their modules
        self.linears = placed_linears(model, self.parts.layers)
        self.width = model.config.get_text_config().hidden_size
        self._dtype = model.dtype
        self.cache_dtype = torch.float32 if model.dtype == torch.float32 else torch.bfloat16
        self._kept: list[Any] = []
        self._aparts: dict[tuple[int, ...], Tensor] = {}
        self._arena = native.Arena()
        self._angles: dict[str | None, tuple[Tensor, Tensor]] = {}
        self._reached = 0  # positions whose angles the blocks know
        self._used: tuple[Cache, torch.Size] | None = None
        self._described: native_blocks.Batch | None = None  # tokens of the last step
        #: Where the seconds of each of `blocks.STEPS`, and of the head, are added; none are taken unless set.
        self.seconds: Tensor | None = None
        layers = self.parts.layers
        self.page_shapes = [(layer.kv_heads, layer.head_dim) for layer in layers]
        #: of every block, how keys and values lie in pages (`paged_attention`)
        self.page_paths = [NATIVE] * len(layers)
        self.blocks = (BlockStructure * len(layers))(*(self._block(layer) for layer in layers))
        self.norm, self.head = self._norm(self.parts.norm), self._linear(self.parts.head)
        self.final_softcap = self.parts.final_softcap

    def progress(self) -> float:
        """The seconds that blocks have taken, if they are taken: a number that changes with each of them."""
        return 0.0 if self.seconds is None else float(self.seconds.sum())

    def pages(self, sequences: int, positions: int = 0) -> Pages:
        """Room for keys and values of so many sequences, with `positions` foreseen of each."""
        return Pages(self.page_shapes, self.cache_dtype, sequences, positions=positions)

    def adapter(self, linears: Mapping[tuple[int, str], LinearAdapter]) -> Adapter:
        """An adapter for segments of a batch.

        Parameters
        ----------
        linears : mapping of (block, role) to LinearAdapter
            Roles are those of the anatomy: ``q k v o gate up down fc1 fc2``, and ``qkv`` and ``gate_up``
            where the model has one matrix for them.

        Raises
        ------
        ValueError
            For a block or role that this model hasn't, or tensors that don't fit.
        """
        numbered: dict[tuple[int, int], LinearAdapter] = {}
        for (block, role), linear in linears.items():
            if not 0 <= block < len(self.blocks):
                raise ValueError(f"an adapter for block {block}; expected 0 to {len(self.blocks) - 1}")
            places = self.parts.layers[block].linears
            if role not in places:
                raise ValueError(f"an adapter for `{role}` in block {block}; expected one of {list(places)}")
            numbered[block, places[role][0]] = linear
        return Adapter(self.blocks, numbered)

    def step(
        self,
        ids: Tensor,
        positions: Tensor,
        sequences: Tensor,
        cache: Cache,
        wanted: Tensor | None = None,
        adapters: Iterable[Segment] = (),
        reach: int | None = None,
        trees: Trees | None = None,
    ) -> Tensor:
        """Logits after some of the tokens that are read now.

        Parameters
        ----------
        ids, positions, sequences : Tensor[tokens], int64, int32, int32
            Tokens of a sequence are neighbours, in order.
        cache : Cache
            With room for all positions.
        wanted : Tensor[n], int64, optional
            Tokens after which logits are wanted; all unless given.
        adapters : iterable of Segment
            Which tokens have an adapter, made by `adapter`; others have none.
        reach : int, optional
            What all positions lie below; found from these unless given.
        trees : Trees, optional
            Where tokens of a sequence branch.

        Returns
        -------
        Tensor[n, vocab_size], float32

        Raises
        ------
        IndexError
            For a token id that the model hasn't.
        ValueError
            For segments that overlap, leave the batch, or have an adapter of another model.
        """
        return self.logits(
            self.read(ids, positions, sequences, cache, wanted, adapters, reach, trees=trees)
        )  # fmt: skip

    def read(
        self,
        ids: Tensor,
        positions: Tensor,
        sequences: Tensor,
        cache: Cache,
        wanted: Tensor | None = None,
        adapters: Iterable[Segment] = (),
        reach: int | None = None,
        spans: Sequence[range] | None = None,
        trees: Trees | None = None,
    ) -> Tensor:
        """What leaves the last block, ``[n, hidden_size]`` float32, from which `logits` makes logits.

        Parameters
        ----------
        spans : sequence of range, optional
            Blocks that run, in order; all unless given.
        ids, positions, sequences, cache, wanted, adapters, reach, trees
            As in `step`, which raises the same.
        """
        hidden = self.embed(ids, positions)
        for span in [range(len(self.blocks))] if spans is None else spans:
            self._advance(
                hidden, positions, sequences, cache, span.start, span.stop, adapters, reach, trees
            )  # fmt: skip
        return hidden if wanted is None else hidden[wanted]

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """What enters the first block, float32 ``[tokens, hidden_size]``; arguments as in `step`."""
        return self.parts.embed(ids, positions)

    def read_embedded(self, embeddings: Tensor, positions: Tensor, sequences: Tensor, cache: Cache) -> None:
        """Read tokens of which the embeddings ``[tokens, width]`` are given; other arguments as in `step`.

        Raises ValueError for embeddings that need a gradient.
        """
        native_blocks.check_no_gradient(embeddings)
        hidden = embeddings.detach().to(self._dtype)
        if self.parts.places is not None:
            hidden = hidden + nn.functional.embedding(positions.long(), self.parts.places.detach())
        self.run(hidden.float(), positions, sequences, cache)

    def last_hidden(
        self,
        ids: Tensor,
        positions: Tensor,
        sequences: Tensor,
        cache: Cache,
        adapters: Iterable[Segment] = (),
    ) -> Tensor:
        """What leaves the model's last norm, float32 ``[tokens, hidden_size]``; arguments as in `step`."""
        left = self.run(self.embed(ids, positions), positions, sequences, cache, adapters=adapters)
        return self.normed(left)

    def run(
        self,
        hidden: Tensor,
        positions: Tensor,
        sequences: Tensor,
        cache: Cache,
        first: int = 0,
        last: int | None = None,
        adapters: Iterable[Segment] = (),
    ) -> Tensor:
        """Hidden states after any block, from those before any block.

        A step that stops early or starts late is done in parts: keys and values of the blocks that ran are
        in the pages, and what comes back may go on at block `last`.

        Parameters
        ----------
        hidden : Tensor[tokens, hidden_size], float32
            What enters block `first`.
        first, last : int
            Blocks ``first`` to ``last - 1`` run, all by default.
        positions, sequences, cache, adapters
            As in `step`.

        Returns
        -------
        Tensor[tokens, hidden_size], float32
            What leaves block ``last - 1``, before the model's last norm.

        Raises
        ------
        ValueError
            For blocks that aren't there, hidden states of another shape or that need a gradient, or
            as `step`.
        """
        last = len(self.blocks) if last is None else last
        if not 0 <= first <= last <= len(self.blocks):
            raise ValueError(f"blocks {first} to {last}; expected a range within 0 to {len(self.blocks)}")
        native_blocks.check_no_gradient(hidden)
        found = hidden.detach().clone(memory_format=torch.contiguous_format)
        self._advance(found, positions, sequences, cache, first, last, adapters)
        return found

    def _advance(
        self,
        hidden: Tensor,
        positions: Tensor,
        sequences: Tensor,
        cache: Cache,
        first: int,
        last: int,
        adapters: Iterable[Segment] = (),
        reach: int | None = None,
        trees: Trees | None = None,
    ) -> None:
        """Take hidden states through blocks ``first`` to ``last - 1``, in place; arguments as in `step`."""
        tokens = len(positions)
        if hidden.shape != (tokens, self.width):
            expected = [tokens, self.width]
            raise ValueError(f"hidden states {list(hidden.shape)}; expected {expected}, one for a position")
        if self._used != (cache, cache.tables.shape):
            cache.use(self.blocks)
            self._used = cache, cache.tables.shape
        if reach is None:
            reach = int(positions.max()) + 1 if tokens else 0
        if self.parts.rotary is not None and reach > self._reached:
            self._reach(self.parts.rotary, reach)
        segments = check_segments(adapters, tokens, self.blocks) if adapters else []
        if tokens <= MOST_TOKENS and not segments and trees is None:
            batch = self._batch(positions.contiguous(), sequences.contiguous(), cache.tables)
            batch.run(self.blocks, hidden, first, last)
            return
        for start in range(0, tokens, MOST_TOKENS):
            here = slice(start, start + MOST_TOKENS)
            slots, ancestors, starts = (
                (None, None, None)
                if trees is None
                else (part[here].contiguous() for part in (trees.slots, trees.ancestors, trees.starts))
            )
            native_blocks.run_blocks(
                self.blocks, hidden[here], positions[here].contiguous(), sequences[here].contiguous(),
                cache.tables, self.cache_dtype, first, last, slots, ancestors, starts,
                within(segments, start, here.stop), seconds=self.seconds,
            )  # fmt: skip

    def _batch(self, positions: Tensor, sequences: Tensor, tables: Tensor) -> native_blocks.Batch:
        """Tokens without adapters; described anew only where the last step's tensors were others."""
        found = self._described
        if (
            found is None
            or found.positions is not positions
            or found.sequences is not sequences
            or found.pages is not tables
            or found.seconds is not self.seconds
        ):
            found = native_blocks.Batch(positions, sequences, tables, self.cache_dtype, seconds=self.seconds)
            self._described = found
        return found

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits ``[tokens, vocab_size]`` float32 of hidden states that left the last block."""
        return self._through_head(self.norm, hidden)

    def logits_of_normed(self, hidden: Tensor) -> Tensor:
        """Logits of what left the last norm, as `normed` gives it."""
        return self._through_head(NormStructure(None, None, 0.0, NORM_KINDS["none"]), hidden)

    def normed(self, hidden: Tensor) -> Tensor:
        """What leaves the last norm, float32, of hidden states that left the last block."""
        native_blocks.check_no_gradient(hidden)
        with torch.no_grad():
            return self.parts.norm(hidden).float()

    def _through_head(self, norm: NormStructure, hidden: Tensor) -> Tensor:
        began = time.perf_counter()
        logits = native_blocks.run_head(norm, self.head, hidden)
        if self.seconds is not None:
            self.seconds.numpy()[-1] += time.perf_counter() - began  # PyTorch's own addition takes 70 µs
        if self.final_softcap is not None:
            logits = torch.tanh(logits / self.final_softcap) * self.final_softcap
        return logits

    @torch.no_grad()
    def _reach(self, rotary: nn.Module, positions: int) -> None:
        """Let every block know the rotary angles of so many positions."""
        reached, layers = max(positions, 2 * self._reached, 256), self.parts.layers
        count = torch.arange(reached, device="cpu")[None]
        for kind in {layer.rotary for layer in layers}:
            like = torch.empty(0, dtype=torch.float32, device="cpu")
            cosine, sine = rotary(like, count) if kind is None else rotary(like, count, kind)
            self._angles[kind] = cosine[0].float().contiguous(), sine[0].float().contiguous()
        for block, layer in zip(self.blocks, layers, strict=True):
            cosine, sine = self._angles[layer.rotary]
            block.cosine, block.sine, block.rotary_dim = cosine.data_ptr(), sine.data_ptr(), cosine.shape[-1]
        self._reached = reached

    def _block(self, layer: Layer) -> BlockStructure:
        q, k = layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
        d, group = layer.head_dim, layer.heads // layer.kv_heads
        places = layer.places or ((0, group * d, d), (q, d, 0), (q + k, d, 0))
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
            whole_norms=layer.whole_norms, window=layer.window, activation=ACTIVATIONS[layer.activation],
            scale=layer.scale, softcap=layer.softcap,
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

    def _low_rank(self, module: CompressedLinear) -> int | None:
        """Address of the part beside a linear's codes, if it has one."""
        if module.up is None or module.down is None:
            return None
        factors = LowRankFactors(module.up, module.down)
        described = LinearAdapter(factors.down, factors.up).described(self._kept)
        self._kept.append(described)
        return ctypes.addressof(described)

    def _turn(self, module: CompressedLinear) -> int | None:
        """Address of what a linear's inputs go through before its codes, if they do."""
        if module.signs is None:
            return None
        blocks, block = module.signs.shape
        described = TurnStructure(self._keep(module.signs.contiguous()), blocks, block, 1 / math.sqrt(block))
        self._kept.append(described)
        return ctypes.addressof(described)

    def _sparse(self, module: CompressedLinear) -> int | None:
        """Address of the sparse part beside a linear's codes, if it has one."""
        if module.values is None:
            return None
        rows = module.sparse_rows()
        described = rows.described()
        self._kept += [rows, described]
        return ctypes.addressof(described)

    def _apart(self, module: CompressedLinear) -> tuple[int | None, int]:
        """Address and number of the inputs that are zeros before they are rounded."""
        inputs = module.inputs_apart()
        if not len(inputs):
            return None, 0
        known = self._aparts.setdefault(tuple(inputs.tolist()), inputs.to("cpu", torch.int32))
        return known.data_ptr(), len(known)

    def _linear(self, module: Any) -> LinearStructure:
        bias = None if module.bias is None else self._keep(module.bias.detach().float().contiguous())
        if isinstance(module, CompressedLinear):
            layout = module.native_layout(self._arena)
            self._kept.append(layout)
            return LinearStructure(
                layout.described,
                None,
                bias,
                0,
                int(module.rounds),
                self._low_rank(module),
                self._turn(module),
                self._sparse(module),
                *(self._apart(module) if module.rounds else (None, 0)),
            )
        weight = module.weight.detach()
        if not isinstance(module, nn.Linear):  # Conv1D stores [in, out]
            weight = weight.t()
        if weight.dtype == torch.float16:
            weight = weight.float()
        weight = weight.contiguous()
        rows, columns = weight.shape
        described = native.WeightStructure(rows=rows, in_features=columns, columns=columns, groups=1)
        return LinearStructure(described, self._keep(weight), bias, int(weight.dtype == torch.float32), 0)
