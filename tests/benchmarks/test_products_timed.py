"""Products that are timed are those with the weights that they are called after, and goals compare them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import cpu_speed
import threads
import training_speed
from tailorbird.formats.packed import CodebookCoding
from tailorbird.kernels import native

compiled = pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")


@compiled
@pytest.mark.parametrize("name", cpu_speed.CODINGS)
def test_what_is_timed_is_the_product_with_the_weight(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_speed, "ROTATED_BYTES", 1)
    coding, shape = cpu_speed.CODINGS[name], (48, 256)
    subject, size = cpu_speed.packed_linear(coding, shape)
    weight = cpu_speed.random_weight(coding, shape)
    assert size == weight.nbytes
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    expected = x @ weight.dequantize().T
    for layout in subject.copies:
        off = subject.call(layout, x) - expected
        assert off.norm() < 0.02 * expected.norm()  # inputs are rounded to bytes


def test_many_tokens_are_compared_with_bytes_and_one_with_4_bits() -> None:
    def rows(tokens: int, seconds: dict[str, float], **sizes: int) -> list[dict]:
        rows = [
            {"linear": name, "tokens": tokens, "seconds": took, "bytes": sizes.get(name[0], 0)}
            for name, took in seconds.items()
        ]
        cpu_speed.judge(rows)
        return rows

    found = rows(256, {"4 bits": 1.0, "8 bits": 1.1, "4 bits sym": 1.4, "nf4": 1.5, cpu_speed.INT8: 1.0})
    goals = {row["linear"]: (row["of_int8"]["goal"], row["of_int8"]["reached"]) for row in found[:-1]}
    assert goals == {
        "4 bits": (0.95, True), "8 bits": (0.95, False), "4 bits sym": (0.7, True), "nf4": (0.7, False),
    }  # fmt: skip
    assert "of_int8" not in found[-1]
    four = {"2 bits": 0.61, "3 bits": 0.89, "4 bits": 1.0, "8 bits": 2.0}
    found = rows(1, four, **{"2": 50, "3": 75, "4": 100, "8": 200})
    assert [row.get("of_4_bits", {}).get("reached") for row in found] == [False, True, None, None]
    assert all(set(row) == {"linear", "tokens", "seconds", "bytes"} for row in rows(8, four))


def test_training_is_timed_through_a_codebook_by_the_same_path() -> None:
    linear = training_speed.packed_linear(CodebookCoding("nf4", training_speed.GROUP), 64, 128)
    assert linear.coding.levels is not None
    if native.available():
        assert linear.path(512, torch.bfloat16, gradient=True) == "native-panels"


@compiled
@pytest.mark.parametrize("tokens", [1, 5])
def test_parts_of_a_block_are_the_block(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SIZE": 128, "INNER": 192, "HEADS": 4, "KV_HEADS": 2}.items():
        monkeypatch.setattr(threads, name, value)
    block = threads.Block(tokens)
    linears = block.linears()
    assert len(linears) == 7
    known = [module.output for module in block.bare.modules() if isinstance(module, threads.Known)]
    assert all(any(torch.equal(one, output) for output in known) for one in linears)
    whole = block.whole()
    assert torch.isfinite(whole).all()
    assert torch.equal(whole, block.rest())
    before = block.x
    block.x = torch.randn_like(before)
    assert not torch.equal(whole, block.whole())
    assert not torch.equal(whole, block.rest())  # norms and additions see it


@compiled
@pytest.mark.parametrize("count", [1, 2])
def test_the_c_function_computes_what_pythons_does(count: int) -> None:
    weight, x = threads.layout(threads.packed_weight(48, 128)), torch.randn(1, 128)
    call = threads.c_function(weight, x, count)
    call()
    assert torch.equal(call.kept[2], native.linear(x, weight, int8=True))


@pytest.mark.parametrize(("rows", "columns"), threads.ORDER_SHAPES)
def test_columns_in_parts_have_the_bytes_of_as_many_times_the_rows(rows: int, columns: int) -> None:
    whole = threads.packed_weight(rows, columns).tensors
    parts = threads.packed_weight(2 * rows, columns // 2).tensors
    assert {name: tensor.nbytes for name, tensor in whole.items()} == {
        name: tensor.nbytes for name, tensor in parts.items()
    }
