"""Signs before one of two magnitudes of a group of a row: the best magnitudes, and rounding to them.

However the weights of a group are parted into two classes, the best magnitudes are the means of the classes'
own, and in the best parting one class holds the smaller weights and one the larger: so it is found exactly,
by trying every break point between them. Sums of two binary terms, `a s + b t` with signs `s` and `t`, have
the same four values, `a + b` and `a - b` with either sign: so these are their best scales, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tailorbird.formats.packed import BinaryCoding, PackedWeight
from tailorbird.kernels.reference import group_layout
from tailorbird.linear.quantize.clusters import CHUNK_VALUES, RunningSums, stored_values

#: columns that are rounded before those after them hear of it, in one matrix product
BLOCK = 128


def split_magnitudes(weight: Tensor, importance: Tensor) -> Tensor:
    """The two magnitudes of the least `sum_q h_q (|w_q| - m)^2`, `m` being the nearer of them, of each row.

    Parameters
    ----------
    weight : Tensor[rows, members], float
    importance : Tensor[members], float
        `h`, not negative.

    Returns
    -------
    Tensor[rows, 2], float32
        Ascending; equal where all weights of a row are alike.
    """
    sums = RunningSums(weight.abs(), importance.double())
    mass, first = sums.mass[:, 1:], sums.first[:, 1:]  # up to each break point
    rest, left = mass[:, -1:] - mass, first[:, -1:] - first
    tiny = torch.finfo(torch.float64).tiny
    below, above = first / mass.clamp(min=tiny), left / rest.clamp(min=tiny)
    best = (first * below + left * above).argmax(-1, keepdim=True)
    small, large = below.gather(1, best), above.gather(1, best)
    return torch.cat([small, torch.maximum(small, large)], -1).float()  # the upper class may be empty


def nearest_signed(values: Tensor, magnitudes: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of the nearest signed magnitudes, the lowest of those that are equally near, and their values.

    Parameters
    ----------
    values : Tensor[rows, members], float32
    magnitudes : Tensor[rows, 2], float32

    Returns
    -------
    codes : Tensor[rows, members], uint8
    values : Tensor[rows, members], float32
    """
    signed = torch.cat([-magnitudes, magnitudes], -1)
    codes = (values[..., None] - signed[:, None]).abs_().argmin(-1)
    return codes.to(torch.uint8), signed.gather(1, codes)


def fitted_magnitudes(weight: Tensor, coding: BinaryCoding, importance: Tensor | None = None) -> Tensor:
    """`split_magnitudes` of the groups of a weight, as they are stored.

    Parameters
    ----------
    weight : Tensor[out_features, in_features], float
        Finite; not modified.
    coding : BinaryCoding
    importance : Tensor[in_features], float, or None
        None, or none in a group: all its inputs alike.

    Returns
    -------
    Tensor[out_features, groups, 2], float32

    Raises
    ------
    SettingsError
        When weights are too large for the coding.
    """
    groups, size = group_layout(weight.shape[1], coding.group_size)
    tables = torch.empty((len(weight), groups, 2), device=weight.device)
    if importance is None:
        importance = torch.ones(weight.shape[1], device=weight.device)
    for group, (members, h) in enumerate(zip(weight.split(size, 1), importance.split(size), strict=True)):
        h = h if bool(h.any()) else torch.ones_like(h)
        for rows in _row_chunks(members):
            tables[rows, group] = split_magnitudes(members[rows], h)
    return stored_values(tables, coding)


def round_to_magnitudes(
    weight: Tensor, coding: BinaryCoding, importance: Tensor | None = None
) -> PackedWeight:
    """Round a weight to nearest; parameters and exceptions as of `fitted_magnitudes`."""
    _, size = group_layout(weight.shape[1], coding.group_size)
    tables = fitted_magnitudes(weight, coding, importance)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for group, (members, into) in enumerate(zip(weight.split(size, 1), codes.split(size, 1), strict=True)):
        for rows in _row_chunks(members):
            into[rows] = nearest_signed(members[rows].float(), tables[rows, group])[0]
    return PackedWeight.from_tables(codes, tables, coding)


def _row_chunks(weight: Tensor) -> Iterator[slice]:
    """Rows of a weight that are handled at once."""
    step = max(1, CHUNK_VALUES // weight.shape[1])
    return (slice(start, start + step) for start in range(0, len(weight), step))


def codes_by_feedback(
    target: Tensor, factor: Tensor, order: Tensor, tables: Tensor, coding: BinaryCoding
) -> PackedWeight:
    """Round column by column, and let those that follow make up for each error, as GPTQ does (`gptq.py`).

    Groups hold neighbouring columns, whatever the order of rounding.

    Parameters
    ----------
    target : Tensor[out_features, in_features], float32
        Not modified.
    factor : Tensor[in_features, in_features], float32
        `gptq.inverse_factor`, in `order`.
    order : Tensor[in_features], int64
        In which columns are rounded.
    tables : Tensor[out_features, groups, 2], float32
        As they are stored.
    """
    _, size = group_layout(target.shape[1], coding.group_size)
    groups = tables.unbind(1)
    columns, codes = target.t()[order], torch.empty_like(target.t(), dtype=torch.uint8)
    for start in range(0, len(columns), BLOCK):
        inside = slice(start, min(start + BLOCK, len(columns)))
        magnitudes = [groups[int(column) // size] for column in order[inside]]
        codes[order[inside]] = _round_block(columns, factor, inside, magnitudes)
    return PackedWeight.from_tables(codes.t(), tables, coding)


def groups_by_feedback(
    target: Tensor, factor: Tensor, order: Tensor, importance: Tensor | None, coding: BinaryCoding
) -> PackedWeight:
    """`codes_by_feedback` with groups along the order, each fitted to what its weights are once it's reached.

    Parameters
    ----------
    importance : Tensor[in_features], float, or None
        As of `fitted_magnitudes`, in the order of the inputs.

    Returns
    -------
    PackedWeight
        Columns as they stand in `order`, which isn't stored.
    """
    _, size = group_layout(target.shape[1], coding.group_size)
    columns, codes = target.t()[order], torch.empty_like(target.t(), dtype=torch.uint8)
    one_group, tables = replace(coding, group_size=0), []
    for group in range(0, len(columns), size):
        end = min(group + size, len(columns))
        h = None if importance is None else importance[order[group:end]]
        tables.append(fitted_magnitudes(columns[group:end].t(), one_group, h)[:, 0])
        for start in range(group, end, BLOCK):
            inside = slice(start, min(start + BLOCK, end))
            codes[inside] = _round_block(columns, factor, inside, [tables[-1]] * BLOCK)
    return PackedWeight.from_tables(codes.t(), torch.stack(tables, 1), coding)


def _round_block(columns: Tensor, factor: Tensor, inside: slice, magnitudes: Sequence[Tensor]) -> Tensor:
    """Codes of some of `columns` `[in, out]`, of which those after them make up for their errors."""
    stop = inside.stop
    errors = torch.empty_like(columns[inside])
    codes = torch.empty(errors.shape, dtype=torch.uint8, device=columns.device)
    for place, column in enumerate(range(inside.start, stop)):
        code, value = nearest_signed(columns[column, :, None], magnitudes[place])
        codes[place] = code[:, 0]
        error = torch.sub(columns[column], value[:, 0], out=errors[place]).div_(factor[column, column])
        columns[column + 1 : stop].addr_(factor[column, column + 1 : stop], error, alpha=-1)
    columns[stop:].addmm_(factor[inside, stop:].t(), errors, alpha=-1)
    return codes
