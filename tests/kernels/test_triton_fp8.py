"""FP8: codes are PyTorch's casts, products exact up to the rounding of sums, bits the same in any batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tailorbird.errors import ResourceError
from tailorbird.kernels import triton_fp8
from triton_cases import DEVICE, DTYPES, ON_GPU, of_rounding, random, with_triton

pytestmark = pytest.mark.skipif(not triton_fp8.has_fp8(DEVICE), reason="no FP8 on this GPU, or no Triton")

#: What a product in a sum may be off by: tensor cores of capability 9.0 keep 13 bits behind the first.
OFF = 2.0**-13 if ON_GPU else 2.0**-24


@given(
    columns=st.integers(1, 40), seed=st.integers(0, 9), size=st.sampled_from([0.0, 1e-35, 1e-6, 1.0, 1e30])
)
def test_codes_are_the_nearest_of_the_format(columns: int, seed: int, size: float) -> None:
    rows = random(seed, 3, columns) * size
    rows[0] *= torch.logspace(-9, 0, columns, device=DEVICE)  # down to subnormal codes
    codes = triton_fp8.to_fp8(rows)
    assert codes.values.dtype == torch.float8_e4m3fn
    restored = codes.values.double() * codes.scales.double()[:, None]
    # Four bits with the leading one, or half of the smallest step, of a scale that puts the largest at 448.
    allowed = torch.maximum(2.0**-4 * rows.abs(), 2.0**-10 * codes.scales[:, None]) * 1.0001
    assert ((restored - rows).abs() <= torch.where(codes.scales[:, None] > 0, allowed, 1e-30)).all()
    there = rows.abs().amax(-1) > 1e-30
    assert (codes.values.float().abs().amax(-1)[there] == 448).all()


def test_every_code_comes_back_as_itself() -> None:
    every = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(torch.float8_e4m3fn).float()
    finite = every[every.isfinite()][None]
    for codes in (triton_fp8.to_fp8(finite), triton_fp8.round_rows(finite)):
        assert torch.equal(codes.values.float(), finite)
        assert codes.scales.tolist() == [1.0]


@given(
    dtype=st.sampled_from(DTYPES),
    inputs=st.sampled_from([1, 100, 1500]),
    size=st.sampled_from([1e-35, 1e-3, 9.0]),
)
@settings(max_examples=20, deadline=None)
def test_the_kernel_rounds_as_the_cast_does(dtype: torch.dtype, inputs: int, size: float) -> None:
    x = (random(inputs, 4, inputs) * size * torch.logspace(-6, 0, inputs, device=DEVICE)).to(dtype)
    x[1] = 0.0
    # The largest of this row makes its scale 1 / 448: the others are ties between codes.
    x[2] = ((torch.arange(inputs, device=DEVICE) % 15 + 0.5) / 64).to(dtype)
    x[2, 0] = 1.0
    expected, found = triton_fp8.to_fp8(x), triton_fp8.round_rows(x)
    assert torch.equal(found.scales, expected.scales)
    assert torch.equal(found.values.float(), expected.values.float())


@given(
    dtype=st.sampled_from(DTYPES),
    rows=st.sampled_from([1, 5, 65]),
    shape=st.tuples(st.sampled_from([1, 65, 130]), st.sampled_from([1, 31, 172, 700])),
)
@settings(max_examples=20, deadline=None)
def test_products_are_exact_up_to_rounding(dtype: torch.dtype, rows: int, shape: tuple[int, int]) -> None:
    x, weight = random(rows, rows, shape[1], dtype=dtype), triton_fp8.to_fp8(random(7, *shape))
    codes = triton_fp8.to_fp8(x)
    left, right = (part.values.double() * part.scales.double()[:, None] for part in (codes, weight))
    exact = left @ right.t()
    product = triton_fp8.linear(x, weight)
    assert product.dtype == dtype
    bound = (OFF + (shape[1] + 4) * 2.0**-24) * (left.abs() @ right.abs().t())
    bound += of_rounding(exact.abs() + bound, dtype)
    assert ((product.double() - exact).abs() <= bound).all()


def test_a_row_has_the_same_bits_alone_and_among_others() -> None:
    weight = triton_fp8.to_fp8(random(1, 70, 500))
    x = random(2, 40, 500, dtype=torch.bfloat16)
    together = triton_fp8.linear(x, weight)
    for row in (0, 17, 39):
        assert torch.equal(triton_fp8.linear(x[row : row + 1], weight)[0], together[row])


@pytest.mark.skipif(not ON_GPU, reason="the interpreter sums in NumPy's order, which depends on the tile")
def test_every_launch_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = triton_fp8.to_fp8(random(1, 300, 1000)), random(2, 300, 1000, dtype=torch.bfloat16)
    results = []
    for launch in triton_fp8.LAUNCHES:
        monkeypatch.setattr(triton_fp8, "LAUNCHES", (launch,))
        results.append(triton_fp8.linear(x, weight))
    assert all(torch.equal(result, results[0]) for result in results)


def test_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = triton_fp8.to_fp8(random(1, 8, 64))
    assert triton_fp8.linear(torch.empty(0, 64, device=DEVICE), weight).shape == (0, 8)
    with pytest.raises(ValueError, match="expected two dimensions of a float dtype"):
        triton_fp8.linear(torch.zeros(2, 64, device=DEVICE, dtype=torch.float64), weight)
    with pytest.raises(ValueError, match=r"expected \[rows, in_features\]"):
        triton_fp8.linear(torch.zeros(2, 63, device=DEVICE), weight)
    monkeypatch.setattr(triton_fp8, "has_fp8", lambda device: False)
    with pytest.raises(ResourceError, match=r"expected: 8\.9 or more"):
        triton_fp8.linear(torch.zeros(2, 64, device=DEVICE), weight)


@with_triton
@pytest.mark.parametrize(
    ("capability", "has"), [((8, 0), False), ((8, 9), True), ((9, 0), True), ((12, 0), True)]
)
def test_fp8_needs_compute_capability(
    capability: tuple[int, int], has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert triton_fp8.has_fp8(torch.device("cuda")) == has
