"""What planning needs to know of a model: the error of every candidate, and what an error costs.

`errors` and `ends` measure the first, `sensitivity` or `fisher` the second; `score_cache` keeps both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tailorbird.formats.packed import Coding, EntropyCoding, stored_bytes
from tailorbird.model.anatomy import Anatomy
from tailorbird.plan.allocate import Option, PlaceOptions
from tailorbird.plan.candidates import distinct
from tailorbird.plan.places import places_of


@dataclass(frozen=True)
class PlaceScore:
    """What was measured at one place.

    Attributes
    ----------
    name, role : str
        Module path and role; role ``embedding``, ``head`` or ``tied`` outside the blocks.
    block : int
        Index of the block; -1 for the embedding, the number of blocks for the head.
    shape : tuple of int
        ``(out_features, in_features)``.
    errors : dict
        Label of a coding -> relative output error of rounding to nearest, or of the plan's method if `own`;
        `inputs.input_key` of a group size -> that of rounding the inputs to bytes.
    coefficient : float
        Nats per token of KL per unit of relative error.
    own : bool
        Whether `errors` are those of the way in which this very place is rounded.
    """

    name: str
    role: str
    block: int
    shape: tuple[int, int]
    errors: dict[str, float]
    coefficient: float
    own: bool = False


@dataclass(frozen=True)
class Scores:
    """All that `options` needs; see the module."""

    places: tuple[PlaceScore, ...]
    ratios: dict[str, float]
    content_hash: str

    def predicted_error(self, place: PlaceScore, coding: Coding) -> float:
        """Relative output error expected of the plan's method at `place`."""
        if isinstance(coding, EntropyCoding):
            return 0.0
        return place.errors[coding.label] * (1.0 if place.own else self.ratios.get(coding.label, 1.0))


def options(
    scores: Scores,
    codings: Callable[[PlaceScore], Sequence[Coding]],
    together: Callable[[PlaceScore], str | None] = lambda place: None,
    seconds: Callable[[PlaceScore, Coding], float] = lambda place, coding: 0.0,
    size: Callable[[PlaceScore, Coding], int] = lambda place, coding: stored_bytes(coding, *place.shape),
) -> list[PlaceOptions]:
    """What the allocator chooses from: bytes, predicted KL and seconds of every coding a place may take."""
    result = []
    for place in scores.places:
        choices = tuple(
            Option(
                coding,
                size(place, coding),
                place.coefficient * scores.predicted_error(place, coding),
                seconds(place, coding),
            )
            for coding in distinct(codings(place), *place.shape)
        )
        result.append(PlaceOptions(place.name, choices, together(place)))
    return result


def assemble(
    anatomy: Anatomy,
    errors: dict[str, dict[str, float]],
    ratios: dict[str, float],
    coefficients: dict[str, float],
    content_hash: str,
) -> Scores:
    """Put both passes together.

    Parameters
    ----------
    errors : dict
        Use -> label of a coding -> relative output error.
    ratios : dict
        Label of a coding -> error of the plan's method divided by that of rounding to nearest.
    coefficients : dict
        Use -> nats of KL per unit of relative error; what a tied pair costs is the sum over its uses.
    """
    linears = {linear.name: linear for linear in anatomy.linears()}
    errors, coefficients = dict(errors), dict(coefficients)
    if anatomy.tied:
        uses = anatomy.embedding, anatomy.head
        cost = sum(coefficients[use] for use in uses)
        shares = {use: coefficients[use] / cost if cost > 0 else 0.5 for use in uses}
        errors[anatomy.embedding] = {
            label: sum(share * errors[use].get(label, 0.0) for use, share in shares.items())
            for label in errors[anatomy.head]
        }
        coefficients[anatomy.embedding] = cost
    scores = []
    for place in places_of(anatomy):
        if place.name in linears:
            linear = linears[place.name]
            role, shape = linear.role, (linear.out_features, linear.in_features)
        else:
            role = "tied" if anatomy.tied else ("embedding" if place.block < 0 else "head")
            shape = anatomy.end_shape(place.name)
        scores.append(
            PlaceScore(
                place.name,
                role,
                place.block,
                shape,
                errors[place.name],
                coefficients[place.name],
                own=place.name not in linears,
            )
        )
    return Scores(tuple(scores), ratios, content_hash)
