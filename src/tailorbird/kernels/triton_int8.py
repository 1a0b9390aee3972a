"""Products of activations rounded to int8 with packed integer weights on the GPU, for many rows.

    y = x' @ W.T,  x' = x_scale[m, s] * byte[m, k],  W[n, k] = scale[n, g] * (code[n, k] - zero[n, g])

Activations are rounded as in `reference.to_bytes`: each token has a scale for every `SEGMENT` inputs of a
group of the weight. Codes come from `triton_linear.Planes`, and are multiplied less half their range, which
fits int8 for every width; what that leaves of the zero point is multiplied by sums of bytes:

    sum (code - zero) * byte = sum (code - middle) * byte + (middle - zero) * sum byte

Both are exact in int32, and below 2**23 in a segment, thus exact in float32 too. A row of the result is one
sum in float32 over runs of inputs, first to last, whatever the tile and whatever the other rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tailorbird.kernels.reference import SEGMENT
from tailorbird.kernels.triton_linear import CHUNK, PLANES, Planes, step_inputs
from tailorbird.kernels.triton_runtime import DTYPES, jit, require, tl
from tailorbird.kernels.triton_tuning import Launch, choose, magnitude

#: how the product may be launched: its sums are the same in every tile
LAUNCHES = (
    Launch(4, 2, (64, 64)),
    Launch(4, 3, (64, 64)),
    Launch(4, 2, (128, 64)),
    Launch(8, 2, (128, 128)),
    Launch(8, 3, (128, 128)),
)


def run_chunks(layout: Planes) -> int:
    """Chunks of `CHUNK` inputs that are summed in integers before they are scaled: as many as never leave a
    segment, and divide every step and group."""
    chunks = -(-layout.group_size // CHUNK)
    one_group = layout.scales.shape[0] == 1
    return next(n for n in (SEGMENT // CHUNK, 2, 1) if one_group or chunks % n == 0)


def round_rows(x: Tensor, layout: Planes) -> tuple[Tensor, Tensor, Tensor]:
    """Activations as `linear` multiplies them.

    Parameters
    ----------
    x : Tensor[rows, in_features], bfloat16, float16 or float32
    layout : Planes
        Of the weight that they will meet, whose groups decide the segments.

    Returns
    -------
    tuple[Tensor[rows, in_features], Tensor[segments, rows], Tensor[runs, rows]]
        int8; float32 scales, `ceil(group_size / SEGMENT)` segments for each group; int32 sums of the bytes of
        each run of `run_chunks` chunks. A segment with what isn't finite has a scale that isn't.

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
    x, (rows, inputs) = x.contiguous(), x.shape
    per_group, run = -(-layout.group_size // SEGMENT), run_chunks(layout) * CHUNK
    segments = layout.scales.shape[0] * per_group
    codes = torch.empty(rows, inputs, dtype=torch.int8, device=x.device)
    scales = torch.empty(segments, rows, dtype=torch.float32, device=x.device)
    sums = torch.empty(-(-inputs // run), rows, dtype=torch.int32, device=x.device)
    if rows:
        # A product and a sum that are rounded once, not twice, would round some numbers to other bytes.
        _round_segment[(rows, segments)](
            x, codes, scales, sums, rows, inputs, layout.group_size, per_group, SEGMENT, run, num_warps=1,
            enable_fp_fusion=False,
        )  # fmt: skip
    return codes, scales, sums


def linear(x: Tensor, layout: Planes) -> Tensor:
    """`x`, rounded to int8, times the weight: `[rows, out_features]` in the dtype of `x`.

    Meant for many rows (prompts, batches); a few take as long as a tile of 64.

    Parameters
    ----------
    x : Tensor[rows, in_features], bfloat16, float16 or float32
    layout : Planes
        From `triton_linear.prepare`.

    Raises
    ------
    ResourceError, ValueError
        As `round_rows`.
    """
    codes, x_scales, sums = round_rows(x, layout)
    rows, outputs, inputs = x.shape[0], layout.out_features, layout.in_features
    y = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    if rows == 0 or outputs == 0:
        return y
    low_bits, high_bits = PLANES[layout.bits]
    groups, has_zeros = layout.scales.shape[0], layout.zeros is not None

    def launch(how: Launch) -> None:
        out, block_rows = how.tile
        _multiply[(-(-outputs // out), -(-rows // block_rows))](
            codes, x_scales, sums, layout.low, layout.low if layout.high is None else layout.high,
            layout.scales, layout.scales if layout.zeros is None else layout.zeros, y,
            rows, outputs, inputs, layout.low.shape[1], groups, -(-layout.group_size // CHUNK),
            x_scales.shape[0] // groups, low_bits, high_bits, has_zeros, step_inputs(layout.bits), CHUNK,
            run_chunks(layout), SEGMENT // CHUNK, out, block_rows, num_warps=how.warps,
            num_stages=how.stages,
        )  # fmt: skip

    case = (layout.bits, has_zeros, layout.group_size, inputs, outputs, magnitude(rows), x.dtype)
    launch(choose("int8", case, LAUNCHES, launch, x.device))
    return y


@jit
def _round_segment(
    x, codes, scales, sums, rows, inputs, group_size, per_group, SEGMENT: tl.constexpr, RUN: tl.constexpr
):  # fmt: skip
    """One segment of one row: bytes, their scale, and their sums over runs."""
    row, segment = tl.program_id(0), tl.program_id(1)
    group, within = segment // per_group, segment % per_group
    start = group * group_size + within * SEGMENT
    i = tl.arange(0, SEGMENT)
    there = (i < group_size - within * SEGMENT) & (start + i < inputs)
    at = row.to(tl.int64) * inputs + start + i
    value = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    strange = tl.max((tl.abs(value) < float("inf")).to(tl.int32) ^ 1, 0) > 0
    value = tl.where(strange, 0.0, value)
    largest = tl.max(tl.abs(value), 0)
    empty = largest < 1e-30
    inverse = tl.where(empty, 0.0, tl.div_rn(127.0, tl.where(empty, 1.0, largest)))
    scale = tl.where(empty, 0.0, tl.div_rn(largest, 127.0))
    scale = tl.where(strange, float("nan"), scale)
    # Added to 1.5 * 2**23 a number keeps its whole part only, a tie rounded to even.
    code = (value * inverse + 12582912.0 - 12582912.0).to(tl.int32)
    tl.store(codes + at, code.to(tl.int8), mask=there)
    tl.store(scales + segment * rows + row, scale)
    run = start // RUN + tl.arange(0, SEGMENT // RUN)
    total = tl.sum(tl.reshape(code, [SEGMENT // RUN, RUN]), 1)
    own = (tl.arange(0, SEGMENT // RUN) * RUN < group_size - within * SEGMENT) & (run * RUN < inputs)
    tl.store(sums + run * rows + row, total, mask=own)


@jit
def _multiply(
    codes, x_scales, sums, low, high, scales, zeros, y,
    rows, outputs, inputs, words, groups, group_chunks, group_segments,
    LOW: tl.constexpr, HIGH: tl.constexpr, HAS_ZEROS: tl.constexpr, STEP: tl.constexpr,
    CHUNK: tl.constexpr, RUN: tl.constexpr, SEGMENT_CHUNKS: tl.constexpr, OUT: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """`OUT` outputs of `ROWS` rows, over all inputs."""
    n = tl.program_id(0) * OUT + tl.arange(0, OUT)
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, CHUNK)
    n_there, m_there = n < outputs, m < rows
    row_of_words = n.to(tl.int64)[:, None] * words
    row_of_codes = m.to(tl.int64)[None, :] * inputs
    middle: tl.constexpr = 1 << (LOW + HIGH - 1)
    total = tl.zeros([OUT, ROWS], tl.float32)
    for start in range(0, inputs, STEP):
        at = row_of_words + (start // STEP * CHUNK + j)[None, :]
        low_words = tl.load(low + at, mask=n_there[:, None], other=0)
        if HIGH > 0:
            high_words = tl.load(high + at, mask=n_there[:, None], other=0).to(tl.int32)
        for i in tl.static_range(STEP // CHUNK):
            if i % RUN == 0:
                run = tl.zeros([OUT, ROWS], tl.int32)
            code = (low_words >> (i * LOW)) & ((1 << LOW) - 1)
            if HIGH > 0:
                code |= ((high_words >> (i * HIGH)) & ((1 << HIGH) - 1)) << LOW
            k = start + i * CHUNK + j
            there = m_there[None, :] & (k < inputs)[:, None]
            activation = tl.load(codes + row_of_codes + k[:, None], mask=there, other=0)
            run = tl.dot((code - middle).to(tl.int8), activation, run, out_dtype=tl.int32)
            if i % RUN == RUN - 1:
                # What a step reaches beyond the inputs counts nothing: bytes, their sums and scales are 0.
                chunk = start // CHUNK + i - (RUN - 1)
                known = m_there & (chunk * CHUNK < inputs)
                group = tl.minimum(chunk // group_chunks, groups - 1)
                segment = group * group_segments + (chunk - group * group_chunks) // SEGMENT_CHUNKS
                scale = tl.load(scales + group * outputs + n, mask=n_there, other=0.0).to(tl.float32)
                x_scale = tl.load(x_scales + segment * rows + m, mask=known, other=0.0)
                if HAS_ZEROS:
                    zero = tl.load(zeros + group * outputs + n, mask=n_there, other=0).to(tl.int32)
                    sum_of_run = tl.load(sums + chunk // RUN * rows + m, mask=known, other=0)
                    run += (middle - zero)[:, None] * sum_of_run[None, :]
                total = tl.fma(run.to(tl.float32), scale[:, None] * x_scale[None, :], total)
    target = y + m.to(tl.int64)[None, :] * outputs + n[:, None]
    tl.store(target, total.to(y.dtype.element_ty), mask=n_there[:, None] & m_there[None, :])
