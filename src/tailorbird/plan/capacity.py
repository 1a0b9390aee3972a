"""What a format can hold, from how well it fits Gaussian data: which one is worth trying, before any model.

Panferov et al. 2025, "Unified Scaling Laws for Compressed Representations" (arXiv:2506.01863). A model that
is trained in a format loses as much as one of `N rho` parameters would that are not compressed. The capacity
`rho` depends on the format alone, by its mean squared error on standard normal values (GMSE):
`rho = L tanh(F log_(1/4) GMSE)^C`, where `log_(1/4) GMSE` are the bits in which a perfect code would have
that error. The constants are fitted for each kind of format and aren't printed; with `L = C = 1` and the `F`
here the law gives the four capacities that the paper prints for its scalar quantizer (2, 3, 4 and 8 bits:
0.57, 0.75, 0.87 and 0.99) to within 0.01. For other kinds the order is told, not the share.

The law is one of training. After training nothing makes up for what is lost, so that a plan goes by errors
that were measured on the model itself (`sensitivity.py`), and this says only where to look.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tailorbird.formats.codebooks import VECTOR_UNITS
from tailorbird.formats.packed import (
    CodebookCoding,
    Coding,
    IntegerCoding,
    TableCoding,
    VectorCoding,
    stored_bytes,
)
from tailorbird.linear.quantize.rtn import Rtn
from tailorbird.plan.candidates import BITS, GROUPS

PAPER = "Panferov et al. 2025, arXiv:2506.01863"
#: `F` of the law
SLOPE = 0.414
#: values on which formats are compared; rows as long as those of a model of 7 billion parameters
ROWS, COLUMNS = 32, 4096
FORMATS: tuple[Coding, ...] = (
    *(IntegerCoding(bits, group) for bits in BITS for group in (0, *reversed(GROUPS))),
    *(CodebookCoding(name, 64) for name in ("nf4", "fp4")),
    *(VectorCoding(name, 64) for name in VECTOR_UNITS),
    *(TableCoding(bits) for bits in (2, 3, 4)),
)


@dataclass(frozen=True)
class FormatRow:
    """One row of `formats`.

    Attributes
    ----------
    name : str
        Label of the coding.
    bits_per_weight : float
        All that is stored, scales and tables too, in rows of `COLUMNS` weights.
    gaussian_error : float
        Mean squared error on standard normal values, rounded to nearest.
    capacity : float
        Share of the parameters, 0 to 1, that as good a model would have without compression.
    bound : float
        The capacity of a perfect code of as many bits.
    ahead : bool
        Whether no other format of as many bits or fewer has more capacity.
    """

    name: str
    bits_per_weight: float
    gaussian_error: float
    capacity: float
    bound: float
    ahead: bool


def format_rows(codings: Sequence[Coding] = FORMATS) -> list[FormatRow]:
    """Formats by what they take, each with what it holds."""
    measured = sorted((_bits_per_weight(one), gaussian_error(one), one.label) for one in codings)
    rows, least = [], math.inf
    for bits, error, name in measured:
        ahead, least = error < least, min(error, least)
        rows.append(FormatRow(name, bits, error, capacity(error), capacity(4.0**-bits), ahead))
    return rows


def gaussian_error(coding: Coding) -> float:
    """Mean squared error of rounding standard normal values to nearest; the same each time."""
    values = torch.randn((ROWS, COLUMNS), generator=torch.Generator().manual_seed(0))
    return float((Rtn()(values, None, coding).dequantize() - values).double().square().mean())


def capacity(error: float) -> float:
    """`rho` of a Gaussian error: 1 where there is none, 0 where it is all that there was.

    Parameters
    ----------
    error : float
        From 0 to 1.
    """
    return math.tanh(SLOPE * -math.log(error, 4)) if error > 0 else 1.0


def _bits_per_weight(coding: Coding) -> float:
    return 8 * stored_bytes(coding, ROWS, COLUMNS) / (ROWS * COLUMNS)
