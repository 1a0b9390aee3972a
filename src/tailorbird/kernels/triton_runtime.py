"""What the Triton kernels share: whether Triton is there, and on which tensors they can run.

`import tailorbird` doesn't reach this file. With ``TRITON_INTERPRET=1`` in the environment before it is
imported, kernels run on the CPU in Triton's interpreter: slow, and good for tests (it cuts off where the GPU
rounds to bfloat16, and sums products in NumPy's order).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tailorbird.errors import ResourceError


def _module(name: str) -> Any:
    """The module, or None where it isn't installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


triton = _module("triton")
tl = _module("triton.language")

#: dtypes of activations that the kernels read
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def installed() -> bool:
    """Whether Triton can be imported."""
    return triton is not None


def interpreted() -> bool:
    """Whether kernels run on the CPU, in Triton's interpreter."""
    return installed() and bool(triton.knobs.runtime.interpret)


def jit(function: Callable[..., None]) -> Any:
    """`triton.jit`; without Triton the function stays as it is and is never called."""
    return triton.jit(function) if installed() else function


def require(*tensors: Tensor) -> None:
    """Raise `ResourceError` unless kernels can run on these tensors."""
    if not installed():
        raise ResourceError(
            "a product on the GPU without Triton", "the package `triton`", "pip install triton"
        )
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1 or (devices.pop().type != "cuda" and not interpreted()):
        raise ResourceError(
            "tensors on " + ", ".join(sorted({str(tensor.device) for tensor in tensors})),
            "all on one CUDA device",
            "move them there, or set TRITON_INTERPRET=1 to run the kernels slowly on the CPU",
        )


def operand(dtype: torch.dtype) -> Any:
    """Triton's dtype for operands of a product of tiles.

    The interpreter multiplies bfloat16 as if it were integers; it gets the same values in float32.
    """
    if interpreted():
        return tl.float32
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[dtype]
