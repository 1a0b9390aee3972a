"""A packed weight moves to a target near it, and keeps its coding.

The target `T = W + s B A` lies on no grid. Rounding it to nearest mostly gives `W` again, or with new grids
adds a second rounding error that is larger than what the adapter changed. What counts is the output error
`(v - t) H (v - t)^T` of each row, with `H = E[x x^T]` of the inputs that the adapted model has; rows don't
depend on each other, so that each takes the best of

- the codes that error feedback (`gptq.py`) and coordinate descent (`descent.py`) find on the grid it has,
- those that they find on a grid fitted to the target,
- rounding to nearest on a fitted grid, so that the result is never worse than that.

Scales that are codes themselves stay, as rows share what these stand for. For codes of tables the grid is
the row's table, fitted by `ganq.py`, and there is no descent; nor is there for codes of points
(`points_feedback.py`), whose fitted scales are those by deviation, and for signs (`binary.py`). A target that
is the weight itself gives back the very bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tailorbird.calibrate.statistics import LinearStatistics
from tailorbird.formats.packed import (
    BinaryCoding,
    DoubleCoding,
    FloatCoding,
    PackedWeight,
    TableCoding,
    VectorCoding,
)
from tailorbird.formats.transform import transform_tensors, weight_behind
from tailorbird.linear.quantize import binary
from tailorbird.linear.quantize.descent import descend
from tailorbird.linear.quantize.ganq import Ganq
from tailorbird.linear.quantize.gptq import Gptq
from tailorbird.linear.quantize.grid import Grid, grid_of
from tailorbird.linear.quantize.points import scales_by_deviation
from tailorbird.linear.quantize.points_feedback import IN_ORDER, points_by_feedback
from tailorbird.linear.quantize.rows import best_rows
from tailorbird.linear.quantize.rtn import Rtn
from tailorbird.linear.quantize.tables import codes_by_feedback
from tailorbird.linear.transformed import transformed_statistics

METHOD = Gptq(asymmetric=False)
TABLES = Ganq(asymmetric=False)
#: where a row's codes came from, in the order in which they are preferred where they are equally good
KEPT, FITTED, NEAREST = "kept grid", "fitted grid", "nearest"


@dataclass(frozen=True, eq=False)
class Rounded:
    """A weight that was packed anew.

    Attributes
    ----------
    packed : PackedWeight
        Coding and order are those it had.
    rows : dict of str to int
        How many rows came from each of `KEPT`, `FITTED` and `NEAREST`, those that were tried.
    """

    packed: PackedWeight
    rows: dict[str, int]


class Rounding:
    """Packs weights anew that read one input; what depends on that alone is worked out once.

    Parameters
    ----------
    statistics : LinearStatistics
        Of that input.
    """

    def __init__(self, statistics: LinearStatistics) -> None:
        self.statistics = statistics
        self._rounded = METHOD.prepare(statistics)

    def __call__(self, stored: PackedWeight, target: Tensor) -> Rounded:
        """Pack `target` as `stored` is packed.

        Parameters
        ----------
        stored : PackedWeight
            Of codes.
        target : Tensor[out_features, in_features], float32
            In the order of the inputs; not modified.

        Raises
        ------
        SettingsError
            When weights are too large for the coding.
        """
        beside = stored.parts_beside
        if beside:  # stays as it is; the base moves
            base = self(stored.base, target - stored.beside())
            return replace(base, packed=replace(base.packed, tensors=base.packed.tensors | beside))
        turned = transform_tensors(stored.tensors)
        if turned:  # the codes move to the target behind the transform, by its inputs
            rounding = Rounding(transformed_statistics(self.statistics, turned))
            inner = rounding(stored.behind_transform, weight_behind(target, turned))
            packed = replace(inner.packed, tensors=inner.packed.tensors | turned)
            return replace(inner, packed=packed)
        coding, order = stored.coding, stored.tensors.get("order")
        if isinstance(coding, FloatCoding):
            raise ValueError("floats are rounded once, to their dtype")
        statistics, rounded = self.statistics, self._rounded
        if order is not None:  # everything below happens in the order in which the columns are stored
            target, statistics = target[:, order], _ordered(statistics, order)
            rounded = METHOD.prepare(statistics)
        gram = statistics.gram
        if isinstance(coding, DoubleCoding):
            kept = rounded(target, coding.expanded, _dividing(grid_of(stored.expanded)))
            codes = {"codes": descend(target, kept, gram).tensors["codes"]}
            return Rounded(replace(stored, tensors=stored.tensors | codes), {KEPT: stored.out_features})
        if isinstance(coding, TableCoding):
            tables = stored.tensors["tables"].float().sort(-1).values
            found = {
                KEPT: PackedWeight.from_tables(codes_by_feedback(rounded, target, tables), tables, coding),
                FITTED: TABLES.round(rounded, target, coding),
                NEAREST: Rtn()(target, statistics, coding),
            }
        elif isinstance(coding, BinaryCoding):
            factor, every = IN_ORDER.prepare(statistics).factor, torch.arange(stored.in_features)
            tables = stored.tensors["tables"].float()
            found = {
                KEPT: binary.codes_by_feedback(target, factor, every, tables, coding),
                FITTED: binary.groups_by_feedback(target, factor, every, gram.diagonal(), coding),
                NEAREST: Rtn()(target, statistics, coding),
            }
        elif isinstance(coding, VectorCoding):
            scales = _usable(stored.tensors["scales"])
            rounded = IN_ORDER.prepare(statistics)
            fitted = scales_by_deviation(target, coding)
            found = {
                KEPT: points_by_feedback(rounded, target, scales, coding),
                FITTED: points_by_feedback(rounded, target, fitted, coding),
                NEAREST: Rtn()(target, statistics, coding),
            }
        else:
            found = {
                KEPT: descend(target, rounded(target, coding, _dividing(grid_of(stored))), gram),
                FITTED: descend(target, rounded(target, coding), gram),
                NEAREST: Rtn()(target, statistics, coding),
            }
        packed, best = best_rows(target, list(found.values()), gram)
        if order is not None:
            packed.tensors["order"] = order
        return Rounded(packed, {name: int((best == i).sum()) for i, name in enumerate(found)})


def _dividing(grid: Grid) -> Grid:
    """A grid on which values can be found: a scale of zero, which other programs may store, becomes one."""
    scales, zeros = grid
    return _usable(scales), zeros


def _usable(scales: Tensor) -> Tensor:
    return scales.masked_fill(scales == 0, 1)


def _ordered(statistics: LinearStatistics, order: Tensor) -> LinearStatistics:
    """Statistics of the inputs in another order."""
    gram = statistics.gram[order][:, order]
    return replace(statistics, gram=gram, mean_abs=statistics.mean_abs[order])
