"""HIGGS: rows are rotated until their values look normal, and rounded to the best grid for normal values.

Malinovskii et al. 2024, "Pushing the Limits of Large Language Model Quantization via the Linearity Theorem"
(arXiv:2411.17525). Random signs and a Hadamard matrix for each block of inputs make the values of a row
nearly normal, whatever they were. Each group is divided by the root of its mean square, and each value takes
the nearest point of the grid that is best for standard normal ones. As the rotation keeps lengths,

    |W - V|^2 / |W|^2 = t^2,    the grid's mean squared error,

the same for all weights: 0.117, 0.0345 and 0.0095 at 2, 3 and 4 bits. By the linearity theorem the loss of
the model grows in proportion to `t^2`.

No data is read. The paper's scale is that of a whole block of inputs, mostly 1024; here a group has one, as
in the coding, and the authors' grids of points in the plane have no place in the format. Signs are the same
for all linears with as many inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from tailorbird.calibrate.statistics import LinearStatistics
from tailorbird.errors import SettingsError
from tailorbird.formats.codebooks import UNITS
from tailorbird.formats.packed import (
    SCALE_DTYPES,
    CodebookCoding,
    Coding,
    FloatCoding,
    PackedCoding,
    PackedWeight,
)
from tailorbird.formats.transform import Transform
from tailorbird.kernels.reference import group_layout
from tailorbird.kernels.walsh import rotate
from tailorbird.linear.quantize.grid import quantize_to_grid, stored_scales
from tailorbird.linear.quantize.rtn import round_to_float
from tailorbird.linear.settings import check_codes, check_setting


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
    """

    name: ClassVar[str] = "higgs"
    family: ClassVar[str] = "quantize"
    kind: ClassVar[str] = "linear method"
    paper: ClassVar[str] = "Malinovskii et al. 2024, arXiv:2411.17525"
    requirements: ClassVar[frozenset[str]] = frozenset()
    makes: ClassVar[frozenset[str]] = frozenset({CodebookCoding.kind})
    outliers: ClassVar[float] = 0.0
    least_token: ClassVar[float] = 1.0

    block: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        power = 1 <= self.block <= 1024 and not self.block & (self.block - 1)
        check_setting(self.name, "block", self.block, power, "a power of two from 1 to 1024")
        check_setting(self.name, "seed", self.seed, 0 <= self.seed < 1 << 63, "a whole number from 0")

    @property
    def needs(self) -> frozenset[str]:
        """Which statistics these settings can't do without: none."""
        return self.requirements

    def transform(self, in_features: int) -> Transform:
        """What inputs go through before the codes: blocks as large as divide them, up to the setting."""
        return Transform(min(self.block, in_features & -in_features))

    def prepare(self, statistics: LinearStatistics | None) -> Callable[[Tensor, Coding], PackedWeight]:
        """`__call__` with these statistics."""
        return lambda weight, coding: self(weight, statistics, coding)

    def __call__(self, weight: Tensor, statistics: LinearStatistics | None, coding: Coding) -> PackedWeight:
        """Round a weight.

        Parameters
        ----------
        weight : Tensor[out_features, in_features], float32
            Not modified.
        statistics : LinearStatistics or None
            Not read.
        coding : Coding
            Floats, or a codebook among `UNITS`.

        Raises
        ------
        SettingsError
            For another coding, or when weights are too large for its scales.
        """
        if isinstance(coding, FloatCoding):
            return round_to_float(weight, coding)
        coding = normal_grid(self.name, coding)
        signs = random_signs(self.transform(weight.shape[1]), weight.shape[1], self.seed).to(weight.device)
        rotated = rotate(weight, signs)
        scales = stored_scales(checked(deviations(rotated, coding.group_size), coding), coding)
        codes = quantize_to_grid(rotated, scales, None, coding)
        return PackedWeight.from_codes(codes, scales, None, coding).with_transform(signs)


def normal_grid(method: str, coding: PackedCoding) -> CodebookCoding:
    """`coding`, which must be a grid of normal values.

    Raises
    ------
    SettingsError
        It is another.
    """
    check_codes(method, frozenset({CodebookCoding.kind}), coding)
    assert isinstance(coding, CodebookCoding)
    if coding.codebook not in UNITS:
        raise SettingsError(
            f"`{method}` with codebook {coding.codebook}",
            f"one of {', '.join(UNITS)}, the grids of normal values",
            "write codebook=gauss4",
        )
    return coding


def checked(deviation: Tensor, coding: CodebookCoding) -> Tensor:
    """What a level stands for where values have this deviation, unless no scale holds it."""
    scales, most = deviation / UNITS[coding.codebook], torch.finfo(SCALE_DTYPES[coding.scale_dtype]).max
    if not float(scales.max()) <= most:
        raise SettingsError(
            f"weights of mean square {float(deviation.max()) ** 2:.3g} for {coding.label}",
            f"scales of at most {most:.3g}",
            "choose bfloat16 scales",
        )
    return scales


def random_signs(transform: Transform, in_features: int, seed: int) -> Tensor:
    """1 and -1 drawn evenly, int8 ``[in_features / block, block]``."""
    ((shape, dtype),) = transform.tensor_layout(1, in_features).values()
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(0, 2, (in_features,), generator=generator) * 2 - 1).to(dtype).view(shape)


def deviations(weight: Tensor, group_size: int) -> Tensor:
    """Root of the mean square of every group, float32 ``[out_features, groups]``."""
    columns = weight.shape[1]
    groups, size = group_layout(columns, group_size)
    counts = torch.full((groups,), size, device=weight.device)
    counts[-1] = columns - (groups - 1) * size
    sums = pad(weight.square(), (0, groups * size - columns)).unflatten(1, (groups, size)).sum(2)
    return (sums / counts).sqrt()
