"""FlatQuant: learn an invertible matrix for the inputs of each linear, behind which both sides round well.

Sun et al. 2024, "FlatQuant: Flatness Matters for LLM Quantization" (arXiv:2410.09426), and the authors' code.
``x W^T = (x P) (P^-1 W^T)`` for every invertible `P`, and inputs and weights whose values lie flat lose less
when they are rounded. ``P = A ⊗ B`` is the Kronecker product of two small matrices, so that ``x P`` costs
little: `x`, read as a matrix `X`, becomes ``A^T X B``. Before it each input is divided by a scale of its own,
which the norm or the linear before takes (`transform.py`). Linears that read one input share all of this.

`A` and `B` are learned as ``U diag(s) V^T`` with orthogonal `U` and `V`, which Cayley's map
``(I + K)^-1 (I - K)`` of a skew `K` turns away from where they begin: at random. So does each grid: from the
least and the greatest weight of a group behind `P`, cut by sigmoids that are learned, which begin at 0.98.
All moves by Adam, along the gradient of the squared difference of the block's outputs, through inputs that
are rounded as those who run the result round them, and through weights that are (Bengio et al. 2013,
arXiv:1308.3432: rounding is taken for the identity).

The paper's scales begin as SmoothQuant's, here at one, or where a fold before left them
(``smoothing+rtn+flatquant``). The grid of inputs is dynamic, segment by segment, and isn't cut; keys and
values in the cache are left alone. Matrices are stored in bfloat16, and inverses are those of what is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tailorbird.compress.blocks.method import LearnedWeight, SquaredError, check_settings
from tailorbird.compress.blocks.omniquant import WIDEST
from tailorbird.compress.blocks.steps import rounded, stored
from tailorbird.compress.blocks.straight_through import StraightThroughWeight
from tailorbird.compress.blocks.transform import LearnedScales
from tailorbird.formats.packed import SCALE_DTYPES, IntegerCoding, PackedWeight
from tailorbird.formats.transform import MATRIX_DTYPES, kronecker_transform
from tailorbird.kernels import kronecker
from tailorbird.kernels.reference import group_layout, round_inputs

#: in which matrices are stored
MATRICES = "bfloat16"
#: Singular values of a matrix stay between the inverse of this and this.
WIDEST_VALUE = 10.0


@dataclass(frozen=True)
class FlatQuant(SquaredError):
    """Matrices of inputs, scales between linears, and how far grids reach.

    Parameters
    ----------
    steps : int
        Updates in each block.
    batch : int
        Calibration windows in an update.
    rate : float
        Of matrices, and of the logarithms of scales.
    clip_rate : float
        Of what sigmoids are taken of.
    """

    family: ClassVar[str] = "quantize"
    kind: ClassVar[str] = "block method"
    paper: ClassVar[str] = "Sun et al. 2024, arXiv:2410.09426"
    requirements: ClassVar[frozenset[str]] = frozenset({"outputs"})

    steps: int = 200
    batch: int = 8
    rate: float = 0.005
    clip_rate: float = 0.05

    def __post_init__(self) -> None:
        check_settings("flatquant", self)

    @property
    def transform(self) -> bool:
        """Always learned."""
        return True

    def begin(self, weight: Tensor, rounded: PackedWeight, coding: IntegerCoding) -> LearnedWeight:
        """Matrices at random, and grids that hardly cut."""
        return FlatQuantWeight(weight, rounded, coding)

    def optimizer(self, weights: Sequence[LearnedWeight]) -> Optimizer:
        """Adam over matrices, scales and grids."""
        found = [one for one in weights if isinstance(one, FlatQuantWeight)]
        scales = dict.fromkeys(one.inputs for one in found if one.inputs is not None)
        pairs = dict.fromkeys(one.matrices for one in found)
        shared = [parameter for one in (*pairs, *scales) for parameter in one.parameters()]
        return torch.optim.Adam(
            [
                {"params": shared, "lr": self.rate},
                {"params": [cut for one in found for cut in one.cuts], "lr": self.clip_rate},
            ]
        )


class FlatQuantWeight(StraightThroughWeight):
    """One linear; `forward` gives the weight that multiplies what `reads` makes of its inputs.

    Attributes
    ----------
    matrices : LearnedMatrices
        May be those of other linears, too.
    cuts : nn.ParameterList
        What sigmoids are taken of, for both sides of zero, ``[out_features, groups]``; a symmetric grid has
        one for both.
    inputs, outputs : LearnedScales or None
        By which inputs are divided, and rows.
    rounds_to : str or None
        What those who run the result round its inputs to.
    """

    def __init__(self, weight: Tensor, packed: PackedWeight, coding: IntegerCoding) -> None:
        super().__init__(packed, coding)
        self.weight = weight.float()
        self.matrices = LearnedMatrices(self.in_features)
        self.inputs: LearnedScales | None = None
        self.outputs: LearnedScales | None = None
        self.rounds_to: str | None = None
        sides = 1 if coding.symmetric else 2
        start = torch.full_like(self.began.scales, WIDEST).logit()
        self.cuts = nn.ParameterList(start.clone() for _ in range(sides))

    def behind(self) -> Tensor:
        """The weight behind scales and matrices, not yet rounded."""
        weight = self.weight
        if self.inputs is not None:
            weight = weight * self.inputs()
        if self.outputs is not None:
            weight = weight / self.outputs()[:, None]
        return kronecker.behind(weight, *self.matrices())

    def from_zero(self) -> tuple[Tensor, Tensor, Tensor]:
        weight = self.behind()
        groups, size = group_layout(self.in_features, self.coding.group_size)
        padding = groups * size - self.in_features
        padded = nn.functional.pad(weight, (0, padding)).unflatten(1, (groups, size))
        high, low = padded.amax(2).clamp(min=0), padded.amin(2).clamp(max=0)
        if self.coding.symmetric:
            zeros = self.began.zeros
            scales = self.cuts[0].sigmoid() * torch.maximum(high, -low) / (self.top - zeros)
        else:
            high, low = high * self.cuts[0].sigmoid(), low * self.cuts[1].sigmoid()
            scales = (high - low) / self.top
        scales = stored(
            scales.clamp(min=torch.finfo(SCALE_DTYPES[self.coding.scale_dtype]).tiny), self.coding
        )
        if not self.coding.symmetric:
            zeros = rounded(-low / scales).clamp(0, self.top)
        return weight / self.each(scales), scales, zeros

    def forward(self) -> Tensor:
        with exactly():
            weight = super().forward()
            return weight if self.outputs is None else weight * self.outputs()[:, None]

    @property
    def reads(self) -> Callable[[Tensor], Tensor]:
        return self._transformed

    @property
    def began_with(self) -> Callable[[Tensor], Tensor]:
        return self._rounded

    def _transformed(self, x: Tensor) -> Tensor:
        with exactly():
            scaled = x if self.inputs is None else x / self.inputs()
            return self._rounded(kronecker.mix_rows(scaled, *self.matrices()))

    def _rounded(self, x: Tensor) -> Tensor:
        if self.rounds_to is None:
            return x
        return x + (round_inputs(x.detach(), self.coding.group_size, self.rounds_to) - x).detach()

    @torch.no_grad()
    def packed(self) -> PackedWeight:
        with exactly():
            left, right = self.matrices()
            return super().packed().with_matrices(left, right, MATRICES)

    def kept(self, rounded: PackedWeight) -> PackedWeight:
        """`rounded`, behind matrices that change nothing."""
        left, right = (torch.eye(len(matrix)) for matrix in self.matrices())
        return rounded.with_matrices(left, right, MATRICES)

    def limit(self) -> None:
        for shared in (self.matrices, self.inputs, self.outputs):
            if shared is not None:
                shared.limit()

    def settle(self) -> None:
        for scales in (self.inputs, self.outputs):
            if scales is not None:
                scales.settle()


class LearnedMatrices(nn.Module):
    """`A` and `B` of the inputs that some linears share, ``[a, a]`` and ``[b, b]``.

    Where they begin depends on the number of inputs alone.
    """

    def __init__(self, in_features: int) -> None:
        super().__init__()
        block = kronecker_transform(in_features, MATRICES).block
        generator = torch.Generator().manual_seed(in_features)
        self.left = LearnedMatrix(in_features // block, generator)
        self.right = LearnedMatrix(block, generator)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Both with the values that they are stored with, float32."""
        return self.left(), self.right()

    def limit(self) -> None:
        """Keep both far from singular."""
        self.left.limit()
        self.right.limit()


class LearnedMatrix(nn.Module):
    """``U diag(s) V^T``: what turns `U` and `V`, and the logarithms of `s`."""

    def __init__(self, order: int, generator: torch.Generator) -> None:
        super().__init__()
        self.ends = [random_orthogonal(order, generator) for _ in range(2)]
        self.turns = nn.ParameterList(torch.zeros(order, order) for _ in range(2))
        self.logarithms = nn.Parameter(torch.zeros(order))

    def forward(self) -> Tensor:
        """The matrix as it is stored, float32; the gradient is that of the one before it."""
        u, v = (end @ cayley(turn) for end, turn in zip(self.ends, self.turns, strict=True))
        matrix = u * self.logarithms.exp() @ v.t()
        return matrix + (matrix.to(MATRIX_DTYPES[MATRICES]).float() - matrix).detach()

    @torch.no_grad()
    def limit(self) -> None:
        widest = torch.tensor(WIDEST_VALUE).log()
        self.logarithms.clamp_(-widest, widest)


def cayley(turn: Tensor) -> Tensor:
    """``(I + K)^-1 (I - K)``, orthogonal, with the skew ``K = (turn - turn^T) / 2``."""
    skew = (turn - turn.t()) / 2
    one = torch.eye(len(turn))
    return torch.linalg.solve(one + skew, one - skew)


def random_orthogonal(order: int, generator: torch.Generator) -> Tensor:
    """An orthogonal matrix, drawn evenly."""
    q, r = torch.linalg.qr(torch.randn(order, order, generator=generator))
    return q * r.diagonal().sign()


def share_inputs(groups: Iterable[Sequence[FlatQuantWeight]]) -> None:
    """Let the linears of each group, which read one input, learn one pair of matrices."""
    for together in groups:
        for one in together:
            one.matrices = together[0].matrices


def exactly() -> torch.autocast:
    """Products in float32, also while others are narrower."""
    return torch.autocast("cpu", enabled=False)
