"""Triton's kernels: exact up to float32's rounding, and a row has the same bits alone and among others.

Without a GPU they run in Triton's interpreter, on small shapes.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from packed_weights import random_packed
from tailorbird.errors import ResourceError, SettingsError
from tailorbird.formats.packed import IntegerCoding
from tailorbird.kernels import dispatch, triton_adapters, triton_attention, triton_linear, triton_runtime
from tailorbird.kernels.packing import BITS, pack_codes
from triton_cases import DEVICE, DTYPES, ON_GPU, ROUNDING, of_rounding, planes_of, random, with_triton

#: The interpreter multiplies tiles with NumPy, whose order of summing depends on the tile's shape. With up to
#: so many rows it is the same.
MOST_ROWS = 65 if ON_GPU else 16


@with_triton
@given(
    bits=st.sampled_from(BITS),
    group_size=st.sampled_from([0, 32, 64, 96, 128, 256]),
    symmetric=st.booleans(),
    scale_dtype=st.sampled_from(["float16", "bfloat16"]),
    dtype=st.sampled_from(DTYPES),
    rows=st.sampled_from([1, 2, 5, 16, 17, 33, 65]),
    shape=st.tuples(st.sampled_from([1, 63, 65, 130]), st.sampled_from([1, 31, 172, 320, 1056, 2100])),
)
@settings(max_examples=50, deadline=None)
def test_products_are_exact_up_to_rounding(
    bits: int,
    group_size: int,
    symmetric: bool,
    scale_dtype: str,
    dtype: torch.dtype,
    rows: int,
    shape: tuple[int, int],
) -> None:
    packed = random_packed(IntegerCoding(bits, group_size, symmetric, scale_dtype), shape)
    x = random(rows, rows, shape[1], dtype=dtype)
    weight = packed.dequantize(torch.float64).to(DEVICE)
    exact = x.double() @ weight.t()
    product = triton_linear.linear(x, planes_of(packed))
    assert product.dtype == dtype
    # Every product, partial sum and scaling is rounded to float32, the result once more to its dtype.
    bound = (shape[1] + 4) * 2.0**-24 * (x.double().abs() @ weight.abs().t())
    bound += of_rounding(exact.abs() + bound, dtype)
    assert ((product.double() - exact).abs() <= bound).all()


@with_triton
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_unit_vectors_give_the_weight_exactly(bits: int, symmetric: bool) -> None:
    packed = random_packed(IntegerCoding(bits, 64, symmetric, "float16"), (20, 600))
    columns = torch.arange(0, 600, 19)
    units = torch.eye(600, device=DEVICE)[columns]
    product = triton_linear.linear(units, planes_of(packed))
    assert torch.equal(product.cpu(), packed.dequantize(torch.float32).t()[columns])


@with_triton
@given(
    bits=st.sampled_from(BITS),
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(2, MOST_ROWS),
    columns=st.sampled_from([200, 1056]),
)
@settings(max_examples=15, deadline=None)
def test_a_row_has_the_same_bits_alone_and_among_others(
    bits: int, dtype: torch.dtype, rows: int, columns: int
) -> None:
    layout = planes_of(random_packed(IntegerCoding(bits, 64), (70, columns)))
    x = random(rows, rows, columns, dtype=dtype)
    together = triton_linear.linear(x, layout)
    for row in {0, rows // 2, rows - 1}:
        assert torch.equal(triton_linear.linear(x[row : row + 1], layout)[0], together[row])


@pytest.mark.skipif(not ON_GPU, reason="the interpreter knows one launch only")
@pytest.mark.parametrize("bits", BITS)
def test_every_launch_gives_the_same_bits(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layout, x = planes_of(random_packed(IntegerCoding(bits, 64), (200, 1056))), random(bits, 40, 1056)
    cache, tables, _, _ = cache_of(2, 64, 16, torch.bfloat16, triton_attention.to_int4)
    queries = random(3, len(LENGTHS), 4, 64, dtype=torch.bfloat16)
    lengths = torch.tensor(LENGTHS, dtype=torch.int32, device=DEVICE)
    monkeypatch.setattr(triton_linear, "SMALL", 0)
    results = []
    for number in range(3):
        for module in (triton_linear, triton_attention):
            monkeypatch.setattr(module, "choose", lambda *given, number=number: given[2][number])
        attended = triton_attention.decode(queries, cache, tables, lengths)
        results.append((triton_linear.linear(x, layout), attended))
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


@with_triton
@pytest.mark.parametrize("bits", BITS)
def test_planes_waste_no_bit_where_inputs_fill_their_steps(bits: int) -> None:
    layout = planes_of(random_packed(IntegerCoding(bits, 128), (8, 1024)))
    stored = layout.low.nbytes + (0 if layout.high is None else layout.high.nbytes)
    assert stored == 8 * 1024 * bits // 8


@with_triton
def test_no_rows_give_no_rows() -> None:
    layout = planes_of(random_packed(IntegerCoding(4, 64), (8, 64)))
    assert triton_linear.linear(torch.empty(0, 64, device=DEVICE), layout).shape == (0, 8)


def test_groups_that_split_chunks_are_refused() -> None:
    codes = pack_codes(torch.zeros(4, 96, dtype=torch.uint8), 4)
    scales = torch.ones(4, 2, dtype=torch.bfloat16)
    with pytest.raises(SettingsError, match="groups of 48"):
        triton_linear.prepare(codes, scales, None, bits=4, group_size=48, in_features=96)


@with_triton
def test_other_activations_are_refused() -> None:
    layout = planes_of(random_packed(IntegerCoding(4, 64), (8, 64)))
    for x in (torch.zeros(2, 63, device=DEVICE), torch.zeros(2, 64, device=DEVICE, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"expected float16, bfloat16 or float32 \[rows, 64\]"):
            triton_linear.linear(x, layout)


#: sequences of the attention tests: tokens of each, none and one among them, and across several splits
LENGTHS = [1100, 1, 0, 513, 70]


#: how keys and values may be stored, None as they are
STORED = [None, triton_attention.to_int8, triton_attention.to_int4]


def cache_of(kv_heads: int, head_dim: int, page: int, dtype: torch.dtype, store: Callable | None) -> tuple:
    """A cache of shuffled pages for `LENGTHS`, its table, and its keys and values as they count."""
    most = -(-max(LENGTHS) // page)
    pages = len(LENGTHS) * most
    generator = torch.Generator().manual_seed(page)
    tables = torch.randperm(pages, generator=generator).view(len(LENGTHS), most).int().to(DEVICE)
    keys, values = (random(n, pages, page, kv_heads, head_dim, dtype=dtype) for n in (1, 2))
    if store is None:
        return triton_attention.Cache(keys, values), tables, keys.double(), values.double()
    keys, values = store(keys), store(values)
    cache = triton_attention.Cache(*(part for pair in zip(keys, values, strict=True) for part in pair))
    return cache, tables, restored(*keys), restored(*values)


def restored(codes: Tensor, scales: Tensor, zeros: Tensor | None = None) -> Tensor:
    """Stored keys or values as they count."""
    if zeros is None:
        return codes * scales.double()[..., None]
    values = torch.cat([codes & 15, codes >> 4], -1)
    return (values.double() - zeros[..., None]) * scales.double()[..., None]


@with_triton
@given(
    kv_heads=st.sampled_from([1, 2]),
    group=st.sampled_from([1, 3, 4]),
    head_dim=st.sampled_from([16, 64, 80]),
    page=st.sampled_from([16, 24, 256]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    store=st.sampled_from(STORED),
    window=st.sampled_from([None, 1, 100, 600]),
    soft_cap=st.sampled_from([None, 5.0]),
)
@settings(max_examples=15, deadline=None)
def test_attention_is_softmax_over_the_tokens_in_sight(
    kv_heads: int,
    group: int,
    head_dim: int,
    page: int,
    dtype: torch.dtype,
    store: Callable | None,
    window: int | None,
    soft_cap: float | None,
) -> None:
    cache, tables, keys, values = cache_of(kv_heads, head_dim, page, dtype, store)
    queries = random(3, len(LENGTHS), kv_heads * group, head_dim, dtype=dtype)
    lengths = torch.tensor(LENGTHS, dtype=torch.int32, device=DEVICE)
    found = triton_attention.decode(queries, cache, tables, lengths, window=window, soft_cap=soft_cap)
    assert found.dtype == dtype
    for sequence, length in enumerate(LENGTHS):
        seen = slice(0 if window is None else max(0, length - window), length)
        pages = tables[sequence].long()
        k, v = (part[pages].flatten(0, 1)[seen].repeat_interleave(group, 1) for part in (keys, values))
        query = queries[sequence].double() * head_dim**-0.5
        scores = torch.einsum("hd,nhd->hn", query, k)
        sizes = torch.einsum("hd,nhd->hn", query.abs(), k.abs())
        if soft_cap is not None:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        weights = scores.softmax(-1)
        exact = torch.einsum("hn,nhd->hd", weights, v)
        # Scores are float32; weights are rounded to `dtype` where the largest is 1; then the result is.
        of_scores = (head_dim + 16) * 2.0**-23 * max(sizes.max().item() if length else 0.0, soft_cap or 0.0)
        of_weights = ROUNDING[dtype] + 2 * of_scores + (length + 4) * 2.0**-24
        bound = of_weights * torch.einsum("hn,nhd->hd", weights, v.abs())
        if dtype == torch.float16:
            # A weight is multiplied by its vector's scale first, which makes it the smaller the more codes
            # there are.
            bound += 2.0**-25 * {STORED[1]: 127, STORED[2]: 15}.get(store, 1) * v.abs().sum(0)
        bound += of_rounding(exact.abs() + bound, dtype)
        assert ((found[sequence].double() - exact).abs() <= bound).all()


@with_triton
@pytest.mark.parametrize(
    ("window", "store"), [(None, None), (300, None), (None, STORED[1]), (300, STORED[2])]
)
def test_attention_of_a_sequence_has_the_same_bits_alone_and_among_others(
    window: int | None, store: Callable | None
) -> None:
    cache, tables, _, _ = cache_of(2, 64, 16, torch.bfloat16, store)
    queries = random(3, len(LENGTHS), 4, 64, dtype=torch.bfloat16)
    lengths = torch.tensor(LENGTHS, dtype=torch.int32, device=DEVICE)
    together = triton_attention.decode(queries, cache, tables, lengths, window=window)
    for n, length in enumerate(LENGTHS):
        own = tables[n : n + 1, : max(1, -(-length // 16))].contiguous()
        alone = triton_attention.decode(queries[n : n + 1], cache, own, lengths[n : n + 1], window=window)
        assert torch.equal(alone[0], together[n])


@given(columns=st.integers(1, 40), seed=st.integers(0, 9), size=st.sampled_from([0.0, 1e-20, 1.0, 1e4]))
def test_vectors_in_int8_are_off_by_half_a_step_at_most(columns: int, seed: int, size: float) -> None:
    vectors = random(seed, 3, columns) * size
    stored, scales = triton_attention.to_int8(vectors)
    error = (stored * scales.double()[:, None] - vectors.double()).abs()
    assert (error <= 0.5001 * scales.double()[:, None]).all()


@given(
    halves=st.integers(1, 40),
    seed=st.integers(0, 9),
    size=st.sampled_from([0.0, 1e-20, 1.0, 1e4]),
    middle=st.sampled_from([0.0, 0.3, 5.0, -5.0]),
)
def test_vectors_in_int4_are_off_by_half_a_step_at_most(
    halves: int, seed: int, size: float, middle: float
) -> None:
    vectors = (random(seed, 3, 2 * halves) + middle) * size
    packed, scales, zeros = triton_attention.to_int4(vectors)
    assert packed.shape == (3, halves)
    assert int(zeros.max()) <= 15
    error = (restored(packed, scales, zeros) - vectors.double()).abs()
    assert (error <= 0.5001 * scales.double()[:, None]).all()
    reach = vectors.amax(-1).clamp(min=0) - vectors.amin(-1).clamp(max=0)
    assert (scales <= 1.0001 * reach / 15).all()


@with_triton
def test_attention_refuses_what_does_not_fit() -> None:
    cache, tables, _, _ = cache_of(2, 16, 16, torch.float16, None)
    queries = random(3, len(LENGTHS), 4, 16, dtype=torch.float16)
    lengths = torch.tensor(LENGTHS, dtype=torch.int32, device=DEVICE)
    decode = triton_attention.decode
    with pytest.raises(ValueError, match="expected float16 or bfloat16"):
        decode(queries.float(), cache, tables, lengths)
    with pytest.raises(ValueError, match=r"expected both torch\.bfloat16 without either, or int8"):
        decode(queries.bfloat16(), cache, tables, lengths)
    packed, _, _, _ = cache_of(2, 16, 16, torch.float16, triton_attention.to_int4)
    for missing in ({"key_zeros": None}, {"value_scales": None}):
        with pytest.raises(ValueError, match="or uint8 with uint8 zero points too"):
            decode(queries, dataclasses.replace(packed, **missing), tables, lengths)
    with pytest.raises(ValueError, match="half as wide in uint8"):
        decode(queries[..., :8], packed, tables, lengths)
    with pytest.raises(ValueError, match="expected an even number"):
        triton_attention.to_int4(torch.zeros(3, 5))
    with pytest.raises(ValueError, match="heads a multiple of kv_heads"):
        decode(queries[:, :3], cache, tables, lengths)
    with pytest.raises(ValueError, match="expected int32"):
        decode(queries, cache, tables.long(), lengths)
    with pytest.raises(ValueError, match="window 0"):
        decode(queries, cache, tables, lengths, window=0)


def adapters_of(ranks: list[int], inputs: int, outputs: int, dtype: torch.dtype) -> list[tuple]:
    return [
        (
            random(n, rank, inputs, dtype=dtype) / inputs**0.5,
            random(n + 50, outputs, rank, dtype=dtype) / rank**0.5,
            0.5 + n,
        )
        for n, rank in enumerate(ranks)
    ]


@with_triton
@given(
    ranks=st.lists(st.sampled_from([1, 8, 16, 33, 70]), min_size=1, max_size=4),
    rows=st.sampled_from([1, 3, 17, 40]),
    shape=st.tuples(st.sampled_from([1, 65, 130]), st.sampled_from([1, 200, 1100])),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_every_row_gets_its_own_adapter(
    ranks: list[int], rows: int, shape: tuple[int, int], dtype: torch.dtype, seed: int
) -> None:
    outputs, inputs = shape
    single = adapters_of(ranks, inputs, outputs, dtype)
    generator = torch.Generator().manual_seed(seed)
    of_row = torch.randint(-1, len(ranks), (rows,), generator=generator).to(DEVICE)
    x, y = random(seed, rows, inputs, dtype=dtype), random(seed + 1, rows, outputs, dtype=dtype)
    before = y.clone()
    tiles = triton_adapters.tile_rows(of_row, len(ranks))
    assert triton_adapters.add(y, x, triton_adapters.stack(single), tiles) is y
    for row, adapter in enumerate(of_row.tolist()):
        if adapter < 0:
            assert torch.equal(y[row], before[row])
            continue
        down, up, scale = single[adapter]
        exact = before[row].double() + scale * (up.double() @ (down.double() @ x[row].double()))
        sizes = up.double().abs() @ (down.double().abs() @ x[row].double().abs())
        bound = (inputs + 150) * 2.0**-24 * (scale * sizes + before[row].double().abs())
        bound += of_rounding(exact.abs() + bound, dtype)
        assert ((y[row].double() - exact).abs() <= bound).all()


@with_triton
@given(rows=st.integers(2, 40), dtype=st.sampled_from(DTYPES))
@settings(max_examples=8, deadline=None)
def test_an_adapted_row_has_the_same_bits_alone_and_among_others(rows: int, dtype: torch.dtype) -> None:
    adapters = triton_adapters.stack(adapters_of([8, 33], 1100, 70, dtype))
    numbers = torch.arange(rows, device=DEVICE)
    of_row = numbers % 3 - 1
    x = random(rows, rows, 1100, dtype=dtype)
    tiles = triton_adapters.tile_rows(of_row, 2)
    together = triton_adapters.add(x.new_zeros(rows, 70), x, adapters, tiles)
    for row in range(0, rows, 5):
        # In the interpreter a row keeps its place in the tile: NumPy's order of summing depends on it too.
        only = torch.where(tiles.rows == row, tiles.rows, -1)
        alone = [triton_adapters.Tiles(only, tiles.adapters)]
        if ON_GPU:
            alone.append(triton_adapters.tile_rows(torch.where(numbers == row, of_row, -1), 2))
        for own in alone:
            found = triton_adapters.add(torch.zeros_like(together), x, adapters, own)
            assert torch.equal(found[row], together[row])


@given(adapters=st.integers(1, 6), rows=st.integers(1, 100), seed=st.integers(0, 99))
def test_tiles_hold_every_adapted_row_once(adapters: int, rows: int, seed: int) -> None:
    of_row = torch.randint(-1, adapters, (rows,), generator=torch.Generator().manual_seed(seed))
    tiles = triton_adapters.tile_rows(of_row, adapters)
    assert sorted(tiles.rows[tiles.rows >= 0].tolist()) == (of_row >= 0).nonzero().flatten().tolist()
    for numbers, adapter in zip(tiles.rows, tiles.adapters, strict=True):
        assert (of_row[numbers[numbers >= 0].long()] == adapter).all()


def test_adapters_that_do_not_fit_each_other_are_refused() -> None:
    (down, up, scale), (narrow, _, _) = adapters_of([4, 4], 20, 10, torch.float32)
    with pytest.raises(ValueError, match="adapter 1 has matrices"):
        triton_adapters.stack([(down, up, scale), (narrow[:, :19], up, scale)])
    with pytest.raises(ValueError, match="at least one"):
        triton_adapters.stack([])


#: Compiles every kernel for an H100, which needs no GPU; arguments not named are pointers to bfloat16.
COMPILED = """
import sys
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tailorbird.kernels import triton_adapters, triton_attention, triton_fp8, triton_int8, triton_linear

I, F = "i32", "*fp32"
PLANES = {"low": "*i32", "zeros": "*u8", "rows": I, "outputs": I, "inputs": I, "words": I, "groups": I,
          "group_chunks": I}
PRODUCT = {**PLANES, "sums": F, "length": I}
ROUNDED = {**PLANES, "codes": "*i8", "x_scales": F, "sums": "*i32", "group_segments": I}
ROUNDING = {"x": "*bf16", "codes": "*i8", "scales": F, "sums": "*i32", "rows": I, "inputs": I,
            "group_size": I, "per_group": I}
FP8 = {"x": "*fp8e4nv", "weight": "*fp8e4nv", "x_scales": F, "scales": F, "rows": I, "outputs": I,
       "inputs": I}
ATTENTION = {"key_scales": F, "value_scales": F, "key_zeros": "*u8", "value_zeros": "*u8",
             "tables": "*i32", "lengths": "*i32", "sums": F, "norms": F, "norms_size": I, "kv_heads": I,
             "most_pages": I, "splits": I, "factor": "fp32", "window": I, "soft_cap": "fp32"}
TILES = {"tile_rows": "*i32", "tile_adapters": "*i32", "middle": F, "ranks": I, "tiles": I}


def product(low, high, words, rows):
    step = 1024 // low
    constants = dict(LOW=low, HIGH=high, HAS_ZEROS=bool(high), STEP=step, CHUNK=32, RUN=2, OUT=64, ROWS=rows,
                     OPERAND=tl.bfloat16)
    return triton_linear._sum_part, {**PRODUCT, "high": words}, constants


def rounded(low, high, words):
    out, rows = triton_int8.LAUNCHES[0].tile
    constants = dict(LOW=low, HIGH=high, HAS_ZEROS=bool(high), STEP=1024 // low, CHUNK=32, RUN=4,
                     SEGMENT_CHUNKS=4, OUT=out, ROWS=rows)
    return triton_int8._multiply, {**ROUNDED, "high": words}, constants


def attention(stored, bits):
    constants = dict(CAPPED=bits < 16, BITS=bits, PAGE=16, SPLIT=512, STEP=64, HEAD=80, WIDE=128,
                     GROUP=4, HEADS=16, OPERAND=tl.bfloat16)
    return triton_attention._sum_split, {**ATTENTION, "keys": stored, "values": stored}, constants


JOB = [
    product(2, 1, "*i16", 32),
    product(4, 0, "*i32", 16),
    (triton_linear._add_parts, {"sums": F, "count": I, "parts": I}, {"BLOCK": 1024}),
    (triton_int8._round_segment, ROUNDING, {"SEGMENT": 128, "RUN": 64}),
    rounded(4, 2, "*i16"),
    rounded(8, 0, "*i32"),
    (triton_fp8._round_row, {"values": "*fp8e4nv", "scales": F, "inputs": I},
     {"LARGEST": triton_fp8.LARGEST, "BLOCK": triton_fp8.BLOCK}),
    (triton_fp8._multiply, FP8, {"STEP": triton_fp8.STEP, "OUT": 64, "ROWS": 64}),
    attention("*bf16", 16),
    attention("*i8", 8),
    attention("*u8", 4),
    (triton_attention._join_splits,
     {"sums": F, "norms": F, "lengths": "*i32", "norms_size": I, "splits": I, "window": I},
     {"SPLIT": 512, "HEAD": 80, "WIDE": 128}),
    (triton_adapters._go_down, {**TILES, "inputs": I},
     {"TILE": 16, "RANK": 64, "PART": 1024, "STEP": 64, "OPERAND": tl.bfloat16}),
    (triton_adapters._go_up, {**TILES, "scales": F, "outputs": I, "parts": I},
     {"TILE": 16, "RANK": 16, "OUT": 64}),
]
for kernel, types, constants in JOB:
    # Integers that are 1 at a launch are constants to the compiler; both ways must work.
    for ones in (set(), {name for name, kind in types.items() if kind == I}):
        fixed = {**constants, **dict.fromkeys(ones, 1)}
        signature = {
            name: "constexpr" if name in fixed else types.get(name, "*bf16") for name in kernel.arg_names
        }
        source = ASTSource(kernel, signature, {(kernel.arg_names.index(n),): v for n, v in fixed.items()})
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_stages": 2})
        assert made.metadata.shared <= 99 * 1024, (kernel, made.metadata.shared)
        print(made.metadata.name)
"""


@with_triton
def test_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    found = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, env=environment)
    assert found.returncode == 0, found.stderr
    assert len(found.stdout.split()) == 2 * 14


def test_without_triton_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = planes_of(random_packed(IntegerCoding(4, 64), (8, 64)))
    monkeypatch.setattr(triton_runtime, "triton", None)
    with pytest.raises(ResourceError, match="pip install triton"):
        triton_linear.linear(torch.zeros(1, 64, device=DEVICE), layout)


@with_triton
def test_tensors_outside_the_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_runtime, "interpreted", lambda: False)
    with pytest.raises(ResourceError, match="tensors on cpu · expected: all on one CUDA device"):
        triton_runtime.require(torch.zeros(1))


def test_dispatching_imports_no_triton() -> None:
    code = (
        "import tailorbird.kernels.dispatch, tailorbird.formats.modules, sys; print('triton' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


@with_triton
@pytest.mark.parametrize("name", ["triton", "triton-int8"])
def test_dispatch_tries_the_product_and_finds_it_right(name: str) -> None:
    """As it would on a GPU, but in the interpreter."""
    path = next(path for path in dispatch.PATHS if path.name == name)
    assert path.device == "cuda"
    assert dispatch.works(dataclasses.replace(path, device=DEVICE.type))
