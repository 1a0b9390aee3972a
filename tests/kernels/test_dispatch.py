"""Dispatch takes a fast path where there is one, the reference elsewhere, and says when it falls back."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch

from packed_weights import random_packed
from tailorbird.formats.codebooks import VECTOR_UNITS
from tailorbird.formats.modules import CompressedLinear
from tailorbird.formats.packed import GROUP_SIZES, CodebookCoding, IntegerCoding, TableCoding, VectorCoding
from tailorbird.kernels import cpu, dispatch, native
from tailorbird.kernels.packing import BITS

CPU = torch.device("cpu")
BF16 = torch.bfloat16

needs_vectors = pytest.mark.skipif(not cpu.has_vector_kernels(), reason="no fast path on this processor")


@needs_vectors
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("symmetric", [False, True])
def test_every_coding_has_one_fast_path_for_few_bfloat16_rows(bits, group_size, symmetric) -> None:
    coding = IntegerCoding(bits, group_size, symmetric)
    names = {dispatch.choose(coding, 512, rows, BF16, CPU) for rows in (1, 8, 32)}
    assert len(names) == 1
    assert names != {dispatch.REFERENCE}


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("codebook", ["nf4", "fp4", "gauss2", "gauss3", "gauss4"])
def test_only_paths_that_look_levels_up_serve_a_codebook(codebook: str, group_size: int) -> None:
    coding = CodebookCoding(codebook, group_size)
    serving = {path.name for path in dispatch.PATHS if coding.kind in path.kinds and path.serves(coding, 512)}
    panels = {"native-panels"} if coding.bits == native.CODEBOOK_BITS else set()
    assert serving == {"native-int8", "native-float"} | panels


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("codebook", VECTOR_UNITS)
def test_only_paths_that_read_bytes_serve_points(codebook: str, group_size: int) -> None:
    coding = VectorCoding(codebook, group_size)
    serving = {path.name for path in dispatch.PATHS if coding.kind in path.kinds and path.serves(coding, 512)}
    assert serving == {"native-int8", "native-float"}


@pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")
@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize("rows", [1, 40, 600])
@pytest.mark.parametrize(
    ("dtype", "device", "gradient", "expected"),
    [
        (BF16, "cpu", False, "native-tables"),
        (torch.float32, "cpu", False, "native-tables"),
        (torch.float16, "cpu", False, dispatch.REFERENCE),
        (BF16, "cpu", True, dispatch.REFERENCE),
        (BF16, "cuda", False, dispatch.REFERENCE),
    ],
)
def test_tables_have_a_path_of_their_own(
    dtype: torch.dtype, device: str, gradient: bool, expected: str, rows: int, rounds: bool
) -> None:
    path = dispatch.choose(TableCoding(4), 512, rows, dtype, torch.device(device), rounds, gradient)
    assert path == expected


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize(
    ("rows", "dtype", "device"),
    [(1, torch.float16, "cpu"), (512, torch.float64, "cpu"), (1, BF16, "meta"), (0, BF16, "cpu")],
)
def test_everything_else_takes_the_reference(rows, dtype, device, gradient) -> None:
    path = dispatch.choose(
        IntegerCoding(4, 64), 512, rows, dtype, torch.device(device), rounds=True, gradient=gradient
    )
    assert path == "reference"


@pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize(("rows", "gradient"), [(600, False), (1, True), (600, True)])
def test_many_rows_and_rows_that_need_a_gradient_go_panel_by_panel(bits, group_size, rows, gradient) -> None:
    for dtype in (BF16, torch.float32):
        path = dispatch.choose(
            IntegerCoding(bits, group_size), 500, rows, dtype, CPU, rounds=gradient, gradient=gradient
        )
        assert path == "native-panels"


@needs_vectors
def test_a_linear_names_the_path_that_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    module = CompressedLinear.from_packed(random_packed(IntegerCoding(8, 0, symmetric=True), (32, 64)))
    assert module.path(1, BF16) == "aten-int8"
    assert module.path(64, torch.float16) == "reference"
    taken = []
    spies = tuple(
        dataclasses.replace(
            path, multiply=lambda x, layout, path=path: (taken.append(path.name), path.multiply(x, layout))[1]
        )
        for path in dispatch.PATHS
    )
    monkeypatch.setattr(dispatch, "PATHS", spies)
    module(torch.randn(2, 64).to(BF16))
    assert taken[-1] == "aten-int8"
    taken.clear()
    module(torch.randn(64, 64).half())
    assert taken == []


def raises(*args, **kwargs):
    raise AttributeError("no such operator")


@needs_vectors
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ({"prepare": raises}, "no such operator"),
        ({"multiply": raises}, "no such operator"),
        ({"multiply": lambda x, layout: cpu.linear_nibbles(x, layout) * 1.5}, "wrong"),
        ({"runs_here": lambda: False}, "this processor has neither"),
    ],
)
def test_a_path_that_fails_here_is_left_out_and_logged_once(fault, says, monkeypatch, caplog) -> None:
    broken = dataclasses.replace(next(p for p in dispatch.PATHS if p.name == "aten-int4"), **fault)
    monkeypatch.setattr(dispatch, "PATHS", (broken,))
    module = CompressedLinear.from_packed(random_packed(IntegerCoding(4, 32), (32, 64)))
    x = torch.randn(2, 64).to(BF16)
    with caplog.at_level(logging.WARNING, logger="tailorbird"):
        first, second = module(x), module(x)
    assert torch.equal(first, torch.nn.functional.linear(x, module.packed().dequantize(BF16)))
    assert torch.equal(first, second)
    assert len(caplog.records) == 1
    assert says in caplog.text
    assert "aten-int4" in caplog.text
