"""VeRA (https://arxiv.org/abs/2310.11454): two random projections for all linears, two vectors for each.

    y = W x + b ⊙ (B (d ⊙ (A x))) + bias

A and B are as large as the largest adapted linear needs, and others use their first columns and rows. They
are in the file, or made again from the key of PEFT's random numbers.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from tailorbird.kernels.adapters import LinearAdapter
from tailorbird.run.parts import PlacedLinear, linear_shape
from tailorbird.serve.adapters.source import Shapes, Source

_SHARED = ("base_model.vera_A", "base_model.vera_B")


class Vera:
    """An adapter of type ``VERA``; parameters, attributes and errors as of `lora.Lora`."""

    settings: ClassVar[frozenset[str]] = frozenset(
        {"r", "projection_prng_key", "save_projection", "vera_dropout", "d_initial", "init_weights"}
    )

    def __init__(self, source: Source) -> None:
        self.source = source
        self._rank = source.whole("r", 1)

        def expected(path: str, linear: PlacedLinear) -> Shapes:
            return {"vera_lambda_b": (linear_shape(linear.module)[0],), "vera_lambda_d": (self._rank,)}

        self.adapted = source.check(expected, _SHARED)
        sizes = [linear_shape(linear.module) for linear in self.adapted.values()]
        rows, columns = max(rows for rows, _ in sizes), max(columns for _, columns in sizes)
        self._largest = rows, columns
        self._stored = any(name in source.weights for name in _SHARED) or source.flag("save_projection")
        if self._stored:
            source.refuse(
                source.problems(dict(zip(_SHARED, ((self._rank, columns), (rows, self._rank)), strict=True)))
            )
        else:
            source.whole("projection_prng_key", 0)
        self._shared: tuple[Tensor, Tensor] | None = None
        self._downs: dict[int, Tensor] = {}

    def linear(self, path: str) -> LinearAdapter:
        """What it makes of the linear at `path`; those with equally many inputs share `down`."""
        out_features, in_features = linear_shape(self.adapted[path].module)
        if self._shared is None:
            self._shared = self._projections()
        down, up = self._shared
        if in_features not in self._downs:
            self._downs[in_features] = down[:, :in_features].contiguous()
        b, d = (self.source.read(path, f"vera_lambda_{name}", torch.float32) for name in "bd")
        bias = self.source.bias(path) if path in self.source.stored_biases else None
        return LinearAdapter(self._downs[in_features], b[:, None] * up[:out_features] * d, bias=bias)

    def _projections(self) -> tuple[Tensor, Tensor]:
        if not self._stored:
            key = self.source.whole("projection_prng_key", 0)
            return projections(*self._largest, self._rank, key)
        down, up = (self.source.read_named(name) for name in _SHARED)
        return down, up


def projections(out_features: int, in_features: int, rank: int, key: int) -> tuple[Tensor, Tensor]:
    """A and B as PEFT draws them: uniform, with the variance of Kaiming's initialization.

    The same on any machine as long as PyTorch's generator is (https://arxiv.org/abs/1502.01852 for the
    bound, sqrt(6 / inputs)).

    Parameters
    ----------
    out_features, in_features : int
        Of the largest adapted linears.
    rank, key : int

    Returns
    -------
    Tensor[rank, in_features], Tensor[out_features, rank], float32
    """
    generator = torch.Generator(device="cpu").manual_seed(key)

    def drawn(rows: int, columns: int) -> Tensor:
        bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(columns))  # rounded as PEFT rounds it
        return torch.empty(rows, columns, device="cpu").uniform_(-bound, bound, generator=generator)

    return drawn(rank, in_features), drawn(out_features, rank)
