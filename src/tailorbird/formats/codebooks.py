"""Codebooks by name: the few values, up to a scale, that codes stand for.

Levels are whole numbers of one signed byte, so that products of integers read them exactly as those of floats
do. They belong to the format: another number under the same name would be another weight.

Those of `gauss2`, `gauss3` and `gauss4` are the grids of 4, 8 and 16 points that are nearest to a standard
normal value in the mean square (Max 1960, "Quantizing for Minimum Distortion"; Lloyd 1982, "Least Squares
Quantization in PCM"), times the unit beside them and rounded. `python benchmarks/gaussian_grids.py` finds
them: of all units it takes the one that loses least by the rounding.

A vector codebook has points in place of levels: a code stands for as many neighbouring values as they have
coordinates. Those here are likewise nearest to normal values, in the plane and in four dimensions, and lie in
`grids`, a point a line; `python benchmarks/vector_grids.py --write` writes them.
"""

from __future__ import annotations

from pathlib import Path
from statistics import NormalDist

import torch
from torch import Tensor

#: magnitude of the largest level of any codebook
LARGEST = 127
#: where points of vector codebooks lie
GRIDS = Path(__file__).parent / "grids"


def normal_quantiles() -> list[float]:
    """The 16 values of NF4, ascending from -1 to 1, 0 among them.

    Quantiles of the standard normal distribution over the largest of them, evenly spaced in probability on
    either side of zero, eight above it and seven below. They begin at the mean of the two probabilities at
    which 15 and 16 values would begin if each stood in the middle of its share. Dettmers et al. 2023,
    "QLoRA: Efficient Finetuning of Quantized LLMs" (arXiv:2305.14314).
    """
    quantile = NormalDist().inv_cdf
    first = 1 - (1 / 30 + 1 / 32) / 2
    above, below = ([quantile(first + (0.5 - first) * i / n) for i in range(n)] for n in (8, 7))
    return [value / above[0] for value in (*(-q for q in below), 0.0, *reversed(above))]


def _as_bytes(values: list[float]) -> Tensor:
    """Values from -1 to 1 as levels: int8."""
    return torch.tensor([round(LARGEST * value) for value in values], dtype=torch.int8, device="cpu")


def floats_of_4_bits() -> list[float]:
    """The 16 values of FP4, ascending: a sign, two bits of exponent, one of mantissa (E2M1); two are zero.

    Without infinities and without what isn't a number, as in the OCP Microscaling Formats (MX) Specification
    1.0. Weights of FP4 beside inputs of 8 bits are the subject of Wu et al. 2023, "ZeroQuant-FP: A Leap
    Forward in LLMs Post-Training W4A8 Quantization Using Floating-Point Formats" (arXiv:2307.09782).
    """
    small = [0.0, 0.5]
    magnitudes = small + [(1 + half / 2) * 2**exponent for exponent in range(3) for half in (0, 1)]
    return [*(-magnitude for magnitude in reversed(magnitudes)), *magnitudes]


def _mirrored(*above: int) -> Tensor:
    """Levels that lie symmetrically around zero, from those above it."""
    return torch.tensor([*(-level for level in reversed(above)), *above], dtype=torch.int8, device="cpu")


#: name -> levels, int8 `[2**bits]`, ascending; shared, and never to be changed
LEVELS = {
    "nf4": _as_bytes(normal_quantiles()),
    # doubled, they are whole
    "fp4": torch.tensor([int(2 * value) for value in floats_of_4_bits()], dtype=torch.int8, device="cpu"),
    "gauss2": _mirrored(3, 10),
    "gauss3": _mirrored(10, 31, 55, 88),
    "gauss4": _mirrored(5, 15, 25, 36, 48, 62, 79, 104),
}
#: name of a grid for normal values -> their standard deviation in levels
UNITS = {"gauss2": 6.62110, "gauss3": 40.90972, "gauss4": 38.15564}


def _points(name: str) -> Tensor:
    """The points of a vector codebook, as its file has them."""
    lines = (GRIDS / f"{name}.txt").read_text().splitlines()
    rows = [[int(value) for value in line.split()] for line in lines]
    return torch.tensor(rows, dtype=torch.int8, device="cpu")


#: name of a vector codebook, bits of a value x dimension -> their standard deviation in levels
VECTOR_UNITS = {"gauss2x2": 63.878, "gauss2x4": 48.737, "gauss3x2": 46.292, "gauss4x2": 37.789}
#: name -> points, int8 `[2**bits of a code, dimension]`; shared, and never to be changed
POINTS = {name: _points(name) for name in VECTOR_UNITS}


def bits_of(codebook: str) -> int:
    """Bits of a code for the levels or points of a codebook."""
    return len(POINTS[codebook] if codebook in POINTS else LEVELS[codebook]).bit_length() - 1
