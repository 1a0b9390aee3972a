"""Packed weights as the blocks of GGUF, where a block type holds exactly the same numbers.

GGUF's plain types have 32 values per block, one float16 scale and a fixed zero point, so that only
symmetric codings with float16 scales and groups of whole blocks come across without a change; a
group's scale is repeated in each of its blocks. Anything else is refused with the reason.

The layouts are those of `ggml-common.h` in https://github.com/ggml-org/ggml:
`Q4_0` scale, 16 bytes (value j in the low half of byte j, value j + 16 in the high half);
`Q5_0` scale, 32 fifth bits, the same 16 bytes; `Q8_0` scale, 32 signed bytes.
The file around the tensors is written in `compress/gguf_file.py`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tailorbird.errors import ExportError
from tailorbird.formats.packed import (
    BinaryCoding,
    CodebookCoding,
    Coding,
    DoubleCoding,
    EntropyCoding,
    FloatCoding,
    GroupedCoding,
    PackedWeight,
    TableCoding,
    VectorCoding,
)
from tailorbird.kernels.packing import unpack_codes
from tailorbird.kernels.reference import group_layout

#: values per block
BLOCK = 32
#: type -> bytes of one block
BLOCK_BYTES = {"Q4_0": 18, "Q5_0": 22, "Q8_0": 34}
_INTEGER_TYPES = {2: "Q4_0", 3: "Q4_0", 4: "Q4_0", 5: "Q5_0", 6: "Q8_0", 8: "Q8_0"}
_FLOAT_TYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def refusal(
    coding: Coding, in_features: int, has_order: bool = False, beside: str | None = None
) -> str | None:
    """Why no GGUF type holds a weight of this coding exactly; None where one does.

    `beside` names what there is besides codes, if anything.
    """
    if beside is not None:
        return f"its {beside} has no place in GGUF's block types"
    if isinstance(coding, FloatCoding):
        return None
    if isinstance(coding, VectorCoding):
        return f"the points of `{coding.codebook}` have no place in GGUF's block types"
    if isinstance(coding, CodebookCoding | DoubleCoding):
        return f"the levels of `{coding.codebook}` have no place in GGUF's block types"
    if isinstance(coding, EntropyCoding):
        return "its entropy-coded values have no place in GGUF's block types"
    if isinstance(coding, TableCoding):
        return "the tables of its rows have no place in GGUF's block types"
    if isinstance(coding, BinaryCoding):
        return "the magnitudes of its groups have no place in GGUF's block types"
    _, size = group_layout(in_features, coding.group_size)
    if not coding.symmetric:
        return "its zero points have no place in GGUF's block types"
    if coding.scale_dtype != "float16":
        return f"its scales are {coding.scale_dtype}, GGUF's are float16"
    if in_features % BLOCK:
        return f"its rows of {in_features} don't divide into blocks of {BLOCK}"
    if size % BLOCK:
        return f"its groups of {size} don't divide into blocks of {BLOCK}"
    if has_order:
        return "its columns are stored in another order than the inputs'"
    return None


def gguf_type(coding: Coding) -> str:
    """Name of the type for a coding that isn't refused: 2 to 4 bits `Q4_0`, 5 `Q5_0`, 6 and 8 `Q8_0`."""
    if isinstance(coding, FloatCoding):
        return _FLOAT_TYPES[coding.dtype]
    return _INTEGER_TYPES[coding.bits]


def gguf_bytes(coding: Coding, out_features: int, in_features: int) -> int:
    """Bytes that the weight takes in GGUF."""
    name = gguf_type(coding)
    if isinstance(coding, FloatCoding):
        return out_features * in_features * coding.bits // 8
    return out_features * (in_features // BLOCK) * BLOCK_BYTES[name]


def blocks(weight: PackedWeight) -> Tensor:
    """The weight as rows of blocks.

    Parameters
    ----------
    weight : PackedWeight

    Returns
    -------
    Tensor[out_features, bytes per row], uint8
        Of type `gguf_type(weight.coding)`.

    Raises
    ------
    ExportError
        With the reason of `refusal`.
    """
    coding = weight.coding
    reason = refusal(coding, weight.in_features, "order" in weight.tensors, weight.named_part)
    if reason is not None:
        raise ExportError(
            f"a weight of `{coding.label}` [{weight.out_features}, {weight.in_features}]: {reason}",
            "symmetric integers with float16 scales and groups of whole blocks, or floats",
            "plan it anew with `fit --target gguf`, or export to `dense`",
        )
    if isinstance(coding, FloatCoding):
        return weight.tensors["weight"].contiguous().view(torch.uint8)
    assert isinstance(coding, GroupedCoding)  # others are refused above
    values = unpack_codes(weight.tensors["codes"], coding.bits, weight.in_features)
    values = values.view(weight.out_features, -1, BLOCK)
    _, size = group_layout(weight.in_features, coding.group_size)
    scales = weight.tensors["scales"].repeat_interleave(size // BLOCK, dim=1)[:, : values.shape[1]]
    parts = [scales.contiguous().unsqueeze(-1).view(torch.uint8), *_block_values(values, coding)]
    return torch.cat(parts, dim=-1).flatten(1)


def _block_values(values: Tensor, coding: GroupedCoding) -> list[Tensor]:
    """What follows the scale in each block; `values` are codes `[out, blocks, 32]`."""
    name = gguf_type(coding)
    zero = 1 << (coding.bits - 1)
    if name == "Q8_0":
        return [(values.to(torch.int16) - zero).to(torch.int8).view(torch.uint8)]
    # Q4_0 and Q5_0 have their zero at 8 and 16; fewer bits than 4 move up to it.
    values = values + max(0, 8 - zero)
    low = values & 0x0F
    halves = low[..., : BLOCK // 2] | (low[..., BLOCK // 2 :] << 4)
    if name == "Q4_0":
        return [halves]
    bits = (values >> 4).view(*values.shape[:-1], 4, 8)
    place = torch.tensor([1 << i for i in range(8)], dtype=torch.uint8, device=values.device)
    return [(bits * place).sum(-1, dtype=torch.uint8), halves]


def interleave_rotary(rows: Tensor, heads: int) -> Tensor:
    """Reorder the rows of q or k from transformers' rotary order to that of GGUF's Llama.

    transformers turns the pairs (i, i + d/2) of a head of d rows, GGUF's Llama the pairs (2i, 2i + 1).

    Parameters
    ----------
    rows : Tensor[heads * d, ...]
    heads : int
    """
    shape = rows.shape
    paired = rows.reshape(heads, 2, shape[0] // heads // 2, *shape[1:])
    return paired.transpose(1, 2).reshape(shape)


def interleave_weight(weight: PackedWeight, heads: int) -> PackedWeight:
    """`interleave_rotary` of a packed weight, exactly; its columns stay."""
    tensors = {
        name: tensor if name == "order" else interleave_rotary(tensor, heads)
        for name, tensor in weight.tensors.items()
    }
    return replace(weight, tensors=tensors)
