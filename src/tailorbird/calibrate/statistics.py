"""What calibration leaves per linear: second moments and magnitudes of its inputs.

Sums are taken over chunks of a fixed number of tokens, in the order in which tokens arrive, so that the
result has the same bits however the tokens were cut into batches, and memory doesn't grow with their
number. Running a model to obtain the inputs is not done here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tailorbird.errors import TextError

#: tokens whose outer products are added in one matrix product
CHUNK_TOKENS = 512
#: columns of the Gram matrix summed in one product; what lies above their diagonal is mirrored at the end
PANEL = 512


@dataclass(frozen=True, eq=False)
class HessianSketch:
    """The Hessian of the model's KL by one weight, as the Kronecker product of two factors.

    Parameters
    ----------
    inputs : Tensor[in_features, in_features], float32
        `H_I`; known up to its scale.
    outputs : Tensor[out_features, out_features], float32
        `H_O`; likewise.
    """

    inputs: Tensor
    outputs: Tensor


@dataclass(frozen=True, eq=False)
class LinearStatistics:
    """Moments of the inputs of one linear, or of several that read the same tensor.

    Parameters
    ----------
    gram : Tensor[in_features, in_features], float32
        `H = E[x x^T]` over tokens, `x` being the inputs that the compressed linear will see.
    cross : Tensor[in_features, in_features], float32, or None
        `D = E[(x~ - x) x^T]`, `x~` being the inputs at the same tokens in the source model (Li et al.
        2025, GPTAQ, arXiv:2504.02692). None where source and compressed inputs are the same.
    mean_abs : Tensor[in_features], float32
        `E[|x|]` per input (Lin et al. 2023, AWQ, arXiv:2306.00978).
    tokens : int
        Tokens averaged over.
    sketch : HessianSketch or None
        Of one linear alone, where its method reads it.
    max_abs : Tensor[in_features], float32, or None
        `max |x|` per input (Xiao et al. 2022, SmoothQuant, arXiv:2211.10438). None where statistics were put
        together without the inputs.
    """

    gram: Tensor
    cross: Tensor | None
    mean_abs: Tensor
    tokens: int
    sketch: HessianSketch | None = None
    max_abs: Tensor | None = None


class GramAccumulator:
    """Sums up `LinearStatistics` while tokens stream by; of the symmetric sum half is computed.

    Holds one `[in_features, in_features]` sum (two with `cross`) and one chunk of tokens.

    Parameters
    ----------
    in_features : int
    cross : bool
        Whether the inputs of the source model come along and `cross` is wanted.
    dtype : torch.dtype
        Of sums and products: float32, or float64 where the memory is there.
    device : torch.device or str
        Where the sums are held; inputs are moved there.
    weighted : bool
        Whether tokens come with weights, of mean 1, by which their share in all averages is multiplied.
    """

    def __init__(
        self,
        in_features: int,
        cross: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        weighted: bool = False,
    ) -> None:
        self.in_features = in_features
        self.tokens = 0
        self._gram = torch.zeros((in_features, in_features), dtype=dtype, device=device)
        self._cross = torch.zeros_like(self._gram) if cross else None
        self._abs = torch.zeros(in_features, dtype=torch.float64, device=device)
        self._max = torch.zeros(in_features, dtype=dtype, device=device)
        self._chunk = torch.empty((CHUNK_TOKENS, in_features), dtype=dtype, device=device)
        self._source_chunk = torch.empty_like(self._chunk) if cross else None
        self._weights = torch.empty(CHUNK_TOKENS, dtype=dtype, device=device) if weighted else None
        self._filled = 0

    def add(self, x: Tensor, source_x: Tensor | None = None, weights: Tensor | None = None) -> None:
        """Add the inputs of some tokens.

        Parameters
        ----------
        x : Tensor[..., in_features], float
            What the linear sees in the compressed model.
        source_x : Tensor[..., in_features], float, or None
            The same tokens in the source model; given exactly when `cross` was asked for.
        weights : Tensor[...], float, or None
            Of the tokens; given exactly when `weighted` was asked for.

        Raises
        ------
        ValueError
            When shapes differ, or `source_x` or `weights` are missing or unexpected.
        """
        if (source_x is None) != (self._source_chunk is None):
            raise ValueError("source_x is given exactly when the accumulator was made with cross=True")
        if (weights is None) != (self._weights is None):
            raise ValueError("weights are given exactly when the accumulator was made with weighted=True")
        if weights is not None and weights.shape != x.shape[:-1]:
            raise ValueError(f"weights {list(weights.shape)} for inputs {list(x.shape)}")
        if x.shape[-1] != self.in_features or (source_x is not None and source_x.shape != x.shape):
            given = list(x.shape) if source_x is None else [list(x.shape), list(source_x.shape)]
            raise ValueError(f"inputs {given}, not [..., {self.in_features}] alike")
        rows = x.detach().reshape(-1, self.in_features)
        source_rows = None if source_x is None else source_x.detach().reshape(-1, self.in_features)
        token_weights = None if weights is None else weights.reshape(-1)
        done = 0
        while done < len(rows):
            count = min(CHUNK_TOKENS - self._filled, len(rows) - done)
            place = slice(self._filled, self._filled + count)
            self._chunk[place] = rows[done : done + count]
            if self._source_chunk is not None and source_rows is not None:
                self._source_chunk[place] = source_rows[done : done + count]
            if self._weights is not None and token_weights is not None:
                self._weights[place] = token_weights[done : done + count]
            self._filled += count
            done += count
            if self._filled == CHUNK_TOKENS:
                self._sum_chunk()

    def finish(self) -> LinearStatistics:
        """The averages over all tokens added, as float32; the accumulator is spent afterwards.

        Raises
        ------
        TextError
            When no token was added.
        """
        if self._filled:
            self._sum_chunk()
        if self.tokens == 0:
            raise TextError("no calibration token reached the linear", "at least one", "give more text")
        for start in range(0, self.in_features, PANEL):
            stop = start + PANEL
            self._gram[start:stop, stop:] = self._gram[stop:, start:stop].T
        return LinearStatistics(
            gram=self._gram.div_(self.tokens).float(),
            cross=None if self._cross is None else self._cross.div_(self.tokens).float(),
            mean_abs=(self._abs / self.tokens).float(),
            tokens=self.tokens,
            max_abs=self._max.float(),
        )

    def _sum_chunk(self) -> None:
        """Add the outer products of the tokens in the chunk and empty it."""
        x = self._chunk[: self._filled]
        weighted = x if self._weights is None else x * self._weights[: self._filled, None]
        for start in range(0, self.in_features, PANEL):
            columns = slice(start, start + PANEL)
            self._gram[start:, columns].addmm_(x[:, start:].T, weighted[:, columns])
        self._abs += weighted.abs().sum(0, dtype=torch.float64)
        torch.maximum(self._max, torch.linalg.vector_norm(x, float("inf"), dim=0), out=self._max)
        if self._cross is not None and self._source_chunk is not None:
            difference = self._source_chunk[: self._filled].sub_(x)
            self._cross.addmm_(difference.T, weighted)
        self.tokens += self._filled
        self._filled = 0
