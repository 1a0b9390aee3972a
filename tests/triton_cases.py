"""What the tests of Triton's kernels share: without a GPU they run in its interpreter, on small shapes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from packed_weights import laid_out
from tailorbird.formats.packed import PackedWeight
from tailorbird.kernels import triton_linear, triton_runtime

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
#: Relative error of rounding to a dtype; the interpreter cuts bfloat16 off instead.
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0 ** (-8 if ON_GPU else -7)}
DTYPES = list(ROUNDING)

with_triton = pytest.mark.skipif(not triton_runtime.installed(), reason="the package triton isn't installed")


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers, the same at every call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def of_rounding(sizes: Tensor, dtype: torch.dtype) -> Tensor:
    """What rounding numbers of such sizes to a dtype can cost; float16's smallest are evenly spaced."""
    return ROUNDING[dtype] * sizes + (2.0**-25 if dtype == torch.float16 else 0.0)


def planes_of(packed: PackedWeight) -> triton_linear.Planes:
    """The weight as the products with packed integers read it."""
    on_device = {name: tensor.to(DEVICE) for name, tensor in packed.tensors.items()}
    return laid_out(triton_linear.prepare, dataclasses.replace(packed, tensors=on_device))
