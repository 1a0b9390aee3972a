"""Choosing one token from each row of logits.

What happens to a row, in this order: the log-probabilities asked for are taken from the model's own logits;
repetition, presence and frequency penalties; biases; forbidden tokens; the mask of a grammar; the
temperature; then top-k, top-p, min-p and typical-p, each of what the one before left; then one draw. The draw
inverts the distribution over rising token ids with a number that the caller gives, so that a row's token
depends on that row alone.

`reference` does this in float64 with whole sorts. `choose` calls compiled code that looks one by one only at
the tokens that may be drawn; both give the same token, unless the number lies within rounding of the border
between two.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from tailorbird.kernels.native import available, best_version, library

logger = logging.getLogger("tailorbird")

#: Most of the likeliest tokens whose log-probabilities can be asked for.
MOST_LOGPROBS = 20

#: Why a row has no token: a logit isn't a number or all are infinite, or everything is forbidden.
Problem = Literal["not finite", "nothing left"]
_PROBLEMS: tuple[Problem | None, ...] = (None, "not finite", "nothing left")


class _RowStructure(ctypes.Structure):
    """`SamplingRow` of `cpp/sampling.h`."""

    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in ("logits", "seen", "counts", "bias_tokens", "biases", "forbidden", "allowed")
        ),
        *((name, ctypes.c_int64) for name in ("seen_count", "bias_count", "forbidden_count")),
        *(
            (name, ctypes.c_double)
            for name in (
                "repetition", "presence", "frequency", "temperature", "top_p", "min_p", "typical_p", "uniform"
            )
        ),
        ("top_k", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("logprobs", "problem", "token", "top_count")),
        ("logprob", ctypes.c_double),
        ("top_logprobs", ctypes.c_double * MOST_LOGPROBS),
        ("top_tokens", ctypes.c_int32 * MOST_LOGPROBS),
    ]  # fmt: skip


@dataclass(eq=False)
class Rule:
    """How the next token of one sequence is chosen.

    `seen`, `counts`, `forbidden`, `allowed` and `uniform` change from token to token; the rest stays.

    Parameters
    ----------
    temperature : float
        0 takes the first of the largest logits.
    top_k : int
        0 is all.
    top_p, min_p, typical_p : float
        1, 0 and 1 leave everything.
    repetition, presence, frequency : float
        The first divides positive logits of `seen` tokens and multiplies others; the second is taken off
        those with a count above 0, the third as often as their count. 1, 0 and 0 change nothing.
    bias_tokens : array of int32
        Each token once.
    biases : array of float64
        What is added to the logits of `bias_tokens`.
    logprobs : int or None
        How many of the likeliest tokens to give back, up to `MOST_LOGPROBS`; with None not even the chosen
        one's log-probability.
    seen, counts : array of int32
        Tokens, each once, and how often each is in the output.
    forbidden : array of int32
        Tokens that are never chosen.
    allowed : Tensor[ceil(vocab / 32)], int32, contiguous on the CPU, or None
        Bit ``t % 32`` of number ``t // 32`` says whether token `t` may be chosen.
    uniform : float
        In [0, 1): which of the tokens that may be drawn is.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    bias_tokens: array[int] = field(default_factory=lambda: array("i"))
    biases: array[float] = field(default_factory=lambda: array("d"))
    logprobs: int | None = None
    seen: array[int] = field(default_factory=lambda: array("i"))
    counts: array[int] = field(default_factory=lambda: array("i"))
    forbidden: array[int] = field(default_factory=lambda: array("i"))
    allowed: Tensor | None = None
    uniform: float = 0.0

    def __post_init__(self) -> None:
        if self.logprobs is not None and not 0 <= self.logprobs <= MOST_LOGPROBS:
            raise ValueError(f"logprobs {self.logprobs}; expected 0 to {MOST_LOGPROBS}")
        self._structure = _RowStructure(
            bias_tokens=self.bias_tokens.buffer_info()[0], biases=self.biases.buffer_info()[0],
            bias_count=len(self.bias_tokens), repetition=self.repetition, presence=self.presence,
            frequency=self.frequency, temperature=self.temperature, top_p=self.top_p, min_p=self.min_p,
            typical_p=self.typical_p, top_k=self.top_k,
            logprobs=-1 if self.logprobs is None else self.logprobs,
        )  # fmt: skip

    def describe(self, logits: int) -> _RowStructure:
        """The C structure, with what has changed and the address of the row's logits."""
        row = self._structure
        row.logits = logits
        row.uniform = self.uniform
        row.seen, row.seen_count = self.seen.buffer_info()
        row.counts = self.counts.buffer_info()[0]
        row.forbidden, row.forbidden_count = self.forbidden.buffer_info()
        row.allowed = None if self.allowed is None else self.allowed.data_ptr()
        return row


@dataclass(frozen=True)
class Chosen:
    """A token for a row.

    Attributes
    ----------
    token : int
        -1 where there is a problem.
    problem : str or None
    logprob : float or None
        Of the model's own distribution, in nats; None where it wasn't asked for.
    top : tuple of (int, float)
        The likeliest tokens and their log-probabilities, falling, of equals the lower token first; those that
        the model holds impossible are left out.
    """

    token: int
    problem: Problem | None = None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def choose(
    logits: Tensor | Sequence[Tensor],
    rules: Sequence[Rule],
    num_threads: int = 1,
    version: int | None = None,
) -> list[Chosen]:
    """A token for each row; a row gets the same one alone and among others.

    Parameters
    ----------
    logits : Tensor[rows, vocab] or sequence of Tensor[vocab], float32 on the CPU
        Values of a row lie side by side. Not changed.
    rules : sequence of Rule
        One per row, none twice; their tokens are within the vocabulary.
    num_threads : int
    version : int, optional
        Instructions to use, one of `native.versions()`; the fastest by default.

    Returns
    -------
    list of Chosen

    Raises
    ------
    ValueError
        For other shapes or dtypes.
    """
    rows = list(logits) if not isinstance(logits, Tensor) or logits.dim() else []
    shapes = {row.shape for row in rows}
    if len(rows) != len(rules) or len(shapes) > 1 or any(len(shape) != 1 or not shape[0] for shape in shapes):
        given = [list(shape) for shape in shapes]
        raise ValueError(f"{len(rows)} rows of logits {given} for {len(rules)} rules; expected one for each")
    if not rows:
        return []
    for row in rows:
        if row.dtype != torch.float32 or row.device.type != "cpu" or row.stride(0) != 1:
            raise ValueError(
                f"logits {row.dtype} on {row.device}, {row.stride(0)} apart; "
                "expected float32 on the CPU, side by side"
            )
    vocabulary = len(rows[0])
    words = -(-vocabulary // 32)
    if any(rule.allowed is not None and len(rule.allowed) < words for rule in rules):
        raise ValueError(f"a mask of less than {words} numbers for {vocabulary} tokens")
    if len(set(map(id, rules))) < len(rules):
        raise ValueError("a rule for two rows; expected one for each")
    if not available():
        _say_slow()
        return [reference(row, rule) for row, rule in zip(rows, rules, strict=True)]
    described = [rule.describe(row.data_ptr()) for row, rule in zip(rows, rules, strict=True)]
    addresses = (ctypes.c_void_p * len(rows))(*map(ctypes.addressof, described))
    library().tailorbird_choose(
        addresses, len(rows), vocabulary, max(1, min(num_threads, len(rows))),
        best_version() if version is None else version,
    )  # fmt: skip
    return [_chosen(row) for row in described]


@functools.cache
def _say_slow() -> None:
    logger.warning("tokens are chosen slowly: tailorbird was installed without a C++ compiler")


def _chosen(row: _RowStructure) -> Chosen:
    problem = _PROBLEMS[row.problem]
    if problem is not None or row.logprobs < 0:
        return Chosen(row.token, problem)
    count = row.top_count
    return Chosen(
        row.token,
        None,
        row.logprob,
        tuple(zip(row.top_tokens[:count], row.top_logprobs[:count], strict=True)),
    )


def reference(logits: Tensor, rule: Rule) -> Chosen:
    """The exact, slow `choose` for one row `[vocab]`."""
    if not bool(logits.max().isfinite()):
        return Chosen(-1, "not finite")
    after = changed(logits, rule)
    top = float(after.max())
    if not math.isfinite(top):
        return Chosen(-1, "nothing left" if top < 0 else "not finite")
    if rule.temperature == 0:
        token = int((after == top).nonzero()[0])
    else:
        token = drawn(kept_weights(after, rule), rule.uniform)
    if rule.logprobs is None:
        return Chosen(token)
    logprobs = logits.double().log_softmax(0)
    order = logits.sort(descending=True, stable=True).indices[: rule.logprobs].tolist()
    likeliest = ((other, float(logprobs[other])) for other in order)
    return Chosen(
        token, None, float(logprobs[token]), tuple(pair for pair in likeliest if pair[1] > -math.inf)
    )


def changed(logits: Tensor, rule: Rule) -> Tensor:
    """Logits `[vocab]` with penalties, biases, forbidden tokens and the mask, each rounded to float32."""
    after = logits.clone()
    if rule.seen and (rule.repetition, rule.presence, rule.frequency) != (1, 0, 0):
        seen, counts = torch.tensor(rule.seen), torch.tensor(rule.counts).double()
        values = after[seen].double()
        values = torch.where(values > 0, values / rule.repetition, values * rule.repetition)
        after[seen] = (values - (rule.presence * (counts > 0) + rule.frequency * counts)).float()
    if rule.bias_tokens:
        tokens = torch.tensor(rule.bias_tokens)
        after[tokens] = (after[tokens].double() + torch.tensor(rule.biases, dtype=torch.float64)).float()
    if rule.forbidden:
        after[torch.tensor(rule.forbidden)] = -math.inf
    if rule.allowed is not None:
        bits = rule.allowed[:, None] >> torch.arange(32, dtype=torch.int32) & 1
        after[bits.flatten()[: len(after)] == 0] = -math.inf
    return after


def kept_weights(logits: Tensor, rule: Rule) -> Tensor:
    """What each token weighs in the draw, in no particular unit; 0 where it can't be drawn.

    Parameters
    ----------
    logits : Tensor[vocab], float32
        The largest is finite.
    rule : Rule
        Its temperature is above 0.

    Returns
    -------
    Tensor[vocab], float64
    """
    scaled = (logits.double() - logits.double().max()) / rule.temperature
    order = logits.sort(descending=True, stable=True).indices
    weights = scaled.exp()[order]
    if rule.top_k:
        weights[rule.top_k :] = 0
    if rule.top_p < 1:
        weights = _shortest_run(weights, rule.top_p)
    weights[weights < rule.min_p] = 0
    weights = torch.zeros_like(weights).index_put_((order,), weights)
    if rule.typical_p < 1:
        mean = (weights * scaled.clamp(min=-1e9)).sum() / weights.sum()
        distances = (scaled - mean).abs().masked_fill(weights == 0, math.inf)
        order = distances.sort(stable=True).indices
        run = _shortest_run(weights[order], rule.typical_p)
        weights = torch.zeros_like(weights).index_put_((order,), run)
    return weights


def _shortest_run(weights: Tensor, share: float) -> Tensor:
    """The first of some weights that reach a share of their sum together, and zeros."""
    before = torch.cat([weights.new_zeros(1), weights.cumsum(0)[:-1]])
    return torch.where(before < share * weights.sum(), weights, 0)


def drawn(weights: Tensor, uniform: float) -> int:
    """The token at which the sum of `weights [vocab]` exceeds `uniform` of the whole."""
    sums = weights.cumsum(0)
    token = int(torch.searchsorted(sums, uniform * sums[-1], right=True))
    return min(token, int(weights.nonzero()[-1]))
