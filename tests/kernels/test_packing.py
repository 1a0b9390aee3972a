"""Bit streams: exact for every value, wasting nothing, and as the documentation says bit by bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tailorbird.errors import SettingsError
from tailorbird.kernels import packing
from tailorbird.kernels.packing import BITS, pack_codes, packed_width, unpack_codes

COUNTS = st.sampled_from([1, 2, 3, 7, 8, 9, 31, 64, 172, 4097]) | st.integers(1, 300)


def random_codes(shape: tuple[int, ...], bits: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, shape, dtype=torch.uint8, generator=generator)


def stream_as_documented(row: list[int], bits: int) -> bytes:
    """The row as one big little-endian number."""
    number = sum(value << (i * bits) for i, value in enumerate(row))
    return number.to_bytes(-(-len(row) * bits // 8), "little")


@given(bits=st.sampled_from(BITS), rows=st.integers(0, 5), count=COUNTS, seed=st.integers(0, 99))
@settings(max_examples=120, deadline=None)
def test_unpack_inverts_pack(bits: int, rows: int, count: int, seed: int) -> None:
    values = random_codes((rows, count), bits, seed)
    packed = pack_codes(values, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, -(-count * bits // 8)) == (rows, packed_width(count, bits))
    assert torch.equal(unpack_codes(packed, bits, count), values)


@given(bits=st.sampled_from(BITS), count=st.integers(1, 200), seed=st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_a_row_is_one_little_endian_number(bits: int, count: int, seed: int) -> None:
    values = random_codes((2, count), bits, seed)
    packed = pack_codes(values, bits)
    assert [bytes(row.tolist()) for row in packed] == [
        stream_as_documented(row.tolist(), bits) for row in values
    ]


@pytest.mark.parametrize("bits", BITS)
def test_every_code_at_every_position_of_a_period(bits: int) -> None:
    values = torch.stack([torch.arange(1 << bits).roll(shift) for shift in range(8)])
    assert torch.equal(unpack_codes(pack_codes(values, bits), bits, 1 << bits), values.byte())


@pytest.mark.parametrize("bits", BITS)
def test_any_leading_shape_and_integer_dtype(bits: int) -> None:
    values = random_codes((2, 3, 13), bits, 0)
    packed = pack_codes(values.long(), bits)
    assert packed.shape[:-1] == (2, 3)
    assert torch.equal(packed[1, 2], pack_codes(values[1, 2].to(torch.int32), bits))
    assert torch.equal(unpack_codes(packed, bits, 13), values)


@pytest.mark.parametrize("bits", BITS)
def test_chunks_do_not_show(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = random_codes((23, 61), bits, 1)
    whole = pack_codes(values, bits)
    monkeypatch.setattr(packing, "CHUNK_VALUES", 200)
    assert torch.equal(pack_codes(values, bits), whole)
    assert torch.equal(unpack_codes(whole, bits, 61), values)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("wrong", [-1, "too large"])
def test_a_value_that_does_not_fit_is_refused(bits: int, wrong: int | str) -> None:
    values = torch.zeros(3, 9, dtype=torch.int32)
    values[2, 8] = -1 if wrong == -1 else 1 << bits
    with pytest.raises(ValueError, match="don't fit"):
        pack_codes(values, bits)


def test_wrong_dtype_or_width_is_refused() -> None:
    with pytest.raises(ValueError, match="integers"):
        pack_codes(torch.zeros(2, 4), 4)
    with pytest.raises(ValueError, match="rows of 2 bytes"):
        unpack_codes(torch.zeros(2, 3, dtype=torch.uint8), 4, 4)
    with pytest.raises(ValueError, match="uint8"):
        unpack_codes(torch.zeros(2, 2, dtype=torch.int32), 4, 4)


@pytest.mark.parametrize("bits", [0, 1, 7, 9, 16, True])
def test_other_widths_are_refused_with_what_is_allowed(bits: int) -> None:
    with pytest.raises(SettingsError, match="2, 3, 4, 5, 6, 8"):
        pack_codes(torch.zeros(1, 8, dtype=torch.uint8), bits)
