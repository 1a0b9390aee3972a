"""Every method by name: where it comes from, what it needs, what it fills, and what it costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tailorbird.adapt.methods.registry import KNOWN
from tailorbird.adapt.optimizers.registry import OPTIMIZERS
from tailorbird.adapt.starts.registry import STARTS
from tailorbird.compress.allocation import JUDGING
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
#: time of a compression at 2 bits beside one with `gptq`, to one digit; what stands before, beside or after a
#: linear method with one (`benchmarks/results/quality_per_byte/gpt2-wikitext2-1m/2-bits`)
_TIMES = {
    "rtn": 0.02, "gptq": 1, "spqr": 1, "llm-int8": 0.4, "quantease": 1, "leanquant": 1, "ganq": 1, "bcq": 2,
    "billm": 2, "decoupleq": 1, "yaqa": 2, "higgs": 0.04, "hadamard": 1, "awq": 1, "cfp": 1, "outliertune": 1,
    "eora": 2, "lq-lora": 4, "signround": 10, "flexround": 8, "efficientqat": 30, "omniquant": 30, "cbq": 30,
}  # fmt: skip
_UNMEASURED = "not measured"
#: what is in memory at once of the models, by the stage of a recipe where it isn't a block
_MEMORY = {"block": "block, gradients", "whole": "source and result, gradients"}
_BLOCK, _WINDOW, _SKETCHED = "block", "blocks of a window, gradients", "block, gradients, sketches"
#: the same of allocators that judge whole models, and of what tunes
_JUDGED, _TUNED = "source, versions of its places", "model, what is learned"
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
    cost : str
        Time of a compression with it beside one with `gptq`, on a model of a million parameters; of planning
        and tuning it wasn't measured.
    memory : str
        What of the models is in memory at once.
    """

    name: str
    family: str
    kind: str
    paper: str
    needs: str
    fills: str
    cost: str
    memory: str


def all_methods() -> list[MethodRow]:
    """All there are: of compression by the stages of a recipe, of planning, of tuning."""
    allocators: dict[str, Any] = {**ALLOCATORS, **OF_BUDGETS}
    tuning: dict[str, Any] = {**KNOWN, **STARTS, **OPTIMIZERS}
    return [
        *_of_recipes(),
        *(
            MethodRow(
                name,
                kind.family,
                kind.kind,
                kind.paper,
                kind.requirements,
                "the plan",
                _UNMEASURED,
                _JUDGED if name in JUDGING else _BLOCK,
            )
            for name, kind in allocators.items()
        ),
        *(
            MethodRow(
                name,
                kind.family,
                kind.kind,
                kind.paper,
                kind.needs,
                _TUNING[kind.family],
                _UNMEASURED,
                _TUNED,
            )
            for name, kind in tuning.items()
        ),
    ]


def _of_recipes() -> Iterator[MethodRow]:
    for stage, fills in _FILLS.items():
        for name, kind in STAGES[stage].items():
            read = getattr(kind(), "needs", kind.requirements)
            needs = ", ".join(words for key, words in _NEEDS.items() if key in read) or "nothing"
            cost = f"{_TIMES[name]:g}x gptq" if name in _TIMES else _UNMEASURED
            yield MethodRow(
                name, kind.family, kind.kind, kind.paper, needs, _filled(kind) or fills, cost,
                _memory(stage, kind, read),
            )  # fmt: skip


def _memory(stage: str, kind: Any, read: frozenset[str]) -> str:
    """What of the models a method of a recipe has in memory at once."""
    if "sketch" in read:
        return _SKETCHED
    if stage == "block" and kind().window > 1:
        return _WINDOW
    return _MEMORY.get(stage, _BLOCK)


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
