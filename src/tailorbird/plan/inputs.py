"""What it costs to round the inputs of a linear, and which linears may round them to bytes.

Products of integers are the fastest there are on many processors, but they take the activations as bytes
too (`kernels.reference.round_inputs`). Rounding errors of different inputs are all but independent, so the
error that reaches the output is the sum of what each input contributes: its mean squared rounding error
times the squared norm of its column. It is measured beside the Gram matrices, and priced like any other
error of the place. The cheapest linears come first, as long as all of them together cost little beside
what the coding of the weights costs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

import torch
from torch import Tensor

from tailorbird.calibrate.input_scales import InputScale
from tailorbird.formats.packed import Coding, ScaledCoding
from tailorbird.kernels.reference import INT8, INT8_STATIC, round_inputs
from tailorbird.plan.scores import Scores

#: Tokens on which the rounding of inputs is measured.
TOKENS = 4096
#: Activations that are rounded at once.
CHUNK_VALUES = 1 << 17
#: What rounded inputs may add to the model's KL: a share of what the weights cost, or so many nats per token.
SHARE, LEAST_KL = 0.1, 5e-4


def input_key(group_size: int, to: str = INT8) -> str:
    """Where a place's errors hold that of rounding its inputs, when its weight has such groups."""
    return f"inputs g{group_size}" if to == INT8 else f"inputs {to} g{group_size}"


class InputErrors:
    """Mean squared errors of rounding the inputs of one linear, or of several that read the same tensor.

    Parameters
    ----------
    in_features : int
    codings : sequence of Coding
        Inputs share a scale where weights do, so the error depends on the group sizes of these.
    inputs : sequence of str
        What they are rounded to, by the names of `kernels.reference.ROUNDED_TO`.
    """

    def __init__(self, in_features: int, codings: Sequence[Coding], inputs: Sequence[str] = (INT8,)) -> None:
        self.groups = sorted({coding.group_size for coding in codings if isinstance(coding, ScaledCoding)})
        pairs = product(self.groups, (to for to in inputs if to != INT8_STATIC))
        self.sums = {pair: torch.zeros(in_features, dtype=torch.float64) for pair in pairs}
        self.static = InputScale(in_features) if INT8_STATIC in inputs else None
        self.tokens = self.widened = 0

    def widen(self, x: Tensor) -> None:
        """Show the inputs of the tokens that are added later, for a static scale."""
        rows = x.reshape(-1, x.shape[-1])[: max(0, TOKENS - self.widened)]
        if self.static is not None and len(rows):
            self.static.widen(rows)
        self.widened += len(rows)

    def add(self, x: Tensor) -> None:
        """Add the inputs ``[..., in_features]`` of some tokens, until there are `TOKENS`."""
        rows = x.reshape(-1, x.shape[-1])[: max(0, TOKENS - self.tokens)]
        if self.static is not None:
            self.static.add(rows)
        for part in rows.split(max(1, CHUNK_VALUES // rows.shape[1])):
            for (group, to), total in self.sums.items():
                total += (round_inputs(part, group, to) - part.float()).square().sum(0, dtype=torch.float64)
        self.tokens += len(rows)

    def errors(self, weight: Tensor, energy: float) -> dict[str, float]:
        """`input_key` of each group size, and of what is rounded to -> relative output error.

        Parameters
        ----------
        weight : Tensor, float32 ``[rows, in_features]``
            Of the linear; a sample of rows will do.
        energy : float
            Mean squared output of these rows together, ``tr(W H Wᵀ)``.
        """
        norms = weight.square().sum(0, dtype=torch.float64)
        sums = dict(self.sums)
        if self.static is not None:  # whatever the groups
            sums |= {(group, INT8_STATIC): self.static.squared_errors for group in self.groups}
        return {
            input_key(*pair): float(total @ norms) / self.tokens / energy if energy > 0 else 0.0
            for pair, total in sums.items()
        }


def input_cost(
    scores: Scores, codings: Mapping[str, Coding], rounded: Mapping[str, str] | None = None
) -> dict[str, float]:
    """Place -> nats of KL that rounding its inputs adds, where its weight holds codes.

    `rounded` says to what; left out, all are rounded to bytes. A place that it doesn't name costs nothing.
    """
    costs = {}
    for place in scores.places:
        coding, to = codings.get(place.name), INT8 if rounded is None else rounded.get(place.name)
        if isinstance(coding, ScaledCoding) and to is not None:
            error = place.errors.get(input_key(coding.group_size, to))
            if error is not None:
                costs[place.name] = place.coefficient * error
    return costs


def rounded_inputs(scores: Scores, codings: Mapping[str, Coding], predicted_kl: float) -> frozenset[str]:
    """Places whose inputs may be rounded to bytes; the rest takes a finer path.

    Parameters
    ----------
    codings : mapping
        Place -> coding of its weight.
    predicted_kl : float
        What these are predicted to cost, nats per token.
    """
    allowed, chosen = max(SHARE * predicted_kl, LEAST_KL), set()
    for name, cost in sorted(input_cost(scores, codings).items(), key=lambda item: item[1]):
        if cost > allowed:
            break
        allowed -= cost
        chosen.add(name)
    return frozenset(chosen)
