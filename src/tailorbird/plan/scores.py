"""What planning needs to know of a model, measured once and kept: score once, solve many.

Two passes over the blocks. The first collects the Gram matrix of every linear's input and measures
the error of every candidate coding; the second measures how much each place's error costs the
model's output (`sensitivity`). The result is cached under the source's fingerprint, so that a new
budget is solved without touching a weight.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tailorbird.calibrate.statistics import GramAccumulator, LinearStatistics
from tailorbird.calibrate.stream import StreamingModel
from tailorbird.evaluate.streamed import batches, embed_windows
from tailorbird.formats.packed import Coding, IntegerCoding, stored_bytes
from tailorbird.hardware.cache import cache_directory
from tailorbird.linear import LinearMethod
from tailorbird.linear.error import output_error
from tailorbird.linear.quantize.rtn import Rtn
from tailorbird.model.anatomy import Anatomy
from tailorbird.model.checkpoint import Checkpoint
from tailorbird.model.weights import Weights
from tailorbird.model.writing import write_json, write_tensors
from tailorbird.plan.allocate import Option, PlaceOptions
from tailorbird.plan.candidates import (
    PROBE_KEY,
    distinct,
    geometric_mean,
    probe_rounding,
    rounding_errors,
    sample_rows,
    spread,
)
from tailorbird.plan.sensitivity import Place, measure_divergence
from tailorbird.progress import Progress, Silent

SCHEMA = 1
#: Rows on which the errors of candidates are measured.
ERROR_ROWS = 256
#: Linears on which the method's error is compared with that of rounding to nearest.
RATIO_LINEARS = 10
#: Rows of those linears.
RATIO_ROWS = 256


@dataclass(frozen=True)
class PlaceScore:
    """What was measured at one place.

    Attributes
    ----------
    name, role : str
        Module path and role; role ``embedding``, ``head`` or ``tied`` outside the blocks.
    block : int
        Index of the block; -1 for the embedding, the number of blocks for the head.
    shape : tuple of int
        ``(out_features, in_features)``.
    errors : dict
        Label of a coding -> relative output error of rounding to nearest.
    coefficient : float
        Nats per token of KL per unit of relative error.
    """

    name: str
    role: str
    block: int
    shape: tuple[int, int]
    errors: dict[str, float]
    coefficient: float


@dataclass(frozen=True)
class Scores:
    """All that `options` needs; see the module."""

    places: tuple[PlaceScore, ...]
    ratios: dict[str, float]
    content_hash: str

    def predicted_error(self, place: PlaceScore, coding: Coding) -> float:
        """Relative output error expected of the plan's method at `place`."""
        return place.errors[coding.label] * self.ratios.get(coding.label, 1.0)


def places_of(anatomy: Anatomy) -> list[Place]:
    """Every place of the model: linears, embedding and head; a tied pair is one."""
    places = [Place(anatomy.embedding, -1)]
    places += [Place(linear.name, block.index) for block in anatomy.blocks for linear in block.linears]
    if not anatomy.tied:
        places.append(Place(anatomy.head, len(anatomy.blocks)))
    return places


def options(
    scores: Scores,
    codings: Callable[[PlaceScore], Sequence[Coding]],
    together: Callable[[PlaceScore], str | None] = lambda place: None,
) -> list[PlaceOptions]:
    """What the allocator chooses from: bytes and predicted KL of every coding that a place may take."""
    result = []
    for place in scores.places:
        choices = tuple(
            Option(
                coding,
                stored_bytes(coding, *place.shape),
                place.coefficient * scores.predicted_error(place, coding),
            )
            for coding in distinct(codings(place), *place.shape)
        )
        result.append(PlaceOptions(place.name, choices, together(place)))
    return result


class ScoreCache:
    """Scores and the head's statistics of one source under one calibration, on disk."""

    def __init__(self, key: dict[str, Any]) -> None:
        """`key`: everything that the scores depend on, in JSON types."""
        digest = hashlib.sha256(json.dumps({"schema": SCHEMA, **key}, sort_keys=True).encode())
        self.directory = cache_directory() / "scores" / digest.hexdigest()[:32]

    def load(self) -> Scores | None:
        """The cached scores, or None where there are none that can be read."""
        try:
            data = json.loads((self.directory / "scores.json").read_text())
            places = tuple(PlaceScore(**{**p, "shape": tuple(p["shape"])}) for p in data["places"])
            return Scores(places, data["ratios"], data["content_hash"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def load_head(self) -> LinearStatistics:
        """Statistics of the head's input in the source."""
        weights = Weights.open(self.directory)
        gram = weights.read("gram")
        return LinearStatistics(gram=gram, cross=None, mean_abs=weights.read("mean_abs"), tokens=1)

    def save(self, scores: Scores) -> None:
        """Keep `scores`; the file appears whole."""
        self.directory.mkdir(parents=True, exist_ok=True)
        write_json(self.directory / "scores.json", asdict(scores))

    def save_head(self, statistics: LinearStatistics) -> None:
        """Keep the statistics of the head's input."""
        self.directory.mkdir(parents=True, exist_ok=True)
        write_tensors(
            self.directory / "model.safetensors",
            {"gram": statistics.gram, "mean_abs": statistics.mean_abs},
        )

    def save_errors(self, errors: dict[str, dict[str, float]], ratios: dict[str, float]) -> None:
        """Keep what the first pass measured, until the second is done."""
        self.directory.mkdir(parents=True, exist_ok=True)
        write_json(self.directory / "errors.json", {"errors": errors, "ratios": ratios})

    def load_errors(self) -> tuple[dict[str, dict[str, float]], dict[str, float]] | None:
        """What `save_errors` kept, or None."""
        try:
            data = json.loads((self.directory / "errors.json").read_text())
            return data["errors"], data["ratios"]
        except (OSError, ValueError, KeyError, TypeError):
            return None


@torch.no_grad()
def measure_errors(
    model: StreamingModel,
    ids: torch.Tensor,
    method: LinearMethod,
    codings: tuple[Coding, ...],
    scratch: Path,
    progress: Progress | None = None,
) -> tuple[dict[str, dict[str, float]], dict[str, float], LinearStatistics]:
    """First pass: errors of all candidates at all places, the method's ratios, the head's statistics.

    Parameters
    ----------
    model : StreamingModel
        The source.
    ids : LongTensor ``[windows, length]``
        Calibration tokens.
    method : LinearMethod
        The plan's method; its error is compared with that of rounding on `RATIO_LINEARS` linears.
    codings : tuple of Coding
    scratch : Path
        Directory for the hidden states, ``windows * length * hidden_size * 4`` bytes.

    Returns
    -------
    errors : dict
        Place -> label of a coding -> relative output error of rounding to nearest.
    ratios : dict
        Label of a coding -> error of `method` divided by that of rounding, geometric mean.
    head : LinearStatistics
        Statistics of the head's input.
    """
    progress = progress or Silent()
    anatomy = model.anatomy
    errors: dict[str, dict[str, float]] = {}
    samples: dict[str, list[float]] = {}
    linears = [linear.name for block in anatomy.blocks for linear in block.linears]
    compared = {linears[i] for i in spread(RATIO_LINEARS, len(linears))}

    embedding = model.end_weight(anatomy.embedding)
    if not anatomy.tied:
        errors[anatomy.embedding] = rounding_errors(embedding, None, codings)
    del embedding
    stream = embed_windows(model, ids, scratch / "statistics")
    for index, block_anatomy in enumerate(anatomy.blocks):
        block = model.load_block(index)
        widths = {linear.shares_input: linear.in_features for linear in block_anatomy.linears}
        grams = {key: GramAccumulator(width) for key, width in widths.items()}
        for start, stop in batches(*ids.shape):
            hidden = stream.read(start, stop)
            output = model.capture_inputs(block, index, hidden, lambda key, x, g=grams: g[key].add(x))  # type: ignore[misc]
            stream.write(start, output)
        statistics = {}
        for key in list(grams):
            statistics[key] = grams.pop(key).finish()
        for linear in block_anatomy.linears:
            weight = model.weight_of(block, linear)
            known = statistics[linear.shares_input]
            errors[linear.name] = rounding_errors(weight, known, codings, ERROR_ROWS)
            if linear.name in compared:
                sample = sample_rows(weight, RATIO_ROWS).clone()
                for coding in distinct(codings, *linear_shape(linear)):
                    if isinstance(coding, IntegerCoding):
                        own = float(
                            output_error(sample, method(sample, known, coding).dequantize(), known.gram)
                        )
                        rounded = float(
                            output_error(sample, Rtn()(sample, known, coding).dequantize(), known.gram)
                        )
                        if own > 0 and rounded > 0:
                            samples.setdefault(coding.label, []).append(own / rounded)
        del block, statistics
        progress.advance()
    head = GramAccumulator(model.head_width)
    for start, stop in batches(*ids.shape):
        head.add(model.head_input(stream.read(start, stop)))
    head_statistics = head.finish()
    place = anatomy.embedding if anatomy.tied else anatomy.head
    errors[place] = rounding_errors(model.end_weight(place), head_statistics, codings)
    model.release_ends()
    stream.close()
    stream.path.unlink()
    progress.advance()
    ratios = {label: geometric_mean(values) for label, values in samples.items()}
    return errors, ratios, head_statistics


def linear_shape(linear: Any) -> tuple[int, int]:
    """``(out_features, in_features)`` of a linear place."""
    return linear.out_features, linear.in_features


@torch.no_grad()
def measure_coefficients(
    model: StreamingModel,
    ids: torch.Tensor,
    errors: dict[str, dict[str, float]],
    scratch: Path,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Second pass: nats of KL per unit of relative error, for every place.

    Each place is rounded to `PROBE` alone and the model's KL divided by the error that the first
    pass found for it.
    """
    places = places_of(model.anatomy)
    divergence = measure_divergence(
        model, places, ids, lambda name, weight: probe_rounding(weight), scratch, progress
    )
    return {
        name: (kl / errors[name][PROBE_KEY] if errors[name][PROBE_KEY] > 0 else 0.0)
        for name, kl in divergence.items()
    }


def assemble(
    anatomy: Anatomy,
    errors: dict[str, dict[str, float]],
    ratios: dict[str, float],
    coefficients: dict[str, float],
    content_hash: str,
) -> Scores:
    """Put both passes together."""
    linears = {linear.name: linear for linear in anatomy.linears()}
    scores = []
    for place in places_of(anatomy):
        if place.name in linears:
            linear = linears[place.name]
            role, shape = linear.role, linear_shape(linear)
        else:
            role = "tied" if anatomy.tied else ("embedding" if place.block < 0 else "head")
            shape = anatomy.end_shape(place.name)
        scores.append(
            PlaceScore(place.name, role, place.block, shape, errors[place.name], coefficients[place.name])
        )
    return Scores(tuple(scores), ratios, content_hash)


def source_content_hash(checkpoint: Checkpoint) -> str:
    """Hash of all weights, taken while they are in the page cache anyway."""
    return checkpoint.content_hash()
