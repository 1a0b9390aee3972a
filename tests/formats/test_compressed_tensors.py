"""compressed-tensors itself unpacks and dequantizes what is converted to its layout, to the same numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressed import pack
from tailorbird.errors import ExportError
from tailorbird.formats.compressed_tensors import convert, quantization_config, refusal, scheme
from tailorbird.formats.packed import FloatCoding, IntegerCoding

pytest.importorskip("compressed_tensors")
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme


def their_weight(packed):
    """The weight as compressed-tensors decompresses it, its scales widened to float32."""
    tensors = convert(packed)
    tensors["weight_scale"] = tensors["weight_scale"].float()
    arguments = QuantizationArgs(**scheme(packed.coding, packed.in_features))
    stated = QuantizationScheme(targets=["Linear"], weights=arguments, format="pack-quantized")
    return PackedQuantizationCompressor.decompress(tensors, stated)["weight"]


@settings(deadline=None, max_examples=60)
@given(
    bits=st.sampled_from([2, 3, 4, 5, 6, 8]),
    group=st.sampled_from([0, 32, 64, 128]),
    symmetric=st.booleans(),
    scale=st.sampled_from(["bfloat16", "float16"]),
    rows=st.sampled_from([1, 5, 33, 64]),
    columns=st.sampled_from([1, 31, 64, 172, 256]),
    seed=st.integers(0, 999),
)
def test_decompressed_weight_equals_ours(bits, group, symmetric, scale, rows, columns, seed):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    packed = pack(weight, IntegerCoding(bits, group, symmetric, scale))
    assert torch.equal(their_weight(packed), packed.dequantize())


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_words_are_those_of_their_packer(bits):
    values = torch.randint(1 << bits, (7, 101))
    coding = IntegerCoding(bits, 0, symmetric=True)
    packed = pack(torch.zeros(7, 101), coding)
    from tailorbird.kernels.packing import pack_codes

    packed.tensors["codes"] = pack_codes(values, bits)
    theirs = pack_to_int32((values - (1 << (bits - 1))).to(torch.int8), bits)
    assert torch.equal(convert(packed)["weight_packed"], theirs)


def test_columns_in_another_order_move_back_where_a_row_is_one_group():
    weight = torch.randn(8, 96)
    order = torch.randperm(96)
    packed = pack(weight, IntegerCoding(4, 0), order)
    assert torch.equal(their_weight(packed), packed.dequantize())
    grouped = pack(weight, IntegerCoding(4, 32), order)
    assert "order" in str(refusal(grouped.coding, 96, has_order=True))
    with pytest.raises(ExportError, match="another order"):
        convert(grouped)
    with pytest.raises(ExportError, match="bf16"):
        convert(pack(weight, FloatCoding()))


def test_strategies_that_every_reader_knows_come_first():
    assert scheme(IntegerCoding(4, 64, True), 256)["strategy"] == "group"
    assert scheme(IntegerCoding(4, 64, True), 64)["strategy"] == "channel"
    assert scheme(IntegerCoding(4, 0, True), 172)["strategy"] == "channel"
    assert scheme(IntegerCoding(4, 64, True), 172)["block_structure"] == [1, 64]
    assert scheme(IntegerCoding(4, 64, False), 256)["block_structure"] == [1, 64]


def test_config_is_accepted_and_targets_exactly_its_modules():
    four, eight = (scheme(IntegerCoding(bits, 32, True), 64) for bits in (4, 8))
    config = quantization_config({"a.1.up": four, "a.11.up": eight, "a.2.up": four}, ["lm_head"], "0.20.0")
    parsed = QuantizationConfig.model_validate(config)
    assert [group.weights.num_bits for group in parsed.config_groups.values()] == [4, 8]
    from compressed_tensors.utils.match import is_match

    linear = torch.nn.Linear(1, 1)
    groups = {
        name: [
            module
            for module in ("a.1.up", "a.11.up", "a.2.up", "lm_head")
            if is_match(module, linear, g.targets)
        ]
        for name, g in parsed.config_groups.items()
    }
    assert groups == {"group_0": ["a.1.up", "a.2.up"], "group_1": ["a.11.up"]}
