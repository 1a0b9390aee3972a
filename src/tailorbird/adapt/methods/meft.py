"""MEFT: adapters that make the blocks reversible, so that none keeps anything for its gradient.

Liao et al. 2023, "Make Pre-trained Model Reversible: From Parameter to Memory Efficient Fine-Tuning"
(arXiv:2306.00477): the form that the paper calls MEFT1. Two streams begin as what the first block reads, and
block `F` is followed by an adapter `G`:

    y1 = λ x1 + F(x2)        y2 = x2 + G(y1)        (x1, x2) of the next block: (y2, y1)

An adapter is ``W_up silu(W_down x + b_down) + b_up`` with both matrices normal of deviation 0.02 and biases
at zero. Each block has another one beside its feed-forward layer: it reads what that reads, and adds to what
that puts out. Where λ is 0 and the adapters are nothing, `y1` is what the model's own block gives; a small λ
begins near the model. `y1` of the last block is what goes on: the authors' sum of both streams, of weight 0.

`adapt/reversible.py` computes the inputs. The authors take λ = 0.1 and streams of the model's dtype; with the
integers of that file a smaller one may be taken, which begins nearer to the model. MEFT2, which has the
adapter before the block, is this chain with one adapter more before its first block. MEFT3, whose `F` and `G`
are the halves of a block, isn't here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from tailorbird.adapt.methods.adapter import OWN_TYPE, Attached, Place
from tailorbird.adapt.methods.checks import require
from tailorbird.adapt.methods.own_weights import block_path
from tailorbird.adapt.optimizers.adamw import AdamW
from tailorbird.adapt.reversible import MOST_BITS, ReversibleBlocks
from tailorbird.errors import SettingsError

#: deviation of the adapters' matrices at the start
DEVIATION = 0.02
#: learning rate where none is given: both matrices begin small, so that what they add moves slowly at first
RATE = 5e-3
#: roles of linears that read what the feed-forward layer reads, and of those that put out what it does
READS, PUTS_OUT = frozenset({"gate", "up", "gate_up", "fc1"}), frozenset({"down", "fc2"})


class Bottleneck(nn.Module):
    """``up silu(down x + down_bias) + up_bias`` in the dtype of `x`; parameters are float32.

    Attributes
    ----------
    down : Parameter[rank, width]
    down_bias : Parameter[rank]
    up : Parameter[width, rank]
    up_bias : Parameter[width]
    """

    def __init__(self, width: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, width).normal_(0, DEVIATION, generator=generator))
        self.down_bias = nn.Parameter(torch.zeros(rank))
        self.up = nn.Parameter(torch.empty(width, rank).normal_(0, DEVIATION, generator=generator))
        self.up_bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., width]`` to ``[..., width]``."""
        inner = functional.silu(functional.linear(x, self.down.to(x.dtype), self.down_bias.to(x.dtype)))
        return functional.linear(inner, self.up.to(x.dtype), self.up_bias.to(x.dtype))


class AttachedMeft(Attached):
    """MEFT on a model.

    Attributes
    ----------
    within : nn.ModuleList
        A `Bottleneck` beside the feed-forward layer of each block.
    between : nn.ModuleList
        A `Bottleneck` behind each block but the last.
    """

    reversible = True

    def __init__(self, blocks: int, width: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.rule = AdamW(lr=RATE)
        self.within = nn.ModuleList(Bottleneck(width, rank, generator) for _ in range(blocks))
        self.between = nn.ModuleList(Bottleneck(width, rank, generator) for _ in range(blocks - 1))

    def files(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        return tensors, {"peft_type": OWN_TYPE, "task_type": "CAUSAL_LM"}


@dataclass(frozen=True)
class Meft:
    """MEFT.

    Parameters
    ----------
    rank : int
        Of each adapter: the width of its inner layer.
    bits : int
        λ is 2**-bits; up to 4 bits take half a byte for each number that a block gets, up to 8 one.
    blocks : int
        The last ones, which learn and are reversible; 0 for all. Those before run as they are.
    """

    name: ClassVar[str] = "meft"
    family: ClassVar[str] = "adapter"
    kind: ClassVar[str] = "adapters that make blocks reversible"
    paper: ClassVar[str] = "Liao et al. 2023, arXiv:2306.00477"
    needs: ClassVar[str] = "nothing; begins near the model's own function; doesn't merge"

    rank: int = 64
    bits: int = 8
    blocks: int = 0

    def __post_init__(self) -> None:
        require(self.rank >= 1, self.name, "rank", self.rank, "at least 1")
        require(1 <= self.bits <= MOST_BITS, self.name, "bits", self.bits, f"1 to {MOST_BITS}")
        require(self.blocks >= 0, self.name, "blocks", self.blocks, "0 or more")

    def attach_to(
        self, model: nn.Module, places: Mapping[str, Place], generator: torch.Generator
    ) -> Attached:
        """`2 * (2 * width * rank + rank + width)` learned numbers per block, half of that in the last."""
        found = _feed_forward(model, places)
        if self.blocks > len(found):
            raise SettingsError(
                f"blocks {self.blocks} of {self.name} for a model of {len(found)}",
                f"{len(found)} at most, or 0 for all", "lower it",
            )  # fmt: skip
        pairs = found[-self.blocks :]
        attached = AttachedMeft(len(pairs), pairs[0][1].out_features, self.rank, generator)
        for adapter, (reads, puts_out) in zip(attached.within, pairs, strict=True):
            _put_beside(adapter, reads.module, puts_out.module)
        blocks = [model.get_submodule(block_path(reads)) for reads, _ in pairs]
        ReversibleBlocks(blocks, list(attached.within), list(attached.between), self.bits)
        return attached


def _feed_forward(model: Any, places: Mapping[str, Place]) -> list[tuple[Place, Place]]:
    """Of each block a linear that reads what its feed-forward layer reads, and the one that puts out.

    Raises
    ------
    SettingsError
        Those of some block aren't among the linears.
    """
    first: dict[int, Place] = {}
    last: dict[int, Place] = {}
    for place in places.values():
        if place.role in READS:
            first.setdefault(place.block, place)
        elif place.role in PUTS_OUT:
            last[place.block] = place
    every = range(model.config.get_text_config(decoder=True).num_hidden_layers)
    if not all(number in first and number in last for number in every):
        raise SettingsError(
            "targets without the feed-forward layers of all blocks for meft, which adapts whole blocks",
            "all linears", "leave out --targets, or choose another --method",
        )  # fmt: skip
    return [(first[number], last[number]) for number in every]


def _put_beside(adapter: nn.Module, reads: nn.Module, puts_out: nn.Module) -> None:
    """Let what `puts_out` gives gain what the adapter makes of what `reads` gets."""
    read: list[Tensor] = []

    def keep(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        read[:] = given[:1]

    def add(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        added: Tensor = adapter(read.pop())
        return output + added

    reads.register_forward_pre_hook(keep)
    puts_out.register_forward_hook(add)
