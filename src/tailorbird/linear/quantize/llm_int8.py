"""LLM.int8(): the inputs with the largest values keep 16 bits, all others and their weights become bytes.

Dettmers et al. 2022, "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale" (arXiv:2208.07339).
A few inputs of a linear are far larger than the rest, in nearly every token. They are left out of the
product of bytes, and multiplied in 16 bits:

    y = Q(x_R) Q(W_R)ᵀ + x_O W_Oᵀ

with `O` the outliers among the inputs, `R` the rest, `W_R` rounded to the nearest on grids that end at its
largest magnitudes, and `x_R` rounded as inputs are where a recipe says so. So neither the grids nor the
steps of the inputs have to span the outliers.

The paper counts an input as an outlier where a magnitude of it exceeds 6, in the tokens at hand. Here they
are chosen on calibration tokens, once, and are a share of the inputs that is stated beforehand, those with
the greatest magnitudes, so that the bytes are known. `W_O` stands in the sparse part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tailorbird.calibrate.statistics import LinearStatistics
from tailorbird.errors import SettingsError
from tailorbird.formats.packed import Coding, FloatCoding, PackedWeight
from tailorbird.linear.outliers import beside_base, check_outliers, count_inputs
from tailorbird.linear.quantize.rtn import Rtn, round_to_float
from tailorbird.linear.scaling import greatest_inputs
from tailorbird.linear.settings import GRIDS, on_grids


@dataclass(frozen=True)
class LlmInt8:
    """Rounding to nearest, but for the columns of the largest inputs.

    Parameters
    ----------
    outliers : float
        Share of each linear's inputs whose columns are kept, 0 to 0.25, rounded to whole inputs. One of 0.01
        takes some 0.32 bits for each weight.
    """

    name: ClassVar[str] = "llm-int8"
    family: ClassVar[str] = "quantize"
    kind: ClassVar[str] = "linear method"
    paper: ClassVar[str] = "Dettmers et al. 2022, arXiv:2208.07339"
    requirements: ClassVar[frozenset[str]] = frozenset({"gram"})
    makes: ClassVar[frozenset[str]] = GRIDS
    least_token: ClassVar[float] = 1.0
    keeps_inputs: ClassVar[bool] = True

    outliers: float = 0.01

    def __post_init__(self) -> None:
        check_outliers(self.name, self.outliers)

    @property
    def needs(self) -> frozenset[str]:
        """Which statistics are read: "gram" (which comes with the greatest magnitudes)."""
        return self.requirements

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
            Of the input; its greatest magnitudes are read. None only without outliers.
        coding : Coding

        Returns
        -------
        PackedWeight

        Raises
        ------
        SettingsError
            Without statistics, or when weights are too large for the coding.
        """
        if isinstance(coding, FloatCoding):
            return round_to_float(weight, coding)
        coding, count = on_grids(self.name, coding), count_inputs(self.outliers, weight.shape[1])
        nearest = Rtn(clip_search=False)
        if count == 0:
            return nearest(weight, None, coding)
        if statistics is None:
            raise SettingsError(
                f"{self.name} without statistics", "the greatest magnitudes of its inputs", "pass statistics"
            )
        mask = torch.zeros_like(weight, dtype=torch.bool)
        mask[:, greatest_inputs(statistics).argsort(descending=True, stable=True)[:count]] = True
        return beside_base(nearest(weight.masked_fill(mask, 0.0), None, coding), weight, mask)
