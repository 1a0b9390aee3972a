"""GPTQ: round column by column, and let the columns that follow make up for each error.

Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers"
(arXiv:2210.17323), with the asymmetric calibration of Li et al. 2025, "GPTAQ: Efficient Finetuning-Free
Quantization for Asymmetric Calibration" (arXiv:2504.02692).

The output error of a row is `(v - w) H (v - w)^T` with `H = E[x x^T]`. Once column `q` has been rounded
to `v_q`, the best change of the columns `F` after it is `-(w_q - v_q) / [A]_qq * [A]_qF` with
`A = (H_(q and F))^-1`. All these inverses stand in one triangular matrix `U` with `H^-1 = U^T U`: row `q`
of `A` over its pivot is row `q` of `U` over `U_qq`. `U` is found from the Cholesky factor of `H` taken
from its last column to its first, `H = R R^T` with `R` upper triangular, as `U = R^-1`; it is the
Cholesky factor of the inverse that the paper uses, without forming that inverse.

Asymmetric calibration aims at the output that the source model has at this place. Its inputs `x~` differ
from the `x` that the compressed model will have, and row `w` leaves the residual `w E[(x~ - x) x^T] H^-1`
uncorrected. Taken up one column at a time, the share of column `q` is added to the columns after it:
`w_q D_qF (H_FF)^-1` with `D = E[(x~ - x) x^T]`. For all columns these are the rows of
`P = triu(D U^T, 1) U`, scaled by `correction`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from tailorbird.calibrate.statistics import LinearStatistics
from tailorbird.errors import SettingsError, TailorbirdError
from tailorbird.formats.packed import Coding, FloatCoding, GroupedCoding, PackedWeight
from tailorbird.kernels.reference import group_layout
from tailorbird.linear.outliers import beside_base, rounded_values
from tailorbird.linear.quantize.grid import Grid, coding_zero, fit_grid, nearest_codes, steps_of
from tailorbird.linear.quantize.rtn import round_to_float
from tailorbird.linear.settings import GRIDS, check_feedback, check_setting, feedback_needs, on_grids

#: how often the damping is raised tenfold before the Gram matrix is given up
DAMPING_RETRIES = 6
RESIDUALS = ("whole", "column")
_raised: ContextVar[list[float] | None] = ContextVar("raised dampings", default=None)


@dataclass(frozen=True)
class Gptq:
    """Rounding with error feedback, from the Gram matrix of the inputs.

    Beyond weight, statistics and result it takes two `[in_features, in_features]` float32 matrices at its
    peak (three with `residual="column"`), two float32 copies of the weight and two of its codes.

    Parameters
    ----------
    block_size : int
        Columns rounded before the columns after them are updated, in one matrix product. The result is
        the same for every size, up to rounding errors.
    damping : float
        Added to the diagonal of the Gram matrix, as a fraction of the diagonal's mean. Raised tenfold, up
        to `DAMPING_RETRIES` times, while the matrix can't be factorized; `raised_dampings` tells.
    act_order : bool
        True: columns are rounded in the order of falling input energy `H_ii`. False: in their own order,
        and the grid of a group is fitted when its first column is reached, to the weights as they then
        are.
    static_groups : bool
        What `act_order` does with groups. True: a group holds neighbouring columns, its grid is fitted to
        the weights as they are at the start, and no order is stored. False: groups are formed along the
        order, each is fitted when it's reached, and the order is stored with the weight.
    asymmetric : bool
        Whether to aim at the source model's outputs, with the statistics' `cross`. Where that is None,
        source and compressed inputs are the same and nothing changes.
    residual : str
        How. "whole": the weight first moves to `W + W D H^-1`, from which the least error is reached if
        nothing is rounded, and is rounded from there. "column": the share of each column goes to the
        columns after it, as in the paper.
    correction : float
        Fraction of the residual that is taken up, above 0 and up to 1. All of it fits the difference
        between the models to the calibration text as closely as it can be, and with few tokens too
        closely. The paper's code takes 0.25, for "column".
    clip_search : bool
        Whether grids narrower than the range of the values are tried (see `fit_grid`), errors weighted by
        `H_ii`.
    least_token : float
        Below 1, tokens count by the attention that they receive in their block (`calibrate/importance.py`):
        the weight of the one that receives least, beside 1 for the one that receives most. 1: all alike.
    """

    family: ClassVar[str] = "quantize"
    kind: ClassVar[str] = "linear method"
    paper: ClassVar[str] = (
        "Frantar et al. 2022, arXiv:2210.17323; Li et al. 2025, arXiv:2504.02692; "
        "Sung et al. 2025, arXiv:2503.01820"
    )
    requirements: ClassVar[frozenset[str]] = frozenset({"gram", "cross", "attention"})
    makes: ClassVar[frozenset[str]] = GRIDS
    outliers: ClassVar[float] = 0.0

    block_size: int = 128
    damping: float = 0.01
    act_order: bool = True
    static_groups: bool = True
    asymmetric: bool = True
    residual: str = "whole"
    correction: float = 0.5
    clip_search: bool = True
    least_token: float = 1.0

    def __post_init__(self) -> None:
        check_setting("gptq", "block_size", self.block_size, self.block_size >= 1, "at least 1")
        check_feedback("gptq", self.damping, self.correction, self.least_token)
        known = self.residual in RESIDUALS
        check_setting("gptq", "residual", self.residual, known, "one of " + ", ".join(RESIDUALS))

    @property
    def needs(self) -> frozenset[str]:
        """Which statistics these settings read."""
        return feedback_needs(self.asymmetric, self.least_token)

    @property
    def reorders(self) -> bool:
        """Whether columns may be stored in another order than that of the inputs."""
        return self.act_order and not self.static_groups

    def __call__(self, weight: Tensor, statistics: LinearStatistics | None, coding: Coding) -> PackedWeight:
        """Round a weight.

        Parameters
        ----------
        weight : Tensor[out_features, in_features], float32
            Not modified.
        statistics : LinearStatistics
            Not modified. An input that calibration never saw (`H_ii = 0`) is rounded to nearest.
        coding : Coding
            A floating-point coding rounds to nearest, since its error is too small to feed back.

        Returns
        -------
        PackedWeight
            The same bits for the same arguments, number of threads and build of PyTorch.

        Raises
        ------
        SettingsError
            Without statistics, for a coding of tables, or when weights are too large for the coding.
        TailorbirdError
            When the statistics hold NaN or infinity, or can't be factorized with any damping tried.
        """
        return self.prepare(statistics)(weight, coding)

    def prepare(self, statistics: LinearStatistics | None) -> GptqRounding:
        """`__call__` with these statistics; their Gram matrix is factorized once, at the first weight."""
        return GptqRounding(self, statistics)


class GptqRounding:
    """What `Gptq.prepare` returns: the method with its settings, for all weights that read one input.

    The order of the columns and the factor of the Gram matrix, `[in_features, in_features]` float32, are
    worked out once, when they are first needed, and live as long as this. Methods that begin where GPTQ
    ends, or that choose its grids, are built on it.

    Parameters
    ----------
    settings : Gptq
    statistics : LinearStatistics or None
        None does for floating-point codings only.
    name : str
        Of the method, in errors.
    """

    def __init__(self, settings: Gptq, statistics: LinearStatistics | None, name: str = "gptq") -> None:
        self.settings, self.name = settings, name
        self._statistics = statistics

    def __call__(self, weight: Tensor, coding: Coding, grid: Grid | None = None) -> PackedWeight:
        """Round a weight as `Gptq`, or, where `grid` is given, to the values of just that grid.

        With a grid the columns are stored in their own order.
        """
        if isinstance(coding, FloatCoding):
            return round_to_float(weight, coding)
        coding = on_grids(self.name, coding)
        return self.round(self.target(weight), coding, grid)

    @property
    def statistics(self) -> LinearStatistics:
        """Those of the input.

        Raises
        ------
        SettingsError
            When there are none.
        """
        if self._statistics is None:
            raise SettingsError(
                f"{self.name} without calibration statistics",
                "the Gram matrix of the linear's inputs",
                "calibrate, or choose rtn",
            )
        return self._statistics

    @cached_property
    def order(self) -> Tensor:
        """Inputs in the order in which they are rounded, `[in_features]` int64."""
        return rounding_order(self.statistics.gram.diagonal(), self.settings.act_order)

    @cached_property
    def factor(self) -> Tensor:
        """`U` with `U^T U = H^-1` of the damped Gram matrix in `order` (`inverse_factor`)."""
        return inverse_factor(self.statistics.gram, self.order, self.settings.damping)

    @property
    def cross(self) -> Tensor | None:
        """`D` of the statistics where the settings ask for it.

        Raises
        ------
        TailorbirdError
            When it isn't finite.
        """
        cross = self.statistics.cross if self.settings.asymmetric else None
        if cross is not None and not math.isfinite(float(cross.sum())):
            raise _not_finite("cross moments of the inputs that aren't finite")
        return cross

    def target(self, weight: Tensor) -> Tensor:
        """What is rounded: the weight, or with `residual="whole"` `W + correction W D H^-1`; float32.

        Parameters
        ----------
        weight : Tensor[out_features, in_features]
            Not modified; the result may be that very tensor.
        """
        factor, cross = self.factor, self.cross
        target = weight.float()
        if cross is None or self.settings.residual != "whole":
            return target
        moved = self.settings.correction * ((target @ cross)[:, self.order] @ factor.t() @ factor)
        return target.index_add(1, self.order, moved)

    def round(
        self,
        target: Tensor,
        coding: GroupedCoding,
        grid: Grid | None = None,
        outliers: Tensor | None = None,
    ) -> PackedWeight:
        """Round a target `[out_features, in_features]` to codes, with error feedback.

        Where the mask `outliers` `[out_features, in_features]` is true, what the code leaves of the weight as
        it then stands goes into a sparse part. Grids are fitted to the other weights, all at the start.
        """
        settings, order, factor = self.settings, self.order, self.factor
        energies = self.statistics.gram.diagonal()
        feedback = None
        cross = self.cross
        if cross is not None and settings.residual == "column":
            feedback = column_residuals(cross, order, factor).mul_(settings.correction)
        groups, _ = group_layout(target.shape[1], coding.group_size)
        static = settings.act_order and (settings.static_groups or groups == 1)
        if grid is None and (static or outliers is not None):
            others = target if outliers is None else target.masked_fill(outliers, 0)
            grid = fit_grid(others, coding, energies, settings.clip_search)
        columns = target.t()[order]  # [in, out], so that a column of the weight lies together
        mask = None if outliers is None else outliers.t()[order]
        return self._round(columns, feedback, energies[order], coding, grid, mask)

    def _round(
        self,
        columns: Tensor,
        feedback: Tensor | None,
        importance: Tensor,
        coding: GroupedCoding,
        grid: Grid | None,
        mask: Tensor | None,
    ) -> PackedWeight:
        """Round `columns` `[in, out]`, which stand in `order` and are overwritten, one after the other.

        `mask` `[in, out]`, in `order`, is true at outliers; with one there is a grid.
        """
        settings, order, factor = self.settings, self.order, self.factor
        static = grid is not None
        in_features, out_features = columns.shape
        groups, size = group_layout(in_features, coding.group_size)
        one_group = dataclasses.replace(coding, group_size=0)
        scales = torch.empty((groups, out_features), device=columns.device)
        zeros = torch.full_like(scales, coding_zero(coding))
        group_of = [column // size for column in range(in_features)]
        if grid is not None:
            _store_grid(grid, scales, zeros)
            group_of = (order // size).tolist()
        codes = torch.empty((in_features, out_features), dtype=torch.uint8, device=columns.device)
        beside = None if mask is None else torch.zeros_like(columns)
        for start, stop in _blocks(in_features, settings.block_size, in_features if static else size):
            if not static and start % size == 0:
                members, group = slice(start, min(start + size, in_features)), start // size
                fitted = fit_grid(columns[members].t(), one_group, importance[members], settings.clip_search)
                _store_grid(fitted, scales[group : group + 1], zeros[group : group + 1])
            errors = torch.empty_like(columns[start:stop])
            for column in range(start, stop):
                scale, zero = scales[group_of[column]], zeros[group_of[column]]
                values, inside = columns[column], slice(column + 1, stop)
                code = nearest_codes(values, scale, zero, coding)
                codes[column] = code
                error = errors[column - start]
                value = steps_of(code, zero, coding).mul_(scale)
                if mask is not None and beside is not None:
                    beside[column] = rounded_values(values - value) * mask[column]
                    value += beside[column]
                torch.sub(values, value, out=error).div_(factor[column, column])
                columns[inside].addr_(factor[column, inside], error, alpha=-1)
                if feedback is not None:
                    columns[inside].addr_(feedback[column, inside], values)
            columns[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
            if feedback is not None:
                columns[stop:].addmm_(feedback[start:stop, stop:].t(), columns[start:stop])
        if static:
            natural_codes = torch.empty_like(codes)
            natural_codes[order] = codes
            codes = natural_codes
        packed = PackedWeight.from_codes(
            codes.t(),
            scales.t(),
            None if coding.symmetric else zeros.t().to(torch.uint8),
            coding,
            order=order if settings.act_order and not static else None,
        )
        if mask is None or beside is None:
            return packed
        natural = order.argsort()
        return beside_base(packed, beside[natural].t(), mask[natural].t())


def inverse_factor(gram: Tensor, order: Tensor, damping: float) -> Tensor:
    """The upper triangular `U` with `U^T U = (H + l I)^-1`, rows and columns of `H` taken in an order.

    Two matrices of the size of `gram` are alive at its peak, `U` among them.

    Parameters
    ----------
    gram : Tensor[in_features, in_features], float32
        Symmetric; not modified.
    order : Tensor[in_features], int64
        Row and column `j` of the result belong to input `order[j]`.
    damping : float
        `l` as a fraction of the mean of the diagonal; raised tenfold while the factorization fails.

    Returns
    -------
    Tensor[in_features, in_features], float32
        The identity where no input was ever seen.

    Raises
    ------
    TailorbirdError
        When `gram` isn't finite or no damping helps.
    """
    lower = _lower_factor(gram, order, damping)
    # columns together, as LAPACK wants them, so that the solution takes the place of the right-hand side
    inverse = torch.eye(len(gram), dtype=gram.dtype, device=gram.device).mT
    torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
    del lower
    return inverse.flip(0, 1)


def upper_factor(gram: Tensor, order: Tensor, damping: float) -> Tensor:
    """The upper triangular `R` with `R R^T = H + l I`, the inverse of what `inverse_factor` returns.

    Parameters, exceptions
        As `inverse_factor`.
    """
    return _lower_factor(gram, order, damping).flip(0, 1)


def _lower_factor(gram: Tensor, order: Tensor, damping: float) -> Tensor:
    """The Cholesky factor of `H + l I` with its rows and columns in the reverse of an order."""
    mean = float(gram.diagonal().mean())
    if not math.isfinite(mean) or mean < 0:
        raise _not_finite(f"inputs with a mean square of {mean}")
    if mean == 0:
        return torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    backwards = order.flip(0)
    for retry in range(DAMPING_RETRIES + 1):
        damped = gram[backwards[:, None], backwards]
        damped.diagonal().add_(mean * damping * 10**retry)
        lower, failed = torch.linalg.cholesky_ex(damped)
        del damped
        if int(failed) == 0 and bool(torch.isfinite(lower.diagonal()).all()):
            raised = _raised.get()
            if retry and raised is not None:
                raised.append(damping * 10**retry)
            return lower
    raise TailorbirdError(
        f"a Gram matrix that can't be factorized with damping up to {damping * 10**DAMPING_RETRIES:g}",
        "the mean outer product of finite inputs",
        "calibrate in float32, or with other text",
    )


@contextmanager
def raised_dampings(raised: list[float]) -> Iterator[None]:
    """Have factorizations in here add the damping that they take to `raised`, where it is more than asked."""
    token = _raised.set(raised)
    try:
        yield
    finally:
        _raised.reset(token)


def inverse_diagonal(factor: Tensor, order: Tensor) -> Tensor:
    """The diagonal of `H^-1 = U^T U`, in the order of the inputs.

    Parameters
    ----------
    factor : Tensor[in_features, in_features], float32
        `U` of `inverse_factor`, in `order`.
    order : Tensor[in_features], int64

    Returns
    -------
    Tensor[in_features], float64
    """
    ordered = factor.square().sum(0, dtype=torch.float64)
    return torch.empty_like(ordered).index_copy_(0, order, ordered)


def column_residuals(cross: Tensor, order: Tensor, factor: Tensor) -> Tensor:
    """`P` of the paper: row `q` says where the residual of column `q` goes, among the columns after it.

    Parameters
    ----------
    cross : Tensor[in_features, in_features], float32
        `D = E[(x~ - x) x^T]`, in the order of the inputs; not modified.
    order : Tensor[in_features], int64
    factor : Tensor[in_features, in_features], float32
        `U` of `inverse_factor`, in `order`.

    Returns
    -------
    Tensor[in_features, in_features], float32
        `triu(D U^T, 1) U`, in `order`; its row `q` is `D_qF (H_FF)^-1` for the columns `F` after `q`.
    """
    later = cross[order[:, None], order] @ factor.t()
    return later.triu_(1) @ factor


def rounding_order(energies: Tensor, act_order: bool) -> Tensor:
    """Inputs by falling energy, equal ones as they stand; or all as they stand."""
    if act_order:
        return torch.argsort(energies, descending=True, stable=True)
    return torch.arange(len(energies), device=energies.device)


def _blocks(in_features: int, block_size: int, cut: int) -> Iterator[tuple[int, int]]:
    """Blocks of at most `block_size` columns, cut also at every multiple of `cut`."""
    start = 0
    while start < in_features:
        stop = min(start + block_size, (start // cut + 1) * cut, in_features)
        yield start, stop
        start = stop


def _store_grid(grid: Grid, scales: Tensor, zeros: Tensor) -> None:
    """Write a grid `[out, groups]` into `scales` and `zeros` `[groups, out]`."""
    scales.copy_(grid[0].t())
    if grid[1] is not None:
        zeros.copy_(grid[1].t())


def _not_finite(given: str) -> TailorbirdError:
    return TailorbirdError(
        given, "finite activations in calibration", "calibrate in float32, or with other text"
    )
