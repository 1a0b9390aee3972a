"""Layers in order of importance: the first ones get more bits, the others fewer; nothing else is measured.

Dumitru et al. 2024, "Layer-Wise Quantization: A Pragmatic and Effective Method for Quantizing LLMs Beyond
Integer Bit-Levels" (https://arxiv.org/abs/2406.17415). A layer, here a block of the model with all of its
linears, has one of two neighbouring widths. Its importance is how far it turns what enters it, which takes
one forward pass: no gradient, no divergence, no rounding. The embedding and the head, which the paper leaves
as they are, come before all blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from tailorbird.calibrate.stream import StreamingModel
from tailorbird.errors import BudgetError
from tailorbird.evaluate.streamed import batches
from tailorbird.plan.allocate import Allocation, Group, Option, PlaceOptions, allocation_of, merge_together
from tailorbird.plan.budget import enough_size, format_size
from tailorbird.progress import Progress

#: The group size in which every width is taken, or the one nearest to it that a place offers.
GROUP = 64


@dataclass(frozen=True)
class Ranking:
    """Raises layers to the next width in order of importance, as far as the bytes go.

    Parameters
    ----------
    layers : tuple of tuple of str
        Names of the places of each layer, the most important layer first.
    """

    family: ClassVar[str] = "plan"
    kind: ClassVar[str] = "allocator"
    paper: ClassVar[str] = "Dumitru et al. 2024, arXiv:2406.17415"
    requirements: ClassVar[str] = "one forward pass"

    layers: tuple[tuple[str, ...], ...]

    def __call__(self, places: Sequence[PlaceOptions], capacity_bytes: int) -> Allocation:
        """The plan in which no layer has fewer bits than one that is less important.

        Losses of options are not looked at.

        Raises
        ------
        BudgetError
            If all layers at the fewest bits take more than the capacity.
        SettingsError
            As `allocate`.
        """
        groups = merge_together(places, tuple)
        rank = {name: index for index, layer in enumerate(self.layers) for name in layer}
        members: list[list[int]] = [[] for _ in self.layers]
        for index, group in enumerate(groups):
            members[rank[group.names[0]]].append(index)
        widths = sorted({option.coding.bits for group in groups for option in group.options})
        picks = [_at_width(group, widths[0]) for group in groups]
        if _bytes(groups, picks) > capacity_bytes:
            least = _bytes(groups, picks)
            raise BudgetError(
                f"{capacity_bytes} bytes ({format_size(capacity_bytes)}) for weights",
                f"at least {least} bytes ({format_size(least)}), which a ranking of layers takes",
                f"leave {enough_size(least)} or more for weights, or plan with --allocator exact",
            )
        for width in widths[1:]:
            for layer in members:
                raised = list(picks)
                for index in layer:
                    raised[index] = _at_width(groups[index], width)
                if _bytes(groups, raised) > capacity_bytes:
                    return allocation_of(groups, picks, places, -float("inf"))
                picks = raised
        return allocation_of(groups, picks, places, -float("inf"))


def _at_width(group: Group, width: int) -> int:
    """The option of the fewest bits from `width` on, of the most where all have fewer; of `GROUP`."""

    def distance(index: int) -> tuple[int, int, int, int]:
        option: Option = group.options[index]
        bits = option.coding.bits
        group_size = getattr(option.coding, "group_size", GROUP)
        dimension = getattr(option.coding, "dimension", 1)  # points lose less in as many bytes
        further = bits - width if bits >= width else 1000 - bits
        return (further, abs(group_size - GROUP), option.bytes, -dimension)

    return min(range(len(group.options)), key=distance)


def _bytes(groups: Sequence[Group], picks: Sequence[int]) -> int:
    return sum(group.options[pick].bytes for group, pick in zip(groups, picks, strict=True))


@torch.no_grad()
def layer_input_modification(model: StreamingModel, ids: torch.Tensor, progress: Progress) -> list[float]:
    """How far each block turns its input: the negative cosine similarity of what enters and what leaves.

    Parameters
    ----------
    model : StreamingModel
        The source.
    ids : LongTensor ``[windows, length]``
        Their hidden states are held in memory.

    Returns
    -------
    list of float
        One for each block, −1 to 1; the higher, the more important. Taken over all tokens as one vector.
    """
    ranges = batches(*ids.shape)
    hidden = [model.embed(ids[start:stop]) for start, stop in ranges]
    model.release_ends()
    scores = []
    for index in range(len(model.anatomy.blocks)):
        block = model.load_block(index)
        product = entering = leaving = 0.0
        for part, before in enumerate(hidden):
            after = model.run_block(block, index, before)
            product += float((before.double() * after.double()).sum())
            entering += float(before.double().square().sum())
            leaving += float(after.double().square().sum())
            hidden[part] = after
        lengths = (entering * leaving) ** 0.5
        scores.append(-product / lengths if lengths > 0 else 0.0)
        progress.advance()
    return scores
