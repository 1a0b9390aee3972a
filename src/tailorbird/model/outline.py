"""A transformers model without its weights: built from the config alone, on the meta device.

The outline knows where the parts of a decoder are (blocks, embedding, head) and what the model's own
code hands to each block: masks, positions, rotations. To learn that, the model's forward runs with
every block replaced by a function, over tensors that hold one zero and take no memory. Anatomy and
streaming stand on it; no weight is read here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tailorbird.errors import CheckpointError, UnsupportedArchitecture
from tailorbird.model.layout import ModelLayout

#: bytes of computed buffers (rotary frequencies, position tables) that any model may have
BUFFER_ALLOWANCE = 64 << 20

#: what a model hands to a block beside the hidden states
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Reached(Exception):
    """Leaves a model's forward at the point of interest; carries nothing, because the catcher knows."""


@dataclass
class Outline:
    """Parts of a decoder whose tensors are all empty.

    Attributes
    ----------
    model : transformers.PreTrainedModel
        In evaluation mode.
    blocks : nn.ModuleList
        The blocks in forward order.
    blocks_name : str
        Module path of `blocks`.
    embedding, head : str
        Module paths.
    tied : bool
        Whether the head uses the embedding's values.
    """

    model: Any
    blocks: nn.ModuleList
    blocks_name: str
    embedding: str
    head: str
    tied: bool

    def block_name(self, index: int) -> str:
        """Module path of a block."""
        return f"{self.blocks_name}.{index}"

    def outside(self) -> Iterator[tuple[str, nn.Module]]:
        """(path, module) of every module outside the blocks."""
        inner = self.blocks_name + "."
        for name, module in self.model.named_modules(remove_duplicate=False):
            if not name.startswith(inner):
                yield name, module


def build_outline(
    config: Any, layout: ModelLayout | None = None, dtype: torch.dtype = torch.float32
) -> Outline:
    """Build the empty model that `config` describes and find its parts.

    Parameters
    ----------
    config : transformers.PretrainedConfig
        Not changed.
    layout : ModelLayout, optional
        Of a compressed checkpoint: modules take the codings and shapes that it states.
    dtype : torch.dtype
        Of the (empty) parameters.

    Raises
    ------
    CheckpointError
        transformers can't build a model from `config`.
    UnsupportedArchitecture
        It isn't a causal language model with one list of equal blocks, an embedding and a head.
    """
    model = _empty_model(config, dtype)
    blocks_name, blocks = _find_blocks(model)
    if layout is not None:
        from tailorbird.model.skeleton import rebuild

        rebuild(model, layout)
    embedding = _name_of(model, model.get_input_embeddings())
    head = _name_of(model, model.get_output_embeddings())
    if embedding is None or head is None:
        raise UnsupportedArchitecture(
            f"{type(model).__name__} has no {'token embedding' if embedding is None else 'output head'}",
            "a causal language model",
            "give the checkpoint of a decoder with a language-model head",
        )
    tied = f"{head}.weight" in model.all_tied_weights_keys or (layout is not None and layout.shares_codes)
    return Outline(model, blocks, blocks_name, embedding, head, tied)


def _empty_model(config: Any, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.use_cache = False
    config.output_attentions = False
    config.output_hidden_states = False
    config.return_dict = True
    config._attn_implementation = None
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False).eval()
    except Exception as error:
        said = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"config.json of type `{getattr(config, 'model_type', '?')}` describes no model "
            f"({type(error).__name__}: {said})",
            "the config of a causal language model that transformers can build",
            "correct config.json, or give another model",
        ) from error


def _find_blocks(model: Any) -> tuple[str, nn.ModuleList]:
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and _has_parameters(module[0]):
            kinds = sorted({type(block).__name__ for block in module})
            if len(kinds) == 1:
                return name, module
            raise UnsupportedArchitecture(
                f"the blocks `{name}` are of different kinds: {', '.join(kinds)}",
                "blocks of one kind",
                "give a dense decoder",
            )
    raise UnsupportedArchitecture(
        f"{type(model).__name__} has no list of {count} blocks",
        "a decoder made of equal blocks",
        "give a dense decoder",
    )


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _name_of(model: nn.Module, wanted: nn.Module | None) -> str | None:
    return next((name for name, module in model.named_modules() if module is wanted and name), None)


def own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers that `module` itself holds, not those of its children."""
    yield from module.named_parameters(recurse=False, remove_duplicate=False)
    yield from module.named_buffers(recurse=False, remove_duplicate=False)


def put_tensor(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Let `tensor` be the parameter or buffer `name` of `module` itself, without a copy."""
    if name in module._parameters:
        module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[name] = tensor


def placeholder(tensor: Tensor) -> Tensor:
    """Zeros of the shape and dtype of `tensor` on the CPU that take the memory of one value."""
    return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)


def computed_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The still empty buffers that `module` itself holds and that no file stores."""
    return {
        name: buffer
        for name, buffer in module.named_buffers(recurse=False)
        if name in module._non_persistent_buffers_set and buffer.is_meta
    }


@torch.no_grad()
def compute_buffers(model: Any, name: str, module: nn.Module) -> None:
    """Fill the buffers of `module` that no file stores, as transformers does when it loads a model.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Knows how its modules are initialised.
    name : str
        Path of `module`, for the error.
    module : nn.Module
        Its parameters are still empty: what fills buffers may fill parameters too.

    Raises
    ------
    UnsupportedArchitecture
        transformers leaves a buffer as it finds it.
    """
    empty = computed_buffers(module)
    if not empty:
        return
    size = sum(buffer.nbytes for buffer in empty.values())
    if size > BUFFER_ALLOWANCE:
        raise CheckpointError(
            f"`{name}` would compute {size} bytes of positions",
            f"at most {BUFFER_ALLOWANCE}",
            "check head_dim, max_position_embeddings and the rotary settings in config.json",
        )
    results: list[dict[str, Tensor]] = []
    for fill in (0, 1):
        filled = {own: torch.full_like(buffer, fill, device="cpu") for own, buffer in empty.items()}
        module._buffers.update(filled)
        try:
            model._init_weights(module)
        except Exception as error:
            raise CheckpointError(
                f"the positions of `{name}` can't be computed ({type(error).__name__}: {error})"[:400],
                "settings that transformers understands",
                "correct the rotary settings in config.json",
            ) from error
        results.append({own: buffer for own, buffer in module.named_buffers(recurse=False) if own in empty})
    for own in empty:
        if not torch.equal(results[0][own], results[1][own]):
            raise UnsupportedArchitecture(
                f"buffer `{name}.{own}` is neither stored nor computed by transformers",
                "buffers that transformers fills when it loads a model",
                "give another model",
            )


def hollow(outline: Outline) -> None:
    """Make what lies outside the blocks able to run: computed buffers real, all else placeholders."""
    for name, module in outline.outside():
        compute_buffers(outline.model, name, module)
        for own, tensor in list(own_tensors(module)):
            if tensor.is_meta:
                put_tensor(module, own, placeholder(tensor))


@contextmanager
def replaced_forward(modules: list[nn.Module], functions: list[Callable[..., Any]]) -> Iterator[None]:
    """While this lasts, calling ``modules[i]`` calls ``functions[i]``; attributes stay reachable."""
    for module, function in zip(modules, functions, strict=True):
        module.__dict__["forward"] = function
    try:
        yield
    finally:
        for module in modules:
            del module.__dict__["forward"]


def split_hidden(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Arguments]:
    """Part the hidden states from the rest of a block's arguments."""
    if args:
        return args[0], (args[1:], kwargs)
    return kwargs["hidden_states"], ((), {k: v for k, v in kwargs.items() if k != "hidden_states"})


def walk(
    outline: Outline, ids: Tensor, returns_tuple: bool, use_cache: bool = False
) -> tuple[Tensor, list[Arguments]]:
    """Run the model up to its last block, none of which does anything.

    Parameters
    ----------
    outline : Outline
        Hollow, or with its embedding filled.
    ids : LongTensor ``[b, T]``
    returns_tuple : bool
        Whether the model expects a block to return a tuple.
    use_cache : bool
        Whether the model hands an empty cache to its blocks.

    Returns
    -------
    hidden : Tensor ``[b, T, hidden_size]``
        What enters block 0.
    arguments : list
        What the model hands to each block beside the hidden states.
    """
    entered: list[Tensor] = []
    arguments: list[Arguments] = []
    last = len(outline.blocks) - 1

    def stand_in(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, rest = split_hidden(outline.blocks[index], args, kwargs)
            entered.append(hidden)
            arguments.append(rest)
            if index == last:
                raise Reached
            return (hidden,) if returns_tuple else hidden

        return forward

    stand_ins = [stand_in(i) for i in range(last + 1)]
    with replaced_forward(list(outline.blocks), stand_ins), suppress(Reached):
        outline.model(input_ids=ids, use_cache=use_cache)
    if len(arguments) != last + 1:
        raise UnsupportedArchitecture(
            f"{type(outline.model).__name__} runs {len(arguments)} of its {last + 1} blocks",
            "each block once, in order",
            "give another model",
        )
    return entered[0], arguments


def first_arguments(outline: Outline, ids: Tensor) -> tuple[Tensor, Arguments]:
    """What enters block 0, as `walk`, for which it needn't be known what a block returns."""
    found: list[tuple[Tensor, Arguments]] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        found.append(split_hidden(outline.blocks[0], args, kwargs))
        raise Reached

    with replaced_forward([outline.blocks[0]], [forward]), suppress(Reached):
        outline.model(input_ids=ids, use_cache=False)
    return found[0]


def on_meta(value: Any) -> Any:
    """`value` with every tensor in it replaced by an empty one on the meta device."""
    if isinstance(value, Tensor):
        return value.to("meta")
    if isinstance(value, tuple | list):
        return type(value)(on_meta(item) for item in value)
    if isinstance(value, dict):
        return {key: on_meta(item) for key, item in value.items()}
    return value


@torch.no_grad()
def block_returns_tuple(outline: Outline) -> bool:
    """Whether the blocks return a tuple whose first item is the hidden states (in some models they do)."""
    hidden, arguments = first_arguments(outline, torch.zeros(1, 2, dtype=torch.long))
    args, kwargs = on_meta(arguments)
    block = outline.blocks[0]
    linears = [module for module in block.modules() if isinstance(module, nn.Linear)]

    def shape_only(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
        return lambda x: x.new_empty((*x.shape[:-1], linear.out_features))

    with replaced_forward(list(linears), [shape_only(linear) for linear in linears]):
        return isinstance(block(on_meta(hidden), *args, **kwargs), tuple)
