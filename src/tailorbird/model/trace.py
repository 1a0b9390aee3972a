"""What flows where inside a block: which linears read the same tensor, and what may be rescaled exactly.

A block runs once on the meta device while every operation is recorded with the memory that it reads
and writes. Nothing is computed. From the record follow the order of the linears, the consumers of a
norm's output, and whether the channels of one linear's output arrive at another one's input unmixed
and without a nonlinearity in between.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tailorbird.model.outline import Arguments, on_meta

#: operations that copy values without changing or mixing them
COPIES = frozenset(
    {"aten.clone", "aten._unsafe_view", "aten._to_copy", "aten.copy", "aten.contiguous", "aten.expand_copy"}
)
#: operations linear in their second argument that mix tokens, never channels: attention times values
MIXES_TOKENS = frozenset({"aten.bmm", "aten.matmul", "aten.baddbmm"})
PRODUCTS = frozenset({"aten.mul"})


@dataclass(frozen=True)
class _Operation:
    """One recorded operation; memory is known by numbers."""

    name: str
    inside: str | None
    is_view: bool
    inputs: tuple[int | None, ...]
    outputs: tuple[int, ...]


@dataclass
class BlockFlow:
    """What one run of a block showed; module names are relative to the block.

    Attributes
    ----------
    order : list of str
        Linears in the order in which data reached them.
    reads : dict of str to str
        Linear -> the first linear that read the same tensor.
    consumers : dict of str to tuple of str
        Norm -> all consumers of its output, where each of them is a linear and the norm's output
        follows its weight.
    offsets : dict of str to bool
        Norm in `consumers` -> whether it multiplies by one plus its weight.
    arguments : list of str
        Names of the block's arguments, other than the hidden states, that hold tensors.
    cached_width : int
        Values per token in the cache, keys and values.
    """

    order: list[str] = field(default_factory=list)
    reads: dict[str, str] = field(default_factory=dict)
    consumers: dict[str, tuple[str, ...]] = field(default_factory=dict)
    offsets: dict[str, bool] = field(default_factory=dict)
    arguments: list[str] = field(default_factory=list)
    cached_width: int = 0
    _operations: list[_Operation] = field(default_factory=list, repr=False)
    _written: dict[str, tuple[int, int]] = field(default_factory=dict, repr=False)
    _read: dict[str, int] = field(default_factory=dict, repr=False)

    def passes_values(self, source: str, target: str) -> bool:
        """Whether `target` reads the output of `source` averaged over tokens and otherwise unchanged."""
        return self._arrives(source, target, multiplied=False)

    def passes_factor(self, source: str, target: str) -> bool:
        """Whether `target` reads the output of `source` multiplied by something else, channel by channel."""
        return self._arrives(source, target, multiplied=True)

    def _arrives(self, source: str, target: str, multiplied: bool) -> bool:
        if source not in self._written or target not in self._read:
            return False
        memory, start = self._written[source]
        carried = {memory}
        for operation in self._operations[start:]:
            touched = [i for i, x in enumerate(operation.inputs) if x in carried]
            if not touched or operation.inside == target:
                continue
            if operation.inside is not None:
                return False
            name = operation.name
            if operation.is_view:
                continue
            exact = (
                name in COPIES
                or (not multiplied and name in MIXES_TOKENS and touched == [len(operation.inputs) - 1])
                or (not multiplied and "scaled_dot_product" in name and touched == [2])
                or (multiplied and name in PRODUCTS and len(touched) == 1)
            )
            if not exact:
                return False
            carried |= set(operation.outputs)
        return self._read[target] in carried


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[_Operation] = []
        self.inside: list[str] = []
        self._kept: list[Tensor] = []  # memory that is given back could be mistaken for later memory

    def memory(self, tensor: Tensor) -> int:
        self._kept.append(tensor)
        return tensor.untyped_storage()._cdata

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = tuple(
            self.memory(x) if isinstance(x, Tensor) else None
            for x in (*tree_leaves(args), *tree_leaves(kwargs or {}))
        )
        outputs = tuple(self.memory(x) for x in tree_leaves(result) if isinstance(x, Tensor))
        is_view = bool(outputs) and set(outputs) <= set(inputs) and not func._schema.is_mutable
        inside = self.inside[-1] if self.inside else None
        self.operations.append(_Operation(str(func.overloadpacket), inside, is_view, inputs, outputs))
        return result


@torch.no_grad()
def trace_block(
    block: nn.Module, hidden: Tensor, arguments: Arguments, linears: list[str], norms: list[str]
) -> BlockFlow:
    """Run an empty block once and record what flows where.

    Parameters
    ----------
    block : nn.Module
        On the meta device.
    hidden : Tensor ``[b, T, hidden_size]``
    arguments : Arguments
        What the model hands to the block beside `hidden`.
    linears, norms : list of str
        Module paths within the block.
    """
    flow = BlockFlow()
    recorder = _Recorder()
    views: dict[tuple[int, ...], str] = {}
    norm_outputs: dict[str, tuple[int, int]] = {}
    handles = []

    def enter_linear(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            memory = recorder.memory(x)
            view = (memory, int(x.storage_offset()), x.numel(), x.shape[-1], x.stride(-1))
            flow.order.append(name)
            flow.reads[name] = views.setdefault(view, name)
            flow._read[name] = memory
            recorder.inside.append(name)

        return hook

    def leave_linear(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            recorder.inside.pop()
            flow._written[name] = (recorder.memory(output), len(recorder.operations))

        return hook

    def leave_norm(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if isinstance(output, Tensor):
                norm_outputs[name] = (recorder.memory(output), len(recorder.operations))

        return hook

    for name in linears:
        module = block.get_submodule(name)
        handles.append(module.register_forward_pre_hook(enter_linear(name)))
        handles.append(module.register_forward_hook(leave_linear(name)))
    for name in norms:
        handles.append(block.get_submodule(name).register_forward_hook(leave_norm(name)))
    args, kwargs = on_meta(arguments)
    try:
        with recorder:
            output = block(on_meta(hidden), *args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    flow.arguments = _tensor_arguments(block, hidden, arguments)
    flow._operations = recorder.operations
    leaves = {recorder.memory(x) for x in tree_leaves(output) if isinstance(x, Tensor)}
    for name, (memory, start) in norm_outputs.items():
        found = _linear_consumers(recorder.operations[start:], memory)
        if not found or memory in leaves or any(flow._read[linear] != memory for linear in found):
            continue
        offset = norm_offset(block.get_submodule(name))
        if offset is not None:
            flow.consumers[name] = found
            flow.offsets[name] = offset
    return flow


@torch.no_grad()
def cached_width(block: nn.Module, hidden: Tensor, arguments: Arguments) -> int:
    """Values per token that an empty block puts into the cache that `arguments` hold, keys and values.

    That is what the block's own code keeps, which may be more than its projections make: some models
    repeat shared heads before they are kept.
    """
    from transformers.cache_utils import Cache

    kept: list[int] = []

    def update(keys: Tensor, values: Tensor, *others: Any, **named: Any) -> tuple[Tensor, Tensor]:
        tokens = hidden.shape[0] * hidden.shape[1]
        kept.append((keys.numel() + values.numel()) // tokens)
        return keys, values

    args, kwargs = arguments
    for value in (*args, *kwargs.values()):
        if isinstance(value, Cache):
            value.update = update
    args, kwargs = on_meta(arguments)
    block(on_meta(hidden), *args, **kwargs)
    return sum(kept)


def _tensor_arguments(block: nn.Module, hidden: Tensor, arguments: Arguments) -> list[str]:
    args, kwargs = arguments
    signature = inspect.signature(block.forward)
    bound = dict(signature.bind(hidden, *args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            bound |= bound.pop(name, {})
    first = next(iter(signature.parameters))
    return [
        n for n, x in bound.items() if n != first and any(isinstance(leaf, Tensor) for leaf in tree_leaves(x))
    ]


def _linear_consumers(operations: list[_Operation], memory: int) -> tuple[str, ...]:
    """Linears that read `memory`; none where anything else reads it too."""
    found: dict[str, None] = {}
    for operation in operations:
        if memory not in operation.inputs:
            continue
        if operation.inside is not None:
            found[operation.inside] = None
        elif not operation.is_view:
            return ()
    return tuple(found)


@torch.no_grad()
def norm_offset(norm: nn.Module) -> bool | None:
    """Whether a norm multiplies by its weight (False), by one plus it (True), or by neither (None).

    Tried out on random values: with weight (or one plus it) and bias divided by s per channel, the
    output must be divided by s.

    Parameters
    ----------
    norm : nn.Module
        On any device; a copy is tried.
    """
    tensors = {name for name, _ in norm.named_parameters()}
    weight = getattr(norm, "weight", None)
    if not tensors <= {"weight", "bias"} or not isinstance(weight, Tensor) or weight.ndim != 1:
        return None
    if any(True for _ in norm.buffers()):
        return None
    trial = copy.deepcopy(norm).to_empty(device="cpu").float()
    generator = torch.Generator().manual_seed(0)
    size = weight.numel()
    x, w, b = (torch.randn(size, generator=generator) for _ in range(3))
    s = torch.rand(size, generator=generator) + 0.5

    def run(new_weight: Tensor, new_bias: Tensor) -> Tensor:
        trial.weight.copy_(new_weight)  # type: ignore[operator]
        if "bias" in tensors:
            trial.bias.copy_(new_bias)  # type: ignore[operator]
        return trial(x[None])[0]

    expected = run(w, b) / s
    for offset in (0.0, 1.0):
        if torch.allclose(run((w + offset) / s - offset, b / s), expected, rtol=1e-4, atol=1e-5):
            return bool(offset)
    return None
