"""Blocks whose inputs are computed from their outputs, so that no block keeps its input for the gradient.

Two streams as wide as the model go through the blocks (Gomez et al. 2017, arXiv:1707.04585; scaled as in Liao
et al. 2023, arXiv:2306.00477). `F` is a block, `G` anything that is computed place by place, λ = 2**-bits:

    y1 = λ x1 + F(x2)          x2 = y2 − G(y1)
    y2 = x2 + G(y1)            x1 = (y1 − F(x2)) / λ

`(y2, y1)` is what the next block gets as `(x1, x2)`; the first one gets the same twice, and `y1` of the last
one goes on in the model. In the gradient the outputs of the last block are there, and what was computed from
them for one block are the outputs of the block before.

In floating point the division by λ lets errors grow as 1 / λ per block, until inputs are noise after a few.
The streams are therefore integers, multiples of 2**-40, whose sums are exact; the multiplication is a shift,
and the `bits` bits of `x1` that it loses are kept, as Maclaurin et al. 2015 (arXiv:1502.03492) keep those of
a momentum that decays. `F` and `G` read the streams in the model's dtype, and what they give is rounded to
such multiples. So inputs come back to the bit at any depth, and a block keeps a byte for each number of its
input, or half of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tailorbird.errors import TailorbirdError, UnsupportedArchitecture

#: What is added to a stream, computed from the other one: ``[..., width]`` in and out.
Addend = Callable[[Tensor], Tensor]

#: Bits behind the point, and the magnitude of what is added up to which sums fit 63 bits.
FRACTION, LARGEST = 40, 2**20
#: Relative error of inputs that is too much: where blocks give other numbers when they run again.
TOLERANCE = 1e-2
#: Most bits that are lost, and those of which two fit a byte.
MOST_BITS, HALF = 8, 4


class NotReversed(TailorbirdError):
    """The inputs of blocks aren't what was computed from their outputs, or can't be held exactly."""


def fixed(x: Tensor) -> Tensor:
    """Numbers as multiples of ``2**-FRACTION``, int64.

    Raises
    ------
    NotReversed
        One is not finite, or too large.
    """
    exact = x.detach().to(torch.float64)
    if not bool((exact.abs() <= LARGEST).all()):
        raise NotReversed(
            f"a block of which some output isn't finite or above {LARGEST:,}",
            "finite numbers below that", "set --rate lower, or tune with another method, such as lora",
        )  # fmt: skip
    return torch.ldexp(exact, torch.tensor(FRACTION)).round().to(torch.int64)


def floating(stream: Tensor, dtype: torch.dtype) -> Tensor:
    """What `fixed` made of numbers as numbers again."""
    return torch.ldexp(stream.to(torch.float64), torch.tensor(-FRACTION)).to(dtype)


def packed(lost: Tensor, bits: int) -> Tensor:
    """Numbers below ``2**bits`` as bytes, two in each where they fit."""
    small = lost.to(torch.uint8)
    return small[..., ::2] | (small[..., 1::2] << HALF) if _two_in_a_byte(small.shape[-1], bits) else small


def unpacked(kept: Tensor, width: int, bits: int) -> Tensor:
    """What `packed` was given, ``[..., width]`` int64."""
    if _two_in_a_byte(width, bits):
        kept = torch.stack([kept & (2**HALF - 1), kept >> HALF], -1).flatten(-2)
    return kept.to(torch.int64)


def _two_in_a_byte(width: int, bits: int) -> bool:
    return bits <= HALF and width % 2 == 0


@dataclass(frozen=True)
class Coupling:
    """One block and what runs behind it.

    Attributes
    ----------
    block, between : callable
        `F` and `G`.
    bits : int
        λ is 2**-bits.
    dtype : torch.dtype
        That both read and give.
    of_block, of_between : sequence of nn.Parameter
        What is learned in each.
    """

    block: Addend
    between: Addend
    bits: int
    dtype: torch.dtype
    of_block: Sequence[nn.Parameter]
    of_between: Sequence[nn.Parameter]

    def outputs(self, streams: Tensor, again: bool) -> tuple[Tensor, Tensor]:
        """What the next block gets, ``[..., 2 * width]`` int64, and the bits that were lost.

        Parameters
        ----------
        streams : Tensor[..., 2 * width], int64
        again : bool
            Whether block and adapter will run again in the gradient, and shall give the same to the bit.
        """

        def added(addend: Addend, stream: Tensor) -> Tensor:
            with torch.set_grad_enabled(again):  # kernels may depend on whether there are gradients
                return fixed(addend(floating(stream, self.dtype).requires_grad_(again)))

        x1, x2 = streams.chunk(2, -1)
        y1 = (x1 >> self.bits) + added(self.block, x2)
        lost = packed(x1 & (2**self.bits - 1), self.bits)
        return torch.cat([x2 + added(self.between, y1), y1], -1), lost

    def reversed(
        self, streams: Tensor, lost: Tensor, gradient: Tensor
    ) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """What this block got, from what the next one gets, with the gradients of it and of what is learned.

        Parameters
        ----------
        streams : Tensor[..., 2 * width], int64
            Of what the next block gets, as its `gradient`, which is float64.
        lost : Tensor
        """
        (y2, y1), (g2, g1) = streams.chunk(2, -1), gradient.chunk(2, -1)
        added, own, of_between = self._pulled(self.between, y1, g2, self.of_between)
        x2, g1 = y2 - added, g1 + own
        added, own, of_block = self._pulled(self.block, x2, g1, self.of_block)
        x1 = ((y1 - added) << self.bits) | unpacked(lost, x2.shape[-1], self.bits)
        pair = torch.cat([x1, x2], -1), torch.cat([g1 * 2**-self.bits, g2 + own], -1)
        return *pair, [*of_block, *of_between]

    def _pulled(
        self, addend: Addend, stream: Tensor, gradient: Tensor, learned: Sequence[nn.Parameter]
    ) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
        """What `addend` makes of a stream, and the gradients of that stream and of what is learned."""
        with torch.enable_grad():
            leaf = floating(stream, self.dtype).requires_grad_()
            y = addend(leaf)
        own, *others = torch.autograd.grad(y, (leaf, *learned), gradient.to(y.dtype), allow_unused=True)
        return fixed(y), own.to(gradient.dtype), tuple(others)


class _Passage:
    """One way of examples through all blocks.

    Attributes
    ----------
    dtype : torch.dtype
        In which blocks compute.
    given : Tensor or None
        What the last block that ran gave to the next one.
    computed : Tensor or None
        In the gradient: what the last block whose turn it was got.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.given: Tensor | None = None
        self.computed: Tensor | None = None


class _Coupled(torch.autograd.Function):
    """A coupling; streams are seen as float64 by PyTorch, which has gradients of nothing else."""

    @staticmethod
    def forward(
        ctx: Any, coupling: Coupling, passage: _Passage, first: bool, last: bool, x: Tensor, *learned: Tensor
    ) -> Tensor:
        y, lost = coupling.outputs(x.view(torch.int64), again=True)
        ctx.coupling, ctx.passage, ctx.first = coupling, passage, first
        ctx.save_for_backward(lost, *([y] if last else []))
        return y.view(torch.float64)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        passage: _Passage = ctx.passage
        lost, *held = ctx.saved_tensors
        y = held[0] if held else passage.computed
        assert y is not None  # the next block's turn was before
        x, gradient, learned = ctx.coupling.reversed(y, lost, gradients[0])
        if ctx.first:
            _require_alike(*x.chunk(2, -1))
        passage.computed = None if ctx.first else x
        return None, None, None, None, gradient if ctx.needs_input_grad[4] else None, *learned


def _nothing(y: Tensor) -> Tensor:
    """`G` of the last block, whose second stream ends there."""
    return 0 * y


def _require_alike(x1: Tensor, x2: Tensor) -> None:
    """NotReversed where the streams that the first block got, which were the same, aren't any more."""
    one, other = floating(x1, torch.float64), floating(x2, torch.float64)
    error = float((one - other).norm() / other.norm().clamp(min=2**-FRACTION))
    if not error <= TOLERANCE:
        raise NotReversed(
            f"inputs of blocks that were computed from their outputs with a relative error of {error:.1e}",
            "blocks that give the same numbers for the same inputs",
            "use deterministic kernels, or tune with another method, such as lora",
        )


class ReversibleBlocks:
    """Blocks of a model, one after the other, which run as couplings from now on.

    Parameters
    ----------
    blocks : sequence of nn.Module
    within : sequence of nn.Module
        What is learned in each block, where it already is in place.
    between : sequence of nn.Module
        `G` behind each but the last: ``[..., width]`` in and out, in the model's dtype.
    bits : int
        λ is 2**-bits; `MOST_BITS` at most.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        within: Sequence[nn.Module],
        between: Sequence[nn.Module],
        bits: int,
    ) -> None:
        self.within, self.between, self.bits = within, between, bits
        self._passage = _Passage(torch.float32)
        chosen: list[Any] = list(blocks)
        for number, block in enumerate(chosen):
            block.forward = partial(self._run, number, block.forward)

    def _run(self, number: int, own: Any, hidden_states: Tensor, *arguments: Any, **settings: Any) -> Any:
        """What stands in place of a block's `forward`."""
        first, last = number == 0, number == len(self.within) - 1
        if first:
            self._passage = _Passage(hidden_states.dtype)
            begun = fixed(hidden_states)
            hidden_states = torch.cat([begun, begun], -1).view(torch.float64)
        passage, others = self._passage, list[Any]()
        if not first and hidden_states is not passage.given:
            raise UnsupportedArchitecture(
                "a model that changes what a block gives before the next one gets it",
                "blocks that run one after the other", "tune with another method, such as lora",
            )  # fmt: skip

        def block(x: Tensor) -> Tensor:
            found = own(x, *arguments, **settings)
            others[:] = [found[1:]] if isinstance(found, tuple) else []
            states: Tensor = found[0] if others else found
            return states

        coupling = self._coupling(number, block, passage.dtype)
        if torch.is_grad_enabled():
            learned = (*coupling.of_block, *coupling.of_between)
            streams: Tensor = _Coupled.apply(coupling, passage, first, last, hidden_states, *learned)
        else:
            streams = coupling.outputs(hidden_states.view(torch.int64), again=False)[0].view(torch.float64)
        passage.given = None if last else streams
        result = _Ended.apply(streams, passage.dtype) if last else streams
        return (result, *others[0]) if others else result

    def _coupling(self, number: int, block: Addend, dtype: torch.dtype) -> Coupling:
        inner = list(self.within[number].parameters())
        if number == len(self.between):
            return Coupling(block, _nothing, self.bits, dtype, inner, [])
        between = self.between[number]
        return Coupling(block, between, self.bits, dtype, inner, list(between.parameters()))


class _Ended(torch.autograd.Function):
    """What goes on in the model behind the last block: its `y1`, in the model's dtype."""

    @staticmethod
    def forward(ctx: Any, streams: Tensor, dtype: torch.dtype) -> Tensor:
        return floating(streams.view(torch.int64).chunk(2, -1)[1], dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return torch.cat([torch.zeros_like(gradient), gradient], -1).to(torch.float64), None
