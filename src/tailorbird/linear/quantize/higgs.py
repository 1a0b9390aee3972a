"""HIGGS: rows are rotated until their values look normal, and rounded to the best grid for normal values.

Malinovskii et al. 2024, "Pushing the Limits of Large Language Model Quantization via the Linearity Theorem"
(arXiv:2411.17525). Random signs and a Hadamard matrix for each block of inputs make the values of a row
nearly normal, whatever they were. Each group is divided by the root of its mean square, and each value takes
the nearest point of the grid that is best for standard normal ones; or 2 or 4 neighbouring values together
take one of a grid in as many dimensions, and lose less. As the rotation keeps lengths,

    |W - V|^2 / |W|^2 = t^2,    the grid's mean squared error,

the same for all weights: 0.117, 0.0345 and 0.0095 at 2, 3 and 4 bits, 0.108, 0.0298 and 0.0078 in the plane,
and 0.096 at 2 bits in four dimensions. By the linearity theorem the loss of the model grows in proportion to
`t^2`.

No data is read, unless `feedback` has the columns that follow make up for the error of each, as GPTQ does, in
the rotated inputs; scales stay. The paper's scale is that of a whole block of inputs, mostly 1024; here a
group has one, as in the coding. Signs are the same for all linears with as many inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tailorbird.calibrate.statistics import LinearStatistics
from tailorbird.errors import SettingsError
from tailorbird.formats.codebooks import UNITS, VECTOR_UNITS
from tailorbird.formats.packed import (
    CodebookCoding,
    Coding,
    FloatCoding,
    PackedCoding,
    PackedWeight,
    VectorCoding,
)
from tailorbird.formats.transform import Transform
from tailorbird.kernels.walsh import rotate
from tailorbird.linear.quantize.gptq import GptqRounding
from tailorbird.linear.quantize.grid import quantize_to_grid
from tailorbird.linear.quantize.points import nearest_points, scales_by_deviation
from tailorbird.linear.quantize.points_feedback import IN_ORDER, points_by_feedback
from tailorbird.linear.quantize.rtn import round_to_float
from tailorbird.linear.settings import check_codes, check_setting
from tailorbird.linear.transformed import transformed_statistics


@dataclass(frozen=True)
class Higgs:
    """Rounding to the grid of normal values, behind a random rotation.

    Beyond weight and result it takes about four float32 copies of the weight.

    Parameters
    ----------
    block : int
        Inputs that are mixed with each other, a power of two; of a linear whose number of inputs it doesn't
        divide, the largest one that does.
    seed : int
        Of the signs.
    feedback : bool
        Whether errors are made up for by the columns that follow, with the Gram matrix of the inputs.
    """

    name: ClassVar[str] = "higgs"
    family: ClassVar[str] = "quantize"
    kind: ClassVar[str] = "linear method"
    paper: ClassVar[str] = "Malinovskii et al. 2024, arXiv:2411.17525"
    requirements: ClassVar[frozenset[str]] = frozenset({"gram"})
    makes: ClassVar[frozenset[str]] = frozenset({CodebookCoding.kind, VectorCoding.kind})
    outliers: ClassVar[float] = 0.0
    least_token: ClassVar[float] = 1.0

    block: int = 1024
    seed: int = 0
    feedback: bool = False

    def __post_init__(self) -> None:
        power = 1 <= self.block <= 1024 and not self.block & (self.block - 1)
        check_setting(self.name, "block", self.block, power, "a power of two from 1 to 1024")
        check_setting(self.name, "seed", self.seed, 0 <= self.seed < 1 << 63, "a whole number from 0")

    @property
    def needs(self) -> frozenset[str]:
        """Which statistics these settings can't do without: "gram" with feedback."""
        return self.requirements if self.feedback else frozenset()

    def transform(self, in_features: int) -> Transform:
        """What inputs go through before the codes: blocks as large as divide them, up to the setting."""
        return Transform(min(self.block, in_features & -in_features))

    def prepare(self, statistics: LinearStatistics | None) -> Callable[[Tensor, Coding], PackedWeight]:
        """`__call__` with these statistics; their Gram matrix is rotated and factorized once."""
        rounding = None
        if self.feedback:
            if statistics is not None:
                columns = len(statistics.gram)
                signs = random_signs(self.transform(columns), columns, self.seed)
                turning = {"signs": signs.to(statistics.gram.device)}
                statistics = transformed_statistics(statistics, turning)
            rounding = GptqRounding(IN_ORDER, statistics, self.name)
        return lambda weight, coding: self._rounded(weight, coding, rounding)

    def __call__(self, weight: Tensor, statistics: LinearStatistics | None, coding: Coding) -> PackedWeight:
        """Round a weight.

        Parameters
        ----------
        weight : Tensor[out_features, in_features], float32
            Not modified.
        statistics : LinearStatistics or None
            Not read without feedback.
        coding : Coding
            Floats, or a codebook among `UNITS` and `VECTOR_UNITS`.

        Raises
        ------
        SettingsError
            For another coding, when weights are too large for its scales, or for feedback without statistics.
        """
        return self.prepare(statistics)(weight, coding)

    def _rounded(self, weight: Tensor, coding: Coding, rounding: GptqRounding | None) -> PackedWeight:
        """`__call__`, with what `feedback` reads where it is asked for."""
        if isinstance(coding, FloatCoding):
            return round_to_float(weight, coding)
        coding = normal_grid(self.name, coding)
        signs = random_signs(self.transform(weight.shape[1]), weight.shape[1], self.seed).to(weight.device)
        rotated = rotate(weight, signs)
        scales = scales_by_deviation(rotated, coding)
        if isinstance(coding, VectorCoding):
            if rounding is not None:
                packed = points_by_feedback(rounding, rotated, scales, coding)
            else:
                codes = nearest_points(rotated, scales, coding)
                packed = PackedWeight.from_points(codes, scales, coding, weight.shape[1])
        elif rounding is not None:
            packed = rounding(rotated, coding, (scales, None))
        else:
            codes = quantize_to_grid(rotated, scales, None, coding)
            packed = PackedWeight.from_codes(codes, scales, None, coding)
        return packed.with_transform(signs)


def normal_grid(method: str, coding: PackedCoding) -> CodebookCoding | VectorCoding:
    """`coding`, which must be a grid of normal values.

    Raises
    ------
    SettingsError
        It is another.
    """
    check_codes(method, Higgs.makes, coding)
    assert isinstance(coding, CodebookCoding | VectorCoding)
    if coding.codebook not in (*UNITS, *VECTOR_UNITS):
        raise SettingsError(
            f"`{method}` with codebook {coding.codebook}",
            f"one of {', '.join((*UNITS, *VECTOR_UNITS))}, the grids of normal values",
            "write codebook=gauss4",
        )
    return coding


def random_signs(transform: Transform, in_features: int, seed: int) -> Tensor:
    """1 and -1 drawn evenly, int8 ``[in_features / block, block]``."""
    ((shape, dtype),) = transform.tensor_layout(1, in_features).values()
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(0, 2, (in_features,), generator=generator) * 2 - 1).to(dtype).view(shape)
