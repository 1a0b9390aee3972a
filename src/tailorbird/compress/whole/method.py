"""What a model method is to the pipeline: a block method whose weights are those of all blocks."""

from __future__ import annotations

from typing import ClassVar, Protocol

from tailorbird.compress.blocks.method import LearningMethod


class ModelMethod(LearningMethod, Protocol):
    """What every model method offers; the gradients that it is given are those of the divergence.

    Attributes
    ----------
    bytes_per_weight : int
        Memory for each weight beside the weight that the model computes with and its gradient: what is
        learned, and the optimizer's states.
    """

    bytes_per_weight: ClassVar[int]
