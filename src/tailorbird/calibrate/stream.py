"""Runs a model with one block in memory at a time.

The model's own code decides what enters the first block, what is handed to each block (masks,
positions, rotations) and what follows the last; here only the blocks between are taken one by one:
read, run, dropped. The result equals the whole model's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn

from tailorbird.formats.modules import CompressedEmbedding, CompressedLinear
from tailorbird.hardware.memory import trim_heap
from tailorbird.model.anatomy import Anatomy, LinearPlace, layout_of
from tailorbird.model.checkpoint import Checkpoint
from tailorbird.model.outline import (
    Arguments,
    Reached,
    block_returns_tuple,
    build_outline,
    compute_buffers,
    hollow,
    own_tensors,
    placeholder,
    put_tensor,
    replaced_forward,
    walk,
)

#: batch shapes whose masks and positions are kept
REMEMBERED_SHAPES = 2

OnInput = Callable[[str, Tensor], None]


class StreamingModel:
    """A checkpoint that is run block by block, on the CPU.

    Parameters
    ----------
    checkpoint : Checkpoint
        Dense or compressed; tensors are read when they are needed.
    anatomy : Anatomy
        Of that checkpoint.
    dtype : torch.dtype
        Of parameters and activations.

    Attributes
    ----------
    checkpoint, anatomy, dtype
        As given.
    """

    def __init__(self, checkpoint: Checkpoint, anatomy: Anatomy, dtype: torch.dtype = torch.float32) -> None:
        self.checkpoint = checkpoint
        self.anatomy = anatomy
        self.dtype = dtype
        self._outline = build_outline(checkpoint.config, layout_of(checkpoint), dtype)
        hollow(self._outline)
        self._returns_tuple = block_returns_tuple(self._outline)
        self._arguments: dict[tuple[int, int], list[Arguments]] = {}
        self._loaded: set[str] = set()
        for name, module in self._outline.outside():
            if name not in (anatomy.embedding, anatomy.head):
                self._fill(name, module)

    @property
    def head_width(self) -> int:
        """Width of what the head reads."""
        return self.anatomy.embedding_width

    # --- the ends -------------------------------------------------------------------------------

    def load_ends(self) -> None:
        """Read the embedding and the head now; otherwise each is read when it is first needed."""
        for name in (self.anatomy.embedding, self.anatomy.head):
            self._load_end(name)

    def release_ends(self) -> None:
        """Drop the embedding and the head from memory, and what was set in their place."""
        for name in (self.anatomy.embedding, self.anatomy.head):
            module = self._module(name)
            for own, tensor in list(own_tensors(module)):
                if own not in module._non_persistent_buffers_set:
                    put_tensor(module, own, placeholder(tensor))
            module.to("cpu")  # a packed module lets go of the layout that it made for running
        self._loaded.clear()

    def end_weight(self, name: str) -> Tensor:
        """Weight of the embedding or head, ``[vocab_size, width]`` in the compute dtype.

        Of a dense one the very tensor that is in use.
        """
        self._load_end(name)
        module = self._module(name)
        weight: Any = module.weight
        return weight.detach().to(self.dtype)

    def set_end_weight(self, name: str, weight: Tensor) -> None:
        """Use `weight` ``[vocab_size, width]`` for the embedding or head until they are released.

        Of a tied pair both change. The tensor that was in use is left as it was.

        Raises
        ------
        ValueError
            The checkpoint stores this end packed, or the shape is wrong.
        """
        self._load_end(name)
        pair = (self.anatomy.embedding, self.anatomy.head) if self.anatomy.tied else (name,)
        for end in pair:
            self._set(self._module(end), end, weight)

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        """What enters block 0: embeddings with whatever the model does to them.

        Parameters
        ----------
        ids : LongTensor ``[b, T]``

        Returns
        -------
        Tensor ``[b, T, hidden_size]``
        """
        self._load_end(self.anatomy.embedding)
        hidden, arguments = walk(self._outline, ids, self._returns_tuple)
        self._remember(tuple(ids.shape), arguments)
        return hidden

    def embedding_gradient(self, ids: Tensor, gradient: Tensor) -> Tensor:
        """Gradient with respect to the embedding's weight, its use as a tied head left out.

        Parameters
        ----------
        ids : LongTensor ``[b, T]``
        gradient : Tensor ``[b, T, hidden_size]``
            With respect to what `embed` returns for `ids`.

        Returns
        -------
        Tensor ``[vocab_size, width]``
            The row of the padding token gets its gradient too, which it wouldn't in training.
        """
        parameter = self.end_parameter(self.anatomy.embedding)
        module: Any = self._module(self.anatomy.embedding)
        padding, module.padding_idx = module.padding_idx, None
        parameter.requires_grad_(True)
        try:
            with torch.enable_grad():
                hidden, _ = walk(self._outline, ids, self._returns_tuple)
            return torch.autograd.grad(hidden, parameter, gradient)[0]
        finally:
            parameter.requires_grad_(False)
            module.padding_idx = padding

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states that left the last block.

        Parameters
        ----------
        hidden : Tensor ``[b, T, hidden_size]``

        Returns
        -------
        Tensor, float32 ``[b, T, vocab_size]``
            After the final norm, the head, and the model's capping or scaling.
        """
        self._load_end(self.anatomy.head)
        return self._finish(hidden).logits.float()

    def head_input(self, hidden: Tensor) -> Tensor:
        """What the head reads, ``[b, T, width]``, once `hidden` ``[b, T, hidden_size]`` left the blocks."""
        found: list[Tensor] = []

        def forward(x: Tensor) -> Tensor:
            found.append(x)
            raise Reached

        with replaced_forward([self._module(self.anatomy.head)], [forward]), suppress(Reached):
            self._finish(hidden)
        return found[0]

    def _finish(self, hidden: Tensor) -> Any:
        """Run the model with blocks that do nothing, except that the last returns `hidden`."""
        last = len(self._outline.blocks) - 1

        def stand_in(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                given = args[0] if args else kwargs["hidden_states"]
                output = hidden if index == last else given
                return (output,) if self._returns_tuple else output

            return forward

        ids = torch.zeros(hidden.shape[:2], dtype=torch.long)
        with replaced_forward(list(self._outline.blocks), [stand_in(i) for i in range(last + 1)]):
            return self._outline.model(input_ids=ids, use_cache=False)

    def _load_end(self, name: str) -> None:
        if name in self._loaded:
            return
        trim_heap()
        if not self.anatomy.tied:
            self._fill(name, self._module(name))
            self._loaded.add(name)
            return
        embedding, head = (self._module(end) for end in (self.anatomy.embedding, self.anatomy.head))
        self._fill(self.anatomy.embedding, embedding)
        self._fill(self.anatomy.head, head, leave="weight")
        if not _is_packed(embedding):
            shared: Any = embedding.weight
            put_tensor(head, "weight", shared.detach())
        self._loaded |= {self.anatomy.embedding, self.anatomy.head}

    # --- blocks ---------------------------------------------------------------------------------

    def load_block(self, index: int) -> nn.Module:
        """Read one block; dropping the last reference to it frees its memory.

        Returns
        -------
        nn.Module
            transformers' own, with `CompressedLinear` where the checkpoint is compressed. Parameters
            have the compute dtype and don't require gradients.
        """
        trim_heap()  # the block before this one is gone
        model = self._outline.model
        shared = {id(model.config): model.config}
        block = copy.deepcopy(self._outline.blocks[index], shared)
        for path, module in block.named_modules():
            name = f"{self._outline.block_name(index)}.{path}".rstrip(".")
            compute_buffers(model, name, module)
            self._fill(name, module)
        return block

    def run_block(self, block: nn.Module, index: int, hidden: Tensor) -> Tensor:
        """Run a block with the masks and positions that the model hands to block `index`.

        Parameters
        ----------
        block : nn.Module
            From `load_block`.
        index : int
        hidden : Tensor ``[b, T, hidden_size]``

        Returns
        -------
        Tensor ``[b, T, hidden_size]``
        """
        args, kwargs = self._block_arguments(hidden)[index]
        output = block(hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def capture_inputs(self, block: nn.Module, index: int, hidden: Tensor, on_input: OnInput) -> Tensor:
        """Run a block and show each distinct input of its linears, once, as it passes.

        Parameters
        ----------
        block, index, hidden
            As `run_block`.
        on_input : callable
            Called with (`shares_input` of the linears, their input ``[..., in_features]``); must not
            change the tensor, and keeps it in memory only by holding on to it.

        Returns
        -------
        Tensor ``[b, T, hidden_size]``
            The block's output.
        """

        def shows(key: str) -> Callable[..., None]:
            return lambda module, inputs: on_input(key, inputs[0].detach())

        with ExitStack() as hooks:
            for key in dict.fromkeys(place.shares_input for place in self.anatomy.blocks[index].linears):
                handle = self.module_of(block, key).register_forward_pre_hook(shows(key))
                hooks.callback(handle.remove)
            return self.run_block(block, index, hidden)

    def weight_of(self, block: nn.Module, place: LinearPlace) -> Tensor:
        """Weight of a linear of a loaded block, ``[out_features, in_features]`` in the compute dtype.

        Of a dense linear a view of the very tensor that is in use; of a packed one unpacked.
        """
        return weight_in(self.module_of(block, place.name)).to(self.dtype)

    def set_weight(self, block: nn.Module, place: LinearPlace, weight: Tensor) -> None:
        """Let a linear of a loaded block use `weight` ``[out_features, in_features]``.

        The tensor that was in use is left as it was.

        Raises
        ------
        ValueError
            The checkpoint stores this linear packed, or the shape is wrong.
        """
        module = self.module_of(block, place.name)
        self._set(module, place.name, weight if isinstance(module, nn.Linear) else weight.t())

    def weight_parameter(self, block: nn.Module, place: LinearPlace) -> nn.Parameter:
        """The parameter itself of a dense linear of a loaded block, as it is stored; for gradients."""
        parameter: Any = self.module_of(block, place.name).weight
        return parameter

    def end_parameter(self, name: str) -> nn.Parameter:
        """The parameter itself of a dense embedding or head, ``[vocab_size, width]``; for gradients."""
        self._load_end(name)
        parameter: Any = self._module(name).weight
        return parameter

    def module_of(self, block: nn.Module, name: str) -> nn.Module:
        """The module that the whole model calls `name`, such as a norm, in a loaded block."""
        depth = self._outline.blocks_name.count(".") + 2
        return block.get_submodule(".".join(name.split(".")[depth:]))

    def remember_arguments(self, hidden: Tensor) -> None:
        """Work out now with which masks and positions blocks are run for hidden states of this shape."""
        self._block_arguments(hidden)

    # --- below ----------------------------------------------------------------------------------

    def _module(self, name: str) -> nn.Module:
        return self._outline.model.get_submodule(name)

    def _fill(self, name: str, module: nn.Module, leave: str = "") -> None:
        """Read the tensors that `module` itself stores, except `leave`, without a second copy of any."""
        for own, tensor in list(own_tensors(module)):
            if own != leave and own not in module._non_persistent_buffers_set:
                put_tensor(module, own, self.checkpoint.weights.read(f"{name}.{own}", tensor.dtype))

    def _set(self, module: nn.Module, name: str, weight: Tensor) -> None:
        if _is_packed(module):
            raise ValueError(f"`{name}` is stored packed; its weight can't be replaced")
        old: Any = module.weight
        if weight.shape != old.shape:
            raise ValueError(f"a weight {list(weight.shape)} for `{name}` {list(old.shape)}")
        put_tensor(module, "weight", weight.detach().to(self.dtype).contiguous())

    def _block_arguments(self, hidden: Tensor) -> list[Arguments]:
        shape = (hidden.shape[0], hidden.shape[1])
        if shape not in self._arguments:
            # The embedding may be a placeholder: masks and positions depend on the shape alone.
            with torch.no_grad():
                ids = torch.zeros(shape, dtype=torch.long)
                self._remember(shape, walk(self._outline, ids, self._returns_tuple)[1])
        return self._arguments[shape]

    def _remember(self, shape: tuple[int, ...], arguments: list[Arguments]) -> None:
        batch, length = shape
        self._arguments.pop((batch, length), None)
        while len(self._arguments) >= REMEMBERED_SHAPES:
            self._arguments.pop(next(iter(self._arguments)))
        self._arguments[batch, length] = arguments


def weight_in(module: nn.Module) -> Tensor:
    """Weight of a linear or of transformers' Conv1D, ``[out_features, in_features]``, no gradient.

    Of a dense one a view of the very tensor that is in use; of a packed one unpacked.
    """
    weight: Any = module.weight
    weight = weight.detach()
    return weight if isinstance(module, nn.Linear) else weight.t()


def _is_packed(module: nn.Module) -> bool:
    return isinstance(module, CompressedLinear | CompressedEmbedding)
