"""The `gguf` package reads our blocks as exactly the numbers that were packed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressed import pack
from tailorbird.errors import ExportError
from tailorbird.formats.gguf import (
    blocks,
    gguf_bytes,
    gguf_type,
    interleave_rotary,
    interleave_weight,
    refusal,
)
from tailorbird.formats.packed import FloatCoding, IntegerCoding, PackedWeight

gguf = pytest.importorskip("gguf")
dequantize, quantize = gguf.quants.dequantize, gguf.quants.quantize


def theirs(packed):
    kind = gguf.GGMLQuantizationType[gguf_type(packed.coding)]
    return torch.from_numpy(dequantize(blocks(packed).numpy(), kind).copy())


@settings(deadline=None, max_examples=60)
@given(
    bits=st.sampled_from([2, 3, 4, 5, 6, 8]),
    group=st.sampled_from([0, 32, 64, 96, 128]),
    rows=st.sampled_from([1, 7, 64]),
    columns=st.sampled_from([32, 64, 160, 256]),
    seed=st.integers(0, 999),
)
def test_values_are_equal(bits, group, rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    coding = IntegerCoding(bits, group, symmetric=True, scale_dtype="float16")
    groups = 1 if group == 0 else -(-columns // min(group, columns))
    codes = torch.randint(1 << bits, (rows, columns), generator=generator)
    scales = torch.randn(rows, groups, generator=generator).half()
    packed = PackedWeight.from_codes(codes, scales, None, coding)
    assert torch.equal(theirs(packed), packed.dequantize())
    assert blocks(packed).nbytes == gguf_bytes(coding, rows, columns)


@pytest.mark.parametrize("name", ["Q4_0", "Q5_0", "Q8_0"])
def test_bytes_are_those_of_their_quantizer(name):
    """What their quantizer chose, packed by us, becomes their bytes again."""
    kind = gguf.GGMLQuantizationType[name]
    data = quantize(np.random.default_rng(0).normal(size=(6, 96)).astype(np.float32), kind)
    rows = torch.from_numpy(data.reshape(6, 3, -1).copy())
    scales = rows[..., :2].contiguous().view(torch.float16).squeeze(-1)
    zero = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 128}[name]
    values = torch.from_numpy(dequantize(data, kind)).view(6, 3, 32)
    codes = (values / scales.float().unsqueeze(-1)).round().long() + zero
    bits = {"Q4_0": 4, "Q5_0": 5, "Q8_0": 8}[name]
    coding = IntegerCoding(bits, 32, symmetric=True, scale_dtype="float16")
    packed = PackedWeight.from_codes(codes.view(6, 96), scales, None, coding)
    assert np.array_equal(blocks(packed).numpy(), data)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_floats_keep_their_bits(dtype):
    packed = pack(torch.randn(5, 33), FloatCoding(dtype))
    kind = gguf.GGMLQuantizationType[gguf_type(packed.coding)]
    assert torch.equal(torch.from_numpy(dequantize(blocks(packed).numpy(), kind).copy()), packed.dequantize())


@pytest.mark.parametrize(
    ("coding", "columns", "order", "reason"),
    [
        (IntegerCoding(4, 32, False, "float16"), 64, False, "zero points"),
        (IntegerCoding(4, 32, True, "bfloat16"), 64, False, "bfloat16"),
        (IntegerCoding(4, 32, True, "float16"), 172, False, "172"),
        (IntegerCoding(4, 0, True, "float16"), 48, False, "48"),
        (IntegerCoding(4, 32, True, "float16"), 64, True, "order"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(coding, columns, order, reason):
    packed = pack(torch.randn(4, columns), coding, torch.randperm(columns) if order else None)
    assert reason in str(refusal(coding, columns, order))
    with pytest.raises(ExportError, match=reason):
        blocks(packed)


def test_interleaved_rows_give_the_same_scores_under_pairwise_rotation():
    heads, width = 3, 16
    queries, keys = torch.randn(2, heads * width, dtype=torch.float64)
    angles = torch.rand(2, width // 2, dtype=torch.float64) * 6

    def halves(x, angle):
        a, b = x.view(heads, 2, -1).unbind(1)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    def pairs(x, angle):
        a, b = x.view(heads, -1, 2).unbind(-1)
        return torch.stack(
            [a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1
        ).flatten(1)

    expected = (halves(queries, angles[0]) * halves(keys, angles[1])).sum(-1)
    moved = [interleave_rotary(x, heads) for x in (queries, keys)]
    torch.testing.assert_close((pairs(moved[0], angles[0]) * pairs(moved[1], angles[1])).sum(-1), expected)


def test_interleaving_a_packed_weight_moves_its_rows_and_nothing_else():
    packed = pack(torch.randn(64, 96), IntegerCoding(3, 32))
    moved = interleave_weight(packed, 4)
    assert torch.equal(moved.dequantize(), interleave_rotary(packed.dequantize(), 4))
    assert not torch.equal(moved.dequantize(), packed.dequantize())
