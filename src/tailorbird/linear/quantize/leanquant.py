"""LeanQuant: grids for the inputs whose rounding can't be made up for, then error feedback.

Zhang & Shrivastava 2024, "LeanQuant: Accurate and Scalable Large Language Model Quantization with
Loss-error-aware Grid" (arXiv:2407.10032). Rounding a column by `e` raises the output error by
`e^2 / [H^-1]_qq` when all others make up for it as well as they can (`gptq.py`), so that a grid is best
where `[H^-1]_qq` is small. The grid of a group minimizes `sum_q [H^-1]_qq^-p (w_q - v_q)^2`, and the
columns are then rounded on it with error feedback.

For grids with a zero point the two ends of the span are searched each for itself, in the steps of
`grid.py`; the best is refined by its least squares scale. Grids without one are searched as elsewhere, with
these weights. The paper's non-uniform grids are what a coding of tables gets: the table of a row holds the
centres of a clustering of its weights, weighted likewise (`clusters.py`); feedback rounds to the nearest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tailorbird.formats.packed import CodesCoding, PackedWeight, TableCoding
from tailorbird.linear.quantize.clusters import clustered
from tailorbird.linear.quantize.feedback import FeedbackMethod
from tailorbird.linear.quantize.gptq import GptqRounding, inverse_diagonal
from tailorbird.linear.quantize.grid import fit_grid
from tailorbird.linear.quantize.tables import codes_by_feedback
from tailorbird.linear.settings import GRIDS, check_setting, on_grids


@dataclass(frozen=True, kw_only=True)
class Leanquant(FeedbackMethod):
    """Rounding with error feedback on grids that are fitted by the inverse of the Gram matrix.

    It takes the memory that GPTQ takes.

    Parameters
    ----------
    exponent : float
        `p`; 0 weighs all inputs alike, and 1 by just what their errors cost. The paper takes 3 or 4, for
        rows of one group; in groups of 64 that was worse than GPTQ on the models that were tried.
    damping, asymmetric, correction, least_token
        As `Gptq`.
    """

    name: ClassVar[str] = "leanquant"
    outliers: ClassVar[float] = 0.0
    paper: ClassVar[str] = "Zhang & Shrivastava 2024, arXiv:2407.10032"
    makes: ClassVar[frozenset[str]] = GRIDS | {TableCoding.kind}

    exponent: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        right = 0 <= self.exponent < math.inf
        check_setting(self.name, "exponent", self.exponent, right, "a number from 0, such as 1")

    def round(self, rounding: GptqRounding, target: Tensor, coding: CodesCoding) -> PackedWeight:
        """Round what is aimed at, on the fitted grid or to the values of the fitted tables."""
        importance = inverse_diagonal(rounding.factor, rounding.order).pow(-self.exponent)
        importance = (importance / importance.max()).float()
        if isinstance(coding, TableCoding):
            tables = clustered(target, coding, importance)
            return PackedWeight.from_tables(codes_by_feedback(rounding, target, tables), tables, coding)
        grids = on_grids(self.name, coding)
        grid = fit_grid(target, grids, importance, apart=True)
        return rounding.round(target, grids, grid)
