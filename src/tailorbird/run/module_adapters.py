"""Adapters for the linears of a model's own modules: each segment of a packed row has its own.

    y = outputs ⊙ (W (inputs ⊙ x) + scale · B (C (ranks ⊙ A (inputs ⊙ x)))) + bias

Any part may be absent, as in `kernels/adapters.py`. The modules run as they are, on all rows; hooks, there
for one step, change the rows of segments.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from tailorbird.kernels.adapters import LinearAdapter, Segment, TiledRows, shared_bytes
from tailorbird.run.parts import PlacedLinear, linear_shape

#: first row, the one after the last, and what happens to them
_Part = tuple[int, int, LinearAdapter]


class ModuleAdapter:
    """An adapter laid out for the modules of one model, which it doesn't change.

    Parameters
    ----------
    blocks : mapping of str to PlacedLinear
        The model's linears by the paths of their modules.
    linears : mapping of (block, role) to LinearAdapter
        On the CPU, as they are read.
    device : torch.device
        Of the model.

    Raises
    ------
    ValueError
        For a linear that isn't there, or tensors that don't fit it.
    """

    def __init__(
        self,
        blocks: Mapping[str, PlacedLinear],
        linears: Mapping[tuple[int, str], LinearAdapter],
        device: torch.device,
    ) -> None:
        self.blocks = blocks
        self.linears: dict[nn.Module, LinearAdapter] = {}
        modules = {(place.block, place.role): place.module for place in blocks.values()}
        moved: dict[int, Tensor | TiledRows] = {}  # what several linears share is there once
        for (block, role), linear in linears.items():
            if (block, role) not in modules:
                raise ValueError(f"an adapter for `{role}` in block {block}; expected a linear of the model")
            module = modules[block, role]
            linear.check(*linear_shape(module), f"block {block}, `{role}`")
            self.linears[module] = _moved(linear, device, moved)
        self.nbytes = sum(one.nbytes for one in moved.values())
        #: as of `LaidOut`; what had to be moved is this adapter's own
        self.shared = shared_bytes(
            linear for linear in linears.values() if moved.get(id(linear.up)) is linear.up
        )


def _moved(
    linear: LinearAdapter, device: torch.device, moved: dict[int, Tensor | TiledRows]
) -> LinearAdapter:
    """The same on another device; `moved` remembers parts by the identity of those that were given."""
    parts: dict[str, Any] = {}
    for field in fields(linear):
        part = getattr(linear, field.name)
        if isinstance(part, Tensor | TiledRows):
            parts[field.name] = moved.setdefault(id(part), part.to(device))
    return replace(linear, **parts)


@contextmanager
def adapted(segments: Sequence[Segment]) -> Iterator[None]:
    """Let linears change the rows of segments, which don't overlap, until the end of the block."""
    parts: dict[nn.Module, list[_Part]] = defaultdict(list)
    for begin, end, adapter in segments:
        for module, linear in cast(ModuleAdapter, adapter).linears.items():
            parts[module].append((begin, end, linear))
    with ExitStack() as hooks:
        for module, own in parts.items():
            if any(linear.inputs is not None for _, _, linear in own):
                hooks.callback(module.register_forward_pre_hook(partial(_scale_inputs, own)).remove)
            hooks.callback(module.register_forward_hook(partial(_change, own)).remove)
        yield


def _scale_inputs(parts: list[_Part], module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Before a linear."""
    x = arguments[0].clone()
    rows = x.view(-1, x.shape[-1])
    for begin, end, linear in parts:
        if linear.inputs is not None:
            rows[begin:end] = (rows[begin:end].float() * linear.inputs).to(x.dtype)
    return (x, *arguments[1:])


def _change(parts: list[_Part], module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
    """After a linear, in place."""
    x, y = (part.reshape(-1, part.shape[-1]) for part in (arguments[0], output))
    for begin, end, linear in parts:
        y[begin:end] = changed_rows(y[begin:end], x[begin:end], linear, cast(Any, module.bias)).to(y.dtype)
    return y.view(output.shape)


def changed_rows(y: Tensor, x: Tensor, linear: LinearAdapter, bias: Tensor | None) -> Tensor:
    """What an adapter makes of a linear's outputs.

    Parameters
    ----------
    y : Tensor[rows, out_features]
        With the linear's own bias, if it has one.
    x : Tensor[rows, in_features]
        With the factors for inputs.
    linear : LinearAdapter
    bias : Tensor[out_features], optional
        The linear's own.

    Returns
    -------
    Tensor[rows, out_features], float32
    """
    result = y.float()
    replaces = linear.outputs is not None or linear.bias is not None
    if replaces and bias is not None:
        result = result - bias
    if linear.down is not None and linear.up is not None:
        low = x.float() @ linear.down.float().t()
        if linear.ranks is not None:
            low = low * linear.ranks
        if linear.core is not None:
            low = low @ linear.core.t()
        up = linear.up
        result = result + linear.scale * (
            up.times(low) if isinstance(up, TiledRows) else low @ up.float().t()
        )
    if linear.outputs is not None:
        result = result * linear.outputs
    stated = linear.bias if linear.bias is not None else bias
    return result + stated if replaces and stated is not None else result
