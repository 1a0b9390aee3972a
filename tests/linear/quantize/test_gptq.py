"""GPTQ against slow float64 references that follow the formulas step by step."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from tailorbird.calibrate.statistics import LinearStatistics
from tailorbird.errors import SettingsError, TailorbirdError
from tailorbird.formats.packed import CodebookCoding, FloatCoding, GroupedCoding, IntegerCoding, PackedWeight
from tailorbird.linear.error import output_error
from tailorbird.linear.quantize.gptq import Gptq, column_residuals, inverse_factor, raised_dampings
from tailorbird.linear.quantize.grid import fit_grid
from tailorbird.linear.quantize.rtn import Rtn

PLAIN = Gptq(asymmetric=False)
CODINGS = [
    IntegerCoding(4, 32),
    IntegerCoding(3, 32, symmetric=True),
    IntegerCoding(2, 0),
    IntegerCoding(8, 64, scale_dtype="float16"),
    CodebookCoding("nf4", 32),
    CodebookCoding("fp4", 32),
]
VARIANTS = [
    Gptq(act_order=False, correction=1.0),
    Gptq(act_order=False, residual="column", correction=0.25),
    Gptq(act_order=True, static_groups=True),
    Gptq(act_order=True, static_groups=False, correction=0.5),
    Gptq(act_order=True, static_groups=True, residual="column", correction=1.0),
    Gptq(act_order=True, static_groups=False, residual="column", clip_search=False),
    Gptq(act_order=True, asymmetric=False, damping=0.1),
    Gptq(act_order=False, asymmetric=False, block_size=7),
]


def case(rows: int = 4, columns: int = 44, seed: int = 0) -> tuple[Tensor, LinearStatistics]:
    """A weight, and statistics of correlated inputs of unequal size that differ from the source's."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    spread = torch.rand(columns, generator=generator) + 0.1
    source = torch.randn(6 * columns, columns, generator=generator) @ mixing * spread
    x = source + 0.1 * torch.randn(6 * columns, columns, generator=generator) @ mixing
    weight = torch.randn(rows, columns, generator=generator) * 0.1
    statistics = LinearStatistics(
        gram=x.T @ x / len(x), cross=(source - x).T @ x / len(x), mean_abs=x.abs().mean(0), tokens=len(x)
    )
    return weight, statistics


def same(first: PackedWeight, second: PackedWeight) -> bool:
    return first.tensors.keys() == second.tensors.keys() and all(
        torch.equal(tensor, second.tensors[name]) for name, tensor in first.tensors.items()
    )


def reference(method: Gptq, weight: Tensor, statistics: LinearStatistics, coding: GroupedCoding) -> Tensor:
    """One column at a time in float64, inverting what is left of the Gram matrix anew for each.

    After column `q` has been rounded to `v`, the columns `F` not yet rounded change by
    `-(w_q - v) / [A]_qq * [A]_qF`, `A` the inverse of the Gram matrix of `q` and `F` (GPTQ, eq. 3), plus
    for asymmetric calibration `w_q D_qF (H_FF)^-1` (GPTAQ, the residual of one column).
    """
    columns = weight.shape[1]
    size = min(coding.group_size or columns, columns)
    current = weight.double()
    gram = statistics.gram.double()
    energies = gram.diagonal().clone()
    gram = gram + method.damping * energies.mean() * torch.eye(columns, dtype=torch.float64)
    cross = statistics.cross.double() if method.asymmetric and statistics.cross is not None else None
    if cross is not None and method.residual == "whole":
        current = current + method.correction * current @ cross @ torch.linalg.inv(gram)
    order = list(range(columns))
    if method.act_order:
        order.sort(key=lambda column: -float(energies[column]))

    def grid_of(members: list[int]) -> tuple[Tensor, Tensor]:
        one_group = dataclasses.replace(coding, group_size=0)
        scales, zeros = fit_grid(
            current[:, members].float(), one_group, energies[members].float(), method.clip_search
        )
        middle = torch.full((len(current),), float(2 ** (coding.bits - 1)), dtype=torch.float64)
        return scales.double()[:, 0], middle if zeros is None else zeros.double()[:, 0]

    static = method.act_order and method.static_groups
    groups: dict[int, tuple[Tensor, Tensor]] = {}
    if static:
        for start in range(0, columns, size):
            groups[start // size] = grid_of(list(range(start, min(start + size, columns))))
    result = torch.empty_like(current)
    for place, column in enumerate(order):
        group = column // size if static else place // size
        if group not in groups:
            groups[group] = grid_of(order[place : place + size])
        scale, zero = groups[group]
        old = current[:, column].clone()
        if coding.levels is None:
            steps = ((old / scale).round() + zero).clamp(0, 2**coding.bits - 1) - zero
        else:
            levels = coding.levels.double()
            steps = levels[((old / scale)[:, None] - levels).abs().argmin(1)]
        result[:, column] = scale * steps
        left = order[place:]
        inverse = torch.linalg.inv(gram[left][:, left])
        change = -(old - result[:, column])[:, None] / inverse[0, 0] * inverse[0]
        current[:, left] += change
        after = order[place + 1 :]
        if cross is not None and method.residual == "column" and after:
            share = cross[column, after] @ torch.linalg.inv(gram[after][:, after])
            current[:, after] += method.correction * old[:, None] * share
    return result


@pytest.mark.parametrize("coding", CODINGS, ids=lambda coding: coding.label)
@pytest.mark.parametrize("method", VARIANTS, ids=str)
def test_it_is_the_formula(method: Gptq, coding: GroupedCoding) -> None:
    for rows, columns in ((4, 44), (1, 70)):
        weight, statistics = case(rows, columns)
        found = method(weight, statistics, coding).dequantize(torch.float32).double()
        expected = reference(method, weight, statistics, coding)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_the_factor_is_the_cholesky_factor_of_the_inverse() -> None:
    _, statistics = case()
    order = torch.randperm(44, generator=torch.Generator().manual_seed(1))
    factor = inverse_factor(statistics.gram, order, 0.01).double()
    assert torch.equal(factor, factor.triu())
    damped = statistics.gram.double()[order][:, order]
    damped += 0.01 * damped.diagonal().mean() * torch.eye(44)
    expected = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    torch.testing.assert_close(factor, expected, rtol=1e-3, atol=1e-4)


def test_column_residuals_are_the_solutions_per_column() -> None:
    _, statistics = case()
    assert statistics.cross is not None
    order = torch.arange(43, -1, -1)
    factor = inverse_factor(statistics.gram, order, 0.01)
    found = column_residuals(statistics.cross, order, factor).double()
    damped = statistics.gram.double() + 0.01 * statistics.gram.double().diagonal().mean() * torch.eye(44)
    damped, cross = damped[order][:, order], statistics.cross.double()[order][:, order]
    for column in range(43):
        after = slice(column + 1, 44)
        expected = torch.linalg.solve(damped[after, after], cross[column, after])
        torch.testing.assert_close(found[column, after], expected, rtol=1e-2, atol=1e-4)
        assert not bool(found[column, : column + 1].any())


@pytest.mark.parametrize("method", VARIANTS, ids=str)
def test_block_size_does_not_matter(method: Gptq) -> None:
    weight, statistics = case(5, 172)
    coding = IntegerCoding(3, 64)
    whole = dataclasses.replace(method, block_size=1000)(weight, statistics, coding)
    for block_size in (1, 32, 100, 128):
        parts = dataclasses.replace(method, block_size=block_size)(weight, statistics, coding)
        assert same(whole, parts)


@pytest.mark.parametrize("coding", CODINGS, ids=lambda coding: coding.label)
@pytest.mark.parametrize("act_order", [False, True])
def test_with_uncorrelated_inputs_of_one_size_it_rounds_to_nearest(
    coding: GroupedCoding, act_order: bool
) -> None:
    weight, statistics = case(3, 172)
    white = LinearStatistics(2.5 * torch.eye(172), None, statistics.mean_abs, 1)
    assert same(Gptq(act_order=act_order)(weight, white, coding), Rtn()(weight, white, coding))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group_size", [0, 32, 128])
def test_it_beats_rounding_to_nearest_on_correlated_inputs(bits: int, group_size: int) -> None:
    weight, statistics = case(24, 172, seed=bits)
    coding = IntegerCoding(bits, group_size)
    nearest = output_error(weight, Rtn()(weight, statistics, coding).dequantize(), statistics.gram)
    for method in (
        PLAIN,
        dataclasses.replace(PLAIN, act_order=False),
        dataclasses.replace(PLAIN, static_groups=False),
    ):
        fed_back = output_error(weight, method(weight, statistics, coding).dequantize(), statistics.gram)
        assert fed_back < 0.9 * nearest


@pytest.mark.parametrize("method", VARIANTS, ids=str)
def test_without_difference_to_the_source_asymmetric_calibration_changes_nothing(method: Gptq) -> None:
    weight, statistics = case(4, 100)
    coding = IntegerCoding(3, 32)
    zero = dataclasses.replace(statistics, cross=torch.zeros_like(statistics.gram))
    plain = dataclasses.replace(method, asymmetric=False)(weight, statistics, coding)
    assert same(method(weight, zero, coding), plain)
    assert same(method(weight, dataclasses.replace(statistics, cross=None), coding), plain)


@pytest.mark.parametrize(("residual", "correction"), [("whole", 1.0), ("whole", 0.5), ("column", 0.25)])
def test_asymmetric_calibration_comes_closer_to_the_source(residual: str, correction: float) -> None:
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(96, 96, generator=generator) / 10
    source = torch.randn(2000, 96, generator=generator) @ mixing
    x = source + 0.3 * torch.randn(2000, 96, generator=generator) @ mixing
    weight = torch.randn(16, 96, generator=generator)
    statistics = LinearStatistics(x.T @ x / 2000, (source - x).T @ x / 2000, x.abs().mean(0), 2000)
    coding = IntegerCoding(4, 32)

    def distance(method: Gptq) -> float:
        output = x @ method(weight, statistics, coding).dequantize().T
        return float((output - source @ weight.T).square().mean())

    assert distance(Gptq(residual=residual, correction=correction)) < 0.99 * distance(PLAIN)


@pytest.mark.parametrize("group_size", [0, 64])
def test_with_act_order_the_order_of_the_inputs_does_not_matter(group_size: int) -> None:
    weight, statistics = case(4, 172)
    coding = IntegerCoding(3, group_size)
    generator = torch.Generator().manual_seed(1)
    mixed = torch.cat(  # inside groups, so that static groups keep their members
        [first + torch.randperm(min(64, 172 - first), generator=generator) for first in (0, 64, 128)]
    )
    permuted = LinearStatistics(statistics.gram[mixed][:, mixed], None, statistics.mean_abs[mixed], 1)
    for method in (PLAIN, dataclasses.replace(PLAIN, static_groups=False)):
        straight = method(weight, statistics, coding).dequantize()
        torch.testing.assert_close(
            method(weight[:, mixed], permuted, coding).dequantize(), straight[:, mixed]
        )


def test_an_order_is_stored_only_where_groups_follow_it() -> None:
    weight, statistics = case(2, 100)
    for method, group_size, stored in (
        (Gptq(), 32, False),
        (Gptq(act_order=False), 32, False),
        (Gptq(static_groups=False), 32, True),
        (Gptq(static_groups=False), 0, False),
    ):
        packed = method(weight, statistics, IntegerCoding(4, group_size))
        assert ("order" in packed.tensors) == stored
    order = Gptq(static_groups=False)(weight, statistics, IntegerCoding(4, 32)).tensors["order"]
    assert bool((statistics.gram.diagonal()[order.long()].diff() <= 0).all())


def test_inputs_that_were_never_seen_are_rounded_to_nearest() -> None:
    weight, statistics = case(4, 64)
    dead = torch.zeros(64, dtype=torch.bool)
    dead[[0, 5, 63]] = True
    gram = statistics.gram.masked_fill(dead | dead[:, None], 0)
    coding = IntegerCoding(8, 0)
    found = PLAIN(weight, LinearStatistics(gram, None, statistics.mean_abs, 1), coding).dequantize()
    step = (weight.amax(1) - weight.amin(1)) / 255
    assert bool(((found - weight).abs()[:, dead] <= 0.6 * step[:, None]).all())
    nothing = LinearStatistics(torch.zeros(64, 64), None, torch.zeros(64), 1)
    unweighted = Rtn()(weight, None, coding)
    assert same(Gptq(clip_search=False)(weight, nothing, coding), Rtn(False)(weight, None, coding))
    assert unweighted.tensors.keys() == PLAIN(weight, nothing, coding).tensors.keys()


def test_damping_is_raised_until_the_matrix_can_be_factorized() -> None:
    weight, _ = case(4, 32)
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
    indefinite = torch.outer(direction, direction)
    indefinite -= 0.02 * torch.trace(indefinite) / 32 * torch.eye(32)  # more than one per cent below zero
    statistics = LinearStatistics(indefinite, None, direction.abs(), 1)
    found = PLAIN(weight, statistics, IntegerCoding(4, 32)).dequantize()
    assert float((found - weight).abs().max()) < 1
    strong = dataclasses.replace(PLAIN, damping=0.1)(weight, statistics, IntegerCoding(4, 32))
    assert torch.equal(found, strong.dequantize())


def test_a_damping_that_was_raised_is_told_once_for_all_weights_of_an_input() -> None:
    weight, statistics = case(4, 32)
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
    indefinite = torch.outer(direction, direction)
    indefinite -= 0.02 * torch.trace(indefinite) / 32 * torch.eye(32)
    without = dataclasses.replace(statistics, gram=indefinite, cross=None)
    coding = IntegerCoding(4, 32)
    raised: list[float] = []
    with raised_dampings(raised):
        PLAIN(weight, statistics, coding)
        assert raised == []
        rounded = PLAIN.prepare(without)
        rounded(weight, coding)
        rounded(2 * weight, coding)
    assert raised == [pytest.approx(0.1)]
    PLAIN(weight, without, coding)
    assert len(raised) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_statistics_that_are_not_finite_are_refused(value: float) -> None:
    weight, statistics = case(2, 32)
    assert statistics.cross is not None
    for place in ((0, 0), (3, 1)):
        gram, cross = statistics.gram.clone(), statistics.cross.clone()
        gram[place] = gram[place[::-1]] = value
        cross[place] = value
        with pytest.raises(TailorbirdError, match="finite"):
            Gptq()(weight, dataclasses.replace(statistics, gram=gram), IntegerCoding(4, 32))
        with pytest.raises(TailorbirdError, match="finite"):
            Gptq()(weight, dataclasses.replace(statistics, cross=cross), IntegerCoding(4, 32))


@pytest.mark.parametrize("method", VARIANTS, ids=str)
def test_arguments_stay_as_they_are_and_the_result_is_the_same_bits(method: Gptq) -> None:
    weight, statistics = case(4, 100)
    assert statistics.cross is not None
    before = [tensor.clone() for tensor in (weight, statistics.gram, statistics.cross)]
    first, second = (method(weight, statistics, IntegerCoding(4, 32)) for _ in range(2))
    assert same(first, second)
    for tensor, old in zip((weight, statistics.gram, statistics.cross), before, strict=True):
        assert torch.equal(tensor, old)


def test_float_codings_need_no_feedback() -> None:
    weight, _ = case()
    packed = Gptq()(weight, None, FloatCoding("bfloat16"))
    assert torch.equal(packed.dequantize(), weight.bfloat16().float())


def test_wrong_settings_and_missing_statistics_are_refused() -> None:
    with pytest.raises(SettingsError, match="statistics"):
        Gptq()(case()[0], None, IntegerCoding(4, 32))
    for wrong in ({"block_size": 0}, {"damping": 0.0}, {"residual": "half"}, {"correction": 1.5}):
        with pytest.raises(SettingsError, match=next(iter(wrong))):
            Gptq(**wrong)  # type: ignore[arg-type]


def test_what_it_needs_follows_from_its_settings() -> None:
    assert Gptq().needs == {"gram", "cross"}
    assert PLAIN.needs == {"gram"}
    assert Rtn().needs == set()


@pytest.mark.parametrize("coding", CODINGS, ids=lambda coding: coding.label)
@pytest.mark.parametrize("method", [PLAIN, Gptq(asymmetric=False, act_order=False)], ids=["order", "plain"])
def test_codes_for_a_given_grid_lie_on_it_and_its_values_are_found_again(
    coding: GroupedCoding, method: Gptq
) -> None:
    weight, statistics = case()
    grid = fit_grid(weight, coding)
    packed = method.prepare(statistics)(weight + 0.01, coding, grid)
    assert torch.equal(packed.tensors["scales"], grid[0])
    assert "order" not in packed.tensors
    again = method.prepare(statistics)(packed.dequantize(), coding, grid)
    assert same(packed, again)


def test_its_own_grid_given_changes_nothing() -> None:
    weight, statistics = case()
    coding = IntegerCoding(4, 32)
    grid = fit_grid(weight, coding, statistics.gram.diagonal())
    assert same(PLAIN.prepare(statistics)(weight, coding, grid), PLAIN(weight, statistics, coding))
