"""Rounded inputs: their error is foreseen from each input alone, and only what costs little is chosen."""

from __future__ import annotations

import pytest
import torch

from tailorbird.formats.packed import FloatCoding, IntegerCoding
from tailorbird.kernels.reference import INT8, INT8_STATIC, round_to_scale, to_bytes
from tailorbird.plan.inputs import (
    LEAST_KL,
    SHARE,
    TOKENS,
    InputErrors,
    input_cost,
    input_key,
    rounded_inputs,
)
from tailorbird.plan.scores import PlaceScore, Scores

CODINGS = (IntegerCoding(4, 32), IntegerCoding(3, 64), IntegerCoding(8, 64), FloatCoding())


@pytest.mark.parametrize("group", [32, 64])
def test_errors_of_inputs_add_up_to_that_of_the_output(group: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 192, generator=generator) @ torch.randn(192, 192, generator=generator)
    x[:, 7] *= 30  # one that makes its fellows' steps coarse
    weight = torch.randn(50, 192, generator=generator)
    errors = InputErrors(192, CODINGS)
    for part in x.split(300):
        errors.add(part.view(-1, 2, 192) if len(part) % 2 == 0 else part)
    energy = float((x @ weight.T).square().sum(1).mean())
    exact = float(((to_bytes(x, group) - x) @ weight.T).square().sum(1).mean()) / energy
    found = errors.errors(weight, energy)
    assert set(found) == {input_key(32), input_key(64)}
    assert found[input_key(group)] == pytest.approx(exact, rel=0.1)


def test_a_static_scale_is_priced_whatever_the_groups() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2000, 192, generator=generator), torch.randn(50, 192, generator=generator)
    x[::7] *= 10  # tokens that make the step coarse for all others
    errors = InputErrors(192, CODINGS, (INT8, INT8_STATIC))
    for show in (errors.widen, errors.add):
        for part in x.split(300):
            show(part.view(1, -1, 192))
    assert errors.static is not None
    energy = float((x @ weight.T).square().sum(1).mean())
    rounded = round_to_scale(x, errors.static.scale)
    exact = float(((rounded - x) @ weight.T).square().sum(1).mean()) / energy
    found = errors.errors(weight, energy)
    assert set(found) == {input_key(group, to) for group in (32, 64) for to in (INT8, INT8_STATIC)}
    assert found[input_key(32, INT8_STATIC)] == found[input_key(64, INT8_STATIC)]
    assert found[input_key(64, INT8_STATIC)] == pytest.approx(exact, rel=0.1)
    assert found[input_key(64, INT8_STATIC)] > 2 * found[input_key(64)]


def test_only_the_first_tokens_are_looked_at() -> None:
    errors = InputErrors(32, CODINGS, (INT8, INT8_STATIC))
    x = torch.randn(TOKENS + 500, 32, generator=torch.Generator().manual_seed(0))
    for part in (x[:3000], x[3000:], x[:10] * 100):
        errors.widen(part)
    errors.add(x[:3000])
    errors.add(x[3000:])
    errors.add(x[:10])
    once = InputErrors(32, CODINGS, (INT8, INT8_STATIC))
    once.widen(x[:TOKENS])
    once.add(x[:TOKENS])
    weight = torch.ones(1, 32)
    assert errors.tokens == TOKENS
    assert errors.errors(weight, 1.0) == pytest.approx(once.errors(weight, 1.0))


def place(name: str, coefficient: float, error: float | None) -> PlaceScore:
    errors = {coding.label: 0.01 for coding in CODINGS}
    if error is not None:
        errors[input_key(64)] = error
    return PlaceScore(name, "q", 0, (64, 64), errors, coefficient)


def test_the_cheapest_are_chosen_up_to_what_is_allowed() -> None:
    places = [place(str(i), 1.0, 10.0**-i) for i in range(1, 9)] + [place("embedding", 1.0, None)]
    scores = Scores(tuple(places), {}, "")
    codings = {p.name: IntegerCoding(3, 64) for p in places[:7]}
    codings |= {"embedding": IntegerCoding(3, 64), "8": FloatCoding()}
    assert input_cost(scores, codings) == {str(i): pytest.approx(10.0**-i) for i in range(1, 8)}
    for predicted in (0.0, 0.02, 0.2, 2.0):
        chosen = rounded_inputs(scores, codings, predicted)
        spent = sum(10.0 ** -int(name) for name in chosen)
        allowed = max(SHARE * predicted, LEAST_KL)
        assert spent <= allowed
        left_out = {str(i) for i in range(1, 8)} - chosen
        assert all(spent + 10.0 ** -int(name) > allowed for name in left_out)


def test_a_place_that_does_not_answer_is_free() -> None:
    scores = Scores((place("a", 0.0, 0.5),), {}, "")
    assert rounded_inputs(scores, {"a": IntegerCoding(8, 64)}, 0.0) == {"a"}
