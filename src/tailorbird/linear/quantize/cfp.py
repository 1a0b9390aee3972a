"""CBQ's coarse-to-fine pre-processing as a fold: scale the channels that stand out, and those alone.

Ding et al. 2023, "CBQ: Cross-Block Quantization for Large Language Models" (arXiv:2312.07950), with the
exponent of the code that Huawei publishes of it (msmodelslim, ``anti_outlier``). Which channels of an input
stand out is found in two steps from their greatest magnitudes `m`. Coarse: those beyond
``Q3 + 1.5 (Q3 - Q1)``, with the quartiles over all channels. Fine: these, where there are several, are cut in
two by their size, where the distance between both halves less the variance of the lower one is greatest; what
is in the upper half stands out. Its scales are ``(m / greatest m of all others)^alpha``, all others are one.

The paper cuts off weights by the same rule; here the search for the end of each group's grid does that, in
`rtn` and `gptq`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tailorbird.calibrate.statistics import LinearStatistics
from tailorbird.formats.packed import Coding
from tailorbird.linear.scaling import greatest_inputs
from tailorbird.linear.settings import check_setting

#: How many times the distance between the quartiles a channel must lie beyond them.
BEYOND = 1.5


@dataclass(frozen=True)
class Cfp:
    """Scales of the channels that stand out.

    Parameters
    ----------
    alpha : float
        How much of a channel's excess moves into the weights, from 0 to 1.
    """

    family: ClassVar[str] = "quantize"
    kind: ClassVar[str] = "fold"
    paper: ClassVar[str] = "Ding et al. 2023, arXiv:2312.07950"
    requirements: ClassVar[frozenset[str]] = frozenset({"gram"})

    alpha: float = 0.7

    def __post_init__(self) -> None:
        check_setting("cfp", "alpha", self.alpha, 0 <= self.alpha <= 1, "from 0 to 1")

    @property
    def needs(self) -> frozenset[str]:
        """Which statistics are read: "gram" (which comes with the greatest magnitudes)."""
        return self.requirements

    def scales(
        self, weights: Sequence[Tensor], statistics: LinearStatistics, codings: Sequence[Coding]
    ) -> Tensor:
        """The scales, ``[in_features]``, one or greater.

        Parameters
        ----------
        weights : sequence of Tensor[out_features, in_features], float32
            Not looked at.
        statistics : LinearStatistics
            Of the input.
        codings : sequence of Coding
            Not looked at.
        """
        inputs = greatest_inputs(statistics)
        outside = standing_out(inputs)
        most = inputs[~outside].max()
        if not bool(most > 0):
            return torch.ones_like(inputs)
        return torch.where(outside, (inputs / most).pow(self.alpha), 1.0)


def standing_out(values: Tensor) -> Tensor:
    """Which of the values ``[n]`` stand out above the others; never all of them.

    Returns
    -------
    Tensor[n], bool
    """
    lower, upper = torch.quantile(values, torch.tensor([0.25, 0.75], dtype=values.dtype))
    border = upper + BEYOND * (upper - lower)
    coarse = values[values > border].sort().values
    if len(coarse) > 1:
        merits = [
            float(coarse[cut] - coarse[cut - 1]) - float(coarse[:cut].var(correction=0))
            for cut in range(1, len(coarse))
        ]
        border = coarse[merits.index(max(merits))]
    return values > border
