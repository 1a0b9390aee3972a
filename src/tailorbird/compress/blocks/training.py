"""Learns the weights of one block, or of a window of blocks, so that outputs come near the source's.

The block reads what the compressed blocks before it give, and aims at what the source's block makes of its
own inputs. The loss is the method's, over the windows of an update; rates fall to zero in equal steps.
Afterwards all calibration windows are read with the weights as they were and as they are now, and what
differs less from the source, by squares, is kept: no block ends farther from it than it began.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tailorbird.calibrate.activations import ActivationFile
from tailorbird.compress.blocks.method import BlockMethod, LearnedWeight
from tailorbird.plan.predict import narrow_products

#: Runs the blocks on hidden states ``[windows, length, hidden_size]``.
Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Learned:
    """What training did.

    Attributes
    ----------
    before, after : float
        Squared difference to the source's outputs over their squared length, on all calibration windows.
    """

    before: float
    after: float

    @property
    def better(self) -> bool:
        """Whether what was learned is nearer to the source."""
        return self.after < self.before


def learn(
    method: BlockMethod,
    modules: Mapping[str, nn.Module],
    weights: Mapping[str, LearnedWeight],
    run: Run,
    inputs: ActivationFile,
    targets: ActivationFile,
    seed: int,
    batches: Sequence[tuple[int, int]],
) -> Learned:
    """Learn the weights of some modules of the blocks; the modules themselves stay as they are.

    Parameters
    ----------
    method : BlockMethod
    modules : mapping of str to nn.Module
        Linears of the blocks by name, each holding the weight that it has so far.
    weights : mapping of str to LearnedWeight
        By the same names; changed in place.
    run : callable
        All blocks, one after the other, with gradients.
    inputs, targets : ActivationFile
        What enters the first block, and what leaves the last one of the source.
    seed : int
        Of the order of windows.
    batches : sequence of (int, int)
        Ranges of windows in which all of them are read.
    """

    def difference() -> float:
        return _difference(run, inputs, targets, batches)

    with reading(modules, {name: weight.began_with for name, weight in weights.items()}):
        before = difference()
    own = [weight.own for weight in weights.values()]
    optimizer = method.optimizer(own)
    rates = [group["lr"] for group in optimizer.param_groups]
    order = windows_of_updates(inputs.windows, method.batch, seed)
    for step in range(method.steps):
        windows = next(order)
        x, y = (torch.cat([file.read(w, w + 1) for w in windows]) for file in (inputs, targets))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - step / method.steps)
        with torch.enable_grad(), products(), replaced(modules, weights):
            outputs = run(x).float()
        with torch.enable_grad():
            loss = method.loss(outputs, y, own, step / method.steps)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for weight in weights.values():
            weight.limit()
    for weight in weights.values():
        weight.settle()
    with replaced(modules, weights):
        return Learned(before, difference())


@contextmanager
def replaced(modules: Mapping[str, nn.Module], weights: Mapping[str, LearnedWeight]) -> Iterator[None]:
    """Let modules compute with learned weights, through which gradients go; undone afterwards."""
    own: dict[str, nn.Parameter] = {}
    try:
        for name, module in modules.items():
            weight = weights[name]()
            own[name] = module._parameters.pop("weight")  # type: ignore[assignment]
            module.__dict__["weight"] = weight if isinstance(module, nn.Linear) else weight.t()
        with reading(modules, {name: weight.reads for name, weight in weights.items()}):
            yield
    finally:
        for name, parameter in own.items():
            modules[name].__dict__.pop("weight", None)
            modules[name]._parameters["weight"] = parameter


@contextmanager
def reading(
    modules: Mapping[str, nn.Module], changes: Mapping[str, Callable[[Tensor], Tensor] | None]
) -> Iterator[None]:
    """Let modules read what `changes`, where there are any, make of their inputs; undone afterwards."""
    with ExitStack() as undone:
        for name, change in changes.items():
            if change is not None:
                undone.enter_context(_reading(modules[name], change))
        yield


@contextmanager
def _reading(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    handle = module.register_forward_pre_hook(lambda _, given: (change(given[0]), *given[1:]))
    try:
        yield
    finally:
        handle.remove()


def products() -> torch.autocast:
    """Products of matrices in bfloat16 where the processor has instructions for them, while learning."""
    return torch.autocast("cpu", torch.bfloat16, enabled=narrow_products())


@torch.no_grad()
def _difference(
    run: Run, inputs: ActivationFile, targets: ActivationFile, batches: Sequence[tuple[int, int]]
) -> float:
    """Squared difference to the targets over their squared length."""
    error = energy = 0.0
    for start, stop in batches:
        y = targets.read(start, stop)
        error += float((run(inputs.read(start, stop)) - y).square_().sum(dtype=torch.float64))
        energy += float(y.square_().sum(dtype=torch.float64))
    return error / max(energy, 1e-300)


def windows_of_updates(count: int, batch: int, seed: int) -> Iterator[list[int]]:
    """Numbers of windows for one update after the other: all of them in random order, again and again."""
    generator = torch.Generator().manual_seed(seed)
    left: list[int] = []
    while True:
        while len(left) < min(batch, count):
            left += torch.randperm(count, generator=generator).tolist()
        yield left[: min(batch, count)]
        left = left[min(batch, count) :]
