"""Tables of a row's own values as clusters of its weights, and the nearest of these values.

Values of a table ascend, so that the nearest one is told by how many midpoints between neighbours lie below.
Sums over a cluster are differences of running sums along the sorted row, whatever the row's length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tailorbird.errors import SettingsError
from tailorbird.formats.packed import TABLE_DTYPES, BinaryCoding, IntegerCoding, TableCoding
from tailorbird.linear.quantize.grid import fit_grid

#: how often clusters are formed anew, at most; they stop moving earlier
CLUSTERINGS = 100
#: weights handled at once
CHUNK_VALUES = 1 << 18


def nearest_values(values: Tensor, tables: Tensor) -> Tensor:
    """Codes of the values of a table nearest to `values`, the lower of two.

    Parameters
    ----------
    values : Tensor[rows, ...], float
    tables : Tensor[rows, levels], float
        Ascending in each row.

    Returns
    -------
    Tensor, shape of `values`, int64
    """
    between = (tables[:, 1:] + tables[:, :-1]) / 2
    found = torch.searchsorted(between, values.reshape(len(tables), -1).contiguous())
    return found.view(values.shape)


def stored_values(tables: Tensor, coding: TableCoding | BinaryCoding) -> Tensor:
    """Tables rounded to the dtype in which they are stored, in float32.

    Raises
    ------
    SettingsError
        When values are too large for that dtype.
    """
    stored = tables.to(TABLE_DTYPES[coding.table_dtype]).float()
    if not bool(stored.isfinite().all()):
        raise SettingsError(
            f"weights up to {float(tables.abs().max()):.3g} for tables of {coding.table_dtype}",
            f"at most {torch.finfo(TABLE_DTYPES[coding.table_dtype]).max:.3g}",
            "choose bfloat16 tables",
        )
    return stored


def clustered(weight: Tensor, coding: TableCoding, importance: Tensor | None = None) -> Tensor:
    """For each row the centres of a weighted clustering of its weights, as they are stored.

    Lloyd's steps keep or lower `sum_q h_q (w_q - t)^2`, `t` being the value nearest to `w_q`. They begin at
    the uniform grid that `fit_grid` finds for this sum, and at values that halve equal shares of the
    importance; where they end better is kept for each row.

    Parameters
    ----------
    weight : Tensor[out_features, in_features], float
        Finite; not modified.
    coding : TableCoding
    importance : Tensor[in_features], float, or None
        `h`, not negative; None: all equal.

    Returns
    -------
    Tensor[out_features, 2**bits], float32
        Ascending, values of the coding's dtype.

    Raises
    ------
    SettingsError
        When weights are too large for that dtype.
    """
    out_features, in_features = weight.shape
    if importance is None or not bool(importance.any()):
        importance = torch.ones(in_features, device=weight.device)
    importance = importance.double() / importance.max()
    tables = torch.empty((out_features, 1 << coding.bits), device=weight.device)
    step = max(1, CHUNK_VALUES // in_features)
    for start in range(0, out_features, step):
        rows = slice(start, start + step)
        sums = RunningSums(weight[rows].float(), importance)
        uniform = _uniform(weight[rows].float(), coding, importance.float()).double()
        first, second = (sums.settled(begin) for begin in (uniform, sums.equal_shares(1 << coding.bits)))
        better = sums.error(second) < sums.error(first)
        tables[rows] = torch.where(better[:, None], second, first).float()
    return stored_values(tables.sort(-1).values, coding)


def _uniform(weight: Tensor, coding: TableCoding, importance: Tensor) -> Tensor:
    """The uniform grid of each row as a table, ascending: float32 `[rows, 2**bits]`."""
    scales, zeros = fit_grid(weight, IntegerCoding(coding.bits, 0), importance, apart=True)
    assert zeros is not None
    steps = torch.arange(1 << coding.bits, device=weight.device) - zeros.float()
    return (steps * scales.float()).sort(-1).values


class RunningSums:
    """Rows sorted, and along them the sums of `h`, `h w` and `h w^2`, float64 `[rows, in_features + 1]`.

    Attributes
    ----------
    mass, first, second : Tensor
        These three; `inside` makes them those of clusters.
    """

    def __init__(self, weight: Tensor, importance: Tensor) -> None:
        self.values, order = weight.double().contiguous().sort(-1)
        h = importance[order]
        weighted = h * self.values
        self.mass, self.first, self.second = (
            torch.nn.functional.pad(one.cumsum(-1), (1, 0)) for one in (h, weighted, weighted * self.values)
        )

    def equal_shares(self, count: int) -> Tensor:
        """Values at the middle of each of `count` equal shares of the mass."""
        shares = (torch.arange(count, device=self.mass.device) + 0.5) / count
        wanted = shares * self.mass[:, -1:]
        at = torch.searchsorted(self.mass[:, 1:].contiguous(), wanted).clamp(max=self.values.shape[1] - 1)
        return self.values.gather(1, at)

    def settled(self, tables: Tensor) -> Tensor:
        """Tables after Lloyd's steps; the value of an empty cluster stays."""
        tables = tables.clamp(
            self.values[:, :1], self.values[:, -1:]
        )  # further out none is nearer to a weight
        ends = None
        for _ in range(CLUSTERINGS):
            found = self.ends(tables)
            if ends is not None and torch.equal(found, ends):
                break
            ends = found
            mass, first = (self.inside(one, ends) for one in (self.mass, self.first))
            tables = torch.where(mass > 0, first / mass, tables)
        return tables

    def error(self, tables: Tensor) -> Tensor:
        """`sum_q h_q (w_q - t)^2` of each row."""
        ends = self.ends(tables)
        mass, first, second = (self.inside(one, ends) for one in (self.mass, self.first, self.second))
        return (second - 2 * tables * first + tables.square() * mass).sum(-1)

    def ends(self, tables: Tensor) -> Tensor:
        """Where each cluster but the last ends in the sorted row: int64 `[rows, levels - 1]`."""
        return torch.searchsorted(self.values, (tables[:, 1:] + tables[:, :-1]) / 2, right=True)

    def inside(self, running: Tensor, ends: Tensor) -> Tensor:
        """Sums over each cluster."""
        at = running.gather(1, ends)
        return torch.diff(torch.cat([running[:, :1], at, running[:, -1:]], 1), dim=1)
