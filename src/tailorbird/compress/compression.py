"""What a compression is to do, fixed before it starts, and what the result says of it in ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from tailorbird.calibrate.statistics import LinearStatistics
from tailorbird.compress.blocks.method import BlockMethod
from tailorbird.compress.whole.method import ModelMethod
from tailorbird.formats.packed import Coding, LowRank, PackedCoding, coding_to_dict
from tailorbird.formats.sparse import Sparse
from tailorbird.formats.transform import Transform, transform_to_dict
from tailorbird.linear import FoldMethod, LinearMethod
from tailorbird.linear.correct import Correction
from tailorbird.model.anatomy import Anatomy


@dataclass(frozen=True)
class Compression:
    """What the pipeline needs to know, fixed before it starts.

    Attributes
    ----------
    codings : dict
        Place -> coding; a place that isn't named stays as it is stored.
    method : LinearMethod
        Rounds the linears inside the blocks, and the head.
    ids : LongTensor ``[windows, length]`` or None
        Calibration tokens; None only for a method that needs none, without a fold.
    tied : LinearStatistics or None
        By which a tied pair is rounded, where it is compressed (`plan.ends`).
    rotation : dict or None
        By what the source was rotated, in JSON types.
    fold : FoldMethod or None
        Moves scales inside the blocks before their linears are rounded.
    correction : Correction or None
        Puts low-rank parts beside the linears that were rounded.
    low_rank, sparse, transforms : dict
        Linear of the blocks -> its part of that kind.
    block : BlockMethod or None
        Learns the linears of a block, or of several, together, once they are rounded.
    whole : ModelMethod or None
        Learns those of all blocks together, at the end.
    seed : int
        Of what is random in it.
    rounded_inputs : dict of str to str
        Place -> what its inputs are rounded to by those who run the result (`planning.with_rounded_inputs`).
    """

    codings: dict[str, Coding]
    method: LinearMethod
    ids: torch.Tensor | None
    tied: LinearStatistics | None
    rotation: dict[str, Any] | None = None
    fold: FoldMethod | None = None
    correction: Correction | None = None
    low_rank: dict[str, LowRank] = field(default_factory=dict)
    sparse: dict[str, Sparse] = field(default_factory=dict)
    transforms: dict[str, Transform] = field(default_factory=dict)
    block: BlockMethod | None = None
    whole: ModelMethod | None = None
    seed: int = 0
    rounded_inputs: dict[str, str] = field(default_factory=dict)


def quantization_config(
    anatomy: Anatomy,
    codings: dict[str, Coding],
    rounded_inputs: Mapping[str, str],
    input_scales: Mapping[str, float],
    parts: Mapping[str, Mapping[str, LowRank | Sparse | Transform]],
    ordered: frozenset[str],
) -> dict[str, Any]:
    """The entry of ``config.json`` by which the result is loaded; see ``docs/formats.md``.

    `parts` holds, by the key of a kind of part, which linears have one.
    """
    modules: dict[str, Any] = {}
    for place in anatomy.linears():
        coding = codings.get(place.name)
        if isinstance(coding, PackedCoding):
            modules[place.name] = {
                "out": place.out_features, "in": place.in_features, "bias": place.bias,
                "coding": coding_to_dict(coding), "order": place.name in ordered,
            }  # fmt: skip
    for name in dict.fromkeys((anatomy.embedding, anatomy.head)):
        coding = codings.get(name)
        if isinstance(coding, PackedCoding):
            out_features, in_features = anatomy.end_shape(name)
            modules[name] = {
                "out": out_features, "in": in_features, "bias": False,
                "coding": coding_to_dict(coding), "order": name in ordered,
            }  # fmt: skip
    for name in modules.keys() & rounded_inputs.keys():
        modules[name]["activation"] = rounded_inputs[name]
    for name, scale in input_scales.items():
        modules[name]["input_scale"] = scale
    for key, found in parts.items():
        for name, part in found.items():
            modules[name][key] = transform_to_dict(part) if isinstance(part, Transform) else asdict(part)
    return {
        "quant_method": "tailorbird",
        "schema": 1,
        "modules": modules,
        "embedding": anatomy.embedding,
        "head": anatomy.head,
        "tied": anatomy.tied,
    }
