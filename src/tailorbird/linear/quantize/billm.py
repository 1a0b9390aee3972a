"""BiLLM: binary weights, each with the magnitude of one of two classes, salient columns among themselves.

Huang et al. 2024, "BiLLM: Pushing the Limit of Post-Training Quantization for LLMs" (arXiv:2402.04291), and
the authors' code. Weights are rounded with the error feedback of GPTQ (`gptq.py`) in two ways:

- those of salient columns, which have the largest `sum w^2 / [H^-1]_qq^2`, to two binary terms,
  `a sign(w) + b sign(w - a sign(w))`;
- the others to a sign and the magnitude of their class, concentrated or sparse, which a break point parts.

The 1.08 bits a weight of the paper leave out what tells the classes apart, and the scales. Here all is
counted: the sign, a second bit for the class or the second term, and two magnitudes in 16 bits for each group
of a row, which are `2 + 32 / group_size` bits a weight. In these bits both ways are one (`binary.py`): two
terms whose scales are found together, not one after the other, are the parting at the best break point, and
never worse. So salient columns differ in that they share groups with their like. Where the paper searches how
many are salient, block by block, all columns stand here by falling saliency: the first groups hold the most
salient ones, and are rounded while there are columns left to make up for their errors. The order takes four
bytes a column.

Break points are those of each row's groups, and exact, where the paper has one for all rows, from a grid of
80. Errors move on inside a group, too, column by column.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from tailorbird.formats.packed import BinaryCoding, CodesCoding, PackedWeight
from tailorbird.kernels.reference import group_layout
from tailorbird.linear.quantize.binary import codes_by_feedback, fitted_magnitudes, groups_by_feedback
from tailorbird.linear.quantize.feedback import FeedbackMethod
from tailorbird.linear.quantize.gptq import Gptq, GptqRounding, inverse_diagonal, inverse_factor


@dataclass(frozen=True, kw_only=True)
class Billm(FeedbackMethod):
    """Binary weights of two magnitudes, columns by falling saliency.

    Beyond weight, statistics and result it takes what GPTQ takes, and a second factor of the Gram matrix,
    which is factorized once more for each weight, in its order.

    Parameters
    ----------
    static_groups : bool
        True: a group holds neighbouring columns, its magnitudes are fitted to the weights as they are at the
        start, and no order is stored. False: groups are formed along the order, so that salient columns are
        among themselves, each is fitted when it's reached, and the order is stored with the weight.
    damping, asymmetric, correction, least_token
        As `Gptq`.
    """

    name: ClassVar[str] = "billm"
    paper: ClassVar[str] = "Huang et al. 2024, arXiv:2402.04291"
    makes: ClassVar[frozenset[str]] = frozenset({BinaryCoding.kind})
    outliers: ClassVar[float] = 0.0

    static_groups: bool = False

    @property
    def reorders(self) -> bool:
        """Whether columns may be stored in another order than that of the inputs."""
        return not self.static_groups

    @property
    def gptq(self) -> Gptq:
        """The error feedback with these settings, columns in their own order."""
        return replace(super().gptq, act_order=False)

    def round(self, rounding: GptqRounding, target: Tensor, coding: CodesCoding) -> PackedWeight:
        """Round what is aimed at."""
        assert isinstance(coding, BinaryCoding)  # as `makes` says
        certainty = inverse_diagonal(rounding.factor, rounding.order).reciprocal()
        order = saliency(target, certainty).argsort(descending=True, stable=True)
        factor = inverse_factor(rounding.statistics.gram, order, self.damping)
        groups, _ = group_layout(target.shape[1], coding.group_size)
        if self.static_groups or groups == 1:
            tables = fitted_magnitudes(target, coding, certainty)
            return codes_by_feedback(target, factor, order, tables, coding)
        packed = groups_by_feedback(target, factor, order, certainty, coding)
        return replace(packed, tensors=packed.tensors | {"order": order.to(torch.int32)})


def saliency(target: Tensor, certainty: Tensor) -> Tensor:
    """`sum_i w_iq^2 / [H^-1]_qq^2` of each column.

    Parameters
    ----------
    target : Tensor[out_features, in_features], float32
    certainty : Tensor[in_features], float64
        `1 / [H^-1]_qq`.

    Returns
    -------
    Tensor[in_features], float64
    """
    return target.square().sum(0, dtype=torch.float64) * certainty.square()
