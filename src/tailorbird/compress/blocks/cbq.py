"""CBQ: learn the rounding of several blocks together, by offsets of low rank, in windows that overlap.

Ding et al. 2023, "CBQ: Cross-Block Quantization for Large Language Models" (arXiv:2312.07950). The blocks of
a window (`windows.py`) learn so that the outputs `x` of the last come near the source's, `y`: what an update
makes less is ``E = |x - y|^2 + KL(softmax(y) || softmax(x))`` for each token. A weight becomes
``s clamp(floor(w / s) + D)`` with an offset ``D = clip(1.2 sigmoid(V) - 0.1, 0, 1)`` for each weight, the
rectified sigmoid of AdaRound (Nagel et al. 2020, arXiv:2004.10568), where ``V = A1 A2`` is a product of low
rank, `A1` begins at random and `A2` at zero. ``1 - |2 D - 1|^beta`` of all weights drives offsets to 0 or 1;
`beta` falls from 20 to 2. Steps `s` are learned as well.

A product of low rank can't hold the roundings of single weights. So `V` begins here where the offset is what
floor takes away, moved to the side of the code that the linear method before chose, and the product is
added to it: a weight is rounded up where its rest is beyond a border, and it is the borders that are learned.
The loss sees the codes that would be stored, offsets of 0 and 1, and gradients pass as through `D`. Grids
are those of groups, factors of their steps are learned, and what drives offsets is relative to `E`.

The paper's treatment of outliers before all this has two halves. Scales of input channels are a fold, `cfp`,
as in ``cfp+rtn+cbq``. Cutting weights off isn't built: where `rtn` and `gptq` search for the end of each
group's grid, they do so already. Only weights are rounded here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tailorbird.compress.blocks.method import LearnedWeight, check_settings
from tailorbird.compress.blocks.steps import anchored
from tailorbird.compress.blocks.straight_through import StraightThroughWeight
from tailorbird.errors import SettingsError
from tailorbird.formats.packed import IntegerCoding, PackedWeight

#: Where the rectified sigmoid is cut off lies within these.
STRETCHED = -0.1, 1.1
#: Power of what drives offsets to 0 and 1: at the first update and at the last.
POWERS = 20.0, 2.0
#: Factors of steps keep their sign, and so much of their size.
LEAST_FACTOR = 0.01


@dataclass(frozen=True)
class Cbq:
    """Offsets of the rounding as a product of low rank, and factors of the steps, over windows of blocks.

    Parameters
    ----------
    steps : int
        Updates in each window.
    batch : int
        Calibration windows in an update.
    window : int
        Blocks that are learned together.
    overlap : int
        How many of them are learned once more, with those after them.
    rank : int
        Of the product.
    rate : float
        Of its factors.
    scale_rate : float
        Of the factors of steps, relative.
    rounding : float
        Weight of what drives offsets to 0 and 1, beside a loss of one.
    """

    family: ClassVar[str] = "quantize"
    kind: ClassVar[str] = "block method"
    paper: ClassVar[str] = "Ding et al. 2023, arXiv:2312.07950"
    requirements: ClassVar[frozenset[str]] = frozenset({"outputs"})

    steps: int = 200
    batch: int = 8
    window: int = 2
    overlap: int = 1
    rank: int = 5
    rate: float = 0.03
    scale_rate: float = 0.01
    rounding: float = 0.01

    def __post_init__(self) -> None:
        check_settings("cbq", self, may_be_none=frozenset({"overlap"}))
        if self.overlap >= self.window:
            raise SettingsError(
                f"overlap {self.overlap} of cbq in windows of {self.window}",
                "fewer blocks than a window has",
                "set a smaller `overlap` or a larger `window`",
            )

    @property
    def transform(self) -> bool:
        """Not learned."""
        return False

    def begin(self, weight: Tensor, rounded: PackedWeight, coding: IntegerCoding) -> LearnedWeight:
        """Offsets that give the codes of `rounded`, and its steps."""
        return CbqWeight(weight, rounded, coding, self.rank)

    def optimizer(self, weights: Sequence[LearnedWeight]) -> Optimizer:
        """Adam over the products and the factors of steps."""
        found = [one for one in weights if isinstance(one, CbqWeight)]
        return torch.optim.Adam(
            [
                {"params": [each for one in found for each in (one.left, one.right)], "lr": self.rate},
                {"params": [one.factors for one in found], "lr": self.scale_rate},
            ]
        )

    def loss(self, outputs: Tensor, targets: Tensor, weights: Sequence[LearnedWeight], done: float) -> Tensor:
        """`E` of each token, and what drives offsets."""
        found = distance(outputs, targets)
        power = POWERS[0] + done * (POWERS[1] - POWERS[0])
        undecided = [one.undecided(power) for one in weights if isinstance(one, CbqWeight)]
        driving = self.rounding * torch.stack(undecided).mean()
        return found + found.detach() * driving


def distance(outputs: Tensor, targets: Tensor) -> Tensor:
    """Squared difference plus the divergence of softmaxes over channels, mean over tokens.

    Parameters
    ----------
    outputs, targets : Tensor[..., hidden_size], float32
    """
    squares = (outputs - targets).square().sum(-1)
    wanted = targets.log_softmax(-1)
    divergence = (wanted.exp() * (wanted - outputs.log_softmax(-1))).sum(-1)
    return (squares + divergence).mean()


class CbqWeight(StraightThroughWeight):
    """One linear: `A1` ``[out_features, rank]``, `A2` ``[rank, in_features]``, factors of its steps.

    Attributes
    ----------
    floors : Tensor[out_features, in_features], float32
        Steps from zero that an offset of 0 leaves.
    start : Tensor[out_features, in_features], float32
        `V` where learning begins.
    """

    def __init__(self, weight: Tensor, packed: PackedWeight, coding: IntegerCoding, rank: int) -> None:
        super().__init__(packed, coding)
        codes = anchored(weight, self.began, coding)
        low, high = STRETCHED
        self.start = ((codes - codes.floor() - low) / (high - low)).logit()
        self.floors = codes.floor() - self.each(self.began.zeros)
        rows, columns = weight.shape
        generator = torch.Generator().manual_seed(rows * columns + rank)
        self.left = nn.Parameter(torch.randn(rows, rank, generator=generator))
        self.right = nn.Parameter(torch.zeros(rank, columns))
        self.factors = nn.Parameter(torch.ones_like(self.began.scales))

    def offsets(self) -> Tensor:
        """`D`, between 0 and 1."""
        low, high = STRETCHED
        return ((self.start + self.left @ self.right).sigmoid() * (high - low) + low).clamp(0, 1)

    def undecided(self, power: float) -> Tensor:
        """Mean of ``1 - |2 D - 1|^power``: 0 where all offsets are 0 or 1."""
        return 1 - (2 * self.offsets() - 1).abs().pow(power).mean()

    def from_zero(self) -> tuple[Tensor, Tensor, Tensor]:
        offsets = self.offsets()
        decided = offsets + ((offsets >= 0.5).float() - offsets).detach()
        return self.floors + decided, self.began.scales * self.factors, self.began.zeros

    @torch.no_grad()
    def limit(self) -> None:
        self.factors.clamp_(min=LEAST_FACTOR)
