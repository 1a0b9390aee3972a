"""Attention over pages agrees with float64 softmax over each token's own past, on every path."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tailorbird.kernels import native, paged_attention
from tailorbird.kernels.blocks import PAGE
from tailorbird.kernels.paged_attention import (
    GATHERED,
    NATIVE,
    TRITON,
    AttentionLayer,
    PackedTokens,
    attend,
    choose,
)
from triton_cases import DEVICE, with_triton

CPU = torch.device("cpu")
#: tokens that each sequence reads in each step
STEPS = [[40, 3, 0, 65], [1, 1, 7, 30], [1, 1, 1, 1], [5, 1, 1, 1]]
LAYERS = {
    "plain": AttentionLayer(4, 4, 16, 0.25),
    "grouped": AttentionLayer(6, 2, 32, 0.2),
    "one head of keys": AttentionLayer(3, 1, 16, 0.3),
    "window": AttentionLayer(4, 2, 16, 0.25, window=37),
    "window of one": AttentionLayer(2, 2, 16, 0.25, window=1),
    "soft cap": AttentionLayer(4, 2, 16, 0.5, window=50, softcap=2.0),
}
SINKS = AttentionLayer(4, 2, 16, 0.25, window=20, softcap=3.0, sinks=True)


def expected(
    layer: AttentionLayer, query: Tensor, keys: Tensor, values: Tensor, sinks: Tensor | None
) -> Tensor:
    """``[heads, head_dim]`` of the last of a sequence's tokens; keys and values ``[kv_heads, tokens, d]``."""
    if layer.window:
        keys, values = keys[:, -layer.window :], values[:, -layer.window :]
    group = layer.heads // layer.kv_heads
    keys, values = (part.double().repeat_interleave(group, 0) for part in (keys, values))
    scores = (keys @ query.double()[:, :, None])[..., 0] * layer.scale
    if layer.softcap:
        scores = layer.softcap * torch.tanh(scores / layer.softcap)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None]], 1)
    weights = scores.softmax(1)[:, : keys.shape[1]]
    return (weights[:, None] @ values)[:, 0]


def check(
    layer: AttentionLayer, path: str, dtype: torch.dtype, tolerance: float, device: torch.device = CPU
) -> None:
    """Several sequences over several steps, their pages in any order."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    counts = len(STEPS[0])
    most = 1 + max(sum(step[i] for step in STEPS) for i in range(counts)) // PAGE
    tables = torch.randperm(counts * most, generator=generator).int().view(counts, most)
    shape = counts * most, layer.kv_heads, layer.head_dim * PAGE
    pages = (torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))
    sinks = normal(layer.heads) if layer.sinks else None
    past = [(normal(layer.kv_heads, 0, layer.head_dim), normal(layer.kv_heads, 0, layer.head_dim))] * counts
    for step in STEPS:
        positions, sequences, queries, keys, values, wanted = [], [], [], [], [], []
        for number, count in enumerate(step):
            start = past[number][0].shape[1]
            positions += range(start, start + count)
            sequences += [number] * count
            query = normal(layer.heads, count, layer.head_dim)
            key, value = (normal(layer.kv_heads, count, layer.head_dim) for _ in range(2))
            for part, new in ((queries, query), (keys, key), (values, value)):
                part.append(new)
            whole = torch.cat([past[number][0], key], 1), torch.cat([past[number][1], value], 1)
            past[number] = whole
            for i in range(count):
                seen = (part[:, : start + i + 1] for part in whole)
                wanted.append(expected(layer, query[:, i], *seen, sinks))
        tokens = PackedTokens(
            torch.tensor(positions, dtype=torch.int32),
            torch.tensor(sequences, dtype=torch.int32),
            tables,
            device,
        )
        given = (torch.cat(part, 1).to(device) for part in (queries, keys, values))
        found = attend(layer, path, tokens, *given, pages, None if sinks is None else sinks.to(device))
        assert found.dtype == dtype
        torch.testing.assert_close(
            found.double().cpu(), torch.stack(wanted), atol=tolerance, rtol=tolerance, check_device=False
        )


@pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_compiled_attention_is_exact(name: str, dtype: torch.dtype, tolerance: float) -> None:
    check(LAYERS[name], NATIVE, dtype, tolerance)


@pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("name", LAYERS)
def test_compiled_attention_has_the_same_bits_alone(name: str) -> None:
    layer, lengths = LAYERS[name], [50, 1, 33]
    queries = [torch.randn(layer.heads, length, layer.head_dim) for length in lengths]
    pairs = [torch.randn(2, layer.kv_heads, length, layer.head_dim) for length in lengths]

    def attended(chosen: list[int]) -> Tensor:
        shape = 2 * len(chosen), layer.kv_heads, layer.head_dim * PAGE
        positions = torch.cat([torch.arange(lengths[i], dtype=torch.int32) for i in chosen])
        sequences = torch.repeat_interleave(torch.tensor([lengths[i] for i in chosen])).int()
        tables = torch.arange(2 * len(chosen), dtype=torch.int32).view(-1, 2)
        keys, values = torch.cat([pairs[i] for i in chosen], 2)
        return attend(
            layer, NATIVE, PackedTokens(positions, sequences, tables, CPU),
            torch.cat([queries[i] for i in chosen], 1), keys, values,
            (torch.zeros(shape), torch.zeros(shape)),
        )  # fmt: skip

    together = attended([0, 1, 2]).split(lengths)
    for number, found in enumerate(together):
        assert torch.equal(found, attended([number]))


@pytest.mark.parametrize(
    "layer", [*LAYERS.values(), SINKS, replace(SINKS, softcap=0.0), AttentionLayer(2, 1, 6, 0.4)]
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
def test_gathered_attention_is_exact(layer: AttentionLayer, dtype: torch.dtype, tolerance: float) -> None:
    check(layer, GATHERED, dtype, tolerance)


@with_triton
@pytest.mark.parametrize("name", ["grouped", "soft cap"])
def test_tokens_alone_of_their_sequence_are_decoded_by_triton(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tailorbird.kernels import triton_attention

    decode, decoded = triton_attention.decode, []

    def counted(queries: Tensor, *arguments: object, **settings: object) -> Tensor:
        decoded.append(len(queries))
        return decode(queries, *arguments, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(triton_attention, "decode", counted)
    check(LAYERS[name], TRITON, torch.float16, 1e-2, DEVICE)
    assert decoded == [sum(count == 1 for count in step) for step in STEPS if 1 in step]


def test_what_computes_it_follows_from_layer_dtype_and_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", lambda: True)
    monkeypatch.setattr(paged_attention, "has_triton", lambda: True)
    plain, gpu = LAYERS["plain"], torch.device("cuda")
    assert choose(plain, torch.bfloat16, CPU) == NATIVE
    assert choose(replace(plain, head_dim=24), torch.bfloat16, CPU) == GATHERED
    assert choose(SINKS, torch.bfloat16, CPU) == choose(SINKS, torch.bfloat16, gpu) == GATHERED
    assert choose(plain, torch.bfloat16, gpu) == TRITON
    assert choose(plain, torch.float32, gpu) == GATHERED
