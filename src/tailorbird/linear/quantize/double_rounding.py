"""Double Rounding: codes of 8 bits whose upper 6, 4 and 2 bits are good codes, too.

Huang et al. 2025, "Nearly Lossless Adaptive Bit Switching" (arXiv:2502.01199), store a weight once, in 8
bits without zero points, and round what is stored again where fewer bits are wanted (`formats/nested.py`).
The paper trains a network for all widths at once. Here its weights are given, and what is chosen for all
widths at once are the scales and the codes, by the error feedback of GPTQ (`gptq.py`).

A code `c` of 8 bits has a value at each width `l`: `v_l(c) = scale V_l(c)`, with `V_l` in steps of 8 bits.
Each width has an output error of its own, `(v_l - w) H (v_l - w)^T`, and makes up for its own errors: it has
its own columns `t_l`, which begin as the weight. Once they have been moved by all columns before `q`, what a
code adds to the error of a width is `(t_l,q - v_l(c))^2 / U_qq^2`, and the code with the least weighted sum
over the widths is taken. The scale of a group is the one with the least weighted sum of
`sum_q H_qq (w_q - v_l,q)^2` among multiples of that which a group needs, as nearest codes have it.

The weight of a width of `l` bits is `4^(balance (l - 8))`. The square of a step grows fourfold with each bit
less: at 1 each width counts in steps of its own, at 0 errors count as they are, most of them those of the
narrowest.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tailorbird.errors import SettingsError
from tailorbird.formats.nested import STORED_BITS, WIDTHS, rounded_codes
from tailorbird.formats.packed import SCALE_DTYPES, CodesCoding, IntegerCoding, PackedCoding, PackedWeight
from tailorbird.kernels.packing import row_chunks
from tailorbird.kernels.reference import group_layout
from tailorbird.linear.quantize.feedback import FeedbackMethod
from tailorbird.linear.quantize.gptq import GptqRounding
from tailorbird.linear.quantize.grid import fit_grid, stored_scales
from tailorbird.linear.settings import check_setting, on_grids

#: scales that are tried, as multiples of the one with which the largest weight of a group is 128 steps
SPANS = tuple(2 ** (i / 8) for i in range(-8, 9))
#: columns that are rounded before those after them hear of it, in one matrix product
BLOCK = 128


@dataclass(frozen=True, kw_only=True)
class DoubleRounding(FeedbackMethod):
    """Error feedback that chooses each code of 8 bits for the widths of 8, 6, 4 and 2 bits together.

    Beyond what GPTQ takes it takes three more float32 copies of the weight.

    Parameters
    ----------
    balance : float
        From 0, where the narrowest width counts most, to 1, where every width counts alike in steps of its
        own, and so the widest most.
    damping, asymmetric, correction, least_token
        As `Gptq`. The inputs of the compressed model, which `asymmetric` looks at, are those of 8 bits.
    """

    name: ClassVar[str] = "double-rounding"
    outliers: ClassVar[float] = 0.0
    paper: ClassVar[str] = "Huang et al. 2025, arXiv:2502.01199"
    makes: ClassVar[frozenset[str]] = frozenset({IntegerCoding.kind})

    balance: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_setting(self.name, "balance", self.balance, 0 <= self.balance <= 1, "a number from 0 to 1")

    @property
    def width_weights(self) -> Tensor:
        """How much the errors of each of `WIDTHS` count: float32 `[widths]`."""
        return torch.tensor([4 ** (self.balance * (bits - STORED_BITS)) for bits in WIDTHS])

    def round(self, rounding: GptqRounding, target: Tensor, coding: CodesCoding) -> PackedWeight:
        """Round what is aimed at, on scales for all widths; other codings, of embeddings, as GPTQ does."""
        if not is_nestable(coding):
            return rounding.round(target, on_grids(self.name, coding))
        coding = check_nestable(coding)
        weights = self.width_weights
        scales = fit_nested_scales(target, coding, rounding.statistics.gram.diagonal(), weights)
        codes = nested_feedback(rounding, target, scales, coding, weights)
        return PackedWeight.from_codes(codes, scales, None, coding)


def is_nestable(coding: PackedCoding) -> bool:
    """Whether it's of integers of 8 bits without zero points."""
    return isinstance(coding, IntegerCoding) and coding.bits == STORED_BITS and coding.symmetric


def check_nestable(coding: PackedCoding) -> IntegerCoding:
    """`coding`, in which fewer bits must be nested.

    Raises
    ------
    SettingsError
        It is another.
    """
    if is_nestable(coding):
        assert isinstance(coding, IntegerCoding)
        return coding
    raise SettingsError(
        f"`{DoubleRounding.name}` for codes of {coding.label}",
        f"integers of {STORED_BITS} bits without zero points, in which fewer bits are nested",
        f"write {DoubleRounding.name}:bits={STORED_BITS},group=64; fewer bits are chosen when it is read",
    )


@functools.cache
def width_steps() -> Tensor:
    """The value that every code of 8 bits has at every width, in steps of 8 bits: float32 `[widths, 256]`."""
    codes = torch.arange(1 << STORED_BITS, dtype=torch.uint8, device="cpu")
    half = 1 << (STORED_BITS - 1)
    return torch.stack(
        [rounded_codes(codes, bits).float() * 2 ** (STORED_BITS - bits) - half for bits in WIDTHS]
    )


def fit_nested_scales(weight: Tensor, coding: IntegerCoding, importance: Tensor, weights: Tensor) -> Tensor:
    """Scales of groups with which nearest codes of 8 bits serve all widths best.

    Tried are the scale that is best for 8 bits, and `SPANS` multiples of either sign of the one that takes
    the largest weight of the group to 128 steps. It works through the rows in chunks.

    Parameters
    ----------
    weight : Tensor[out_features, in_features], float32
    coding : IntegerCoding
        As `check_nestable` has it.
    importance : Tensor[in_features]
        Weight of each input's squared error.
    weights : Tensor[widths]
        Of the widths' errors.

    Returns
    -------
    Tensor[out_features, groups], float32
        With their stored values.

    Raises
    ------
    SettingsError
        As `fit_grid`.
    """
    out_features, in_features = weight.shape
    groups, size = group_layout(in_features, coding.group_size)
    scales = fit_grid(weight, coding, importance)[0].float()
    padding = (0, groups * size - in_features)
    energies = torch.nn.functional.pad(importance.float(), padding).view(groups, size)
    # the narrowest width must hold its scale, too
    most = torch.finfo(SCALE_DTYPES[coding.scale_dtype]).max / 2 ** (STORED_BITS - min(WIDTHS))
    for rows in row_chunks(out_features, in_features):
        values = torch.nn.functional.pad(weight[rows].float(), padding).view(-1, groups, size)
        least = _nested_error(values, scales[rows], energies, weights)
        largest = values.abs().amax(-1) / (1 << (STORED_BITS - 1))
        for span in (sign * span for span in SPANS for sign in (-1, 1)):
            tried = stored_scales((largest * span).clamp(-most, most), coding)
            error = _nested_error(values, tried, energies, weights)
            better = error < least
            scales[rows] = torch.where(better, tried, scales[rows])
            least = torch.where(better, error, least)
    return scales


def _nested_error(values: Tensor, scales: Tensor, energies: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of the widths' squared errors of `values` `[rows, groups, size]`: `[rows, groups]`."""
    half = 1 << (STORED_BITS - 1)
    codes = (values / scales[..., None]).round_().add_(half).clamp_(0, 2 * half - 1).int()
    total = torch.zeros_like(scales)
    for steps, weight in zip(width_steps(), weights.tolist(), strict=True):
        error = steps.index_select(0, codes.flatten()).view_as(values).mul_(scales[..., None])
        total += weight * error.sub_(values).square_().mul_(energies).sum(-1)
    return total


def nested_feedback(
    rounding: GptqRounding, target: Tensor, scales: Tensor, coding: IntegerCoding, weights: Tensor
) -> Tensor:
    """Codes of 8 bits, column by column, with an error feedback for each width.

    Parameters
    ----------
    rounding : GptqRounding
        Gives the order of the columns and the factor.
    target : Tensor[out_features, in_features], float32
        Not modified.
    scales : Tensor[out_features, groups], float32
    coding : IntegerCoding
        As `check_nestable` has it.
    weights : Tensor[widths]
        Of the widths' errors.

    Returns
    -------
    Tensor[out_features, in_features], uint8
        In the order of the inputs.
    """
    order, factor, steps = rounding.order, rounding.factor, width_steps()
    _, size = group_layout(target.shape[1], coding.group_size)
    in_order = target.t()[order]
    columns = in_order.expand(len(WIDTHS), -1, -1).clone()  # [widths, in, out]
    codes = torch.empty(in_order.shape, dtype=torch.uint8, device=target.device)
    for start in range(0, len(in_order), BLOCK):
        stop = min(start + BLOCK, len(in_order))
        errors = torch.empty_like(columns[:, start:stop])
        for column in range(start, stop):
            scale, values = scales[:, int(order[column]) // size], columns[:, column]
            code = best_codes(values / scale, weights)
            codes[column] = code
            error = values - steps[:, code] * scale
            errors[:, column - start] = error.div_(factor[column, column])
            inside = slice(column + 1, stop)
            columns[:, inside] -= factor[column, inside, None] * error[:, None]
        columns[:, stop:] -= factor[start:stop, stop:].t() @ errors
    found = torch.empty_like(codes)
    found[order] = codes
    return found.t()


def best_codes(wanted: Tensor, weights: Tensor) -> Tensor:
    """The code of 8 bits whose values come closest to what each width wants, by weighted squares.

    Parameters
    ----------
    wanted : Tensor[widths, n], float32
        In steps of 8 bits.
    weights : Tensor[widths]

    Returns
    -------
    Tensor[n], int64
        Of equal ones the least.
    """
    steps = width_steps()
    weighted = weights[:, None] * steps
    # sum_l weight_l (V_l(c) - t_l)^2, without what no code changes
    return torch.addmm((weighted * steps).sum(0), wanted.t(), weighted, alpha=-2).argmin(1)
