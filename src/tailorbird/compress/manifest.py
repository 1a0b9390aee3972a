"""What a result says of itself: ``plan.yaml`` and the data of the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import tailorbird
from tailorbird.calibrate.text import (
    Windows,
)
from tailorbird.compress.compression import Compression
from tailorbird.compress.result import FitResult
from tailorbird.compress.work import Work, machine, record_of
from tailorbird.evaluate.quality import Quality
from tailorbird.formats.packed import (
    FloatCoding,
    coding_to_dict,
    stored_bytes,
)
from tailorbird.linear.folds import FOLDS_FILE, BlockFolds
from tailorbird.plan.budget import Budget
from tailorbird.plan.planfile import Plan
from tailorbird.plan.predict import Prediction
from tailorbird.plan.scores import PlaceScore, Scores


def plan_of(
    work: Work,
    scores: Scores,
    compression: Compression,
    budget: Budget | None,
    predicted: dict[str, dict[str, float]],
    measured: dict[str, dict[str, float]],
    result: FitResult,
    folds: Sequence[BlockFolds],
) -> Plan:
    """The manifest of the result."""
    texts = work.texts

    def text_facts(windows: Windows) -> dict[str, Any]:
        return {
            "source": windows.source,
            "fingerprint": windows.fingerprint,
            "tokens": windows.tokens,
            "sequences": windows.ids.shape[0],
            "length": windows.ids.shape[1],
            "documents": windows.documents,
        }

    places = []
    for place in scores.places:
        coding = compression.codings.get(place.name)
        if coding is None:
            dtype = work.checkpoint.weights.info(f"{place.name}.weight").dtype
            coding = FloatCoding(str(dtype).removeprefix("torch."))
        low_rank, sparse = compression.low_rank.get(place.name), compression.sparse.get(place.name)
        transform = compression.transforms.get(place.name)
        places.append(
            {
                "name": place.name,
                "role": place.role,
                "block": block_of(work, place),
                "shape": list(place.shape),
                "coding": coding_to_dict(coding),
                "activation": compression.rounded_inputs.get(place.name),
                "low_rank": None if low_rank is None else asdict(low_rank),
                "sparse": None if sparse is None else asdict(sparse),
                "transform": None if transform is None else asdict(transform),
                "bytes": stored_bytes(
                    coding,
                    *place.shape,
                    work.has_order(place.name, place.shape[1], coding),
                    low_rank,
                    sparse,
                    transform,
                ),
                "predicted": predicted.get(place.name),
                "measured": measured.get(place.name),
            }
        )
    facts = record_of(work, {})
    return Plan.model_validate(
        {
            "schema": 1,
            "tailorbird": tailorbird.__version__,
            "source": {
                "model": work.name,
                "fingerprint": work.checkpoint.fingerprint,
                "content_hash": scores.content_hash,
                "architecture": work.anatomy.architecture,
                "parameters": work.checkpoint.parameters,
                "licence": work.checkpoint.licence,
            },
            "budget": asdict(budget) if budget else None,
            "method": facts["method"],
            "allocator": work.allocator,
            "target": work.target,
            "calibration": text_facts(texts.calibration),
            "evaluation": text_facts(texts.held_out),
            "machine": machine(),
            "versions": facts["versions"],
            "seed": work.seed,
            "folds": fold_entries(folds),
            "remarks": list(work.remarks) or None,
            "result": {k: v for k, v in asdict(result).items() if k not in ("checks", "warnings")},
            "places": places,
        }
    )


def fold_entries(folds: Sequence[BlockFolds]) -> list[dict[str, Any]] | None:
    """What was folded, block by block in the order in which it was; None where nothing was."""
    entries: list[dict[str, Any]] = []
    for block in folds:
        entries += [{"source": pair.source, "linears": [pair.target]} for pair, _ in block.pairs]
        groups = [group for group, _ in block.norms]
        groups += [group for group, *_ in block.shifts if group not in groups]
        entries += [{"norm": group.norm, "linears": list(group.linears)} for group in groups]
    return [{**entry, "scales_file": FOLDS_FILE} for entry in entries] or None


def block_of(work: Work, place: PlaceScore) -> int | None:
    """Index of the block that `place` belongs to; None for the embedding and the head."""
    return place.block if 0 <= place.block < len(work.anatomy.blocks) else None


def report_data(
    work: Work,
    scores: Scores,
    plan: Plan,
    result: FitResult,
    quality: Quality | None,
    prediction: Prediction,
    command: str,
    frontier: Sequence[dict[str, Any]] | None,
    spread: float | None,
    measured: dict[str, dict[str, float]],
) -> dict[str, Any]:
    """Everything that the report draws, in JSON types."""
    foreseen = {stage.name: stage for stage in prediction.stages}
    return {
        "result": asdict(result),
        "plan": plan.model_dump(mode="json", by_alias=True),
        "kl_histogram": quality.histogram if quality else None,
        "frontier": list(frontier) if frontier else None,
        "sensitivity": [
            {"name": p.name, "block": block_of(work, p), "role": p.role, "coefficient": p.coefficient}
            for p in scores.places
        ],
        "candidates": {p.name: p.errors for p in scores.places},
        "probe": machine(),
        "calibration_halves_kl": spread,
        "learning": {name: found for name, found in measured.items() if "error" not in found},
        "command": command,
        "stages": [
            {
                "name": stage["name"],
                "predicted_bytes": foreseen[stage["name"]].peak_rss_bytes,
                "measured_bytes": stage["measured_bytes"],
                "predicted_seconds": foreseen[stage["name"]].seconds,
                "seconds": stage["seconds"],
            }
            for stage in work.stages
            if stage["name"] in foreseen
        ],
    }
