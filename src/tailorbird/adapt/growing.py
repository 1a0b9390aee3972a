"""A step of tuning that watches how far the gradients of its rows are apart, for batches that grow.

Every row is a pass of its own, and the length of its gradient is taken as it is added to the others': no
second gradient is held. What follows from the lengths is `BatchGrowth`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tailorbird.adapt.methods.adapter import Attached
from tailorbird.adapt.methods.zeroth.moved import Moved
from tailorbird.adapt.optimizers.batch_growth import BatchGrowth
from tailorbird.adapt.optimizers.optimizer import RuleOptimizer
from tailorbird.adapt.optimizers.rule import Rule
from tailorbird.adapt.rows import Row
from tailorbird.adapt.step import Step, StepFacts
from tailorbird.adapt.trunk import Trunk
from tailorbird.errors import SettingsError


def check_growing(rule: Rule, method: Attached, name: str) -> None:
    """Refuse batches that grow where gradients of single rows aren't there.

    Parameters
    ----------
    rule : Rule
    method : Attached
    name : str
        Of the method.

    Raises
    ------
    SettingsError
        The method has no gradients or one pass for all rows, or the optimizer's steps are of another kind.
    """
    if isinstance(method, Moved) or method.clipping is not None:
        raise SettingsError(
            f"a batch that grows for `{name}`",
            "a method that adds up the gradients of rows, which tell how sure they are",
            "leave out --grow-batch, or use another method",
        )
    if rule.sampling is not None:
        raise SettingsError(
            f"a batch that grows with optimizer `{rule.name}`",
            "an optimizer that reads each row once",
            "leave out --grow-batch, or choose another --optimizer",
        )


class GrowingStep(Step):
    """What such a step needs; used again for each. Parameters beside those of `Step`:

    Parameters
    ----------
    growth : BatchGrowth
        Is told of each step that was finished.
    """

    def __init__(
        self,
        trunk: Trunk,
        method: Attached,
        optimizer: RuleOptimizer,
        most_tokens: int,
        growth: BatchGrowth,
        clip: float | None = 1.0,
        recomputed: Sequence[nn.Module] = (),
    ) -> None:
        super().__init__(trunk, method, optimizer, most_tokens, clip, recomputed)
        self.growth, self.joined = growth, False
        self._rows = 0
        self._learned: list[int] = []
        self._squares: list[float] = []

    def begin(self, rows: Sequence[Row], number: int, steps: int, factor: float) -> None:
        """As of `Step`.

        Raises
        ------
        SettingsError
            An example is longer than a pass.
        """
        longest = max((len(row) for row in rows if len(row.lengths) == 1), default=0)
        if longest > self.most_tokens:
            raise SettingsError(
                f"an example of {longest} tokens in passes of {self.most_tokens}, and a batch that grows",
                "examples in one pass, so that their gradients can be told apart",
                "set longer passes, or --length lower",
            )
        self._rows, self._learned, self._squares = len(rows), [], []
        super().begin(rows, number, steps, factor)

    def _learn(self, row: Row) -> float:
        """As of `Step`; the length of the row's gradient is remembered."""
        self._learned.append(row.learned)
        with self._measured():
            return super()._learn(row)

    @contextmanager
    def _measured(self) -> Iterator[None]:
        """Sum the squares of gradients on their way to the parameters."""
        found: list[float] = []

        def take(gradient: Tensor) -> None:
            found.append(_square(gradient))

        hooks = [one.register_hook(take) for one in self.parameters if one.requires_grad]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        self._squares.append(sum(found))

    def finish(self) -> StepFacts:
        """As of `Step`."""
        square = sum(_square(one.grad) for one in self.parameters if one.grad is not None)
        facts = super().finish()
        self.growth.observe(self._rows, self._learned, self._squares, square)
        return facts


def _square(values: Tensor) -> float:
    """Sum of squares."""
    return float(torch.linalg.vector_norm(values.detach(), dtype=torch.float32)) ** 2
