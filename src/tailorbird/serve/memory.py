"""How the memory of an engine is split: weights, and pages for keys, values and adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tailorbird.errors import BudgetError
from tailorbird.hardware.memory import available_bytes
from tailorbird.serve.interface import EngineOptions

#: Where no budget is stated: the share of the available memory for pages, and tokens of a sequence.
SHARE_OF_MEMORY, USUAL_TOKENS = 0.25, 2048
#: Bytes for adapters beyond what all texts could ever fill, at most; and the share of the pages that they may
#: take even if that shortens the longest text.
ADAPTER_BYTES, SHARE_OF_ADAPTERS = 2 << 30, 0.25


@dataclass(frozen=True)
class Needs:
    """What an engine needs memory for.

    Attributes
    ----------
    weight_bytes : int
        Of the model, and of what guesses.
    page_bytes, page_tokens : int
        Of a page, with what guessers keep beside it.
    context : int
        Most tokens of a text.
    adaptable : bool
        Whether there can be adapters.
    """

    weight_bytes: int
    page_bytes: int
    page_tokens: int
    context: int
    adaptable: bool


def weight_bytes(model: Any) -> int:
    """Bytes of all tensors that a model stores, those that share memory counted once."""
    found: dict[int, int] = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                found[tensor.data_ptr()] = tensor.nbytes
    return sum(found.values())


def page_count(options: EngineOptions, needs: Needs) -> int:
    """How many pages the budget holds; BudgetError where one sequence of the least use doesn't fit."""
    size, tokens = needs.page_bytes, needs.page_tokens
    of_sequence = -(-needs.context // tokens)
    of_adapters = ADAPTER_BYTES // size if needs.adaptable else 0
    if options.memory_bytes is None:
        usual = -(-min(needs.context, USUAL_TOKENS) // tokens) * options.max_sequences
        affordable = int(available_bytes() * SHARE_OF_MEMORY) // size
        return max(of_sequence, min(usual, affordable)) + min(of_adapters, affordable)
    weights = needs.weight_bytes
    pages = (options.memory_bytes - weights) // size
    if pages < 2:
        raise BudgetError(
            f"{options.memory_bytes:,} bytes of memory",
            f"at least {weights + 2 * size:,}: {weights:,} of weights, and {2 * size:,} for a text of "
            f"{2 * tokens} tokens",
            "allow more memory, or compress the model (`tailorbird fit`)",
        )
    return min(pages, of_sequence * options.max_sequences + of_adapters)


def longest_text(options: EngineOptions, needs: Needs, pages: int) -> int:
    """Tokens that a text may have, for which there is room among `pages` whatever adapters are in use."""
    expected = bool(options.adapters) or options.adapter_directory is not None
    of_adapters = int(pages * SHARE_OF_ADAPTERS) if expected else 0
    return min(needs.context, (pages - of_adapters) * needs.page_tokens)
