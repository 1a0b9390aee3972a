"""Products with packed integer weights on the GPU, straight from the codes.

    y = x @ W.T,  W[n, k] = scale[n, g] * (code[n, k] - zero[n, g])

Codes are split into planes, and each plane lies in words whose fields are apart by a shift:

    bits     2    3    4    5    6    8
    low      2    2    4    4    4    8     fields of 32-bit words
    high     -    1    -    1    2    -     fields of words of 8 or 16 bits
    step   512  512  256  256  256  128     inputs in `CHUNK` words

Field `i` of word `j` of a step is the code of input `i * CHUNK + j` of the step, so that one shift of
`CHUNK` words gives the codes of `CHUNK` consecutive inputs, and no plane wastes a bit. A code less its
zero point is an integer of at most 9 bits with its sign, exact in bfloat16 and float16: what is multiplied
are integers and activations as they are, summed in float32 over a group, then scaled in float32.

A row of the result is summed in an order that depends on in_features and the coding only: parts of
`part_inputs` inputs, one program each, are added by a second kernel, first to last.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tailorbird.errors import SettingsError
from tailorbird.kernels.packing import row_chunks, unpack_codes
from tailorbird.kernels.reference import group_layout
from tailorbird.kernels.triton_runtime import DTYPES, jit, operand, require, tl, triton
from tailorbird.kernels.triton_tuning import Launch, choose

#: bits -> bits of the (low, high) plane
PLANES = {2: (2, 0), 3: (2, 1), 4: (4, 0), 5: (4, 1), 6: (4, 2), 8: (8, 0)}
#: consecutive inputs that one shift of a step's words gives; groups hold a multiple of it
CHUNK = 32
#: outputs, and at most so many rows of activations, of one program
BLOCK_OUT, BLOCK_ROWS = 64, 64
#: bytes of one step's activations, at most: two of them fit into the shared memory of consumer cards
STEP_BYTES = 32768
#: codes below which a product is too short for its launch to matter
SMALL = 1 << 20


@dataclass(frozen=True, eq=False)
class Planes:
    """A weight as the kernel reads it.

    Parameters
    ----------
    low : Tensor[out_features, steps * CHUNK], int32
    high : Tensor[out_features, steps * CHUNK], uint8 or int16, or None
        The upper bits of codes of 3, 5 and 6 bits.
    scales : Tensor[groups, out_features], float16 or bfloat16
    zeros : Tensor[groups, out_features], uint8, or None
        None means symmetric.
    bits, in_features, out_features : int
    group_size : int
        Inputs per group, the only group's too.
    """

    low: Tensor
    high: Tensor | None
    scales: Tensor
    zeros: Tensor | None
    bits: int
    in_features: int
    out_features: int
    group_size: int

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        parts = (self.low, self.high, self.scales, self.zeros)
        return sum(part.nbytes for part in parts if part is not None)


def serves(coding: Any, in_features: int) -> bool:
    """Whether weights of such a coding can be laid out: one group a row, or groups of whole chunks."""
    groups, size = group_layout(in_features, coding.group_size)
    return coding.levels is None and coding.bits in PLANES and (groups == 1 or size % CHUNK == 0)


def step_inputs(bits: int) -> int:
    """Inputs whose codes share `CHUNK` words of a plane."""
    return CHUNK * 32 // PLANES[bits][0]


def part_inputs(in_features: int) -> int:
    """Inputs that one program sums; a multiple of every step."""
    return 1024 if in_features <= 4096 else 2048


def prepare(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    *,
    bits: int,
    group_size: int,
    in_features: int,
) -> Planes:
    """Lay a stored weight out for `linear`, on the device where it is.

    Parameters
    ----------
    codes, scales, zeros, bits, group_size, in_features
        As in `reference.dequantize`. Groups are one per row, or hold a multiple of `CHUNK` inputs.

    Raises
    ------
    SettingsError
        For other groups or another number of bits.
    """
    groups, size = group_layout(in_features, group_size)
    if bits not in PLANES or (groups > 1 and size % CHUNK):
        raise SettingsError(
            f"{bits} bits in groups of {size}",
            f"2, 3, 4, 5, 6 or 8 bits, and one group per row or groups of a multiple of {CHUNK}",
            "choose another coding, or the reference",
        )
    low_bits, high_bits = PLANES[bits]
    step, fields = step_inputs(bits), 32 // low_bits
    out_features, steps = codes.shape[0], -(-in_features // step)
    low = torch.zeros(out_features, steps, CHUNK, dtype=torch.int32, device=codes.device)
    high = torch.zeros_like(low) if high_bits else None
    for rows in row_chunks(out_features, steps * step):
        values = unpack_codes(codes[rows], bits, in_features)
        values = torch.nn.functional.pad(values, (0, steps * step - in_features))
        values = values.view(-1, steps, fields, CHUNK).int()
        for i in range(fields):
            low[rows] |= (values[:, :, i] & ((1 << low_bits) - 1)) << (i * low_bits)
            if high is not None:
                high[rows] |= (values[:, :, i] >> low_bits) << (i * high_bits)
    if high is not None:
        # Words of 16 bits are stored as int16, whose range the upper half of the values leaves: they wrap.
        high = high.to(torch.uint8 if fields * high_bits == 8 else torch.int16).flatten(1)
    return Planes(
        low.flatten(1),
        high,
        scales.t().contiguous(),
        None if zeros is None else unpack_codes(zeros, bits, groups).t().contiguous(),
        bits,
        in_features,
        out_features,
        size,
    )


def linear(x: Tensor, layout: Planes) -> Tensor:
    """`x` times the weight: `[rows, out_features]` in the dtype of `x`, rounded to it once.

    Meant for up to 64 rows; each 64, or 32 and 16 of few bits and float32, read the weight once.

    Parameters
    ----------
    x : Tensor[rows, in_features], bfloat16, float16 or float32
    layout : Planes

    Raises
    ------
    ResourceError
        Without Triton, or where `x` and the weight aren't on one CUDA device.
    ValueError
        For another shape or dtype of `x`.
    """
    require(x, layout.low)
    if x.dim() != 2 or x.shape[1] != layout.in_features or x.dtype not in DTYPES:
        raise ValueError(
            f"activations {x.dtype} {list(x.shape)}; expected float16, bfloat16 or float32 "
            f"[rows, {layout.in_features}]"
        )
    x, rows, outputs = x.contiguous(), x.shape[0], layout.out_features
    y = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    if rows == 0 or outputs == 0:
        return y
    length = part_inputs(layout.in_features)
    parts = -(-layout.in_features // length)
    sums = y if parts == 1 else torch.empty(parts, rows, outputs, dtype=torch.float32, device=x.device)
    low_bits, high_bits = PLANES[layout.bits]
    step, group_chunks = step_inputs(layout.bits), -(-layout.group_size // CHUNK)
    groups = layout.scales.shape[0]
    # consecutive chunks of one group, summed before they are scaled
    run = next(n for n in (8, 4, 2, 1) if n <= step // CHUNK and (groups == 1 or group_chunks % n == 0))
    most_rows = min(BLOCK_ROWS, STEP_BYTES // (step * x.element_size()))
    block_rows = min(most_rows, max(16, triton.next_power_of_2(rows)))
    stages = 3 if 2 * step * block_rows * x.element_size() <= STEP_BYTES else 2

    def launch(how: Launch) -> None:
        _sum_part[(-(-outputs // BLOCK_OUT), parts, -(-rows // block_rows))](
            x, layout.low, layout.low if layout.high is None else layout.high, layout.scales,
            layout.scales if layout.zeros is None else layout.zeros, sums,
            rows, outputs, layout.in_features, layout.low.shape[1], groups, group_chunks, length,
            low_bits, high_bits, layout.zeros is not None, step, CHUNK, run, operand(x.dtype), BLOCK_OUT,
            block_rows, num_warps=how.warps, num_stages=how.stages,
        )  # fmt: skip

    launches = [Launch(4, stages), Launch(8, stages), Launch(4, stages + 1)]
    case = (layout.bits, layout.zeros is not None, run, layout.in_features, outputs, block_rows, x.dtype)
    worth = outputs * layout.in_features >= SMALL
    launch(choose("linear", case, launches if worth else launches[:1], launch, x.device))
    if parts > 1:
        _add_parts[(-(-rows * outputs // 1024),)](sums, y, rows * outputs, parts, 1024)
    return y


@jit
def _sum_part(
    x, low, high, scales, zeros, sums,
    rows, outputs, inputs, words, groups, group_chunks, length,
    LOW: tl.constexpr, HIGH: tl.constexpr, HAS_ZEROS: tl.constexpr, STEP: tl.constexpr,
    CHUNK: tl.constexpr, RUN: tl.constexpr, OPERAND: tl.constexpr, OUT: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """`OUT` outputs of `ROWS` rows, over one part of the inputs. The weight is the left operand of the
    products, so that their shape along outputs and inputs is the same for every number of rows."""
    n = tl.program_id(0) * OUT + tl.arange(0, OUT)
    part = tl.program_id(1)
    m = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, CHUNK)
    n_there, m_there = n < outputs, m < rows
    row_of_words = n.to(tl.int64)[:, None] * words
    total = tl.zeros([OUT, ROWS], tl.float32)
    zero = tl.full([OUT], 1 << (LOW + HIGH - 1), tl.float32)
    for start in range(part * length, tl.minimum((part + 1) * length, inputs), STEP):
        at = row_of_words + (start // STEP * CHUNK + j)[None, :]
        low_words = tl.load(low + at, mask=n_there[:, None], other=0)
        if HIGH > 0:
            high_words = tl.load(high + at, mask=n_there[:, None], other=0).to(tl.int32)
        for i in tl.static_range(STEP // CHUNK):
            if i % RUN == 0:
                group = tl.minimum((start // CHUNK + i) // group_chunks, groups - 1)
                scale = tl.load(scales + group * outputs + n, mask=n_there, other=0.0).to(tl.float32)
                if HAS_ZEROS:
                    zero = tl.load(zeros + group * outputs + n, mask=n_there, other=0).to(tl.float32)
                run = tl.zeros([OUT, ROWS], tl.float32)
            code = (low_words >> (i * LOW)) & ((1 << LOW) - 1)
            if HIGH > 0:
                code |= ((high_words >> (i * HIGH)) & ((1 << HIGH) - 1)) << LOW
            # as the mantissa of 2**23 + code: cheaper than converting an integer, and exact
            value = (code | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + zero)[:, None]
            k = start + i * CHUNK + j
            there = m_there[None, :] & (k < inputs)[:, None]
            activation = tl.load(x + m[None, :] * inputs + k[:, None], mask=there, other=0.0)
            run = tl.dot(value.to(OPERAND), activation.to(OPERAND), run, input_precision="ieee")
            if i % RUN == RUN - 1:
                total += scale[:, None] * run
    target = sums + (part * rows + m).to(tl.int64)[None, :] * outputs + n[:, None]
    tl.store(target, total.to(sums.dtype.element_ty), mask=n_there[:, None] & m_there[None, :])


@jit
def _add_parts(sums, y, count, parts, BLOCK: tl.constexpr):
    """Adds the parts of each result, first to last."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = sums + i
    total = tl.load(at, mask=i < count, other=0.0)
    for _ in range(1, parts):
        at += count
        total += tl.load(at, mask=i < count, other=0.0)
    tl.store(y + i, total.to(y.dtype.element_ty), mask=i < count)
