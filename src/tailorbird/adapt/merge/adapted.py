"""A checkpoint with an adapter beside its linears, one block in memory at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from tailorbird.adapt.merge.change import Change, Changes
from tailorbird.calibrate.stream import StreamingModel, weight_in
from tailorbird.model.anatomy import Anatomy
from tailorbird.model.checkpoint import Checkpoint


class AdaptedModel(StreamingModel):
    """`StreamingModel` whose linears add what changes make of their inputs.

    Parameters
    ----------
    checkpoint : Checkpoint
    anatomy : Anatomy
        Of that checkpoint.
    changes : Changes
        What is added.
    """

    def __init__(self, checkpoint: Checkpoint, anatomy: Anatomy, changes: Changes) -> None:
        super().__init__(checkpoint, anatomy)
        self.changes = changes

    def load_block(self, index: int) -> nn.Module:
        """As `StreamingModel.load_block`, with what the adapter has for the block."""
        block = super().load_block(index)
        for place in self.anatomy.blocks[index].linears:
            change = self.changes.change(place.name)
            if change is not None:
                self.module_of(block, place.name).register_forward_hook(_adds(change))
        return block


def _adds(change: Change) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    def add(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        bias: Any = module.bias
        return output + change.output(inputs[0], lambda: weight_in(module), bias)

    return add
