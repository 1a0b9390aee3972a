"""What compiled functions take for granted of the tensors that they are given, checked where these come in.

They get addresses, and read as far as sizes and numbers say. Types, sizes, dtypes, devices and contiguity are
compared, values aren't read: a tensor takes less than a microsecond.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tailorbird.errors import TensorError

#: dtypes of activations, and of what codes are dequantized to
ACTIVATIONS = (torch.float32, torch.bfloat16)
#: dtypes of scales
SCALES = (torch.float16, torch.bfloat16)
#: What to do about a tensor or number of a weight, and about one that is multiplied by it.
OF_WEIGHT = "give the tensors and numbers of one packed weight"
OF_INPUTS = "give what this weight is multiplied by, in such a dtype"


def check(
    what: str, tensor: Any, shape: tuple[int | str, ...], dtypes: tuple[torch.dtype, ...], remedy: str
) -> None:
    """Raise TensorError unless a tensor can be read as contiguous values in memory.

    Parameters
    ----------
    what : str
        What messages call it.
    tensor : Tensor
    shape : tuple of int or str
        Words are told in place of sizes where the number of dimensions is another, and fit no tensor.
    dtypes : tuple of torch.dtype
        What it may be of.
    remedy : str
        What to do otherwise.
    """
    fits = (
        isinstance(tensor, Tensor)
        and tensor.shape == shape
        and tensor.dtype in dtypes
        and tensor.is_cpu
        and tensor.is_contiguous()
    )
    if not fits:
        expected = f"[{', '.join(map(str, shape))}] of {' or '.join(map(str, dtypes))}"
        raise TensorError(f"{what} is {_form(tensor)}", f"{expected}, contiguous, on the CPU", remedy)


def check_inputs(x: Tensor, shape: tuple[int | str, ...], what: str = "`x`") -> None:
    """Raise TensorError unless a weight can be multiplied by `x`, or by a gradient."""
    check(what, x, shape, ACTIVATIONS, OF_INPUTS)


def contiguous(*tensors: Any) -> Any:
    """The same values, copied where they aren't side by side; what is None stays None."""
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)


def _form(tensor: Any) -> str:
    if not isinstance(tensor, Tensor):
        return f"a {type(tensor).__name__}"
    apart = "" if tensor.layout == torch.strided and tensor.is_contiguous() else ", not contiguous"
    return f"{list(tensor.shape)} of {tensor.dtype} on {tensor.device}{apart}"
