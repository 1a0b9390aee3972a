"""Vectors take the nearest point, and with error feedback never a worse one than the nearest, all told."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tailorbird.calibrate.statistics import LinearStatistics
from tailorbird.errors import SettingsError
from tailorbird.formats.codebooks import POINTS, VECTOR_UNITS
from tailorbird.formats.packed import IntegerCoding, VectorCoding
from tailorbird.kernels.packing import unpack_codes
from tailorbird.linear.error import row_energies
from tailorbird.linear.quantize.gptq import Gptq
from tailorbird.linear.quantize.points import deviations, nearest_points, round_to_points
from tailorbird.linear.quantize.points_feedback import IN_ORDER, points_by_feedback
from tailorbird.linear.quantize.rtn import Rtn

NAMES = list(VECTOR_UNITS)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def statistics(columns: int) -> LinearStatistics:
    """Of inputs that depend on each other."""
    inputs = normal(4 * columns, columns) @ (normal(columns, columns, seed=1) / 8 + torch.eye(columns))
    return LinearStatistics(inputs.t() @ inputs / len(inputs), None, inputs.abs().mean(0), len(inputs))


@pytest.mark.parametrize("columns", [128, 129, 131])
@pytest.mark.parametrize("name", NAMES)
def test_a_code_is_the_nearest_point_of_the_scaled_grid(name: str, columns: int) -> None:
    weight, coding = normal(6, columns), VectorCoding(name, 32)
    packed = round_to_points(weight, coding)
    dimension = coding.dimension
    count = -(-columns // dimension)
    codes = unpack_codes(packed.tensors["codes"], coding.code_bits, count).long()
    for row in range(6):
        for vector in range(count):
            group = vector * dimension // 32
            values = weight[row, vector * dimension : (vector + 1) * dimension]
            candidates = float(packed.tensors["scales"][row, group]) * coding.levels.double()
            # what isn't there counts as zero
            lost = candidates.square()
            lost[:, : len(values)] = (candidates[:, : len(values)] - values.double()).square()
            assert float(lost.sum(1)[codes[row, vector]]) <= float(lost.sum(1).min()) * (1 + 1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_scales_are_those_of_the_mean_square(name: str) -> None:
    weight = normal(5, 200) * torch.logspace(-3, 3, 5)[:, None]
    packed = Rtn()(weight, None, VectorCoding(name, 64))
    expected = deviations(weight, 64) / VECTOR_UNITS[name]
    torch.testing.assert_close(packed.tensors["scales"].float(), expected, rtol=2.0**-8, atol=0)


def test_deviations_of_a_last_group_that_is_shorter() -> None:
    weight = torch.cat([torch.full((2, 64), 3.0), torch.full((2, 10), -5.0)], 1)
    assert deviations(weight, 64).tolist() == [[3.0, 5.0]] * 2
    assert deviations(weight, 0).shape == (2, 1)


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_zeros_stay_so_or_nearly(name: str) -> None:
    weight = normal(3, 64)
    weight[1] = 0
    found = Rtn()(weight, None, VectorCoding(name, 32)).dequantize()
    assert float(found[1].abs().max()) < 1e-30


@pytest.mark.parametrize("name", NAMES)
def test_feedback_on_inputs_that_are_independent_is_rounding_to_nearest(name: str) -> None:
    weight, coding = normal(8, 160), VectorCoding(name, 32)
    known = LinearStatistics(torch.eye(160), None, torch.ones(160), 160)
    nearest = round_to_points(weight, coding)
    scales = nearest.tensors["scales"]
    found = points_by_feedback(IN_ORDER.prepare(known), weight, scales, coding)
    assert torch.equal(found.tensors["codes"], nearest.tensors["codes"])


@pytest.mark.parametrize("columns", [256, 163])
@pytest.mark.parametrize("name", NAMES)
def test_feedback_makes_up_for_errors(name: str, columns: int) -> None:
    weight, coding, known = normal(32, columns), VectorCoding(name, 64), statistics(columns)
    nearest = round_to_points(weight, coding)
    found = points_by_feedback(IN_ORDER.prepare(known), weight, nearest.tensors["scales"], coding)
    ours, theirs = (
        float(row_energies(weight - one.dequantize(), known.gram).sum()) for one in (found, nearest)
    )
    assert ours < 0.8 * theirs


def test_feedback_is_gptq_where_a_point_is_a_pair_of_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors that follow columns are those of GPTQ, which goes one by one: the sum of all is their measure.

    With inputs that depend on each other only across vectors the two choose the same codes.
    """
    columns = 64
    weight, coding = normal(8, columns), VectorCoding("gauss2x2", 0)
    product = torch.cartesian_prod(*[torch.tensor([-2, -1, 0, 1], dtype=torch.int8)] * 2)
    monkeypatch.setitem(POINTS, "gauss2x2", product)
    even = normal(600, columns // 2)
    odd = normal(600, columns // 2, seed=9)
    mixed = normal(columns // 2, columns // 2, seed=3) / 6 + torch.eye(columns // 2)
    mix = [one @ mixed for one in (even, odd)]
    inputs = torch.stack(mix, 2).reshape(600, columns)
    gram = inputs.t() @ inputs / 600
    gram = gram * ((torch.arange(columns)[:, None] - torch.arange(columns)) % 2 == 0)
    known = LinearStatistics(gram, None, inputs.abs().mean(0), 600)
    scales = (weight.abs().amax(1, keepdim=True) / 2).bfloat16()
    found = points_by_feedback(IN_ORDER.prepare(known), weight, scales, coding).dequantize()
    integers = IntegerCoding(2, 0, symmetric=True)
    one_by_one = Gptq(asymmetric=False, act_order=False).prepare(known)(weight, integers, (scales, None))
    assert torch.equal(found, one_by_one.dequantize())


def test_weights_beyond_the_scales_are_refused() -> None:
    with pytest.raises(SettingsError, match="bfloat16 scales"):
        Rtn()(normal(4, 64) * 1e8, None, VectorCoding("gauss2x2", 64, "float16"))


def test_nearest_points_work_through_rows_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, coding = normal(16, 64), VectorCoding("gauss3x2", 32)
    scales = round_to_points(weight, coding).tensors["scales"]
    whole = nearest_points(weight, scales, coding)
    monkeypatch.setattr("tailorbird.linear.quantize.points.CHUNK_PRODUCTS", 1)
    assert torch.equal(nearest_points(weight, scales, coding), whole)


@pytest.mark.parametrize("name", NAMES)
def test_a_transposed_weight_takes_the_same_points(name: str) -> None:
    weight, coding = normal(64, 48).t(), VectorCoding(name, 32)
    found, expected = (round_to_points(one, coding) for one in (weight, weight.contiguous()))
    assert torch.equal(found.tensors["codes"], expected.tensors["codes"])
