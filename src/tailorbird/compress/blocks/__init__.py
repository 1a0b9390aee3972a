"""The block methods by name: each learns the weights of one block, or of several, after a linear method."""

from tailorbird.compress.blocks.cbq import Cbq
from tailorbird.compress.blocks.efficientqat import EfficientQat
from tailorbird.compress.blocks.flatquant import FlatQuant
from tailorbird.compress.blocks.flexround import FlexRound
from tailorbird.compress.blocks.omniquant import OmniQuant
from tailorbird.compress.blocks.signround import SignRound

BLOCK_METHODS: dict[
    str,
    type[Cbq] | type[EfficientQat] | type[FlatQuant] | type[FlexRound] | type[OmniQuant] | type[SignRound],
] = {
    "cbq": Cbq, "efficientqat": EfficientQat, "flatquant": FlatQuant, "flexround": FlexRound,
    "omniquant": OmniQuant, "signround": SignRound,
}  # fmt: skip
