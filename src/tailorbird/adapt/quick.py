"""Norms and gates of a model through compiled kernels while it's tuned.

A norm or a gated feed-forward layer of transformers passes over its activations many times and keeps several
of them for the gradient; `kernels/training_*.py` passes once and keeps the inputs. Which modules compute what
these compute is found by trying them on random numbers, not by their names: what differs stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from tailorbird.kernels.training_gates import geglu, swiglu
from tailorbird.kernels.training_norms import rms_norm

#: Tokens on which modules are tried, and how far results may be off then, by the width of the dtype.
_TOKENS = 3
_TOLERANCE = {4: 1e-5, 2: 2e-2}
_GATED = ("gate_proj", "up_proj", "down_proj")


@contextmanager
def quickened(model: nn.Module) -> Iterator[int]:
    """Let a model's norms and gates run through kernels until the end of the block; gives their number."""
    changed: list[Any] = []
    try:
        for module in model.modules():
            forward = _norm(module) or _gate(module)
            if forward is not None:
                changed.append(module)
                module.forward = forward
        yield len(changed)
    finally:
        for module in changed:
            del module.forward  # the class's own shows again


def _norm(module: Any) -> Callable[[Tensor], Tensor] | None:
    """What computes the same as a norm over the last dimension, or None."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if "RMSNorm" not in type(module).__name__ or not isinstance(weight, nn.Parameter) or weight.ndim != 1:
        return None
    if not isinstance(eps, float) or "forward" in vars(module):
        return None
    for offset in (0.0, 1.0):
        forward = partial(_run_norm, module, eps, offset)
        if _agree(module, forward, len(weight), weight):
            return forward
    return None


def _run_norm(module: Any, eps: float, offset: float, x: Tensor) -> Tensor:
    return rms_norm(x, module.weight, eps, offset)


def _gate(module: Any) -> Callable[[Tensor], Tensor] | None:
    """What computes the same as a gated feed-forward layer, or None."""
    if not all(hasattr(module, name) for name in _GATED) or "forward" in vars(module):
        return None
    curve = _curve(getattr(module, "act_fn", None))
    if curve is None:
        return None
    forward = partial(_run_gate, module, curve)
    like = next(chain(module.parameters(), module.buffers()), None)  # packed linears have buffers alone
    width = getattr(module.gate_proj, "in_features", 0)
    return forward if width and _agree(module, forward, width, like) else None


@torch.no_grad()
def _curve(activation: Any) -> Callable[[Tensor, Tensor], Tensor] | None:
    """The gate of an activation function that is known, or None."""
    if activation is None:
        return None
    x = torch.linspace(-6, 6, 97)
    found = activation(x)
    if torch.allclose(found, nn.functional.silu(x), atol=1e-6):
        return swiglu
    return geglu if torch.allclose(found, nn.functional.gelu(x, approximate="tanh"), atol=1e-6) else None


def _run_gate(module: Any, curve: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Tensor:
    output: Tensor = module.down_proj(curve(module.gate_proj(x), module.up_proj(x)))
    return output


@torch.no_grad()
def _agree(module: nn.Module, forward: Callable[[Tensor], Tensor], width: int, like: Tensor | None) -> bool:
    """Whether both give the same for random numbers."""
    if like is None:
        return False
    generator = torch.Generator().manual_seed(0)
    dtype = like.dtype if like.dtype.is_floating_point else torch.bfloat16
    x = torch.randn(1, _TOKENS, width, generator=generator).to(like.device, dtype)
    try:
        expected, found = module(x), forward(x)
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return False
    if not isinstance(expected, Tensor) or expected.shape != found.shape or expected.dtype != found.dtype:
        return False
    off = (found.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-12)
    return bool(off <= _TOLERANCE[min(dtype.itemsize, 4)])
