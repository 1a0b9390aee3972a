"""Grids of grouped codes: where the representable values of each group of a row lie.

A grid is a scale and a zero point per group; the value of code `c` is `scale * (c - zero)`, or of a codebook
`scale * levels[c]`. Grids start from the least and greatest value of the group (round to nearest between
them) and may then be made narrower where clipping a few values costs less than coarse steps cost all
others. Scales are rounded to the dtype in which they are stored before any code is computed, so that what
is judged is what is stored.

Which code a value gets beyond rounding to the nearest (error feedback) is not decided here.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from tailorbird.errors import SettingsError
from tailorbird.formats.codebooks import LARGEST
from tailorbird.formats.packed import (
    SCALE_DTYPES,
    CodebookCoding,
    GroupedCoding,
    IntegerCoding,
    PackedWeight,
    ScaledCoding,
)
from tailorbird.kernels.packing import unpack_codes
from tailorbird.kernels.reference import group_layout

#: weights handled at once; some ten temporaries of this many values live at a time
CHUNK_VALUES = 1 << 18
#: narrowest grid that the clip search tries, as a fraction of the full range, per number of bits
NARROWEST = {2: 0.40, 3: 0.50, 4: 0.65, 5: 0.75, 6: 0.85, 8: 0.95}
#: grids that the clip search tries between the full range and the narrowest
CLIP_STEPS = 8
#: scales and zero points `[out_features, groups]`, as `fit_grid` returns them
Grid = tuple[Tensor, Tensor | None]


class _Grid(NamedTuple):
    """Scales and zero points `[rows, groups]` in float32; scales already have their stored values."""

    scales: Tensor
    zeros: Tensor


def fit_grid(
    weight: Tensor,
    coding: GroupedCoding,
    importance: Tensor | None = None,
    clip: bool = True,
    apart: bool = False,
    upright: bool = False,
) -> Grid:
    """Fit the grid of every group of a weight.

    The grid without clipping spans `[min(w, 0), max(w, 0)]`. With `clip`, grids narrowed in
    `CLIP_STEPS` steps down to `NARROWEST` of that span are tried, the best is refined once by the least
    squares scale of its codes, `sum h w (c - z) / sum h (c - z)^2`, and the one with the least
    `sum h (w - scale * (c - z))^2` is kept; for a codebook `levels[c]` takes the place of `c - z`.

    A symmetric grid has codes for `-2^(bits-1)` to `2^(bits-1) - 1` steps; its scale may be negative, so
    that the value of largest magnitude falls on the side that has one step more. That grid and the one
    that keeps the largest magnitude on the shorter side are both tried. A codebook's ends lie equally far
    from zero, but its levels on either side needn't mirror each other: it is tried both ways round.

    Parameters
    ----------
    weight : Tensor[out_features, in_features], float
        Finite; not modified. Works through the rows in chunks, in float32.
    coding : IntegerCoding or CodebookCoding
    importance : Tensor[in_features], non-negative, or None
        Weight `h` of each input's squared error, such as the diagonal of its Gram matrix; None: all
        equal.
    clip : bool
        Whether grids narrower than the range of the values are tried.
    apart : bool
        With `clip`, whether the two ends of the span are narrowed each for itself: every pair of steps is
        tried. It is the same for grids that lie symmetrically, as these have one end.
    upright : bool
        With a codebook, whether it is tried one way round only, so that scales are above zero.

    Returns
    -------
    scales : Tensor[out_features, groups]
        In the coding's scale dtype, never zero (a group of zeros gets 1, or next to nothing where zero is
        none of the levels).
    zeros : Tensor[out_features, groups], uint8, or None
        None for a symmetric coding and for a codebook.

    Raises
    ------
    SettingsError
        When weights are too large for the coding's scale dtype.
    """
    out_features, in_features = weight.shape
    groups, size = group_layout(in_features, coding.group_size)
    scales = torch.empty((out_features, groups), dtype=SCALE_DTYPES[coding.scale_dtype], device=weight.device)
    zeros = torch.empty((out_features, groups), dtype=torch.uint8, device=weight.device)
    whole = in_features // size  # groups of full length; at most one shorter group follows
    step = max(1, CHUNK_VALUES // in_features)
    for start in range(0, out_features, step):
        rows = slice(start, start + step)
        chunk = weight[rows].float()
        for first, count, length in ((0, whole, size), (whole, groups - whole, in_features - whole * size)):
            if count == 0:
                continue
            columns = slice(first * size, first * size + count * length)
            grid = _fit_groups(
                chunk[:, columns].reshape(-1, count, length),
                None if importance is None else importance[columns].float().reshape(count, length),
                coding,
                clip,
                apart,
                upright,
            )
            scales[rows, first : first + count] = grid.scales.to(scales.dtype)
            zeros[rows, first : first + count] = grid.zeros.to(torch.uint8)
    return scales, None if coding.symmetric else zeros


def quantize_to_grid(weight: Tensor, scales: Tensor, zeros: Tensor | None, coding: GroupedCoding) -> Tensor:
    """Round every weight to the nearest value of its group's grid.

    Parameters
    ----------
    weight : Tensor[out_features, in_features], float
    scales : Tensor[out_features, groups]
    zeros : Tensor[out_features, groups], uint8, or None
        None for a symmetric coding and for a codebook.
    coding : IntegerCoding or CodebookCoding

    Returns
    -------
    Tensor[out_features, in_features], uint8
        `clamp(round(w / scale) + zero, 0, 2^bits - 1)`, halves rounded to even; of a codebook the nearest
        level, the lower of two.
    """
    out_features, in_features = weight.shape
    _, size = group_layout(in_features, coding.group_size)
    codes = torch.empty((out_features, in_features), dtype=torch.uint8, device=weight.device)
    group_of = torch.arange(in_features, device=weight.device) // size
    step = max(1, CHUNK_VALUES // in_features)
    for start in range(0, out_features, step):
        rows = slice(start, start + step)
        zero: Tensor | int = coding_zero(coding) if zeros is None else zeros[rows].float()[:, group_of]
        codes[rows] = nearest_codes(weight[rows].float(), scales[rows].float()[:, group_of], zero, coding)
    return codes


def nearest_codes(values: Tensor, scales: Tensor, zeros: Tensor | int, coding: GroupedCoding) -> Tensor:
    """Codes of the grid values nearest to `values`, as floats; `scales` and `zeros` broadcast."""
    if isinstance(coding, IntegerCoding):
        return (values / scales).round_().add_(zeros).clamp_(0, (1 << coding.bits) - 1)
    # whole levels meet halfway at halves: the nearest is the same from above one half up to the next
    halves = (values / scales).mul_(2).ceil_().clamp_(-2 * LARGEST, 2 * LARGEST).add_(2 * LARGEST)
    codes = _codes_at_halves(coding).to(values.device)
    return codes.index_select(0, halves.flatten().int()).view_as(halves)


@functools.cache
def _codes_at_halves(coding: CodebookCoding) -> Tensor:
    """Codes of the levels nearest to -127, -126.5, ..., 127, the lower of two, as floats.

    Of two codes for the same level it is always the lower.
    """
    levels = coding.levels.float()
    halves = torch.arange(-2 * LARGEST, 2 * LARGEST + 1, device="cpu") / 2
    nearest = torch.bucketize(halves, (levels[1:] + levels[:-1]) / 2)
    return torch.searchsorted(levels, levels[nearest]).float()


def steps_of(codes: Tensor, zeros: Tensor | int, coding: GroupedCoding) -> Tensor:
    """How many scales the values of `codes`, floats, are; `codes` may be overwritten."""
    if coding.levels is None:
        return codes.sub_(zeros)
    levels = coding.levels.to(codes.device).float()
    return levels.index_select(0, codes.flatten().int()).view_as(codes)


def stored_scales(scales: Tensor, coding: ScaledCoding) -> Tensor:
    """Scales rounded to their stored dtype, in float32, of a magnitude that it holds.

    Zero becomes one, or the least where zero is none of the levels or points.
    """
    dtype = SCALE_DTYPES[coding.scale_dtype]
    information = torch.finfo(dtype)
    # float16 goes on below its normal range with a fixed step; bfloat16 does so where float32 does
    least = information.smallest_normal * (information.eps if dtype == torch.float16 else 1)
    magnitude = scales.abs().clamp(least, information.max).to(dtype).float()
    levels = coding.levels
    none = 1.0 if levels is None or bool((levels.view(len(levels), -1) == 0).all(1).any()) else least
    return torch.where(scales == 0, none, torch.where(scales < 0, -magnitude, magnitude))


def grid_of(packed: PackedWeight) -> Grid:
    """Scales and zero points ``[out_features, groups]`` of a weight of codes, the latter None without any."""
    if not isinstance(packed.coding, GroupedCoding):
        raise ValueError("only integers and codebooks have a grid")
    groups, _ = group_layout(packed.in_features, packed.coding.group_size)
    zeros = packed.tensors.get("zeros")
    return packed.tensors["scales"], None if zeros is None else unpack_codes(
        zeros, packed.coding.bits, groups
    )


def coding_zero(coding: GroupedCoding) -> int:
    """The zero point that every group of a symmetric coding has; a codebook's isn't looked at."""
    return 1 << (coding.bits - 1)


def _fit_groups(
    values: Tensor,
    importance: Tensor | None,
    coding: GroupedCoding,
    clip: bool,
    apart: bool,
    upright: bool,
) -> _Grid:
    """The grid of values `[rows, groups, length]`, float32, with importance `[groups, length]`."""
    low, high = torch.aminmax(values, dim=-1)
    _check_range(low, high, coding)
    narrowest = NARROWEST[coding.bits]
    shrinks = [1 - (1 - narrowest) * i / CLIP_STEPS for i in range(CLIP_STEPS + 1)] if clip else [1.0]
    spans = [(shrink, shrink) for shrink in shrinks]
    if apart and not coding.symmetric:
        spans = list(itertools.product(shrinks, shrinks))
    grids = [grid for down, up in spans for grid in _spanning_grids(low * down, high * up, coding, upright)]
    best = grids[0]
    if len(grids) > 1:
        least = _grid_error(values, importance, best, coding)
        for grid in grids[1:]:
            error = _grid_error(values, importance, grid, coding)
            best = _choose(error < least, grid, best)
            least = torch.minimum(error, least)
        if clip:
            refined = _refined_grid(values, importance, best, coding)
            best = _choose(_grid_error(values, importance, refined, coding) < least, refined, best)
    if coding.levels is not None:
        return best
    one_value = (low == high) & (high.abs() <= torch.finfo(SCALE_DTYPES[coding.scale_dtype]).max)
    return _choose(one_value, _constant_grid(low, coding), best)


def _spanning_grids(low: Tensor, high: Tensor, coding: GroupedCoding, upright: bool) -> list[_Grid]:
    """Grids whose first and last code lie at the ends of the span from `low` to `high` and zero."""
    levels = (1 << coding.bits) - 1
    if not coding.symmetric:
        low, high = low.clamp(max=0), high.clamp(min=0)
        scales = stored_scales(high / levels - low / levels, coding)
        return [_Grid(scales, (-low / scales).round_().clamp_(0, levels))]
    largest = torch.where(high >= -low, high, low)
    lowest, highest = _ends(coding)
    zeros = torch.full_like(largest, coding_zero(coding))
    if upright:
        return [_Grid(stored_scales(largest.abs() / highest, coding), zeros)]
    return [
        _Grid(stored_scales(largest / lowest, coding), zeros),
        _Grid(stored_scales(largest / highest, coding), zeros),
    ]


def _ends(coding: GroupedCoding) -> tuple[int, int]:
    """Least and greatest number of steps of a coding without zero points."""
    if coding.levels is None:
        half = coding_zero(coding)
        return -half, half - 1
    return int(coding.levels[0]), int(coding.levels[-1])


def _constant_grid(value: Tensor, coding: GroupedCoding) -> _Grid:
    """The grid one step of which is `value`: exact where a group holds one value that a scale can hold."""
    if coding.symmetric:
        half = coding_zero(coding)
        return _Grid(stored_scales(-value, coding), torch.full_like(value, half))
    return _Grid(stored_scales(value.abs(), coding), (value < 0).float())


def _refined_grid(values: Tensor, importance: Tensor | None, grid: _Grid, coding: GroupedCoding) -> _Grid:
    """The grid with the scale that fits its codes best in the sense of least squares."""
    zeros = grid.zeros[..., None]
    steps = steps_of(nearest_codes(values, grid.scales[..., None], zeros, coding), zeros, coding)
    weighted = steps if importance is None else steps * importance
    scales = (weighted * values).sum(-1) / (weighted * steps).sum(-1)
    usable = scales.isfinite() & (scales != 0)
    return _Grid(torch.where(usable, stored_scales(scales.nan_to_num(1.0), coding), grid.scales), grid.zeros)


def _grid_error(values: Tensor, importance: Tensor | None, grid: _Grid, coding: GroupedCoding) -> Tensor:
    """Summed squared error `[rows, groups]` of rounding to the grid."""
    scales, zeros = grid.scales[..., None], grid.zeros[..., None]
    steps = steps_of(nearest_codes(values, scales, zeros, coding), zeros, coding)
    error = steps.mul_(scales).sub_(values).square_()
    return (error if importance is None else error.mul_(importance)).sum(-1)


def _choose(condition: Tensor, first: _Grid, second: _Grid) -> _Grid:
    """`first` where the condition holds, else `second`."""
    return _Grid(
        torch.where(condition, first.scales, second.scales),
        torch.where(condition, first.zeros, second.zeros),
    )


def _check_range(low: Tensor, high: Tensor, coding: GroupedCoding) -> None:
    """Refuse weights that lie more than half a step beyond the widest grid."""
    most = torch.finfo(SCALE_DTYPES[coding.scale_dtype]).max
    if coding.symmetric:
        steps = -_ends(coding)[0]
        needed = torch.maximum(high, -low) / steps
    else:
        steps = (1 << coding.bits) - 1
        needed = high.clamp(min=0) / steps - low.clamp(max=0) / steps
    if float(needed.max()) > most * (1 + 0.5 / steps):
        largest = max(abs(float(low.min())), abs(float(high.max())))
        raise SettingsError(
            f"weights up to {largest:.3g} for {coding.bits}-bit codes with {coding.scale_dtype} scales",
            f"scales of at most {most:.3g}",
            "choose bfloat16 scales, or more bits",
        )
