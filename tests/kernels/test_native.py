"""The compiled products: exact up to float32's rounding, and the same bits however rows and threads fall.

With activations rounded to bytes only the sums over segments round; within one the products are integers.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from packed_weights import at_odd_address, laid_out, random_packed
from tailorbird.errors import TensorError
from tailorbird.formats import codebooks
from tailorbird.formats.modules import CompressedLinear
from tailorbird.formats.packed import (
    CodebookCoding,
    GroupedCoding,
    IntegerCoding,
    PackedWeight,
    TableCoding,
    VectorCoding,
    unpacking,
)
from tailorbird.kernels import dispatch, native, panels, reference
from tailorbird.kernels.packing import BITS

CPU = torch.device("cpu")
NF4, FP4 = CodebookCoding("nf4", 64), CodebookCoding("fp4", 64)
WITH_ZEROS = IntegerCoding(4, 32, symmetric=False)
# the C structures point at them
LEVELS = {name: levels.float() for name, levels in codebooks.LEVELS.items()}
ROOT = Path(__file__).parents[2]

built = pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")
versions = st.sampled_from(native.versions() or (0,))
dtypes = st.sampled_from(list(native.KINDS))
codings = st.sampled_from([*(IntegerCoding(bits, 64) for bits in BITS), NF4, FP4])


def codings_with(group_sizes: list[int]) -> st.SearchStrategy[GroupedCoding]:
    """Every kind of codes, with groups and scales of every kind."""
    groups, dtypes = st.sampled_from(group_sizes), st.sampled_from(["float16", "bfloat16"])
    integers = st.builds(IntegerCoding, st.sampled_from(BITS), groups, st.booleans(), dtypes)
    return integers | st.builds(CodebookCoding, st.sampled_from(sorted(codebooks.LEVELS)), groups, dtypes)


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def layout_of(packed: PackedWeight) -> native.Tiles:
    return laid_out(native.tiles, packed)


def activations(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * 1009 + columns))


@built
@given(
    coding=codings_with([0, 32, 64, 96, 128, 256]),
    rows=st.sampled_from([1, 2, 4, 7, 8, 13, 40]),
    shape=st.tuples(st.sampled_from([1, 15, 16, 17, 130]), st.sampled_from([1, 31, 64, 172, 320, 4097])),
    version=versions,
)
@settings(max_examples=150, deadline=None)
def test_products_are_exact_up_to_rounding(
    coding: GroupedCoding, rows: int, shape: tuple[int, int], version: int
) -> None:
    packed = random_packed(coding, shape)
    x = activations(rows, shape[1])
    weight = packed.dequantize(torch.float64)
    product = native.linear(x, layout_of(packed), False, version)
    # Each output is a sum of n products in float32, each of which is rounded, as is every partial sum.
    bound = (shape[1] + 4) * 2.0**-24 * (x.double().abs() @ weight.abs().t())
    assert ((product.double() - x.double() @ weight.t()).abs() <= bound).all()


@built
@given(
    coding=codings_with([0, 32, 64, 96, 128, 160, 256]),
    rows=st.sampled_from([1, 2, 4, 7, 8, 13, 27, 40]),
    shape=st.tuples(st.sampled_from([1, 15, 16, 17, 130]), st.sampled_from([1, 31, 64, 172, 320, 4097])),
    version=versions,
)
@settings(max_examples=150, deadline=None)
def test_products_of_bytes_are_those_of_the_reference_up_to_rounding(
    coding: GroupedCoding, rows: int, shape: tuple[int, int], version: int
) -> None:
    packed = random_packed(coding, shape)
    x = activations(rows, shape[1])
    rounded = reference.to_bytes(x, coding.group_size).double()
    weight = packed.dequantize(torch.float64)
    product = native.linear(x, layout_of(packed), True, version)
    segments = -(-shape[1] // 32) + 4  # at most so many; each one's sum, its scale and their product round
    bound = segments * 2.0**-23 * (rounded.abs() @ weight.abs().t())
    assert ((product.double() - rounded @ weight.t()).abs() <= bound).all()


@built
@given(rows=st.integers(1, 30), coding=codings, int8=st.booleans(), version=versions)
@settings(max_examples=40, deadline=None)
def test_bfloat16_results_are_those_in_float32_rounded_once(
    rows: int, coding: GroupedCoding, int8: bool, version: int
) -> None:
    layout = layout_of(random_packed(coding, (70, 200)))
    x = activations(rows, 200).bfloat16()
    wide = native.linear(x.float(), layout, int8, version)
    assert torch.equal(native.linear(x, layout, int8, version), wide.bfloat16())


@built
@given(coding=codings, rows=st.integers(1, 31), int8=st.booleans(), version=versions)
@settings(max_examples=60, deadline=None)
def test_a_row_has_the_same_bits_alone_and_among_others(
    coding: GroupedCoding, rows: int, int8: bool, version: int
) -> None:
    layout = layout_of(random_packed(coding, (70, 200)))
    x = activations(rows, 200)
    together = native.linear(x, layout, int8, version)
    alone = [native.linear(x[i : i + 1], layout, int8, version)[0] for i in range(rows)]
    assert all(torch.equal(one, among) for one, among in zip(alone, together, strict=True))


@built
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(
    "coding",
    [*(IntegerCoding(bits, 32) for bits in BITS), CodebookCoding("nf4", 32)],
    ids=lambda coding: coding.label,
)
def test_the_number_of_threads_changes_no_bit(coding: GroupedCoding, int8: bool, threads: None) -> None:
    layout = layout_of(random_packed(coding, (515, 1030)))
    for rows in (5, 40):
        x = activations(rows, 1030)
        torch.set_num_threads(1)
        alone = native.linear(x, layout, int8)
        for count in (2, 3):
            torch.set_num_threads(count)
            assert torch.equal(native.linear(x, layout, int8), alone)


@built
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("rows", [7, 17])  # few tokens take another way than many
@pytest.mark.parametrize("version", native.versions())
@pytest.mark.parametrize(
    "coding",
    [IntegerCoding(8, 64), IntegerCoding(4, 64, symmetric=False), NF4],
    ids=lambda coding: coding.label,
)
def test_what_is_not_finite_stays_in_its_row(
    coding: GroupedCoding, version: int, rows: int, int8: bool
) -> None:
    packed = random_packed(coding, (40, 128))
    layout, x, infinite = layout_of(packed), activations(rows, 128), float("inf")
    clean = native.linear(x, layout, int8, version)
    x[1, 5], x[2, 7], x[3, 7] = float("nan"), infinite, -infinite
    x[4, 7], x[4, 100] = infinite, -infinite  # of two groups
    x[5, 7], x[5, 9] = infinite, -infinite  # of one
    product, exact = native.linear(x, layout, int8, version), x @ packed.dequantize().t()
    for row in (0, *range(6, rows)):
        assert torch.equal(product[row], clean[row])
    assert not product[1:6].isfinite().any()
    assert not exact[1:6].isfinite().any()
    # Of infinities that share a scale bytes keep the signs: the sum is then one infinity, or none.
    some = slice(1, 5 if int8 else 6)
    assert_same_infinities(product[some], exact[some])


def assert_same_infinities(found: torch.Tensor, expected: torch.Tensor) -> None:
    """NaN where NaN is expected, else infinities of the same sign."""
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.isposinf(), expected.isposinf())
    assert torch.equal(found.isneginf(), expected.isneginf())


@pytest.mark.parametrize("group_size", [0, 40, 64, 256])
def test_bytes_lie_within_half_a_step_of_the_activations(group_size: int) -> None:
    x = activations(5, 300) * torch.logspace(-6, 6, 300)
    x[3] = 0
    rounded = reference.to_bytes(x, group_size)
    size = min(group_size or 300, 300)
    for start in range(0, 300, size):
        for first in range(start, min(start + size, 300), 128):
            here = slice(first, min(first + 128, start + size, 300))
            step = x[:, here].abs().amax(1, keepdim=True) / 127
            assert ((rounded[:, here] - x[:, here]).abs() <= step * 0.5001).all()
            assert ((rounded[:, here] / step.clamp(min=1e-30)).abs().amax(1) <= 127.001).all()


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("coding", [IntegerCoding(4, 64), NF4], ids=lambda coding: coding.label)
def test_a_linear_that_may_round_its_inputs_takes_the_products_of_bytes(
    coding: GroupedCoding, dtype: torch.dtype
) -> None:
    packed = random_packed(coding, (48, 100))
    module = CompressedLinear.from_packed(packed, rounds=True)
    assert module.path(1, dtype) == module.path(500, dtype) == "native-int8"
    assert CompressedLinear.from_packed(packed).path(1, dtype) != "native-int8"
    x = activations(3, 100).to(dtype)
    expected = reference.to_bytes(x, 64) @ packed.dequantize().t()
    torch.testing.assert_close(module(x), expected.to(dtype))


@built
def test_a_linear_takes_the_compiled_path_in_float32_and_agrees_with_its_weight() -> None:
    packed = random_packed(IntegerCoding(3, 64, scale_dtype="bfloat16"), (48, 100), order=True)
    module = CompressedLinear.from_packed(packed, bias=torch.arange(48.0))
    assert module.path(1, torch.float32) == "native-float"
    x = activations(4, 100)
    torch.testing.assert_close(module(x.view(2, 2, 100)).view(4, 48), x @ module.weight.t() + module.bias)


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_codebook_takes_the_compiled_path_and_no_operator_for_integers(dtype: torch.dtype) -> None:
    packed = random_packed(NF4, (48, 100), order=True)
    module = CompressedLinear.from_packed(packed)
    assert module.path(1, dtype) == "native-float"
    x = activations(4, 100).to(dtype)
    exact = x.double() @ packed.dequantize(torch.float64).t()
    torch.testing.assert_close(module(x).double(), exact, atol=1e-4, rtol=torch.finfo(dtype).eps)


def test_groups_that_cross_steps_are_left_to_the_reference() -> None:
    assert (
        dispatch.choose(IntegerCoding(4, 0), 40, 1, torch.float32, CPU) != "reference"
        or not native.available()
    )
    path = next(path for path in dispatch.PATHS if path.name == "native-float")
    assert path.serves(IntegerCoding(4, 32), 100)
    assert not path.serves(type("Coding", (), {"group_size": 40, "kind": "integer"})(), 100)


def test_without_a_compiler_the_package_still_builds(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", reason="setuptools isn't installed here")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", tmp_path / "lib", "--build-temp"]
    environment = os.environ | dict.fromkeys(
        ("CC", "CXX", "LDSHARED", "LDCXXSHARED"), "/nonexistent/compiler"
    )
    done = subprocess.run(
        [*command, tmp_path / "temp"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "lib").rglob("*.so")) if (tmp_path / "lib").exists() else True


def test_an_absent_library_is_said_once_and_the_reference_serves(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    dispatch.works.cache_clear()
    monkeypatch.setattr(native, "library", lambda: None)
    paths = [path for path in dispatch.PATHS if path.name in ("native-int8", "native-float")]
    for path in paths * 2:
        assert not dispatch.works(path)
    dispatch.works.cache_clear()
    said = [record.getMessage() for record in caplog.records if "C++ compiler" in record.getMessage()]
    assert len(said) == 1
    assert all(path.name in said[0] for path in paths)


@pytest.mark.full
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on PATH")
def test_products_touch_nothing_that_is_not_theirs(tmp_path: Path) -> None:
    program = tmp_path / "sanitized"
    flags = ["-O1", "-g", "-std=c++17", "-fopenmp", "-Wno-psabi", "-fsanitize=address,undefined"]
    flags.append("-fno-sanitize-recover=all")
    source = Path(__file__).parent / "sanitized.cpp"
    subprocess.run(["g++", *flags, str(source), "-o", str(program)], check=True)
    for seed in range(4):
        done = subprocess.run([program, str(seed), "300"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr[-3000:]


@built
@pytest.mark.parametrize(
    ("coding", "rounds", "dtype"),
    [
        (IntegerCoding(4, 64), False, torch.float32),
        (IntegerCoding(4, 64), True, torch.float32),
        (IntegerCoding(4, 64), True, torch.bfloat16),
        (NF4, False, torch.float32),
        (NF4, False, torch.bfloat16),
        (NF4, True, torch.bfloat16),
    ],
)
def test_torch_compile_takes_a_linear_that_has_run_into_its_graph(
    coding: GroupedCoding, rounds: bool, dtype: torch.dtype
) -> None:
    packed = random_packed(coding, (48, 128))
    module = CompressedLinear.from_packed(packed, bias=torch.arange(48.0), rounds=rounds)
    x = activations(6, 128).view(2, 3, 128).to(dtype)
    with torch.no_grad():
        module(x.float())
        eager = module(x)
        compiled = torch.compile(module, backend="eager", fullgraph=True)(x)
    assert torch.equal(compiled, eager)


@built
def test_float16_is_left_to_the_reference_when_compiled() -> None:
    module = CompressedLinear.from_packed(random_packed(IntegerCoding(4, 64), (48, 128)), rounds=True)
    x = activations(6, 128)
    with torch.no_grad():
        module(x)
        eager = module(x.half())
        assert torch.equal(torch.compile(module, backend="eager")(x.half()), eager)


@built
def test_the_operator_says_its_shape() -> None:
    for coding in (IntegerCoding(3, 32, symmetric=False), CodebookCoding("nf4", 32)):
        layout = layout_of(random_packed(coding, (40, 100)))
        arguments = (layout.codes, layout.scales, layout.zeros, layout.table, 40, 100, 32, True)
        torch.library.opcheck(
            torch.ops.tailorbird.packed_linear.default,
            (activations(5, 100), *arguments),
            test_utils=("test_schema", "test_faketensor"),
        )


@built
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_a_scale_that_is_not_finite_shows(value: float, int8: bool) -> None:
    packed = random_packed(IntegerCoding(4, 32, scale_dtype="float16"), (20, 64))
    packed.tensors["scales"][3, 1] = value
    product = native.linear(activations(2, 64), layout_of(packed), int8)
    assert not product[:, 3].isfinite().any()
    assert product[:, :3].isfinite().all()


def packed_table(packed: PackedWeight, dtype: torch.dtype, factor: float = 1.0) -> native.EmbeddingStructure:
    """A table for `look_up`; `packed` has to stay."""
    tensors, told = packed.tensors, unpacking(packed.coding)
    if isinstance(packed.coding, CodebookCoding):
        told["levels"] = LEVELS[packed.coding.codebook]
    stored = native.described_as_stored(
        tensors["codes"], tensors["scales"], tensors.get("zeros"), in_features=packed.in_features, **told
    )
    return native.packed_embedding(stored, dtype, factor)


def assert_same_bits(found: torch.Tensor, expected: torch.Tensor) -> None:
    """The same numbers, zeros of the same sign, and none where none is expected."""
    numbers = ~expected.isnan()
    assert torch.equal(found.isnan(), ~numbers)
    assert torch.equal(found[numbers].view(torch.int32), expected[numbers].view(torch.int32))


@built
@given(
    coding=codings_with([0, 32, 64, 96, 128, 160, 256]),
    shape=st.tuples(st.sampled_from([1, 17, 130]), st.sampled_from([1, 31, 64, 172, 320, 1030])),
    dtype=dtypes,
    factor=st.sampled_from([1.0, 1.7, 64.0]),
    seed=st.integers(0, 99),
    version=versions,
)
@settings(max_examples=200, deadline=None)
def test_rows_have_the_bits_of_the_reference(
    coding: GroupedCoding, shape: tuple[int, int], dtype: torch.dtype, factor: float, seed: int, version: int
) -> None:
    assume(coding.levels is None or coding.bits == native.CODEBOOK_BITS)  # narrower ones aren't compiled
    packed = random_packed(coding, shape)
    ids = torch.randint(0, shape[0], (seed % 7,), generator=torch.Generator().manual_seed(seed))
    expected = packed.dequantize(dtype)[ids]
    factor = float(torch.tensor(factor, dtype=dtype))
    if factor != 1:
        expected = expected * torch.tensor(factor, dtype=dtype)
    assert_same_bits(native.look_up(packed_table(packed, dtype, factor), ids, version), expected.float())


@built
@pytest.mark.parametrize("dtype", native.KINDS)
@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16"])
def test_rows_with_scales_of_every_size_have_the_bits_of_the_reference(
    scale_dtype: str, dtype: torch.dtype
) -> None:
    """Among them values that float16 holds with fewer bits, or not at all."""
    shape = 512, 128 * 32
    packed = random_packed(IntegerCoding(8, 32, False, scale_dtype), shape)
    stored = packed.tensors["scales"]
    stored.copy_(torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(512, 128).view(stored.dtype))
    for version in native.versions():
        rows = native.look_up(packed_table(packed, dtype), torch.arange(512), version)
        assert_same_bits(rows, packed.dequantize(dtype).float())


@built
@pytest.mark.parametrize("dtype", native.KINDS)
@pytest.mark.parametrize("factor", [1.0, 1.0 / 3, 5.0])
def test_dense_rows_have_the_bits_of_every_value(dtype: torch.dtype, factor: float) -> None:
    sixteen = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16)
    values = sixteen.int() * 65537 if dtype == torch.float32 else sixteen
    weight = values.view(dtype).view(512, -1)[:, :121].contiguous()
    ids = torch.arange(2000) * 7 % 512
    factor = float(torch.tensor(factor, dtype=dtype))
    expected = torch.nn.functional.embedding(ids, weight)
    if factor != 1:
        expected = expected * torch.tensor(factor, dtype=dtype)
    for version in native.versions():
        table = native.dense_embedding(weight, factor)
        assert_same_bits(native.look_up(table, ids, version), expected.float())


@built
def test_the_number_of_threads_changes_no_row(threads: None) -> None:
    packed, ids = random_packed(IntegerCoding(5, 64), (50, 1030)), torch.arange(301) * 7 % 50
    table = packed_table(packed, torch.bfloat16)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        assert_same_bits(native.look_up(table, ids), packed.dequantize(torch.bfloat16)[ids].float())


@built
@pytest.mark.parametrize("id", [-1, 7, 1 << 40, -(1 << 63), (1 << 63) - 1])
def test_an_id_without_a_row_is_refused(id: int) -> None:
    packed, weight = random_packed(IntegerCoding(4, 32), (7, 40)), torch.zeros(7, 40)
    for table in (packed_table(packed, torch.float32), native.dense_embedding(weight)):
        with pytest.raises(IndexError, match=rf"token id {id}; expected one from 0 to 6"):
            native.look_up(table, torch.tensor([6, 0, id, 1]))


@built
@pytest.mark.parametrize("ids", [torch.zeros(2, dtype=torch.int32), torch.zeros(2), torch.zeros(1, 2).long()])
def test_ids_of_another_kind_are_refused(ids: torch.Tensor) -> None:
    with pytest.raises(TensorError, match=r"`ids` is .* expected: .* of torch.int64"):
        native.look_up(native.dense_embedding(torch.zeros(3, 4)), ids)


@built
@pytest.mark.parametrize("version", native.versions())
@pytest.mark.parametrize(
    "coding",
    [
        IntegerCoding(3, 32, symmetric=False),
        IntegerCoding(5, 0),
        IntegerCoding(8, 64),
        CodebookCoding("nf4", 32),
    ],
    ids=lambda coding: coding.label,
)
def test_codes_at_an_odd_address_give_the_same_bits(
    coding: GroupedCoding, version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = random_packed(coding, (37, 172))
    moved = {name: at_odd_address(t) if t.dtype == torch.uint8 else t for name, t in packed.tensors.items()}
    other = PackedWeight(coding, 37, 172, moved)
    layout = layout_of(packed)
    words, numbers = at_odd_address(layout.codes), (37, 172, layout.described.group_columns)
    monkeypatch.setattr(native, "best_version", lambda: version)
    for x in (activations(3, 172), activations(14, 172).bfloat16()):
        for int8 in (False, True):
            expected = native.linear(x, layout, int8)
            assert torch.equal(native.linear(x, layout_of(other), int8), expected)
            found = torch.ops.tailorbird.packed_linear(
                x, words, layout.scales, layout.zeros, layout.table, *numbers, int8
            )
            assert torch.equal(found, expected)
    ids = torch.arange(37)
    table, odd = (packed_table(one, torch.float32) for one in (packed, other))
    assert_same_bits(native.look_up(odd, ids), native.look_up(table, ids))
    whole = native.dequantize(odd.packed, 0, 0, torch.empty(37, 172))
    assert torch.equal(whole, packed.dequantize())


def stored(coding: GroupedCoding = WITH_ZEROS) -> dict[str, Any]:
    """What entrances are told of a stored weight [40, 96]."""
    packed = random_packed(coding, (40, 96))
    tensors = {name: packed.tensors.get(name) for name in ("codes", "scales", "zeros")}
    return {**tensors, "in_features": 96, **unpacking(coding)}


def describe(codes: torch.Tensor, levels: torch.Tensor | None = None, **told: Any) -> native.StoredStructure:
    return native.described_as_stored(codes, levels=None if levels is None else levels.float(), **told)


def panel_product(width: int, operator: str) -> Callable[..., torch.Tensor]:
    def multiply(**told: Any) -> torch.Tensor:
        told = {"order": None, "levels": None} | told
        return getattr(torch.ops.tailorbird, operator)(activations(5, width), **told)

    return multiply


OF_STORED = {
    "tiles": native.tiles,
    "described_as_stored": describe,
    "panel_linear": panel_product(96, "panel_linear"),
    "panel_linear_gradient": panel_product(40, "panel_linear_gradient"),
}


@built
@pytest.mark.parametrize("entrance", OF_STORED)
@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("codes", lambda codes: codes[:, :-1], r"`codes` is \[40, 47\] of torch.uint8 .* \[40, 48\]"),
        ("codes", lambda codes: codes[:-1], r"`scales` is \[40, 3\] .* \[39, 3\]"),
        ("codes", lambda codes: codes[0], r"`codes` is \[48\]"),
        ("codes", lambda codes: codes.int(), r"`codes` is \[40, 48\] of torch.int32"),
        ("scales", lambda scales: scales[:, :-1], r"`scales` is \[40, 2\]"),
        ("scales", lambda scales: scales[:-1], r"`scales` is \[39, 3\]"),
        ("scales", lambda scales: scales.float(), r"`scales` is \[40, 3\] of torch.float32"),
        ("zeros", lambda zeros: zeros[:, :-1], r"`zeros` is \[40, 1\] .* \[40, 2\]"),
        ("zeros", lambda zeros: zeros[:-1], r"`zeros` is \[39, 2\]"),
        ("zeros", lambda zeros: zeros.short(), r"`zeros` is \[40, 2\] of torch.int16"),
        ("bits", lambda bits: 8, r"`codes` is \[40, 48\] .* \[40, 96\]"),
        ("bits", lambda bits: 7, "codes of 7 bits"),
        ("group_size", lambda size: 48, "groups of 48 inputs"),
        ("group_size", lambda size: 64, r"`scales` is \[40, 3\] .* \[40, 2\]"),
        ("group_size", lambda size: -32, "groups of -32"),
        ("in_features", lambda inputs: 128, r"`codes` is \[40, 48\] .* \[40, 64\]"),
        ("in_features", lambda inputs: 0, "^0 inputs"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    entrance: str, name: str, change: Callable[[Any], Any], words: str
) -> None:
    weight = stored()
    OF_STORED[entrance](**weight)
    weight[name] = change(weight[name])
    with pytest.raises(TensorError, match=words):
        OF_STORED[entrance](**weight)


@built
@pytest.mark.parametrize("entrance", OF_STORED)
def test_levels_that_do_not_fit_are_refused(entrance: str) -> None:
    weight = stored(CodebookCoding("nf4", 32))
    OF_STORED[entrance](**weight)
    for levels, words in (
        (weight["levels"][:8], r"`levels` is \[8\] .* \[16\]"),
        (weight["levels"].repeat(2), r"`levels` is \[32\]"),
    ):
        with pytest.raises(TensorError, match=words):
            OF_STORED[entrance](**{**weight, "levels": levels})
    six = stored(IntegerCoding(6, 32))
    with pytest.raises(TensorError, match="codes of 6 bits beside `levels`"):
        OF_STORED[entrance](**{**six, "levels": weight["levels"]})


@built
def test_points_that_do_not_fit_are_refused() -> None:
    weight = stored(VectorCoding("gauss2x4", 32))
    native.tiles(**weight)
    for name, change, words in (
        ("levels", weight["levels"][:-1], r"`levels` is \[255, 4\] .* \[256, 4\]"),
        ("codes", weight["codes"][:, :-1], r"`codes` is \[40, 23\] .* \[40, 24\]"),
    ):
        with pytest.raises(TensorError, match=words):
            native.tiles(**{**weight, name: change})


def laid_out_weight(coding: GroupedCoding) -> dict[str, Any]:
    """What the operator is told of a weight [40, 96] that was laid out."""
    layout = layout_of(random_packed(coding, (40, 96)))
    tensors = {name: getattr(layout, name) for name in ("codes", "scales", "zeros", "table")}
    return {**tensors, "out_features": 40, "in_features": 96, "group_columns": 32}


@built
@pytest.mark.parametrize(
    ("coding", "name", "change", "words"),
    [
        (WITH_ZEROS, "codes", lambda codes: codes[:-1], r"`codes` is \[2, 3, 4, 16\] .* \[3, 3, 4, 16\]"),
        (WITH_ZEROS, "codes", lambda codes: codes[:, :-1], r"`codes` is \[3, 2, 4, 16\]"),
        (WITH_ZEROS, "codes", lambda codes: codes[..., :-1], r"`codes` is \[3, 3, 4, 15\]"),
        (WITH_ZEROS, "codes", lambda codes: codes.flatten(), r"`codes` is \[576\]"),
        (WITH_ZEROS, "codes", lambda codes: codes.short(), "torch.int16"),
        (WITH_ZEROS, "codes", lambda codes: codes.mT.contiguous().mT, "not contiguous"),
        (WITH_ZEROS, "scales", lambda scales: scales[:-1], r"`scales` is \[2, 3, 16\] .* \[3, 3, 16\]"),
        (WITH_ZEROS, "scales", lambda scales: scales[:, :-1], r"`scales` is \[3, 2, 16\]"),
        (WITH_ZEROS, "scales", lambda scales: scales.float(), "torch.float32"),
        (WITH_ZEROS, "zeros", lambda zeros: zeros[:, :-1], r"`zeros` is \[3, 2, 16\]"),
        (WITH_ZEROS, "zeros", lambda zeros: zeros.short(), "torch.int16"),
        (WITH_ZEROS, "table", lambda _: torch.zeros(8, dtype=torch.uint8), r"`table` is \[8\] .* \[16\]"),
        (
            IntegerCoding(5, 32),
            "table",
            lambda _: torch.zeros(16, dtype=torch.uint8),
            "codes of 5 bits beside",
        ),
        (CodebookCoding("nf4", 32), "table", lambda table: table[:-1], r"`table` is \[15\]"),
        (CodebookCoding("nf4", 32), "table", lambda table: table.float(), "torch.float32"),
        (WITH_ZEROS, "out_features", lambda rows: 60, r"`codes` is \[3, 3, 4, 16\] .* \[4, 3, 4, 16\]"),
        (WITH_ZEROS, "out_features", lambda rows: -40, r"a weight \[-40, 96\]"),
        (WITH_ZEROS, "in_features", lambda inputs: 128, r"`codes` is .* \[3, 4, 4, 16\]"),
        (WITH_ZEROS, "in_features", lambda inputs: 0, r"a weight \[40, 0\]"),
        (WITH_ZEROS, "in_features", lambda inputs: 95, r"`x` is \[5, 96\] .* \[5, 95\]"),
        (WITH_ZEROS, "group_columns", lambda columns: 64, r"`scales` is \[3, 3, 16\] .* \[3, 2, 16\]"),
        (WITH_ZEROS, "group_columns", lambda columns: 48, "groups of 48 columns"),
        (WITH_ZEROS, "group_columns", lambda columns: 0, "groups of 0 columns"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(
    coding: GroupedCoding, name: str, change: Callable[[Any], Any], words: str
) -> None:
    weight, x = laid_out_weight(coding), activations(5, 96)
    torch.ops.tailorbird.packed_linear(x, **weight, int8=False)
    weight[name] = change(weight[name])
    for int8 in (False, True):
        with pytest.raises(TensorError, match=words):
            torch.ops.tailorbird.packed_linear(x, **weight, int8=int8)


def products() -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Products with weights [40, 96], by the entrances through which inputs come."""
    weight, tables = stored(), random_packed(TableCoding(3), (40, 96))
    layout, rows = (
        native.tiles(**weight),
        laid_out(partial(native.table_rows, tables=tables.tensors["tables"]), tables),
    )
    return {
        "linear": partial(native.linear, layout=layout),
        "linear of bytes": partial(native.linear, layout=layout, int8=True),
        "table_linear": partial(native.table_linear, layout=rows),
        "packed_linear": partial(native.traced_linear, layout=layout, int8=True),
        "panel_linear": partial(panels.linear, weight=panels.StoredWeight(**weight)),
    }


@built
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x[:, :-1], r"`x` is \[5, 95\] .* \[5, 96\]"),
        (lambda x: torch.cat([x, x], 1), r"`x` is \[5, 192\]"),
        (lambda x: x[:0, :-1], r"`x` is \[0, 95\]"),
        (lambda x: x[0, 0], r"`x` is \[\]"),
        (lambda x: x.half(), r"`x` is \[5, 96\] of torch.float16"),
        (lambda x: x.double(), r"`x` is \[5, 96\] of torch.float64"),
        (lambda x: x.int(), r"`x` is \[5, 96\] of torch.int32"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    change: Callable[[torch.Tensor], torch.Tensor], words: str
) -> None:
    x = activations(5, 96)
    for name, multiply in products().items():
        assert multiply(x).shape == (5, 40)
        assert torch.equal(multiply(x.t().contiguous().t()), multiply(x)), name
        with pytest.raises(TensorError, match=words):
            multiply(change(x))
        if name != "packed_linear":  # which takes any number of dimensions
            with pytest.raises(TensorError, match=r"`x` is \[1, 5, 96\]"):
                multiply(x[None])


@built
def test_a_gradient_or_an_order_that_does_not_fit_is_refused() -> None:
    told = {"order": None, "levels": None} | stored()
    for gradient in (activations(5, 39), activations(5, 40).half()):
        with pytest.raises(TensorError, match=r"`gradient` is \[5, (39|40)\]"):
            torch.ops.tailorbird.panel_linear_gradient(gradient, **told)
    told["order"] = torch.zeros(1, dtype=torch.int32)
    for operator, width in (("panel_linear", 96), ("panel_linear_gradient", 40)):
        with pytest.raises(TensorError, match=r"`order` is \[1\] .* \[96\]"):
            getattr(torch.ops.tailorbird, operator)(activations(5, width), **told)


@built
@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("codes", lambda codes: codes[:, :-1], r"`codes` is \[40, 35\] .* \[40, 36\]"),
        ("codes", lambda codes: codes.int(), "torch.int32"),
        ("tables", lambda tables: tables[:-1], r"`tables` is \[39, 8\] .* \[40, 8\]"),
        ("tables", lambda tables: tables[:, :-1], r"`tables` is \[40, 7\]"),
        ("tables", lambda tables: tables.double(), "torch.float64"),
        ("bits", lambda bits: 5, "codes of 5 bits beside `tables`"),
        ("in_features", lambda inputs: 0, "^0 inputs"),
    ],
)
def test_tables_that_do_not_fit_are_refused(name: str, change: Callable[[Any], Any], words: str) -> None:
    tensors = random_packed(TableCoding(3), (40, 96)).tensors
    weight = {**tensors, "scales": None, "zeros": None, "bits": 3, "group_size": 0, "in_features": 96}
    weight[name] = change(weight[name])
    with pytest.raises(TensorError, match=words):
        native.table_rows(**weight)


@built
@pytest.mark.parametrize(
    ("row", "column", "to", "words"),
    [
        (-1, 0, torch.empty(4, 32), "4 rows from -1"),
        (37, 0, torch.empty(4, 32), r"4 rows from 37 .* expected: a part of \[40, 96\]"),
        (0, 80, torch.empty(4, 32), "32 columns from 80"),
        (0, 8, torch.empty(4, 32), "32 columns from 8"),
        (0, -16, torch.empty(4, 32), "32 columns from -16"),
        (0, 0, torch.empty(4, 32, dtype=torch.float16), r"`to` is \[4, 32\] of torch.float16"),
        (0, 0, torch.empty(32, 4).t(), "not contiguous"),
        (0, 0, torch.empty(32), r"`to` is \[32\]"),
    ],
)
def test_a_rectangle_that_is_not_there_is_refused(
    row: int, column: int, to: torch.Tensor, words: str
) -> None:
    weight = stored()
    with pytest.raises(TensorError, match=words):
        native.dequantize(describe(**weight), row, column, to)


@built
@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (torch.zeros(6, 4).t(), "not contiguous"),
        (torch.zeros(6, 4, dtype=torch.float64), "torch.float64"),
        (torch.zeros(6), r"`weight` is \[6\]"),
        (torch.zeros(()), r"`weight` is \[\]"),
    ],
)
def test_an_embedding_that_does_not_fit_is_refused(weight: torch.Tensor, words: str) -> None:
    with pytest.raises(TensorError, match=words):
        native.dense_embedding(weight)


@built
def test_a_packed_embedding_of_another_dtype_is_refused() -> None:
    with pytest.raises(TensorError, match=r"rows of torch\.float64"):
        native.packed_embedding(describe(**stored()), torch.float64)


@pytest.fixture
def other_processor(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, int], None]]:
    """Sets what the machine is called, and the best version that it runs."""

    def become(machine: str, best: int) -> None:
        library = SimpleNamespace(tailorbird_best_version=lambda: best)
        monkeypatch.setattr(native, "library", lambda: library)
        monkeypatch.setattr(native.platform, "machine", lambda: machine)

    native.best_version.cache_clear()
    yield become
    native.best_version.cache_clear()


@pytest.mark.parametrize(
    ("machine", "best", "lacks"),
    [("x86_64", 0, "avx2 with fma"), ("x86_64", 1, "avx512_vnni"), ("aarch64", 0, "asimddp")],
)
def test_what_a_processor_lacks_is_said_once(
    machine: str,
    best: int,
    lacks: str,
    other_processor: Callable[[str, int], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    other_processor(machine, best)
    assert [native.best_version() for _ in range(3)] == [best] * 3
    (said,) = caplog.records
    assert lacks in said.getMessage()


@pytest.mark.parametrize(("machine", "best"), [("x86_64", 2), ("AMD64", 3), ("aarch64", 4), ("x86_64", 5)])
def test_of_a_processor_that_lacks_nothing_nothing_is_said(
    machine: str, best: int, other_processor: Callable[[str, int], None], caplog: pytest.LogCaptureFixture
) -> None:
    other_processor(machine, best)
    assert native.best_version() == best
    assert not caplog.records
