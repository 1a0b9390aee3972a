"""GANQ: codes by error feedback and a table of values per row by least squares, in turn.

Zhao & Yuan 2025, "GANQ: GPU-Adaptive Non-Uniform Quantization for Large Language Models" (arXiv:2501.12956).
The output error of row `w` with table `t` and codes `S` (one column of zeros and a one per input) is
`(w - t S) H (w - t S)^T`. For a table, codes are chosen one column after the other by back-substitution along
the Cholesky factor of `H` (`codes_by_feedback`); for codes, the best table is `w H S^T (S H S^T)^-1`.

Choosing codes column by column isn't exact, so that a turn may make a row worse: of all turns each row keeps
its best, judged with the values as they are stored. It begins with the clusters of `leanquant`, and a value
that no code names stays, where the paper's pseudo-inverse makes it zero. `H` is damped as for GPTQ. The
paper's variants that keep outliers apart are left out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tailorbird.formats.packed import CodesCoding, PackedWeight, TableCoding
from tailorbird.linear.error import row_errors
from tailorbird.linear.quantize.clusters import clustered, stored_values
from tailorbird.linear.quantize.feedback import FeedbackMethod
from tailorbird.linear.quantize.gptq import GptqRounding, inverse_diagonal
from tailorbird.linear.quantize.tables import codes_by_feedback
from tailorbird.linear.settings import check_setting

#: values handled at once where tables are fitted: rows times levels times inputs
CHUNK_VALUES = 1 << 22
#: how strongly factors are held where they are, beside what codes say of them: above float32's rounding
HELD = 1e-6


@dataclass(frozen=True, kw_only=True)
class Ganq(FeedbackMethod):
    """Codes and tables in turn, each row's best kept.

    Beyond weight, statistics and result it takes what GPTQ takes, a copy of the Gram matrix, and four float32
    copies of the weight. A turn costs about `2**bits` times what the outputs of `in_features` tokens cost.

    Parameters
    ----------
    rounds : int
        Turns, at most; it ends earlier where one makes no row better. The authors take 10.
    damping, asymmetric, correction, least_token
        As `Gptq`.
    """

    name: ClassVar[str] = "ganq"
    paper: ClassVar[str] = "Zhao & Yuan 2025, arXiv:2501.12956"
    makes: ClassVar[frozenset[str]] = frozenset({TableCoding.kind})
    outliers: ClassVar[float] = 0.0

    rounds: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_setting(self.name, "rounds", self.rounds, self.rounds >= 1, "at least 1")

    def round(self, rounding: GptqRounding, target: Tensor, coding: CodesCoding) -> PackedWeight:
        """Round what is aimed at; no row's error is larger than with the first tables."""
        assert isinstance(coding, TableCoding)  # as `makes` says
        gram = damped(rounding.statistics.gram, self.damping)
        certainty = inverse_diagonal(rounding.factor, rounding.order).reciprocal()
        tables = clustered(target, coding, certainty)
        parts = torch.eye(1 << coding.bits, device=target.device)
        stored = functools.partial(stored_values, coding=coding)
        codes, tables = in_turns(rounding, target, tables, parts, stored, gram, self.rounds)
        return PackedWeight.from_tables(codes, tables, coding)


def in_turns(
    rounding: GptqRounding,
    target: Tensor,
    factors: Tensor,
    parts: Tensor,
    stored: Callable[[Tensor], Tensor],
    gram: Tensor,
    rounds: int,
) -> tuple[Tensor, Tensor]:
    """Codes by error feedback and the factors that tables are made of by least squares, in turn.

    Parameters
    ----------
    rounding : GptqRounding
    target : Tensor[out_features, in_features], float32
    factors : Tensor[out_features, terms], float32
        To begin with. A table is `factors @ parts.T`.
    parts : Tensor[levels, terms], float32
        How much of each factor is in each value; the identity where values are the factors themselves.
    stored : callable
        Factors as they can be stored.
    gram : Tensor[in_features, in_features], float32
        Positive definite.
    rounds : int
        Turns, at most.

    Returns
    -------
    codes : Tensor[out_features, in_features], uint8
    tables : Tensor[out_features, levels], float32
        Ascending. No row's error is larger than with the first ones.
    """
    values = stored(factors) @ parts.T
    tables = values.sort(-1).values
    codes = codes_by_feedback(rounding, target, tables)
    best = codes, tables
    least = row_errors(target, values_of(codes, tables), gram)
    for _ in range(rounds):
        named = values.argsort(-1).gather(1, codes.long())
        factors = fitted_factors(target, named, parts, factors, gram)
        values = stored(factors) @ parts.T
        codes, tables = ascending(named, values)
        error = row_errors(target, values_of(codes, tables), gram)
        better = error < least
        if not bool(better.any()):
            break
        least = torch.where(better, error, least)
        best = torch.where(better[:, None], codes, best[0]), torch.where(better[:, None], tables, best[1])
        codes = codes_by_feedback(rounding, target, tables)
    return best


def damped(gram: Tensor, damping: float) -> Tensor:
    """The Gram matrix with `damping` times the mean of its diagonal added to that; the identity for zeros."""
    found = gram.clone()
    found.diagonal().add_(float(gram.diagonal().mean()) * damping or 1.0)
    return found


def values_of(codes: Tensor, tables: Tensor) -> Tensor:
    """What codes stand for, `[out_features, in_features]`."""
    return tables.gather(1, codes.long())


def ascending(codes: Tensor, tables: Tensor) -> tuple[Tensor, Tensor]:
    """The same weight with its tables in order."""
    tables, order = tables.sort(-1)
    return order.argsort(-1).gather(1, codes.long()).to(torch.uint8), tables


def fitted_factors(target: Tensor, codes: Tensor, parts: Tensor, before: Tensor, gram: Tensor) -> Tensor:
    """For each row the factors of the least output error for its codes.

    Parameters
    ----------
    target : Tensor[out_features, in_features], float32
    codes : Tensor[out_features, in_features], integer
        Of rows of `parts`.
    parts : Tensor[levels, terms], float32
        As for `in_turns`.
    before : Tensor[out_features, terms], float32
        What a factor is where the codes of the row leave it open, or the row can't be solved.
    gram : Tensor[in_features, in_features], float32
        Positive definite.

    Returns
    -------
    Tensor[out_features, terms], float32
    """
    out_features, in_features = target.shape
    terms = parts.shape[1]
    fitted = torch.empty_like(before)
    step = max(1, CHUNK_VALUES // (terms * in_features))
    for start in range(0, out_features, step):
        rows = slice(start, start + step)
        named = parts[codes[rows].long()]  # [rows, in, terms]
        reached = (named.mT.reshape(-1, in_features) @ gram).view(-1, terms, in_features)
        normal = (reached @ named).double()
        right = (reached @ target[rows, :, None])[..., 0].double()
        held = normal.diagonal(dim1=1, dim2=2).mean(1, keepdim=True) * HELD
        normal.diagonal(dim1=1, dim2=2).add_(held)
        found, failed = torch.linalg.solve_ex(normal, right + held * before[rows])
        fitted[rows] = torch.where((failed == 0)[:, None], found, before[rows].double()).float()
    return fitted
