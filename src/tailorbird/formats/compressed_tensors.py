"""Packed weights in the `pack-quantized` layout of compressed-tensors.

That layout packs each row's codes as one little-endian bit stream too, in 32-bit words, so that the
codes only need padding. Its value is `(code - zero) * scale` with both code and zero shifted by
`2**(bits - 1)`, which leaves their difference as it is.

Symmetric codings in whole groups come into the strategies `group` and `channel`, which every reader
knows. Those with zero points, or with a last group that is shorter, come into blocks of one row
(`block`, `[1, group_size]`), which compressed-tensors and transformers read but serving engines may
not: the packed zero points of `group` are what transformers 5.23 can't load into the empty model that
compressed-tensors 0.20 makes. What the layout has no place for is refused with the reason.

The layout is that of https://github.com/vllm-project/compressed-tensors (`pack_quantized`) from
version 0.17; earlier readers pack 3, 5 and 6 bits differently.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

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
    IntegerCoding,
    PackedWeight,
    TableCoding,
    VectorCoding,
)
from tailorbird.kernels.packing import pack_codes, unpack_codes
from tailorbird.kernels.reference import group_layout

FORMAT = "pack-quantized"


def refusal(
    coding: Coding, in_features: int, has_order: bool = False, beside: str | None = None
) -> str | None:
    """Why the layout can't hold a weight of this coding exactly; None where it can.

    Float codings have no place in it either: such weights are stored plainly, outside the layout. `beside`
    names what there is besides codes, if anything.
    """
    if isinstance(coding, FloatCoding):
        return f"`{coding.label}` is not an integer coding"
    if isinstance(coding, VectorCoding):
        return f"the points of `{coding.codebook}` have no place in it"
    if isinstance(coding, CodebookCoding | DoubleCoding):
        return f"the levels of `{coding.codebook}` have no place in it"
    if isinstance(coding, EntropyCoding):
        return "its entropy-coded values have no place in it"
    if isinstance(coding, TableCoding):
        return "the tables of its rows have no place in it"
    if isinstance(coding, BinaryCoding):
        return "the magnitudes of its groups have no place in it"
    if beside is not None:
        return f"its {beside} has no place in it"
    groups, _ = group_layout(in_features, coding.group_size)
    if has_order and groups > 1:
        return "its columns are stored in another order than the inputs', across groups"
    return None


def scheme(coding: IntegerCoding, in_features: int) -> dict[str, Any]:
    """Arguments of the weights' quantization, as they stand in a config group."""
    groups, size = group_layout(in_features, coding.group_size)
    arguments: dict[str, Any] = {
        "num_bits": coding.bits,
        "type": "int",
        "symmetric": coding.symmetric,
        "dynamic": False,
    }
    if not coding.symmetric or groups * size != in_features:
        return arguments | {"strategy": "block", "block_structure": [1, size]}
    if groups == 1:
        return arguments | {"strategy": "channel"}
    return arguments | {"strategy": "group", "group_size": size}


def convert(weight: PackedWeight) -> dict[str, Tensor]:
    """The stored tensors of one module.

    Parameters
    ----------
    weight : PackedWeight
        Of an integer coding.

    Returns
    -------
    dict[str, Tensor]
        `weight_packed` int32 `[out, ceil(in * bits / 32)]`; `weight_scale` `[out, groups]`;
        `weight_shape` int64 `[2]`; unless symmetric `weight_zero_point` int8 `[out, groups]`.

    Raises
    ------
    ExportError
        With the reason of `refusal`.
    """
    coding = weight.coding
    reason = refusal(coding, weight.in_features, "order" in weight.tensors, weight.named_part)
    if reason is not None or not isinstance(coding, IntegerCoding):
        raise ExportError(
            f"a weight of `{coding.label}` [{weight.out_features}, {weight.in_features}]: {reason}",
            "integers in the inputs' order",
            "export to `dense` instead",
        )
    codes = weight.tensors["codes"]
    if "order" in weight.tensors:  # one group per row: moving columns back changes nothing else
        position = torch.argsort(weight.tensors["order"])
        codes = pack_codes(unpack_codes(codes, coding.bits, weight.in_features)[:, position], coding.bits)
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 4)).contiguous()
    tensors = {
        "weight_packed": padded.view(torch.int32),
        "weight_scale": weight.tensors["scales"],
        "weight_shape": torch.tensor([weight.out_features, weight.in_features]),
    }
    if not coding.symmetric:
        groups, _ = group_layout(weight.in_features, coding.group_size)
        zeros = unpack_codes(weight.tensors["zeros"], coding.bits, groups).to(torch.int16)
        tensors["weight_zero_point"] = (zeros - (1 << (coding.bits - 1))).to(torch.int8)
    return tensors


def quantization_config(
    schemes: Mapping[str, Mapping[str, Any]], ignored: list[str], version: str
) -> dict[str, Any]:
    """The value of `quantization_config` in config.json.

    Parameters
    ----------
    schemes : mapping of module path to `scheme(...)`
        Modules of equal scheme come into one group, whose targets are their exact paths.
    ignored : list of str
        Linears that stay dense.
    version : str
        Of compressed-tensors, for which this is written.
    """
    groups: list[tuple[Mapping[str, Any], list[str]]] = []
    for module, arguments in schemes.items():
        for known, members in groups:
            if known == arguments:
                members.append(module)
                break
        else:
            groups.append((arguments, [module]))
    return {
        "quant_method": "compressed-tensors",
        "version": version,
        "format": FORMAT,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": ignored,
        "config_groups": {
            f"group_{i}": {
                "targets": ["re:^" + re.escape(module) + "$" for module in members],
                "weights": dict(arguments),
                "input_activations": None,
                "output_activations": None,
                "format": FORMAT,
            }
            for i, (arguments, members) in enumerate(groups)
        },
    }
