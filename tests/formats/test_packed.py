"""The stored form: exact sizes, exact round trips, and refusals by name."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packed_weights import random_packed
from tailorbird.errors import CheckpointError, SettingsError
from tailorbird.formats.codebooks import VECTOR_UNITS
from tailorbird.formats.packed import (
    GROUP_SIZES,
    SCALE_DTYPES,
    TABLE_DTYPES,
    BinaryCoding,
    CodebookCoding,
    Coding,
    FloatCoding,
    IntegerCoding,
    PackedWeight,
    TableCoding,
    VectorCoding,
    coding_from_dict,
    coding_to_dict,
    stored_bytes,
    tensor_layout,
)
from tailorbird.kernels.packing import BITS, unpack_codes

INTEGER = st.builds(
    IntegerCoding,
    bits=st.sampled_from(BITS),
    group_size=st.sampled_from(GROUP_SIZES),
    symmetric=st.booleans(),
    scale_dtype=st.sampled_from(sorted(SCALE_DTYPES)),
)
CODEBOOK = st.builds(
    CodebookCoding,
    codebook=st.sampled_from(["nf4", "fp4", "gauss2", "gauss3"]),
    group_size=st.sampled_from(GROUP_SIZES),
    scale_dtype=st.sampled_from(sorted(SCALE_DTYPES)),
)
TABLE = st.builds(
    TableCoding, bits=st.sampled_from([2, 3, 4]), table_dtype=st.sampled_from(sorted(TABLE_DTYPES))
)
BINARY = st.builds(
    BinaryCoding, group_size=st.sampled_from(GROUP_SIZES), table_dtype=st.sampled_from(sorted(TABLE_DTYPES))
)
VECTOR = st.builds(
    VectorCoding,
    codebook=st.sampled_from(sorted(VECTOR_UNITS)),
    group_size=st.sampled_from(GROUP_SIZES),
    scale_dtype=st.sampled_from(sorted(SCALE_DTYPES)),
)
FLOAT = st.builds(FloatCoding, dtype=st.sampled_from(["bfloat16", "float16", "float32"]))
SHAPE = st.tuples(st.integers(1, 9), st.sampled_from([1, 31, 32, 64, 172, 256, 4097]))


@given(coding=INTEGER | CODEBOOK | VECTOR | TABLE | BINARY, shape=SHAPE, order=st.booleans())
@settings(max_examples=120, deadline=None)
def test_stored_bytes_are_the_bytes_of_the_real_tensors(coding, shape, order) -> None:
    packed = random_packed(coding, shape, order)
    real = sum(tensor.numel() * tensor.element_size() for tensor in packed.tensors.values())
    assert stored_bytes(coding, *shape, has_order=order) == packed.nbytes == real
    codes_bits = 8 * packed.tensors["codes"].nbytes
    # a row ends with a whole byte, and before that with a whole code
    rest = 8 + (coding.code_bits if isinstance(coding, VectorCoding) else 0)
    assert 0 <= codes_bits - shape[0] * shape[1] * coding.bits < rest * shape[0]


@given(coding=FLOAT, shape=SHAPE)
@settings(max_examples=20, deadline=None)
def test_float_weights_take_their_own_bytes(coding, shape) -> None:
    packed = PackedWeight.from_float(torch.randn(shape), coding)
    assert stored_bytes(coding, *shape) == packed.nbytes == shape[0] * shape[1] * coding.bits // 8
    assert torch.equal(packed.dequantize(), packed.tensors["weight"].float())


@given(coding=INTEGER, shape=SHAPE)
@settings(max_examples=40, deadline=None)
def test_a_weight_on_the_grid_survives_packing(coding, shape) -> None:
    """What `dequantize` gives, divided by its scales, is the codes again: nothing was lost."""
    packed = random_packed(coding, shape)
    again = random_packed(coding, shape)
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in packed.tensors.items())
    weight = packed.dequantize()
    size = coding.group_size or shape[1]
    scales = packed.tensors["scales"].float()[:, torch.arange(shape[1]) // size]
    steps = torch.where(scales == 0, 0, weight / scales)
    assert torch.equal(steps, steps.round())
    assert steps.max() - steps.min() <= 2 * (1 << coding.bits)


@given(coding=CODEBOOK, shape=SHAPE, order=st.booleans())
@settings(max_examples=40, deadline=None)
def test_a_codebook_weight_is_levels_times_scales(coding, shape, order) -> None:
    packed = random_packed(coding, shape, order)
    codes = unpack_codes(packed.tensors["codes"], coding.bits, shape[1]).long()
    group_of = torch.arange(shape[1]) // (coding.group_size or shape[1])
    stored = coding.levels.double()[codes] * packed.tensors["scales"].double()[:, group_of]
    weight = packed.dequantize(torch.float64)
    assert torch.equal(weight[:, packed.tensors["order"].long()] if order else weight, stored)
    assert packed.tensors.keys() == {"codes", "scales"} | ({"order"} if order else set())


@given(coding=VECTOR, shape=SHAPE, order=st.booleans())
@settings(max_examples=40, deadline=None)
def test_a_weight_of_points_is_coordinates_times_scales(coding, shape, order) -> None:
    packed = random_packed(coding, shape, order)
    count = math.ceil(shape[1] / coding.dimension)
    codes = unpack_codes(packed.tensors["codes"], coding.code_bits, count).tolist()
    points, scales = coding.levels.tolist(), packed.tensors["scales"].double()
    group_of = torch.arange(shape[1]) // (coding.group_size or shape[1])
    rows = [[value for code in row for value in points[code]][: shape[1]] for row in codes]
    stored = torch.tensor(rows, dtype=torch.float64) * scales[:, group_of]
    weight = packed.dequantize(torch.float64)
    assert torch.equal(weight[:, packed.tensors["order"].long()] if order else weight, stored)
    assert packed.tensors.keys() == {"codes", "scales"} | ({"order"} if order else set())


@given(coding=TABLE, shape=SHAPE, order=st.booleans())
@settings(max_examples=40, deadline=None)
def test_a_weight_of_tables_is_its_rows_values(coding, shape, order) -> None:
    packed = random_packed(coding, shape, order)
    codes = unpack_codes(packed.tensors["codes"], coding.bits, shape[1]).tolist()
    tables = packed.tensors["tables"].double().tolist()
    stored = [[table[code] for code in row] for table, row in zip(tables, codes, strict=True)]
    weight = packed.dequantize(torch.float64)
    weight = weight[:, packed.tensors["order"].long()] if order else weight
    assert weight.tolist() == stored
    assert packed.tensors.keys() == {"codes", "tables"} | ({"order"} if order else set())
    assert packed.tensors["tables"].shape == (shape[0], 2**coding.bits)


@given(coding=INTEGER | CODEBOOK | VECTOR | TABLE | FLOAT)
@settings(max_examples=60, deadline=None)
def test_codings_survive_json(coding: Coding) -> None:
    assert coding_from_dict(json.loads(json.dumps(coding_to_dict(coding)))) == coding


GOOD = coding_to_dict(IntegerCoding(4, 64))
BOOK = coding_to_dict(CodebookCoding("nf4", 64))
TABLES = coding_to_dict(TableCoding(3))


@pytest.mark.parametrize(
    ("data", "names"),
    [
        (None, "None"),
        ([], r"\[\]"),
        ({}, "kind None"),
        ({"kind": "codebooks"}, "codebooks"),
        ({"kind": "codebook"}, "without `codebook`"),
        ({**BOOK, "codebook": "nf5"}, "'nf5'"),
        ({**BOOK, "codebook": ["nf4"]}, "codebook"),
        ({**BOOK, "codebook": 4}, "codebook 4"),
        ({**BOOK, "group_size": 48}, "group_size 48"),
        ({**BOOK, "scale_dtype": "int8"}, "scale_dtype 'int8'"),
        ({**BOOK, "bits": 4}, "'bits'"),
        ({**BOOK, "symmetric": False}, "'symmetric'"),
        ({"kind": "table"}, "without `bits`"),
        ({**TABLES, "bits": 5}, "bits 5.*2, 3, 4"),
        ({**TABLES, "bits": 3.0}, "bits 3.0"),
        ({**TABLES, "table_dtype": "float32"}, "table_dtype 'float32'"),
        ({**TABLES, "group_size": 64}, "'group_size'"),
        ({"kind": ["integer"]}, "kind"),
        ({**GOOD, "sparsity": 0.5}, "sparsity"),
        ({**GOOD, "group_sice": 64}, "group_sice"),
        ({**GOOD, 3: 4}, "3"),
        ({k: v for k, v in GOOD.items() if k != "symmetric"}, "without `symmetric`"),
        ({**GOOD, "bits": 7}, "7 bits"),
        ({**GOOD, "bits": "4"}, "'4' bits"),
        ({**GOOD, "bits": True}, "True bits"),
        ({**GOOD, "bits": [4]}, "bits"),
        ({**GOOD, "group_size": 48}, "group_size 48"),
        ({**GOOD, "group_size": -64}, "group_size -64"),
        ({**GOOD, "group_size": {}}, "group_size"),
        ({**GOOD, "symmetric": 1}, "symmetric 1"),
        ({**GOOD, "scale_dtype": "float32"}, "float32"),
        ({**GOOD, "scale_dtype": []}, "scale_dtype"),
        ({"kind": "float", "dtype": "int8"}, "int8"),
        ({"kind": "float", "dtype": "float16", "bits": 4}, "bits"),
    ],
)
def test_what_is_not_a_coding_is_refused_by_name(data, names) -> None:
    with pytest.raises(CheckpointError, match=names):
        coding_from_dict(data)


@pytest.mark.parametrize(
    "fields",
    [
        {"bits": 1},
        {"bits": 4.0},
        {"group_size": 16},
        {"group_size": 64.0},
        {"group_size": 512},
        {"scale_dtype": "float64"},
    ],
)
def test_settings_out_of_range_say_what_is_allowed(fields) -> None:
    with pytest.raises(SettingsError, match="expected: one of"):
        IntegerCoding(**{"bits": 4, "group_size": 64, **fields})


def test_labels() -> None:
    assert IntegerCoding(4, 64).label == "int4 g64"
    assert IntegerCoding(4, 64, symmetric=True).label == "int4 g64 sym"
    assert IntegerCoding(8, 0).label == "int8 row"
    assert IntegerCoding(3, 32, scale_dtype="float16").label == "int3 g32 fp16"
    assert [CodebookCoding("nf4", g).label for g in (64, 0)] == ["nf4 g64", "nf4 row"]
    assert CodebookCoding("nf4", 64, "float16").label == "nf4 g64 fp16"
    assert [TableCoding(3).label, TableCoding(4, "float16").label] == ["table3", "table4 fp16"]
    codings = [BinaryCoding(64), BinaryCoding(0), BinaryCoding(32, "float16")]
    assert [coding.label for coding in codings] == ["binary g64", "binary row", "binary g32 fp16"]
    assert [FloatCoding(d).label for d in ("bfloat16", "float16", "float32")] == ["bf16", "fp16", "fp32"]


def replaced(packed: PackedWeight, **tensors: torch.Tensor | None) -> PackedWeight:
    merged = {k: v for k, v in {**packed.tensors, **tensors}.items() if v is not None}
    return PackedWeight(packed.coding, packed.out_features, packed.in_features, merged)


def test_tensors_that_do_not_fit_are_refused_by_name() -> None:
    packed = random_packed(IntegerCoding(3, 64), (4, 172), order=True)
    for change, names in [
        ({"zeros": None}, "no tensor `zeros`"),
        ({"low_rank": torch.zeros(1)}, "unknown tensor `low_rank`"),
        ({"codes": packed.tensors["codes"][:, :-1]}, "`codes`"),
        ({"scales": packed.tensors["scales"].float()}, "`scales`"),
        ({"zeros": packed.tensors["zeros"].int()}, "`zeros`"),
        ({"order": packed.tensors["order"].clone().fill_(3)}, "order"),
        ({"order": packed.tensors["order"] + 1}, "order"),
        ({"order": packed.tensors["order"] - 1}, "order"),
    ]:
        with pytest.raises(CheckpointError, match=names):
            replaced(packed, **change)
    book = random_packed(CodebookCoding("nf4", 64), (4, 172))
    for name in ("zeros", "levels"):
        with pytest.raises(CheckpointError, match=f"unknown tensor `{name}`.*`nf4 g64`"):
            replaced(book, **{name: packed.tensors["zeros"]})


def test_tables_that_do_not_fit_are_refused_by_name() -> None:
    packed = random_packed(TableCoding(3), (4, 172))
    tables = packed.tensors["tables"]
    for change, names in [
        ({"tables": None}, "no tensor `tables`.*`table3`"),
        ({"scales": torch.ones(4, 1, dtype=torch.bfloat16)}, "unknown tensor `scales`"),
        ({"tables": tables[:, :4]}, r"`tables` \[4, 4\]"),
        ({"tables": tables.half()}, "`tables`.*float16"),
        ({"codes": packed.tensors["codes"][:3]}, "`codes`"),
    ]:
        with pytest.raises(CheckpointError, match=names):
            replaced(packed, **change)
    values = torch.zeros(4, 172, dtype=torch.uint8)
    with pytest.raises(ValueError, match="already rounded to bfloat16"):
        PackedWeight.from_tables(values, tables.float() * 1.001, TableCoding(3))
    with pytest.raises(ValueError, match="don't fit"):
        PackedWeight.from_tables(values + 8, tables, TableCoding(3))


def test_signed_codes_stand_for_either_magnitude_of_their_group() -> None:
    tables = torch.tensor([[[0.5, 3.0], [-1.0, 2.0]]])
    values = torch.arange(36)[None] % 4
    packed = PackedWeight.from_tables(values, tables, BinaryCoding(32))
    first, last = [-0.5, -3.0, 0.5, 3.0], [1.0, -2.0, -1.0, 2.0]
    assert packed.dequantize().tolist() == [first * 8 + last]
    with pytest.raises(CheckpointError, match=r"`tables` \[1, 2\]"):
        replaced(packed, tables=packed.tensors["tables"][:, 0])


def test_from_codes_refuses_what_it_would_have_to_change() -> None:
    coding = IntegerCoding(4, 32)
    values, zeros = torch.zeros(2, 64, dtype=torch.uint8), torch.zeros(2, 2, dtype=torch.uint8)
    good = torch.ones(2, 2)
    PackedWeight.from_codes(values, good, zeros, coding)
    with pytest.raises(ValueError, match="rounded"):
        PackedWeight.from_codes(values, good * 1.001, zeros, coding)
    with pytest.raises(ValueError, match="finite"):
        PackedWeight.from_codes(values, good * math.nan, zeros, coding)
    with pytest.raises(ValueError, match="symmetric"):
        PackedWeight.from_codes(values, good, None, coding)
    with pytest.raises(ValueError, match="don't fit"):
        PackedWeight.from_codes(values + 16, good, zeros, coding)
    with pytest.raises(CheckpointError, match="scales"):
        PackedWeight.from_codes(values, good[:, :1], zeros, coding)


def test_layout_of_a_documented_example() -> None:
    """The example of docs/formats.md."""
    assert tensor_layout(IntegerCoding(3, 64), 256, 172, has_order=True) == {
        "codes": ((256, 65), torch.uint8),
        "scales": ((256, 3), torch.bfloat16),
        "zeros": ((256, 2), torch.uint8),
        "order": ((172,), torch.int32),
    }
    assert tensor_layout(TableCoding(3), 256, 172) == {
        "codes": ((256, 65), torch.uint8),
        "tables": ((256, 8), torch.bfloat16),
    }
    assert tensor_layout(BinaryCoding(64), 256, 172) == {
        "codes": ((256, 43), torch.uint8),
        "tables": ((256, 3, 2), torch.bfloat16),
    }
