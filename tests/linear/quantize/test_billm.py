"""BiLLM: salient columns among themselves and first, and less error than without either."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tailorbird.calibrate.statistics import LinearStatistics
from tailorbird.errors import SettingsError
from tailorbird.formats.packed import BinaryCoding, Coding, FloatCoding, IntegerCoding, stored_bytes
from tailorbird.linear.error import output_error
from tailorbird.linear.quantize.billm import Billm, saliency
from tailorbird.linear.quantize.ganq import damped
from tailorbird.linear.quantize.gptq import Gptq
from tailorbird.linear.quantize.rtn import Rtn


def statistics_of(columns: int, seed: int = 0) -> LinearStatistics:
    """Of correlated inputs, some of which carry far more than others."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / torch.arange(1, columns + 1)[:, None]
    x = torch.randn(400, columns, generator=generator) @ mixing
    return LinearStatistics(x.T @ x / len(x), None, x.abs().mean(0), len(x))


def normal(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))


def test_columns_stand_by_what_the_inverse_says_of_them() -> None:
    known, weight = statistics_of(80), normal(16, 80)
    inverse = torch.linalg.inv(damped(known.gram, 0.01).double()).diagonal()
    wanted = (weight.double().square() / inverse.square()).sum(0)
    torch.testing.assert_close(saliency(weight, 1 / inverse), wanted)
    packed = Billm()(weight, known, BinaryCoding(32))
    stands = wanted[packed.tensors["order"].long()]
    assert bool((stands[1:] <= stands[:-1] * (1 + 1e-4)).all())


@pytest.mark.parametrize("group", [0, 32, 64])
def test_all_that_is_stored_is_counted(group: int) -> None:
    known, weight, coding = statistics_of(96), normal(24, 96), BinaryCoding(group)
    packed = Billm()(weight, known, coding)
    static = Billm(static_groups=True)(weight, known, coding)
    groups = -(-96 // group) if group else 1
    assert packed.nbytes == stored_bytes(coding, 24, 96, has_order=groups > 1)
    assert packed.nbytes - static.nbytes == (4 * 96 if groups > 1 else 0)
    assert 8 * static.nbytes == 24 * (2 * 96 + 32 * groups)


def test_it_is_better_than_rounding_to_nearest_and_than_four_even_steps() -> None:
    known, weight = statistics_of(128), normal(48, 128)
    static, own, even, nearest = (
        output_error(weight, one.dequantize(), known.gram, 1.0)
        for one in (
            Billm(static_groups=True)(weight, known, BinaryCoding(64)),
            Billm()(weight, known, BinaryCoding(64)),
            Gptq()(weight, known, IntegerCoding(2, 64)),
            Rtn()(weight, known, BinaryCoding(64)),
        )
    )
    assert max(static, own) < 0.95 * even
    assert max(static, own) < 0.1 * nearest


def test_salient_columns_among_themselves_lose_less() -> None:
    known, weight = statistics_of(128), normal(48, 128)
    weight[:, ::4] *= 4  # spread over all groups of neighbours
    own, neighbours = (
        output_error(
            weight, Billm(static_groups=one)(weight, known, BinaryCoding(32)).dequantize(), known.gram, 1.0
        )
        for one in (False, True)
    )
    assert own < 0.9 * neighbours


@pytest.mark.parametrize("static", [False, True])
def test_cross_moments_inputs_never_seen_and_zeros(static: bool) -> None:
    known, weight, method = statistics_of(48), normal(10, 48), Billm(static_groups=static)
    cross = 0.1 * torch.randn(48, 48, generator=torch.Generator().manual_seed(4)) @ known.gram
    asymmetric = replace(known, cross=cross)
    target = Gptq(act_order=False).prepare(asymmetric).target(weight)
    found = method(weight, asymmetric, BinaryCoding(32))
    alone = replace(method, asymmetric=False)(target, known, BinaryCoding(32))
    assert torch.equal(found.dequantize(), alone.dequantize())
    gram = known.gram.clone()
    gram[5], gram[:, 5] = 0, 0
    for seen in (gram, torch.zeros(48, 48)):
        packed = method(weight, replace(known, gram=seen), BinaryCoding(32))
        assert bool(packed.dequantize().isfinite().all())
    assert not bool(method(torch.zeros(10, 48), known, BinaryCoding(32)).dequantize().any())


@pytest.mark.parametrize("coding", [IntegerCoding(2, 64), IntegerCoding(4, 0)])
def test_it_makes_signs_and_floats_only(coding: Coding) -> None:
    known, weight = statistics_of(32), normal(6, 32)
    with pytest.raises(SettingsError, match=rf"`billm` for codes of {coding.label}.*binary=true"):
        Billm()(weight, known, coding)
    floats = Billm()(weight, known, FloatCoding("float16"))
    assert torch.equal(floats.dequantize(), weight.half().float())


def test_bad_settings_missing_statistics_and_weights_too_large_are_named() -> None:
    with pytest.raises(SettingsError, match=r"damping 0\.0 of billm"):
        Billm(damping=0.0)
    with pytest.raises(SettingsError, match="billm without calibration statistics"):
        Billm()(normal(6, 32), None, BinaryCoding(32))
    with pytest.raises(SettingsError, match="for tables of float16"):
        Billm()(1e6 * normal(6, 32), statistics_of(32), BinaryCoding(32, "float16"))
