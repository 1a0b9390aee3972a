"""LoQT: thin factors learn beside weights of codes, and are merged into them at growing intervals.

Loeschcke et al. 2024, "LoQT: Low-Rank Adapters for Quantized Pretraining" (arXiv:2405.16528), and the
authors' code.

    y = (Q + s P B) x        Q [out_features, in_features] codes, P of rank r fixed, B learned

`P` lies on the smaller side of the weight. At some steps nothing is updated; the gradient `G` of the whole
weight ``W = Q + s P B`` is taken, and with it (here for ``out_features < in_features``)

    P = the r left singular vectors of G with the largest values
    Q = q(W),   B = P^T (W - Q) / s,   then in turn   Q = q(W - s P B),   B = P^T (W - Q) / s

of which the pair with the least ``|W - Q - s P B|_F`` is kept: `B` makes up for what rounding takes away, as
far as that lies in the new subspace. After that `B` learns alone. The first merge is at the first step, where
`B` is zero; the k-th after it comes ``interval + floor(growth^k)`` steps behind the one before, from the
second on, and none so late that no whole interval is left. The optimizer's states of `B` stay.

`q` rounds to the nearest values, each row on the grid that it has or on one that is fitted anew, whichever
is nearer: what has not moved keeps every bit. Where the model is dense, weights take ``s P B`` in, and `B`
begins at zero. In the end a dense weight takes it in, too; beside codes it becomes the checkpoint's low-rank
part, so that nothing is lost. The authors also store `P` in NF4, which is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from tailorbird.adapt.methods.adapter import Addition, Attached, Place
from tailorbird.adapt.methods.checks import require, require_fit, require_rank
from tailorbird.adapt.methods.low_rank import product
from tailorbird.errors import SettingsError
from tailorbird.formats.modules import CompressedLinear
from tailorbird.formats.packed import GroupedCoding, PackedWeight
from tailorbird.linear.quantize.grid import grid_of, quantize_to_grid
from tailorbird.linear.quantize.rows import best_rows
from tailorbird.linear.quantize.rtn import Rtn

#: tensors of a packed linear that a merge changes
CHANGING = ("codes", "scales", "zeros")


def merge_steps(steps: int, interval: int, growth: float) -> list[int]:
    """The steps of so many at which a subspace is chosen, the first being 0."""
    found, at = [0], interval
    while at + interval < steps:
        found.append(at)
        at += interval + math.floor(growth ** len(found[1:]))
    return found


def subspace(gradient: Tensor, rank: int) -> Tensor:
    """Orthonormal rows ``[rank, smaller side]``: the singular vectors of the largest values, on that side."""
    thin = gradient.double()
    thin = thin if len(thin) < thin.shape[1] else thin.T
    vectors = torch.linalg.eigh(thin @ thin.T).eigenvectors  # values ascend
    return vectors[:, -rank:].T.flip(0).contiguous().float()


def rounded(stored: PackedWeight, target: Tensor) -> PackedWeight:
    """`target` in the coding of `stored`, each row on its own grid or on a new one, whichever is nearer."""
    coding = stored.coding
    assert isinstance(coding, GroupedCoding)
    scales, zeros = grid_of(stored)
    codes = quantize_to_grid(target, scales, zeros, coding)
    kept = PackedWeight.from_codes(codes, scales, zeros, coding)
    plain = torch.eye(target.shape[1], device=target.device)
    return best_rows(target, [kept, Rtn()(target, None, coding)], plain)[0]


def compensated(
    stored: PackedWeight, target: Tensor, basis: Tensor, rounds: int
) -> tuple[PackedWeight, Tensor]:
    """Codes near `target`, and the share of what they lack that lies in the subspace.

    Parameters
    ----------
    stored : PackedWeight
        Whose coding and grids are taken.
    target : Tensor[out_features, in_features], float32
    basis : Tensor[rank, smaller side]
        Orthonormal rows.
    rounds : int
        0: codes of the target itself, and nothing beside them.

    Returns
    -------
    packed : PackedWeight
    beside : Tensor[rank, larger side]
        Coordinates of ``target - packed`` in the subspace.
    """
    left = len(target) < target.shape[1]
    larger = target.shape[1] if left else len(target)
    best, beside = rounded(stored, target), target.new_zeros(len(basis), larger)
    least, current = math.inf, target
    for _ in range(rounds):
        packed = rounded(stored, current)
        lacking = target - packed.dequantize()
        found = basis @ (lacking if left else lacking.T)
        share = basis.T @ found if left else found.T @ basis
        distance = float((lacking - share).norm())
        if distance < least:
            least, best, beside = distance, packed, found
        current = target - share
    return best, beside


class Subspace(Addition):
    """``scaling * up down x``, of which the factor on the smaller side of the weight stays between merges.

    Attributes
    ----------
    basis : Tensor[rank, smaller side]
        Orthonormal rows, `P` transposed.
    learned : Parameter[rank, larger side]
        `B`.
    whole : Tensor[out_features, in_features] or None
        Zeros that are added to the weight while its gradient is taken.
    """

    basis: Tensor

    def __init__(self, place: Place, rank: int, scaling: float) -> None:
        super().__init__()
        sides = sorted((place.out_features, place.in_features))
        self.left = place.out_features < place.in_features
        self.shape = (place.out_features, place.in_features)
        self.register_buffer("basis", torch.zeros(rank, sides[0]))
        self.learned = nn.Parameter(torch.zeros(rank, sides[1]))
        self.scaling = scaling
        self.whole: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        up, down = (self.basis.T, self.learned) if self.left else (self.learned.T, self.basis)
        y = product(x, up, down) * self.scaling
        return y if self.whole is None else y + functional.linear(x, self.whole.to(x.dtype))

    def factors(self) -> tuple[Tensor, Tensor]:
        learned = self.learned.detach()
        up, down = (self.basis.T, learned) if self.left else (learned.T, self.basis)
        return up * self.scaling, down

    def watch(self, watching: bool) -> None:
        """Take the gradient of the whole weight, and of that alone; or of what is learned again."""
        self.learned.requires_grad_(not watching)
        self.whole = torch.zeros(self.shape, requires_grad=True) if watching else None

    @torch.no_grad()
    def settle(self) -> None:
        """Let both factors be as a checkpoint holds them: rounded to bfloat16, the scaling in one of them."""
        up, down = (factor.bfloat16().float() for factor in self.factors())
        self.basis, self.scaling = (up.T if self.left else down).contiguous(), 1.0
        self.learned.copy_(down if self.left else up.T)


class AttachedLoqt(Attached):
    """LoQT on a model, whose weights it changes: tensors of them are buffers here, by their own names."""

    def __init__(self, method: Loqt, places: Mapping[str, Place]) -> None:
        super().__init__()
        self.method, self.places = method, places
        for path, place in places.items():
            self.add(path, Subspace(place, method.rank, method.alpha))
            for part, tensor in _tensors(place).items():
                self.register_buffer(f"{path}.{part}".replace(".", "/"), tensor)
        self._merging = False

    def changed(self) -> dict[str, Tensor]:
        own = {name for name, _ in self.named_buffers(recurse=False)}
        return {name.replace("/", "."): self.get_buffer(name) for name in sorted(own)}

    def learned(self) -> list[nn.Parameter]:
        return [one.learned for one in self._subspaces().values()]

    def low_rank_parts(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {
            path: one.factors()
            for path, one in self._subspaces().items()
            if isinstance(self.places[path].module, CompressedLinear)
        }

    def before_step(self, step: int, steps: int) -> None:
        self._merging = step in merge_steps(steps, self.method.interval, self.method.growth)
        for one in self._subspaces().values():
            one.watch(self._merging)

    @torch.no_grad()
    def after_gradients(self, step: int) -> None:
        if not self._merging:
            return
        for path, one in self._subspaces().items():
            gradient = None if one.whole is None else one.whole.grad
            if gradient is not None:
                self._merge(self.places[path], one, subspace(gradient, self.method.rank))
            one.watch(False)

    @torch.no_grad()
    def conclude(self) -> bool:
        for path, one in self._subspaces().items():
            one.watch(False)
            if isinstance(self.places[path].module, CompressedLinear):
                one.settle()
            else:
                _add(self.places[path], one.delta())
                one.learned.zero_()
        return True

    def _merge(self, place: Place, one: Subspace, basis: Tensor) -> None:
        linear = place.module
        if not isinstance(linear, CompressedLinear):
            _add(place, one.delta())
            one.learned.zero_()
        else:
            packed, order = linear.packed(), linear.order
            columns = torch.arange(place.in_features) if order is None else order.long()
            # all of it in the order in which the columns are stored
            tensors = {part: packed.tensors[part] for part in CHANGING if part in packed.tensors}
            stored = PackedWeight(packed.coding, place.out_features, place.in_features, tensors)
            target = stored.dequantize() + one.delta()[:, columns]
            within = basis if one.left else basis[:, columns]
            codes, beside = compensated(stored, target, within, self.method.rounds)
            for part, tensor in codes.tensors.items():
                getattr(linear, part).copy_(tensor)
            beside = beside[:, torch.argsort(columns)] if one.left else beside
            one.learned.copy_(beside / one.scaling)
        one.basis.copy_(basis)

    def _subspaces(self) -> dict[str, Subspace]:
        return {
            path.replace("/", "."): one for path, one in self.additions.items() if isinstance(one, Subspace)
        }


def _tensors(place: Place) -> dict[str, Tensor]:
    """What a merge changes of a linear, by the names of its tensors, sharing memory with them.

    Raises
    ------
    SettingsError
        It's packed in another way than as codes on grids, or has a low-rank part already.
    """
    linear = place.module
    if not isinstance(linear, CompressedLinear):
        weight: Any = linear.weight
        return {"weight": weight.detach()}
    if not isinstance(linear.coding, GroupedCoding) or linear.up is not None or linear.transform is not None:
        held = "a low-rank part" if linear.up is not None else f"codes of {linear.coding.label}"
        held = held if linear.transform is None else f"{linear.transform.word} inputs"
        raise SettingsError(
            f"loqt on `{place.path}` with {held}",
            "a dense linear, or integers or a codebook without a low-rank part",
            "compress the source anew, such as by --recipe rtn:codebook=nf4,group=64, or use lora",
        )
    return {part: tensor for part in CHANGING if (tensor := getattr(linear, part)) is not None}


def _add(place: Place, change: Tensor) -> None:
    """Let a dense weight take in a change ``[out_features, in_features]``, rounded once."""
    weight: Any = place.module.weight
    stored = weight.detach()
    stored.copy_(stored.float() + (change.T if place.transposed else change))


@dataclass(frozen=True)
class Loqt:
    """LoQT.

    Parameters
    ----------
    rank : int
    alpha : float
        `s` above, as in the authors' code not divided by the rank.
    interval : int
        Least number of steps between two merges.
    growth : float
        By whose powers the intervals grow.
    rounds : int
        How often codes and `B` are found in turn; 0: `B` begins at zero.
    """

    name: ClassVar[str] = "loqt"
    family: ClassVar[str] = "full"
    kind: ClassVar[str] = "low rank, merged into codes"
    paper: ClassVar[str] = "Loeschcke et al. 2024, arXiv:2405.16528"
    needs: ClassVar[str] = "gradients of whole weights at merges"

    rank: int = 16
    alpha: float = 0.5
    interval: int = 100
    growth: float = 1.2
    rounds: int = 5

    def __post_init__(self) -> None:
        require_rank(self.name, self.rank, self.alpha)
        require(self.interval >= 1, self.name, "interval", self.interval, "at least 1")
        require(1 <= self.growth < math.inf, self.name, "growth", self.growth, "a number from 1 on")
        require(self.rounds >= 0, self.name, "rounds", self.rounds, "at least 0")

    def attach_to(
        self, model: nn.Module, places: Mapping[str, Place], generator: torch.Generator
    ) -> Attached:
        """`rank` times the larger side: learned numbers per linear."""
        for place in places.values():
            require_fit(self.name, self.rank, place)
        return AttachedLoqt(self, places)
