"""Fast paths against the exact reference.

The tolerance follows from bfloat16's unit roundoff u = 2**-8. Against the exact product y = sum(x * w) a
fast path may differ by

- u * |y|, its own output being rounded once;
- u * sum(|x| * |w|) where scales are float16 and get rounded to bfloat16;
- u * 8 * sum(|x| * scale) for 4 bits with zero points, whose offset `scale * (8 - zero)` is rounded;
- float32 accumulation: n * 2**-24 * sum(|x| * 2**bits * scale), n terms being summed.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packed_weights import laid_out, random_packed
from tailorbird.formats.packed import GROUP_SIZES, IntegerCoding, PackedWeight
from tailorbird.kernels import cpu, dispatch
from tailorbird.kernels.packing import BITS

CPU = torch.device("cpu")
BF16 = torch.bfloat16
CODINGS = [
    IntegerCoding(bits, group_size, symmetric)
    for bits in BITS
    for group_size in (0, 96)
    for symmetric in (False, True)
]


def fast_path(coding: IntegerCoding, in_features: int) -> dispatch.Path:
    path = dispatch.find(coding, in_features, 1, BF16, CPU)
    if path is None:
        pytest.skip("no fast path on this processor")
    return path


def tolerance(x: torch.Tensor, packed: PackedWeight, exact: torch.Tensor) -> torch.Tensor:
    unit = 2.0**-8
    coding, count = packed.coding, packed.in_features
    weight = packed.dequantize(torch.float64)
    size = coding.group_size or count
    scales = packed.tensors["scales"].double()[:, torch.arange(count) // size]
    bound = unit * exact.abs()
    if coding.scale_dtype == "float16":
        bound = bound + unit * (x.abs() @ weight.abs().t())
    if coding.bits == 4 and not coding.symmetric:
        bound = bound + unit * 8 * (x.abs() @ scales.t())
    accumulated = x.abs() @ (scales.t() * 2**coding.bits)
    return (bound + 2 * count * 2.0**-24 * accumulated) * (1 + unit)


@given(
    bits=st.sampled_from(BITS),
    group_size=st.sampled_from(GROUP_SIZES),
    symmetric=st.booleans(),
    scale_dtype=st.sampled_from(["bfloat16", "float16"]),
    rows=st.sampled_from([1, 2, 3, 4, 5, 17, 32]),
    shape=st.tuples(
        st.sampled_from([1, 5, 16, 40, 64, 130]), st.sampled_from([1, 31, 64, 172, 256, 320, 1023])
    ),
    seed=st.integers(0, 99),
)
@settings(max_examples=100, deadline=None)
def test_fast_and_exact_agree_within_bfloat16(
    bits, group_size, symmetric, scale_dtype, rows, shape, seed
) -> None:
    coding = IntegerCoding(bits, group_size, symmetric, scale_dtype)
    packed = random_packed(coding, shape)
    path = fast_path(coding, shape[1])
    generator = torch.Generator().manual_seed(seed)
    # a mean that isn't zero: an error of an offset adds up over the inputs
    x = (torch.randn(rows, shape[1], generator=generator) + 0.5).to(BF16)
    exact = x.double() @ packed.dequantize(torch.float64).t()
    result = path.multiply(x, laid_out(path.prepare, packed))
    assert result.shape == (rows, shape[0])
    assert result.dtype == BF16
    error = (result.double() - exact).abs()
    assert (error <= tolerance(x.double(), packed, exact)).all()


@pytest.mark.parametrize("coding", CODINGS, ids=lambda coding: coding.label)
def test_a_row_gives_the_same_bits_alone_and_in_a_batch(coding: IntegerCoding) -> None:
    packed = random_packed(coding, (80, 344))
    path = fast_path(coding, 344)
    layout = laid_out(path.prepare, packed)
    x = torch.randn(13, 344).to(BF16)
    together = path.multiply(x, layout)
    for row in range(13):
        assert torch.equal(path.multiply(x[row : row + 1], layout)[0], together[row])


@pytest.mark.parametrize("coding", CODINGS, ids=lambda coding: coding.label)
def test_chunks_do_not_show_in_the_layout(coding: IntegerCoding, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = random_packed(coding, (200, 172))
    path = fast_path(coding, 172)
    whole = laid_out(path.prepare, packed)
    monkeypatch.setattr(cpu, "CHUNK_VALUES", 1)
    pieces = laid_out(path.prepare, packed)
    for field in dataclasses.fields(whole):
        left, right = getattr(whole, field.name), getattr(pieces, field.name)
        assert torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("in_features", [1, 31, 32, 64, 172, 256, 320, 1000, 4096])
def test_operator_groups_never_mix_scales(group_size: int, in_features: int) -> None:
    group, columns = cpu.operator_group(in_features, group_size)
    assert group in (32, 64, 128, 256)
    assert columns % group == 0
    assert in_features <= columns < in_features + group
    if 0 < group_size < in_features:
        assert group_size % group == 0
