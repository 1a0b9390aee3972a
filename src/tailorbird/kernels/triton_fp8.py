"""Products in FP8 (e4m3) on GPUs that have it: compute capability 8.9 and above.

    y = (x8 @ W8.T) * x_scale[m] * w_scale[n],  x = x_scale[m] * x8,  W = w_scale[n] * W8

Each token and each row of the weight has a scale that puts its largest value at 448, the format's largest
(Micikevicius et al. 2022, https://arxiv.org/abs/2209.05433). Sums are float32; the tensor cores of compute
capability 9.0 add up `STEP` products with fewer bits, which the kernel then adds in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tailorbird.errors import ResourceError
from tailorbird.kernels.triton_runtime import DTYPES, interpreted, jit, require, tl
from tailorbird.kernels.triton_tuning import Launch, choose, magnitude

#: dtype of the codes, and its largest value
FP8, LARGEST = torch.float8_e4m3fn, 448.0
#: first compute capability whose tensor cores multiply FP8
CAPABILITY = (8, 9)
#: inputs of one step, and of one sum inside the tensor cores; values that are rounded at once
STEP, BLOCK = 128, 1024
#: how the product may be launched: the weight's rows fill whole instructions in each, so that the order of
#: the sums is the same
LAUNCHES = (
    Launch(4, 3, (64, 64)),
    Launch(8, 3, (128, 128)),
    Launch(8, 4, (128, 128)),
    Launch(4, 4, (128, 64)),
    Launch(8, 3, (128, 256)),
)


@dataclass(frozen=True, eq=False)
class Codes:
    """Rows in FP8.

    Parameters
    ----------
    values : Tensor[rows, in_features], float8_e4m3fn
    scales : Tensor[rows], float32
    """

    values: Tensor
    scales: Tensor


def has_fp8(device: torch.device) -> bool:
    """Whether products in FP8 run there: on a CUDA device of `CAPABILITY`, or in Triton's interpreter."""
    if device.type == "cuda" and torch.version.cuda is not None:
        return torch.cuda.get_device_capability(device) >= CAPABILITY
    return interpreted()


def to_fp8(rows: Tensor) -> Codes:
    """Rows rounded to FP8, to the nearest and to even, each with a scale of its own; on any device.

    Parameters
    ----------
    rows : Tensor[rows, in_features], floating point
        A row with a value that isn't finite becomes NaN where it stands, or altogether.
    """
    values = rows.float()
    largest = values.abs().amax(-1)
    # PyTorch divides a number by a tensor, and on GPUs a tensor by a number, with two roundings.
    top, empty = torch.full_like(largest, LARGEST), largest < 1e-30
    inverse = torch.where(empty, 0.0, top / largest)
    scales = torch.where(empty, 0.0, largest / top)
    return Codes((values * inverse.unsqueeze(-1)).to(FP8), scales)


def round_rows(x: Tensor) -> Codes:
    """`to_fp8` in one kernel: equal values and scales for finite activations, but no zero keeps a sign.

    Parameters
    ----------
    x : Tensor[rows, in_features], bfloat16, float16 or float32

    Raises
    ------
    ResourceError
        Without Triton or a CUDA device that has FP8.
    ValueError
        For another shape or dtype of `x`.
    """
    require(x)
    if not has_fp8(x.device):
        raise ResourceError(
            f"a product in FP8 on a GPU of compute capability {_capability(x.device)}",
            f"{CAPABILITY[0]}.{CAPABILITY[1]} or more",
            "round activations to int8, or leave them as they are",
        )
    if x.dim() != 2 or x.dtype not in DTYPES:
        raise ValueError(f"activations {x.dtype} {list(x.shape)}; expected two dimensions of a float dtype")
    x = x.contiguous()
    codes = Codes(torch.empty_like(x, dtype=FP8), torch.empty(len(x), dtype=torch.float32, device=x.device))
    if x.numel():
        # A product and a sum that are rounded once, not twice, would round some numbers to other codes.
        _round_row[(len(x),)](
            x, codes.values, codes.scales, x.shape[1], LARGEST, BLOCK, num_warps=4, enable_fp_fusion=False
        )
    return codes


def linear(x: Tensor, weight: Codes) -> Tensor:
    """`x`, rounded to FP8, times the weight: `[rows, out_features]` in the dtype of `x`.

    Parameters
    ----------
    x : Tensor[rows, in_features], bfloat16, float16 or float32
    weight : Codes
        Of `[out_features, in_features]` (`to_fp8`).

    Raises
    ------
    ResourceError
        As `round_rows`, or where `x` and the weight aren't on one device.
    ValueError
        For shapes or dtypes that don't fit.
    """
    require(x, weight.values, weight.scales)
    if weight.values.dtype != FP8 or x.shape[1:] != weight.values.shape[1:]:
        raise ValueError(
            f"activations {list(x.shape)} and a weight {weight.values.dtype} {list(weight.values.shape)}; "
            f"expected [rows, in_features] and {FP8} [out_features, in_features]"
        )
    codes = round_rows(x)
    rows, (outputs, inputs) = len(x), weight.values.shape
    y = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    if rows == 0 or outputs == 0:
        return y

    def launch(how: Launch) -> None:
        out, block_rows = how.tile
        _multiply[(-(-outputs // out), -(-rows // block_rows))](
            codes.values, codes.scales, weight.values, weight.scales, y, rows, outputs, inputs, STEP, out,
            block_rows, num_warps=how.warps, num_stages=how.stages,
        )  # fmt: skip

    launch(choose("fp8", (inputs, outputs, magnitude(rows), x.dtype), LAUNCHES, launch, x.device))
    return y


def _capability(device: torch.device) -> str:
    if device.type != "cuda":
        return "none"
    return ".".join(map(str, torch.cuda.get_device_capability(device)))


@jit
def _round_row(x, values, scales, inputs, LARGEST: tl.constexpr, BLOCK: tl.constexpr):
    """One row: its scale, then its codes."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    largest_of_lane = tl.zeros([BLOCK], tl.float32)
    for start in range(0, inputs, BLOCK):
        value = tl.load(x + row * inputs + start + i, mask=start + i < inputs, other=0.0).to(tl.float32)
        largest_of_lane = tl.maximum(largest_of_lane, tl.abs(value))
    largest = tl.max(largest_of_lane, 0)
    empty = largest < 1e-30
    inverse = tl.where(empty, 0.0, tl.div_rn(LARGEST, tl.where(empty, 1.0, largest)))
    tl.store(scales + row, tl.where(empty, 0.0, tl.div_rn(largest, LARGEST)))
    for start in range(0, inputs, BLOCK):
        there = start + i < inputs
        value = tl.load(x + row * inputs + start + i, mask=there, other=0.0).to(tl.float32) * inverse
        # Codes from one power of two to the next are 2**-3 of it apart, below 2**-6 as far as there. Added to
        # 1.5 * 2**23 such steps a number keeps whole ones only, a tie rounded to even: the cast is exact.
        power = (value.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        steps = tl.maximum(power, 0.015625) * 1572864.0
        value = value + steps - steps
        tl.store(values + row * inputs + start + i, value.to(tl.float8e4nv), mask=there)


@jit
def _multiply(
    x, x_scales, weight, scales, y, rows, outputs, inputs,
    STEP: tl.constexpr, OUT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`OUT` outputs of `ROWS` rows, over all inputs. The weight is the left operand, so that the rows of an
    instruction are outputs, however many tokens there are."""
    n = tl.program_id(0) * OUT + tl.arange(0, OUT)
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, STEP)
    n_there, m_there = n < outputs, m < rows
    from_weight = weight + n.to(tl.int64)[:, None] * inputs + j[None, :]
    from_x = x + m.to(tl.int64)[None, :] * inputs + j[:, None]
    total = tl.zeros([OUT, ROWS], tl.float32)
    for start in range(0, inputs, STEP):
        there = start + j < inputs
        value = tl.load(from_weight + start, mask=n_there[:, None] & there[None, :], other=0.0)
        activation = tl.load(from_x + start, mask=there[:, None] & m_there[None, :], other=0.0)
        total = tl.dot(value, activation, total, max_num_imprecise_acc=STEP)
    scale = tl.load(scales + n, mask=n_there, other=0.0)
    x_scale = tl.load(x_scales + m, mask=m_there, other=0.0)
    total *= scale[:, None] * x_scale[None, :]
    target = y + m.to(tl.int64)[None, :] * outputs + n[:, None]
    tl.store(target, total.to(y.dtype.element_ty), mask=n_there[:, None] & m_there[None, :])
