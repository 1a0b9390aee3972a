"""Every method by name: where it comes from, what it needs, and what it fills."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tailorbird.adapt.methods.registry import KNOWN
from tailorbird.adapt.optimizers.registry import OPTIMIZERS
from tailorbird.adapt.starts.registry import STARTS
from tailorbird.compress.blocks.flatquant import FlatQuant
from tailorbird.compress.recipe import STAGES
from tailorbird.formats.packed import (
    BinaryCoding,
    CodebookCoding,
    DoubleCoding,
    EntropyCoding,
    IntegerCoding,
    TableCoding,
    VectorCoding,
)
from tailorbird.linear.quantize.higgs import Higgs
from tailorbird.plan.allocators import ALLOCATORS, OF_BUDGETS

#: order in which the stages of a recipe are listed, and what each but the linear methods fills
_FILLS = {
    "method": "",
    "rotation": "the source's weights, turned",
    "fold": "the source's weights, scaled",
    "correction": "low-rank part",
    "block": "codes and scales",
    "whole": "codes and scales",
}
#: what linear methods fill, by the kind of coding
_CODES = {
    IntegerCoding.kind: "integers",
    CodebookCoding.kind: "codebooks",
    VectorCoding.kind: "points",
    DoubleCoding.kind: "codebooks with codes for scales",
    TableCoding.kind: "tables of rows",
    BinaryCoding.kind: "signs and magnitudes",
    EntropyCoding.kind: "coded bfloat16",
}
#: what methods read
_NEEDS = {
    "gram": "Gram matrix",
    "cross": "cross matrix",
    "attention": "attention",
    "sketch": "gradients of the model",
    "outputs": "outputs and gradients of the block",
    "logits": "both models in memory, gradients",
}
_TUNING = {
    "adapter": "an adapter",
    "full": "the model's own weights",
    "start": "where an adapter begins",
    "optimizer": "what is learned",
}


@dataclass(frozen=True)
class MethodRow:
    """One row of `methods`.

    Attributes
    ----------
    needs : str
        As its settings are if nothing is said.
    fills : str
        Which part of a result it makes.
    """

    name: str
    family: str
    kind: str
    paper: str
    needs: str
    fills: str


def all_methods() -> list[MethodRow]:
    """All there are: of compression by the stages of a recipe, of planning, of tuning."""
    allocators: dict[str, Any] = {**ALLOCATORS, **OF_BUDGETS}
    tuning: dict[str, Any] = {**KNOWN, **STARTS, **OPTIMIZERS}
    return [
        *_of_recipes(),
        *(
            MethodRow(name, kind.family, kind.kind, kind.paper, kind.requirements, "the plan")
            for name, kind in allocators.items()
        ),
        *(
            MethodRow(name, kind.family, kind.kind, kind.paper, kind.needs, _TUNING[kind.family])
            for name, kind in tuning.items()
        ),
    ]


def _of_recipes() -> Iterator[MethodRow]:
    for stage, fills in _FILLS.items():
        for name, kind in STAGES[stage].items():
            read = getattr(kind(), "needs", kind.requirements)
            needs = ", ".join(words for key, words in _NEEDS.items() if key in read) or "nothing"
            yield MethodRow(name, kind.family, kind.kind, kind.paper, needs, _filled(kind) or fills)


def _filled(kind: Any) -> str:
    """What a linear method fills, or one that learns an input transform; nothing for others."""
    if kind is FlatQuant:
        return f"{_FILLS['block']}, input transform"
    parts = [words for coding, words in _CODES.items() if coding in getattr(kind, "makes", ())]
    if any(field.name == "outliers" for field in dataclasses.fields(kind)):
        parts.append("sparse part")
    if kind is Higgs:
        parts.append("input transform")
    return ", ".join(parts)
