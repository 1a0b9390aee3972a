"""HIGGS: any weight loses the grid's share of itself, and nothing but codes, scales and signs is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tailorbird.calibrate.statistics import LinearStatistics
from tailorbird.errors import SettingsError
from tailorbird.formats.codebooks import UNITS, VECTOR_UNITS
from tailorbird.formats.modules import CompressedLinear
from tailorbird.formats.packed import (
    CodebookCoding,
    FloatCoding,
    IntegerCoding,
    TableCoding,
    VectorCoding,
    stored_bytes,
)
from tailorbird.formats.transform import Transform
from tailorbird.kernels.walsh import rotate
from tailorbird.linear.ends import end_method
from tailorbird.linear.error import row_energies
from tailorbird.linear.quantize.higgs import Higgs, random_signs
from tailorbird.linear.quantize.points import deviations
from tailorbird.linear.quantize.rtn import Rtn

#: mean squared error of a standard normal value at the nearest point of the grid
ERRORS = {
    "gauss2": 0.1175, "gauss2x2": 0.1076, "gauss2x4": 0.0963, "gauss3": 0.03454, "gauss3x2": 0.02978,
    "gauss4": 0.009497, "gauss4x2": 0.007823,
}  # fmt: skip


def grid(name: str, group: int, scale_dtype: str = "bfloat16") -> CodebookCoding | VectorCoding:
    kind = VectorCoding if name in VECTOR_UNITS else CodebookCoding
    return kind(name, group, scale_dtype)


CODINGS = [grid(name, 256) for name in ERRORS]


def weights(kind: str, shape: tuple[int, int] = (96, 2048)) -> Tensor:
    """Weights whose values are as far from normal ones as may be."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if kind == "signs":
        return drawn.sign()
    if kind == "cubes":
        return drawn**3
    if kind == "few large":
        return torch.where(drawn.abs() > 2, 10 * drawn, 0.01 * drawn)
    if kind == "loud columns":
        return drawn * torch.linspace(0, 3, shape[1]).exp()
    return drawn


def share_lost(weight: Tensor, found: Tensor) -> float:
    return float((weight - found).square().sum() / weight.square().sum())


@pytest.mark.parametrize("coding", CODINGS, ids=lambda coding: coding.label)
@pytest.mark.parametrize("kind", ["normal", "signs", "cubes", "few large", "loud columns"])
def test_any_weight_loses_the_share_of_the_grid(kind: str, coding: CodebookCoding | VectorCoding) -> None:
    weight = weights(kind)
    packed = Higgs()(weight, None, coding)
    lost = share_lost(weight, packed.dequantize())
    assert lost == pytest.approx(ERRORS[coding.codebook], rel=0.04)
    assert lost == pytest.approx(
        share_lost(rotate(weight, packed.tensors["signs"]), packed.behind_transform.dequantize()), rel=1e-3
    )


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("kind", ["cubes", "few large", "loud columns"])
def test_it_is_the_rotation_that_makes_them_alike(kind: str, name: str) -> None:
    weight, coding = weights(kind), grid(name, 64)
    turned, straight = (Higgs(block=block)(weight, None, coding).dequantize() for block in (1024, 1))
    # columns that are as loud as their neighbours look normal in their groups as they are
    assert share_lost(weight, turned) < 1.01 * share_lost(weight, straight)
    assert share_lost(weight, turned) < 1.03 * ERRORS[name]


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize(("columns", "block"), [(172, 4), (96, 32), (513, 1), (3072, 1024), (256, 256)])
def test_groups_and_blocks_of_any_width(columns: int, block: int, name: str) -> None:
    weight = weights("normal", (12, columns))
    for group in (0, 32, 64, 96):
        coding = grid(name, group, "float16")
        packed = Higgs()(weight, None, coding)
        assert packed.transform == Transform(block)
        assert packed.nbytes == stored_bytes(coding, 12, columns, transform=Transform(block))
        assert share_lost(weight, packed.dequantize()) < 1.15 * ERRORS[name]
        module, x = CompressedLinear.from_packed(packed), weights("normal", (5, columns))
        expected = x.double() @ packed.dequantize(torch.float64).t()
        assert (module(x).double() - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_code_is_the_nearest_point_of_the_scaled_grid() -> None:
    weight, coding = weights("cubes", (8, 128)), CodebookCoding("gauss3", 32)
    packed = Higgs(block=64)(weight, None, coding)
    turned = rotate(weight, packed.tensors["signs"])
    scales = packed.tensors["scales"].float().repeat_interleave(32, 1)
    points = scales[..., None] * coding.levels.float()
    nearest = (points - turned[..., None]).abs().amin(-1)
    found = (packed.behind_transform.dequantize() - turned).abs()
    torch.testing.assert_close(found, nearest, rtol=1e-5, atol=1e-6)
    unit = deviations(turned, 32) / UNITS["gauss3"]
    torch.testing.assert_close(packed.tensors["scales"].float(), unit, rtol=2.0**-8, atol=0)


@pytest.mark.parametrize("name", ERRORS)
def test_feedback_makes_up_for_errors_in_the_inputs_as_they_come(name: str) -> None:
    """With inputs that depend on each other the outputs lose less, though weights lose more."""
    weight, coding = weights("normal", (24, 160)), grid(name, 32)
    inputs = weights("normal", (900, 160)) @ (weights("cubes", (160, 160)) / 40 + torch.eye(160))
    known = LinearStatistics(inputs.t() @ inputs / len(inputs), None, inputs.abs().mean(0), len(inputs))
    plain, fed = (Higgs(feedback=on)(weight, known, coding) for on in (False, True))
    lost = [float(row_energies(weight - packed.dequantize(), known.gram).sum()) for packed in (plain, fed)]
    assert lost[1] < 0.8 * lost[0]
    assert share_lost(weight, fed.dequantize()) > share_lost(weight, plain.dequantize())
    for part in ("scales", "signs"):
        assert torch.equal(fed.tensors[part], plain.tensors[part])
    prepared = Higgs(feedback=True).prepare(known)
    for rows in (weight, 2 * weight[:5]):
        whole = Higgs(feedback=True)(rows, known, coding)
        assert torch.equal(prepared(rows, coding).tensors["codes"], whole.tensors["codes"])


@pytest.mark.parametrize("name", ["gauss3", "gauss2x4"])
def test_feedback_needs_statistics_and_nothing_else_does(name: str) -> None:
    assert (Higgs().needs, Higgs(feedback=True).needs) == (frozenset(), {"gram"})
    with pytest.raises(SettingsError, match="higgs without calibration statistics"):
        Higgs(feedback=True)(weights("normal", (4, 64)), None, grid(name, 32))


def test_signs_follow_from_the_seed_alone() -> None:
    signs = random_signs(Transform(64), 256, 7)
    assert torch.equal(signs, random_signs(Transform(64), 256, 7))
    assert not torch.equal(signs, random_signs(Transform(64), 256, 8))
    assert signs.unique().tolist() == [-1, 1]
    weight, coding = weights("cubes", (8, 128)), CodebookCoding("gauss4", 0)
    first, second = (Higgs(seed=seed)(weight, None, coding).tensors for seed in (0, 1))
    assert not torch.equal(first["signs"], second["signs"])
    again = Higgs()(weight, None, coding).tensors
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())


def test_zeros_stay_zeros_or_nearly() -> None:
    weight = weights("normal", (6, 128))
    weight[2] = 0
    for name in ERRORS:
        packed = Higgs()(weight, None, grid(name, 64))
        assert bool(packed.dequantize().isfinite().all())
        assert float(packed.dequantize()[2].abs().max()) < 1e-30


def test_the_ends_are_rounded_to_nearest_without_a_transform() -> None:
    assert isinstance(end_method(Higgs(), CodebookCoding("gauss4", 64)), Rtn)
    assert isinstance(end_method(Higgs(), IntegerCoding(8, 64)), Rtn)
    assert isinstance(end_method(Higgs(), VectorCoding("gauss2x4", 64)), Rtn)
    weight = weights("cubes")
    assert torch.equal(Higgs()(weight, None, FloatCoding()).dequantize(), weight.bfloat16().float())


@pytest.mark.parametrize("settings", [{"block": 0}, {"block": 48}, {"block": 2048}, {"seed": -1}])
def test_settings_beyond_their_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=f"{next(iter(settings))} .* of higgs"):
        Higgs(**settings)


@pytest.mark.parametrize(
    ("coding", "match"),
    [
        (CodebookCoding("nf4", 64), "codebook nf4.*gauss2, gauss3, gauss4"),
        (IntegerCoding(3, 64), "codes of int3 g64"),
        (TableCoding(3), "codes of table3"),
    ],
)
def test_other_codes_are_refused(coding: Any, match: str) -> None:
    with pytest.raises(SettingsError, match=match):
        Higgs()(weights("normal", (4, 64)), None, coding)


def test_weights_beyond_the_scales_are_refused() -> None:
    weight = weights("normal", (4, 64)) * 1e8
    assert bool(Higgs()(weight, None, CodebookCoding("gauss4", 64)).dequantize().isfinite().all())
    with pytest.raises(SettingsError, match="bfloat16 scales"):
        Higgs()(weight, None, CodebookCoding("gauss4", 64, "float16"))
