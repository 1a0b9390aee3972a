"""AdamW with averages of 8 bits."""

from __future__ import annotations

import torch
from torch import nn

from tailorbird.adapt.optimizers.adamw import AdamW
from tailorbird.adapt.optimizers.adamw8bit import AdamW8bit


def test_steps_stay_near_those_of_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(96, 64, generator=generator)
    exact, coarse = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizers = [
        AdamW(lr=1e-2).build([{"params": [exact]}]),
        AdamW8bit(lr=1e-2).build([{"params": [coarse]}]),
    ]
    assert optimizers[1].rule.layout((96, 64)).keys() >= {"momentum_codes"}
    for _ in range(50):
        noise = 0.3 * torch.randn(96, 64, generator=generator)
        for parameter, optimizer in zip((exact, coarse), optimizers, strict=True):
            parameter.grad = parameter.detach() + noise
            optimizer.step()
    moved = (exact.detach() - start).norm()
    assert float((exact.detach() - coarse.detach()).norm() / moved) < 0.03


def test_weights_whose_gradients_nearly_vanish_are_not_thrown_away() -> None:
    """Beside a large neighbour the square of a small gradient is below every level."""
    parameter = nn.Parameter(torch.zeros(256))
    optimizer = AdamW8bit(lr=1e-3, smallest=0).build([{"params": [parameter]}])
    for step in range(30):
        parameter.grad = torch.full((256,), 4e-4 if step < 5 else 0.0)
        parameter.grad[0] = 1.0
        optimizer.step()
    assert parameter.abs().max() < 0.05
