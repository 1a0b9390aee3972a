"""Errors of all candidates at all places, measured in one pass over the blocks.

The Gram matrix of every linear's input is collected, and every candidate coding is tried by rounding
to nearest on a sample of rows. How much better the plan's own method does is measured on a few
linears, as a ratio per coding. A killed pass continues at the first unfinished block.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from tailorbird.calibrate.ledger import Ledger
from tailorbird.calibrate.statistics import GramAccumulator, LinearStatistics
from tailorbird.calibrate.stream import StreamingModel
from tailorbird.errors import CheckpointError
from tailorbird.evaluate.streamed import batches, embed_windows
from tailorbird.formats.packed import Coding, PackedWeight
from tailorbird.kernels.reference import INT8, INT8_STATIC
from tailorbird.linear import LinearMethod
from tailorbird.linear.correct import Correction
from tailorbird.linear.error import output_error, row_energies
from tailorbird.linear.quantize.rtn import Rtn
from tailorbird.model.anatomy import Anatomy, BlockAnatomy
from tailorbird.plan.candidates import (
    ERROR_ROWS,
    distinct,
    geometric_mean,
    rounding_errors,
    sample_rows,
    spread,
)
from tailorbird.plan.ends import HeadStatistics, Rounded, without
from tailorbird.plan.inputs import TOKENS, InputErrors
from tailorbird.progress import Progress, Silent

#: Linears on which the method's error is compared with that of rounding to nearest.
RATIO_LINEARS = 10
#: Rows of those linears.
RATIO_ROWS = 256


def measure_errors(
    model: StreamingModel,
    ids: torch.Tensor,
    method: LinearMethod,
    codings: tuple[Coding, ...],
    ledger: Ledger,
    progress: Progress | None = None,
    correction: Correction | None = None,
    inputs: Sequence[str] = (INT8,),
) -> tuple[dict[str, dict[str, float]], dict[str, float], HeadStatistics]:
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
    correction : Correction or None
        What follows `method`; it counts in the ratios.
    inputs : sequence of str
        What inputs may be rounded to, by the names of `kernels.reference.ROUNDED_TO`.

    Returns
    -------
    errors : dict
        Use -> label of a coding -> relative output error of rounding to nearest. For the head and a tied
        embedding only that of the probe: `ends.end_errors` measures the rest once coefficients are known.
        Under `inputs.input_key` the error of rounding the place's inputs.
    ratios : dict
        Label of a coding -> error of `method` divided by that of rounding, geometric mean.
    head : HeadStatistics
        Statistics of the head's input.
    """
    return _ErrorPass(model, ids, method, codings, ledger, progress or Silent(), correction, inputs).run()


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
        correction: Correction | None,
        inputs: Sequence[str],
    ) -> None:
        self.model, self.ids, self.ledger, self.progress = model, ids, ledger, progress
        self.method, self.codings, self.correction, self.inputs = method, codings, correction, inputs
        windows, length = ids.shape
        self.shape = windows, length, model.anatomy.hidden_size
        self.compared = compared_linears(model.anatomy)

    @torch.no_grad()
    def run(self) -> tuple[dict[str, dict[str, float]], dict[str, float], HeadStatistics]:
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
        errors[self.model.anatomy.head], statistics = self._head()
        _check_finite({self.model.anatomy.head: errors[self.model.anatomy.head]})
        self.progress.advance()
        return errors, {label: geometric_mean(values) for label, values in samples.items()}, statistics

    def _embedding(self) -> dict[str, Any]:
        """Errors of the embedding; the hidden states that enter the first block."""
        anatomy = self.model.anatomy
        codings = () if anatomy.tied else self.codings
        errors = rounding_errors(self.model.end_weight(anatomy.embedding), None, codings)
        embed_windows(self.model, self.ids, self.ledger.stream(_boundary(0))).close()
        _check_finite({anatomy.embedding: errors})
        return {anatomy.embedding: errors}

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
        rounding = {key: InputErrors(width, self.codings, self.inputs) for key, width in widths.items()}
        before = self.ledger.open_stream(_boundary(index), *self.shape)
        after = self.ledger.new_stream(_boundary(index + 1), *self.shape)
        for start, stop in self._to_widen():
            model.capture_inputs(
                block, index, before.read(start, stop), lambda key, x: rounding[key].widen(x)
            )
        for start, stop in batches(*self.ids.shape):
            judging = [window - start for window in range(start, stop) if _judges(window, len(self.ids))]

            def add(key: str, x: torch.Tensor, judging: list[int] = judging, n: int = stop - start) -> None:
                grams[key].add(x)
                rounding[key].add(x)
                if key in judges and judging:
                    judges[key].add(x.reshape(n, -1, x.shape[-1])[judging])

            after.write(start, model.capture_inputs(block, index, before.read(start, stop), add))
        errors: dict[str, dict[str, float]] = {}
        samples: dict[str, list[float]] = {}
        for key in widths:
            statistics = grams.pop(key).finish()
            fellows = [linear for linear in anatomy.linears if linear.shares_input == key]
            if not bool(torch.isfinite(statistics.gram.diagonal()).all()):
                raise _overflow(f"the input of `{fellows[0].name}`")
            for linear in fellows:
                sample = sample_rows(model.weight_of(block, linear), ERROR_ROWS)
                errors[linear.name] = rounding_errors(sample, statistics, self.codings)
                energy = float(row_energies(sample, statistics.gram).sum())
                errors[linear.name] |= rounding[key].errors(sample, energy)
            judge = judges.pop(key).finish() if key in judges else None
            if judge is not None:
                statistics = without(statistics, judge)
            for linear in fellows:
                if linear.name in self.compared:
                    weight = model.weight_of(block, linear)
                    if self.correction is None:  # whose rank says something of all rows together
                        weight = sample_rows(weight, RATIO_ROWS)
                    self._compare(weight, statistics, judge or statistics, samples)
            del statistics, judge
        before.close()
        after.close()
        _check_finite(errors)
        return {"errors": errors, "samples": samples}

    def _to_widen(self) -> list[tuple[int, int]]:
        """Batches that are run beforehand: those of `inputs.TOKENS` tokens, where a scale is static."""
        if INT8_STATIC not in self.inputs:
            return []
        windows, length = self.ids.shape
        return [(start, stop) for start, stop in batches(windows, length) if start * length < TOKENS]

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
        rounded = self._rounded(statistics)
        nearest = Rtn().prepare(statistics)
        for coding in distinct(self.codings, *weight.shape):
            if coding.kind in self.method.makes:
                own, base = (
                    output_error(weight, by(weight, coding).dequantize(), judge.gram, 1.0)
                    for by in (rounded, nearest)
                )
                if 0 < own < math.inf and 0 < base < math.inf:
                    samples.setdefault(coding.label, []).append(own / base)

    def _rounded(self, statistics: LinearStatistics) -> Rounded:
        """The method, and the correction after it, for weights that read one input."""
        rounded, correction = self.method.prepare(statistics), self.correction
        if correction is None:
            return rounded
        correct, part = correction.prepare(rounded, statistics), correction.low_rank

        def corrected(weight: torch.Tensor, coding: Coding) -> PackedWeight:
            return correct(weight, coding, replace(part, rank=min(part.rank, *weight.shape)))

        return corrected

    def _head(self) -> tuple[dict[str, float], HeadStatistics]:
        """The probe's error at the head, and the statistics of its input."""
        model, windows = self.model, len(self.ids)
        whole, judge = GramAccumulator(model.head_width), GramAccumulator(model.head_width)
        rounding = InputErrors(model.head_width, self.codings, self.inputs)
        stream = self.ledger.open_stream(_boundary(len(model.anatomy.blocks)), *self.shape)
        for start, stop in self._to_widen():
            rounding.widen(model.head_input(stream.read(start, stop)))
        for start, stop in batches(*self.ids.shape):
            x = model.head_input(stream.read(start, stop))
            whole.add(x)
            rounding.add(x)
            judging = [window - start for window in range(start, stop) if _judges(window, windows)]
            if judging:
                judge.add(x[judging])
        stream.close()
        statistics = HeadStatistics(whole.finish(), judge.finish() if windows > 1 else None)
        sample = sample_rows(model.end_weight(model.anatomy.head), ERROR_ROWS)
        errors = rounding_errors(sample, statistics.whole, ())
        errors |= rounding.errors(sample, float(row_energies(sample, statistics.whole.gram).sum()))
        model.release_ends()
        return errors, statistics


def _check_finite(errors: Mapping[str, Mapping[str, float]]) -> None:
    """Refuse a source whose numbers overflow.

    Raises
    ------
    CheckpointError
        With the first place where they do.
    """
    for place, of_codings in errors.items():
        if not all(map(math.isfinite, of_codings.values())):
            raise _overflow(f"the output of `{place}`")


def _overflow(what: str) -> CheckpointError:
    return CheckpointError(
        f"{what}, which overflows float32 on the calibration text",
        "weights and activations that float32 can square and sum",
        "compare the checkpoint with its original: weights as large as these are damaged",
    )


def _boundary(index: int) -> str:
    """Name of the hidden states that enter block `index` in the first pass."""
    return f"hidden-{index}"


def _judges(window: int, windows: int) -> bool:
    """Whether a calibration window is kept from the method, to judge it: every fourth, at least the last.

    An error measured on the very tokens that a method was fitted to comes out too small where they are few.
    """
    return window % 4 == 3 or (windows < 4 and window == windows - 1)


def compared_linears(anatomy: Anatomy) -> set[str]:
    """Names of the `RATIO_LINEARS` linears at which the method is compared with rounding to nearest."""
    names = [linear.name for linear in anatomy.linears()]
    return {names[i] for i in spread(RATIO_LINEARS, len(names))}
