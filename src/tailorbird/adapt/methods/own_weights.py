"""A model's own weights as what is learned: which there are, and what the methods share that change them.

Nothing is added to a linear, its weight itself moves, so that the result is a checkpoint
(`adapt/whole.py`). The parameters stay the model's; in an `OwnWeights` they are by their names in the
model, dots replaced by ``/``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tailorbird.adapt.methods.adapter import Attached, Place
from tailorbird.adapt.optimizers.adamw import AdamW
from tailorbird.errors import SettingsError
from tailorbird.formats.modules import CompressedEmbedding, CompressedLinear

#: Where none is chosen: a trained weight takes smaller steps than an adapter, which begins at nothing.
RATE = 1e-5

Named = dict[str, nn.Parameter]


@dataclass(frozen=True)
class Parts:
    """Parameters of a model by their names, each once.

    Attributes
    ----------
    linears : list of dict
        By block: weights and biases of the chosen linears; blocks without any are left out.
    norms : list of dict
        Of the same blocks.
    last_norm : dict
        What lies outside the blocks and isn't a matrix.
    ends : dict
        Embeddings and head.
    """

    linears: list[Named]
    norms: list[Named]
    last_norm: Named
    ends: Named

    def blocks(self) -> list[Named]:
        """Linears and norms, by block."""
        return [linears | norms for linears, norms in zip(self.linears, self.norms, strict=True)]


def parts_of(model: nn.Module, places: Mapping[str, Place]) -> Parts:
    """A model's parameters, those of the linears of its blocks only at `places`.

    Raises
    ------
    SettingsError
        The model is packed.
    """
    for path, module in model.named_modules():
        if isinstance(module, (CompressedLinear, CompressedEmbedding)):
            raise SettingsError(
                f"a model whose `{path}` is packed, for a method that changes the weights themselves",
                "a dense model",
                "tune an adapter on it (such as --method lora), or tune the source and fit the result",
            )
    prefixes = {block_path(place): place.block for place in places.values()}
    stacks = {prefix.rpartition(".")[0] + "." for prefix in prefixes}
    order = sorted(set(prefixes.values()))
    linears: dict[int, Named] = {block: {} for block in order}
    norms: dict[int, Named] = {block: {} for block in order}
    last_norm: Named = {}
    ends: Named = {}
    seen: set[nn.Parameter] = set()
    for path, module in model.named_modules():
        own = {
            f"{path}.{name}": parameter
            for name, parameter in module.named_parameters(recurse=False)
            if parameter not in seen
        }
        seen |= set(own.values())
        is_norm = all(parameter.ndim < 2 for parameter in own.values())
        block = next((number for prefix, number in prefixes.items() if path.startswith(prefix + ".")), None)
        if path in places:
            linears[places[path].block] |= own
        elif block is not None:
            norms[block] |= own if is_norm else {}
        elif not any(path.startswith(stack) for stack in stacks):
            (last_norm if is_norm else ends).update(own)
    return Parts([linears[one] for one in order], [norms[one] for one in order], last_norm, ends)


def block_path(place: Place) -> str:
    """The path of the block that a linear belongs to: up to its number."""
    steps = place.path.split(".")
    return ".".join(steps[: steps.index(str(place.block)) + 1])


@dataclass(frozen=True)
class Choice:
    """Which blocks learn when.

    Attributes
    ----------
    period : int
        Steps between two choices.
    most : int
        Blocks that learn at once.
    blocks : callable
        Those of a period, by its number.
    afresh : bool
        Whether a block that is chosen again begins without the optimizer's states, too.
    """

    period: int
    most: int
    blocks: Callable[[int], Iterable[int]]
    afresh: bool


class OwnWeights(Attached):
    """Parameters of a model that are learned, all the time or a few blocks at a time.

    What doesn't learn at a step has no gradient, and what is left, no states.

    Parameters
    ----------
    always : mapping of str to nn.Parameter
        By their names in the model.
    blocks : sequence of mapping
        Of which `choice` says when they learn.
    choice : Choice, optional
    """

    def __init__(
        self, always: Mapping[str, nn.Parameter], blocks: Sequence[Named] = (), choice: Choice | None = None
    ) -> None:
        super().__init__()
        self.rule = AdamW(lr=RATE, weight_decay=0.0)
        self.choice = choice
        for name, parameter in [*always.items(), *(pair for block in blocks for pair in block.items())]:
            parameter.requires_grad_(True)
            self.register_parameter(name.replace(".", "/"), parameter)
        self._always, self._blocks = list(always.values()), [list(block.values()) for block in blocks]
        self._forgotten: list[nn.Parameter] = []

    def learned(self) -> list[nn.Parameter]:
        return list(self.parameters())

    def learned_at_once(self) -> list[nn.Parameter]:
        if self.choice is None:
            return self.learned()
        by_size = sorted(self._blocks, key=lambda block: -sum(one.numel() for one in block))
        return [*self._always, *(one for block in by_size[: self.choice.most] for one in block)]

    def changed(self) -> dict[str, nn.Parameter]:
        return {name.replace("/", "."): parameter for name, parameter in self.named_parameters()}

    def before_step(self, step: int, steps: int) -> None:
        if self.choice is None:
            return
        period, since = divmod(step, self.choice.period)
        chosen = set(self.choice.blocks(period))
        self._let_learn(chosen)
        if since == 0:
            left = [
                block
                for number, block in enumerate(self._blocks)
                if self.choice.afresh or number not in chosen
            ]
            self._forgotten = [one for block in left for one in block]

    def before_trial(self) -> None:
        if self.choice is not None:  # gradients have to go through all blocks after the first one
            self._let_learn(set(range(self.choice.most)))

    def forgotten(self) -> list[nn.Parameter]:
        found, self._forgotten = self._forgotten, []
        return found

    def _let_learn(self, chosen: set[int]) -> None:
        for number, block in enumerate(self._blocks):
            for parameter in block:
                parameter.requires_grad_(number in chosen)


def seed_from(generator: torch.Generator) -> int:
    """A seed for choices that depend on a step's number alone, the same for a job that goes on."""
    return int(torch.randint(1 << 62, (), generator=generator))


def merged(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Several mappings in one."""
    return {name: one for part in parts for name, one in part.items()}
