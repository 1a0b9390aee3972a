"""One step of tuning, which may be driven from outside, a pass at a time.

    step = Step(trunk, method, optimizer)
    step.begin(rows, number, steps, factor)
    while step.advance():
        ...                     # somebody else's turn
    facts = step.finish()

A pass reads rows up to a number of tokens and adds their gradients. The loss is the mean over all places of
the step from which something is learned, however the rows are cut into passes: each pass is divided by the
step's places, not by its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tailorbird.adapt.chunks import ChunkedExample
from tailorbird.adapt.fused import FusedUpdate
from tailorbird.adapt.methods.adapter import Attached
from tailorbird.adapt.optimizers.optimizer import RuleOptimizer
from tailorbird.adapt.recompute import recomputing
from tailorbird.adapt.rows import Row
from tailorbird.adapt.trunk import Trunk
from tailorbird.errors import SettingsError, TailorbirdError
from tailorbird.kernels import few_sizes


class Diverged(TailorbirdError):
    """Loss or gradients aren't finite.

    Parameters are as they were before the step, unless they are updated one by one by a norm of their own.
    """


@dataclass(frozen=True)
class StepFacts:
    """What a step did.

    Attributes
    ----------
    loss : float
        Mean over the places from which something is learned, nats, without penalties.
    places, tokens : int
        Places from which something is learned, and all tokens that were read.
    norm : float
        Of the gradient before it was clipped.
    """

    loss: float
    places: int
    tokens: int
    norm: float


class Step:
    """What a step needs; used again for each.

    Parameters
    ----------
    trunk : Trunk
    method : Attached
        In place on the trunk's model.
    optimizer : RuleOptimizer
        Over the method's parameters; each group's ``base_lr`` is its rate where the schedule says 1.
    most_tokens : int
        Of a pass; a longer example is read chunk by chunk, where that is possible.
    recomputed : sequence of nn.Module
        Blocks that are computed again for their gradients.
    clip : float or None
        Longest gradient; longer ones are scaled down to it.
    """

    def __init__(
        self,
        trunk: Trunk,
        method: Attached,
        optimizer: RuleOptimizer,
        most_tokens: int,
        clip: float | None = 1.0,
        recomputed: Sequence[nn.Module] = (),
    ) -> None:
        self.trunk, self.method, self.optimizer = trunk, method, optimizer
        self.most_tokens, self.clip, self.recomputed = most_tokens, clip, recomputed
        self.joined = trunk.packs  # rows share passes
        self.chunked = trunk.packs and not method.reversible  # longer examples are read in chunks
        self._fused: FusedUpdate | None = None
        if method.clipping is not None:
            self._fused = FusedUpdate(optimizer, method.clipping, clip)
        self._turns: Iterator[None] = iter(())
        self._number = self._places = self._tokens = 0
        self._loss = 0.0

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """What is learned now."""
        return [one for group in self.optimizer.param_groups for one in group["params"]]

    def begin(self, rows: Sequence[Row], number: int, steps: int, factor: float) -> None:
        """Begin step `number` of `steps` on these rows, at `factor` times each group's rate.

        Raises
        ------
        SettingsError
            The rows take several passes, and the method updates parameters during the only one.
        """
        self._number, self._loss = number, 0.0
        self._places = sum(row.learned for row in rows)
        self._tokens = sum(len(row) for row in rows)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        self.optimizer.zero_grad(set_to_none=True)
        found = passes(rows, self.most_tokens, self.joined, not self.method.weighs_tokens)
        if self._fused is not None:
            self._refuse_several(found)
        self.method.explore(number, lambda: held_out_loss(self.trunk, found[:1], self.most_tokens))
        self.method.before_step(number, steps)
        for parameter in self.method.forgotten():
            self.optimizer.state.pop(parameter, None)
        self._turns = self._read(found)

    def advance(self) -> bool:
        """Read the next pass or chunk and add its gradients; False where there is none left."""
        return next(self._turns, self) is None

    def _read(self, rows: Sequence[Row]) -> Iterator[None]:
        """The gradients of rows, a turn for each pass or chunk."""
        for row in rows:
            if not row.learned:
                continue
            if len(row) > self.most_tokens and len(row.lengths) == 1 and self.chunked:
                continued = not self.method.weighs_tokens
                example = ChunkedExample(self.trunk, row, self.most_tokens, continued)
                yield from example.read()
                for found in example.learn(self._share):
                    self._loss += found
                    yield
            else:
                with self.trunk.reading(row), recomputing(self.recomputed):
                    self._loss += self._learn(row)
                yield

    def _learn(self, row: Row) -> float:
        """The sum of a row's losses; its gradients are added, or used at once."""
        if self._fused is not None:
            return self._fused.learn(lambda: self._loss_and_share(row))
        loss, share = self._loss_and_share(row)
        share.backward()
        return float(loss)

    def _loss_and_share(self, row: Row) -> tuple[Tensor, Tensor]:
        loss = self.trunk.loss(row)
        return loss.detach(), self._share(loss, row)

    def _refuse_several(self, rows: Sequence[Row]) -> None:
        """SettingsError where gradients would have to be added up over passes."""
        if len(rows) > 1 or any(len(row) > self.most_tokens for row in rows):
            raise SettingsError(
                f"a step of {sum(map(len, rows))} tokens in passes of {self.most_tokens}",
                "one pass: each gradient is used and freed while the model is gone through",
                "set --batch lower (1 where examples can't share rows), or use another method",
            )

    def _share(self, loss: Tensor, row: Row) -> Tensor:
        """What a row whose losses have this sum adds to the mean, and to the method's penalty."""
        share, penalty = loss / max(self._places, 1), self.method.penalty()
        return share if penalty is None else share + penalty * (row.learned / max(self._places, 1))

    def finish(self) -> StepFacts:
        """Update what is learned.

        Raises
        ------
        Diverged
            The loss or a gradient isn't finite.
        """
        loss = self._loss / max(self._places, 1)
        norm = self._clipped(loss) if self._fused is None else self._fused.norm
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.optimizer.zero_grad(set_to_none=True)
            raise Diverged(
                f"step {self._number + 1}: the loss is {loss}, its gradient's length {norm}",
                "finite numbers",
                "set --rate lower, or look at the examples of this step",
            )
        if self._fused is None:
            self.optimizer.step()
        self.method.after_update(self._number)
        self.follow()
        self.optimizer.zero_grad(set_to_none=True)
        return StepFacts(loss, self._places, self._tokens, norm)

    def follow(self) -> None:
        """Let the optimizer take the parameters with which the method replaced others."""
        optimizer: Any = self.optimizer
        for old, (new, rows) in (self.method.resized() or {}).items():
            optimizer.replace(old, new, rows)

    def _clipped(self, loss: float) -> float:
        """The length of the gradient, which is scaled down to the longest one afterwards."""
        if math.isfinite(loss):
            self.method.after_gradients(self._number)
        found = [one for one in self.parameters if one.grad is not None]
        limit = math.inf if self.clip is None else self.clip
        return float(torch.nn.utils.clip_grad_norm_(found, limit)) if found else 0.0


def passes(rows: Sequence[Row], most_tokens: int, joined: bool = True, continued: bool = True) -> list[Row]:
    """Examples of rows put together to rows of at most `most_tokens` tokens, where no single one is longer.

    Parameters
    ----------
    rows : sequence of Row
    most_tokens : int
    joined : bool
        False leaves all rows as they are.
    continued : bool
        Continue those that are joined to one of few lengths (`few_sizes`).
    """
    found: list[list[Row]] = []
    pieces = [piece for row in rows for piece in row.cut(most_tokens)] if joined else rows
    for row in pieces:
        if joined and found and sum(map(len, found[-1])) + len(row) <= most_tokens:
            found[-1].append(row)
        else:
            found.append([row])
    together = [Row.joined(group) for group in found]
    if joined and continued:
        together = [row.continued(few_sizes.continued(len(row), most_tokens)) for row in together]
    return together


@torch.no_grad()
def held_out_loss(trunk: Trunk, rows: Sequence[Row], most_tokens: int) -> float:
    """Mean loss of rows' places in nats, nothing being learned."""
    total, places = 0.0, 0
    for row in passes(rows, most_tokens, trunk.packs):
        with trunk.reading(row):
            total += float(trunk.loss(row))
        places += row.learned
    return total / max(places, 1)
