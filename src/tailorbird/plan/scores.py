"""What planning needs to know of a model, measured once and kept: score once, solve many.

Two passes over the blocks. The first collects the Gram matrix of every linear's input and measures
the error of every candidate coding; the second measures how much each place's error costs the
model's output (`sensitivity`). The result is cached under the source's fingerprint, so that a new
budget is solved without touching a weight.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from tailorbird.calibrate.ledger import Ledger
from tailorbird.calibrate.statistics import GramAccumulator, LinearStatistics
from tailorbird.calibrate.stream import StreamingModel
from tailorbird.evaluate.streamed import batches, embed_windows
from tailorbird.formats.packed import Coding, IntegerCoding, stored_bytes
from tailorbird.hardware.cache import cache_directory
from tailorbird.linear import LinearMethod
from tailorbird.linear.error import output_error, row_energies
from tailorbird.linear.quantize.rtn import Rtn
from tailorbird.model.anatomy import Anatomy, BlockAnatomy
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

SCHEMA = 2
#: Rows on which the errors of candidates are measured.
ERROR_ROWS = 256
#: Linears on which the method's error is compared with that of rounding to nearest.
RATIO_LINEARS = 10
#: Rows of those linears.
RATIO_ROWS = 256
#: A difference of two sums that is smaller than this share of them is their rounding.
ROUNDED_AWAY = 1e-6


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
        Label of a coding -> relative output error of rounding to nearest, or of the plan's method if `own`.
    coefficient : float
        Nats per token of KL per unit of relative error.
    own : bool
        Whether `errors` are those of the way in which this very place is rounded.
    """

    name: str
    role: str
    block: int
    shape: tuple[int, int]
    errors: dict[str, float]
    coefficient: float
    own: bool = False


@dataclass(frozen=True)
class Scores:
    """All that `options` needs; see the module."""

    places: tuple[PlaceScore, ...]
    ratios: dict[str, float]
    content_hash: str

    def predicted_error(self, place: PlaceScore, coding: Coding) -> float:
        """Relative output error expected of the plan's method at `place`."""
        return place.errors[coding.label] * (1.0 if place.own else self.ratios.get(coding.label, 1.0))


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


def measure_errors(
    model: StreamingModel,
    ids: torch.Tensor,
    method: LinearMethod,
    codings: tuple[Coding, ...],
    ledger: Ledger,
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
    ledger : Ledger
        Where finished blocks are marked, and the hidden states lie,
        ``2 * windows * length * hidden_size * 4`` bytes. What is left there afterwards is for the caller to
        remove, once the outcome is kept.

    Returns
    -------
    errors : dict
        Place -> label of a coding -> relative output error of rounding to nearest; for the head, or the tied
        pair, that of `method`.
    ratios : dict
        Label of a coding -> error of `method` divided by that of rounding, geometric mean.
    head : LinearStatistics
        Statistics of the head's input.
    """
    return _ErrorPass(model, ids, method, codings, ledger, progress or Silent()).run()


class _ErrorPass:
    """The first pass over a source; `run` does what is left of it."""

    def __init__(
        self,
        model: StreamingModel,
        ids: torch.Tensor,
        method: LinearMethod,
        codings: tuple[Coding, ...],
        ledger: Ledger,
        progress: Progress,
    ) -> None:
        self.model, self.ids, self.ledger, self.progress = model, ids, ledger, progress
        self.method, self.codings = method, codings
        windows, length = ids.shape
        self.shape = windows, length, model.anatomy.hidden_size
        self.compared = compared_linears(model.anatomy)

    @torch.no_grad()
    def run(self) -> tuple[dict[str, dict[str, float]], dict[str, float], LinearStatistics]:
        """See `measure_errors`."""
        errors: dict[str, dict[str, float]] = self.ledger.step(
            "embedding", self._embedding, keep={_boundary(0)}
        )
        samples: dict[str, list[float]] = {}
        for block in self.model.anatomy.blocks:
            found = self.ledger.step(
                f"block-{block.index:05d}",
                partial(self._block, block),
                keep={_boundary(block.index + 1)},
            )
            errors |= found["errors"]
            for label, values in found["samples"].items():
                samples.setdefault(label, []).extend(values)
            self.progress.advance()
        anatomy = self.model.anatomy
        place = anatomy.embedding if anatomy.tied else anatomy.head
        errors[place], statistics = self._head(place)
        self.progress.advance()
        return errors, {label: geometric_mean(values) for label, values in samples.items()}, statistics

    def _embedding(self) -> dict[str, Any]:
        """Errors of an untied embedding; the hidden states that enter the first block."""
        anatomy, errors = self.model.anatomy, {}
        if not anatomy.tied:
            embedding = self.model.end_weight(anatomy.embedding)
            errors[anatomy.embedding] = rounding_errors(embedding, None, self.codings)
            del embedding
        embed_windows(self.model, self.ids, self.ledger.stream(_boundary(0))).close()
        return errors

    def _block(self, anatomy: BlockAnatomy) -> dict[str, Any]:
        """Errors of all linears of a block, the method's ratios at some, the states that leave it."""
        model, index = self.model, anatomy.index
        block = model.load_block(index)
        widths = {linear.shares_input: linear.in_features for linear in anatomy.linears}
        grams = {key: GramAccumulator(width) for key, width in widths.items()}
        judges = {
            linear.shares_input: GramAccumulator(linear.in_features)
            for linear in anatomy.linears
            if linear.name in self.compared and len(self.ids) > 1
        }
        before = self.ledger.open_stream(_boundary(index), *self.shape)
        after = self.ledger.new_stream(_boundary(index + 1), *self.shape)
        for start, stop in batches(*self.ids.shape):
            judging = [window - start for window in range(start, stop) if _judges(window, len(self.ids))]

            def add(key: str, x: torch.Tensor, judging: list[int] = judging, n: int = stop - start) -> None:
                grams[key].add(x)
                if key in judges and judging:
                    judges[key].add(x.reshape(n, -1, x.shape[-1])[judging])

            after.write(start, model.capture_inputs(block, index, before.read(start, stop), add))
        errors: dict[str, dict[str, float]] = {}
        samples: dict[str, list[float]] = {}
        for key in widths:
            statistics = grams.pop(key).finish()
            fellows = [linear for linear in anatomy.linears if linear.shares_input == key]
            for linear in fellows:
                weight = model.weight_of(block, linear)
                errors[linear.name] = rounding_errors(weight, statistics, self.codings, ERROR_ROWS)
            judge = judges.pop(key).finish() if key in judges else None
            if judge is not None:
                statistics = without(statistics, judge)
            for linear in fellows:
                if linear.name in self.compared:
                    sample = sample_rows(model.weight_of(block, linear), RATIO_ROWS)
                    self._compare(sample, statistics, judge or statistics, samples)
            del statistics, judge
        before.close()
        after.close()
        return {"errors": errors, "samples": samples}

    def _compare(
        self,
        weight: torch.Tensor,
        statistics: LinearStatistics,
        judge: LinearStatistics,
        samples: dict[str, list[float]],
    ) -> None:
        """Add to `samples`, per coding, the method's error over that of rounding to nearest.

        The method sees `statistics`; both errors are those on the tokens of `judge`.
        """
        rounded = self.method.prepare(statistics)
        nearest = Rtn().prepare(statistics)
        for coding in distinct(self.codings, *weight.shape):
            if isinstance(coding, IntegerCoding):
                own, base = (
                    output_error(weight, by(weight, coding).dequantize(), judge.gram, 1.0)
                    for by in (rounded, nearest)
                )
                if own > 0 and base > 0:
                    samples.setdefault(coding.label, []).append(own / base)

    def _head(self, place: str) -> tuple[dict[str, float], LinearStatistics]:
        """Errors of the head under the method itself, and the statistics of its input."""
        model, windows = self.model, len(self.ids)
        whole, judge = GramAccumulator(model.head_width), GramAccumulator(model.head_width)
        stream = self.ledger.open_stream(_boundary(len(model.anatomy.blocks)), *self.shape)
        for start, stop in batches(*self.ids.shape):
            x = model.head_input(stream.read(start, stop))
            whole.add(x)
            judging = [window - start for window in range(start, stop) if _judges(window, windows)]
            if judging:
                judge.add(x[judging])
        stream.close()
        statistics, judging_statistics = whole.finish(), judge.finish()
        weight = model.end_weight(place)
        errors = rounding_errors(weight, statistics, self.codings)
        sample = sample_rows(weight, ERROR_ROWS)
        seen = statistics
        if windows > 1:
            seen = without(dataclasses.replace(statistics, gram=statistics.gram.clone()), judging_statistics)
        rounded = self.method.prepare(seen)
        energy = float(row_energies(sample, judging_statistics.gram).sum())
        for coding in self.codings:
            if isinstance(coding, IntegerCoding):
                approximation = rounded(sample, coding).dequantize()
                errors[coding.label] = output_error(sample, approximation, judging_statistics.gram, energy)
        model.release_ends()
        return errors, statistics


def _boundary(index: int) -> str:
    """Name of the hidden states that enter block `index` in the first pass."""
    return f"hidden-{index}"


def _judges(window: int, windows: int) -> bool:
    """Whether a calibration window is kept from the method, to judge it: every fourth, at least the last.

    An error measured on the very tokens that a method was fitted to comes out too small where they are few.
    """
    return window % 4 == 3 or (windows < 4 and window == windows - 1)


def without(whole: LinearStatistics, part: LinearStatistics) -> LinearStatistics:
    """Statistics of the tokens of `whole` that `part` leaves; the Gram matrix of `whole` is overwritten.

    Inputs that only `part` saw are exactly zero in the difference, as if it had been summed for itself.
    """
    tokens = whole.tokens - part.tokens
    gram = whole.gram.mul_(whole.tokens / tokens).sub_(part.gram, alpha=part.tokens / tokens)
    unseen = gram.diagonal() <= ROUNDED_AWAY * part.gram.diagonal()
    gram[unseen, :] = 0
    gram[:, unseen] = 0
    mean_abs = (whole.mean_abs * whole.tokens - part.mean_abs * part.tokens) / tokens
    return LinearStatistics(gram, None, mean_abs, tokens)


def linear_shape(linear: Any) -> tuple[int, int]:
    """``(out_features, in_features)`` of a linear place."""
    return linear.out_features, linear.in_features


def compared_linears(anatomy: Anatomy) -> set[str]:
    """Names of the `RATIO_LINEARS` linears at which the method is compared with rounding to nearest."""
    names = [linear.name for linear in anatomy.linears()]
    return {names[i] for i in spread(RATIO_LINEARS, len(names))}


@torch.no_grad()
def measure_coefficients(
    model: StreamingModel,
    ids: torch.Tensor,
    errors: dict[str, dict[str, float]],
    ledger: Ledger,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Second pass: nats of KL per unit of relative error, for every place.

    Each place is rounded to `PROBE` alone and the model's KL divided by the error that the first
    pass found for it.
    """
    places = places_of(model.anatomy)
    divergence = measure_divergence(
        model, places, ids, lambda name, weight: probe_rounding(weight), ledger, progress
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
            PlaceScore(
                place.name,
                role,
                place.block,
                shape,
                errors[place.name],
                coefficients[place.name],
                own=place.name not in linears,
            )
        )
    return Scores(tuple(scores), ratios, content_hash)
