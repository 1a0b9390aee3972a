"""Signs before one of two magnitudes: no other magnitudes are better, and errors are made up for."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tailorbird.errors import SettingsError
from tailorbird.formats.packed import BinaryCoding
from tailorbird.kernels.packing import unpack_codes
from tailorbird.linear.quantize.binary import (
    codes_by_feedback,
    fitted_magnitudes,
    groups_by_feedback,
    nearest_signed,
    round_to_magnitudes,
    split_magnitudes,
)
from tailorbird.linear.quantize.gptq import inverse_factor
from tailorbird.linear.quantize.rtn import Rtn


def normal(rows: int, columns: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def gram_of(columns: int) -> Tensor:
    """Of correlated inputs, some of which carry far more than others."""
    x = normal(400, columns) @ (normal(columns, columns, 2) / torch.arange(1, columns + 1)[:, None])
    return x.T @ x / len(x)


def least_squares(row: list[float], h: list[float], large: tuple[int, ...]) -> tuple[float, list[float]]:
    """Error and magnitudes for one parting into two classes, `large` being the second."""
    classes = [[q for q in range(len(row)) if q not in large], list(large)]
    error, means = 0.0, []
    for members in classes:
        mass = sum(h[q] for q in members)
        mean = sum(h[q] * abs(row[q]) for q in members) / mass if mass else 0.0
        error += sum(h[q] * (abs(row[q]) - mean) ** 2 for q in members)
        means.append(mean)
    return error, means


def error_of(weight: Tensor, magnitudes: Tensor, importance: Tensor) -> Tensor:
    """What the nearest signed magnitudes leave of each row."""
    left = (weight - nearest_signed(weight, magnitudes)[1]).double()
    return (left.square() * importance).sum(-1)


@given(
    row=st.lists(st.floats(-8, 8, width=16), min_size=1, max_size=7),
    shares=st.lists(st.integers(0, 5), min_size=7, max_size=7),
)
@settings(max_examples=150, deadline=None)
def test_no_parting_of_the_weights_leaves_less(row: list[float], shares: list[int]) -> None:
    h = [float(share) for share in shares[: len(row)]]
    h = h if any(h) else [1.0] * len(row)
    weight, importance = torch.tensor([row]), torch.tensor(h)
    found = split_magnitudes(weight, importance)
    every = (p for n in range(len(row) + 1) for p in itertools.combinations(range(len(row)), n))
    least = min(least_squares(row, h, large)[0] for large in every)
    assert float(error_of(weight, found, importance)) <= least * (1 + 1e-5) + 1e-9
    assert 0 <= float(found[0, 0]) <= float(found[0, 1])


def test_a_break_point_is_better_than_one_magnitude_and_than_terms_found_one_after_the_other() -> None:
    weight, h = normal(40, 64), torch.rand(64, generator=torch.Generator().manual_seed(3)) + 0.01
    found = error_of(weight, split_magnitudes(weight, h), h)
    mass = h / h.sum()
    one = (weight.abs() * mass).sum(-1, keepdim=True)
    residual = ((weight.abs() - one).abs() * mass).sum(-1, keepdim=True)
    single = error_of(weight, torch.cat([one, one], -1), h)
    terms = error_of(weight, torch.cat([(one - residual).abs(), one + residual], -1), h)
    assert bool((found <= terms * (1 + 1e-6)).all())
    assert bool((terms < single).all())
    assert float(found.sum()) < 0.45 * float(single.sum())
    plain = (weight - weight.sign() * one - (weight - weight.sign() * one).sign() * residual).double()
    assert bool((found <= (plain.square() * h).sum(-1) * (1 + 1e-6)).all())


def test_codes_are_those_of_the_nearest_of_all_four_values() -> None:
    values = normal(9, 50)
    for magnitudes in (normal(9, 2), normal(9, 2).abs().sort(-1).values, torch.ones(9, 2)):
        codes, found = nearest_signed(values, magnitudes)
        signs, which = (codes.long() >> 1) * 2 - 1, codes.long() & 1
        assert torch.equal(found, signs * magnitudes.gather(1, which))
        each = torch.stack([sign * magnitudes[:, [m]] for sign in (-1, 1) for m in (0, 1)])
        assert torch.equal((values - found).abs(), (values - each).abs().amin(0))


@pytest.mark.parametrize("group", [0, 32, 64])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_to_nearest_fits_each_group_by_itself(group: int, dtype: str) -> None:
    weight, coding = normal(6, 80), BinaryCoding(group, dtype)
    packed = Rtn()(weight, None, coding)
    assert packed.tensors.keys() == {"codes", "tables"}
    ends = range(0, 80, group or 80)
    for number, members in enumerate(weight.split(group or 80, 1)):
        alone = Rtn()(members, None, BinaryCoding(0, dtype))
        assert torch.equal(alone.tensors["tables"][:, 0], packed.tensors["tables"][:, number])
        inside = slice(ends[number], ends[number] + members.shape[1])
        assert torch.equal(alone.dequantize(), packed.dequantize()[:, inside])


def test_weights_of_two_magnitudes_come_back_and_zeros_stay() -> None:
    tables = torch.tensor([[0.5, 2.0], [0.0, 1.0], [0.25, 0.25]])
    weight = tables.gather(1, torch.randint(0, 2, (3, 64), generator=torch.Generator().manual_seed(5)))
    weight = weight * normal(3, 64).sign()
    assert torch.equal(round_to_magnitudes(weight, BinaryCoding(32)).dequantize(), weight)
    assert not bool(round_to_magnitudes(torch.zeros(2, 40), BinaryCoding(32)).dequantize().any())


def test_what_inputs_weigh_counts_and_those_never_seen_count_alike() -> None:
    weight, h = normal(30, 64), torch.cat([torch.full((32,), 100.0), torch.full((32,), 0.01)])
    weighted = round_to_magnitudes(weight, BinaryCoding(64), h).dequantize()
    alike = round_to_magnitudes(weight, BinaryCoding(64)).dequantize()
    error = [float(((weight - one)[:, :32].square()).sum()) for one in (weighted, alike)]
    assert error[0] < error[1]
    unseen = torch.cat([torch.zeros(32), torch.ones(32)])
    halves = fitted_magnitudes(weight, BinaryCoding(32), unseen)
    assert torch.equal(halves, fitted_magnitudes(weight, BinaryCoding(32)))


def slow_feedback(target: Tensor, gram: Tensor, order: Tensor, tables: Tensor, size: int) -> Tensor:
    """Column by column in float64, each time with the inverse of what is left of the Gram matrix."""
    left, found = target.double().clone(), torch.empty_like(target, dtype=torch.float64)
    h = gram.double() + 0.01 * gram.diagonal().mean().double() * torch.eye(len(gram), dtype=torch.float64)
    for done in range(len(order)):
        rest = order[done:]
        inverse, q = torch.linalg.inv(h[rest][:, rest]), int(rest[0])
        values = torch.cat([-tables[:, q // size], tables[:, q // size]], -1).double()
        nearest = (left[:, [q]] - values).abs().argmin(-1, keepdim=True)
        found[:, q] = values.gather(1, nearest)[:, 0]
        error = (left[:, q] - found[:, q]) / inverse[0, 0]
        left[:, rest] -= error[:, None] * inverse[0]
    return found


@pytest.mark.parametrize("size", [32, 64])
def test_feedback_is_that_of_the_slow_one(size: int) -> None:
    target, gram, coding = normal(5, 72), gram_of(72), BinaryCoding(size)
    order = torch.randperm(72, generator=torch.Generator().manual_seed(4))
    tables = fitted_magnitudes(target, coding)
    packed = codes_by_feedback(target, inverse_factor(gram, order, 0.01), order, tables, coding)
    assert torch.equal(packed.tensors["tables"].float(), tables)
    slow = slow_feedback(target, gram, order, tables, size)
    assert torch.equal(packed.dequantize().double(), slow)


@pytest.mark.parametrize("group", [0, 32])
def test_groups_along_the_order_are_fitted_to_what_they_are_then(group: int) -> None:
    target, gram, coding = normal(5, 150), gram_of(150), BinaryCoding(group)
    order, size = torch.arange(150).flip(0), group or 150
    factor = inverse_factor(gram, order, 0.01)
    packed = groups_by_feedback(target, factor, order, None, coding)
    codes = unpack_codes(packed.tensors["codes"], 2, 150)
    tables = packed.tensors["tables"]
    left, done = target[:, order].double(), factor.double()
    for column in range(150):
        if column % size == 0:
            members = left[:, column : column + size].float()
            fitted = fitted_magnitudes(members, BinaryCoding(0))[:, 0]
            torch.testing.assert_close(tables[:, column // size].float(), fitted, rtol=0.01, atol=1e-3)
        values = tables[:, column // size].double()
        signs, which = codes[:, [column]].long() // 2 * 2 - 1, codes[:, [column]].long() % 2
        error = (left[:, [column]] - signs * values.gather(1, which)) / done[column, column]
        left[:, column:] -= error * done[column, column:]


def test_weights_too_large_for_the_magnitudes_are_named() -> None:
    with pytest.raises(SettingsError, match="for tables of float16"):
        round_to_magnitudes(1e6 * normal(4, 32), BinaryCoding(32, "float16"))
