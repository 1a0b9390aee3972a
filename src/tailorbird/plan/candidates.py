"""The choices that a plan may make at a place, and the error that each would cause there.

Errors are relative and weighted by the Gram matrix of the place's input,
``tr(D H Dᵀ) / tr(W H Wᵀ)`` with ``D`` the change of the weight: the share of the output's energy
that the change costs. They are measured by rounding to nearest on a sample of rows, and carried
over to the plan's own method by a ratio per (bits, group) measured on a few linears.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from tailorbird.calibrate.statistics import LinearStatistics
from tailorbird.errors import SettingsError, nearest
from tailorbird.formats.codebooks import UNITS, VECTOR_UNITS
from tailorbird.formats.packed import (
    TABLE_BITS,
    CodebookCoding,
    Coding,
    FloatCoding,
    IntegerCoding,
    TableCoding,
    VectorCoding,
    stored_bytes,
)
from tailorbird.linear.error import output_error, row_energies
from tailorbird.linear.quantize.rtn import Rtn
from tailorbird.linear.settings import GRIDS

BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)
TARGETS = ("gguf", "compressed-tensors")

#: How a place is perturbed to measure its coefficient, and under which key its error is kept.
PROBE = IntegerCoding(bits=3, group_size=64)
PROBE_KEY = "probe"
#: Rows on which the errors of candidates are measured.
ERROR_ROWS = 256


def candidate_codings(
    target: str | None, float_dtype: str, makes: frozenset[str] = GRIDS
) -> tuple[Coding, ...]:
    """Codings that a plan may choose, the 16-bit one last.

    Parameters
    ----------
    target : {None, "gguf", "compressed-tensors"}
        Another tool whose format must hold the result exactly.
    float_dtype : str
        The 16-bit dtype that stands for "leave it".
    makes : frozenset of str
        Kinds of codings that the plan's method makes. One that makes no integers gets tables, or grids of
        normal values, for linears beside integers for embedding and head.
    """
    others: list[Coding] = []
    if IntegerCoding.kind not in makes and TableCoding.kind in makes:
        others = [TableCoding(bits) for bits in TABLE_BITS]
    elif IntegerCoding.kind not in makes and CodebookCoding.kind in makes:
        others = [CodebookCoding(codebook, group) for codebook in UNITS for group in GROUPS]
        if VectorCoding.kind in makes:
            others += [VectorCoding(codebook, group) for codebook in VECTOR_UNITS for group in GROUPS]
    if target is None:
        integers = [IntegerCoding(bits, group) for bits in BITS for group in GROUPS]
    elif target == "gguf":
        # Blocks of 32 with a float16 scale; fewer bits than a block type's own would be stored wider.
        integers = [
            IntegerCoding(bits, group, symmetric=True, scale_dtype="float16")
            for bits in (4, 5, 8)
            for group in (32,)
        ]
    elif target == "compressed-tensors":
        integers = [IntegerCoding(bits, group, symmetric=True) for bits in (4, 8) for group in (32, 64, 128)]
    else:
        raise SettingsError(
            f"target `{target}` is unknown", "one of " + ", ".join(TARGETS), nearest(target, TARGETS)
        )
    return (*integers, *others, FloatCoding(float_dtype))


def distinct(codings: Sequence[Coding], out_features: int, in_features: int) -> list[Coding]:
    """`codings` without those that store the same bits in as many bytes at this shape.

    A group longer than the row is one group per row, so 64 and 128 coincide on rows of 48.
    """
    seen: set[tuple[str, int]] = set()
    kept = []
    for coding in codings:
        key = (coding.label.split()[0], stored_bytes(coding, out_features, in_features))
        if key not in seen:
            seen.add(key)
            kept.append(coding)
    return kept


def sample_rows(weight: torch.Tensor, limit: int) -> torch.Tensor:
    """At most `limit` rows of `[out_features, in_features]`, evenly spread."""
    rows = weight.shape[0]
    if rows <= limit:
        return weight
    return weight[torch.linspace(0, rows - 1, limit).round().long()]


def rounding_errors(
    weight: torch.Tensor,
    statistics: LinearStatistics | None,
    codings: Sequence[Coding],
    rows: int = ERROR_ROWS,
) -> dict[str, float]:
    """Relative output error of rounding `weight` to nearest under each coding.

    Parameters
    ----------
    weight : Tensor, float32 ``[out_features, in_features]``
    statistics : LinearStatistics or None
        Statistics of the input that the linear reads; None weighs all inputs alike.
    codings : sequence of Coding
    rows : int
        Rows to measure on.

    Returns
    -------
    dict
        Label of the coding -> error; `PROBE_KEY` -> error of `probe_rounding`.
    """
    sample = sample_rows(weight, rows)
    method = Rtn()
    gram = None if statistics is None else statistics.gram
    energy = float(row_energies(sample, gram).sum())
    errors = {}
    for coding in codings:
        approximation = method(sample, statistics, coding).dequantize()
        errors[coding.label] = output_error(sample, approximation, gram, energy)
    errors[PROBE_KEY] = output_error(sample, probe_rounding(sample), gram, energy)
    return errors


def probe_rounding(weight: torch.Tensor) -> torch.Tensor:
    """`weight` ``[out_features, in_features]`` rounded to nearest under `PROBE`, without statistics."""
    return Rtn()(weight, None, PROBE).dequantize()


def spread(count: int, of: int) -> list[int]:
    """`count` indices spread evenly over ``range(of)``."""
    if of <= count:
        return list(range(of))
    return sorted({round(i * (of - 1) / max(1, count - 1)) for i in range(count)})


def geometric_mean(values: Sequence[float]) -> float:
    """Geometric mean of positive values."""
    return math.exp(sum(math.log(v) for v in values) / len(values))
