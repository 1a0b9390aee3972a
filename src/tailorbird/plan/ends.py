"""Errors of the embedding and the head, as they will really be rounded.

An untied embedding is rounded to nearest, an untied head by the plan's method against its inputs.
A tied pair is one weight with two uses: as the head it multiplies inputs with the Gram matrix ``H``,
as the embedding each row is read as it is, which stands for the identity. With ``c`` the divergence
per relative error of each use (`sensitivity`), a change ``D`` of the weight ``W`` costs

    ``c_head tr(D H Dᵀ) / tr(W H Wᵀ) + c_embedding tr(D Dᵀ) / tr(W Wᵀ) = tr(D G Dᵀ)``,

so the method that is given ``G`` for a Gram matrix rounds for both uses at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tailorbird.calibrate.statistics import LinearStatistics
from tailorbird.calibrate.stream import StreamingModel
from tailorbird.formats.packed import Coding, FloatCoding, PackedWeight
from tailorbird.linear import LinearMethod
from tailorbird.linear.ends import end_method
from tailorbird.linear.error import output_error, row_energies
from tailorbird.model.anatomy import Anatomy
from tailorbird.plan.candidates import ERROR_ROWS, sample_rows

#: A method with the statistics of one input.
Rounded = Callable[[Tensor, Coding], PackedWeight]
#: A difference of two sums that is smaller than this share of them is their rounding.
ROUNDED_AWAY = 1e-6


@dataclass(frozen=True)
class HeadStatistics:
    """What the head reads in the source.

    Attributes
    ----------
    whole : LinearStatistics
        Over all calibration tokens.
    judge : LinearStatistics or None
        Over those that are kept from a method to judge it; None where there are too few.
    """

    whole: LinearStatistics
    judge: LinearStatistics | None


@torch.no_grad()
def end_errors(
    model: StreamingModel,
    method: LinearMethod,
    head: HeadStatistics,
    coefficients: dict[str, float],
    codings: Sequence[Coding],
) -> dict[str, dict[str, float]]:
    """Errors of the head under `method`; of a tied pair those of both uses.

    Parameters
    ----------
    model : StreamingModel
        The source.
    method : LinearMethod
        Sees the tokens that don't judge it.
    head : HeadStatistics
    coefficients : dict
        Use -> nats of KL per unit of relative error.
    codings : sequence of Coding

    Returns
    -------
    dict
        Use -> label of a coding -> relative output error, to be merged with what is known of the use.
    """
    anatomy = model.anatomy
    sample = sample_rows(model.end_weight(anatomy.head), ERROR_ROWS).clone()
    model.release_ends()
    judge = head.judge or head.whole
    seen = without(head.whole, head.judge) if head.judge is not None else head.whole
    grams: dict[str, Tensor | None] = {anatomy.head: judge.gram}
    if anatomy.tied:
        seen = for_both_uses(anatomy, sample, seen, coefficients)
        grams[anatomy.embedding] = None
    errors: dict[str, dict[str, float]] = {use: {} for use in grams}
    energies = {use: float(row_energies(sample, gram).sum()) for use, gram in grams.items()}
    prepared: dict[type, Rounded] = {}
    for coding in codings:
        own = end_method(method, coding)
        rounded = prepared.setdefault(type(own), own.prepare(seen))
        approximation = (
            sample.to(getattr(torch, coding.dtype)).to(sample.dtype)
            if isinstance(coding, FloatCoding)
            else rounded(sample, coding).dequantize()
        )
        for use, gram in grams.items():
            errors[use][coding.label] = output_error(sample, approximation, gram, energies[use])
    return errors


def for_both_uses(
    anatomy: Anatomy, weight: Tensor, head: LinearStatistics, coefficients: dict[str, float]
) -> LinearStatistics:
    """Statistics by which a method rounds a tied weight for its use as embedding and as head.

    Parameters
    ----------
    weight : Tensor, float32 ``[rows, hidden_size]``
        All rows of the tied weight, or a sample.
    head : LinearStatistics
        Of the head's input.
    coefficients : dict
        Use -> nats of KL per unit of relative error.

    Returns
    -------
    LinearStatistics
        `head`, with its Gram matrix replaced by ``G`` (see the module) in units of ``H``.
    """
    as_head, as_embedding = coefficients[anatomy.head], coefficients[anatomy.embedding]
    if as_head <= 0:  # the model doesn't answer to its head: there is nothing to weigh against
        return head
    share = as_embedding / as_head
    energy_as_head = float(row_energies(weight, head.gram).sum())
    energy_as_embedding = float(row_energies(weight).sum())
    if energy_as_embedding == 0:
        return head
    gram = head.gram.clone()
    gram.diagonal().add_(share * energy_as_head / energy_as_embedding)
    return replace(head, gram=gram)


def without(whole: LinearStatistics, part: LinearStatistics) -> LinearStatistics:
    """Statistics of the tokens of `whole` that `part` leaves.

    Inputs that only `part` saw are exactly zero in the difference, as if it had been summed for itself.
    Greatest magnitudes can't be taken back, and are those of all tokens.
    """
    tokens = whole.tokens - part.tokens
    gram = (whole.gram * (whole.tokens / tokens)).sub_(part.gram, alpha=part.tokens / tokens)
    unseen = gram.diagonal() <= ROUNDED_AWAY * part.gram.diagonal()
    gram[unseen, :] = 0
    gram[:, unseen] = 0
    mean_abs = (whole.mean_abs * whole.tokens - part.mean_abs * part.tokens) / tokens
    return LinearStatistics(gram, None, mean_abs, tokens, max_abs=whole.max_abs)
