"""What every start is given, and what it does: first factors for the low-rank additions of a packed model.

LoRA begins as nothing, which on a packed model is the packed model with all that quantization lost. A start
gives its factors other first values, so that the packed weights `Q` and the factors together come closer to
the source's weights `W`. `Q` stays as it is stored: the papers' own quantizers, which round anew what the
factors leave, or learn ranges for it, have no part in this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from tailorbird.adapt.methods.adapter import Attached, Place
from tailorbird.adapt.methods.low_rank import LowRank
from tailorbird.adapt.rows import Row
from tailorbird.adapt.starts.source import Source
from tailorbird.adapt.trunk import Trunk
from tailorbird.errors import SettingsError
from tailorbird.linear.low_rank import Factors

#: methods whose additions are plain products, which a start can set
WORKS_WITH = ("lora", "rslora", "lora-pro", "allora")
#: components shorter than this, relative to the longest, are nothing
NOTHING = 1e-6


@dataclass(frozen=True, eq=False)
class Given:
    """A packed model under tuning, and its source.

    Attributes
    ----------
    trunk : Trunk
        Its linears run with the additions.
    blocks : sequence of nn.Module
        Of the trunk's model, in order.
    places : mapping of str to Place
        Linears that have an addition, by path.
    additions : mapping of str to LowRank
        Of the same paths, as LoRA begins.
    source : Source
    steps : sequence of sequences of Row
        What the first steps of the tuning read.
    """

    trunk: Trunk
    blocks: Sequence[nn.Module]
    places: Mapping[str, Place]
    additions: Mapping[str, LowRank]
    source: Source
    steps: Sequence[Sequence[Row]]

    @property
    def rows(self) -> list[Row]:
        """Of all steps."""
        return [row for step in self.steps for row in step]

    def lost(self, path: str) -> Tensor:
        """``W - Q`` of a linear: float32 ``[out_features, in_features]``."""
        return self.source.weight(path) - self.places[path].weight()


class Start(Protocol):
    """A way to begin: settings, and a call that changes the additions of what it is given.

    The same for the same given, bit for bit; nothing but the additions' values is changed.

    Attributes
    ----------
    name : str
    family, kind : str
        ``start``; what the factors make least, in a few words.
    paper : str
        Authors, year and number.
    needs : str
        What it reads beside the weights of model and source.
    """

    name: ClassVar[str]
    family: ClassVar[str]
    kind: ClassVar[str]
    paper: ClassVar[str]
    needs: ClassVar[str]

    def __call__(self, given: Given) -> None: ...


def products(method: Attached) -> dict[str, LowRank]:
    """The additions of a method by the paths of their linears.

    Raises
    ------
    SettingsError
        They aren't plain products of low rank, or learn without gradients.
    """
    found = {path.replace("/", "."): one for path, one in method.additions.items()}
    plain = {path: one for path, one in found.items() if type(one) is LowRank and one.up.requires_grad}
    if not plain or len(plain) != len(found):
        raise SettingsError(
            "a start for a method whose additions aren't plain products of two matrices",
            "one of " + ", ".join(f"`{name}`" for name in WORKS_WITH),
            "choose another --method, or leave out --init",
        )
    return plain


@torch.no_grad()
def set_factors(addition: LowRank, factors: Factors) -> None:
    """Let an addition begin as a product.

    Components that are nothing begin as LoRA does: with both sides at zero they could never learn.
    """
    root = addition.scaling**0.5
    lengths = factors.down.norm(dim=1)
    there = lengths > NOTHING * lengths.max()
    addition.up.copy_(torch.where(there, factors.up, 0.0) / root)
    addition.down.copy_(torch.where(there[:, None], factors.down / root, addition.down))
