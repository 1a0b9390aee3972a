"""OutlierTune as a fold: each channel of an input is centred, and becomes as large as all others.

Wang et al. 2024, "OutlierTune: Efficient Channel-Wise Quantization for Large Language Models"
(arXiv:2406.18832), after the authors' code (aIiKkkk/OutlierTune). A step of its own for every channel of an
input can't be taken out of a product's sum, so it moves into the weights beforehand: input `j` is divided by
`s_j = max|x_j|`, and column `j` of the weights multiplied by it. One step for all channels is then what one
for each was.

Before that, channels are centred: `z_j`, the mean over windows of `(max x_j + min x_j) / 2`, is taken from
the norm's bias, and `W z` added to those of its readers. `s_j` is the greatest magnitude that is left. Where
the norm or a reader has no bias (Llama), only the scales are moved; they are those of `smoothing` with
`alpha` 1.

As in the authors' code, only inputs that come from norms are folded. What the paper adds, one step for all
tokens, isn't done: here each token has its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tailorbird.calibrate.statistics import LinearStatistics
from tailorbird.formats.packed import Coding
from tailorbird.linear.scaling import centred_scales, greatest_inputs


@dataclass(frozen=True)
class Outliertune:
    """Shifts and scales of one input from its ranges; it has no settings."""

    family: ClassVar[str] = "quantize"
    kind: ClassVar[str] = "fold"
    paper: ClassVar[str] = "Wang et al. 2024, arXiv:2406.18832"
    requirements: ClassVar[frozenset[str]] = frozenset({"gram"})

    @property
    def needs(self) -> frozenset[str]:
        """Which statistics are read: "gram" (which comes with the greatest magnitudes)."""
        return self.requirements

    def shift(self, inputs: Iterable[Tensor]) -> Tensor:
        """The middle of every channel's range, ``[in_features]`` float32, by which the input is lessened.

        Parameters
        ----------
        inputs : iterable of Tensor[windows, tokens, in_features], float
            Batches of windows, of at least one.
        """
        middles = [(x.amax(1) + x.amin(1)) / 2 for x in inputs]
        return torch.cat(middles).mean(0, dtype=torch.float64).float()

    def scales(
        self, weights: Sequence[Tensor], statistics: LinearStatistics, codings: Sequence[Coding]
    ) -> Tensor:
        """The scales, ``[in_features]``, up to a common factor; 1 where the input is always zero.

        Parameters
        ----------
        weights : sequence of Tensor[out_features, in_features]
            Not looked at.
        statistics : LinearStatistics
            Of the input, once it was shifted.
        codings : sequence of Coding
            Not looked at.
        """
        inputs = greatest_inputs(statistics)
        return centred_scales(inputs, inputs > 0)
