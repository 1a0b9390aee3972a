"""How far a result has moved from its source, and how well either predicts text: from logits, as they come.

Both metrics take logits in pieces of any size and hold one number per position, never the logits. They know
nothing of models: who forms the logits, and how many at a time, is decided by the caller.

    KL(source ‖ result) at a position = Σ_v p(v) (log p(v) − log q(v))

in nats per token, with p and q the softmax of the source's and of the result's logits. Perplexity is exp of
the mean of −log p(next token).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tailorbird.errors import TextError

#: Temporaries of one step stay below this many bytes.
STEP_BYTES = 64 << 20
#: fp32 values of one vocabulary held per position in a step: two inputs, two log-probabilities, one product.
STEP_COPIES = 5

#: Edges of the KL histogram in nats: from what fp32 resolves to what no model does, four per decade.
HISTOGRAM_EDGES = [0.0, *(float(f"{10 ** (e / 4):.4g}") for e in range(-28, 9))]


@dataclass(frozen=True)
class Quality:
    """A result against its source on the same text.

    Attributes
    ----------
    perplexity_before, perplexity_after : float
        Of source and result.
    kl_mean, kl_p99 : float
        Mean and 99th percentile over positions of KL(source ‖ result), nats per token; infinite where
        logits aren't finite.
    top1_agreement : float
        Share of positions at which both models think the same token likeliest.
    tokens : int
        Positions compared.
    histogram : dict
        ``edges`` in nats and ``counts`` between them; the last count holds everything above, too.
    """

    perplexity_before: float
    perplexity_after: float
    kl_mean: float
    kl_p99: float
    top1_agreement: float
    tokens: int
    histogram: dict[str, list[Any]]


class Perplexity:
    """Sums −log p(next token) over text that arrives in pieces."""

    def __init__(self) -> None:
        self._nats = 0.0
        self._labels = 0

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count one piece.

        Parameters
        ----------
        logits : Tensor ``[..., positions, vocab]``
            Any float type; computed in float32.
        labels : LongTensor ``[..., at most positions]``
            The token that follows each position. Where there are fewer than positions, the last positions
            have no next token (the end of a window).
        """
        logits, labels, counted = _flat(logits, labels)
        for start, stop in _steps(*logits.shape):
            log_p = torch.log_softmax(logits[start:stop].float(), dim=-1)
            self.add_log_probabilities(log_p, labels[start:stop], counted[start:stop])

    def add_log_probabilities(self, log_p: Tensor, labels: Tensor, counted: Tensor) -> None:
        """Count positions whose log-probabilities are known already.

        Parameters
        ----------
        log_p : float32 Tensor ``[positions, vocab]``
        labels : LongTensor ``[positions]``
        counted : bool Tensor ``[positions]``
            Which positions have a next token.
        """
        of_label = log_p.gather(1, labels[:, None])[:, 0][counted]
        self._nats -= float(of_label.double().sum())
        self._labels += int(counted.sum())

    @property
    def tokens(self) -> int:
        """Tokens that were predicted."""
        return self._labels

    def finish(self) -> float:
        """The perplexity; infinite where logits weren't finite.

        Raises
        ------
        TextError
            Nothing was predicted.
        """
        if not self._labels:
            raise TextError(
                "text without a single token to predict",
                "windows of at least two tokens",
                "give longer text for the evaluation",
            )
        mean = self._nats / self._labels
        # Not `mean >= 700`: that would let NaN through.
        return math.exp(mean) if mean < 700 else math.inf


class Divergence:
    """KL(source ‖ result) of every position, with top-1 agreement and both perplexities."""

    def __init__(self) -> None:
        self._kl: list[Tensor] = []
        self._agreed = 0
        self._before = Perplexity()
        self._after = Perplexity()

    def add(self, reference_logits: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Count one piece.

        Parameters
        ----------
        reference_logits, logits : Tensor ``[..., positions, vocab]``
            Of source and result for the same tokens, in any float type; computed in float32. A token that
            both give −inf (a padded vocabulary) adds nothing.
        labels : LongTensor ``[..., at most positions]``
            The token that follows each position. Where there are fewer than positions, the last positions
            have no next token (the end of a window): they count in the KL and not in the perplexities.
        """
        reference_logits, known, counted = _flat(reference_logits, labels)
        logits, _, _ = _flat(logits, labels)
        for start, stop in _steps(*logits.shape):
            log_p = torch.log_softmax(reference_logits[start:stop].float(), dim=-1)
            log_q = torch.log_softmax(logits[start:stop].float(), dim=-1)
            self._agreed += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
            self._before.add_log_probabilities(log_p, known[start:stop], counted[start:stop])
            self._after.add_log_probabilities(log_q, known[start:stop], counted[start:stop])
            p = log_p.exp()
            difference = torch.sub(log_p, log_q, out=log_q).masked_fill_(p == 0, 0.0)
            kl = p.mul_(difference).sum(-1).clamp_(min=0.0)
            self._kl.append(torch.nan_to_num_(kl, nan=math.inf, posinf=math.inf).cpu())

    def finish(self) -> Quality:
        """All numbers over what was added.

        Raises
        ------
        TextError
            Nothing was predicted.
        """
        before, after = self._before.finish(), self._after.finish()
        kl = torch.cat(self._kl).numpy()
        counts, _ = np.histogram(np.minimum(kl, HISTOGRAM_EDGES[-1]), HISTOGRAM_EDGES)
        return Quality(
            perplexity_before=before,
            perplexity_after=after,
            kl_mean=float(kl.mean(dtype=np.float64)),
            kl_p99=float(np.quantile(kl, 0.99, method="inverted_cdf")),
            top1_agreement=self._agreed / len(kl),
            tokens=len(kl),
            histogram={"edges": HISTOGRAM_EDGES, "counts": counts.tolist()},
        )


def _flat(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits ``[n, vocab]``, a label for each of the n positions, and which of those labels are real."""
    positions, vocabulary = logits.shape[-2:]
    missing = positions - labels.shape[-1]
    labels = labels.to(logits.device)
    counted = torch.ones_like(labels, dtype=torch.bool)
    labels = torch.nn.functional.pad(labels, (0, missing))
    counted = torch.nn.functional.pad(counted, (0, missing))
    return logits.reshape(-1, vocabulary), labels.reshape(-1), counted.reshape(-1)


def _steps(positions: int, vocabulary: int) -> list[tuple[int, int]]:
    """Ranges of positions whose temporaries stay below `STEP_BYTES`."""
    step = max(1, STEP_BYTES // (4 * STEP_COPIES * vocabulary))
    return [(start, min(start + step, positions)) for start in range(0, positions, step)]
