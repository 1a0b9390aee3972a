"""LLM.int8(): the largest inputs keep their columns, and neither grids nor steps of inputs span them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tailorbird.calibrate.statistics import LinearStatistics
from tailorbird.errors import SettingsError
from tailorbird.formats.modules import CompressedLinear
from tailorbird.formats.packed import CodebookCoding, GroupedCoding, IntegerCoding, PackedWeight
from tailorbird.formats.sparse import Sparse
from tailorbird.kernels import native
from tailorbird.kernels.reference import SEGMENT
from tailorbird.linear.outliers import beside_base, sparse_of, without_outliers
from tailorbird.linear.quantize.llm_int8 import LlmInt8
from tailorbird.linear.quantize.rtn import Rtn

built = pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")
ROWS, COLUMNS, SHARE = 48, 200, 0.02
OUTLIERS = [3, 17, 150, 199]
CODINGS: list[GroupedCoding] = [
    IntegerCoding(8, 0, symmetric=True), IntegerCoding(8, 64), IntegerCoding(4, 32), CodebookCoding("fp4", 64)
]  # fmt: skip


def case(seed: int = 0) -> tuple[Tensor, Tensor, LinearStatistics]:
    """A weight, inputs of which some are 100 times larger than others, and their statistics."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(ROWS, COLUMNS, generator=generator)
    x = torch.randn(300, COLUMNS, generator=generator)
    x[:, OUTLIERS] *= 100
    gram, largest = x.T @ x / len(x), x.abs().amax(0)
    return weight, x, LinearStatistics(gram, None, x.abs().mean(0), len(x), max_abs=largest)


@pytest.mark.parametrize("coding", CODINGS, ids=lambda coding: coding.label)
def test_columns_of_the_largest_inputs_stand_apart_and_no_grid_spans_them(coding: GroupedCoding) -> None:
    weight, _, statistics = case()
    weight[:, OUTLIERS] *= 50
    method = LlmInt8(outliers=SHARE)
    packed = method(weight, statistics, coding)
    assert packed.sparse == Sparse(ROWS * len(OUTLIERS)) == sparse_of(method, ROWS, COLUMNS)
    rest = [column for column in range(COLUMNS) if column not in OUTLIERS]
    assert torch.equal(packed.dequantize()[:, OUTLIERS], weight[:, OUTLIERS].bfloat16().float())
    assert not packed.base.dequantize()[:, OUTLIERS].any()
    others = weight.clone()
    others[:, OUTLIERS] = 0
    plain = Rtn(clip_search=False)(others, None, coding)
    assert torch.equal(packed.dequantize()[:, rest], plain.dequantize()[:, rest])


def decomposed(packed: PackedWeight, weight: Tensor, x: Tensor) -> Tensor:
    """The paper's product in float64: the rest by inputs rounded to bytes, outliers by inputs as they are.

    The bytes of a token have one scale for each segment, which the outliers don't see.
    """
    rest = [column for column in range(COLUMNS) if column not in OUTLIERS]
    x = x.double()
    rounded = torch.zeros_like(x)
    for start in range(0, COLUMNS, SEGMENT):
        own = [column for column in rest if start <= column < start + SEGMENT]
        step = x[:, own].abs().amax(1, keepdim=True) / 127
        rounded[:, own] = (x[:, own] / step).round() * step
    exact = x[:, OUTLIERS] @ weight[:, OUTLIERS].bfloat16().double().t()
    return rounded[:, rest] @ packed.base.dequantize().double()[:, rest].t() + exact


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_is_the_papers(dtype: torch.dtype) -> None:
    weight, x, statistics = case()
    x = x.to(dtype)
    packed = LlmInt8(outliers=SHARE)(weight, statistics, IntegerCoding(8, 0, symmetric=True))
    module = CompressedLinear.from_packed(packed, rounds=True)
    assert module.path(len(x), dtype) == "native-int8"
    expected, found = decomposed(packed, weight, x), module(x).double()
    assert (found - expected).norm() <= {torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype] * expected.norm()


@built
@pytest.mark.parametrize("to", ["int8", "fp8", "int4"])
def test_outliers_do_not_widen_the_steps_of_others(to: str) -> None:
    """However large they are, the error is that of a model without them."""
    weight, x, statistics = case()
    packed = LlmInt8(outliers=SHARE)(weight, statistics, IntegerCoding(8, 0, symmetric=True))
    rounding = {"rounds": True} if to == "int8" else {"simulated": to}
    module, exact = (CompressedLinear.from_packed(packed, **kind) for kind in (rounding, {}))
    calm = x.clone()
    calm[:, OUTLIERS] = 0
    torch.testing.assert_close(module(x) - exact(x), module(calm) - exact(calm), rtol=1e-2, atol=1e-2)
    plain = Rtn(clip_search=False)(weight, None, IntegerCoding(8, 0, symmetric=True))
    wide, base = (CompressedLinear.from_packed(plain, **kind) for kind in (rounding, {}))
    # FP8 rounds by the magnitude of each, so that others hardly matter to it
    assert (module(x) - exact(x)).norm() < {"int8": 0.1, "int4": 0.5, "fp8": 0.5}[to] * (
        wide(x) - base(x)
    ).norm()


def test_a_full_column_over_codes_that_count_is_no_input_apart() -> None:
    """What stands beside codes that aren't zeros belongs to a product of both."""
    weight, x, _ = case()
    mask = torch.zeros_like(weight, dtype=torch.bool)
    mask[:, 5] = True
    packed = beside_base(Rtn()(weight, None, IntegerCoding(8, 0)), torch.ones_like(weight), mask)
    module = CompressedLinear.from_packed(packed, simulated="int4")
    base = CompressedLinear.from_packed(packed.base, simulated="int4")
    torch.testing.assert_close(module(x), base(x) + x[:, 5:6])


def test_changed_codes_count_from_the_next_call_on() -> None:
    weight, x, statistics = case()
    module = CompressedLinear.from_packed(
        LlmInt8(outliers=SHARE)(weight, statistics, IntegerCoding(8, 0, symmetric=True)), simulated="fp8"
    )
    module(x)
    module.codes.add_(1)  # zeros are none any more
    again = CompressedLinear.from_packed(module.packed(), simulated="fp8")
    assert torch.equal(module(x), again(x))


def test_without_outliers_it_rounds_to_nearest() -> None:
    weight, _, statistics = case()
    coding = IntegerCoding(8, 64)
    for method in (LlmInt8(outliers=0.0), without_outliers(LlmInt8()), LlmInt8(outliers=0.002)):
        packed = method(weight, statistics, coding)
        assert packed.sparse is None is sparse_of(method, ROWS, COLUMNS)
        assert torch.equal(packed.dequantize(), Rtn(clip_search=False)(weight, None, coding).dequantize())


def test_bad_settings_are_named() -> None:
    with pytest.raises(SettingsError, match=r"outliers 0.5 .*a share of the weights"):
        LlmInt8(outliers=0.5)
    with pytest.raises(SettingsError, match="llm-int8 without statistics"):
        LlmInt8()(torch.ones(4, 200), None, IntegerCoding(8, 0))
