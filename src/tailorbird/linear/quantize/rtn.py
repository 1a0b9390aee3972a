"""Round to nearest: every weight becomes the nearest value of its group's grid or its row's table.

The baseline of all rounding methods, and what needs no calibration. With statistics, the clip search
weighs the error of each input by its mean square. The table of a row holds the centres of a clustering of its
weights, with statistics weighted likewise (`clusters.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from tailorbird.calibrate.statistics import LinearStatistics
from tailorbird.errors import SettingsError
from tailorbird.formats.packed import (
    FLOAT_DTYPES,
    BinaryCoding,
    Coding,
    DoubleCoding,
    FloatCoding,
    PackedWeight,
    TableCoding,
    VectorCoding,
    coded_scales,
    expanded_scales,
)
from tailorbird.kernels.packing import pack_codes
from tailorbird.kernels.reference import group_layout
from tailorbird.linear.quantize.binary import round_to_magnitudes
from tailorbird.linear.quantize.clusters import clustered, nearest_values
from tailorbird.linear.quantize.grid import fit_grid, quantize_to_grid
from tailorbird.linear.quantize.points import round_to_points
from tailorbird.linear.settings import GRIDS, on_grids


@dataclass(frozen=True)
class Rtn:
    """Round to nearest.

    Parameters
    ----------
    clip_search : bool
        Whether grids narrower than the range of the values are tried (see `fit_grid`); of points none are.
    """

    family: ClassVar[str] = "quantize"
    kind: ClassVar[str] = "linear method"
    paper: ClassVar[str] = "round to nearest, the common baseline"
    requirements: ClassVar[frozenset[str]] = frozenset()
    makes: ClassVar[frozenset[str]] = GRIDS | {
        VectorCoding.kind, DoubleCoding.kind, TableCoding.kind, BinaryCoding.kind,
    }  # fmt: skip
    outliers: ClassVar[float] = 0.0
    least_token: ClassVar[float] = 1.0

    clip_search: bool = True

    @property
    def needs(self) -> frozenset[str]:
        """Which statistics these settings can't do without: none."""
        return self.requirements

    def prepare(self, statistics: LinearStatistics | None) -> Callable[[Tensor, Coding], PackedWeight]:
        """`__call__` with these statistics."""
        return lambda weight, coding: self(weight, statistics, coding)

    def __call__(self, weight: Tensor, statistics: LinearStatistics | None, coding: Coding) -> PackedWeight:
        """Round a weight.

        Parameters
        ----------
        weight : Tensor[out_features, in_features], float32
            Not modified.
        statistics : LinearStatistics or None
            The diagonal of its Gram matrix weighs the inputs in the clip search; None: all alike.
        coding : Coding

        Returns
        -------
        PackedWeight

        Raises
        ------
        SettingsError
            When weights are too large for the coding.
        """
        if isinstance(coding, FloatCoding):
            return round_to_float(weight, coding)
        importance = None if statistics is None else statistics.gram.diagonal()
        if isinstance(coding, TableCoding):
            tables = clustered(weight, coding, importance)
            return PackedWeight.from_tables(nearest_values(weight, tables), tables, coding)
        if isinstance(coding, BinaryCoding):
            return round_to_magnitudes(weight, coding, importance)
        if isinstance(coding, VectorCoding):
            return round_to_points(weight, coding)
        if isinstance(coding, DoubleCoding):
            return self._double(weight, importance, coding)
        coding = on_grids("rtn", coding)
        scales, zeros = fit_grid(weight, coding, importance, self.clip_search)
        return PackedWeight.from_codes(quantize_to_grid(weight, scales, zeros, coding), scales, zeros, coding)

    def _double(self, weight: Tensor, importance: Tensor | None, coding: DoubleCoding) -> PackedWeight:
        """Codes for the levels nearest by scales that are codes themselves.

        Scales stay above zero, so that they lie near their mean. That of a group of zeros is any: it is the
        mean of the others.
        """
        out_features, in_features = weight.shape
        scales, _ = fit_grid(weight, coding.expanded, importance, self.clip_search, upright=True)
        scales = scales.float()
        groups, size = group_layout(in_features, coding.group_size)
        padded = functional.pad(weight, (0, groups * size - in_features))
        empty = (padded.view(out_features, groups, size) == 0).all(-1)
        if bool(empty.any()) and not bool(empty.all()):
            scales = torch.where(empty, scales[~empty].mean(), scales)
        stored = coded_scales(scales)
        read = expanded_scales(stored)
        assert read is not None
        # one that is small beside its block's largest may become zero, and with it all that it scales
        divisors = torch.where(read == 0, torch.ones_like(read), read)
        codes = quantize_to_grid(weight, divisors, None, coding.expanded)
        tensors = {"codes": pack_codes(codes, coding.bits), **stored}
        return PackedWeight(coding, out_features, in_features, tensors)


def round_to_float(weight: Tensor, coding: FloatCoding) -> PackedWeight:
    """Round a weight `[out_features, in_features]` to a floating-point coding.

    Raises
    ------
    SettingsError
        When weights are too large for the dtype.
    """
    packed = PackedWeight.from_float(weight, coding)
    if not torch.isfinite(packed.tensors["weight"]).all():
        raise SettingsError(
            f"weights up to {float(weight.abs().max()):.3g} for {coding.dtype}",
            f"at most {torch.finfo(FLOAT_DTYPES[coding.dtype]).max:.3g}",
            "choose bfloat16 or float32",
        )
    return packed
