"""Binary-coded weights: each is a sum of a row's few scales, with a sign before each of them.

You et al. 2024, "ShiftAddLLM: Accelerating Pretrained LLMs via Post-Training Multiplication-Less
Reparameterization" (arXiv:2406.05981), and Park et al. 2022, "LUT-GEMM: Quantized Matrix Multiplication based
on LUTs for Efficient Inference in Large-Scale Generative Language Models" (arXiv:2206.09557). A row `w` of
`k` bits is `sum_i a_i b_i` with `b_i` of ones and minus ones. A greedy start takes as `a_i` the mean
magnitude of what the terms before it leave, as `b_i` its signs; then nearest values and the least squares `a`
for their signs follow in turn (`binary_scales`), each input weighted by `1 / [H^-1]_qq`, where the authors
weigh all alike. Signs are then found with GPTQ's error feedback, as theirs are, and `a` by least squares of
the outputs, in turn, as GANQ does with whole tables (`ganq.py`).

The `2**k` sums of a row are its table, in a dtype that holds each of them exactly, so that scales and signs
can be read back from what is stored. A table of GANQ, whose values are free, has as many bytes: this is for
those who need the form. Left out are scales that are powers of two, as nothing here runs by shifts, scales of
groups or of single columns, and ShiftAddLLM's allocation of bits.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tailorbird.formats.packed import TABLE_DTYPES, CodesCoding, PackedWeight, TableCoding
from tailorbird.linear.quantize.clusters import CHUNK_VALUES, CLUSTERINGS, RunningSums, stored_values
from tailorbird.linear.quantize.feedback import FeedbackMethod
from tailorbird.linear.quantize.ganq import HELD, damped, in_turns
from tailorbird.linear.quantize.gptq import GptqRounding, inverse_diagonal
from tailorbird.linear.settings import check_setting


@dataclass(frozen=True, kw_only=True)
class Bcq(FeedbackMethod):
    """Signs by error feedback and scales by least squares in turn, each row's best kept.

    It takes the memory that GANQ takes, and per turn `bits / 2**bits` of what its least squares cost.

    Parameters
    ----------
    rounds : int
        Turns, at most; it ends earlier where one makes no row better. 0: scales are those of the weights.
    damping, asymmetric, correction, least_token
        As `Gptq`.
    """

    name: ClassVar[str] = "bcq"
    paper: ClassVar[str] = "You et al. 2024, arXiv:2406.05981; Park et al. 2022, arXiv:2206.09557"
    makes: ClassVar[frozenset[str]] = frozenset({TableCoding.kind})
    outliers: ClassVar[float] = 0.0

    rounds: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_setting(self.name, "rounds", self.rounds, self.rounds >= 0, "at least 0")

    def round(self, rounding: GptqRounding, target: Tensor, coding: CodesCoding) -> PackedWeight:
        """Round what is aimed at; no row's error is larger than with the first scales."""
        assert isinstance(coding, TableCoding)  # as `makes` says
        gram = damped(rounding.statistics.gram, self.damping)
        certainty = inverse_diagonal(rounding.factor, rounding.order).reciprocal()
        scales = binary_scales(target, coding.bits, certainty)
        signs = all_signs(coding.bits).to(target)
        stored = functools.partial(stored_scales, coding=coding)
        codes, tables = in_turns(rounding, target, scales, signs, stored, gram, self.rounds)
        return PackedWeight.from_tables(codes, tables, coding)


def all_signs(bits: int) -> Tensor:
    """Every choice of `bits` signs, 1 or -1: float32 `[2**bits, bits]`."""
    places = torch.arange(bits)
    return (torch.arange(1 << bits)[:, None] >> places & 1).float() * 2 - 1


def stored_scales(scales: Tensor, coding: TableCoding) -> Tensor:
    """Scales of which every sum, with whatever signs, is a value of the tables' dtype.

    They become whole multiples of the distance between that dtype's values at the greatest sum.

    Parameters
    ----------
    scales : Tensor[out_features, bits], float
    coding : TableCoding

    Returns
    -------
    Tensor[out_features, bits], float32

    Raises
    ------
    SettingsError
        When a sum is too large for the dtype.
    """
    held = torch.finfo(TABLE_DTYPES[coding.table_dtype])
    power = torch.exp2(torch.frexp(scales.abs().sum(-1, keepdim=True)).exponent.float())  # above the sum
    step = (power / 2 * held.eps).clamp(min=held.smallest_normal * held.eps)
    rounded = (scales / step).round() * step
    above = rounded.abs().sum(-1, keepdim=True) >= power  # by rounding, where distances are twice as large
    rounded = torch.where(above, (scales / (2 * step)).round() * (2 * step), rounded).float()
    stored_values(rounded.abs().sum(-1), coding)
    return rounded


def binary_scales(weight: Tensor, bits: int, importance: Tensor) -> Tensor:
    """For each row the scales of its least weighted error `sum_q h_q (w_q - v_q)^2` that alternating finds.

    Nearest values and the best scales for their signs never raise it; neither does where they begin.

    Parameters
    ----------
    weight : Tensor[out_features, in_features], float
        Finite; not modified.
    bits : int
    importance : Tensor[in_features], float
        `h`, above 0.

    Returns
    -------
    Tensor[out_features, bits], float32
    """
    out_features, in_features = weight.shape
    h = importance.double() / importance.max()
    scales = torch.empty((out_features, bits), device=weight.device)
    step = max(1, CHUNK_VALUES // in_features)
    for start in range(0, out_features, step):
        rows = slice(start, start + step)
        scales[rows] = _alternated(weight[rows].float(), greedy_scales(weight[rows], bits, h), h).float()
    return scales


def greedy_scales(weight: Tensor, bits: int, importance: Tensor) -> Tensor:
    """Scales one by one, each the weighted mean magnitude of what is left: float64 `[rows, bits]`."""
    left, scales = weight.double(), []
    for _ in range(bits):
        scales.append((left.abs() * importance).sum(-1) / importance.sum())
        left = left - scales[-1][:, None] * left.sign()
    return torch.stack(scales, -1)


def _alternated(weight: Tensor, scales: Tensor, importance: Tensor) -> Tensor:
    """Scales after turns of nearest values and least squares; float64 in and out."""
    sums = RunningSums(weight, importance)
    signs = all_signs(scales.shape[1]).to(scales)
    ends = None
    for _ in range(CLUSTERINGS):
        tables, order = (scales @ signs.T).sort(-1)
        found = sums.ends(tables)
        if ends is not None and torch.equal(found, ends):
            break
        ends = found
        mass, first = (sums.inside(one, ends) for one in (sums.mass, sums.first))
        named = signs[order]  # [rows, levels, bits]
        normal = (named.mT * mass[:, None]) @ named
        held = HELD * mass.sum(-1, keepdim=True)
        normal.diagonal(dim1=1, dim2=2).add_(held)
        right = (named.mT @ first[..., None])[..., 0]
        scales = torch.linalg.solve(normal, right + held * scales)
    return scales
