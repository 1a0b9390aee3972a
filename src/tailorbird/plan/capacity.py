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
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tailorbird.formats.codebooks import LEVELS, UNITS, VECTOR_UNITS
from tailorbird.formats.nested import STORED_BITS, WIDTHS, at_bits
from tailorbird.formats.packed import (
    TABLE_BITS,
    BinaryCoding,
    CodebookCoding,
    Coding,
    DoubleCoding,
    FloatCoding,
    IntegerCoding,
    PackedWeight,
    TableCoding,
    VectorCoding,
)
from tailorbird.linear.quantize.double_rounding import DoubleRounding, fit_nested_scales
from tailorbird.linear.quantize.grid import quantize_to_grid
from tailorbird.linear.quantize.rtn import Rtn
from tailorbird.plan.candidates import BITS, GROUPS

PAPER = "Panferov et al. 2025, arXiv:2506.01863"
#: `F` of the law
SLOPE = 0.414
#: values on which formats are compared; rows as long as those of a model of 7 billion parameters
ROWS, COLUMNS = 32, 4096
#: those that are rounded to nearest
FORMATS: tuple[Coding, ...] = (
    *(IntegerCoding(bits, group) for bits in BITS for group in (0, *reversed(GROUPS))),
    *(CodebookCoding(name, 64) for name in LEVELS),
    *(DoubleCoding(name, 64) for name in LEVELS if name not in UNITS),
    *(VectorCoding(name, 64) for name in VECTOR_UNITS),
    *(TableCoding(bits) for bits in TABLE_BITS),
    *(BinaryCoding(group) for group in (0, *reversed(GROUPS))),
    *(FloatCoding(name) for name in ("bfloat16", "float16")),
)
#: in which fewer bits are nested
NESTED = IntegerCoding(STORED_BITS, 64, symmetric=True)


@dataclass(frozen=True)
class FormatRow:
    """One row of `formats`.

    Attributes
    ----------
    name : str
        Label of the coding. ``int4 of 8`` are the upper bits of integers of 8 bits, as double rounding stores
        them.
    bits_per_weight : float
        All that is stored, scales and tables too, in rows of `COLUMNS` weights; of upper bits, all that is
        read. Entropy codes take what these values need.
    gaussian_error : float
        Mean squared error on standard normal values, rounded to nearest; nested ones with scales for all
        widths.
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


def format_rows() -> list[FormatRow]:
    """Formats by what they take, each with what it holds."""
    values = _values()
    measured = sorted(
        (8 * packed.nbytes / values.numel(), _error(packed, values), name) for name, packed in _stored(values)
    )
    rows, least = [], math.inf
    for bits, error, name in measured:
        ahead, least = error < least, min(error, least)
        rows.append(FormatRow(name, bits, error, capacity(error), capacity(4.0**-bits), ahead))
    return rows


def _stored(values: Tensor) -> Iterator[tuple[str, PackedWeight]]:
    """The values in every format, by its name: rounded to nearest, coded without loss, or nested."""
    for coding in FORMATS:
        yield coding.label, Rtn()(values, None, coding)
    lossless = PackedWeight.from_bfloat16(values.bfloat16())
    yield lossless.coding.label, lossless
    scales = fit_nested_scales(values, NESTED, torch.ones(COLUMNS), DoubleRounding().width_weights)
    nested = PackedWeight.from_codes(quantize_to_grid(values, scales, None, NESTED), scales, None, NESTED)
    for bits in WIDTHS:
        yield f"int{bits} of {STORED_BITS} g{NESTED.group_size}", at_bits(nested, bits)


def gaussian_error(coding: Coding) -> float:
    """Mean squared error of rounding standard normal values to nearest; the same each time."""
    values = _values()
    return _error(Rtn()(values, None, coding), values)


def _values() -> Tensor:
    """Standard normal, float32 `[ROWS, COLUMNS]`."""
    return torch.randn((ROWS, COLUMNS), generator=torch.Generator().manual_seed(0))


def _error(packed: PackedWeight, values: Tensor) -> float:
    return float((packed.dequantize() - values).double().square().mean())


def capacity(error: float) -> float:
    """`rho` of a Gaussian error: 1 where there is none, 0 where it is all that there was.

    Parameters
    ----------
    error : float
        From 0 to 1.
    """
    return math.tanh(SLOPE * -math.log(error, 4)) if error > 0 else 1.0
