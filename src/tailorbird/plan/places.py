"""Where a model is rounded, and where it is measured: its places, and the uses of its weights."""

from __future__ import annotations

from dataclasses import dataclass

from tailorbird.model.anatomy import Anatomy


@dataclass(frozen=True)
class Place:
    """A weight that can be rounded, or one use of it.

    Attributes
    ----------
    name : str
        Module path.
    block : int
        Index of its block; -1 for the embedding, the number of blocks for the head.
    """

    name: str
    block: int


def places_of(anatomy: Anatomy) -> list[Place]:
    """Every place of the model in forward order; a tied pair is one, named and placed as the embedding."""
    uses = uses_of(anatomy)
    return uses[:-1] if anatomy.tied else uses


def uses_of(anatomy: Anatomy) -> list[Place]:
    """Every use of a weight in forward order: the places, and the head apart where it is tied.

    What an error of a tied weight costs is the sum of what it costs where tokens are embedded and where
    the head reads it.
    """
    linears = [Place(linear.name, block.index) for block in anatomy.blocks for linear in block.linears]
    return [Place(anatomy.embedding, -1), *linears, Place(anatomy.head, len(anatomy.blocks))]
