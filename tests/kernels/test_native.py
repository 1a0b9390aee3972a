"""The compiled products: exact up to float32's rounding, and the same bits however rows and threads fall.

With activations rounded to bytes only the sums over segments round; within one the products are integers.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from packed_weights import laid_out, random_packed
from tailorbird.formats import codebooks
from tailorbird.formats.modules import CompressedLinear
from tailorbird.formats.packed import (
    CodebookCoding,
    GroupedCoding,
    IntegerCoding,
    PackedWeight,
    unpacking,
)
from tailorbird.kernels import dispatch, native, reference
from tailorbird.kernels.packing import BITS

CPU = torch.device("cpu")
NF4, FP4 = CodebookCoding("nf4", 64), CodebookCoding("fp4", 64)
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
    coding=codings_with([0, 32, 64, 96, 256]),
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
    coding=codings_with([0, 32, 64, 96, 160, 256]),
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
@pytest.mark.parametrize("coding", [IntegerCoding(4, 64), NF4], ids=lambda coding: coding.label)
def test_what_is_not_finite_stays_in_its_row(coding: GroupedCoding, int8: bool) -> None:
    packed = random_packed(coding, (40, 128))
    x = activations(4, 128)
    clean = native.linear(x, layout_of(packed), int8)
    x[1, 5], x[2, 7], x[3, 7] = float("nan"), float("inf"), -float("inf")
    product = native.linear(x, layout_of(packed), int8)
    assert torch.equal(product[0], clean[0])
    assert product[1].isnan().all()
    exact = x[2:] @ packed.dequantize().t()
    assert torch.equal(product[2:].isnan(), exact.isnan())
    assert torch.equal(product[2:].nan_to_num(0, 1, -1), exact.nan_to_num(0, 1, -1))


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
    coding=codings_with([0, 32, 64, 96, 160, 256]),
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
    with pytest.raises(ValueError, match="expected int64"):
        native.look_up(native.dense_embedding(torch.zeros(3, 4)), ids)
