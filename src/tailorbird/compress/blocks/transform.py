"""OmniQuant's learnable equivalent transformation: scales between linears, learned with what rounds them.

Shao et al. 2023, "OmniQuant: Omnidirectionally Calibrated Quantization for Large Language Models"
(arXiv:2308.13137). What a linear reads is divided by `s`, channel by channel, and the columns of its weight
are multiplied by it: ``X W + B = (X / s) (s * W) + B``. Without rounding nothing changes; with it, a column
whose `s` is large gets a finer share of its group's range. The division happens in the norm before the
linear, or in the rows of the linear before it; there is one `s` for each norm that nothing but linears
reads, and one for each pair of linears (value and output projection, up and down projection).

While a block learns, its modules stay as they are: each linear computes with the weight that, before a norm
that isn't divided yet, stands for the one that is stored. `compress/folds.py` divides norms and biases when
learning has ended, by what the dtype of a norm can hold, which is what is measured.

The paper also moves means of inputs into biases, scales queries against keys, and leaves the last linear of
a block alone. Means would give biases to linears that have none, and every reader of a recorded fold would
have to undo them; a scale of queries is one of rows, which each have grids of their own. Neither is built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from tailorbird.model.anatomy import BlockAnatomy, NormGroup, ScalePair

#: Scales stay between the inverse of this and this.
WIDEST_SCALE = 100.0


class Transformed(Protocol):
    """A learned weight whose columns may be multiplied by scales, and its rows divided by others."""

    inputs: LearnedScales | None
    outputs: LearnedScales | None


class LearnedScales(nn.Module):
    """Scales of one fold under training, ``[in_features]``.

    Parameters
    ----------
    channels : int
    effective : callable
        Of scales that are asked for, those that a fold would have.
    """

    def __init__(self, channels: int, effective: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.logarithms = nn.Parameter(torch.zeros(channels))
        self.effective = effective
        self.settled: Tensor | None = None

    def forward(self) -> Tensor:
        """The scales as they are."""
        return self.logarithms.exp() if self.settled is None else self.settled

    @torch.no_grad()
    def limit(self) -> None:
        """Keep the scales between their bounds."""
        widest = torch.tensor(WIDEST_SCALE).log()
        self.logarithms.clamp_(-widest, widest)

    @torch.no_grad()
    def settle(self) -> None:
        """From now on be what a fold would make of the scales."""
        if self.settled is None:
            self.settled = self.effective(self.asked)

    @property
    def asked(self) -> Tensor:
        """The scales that were learned, whatever can be stored of them."""
        return self.logarithms.detach().exp()


class BlockTransform:
    """All scales that are learned in one block.

    Parameters
    ----------
    anatomy : BlockAnatomy
    weights : mapping of str to Transformed
        Linears that learn, by name; folds to which others belong are left alone.
    effective : callable
        Of a fold and the scales that are asked for, those that it would have.
    """

    def __init__(
        self,
        anatomy: BlockAnatomy,
        weights: Mapping[str, Transformed],
        effective: Callable[[NormGroup | ScalePair, Tensor], Tensor],
    ) -> None:
        widths = {place.name: place.in_features for place in anatomy.linears}
        self.weights = weights
        self.scales: list[tuple[NormGroup | ScalePair, LearnedScales]] = []
        folds: list[NormGroup | ScalePair] = [*anatomy.scale_pairs, *anatomy.norm_groups]
        for fold in folds:
            readers = fold.linears if isinstance(fold, NormGroup) else (fold.target,)
            sources = () if isinstance(fold, NormGroup) else (fold.source,)
            if not all(name in weights for name in (*readers, *sources)):
                continue
            scales = LearnedScales(widths[readers[0]], partial(effective, fold))
            self.scales.append((fold, scales))
            for name in readers:
                weights[name].inputs = scales
            for name in sources:
                weights[name].outputs = scales

    def learned(self) -> Iterator[tuple[NormGroup | ScalePair, Tensor]]:
        """Every fold and the scales that were learned for it, as they are asked for."""
        for fold, scales in self.scales:
            yield fold, scales.asked

    def transformed(self, name: str, weight: Tensor) -> Tensor:
        """A weight ``[out_features, in_features]`` of the block as it is after the folds."""
        learned = self.weights[name]
        if learned.inputs is not None:
            weight = weight * learned.inputs()
        return weight if learned.outputs is None else weight / learned.outputs()[:, None]
