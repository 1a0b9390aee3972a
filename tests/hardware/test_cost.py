"""Counted operations agree with what PyTorch counts, and predicted seconds obey the slower resource."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tailorbird.hardware.cost import (
    AttentionTimes,
    BlockShape,
    KernelTimes,
    ModelShape,
    ProductShape,
    decode_step_seconds,
    decode_tokens_per_s,
    forward_flops,
    gptq_flops,
    gram_flops,
    prefill_seconds,
)
from tailorbird.hardware.probe import Probe
from tiny import make_model

MACHINE = Probe(
    cores=2,
    simd=[],
    memory_bytes=1,
    memory_available_bytes=1,
    read_bandwidth=100.0,
    copy_bandwidth=100.0,
    disk_free_bytes=1,
    disk_bandwidth=10.0,
    matmul={"fp32": 1000.0, "bf16": 4000.0, "int8": None},
    devices=[],
)


def test_forward_flops_are_those_that_a_model_runs() -> None:
    model = make_model("llama", attn_implementation="eager")
    ids = torch.randint(0, 256, (3, 20))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids)
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    counted = forward_flops(3 * 20, weights, layers=2, attention_width=64, context=20)
    # The rotary tables are a product too, of less than a hundredth of the work.
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_gram_flops_are_those_of_the_product() -> None:
    x = torch.randn(50, 24)
    with FlopCounterMode(display=False) as counter:
        x.T @ x
    assert gram_flops(50, 24) == counter.get_total_flops()


def test_gptq_flops_grow_with_the_cube_of_inputs_and_the_number_of_outputs() -> None:
    assert gptq_flops(0, 64) * 8 == gptq_flops(0, 128)
    assert gptq_flops(10, 64) - gptq_flops(0, 64) == 10 * 64**2


def test_decoding_is_bound_by_reading_weights_once_per_step() -> None:
    assert decode_tokens_per_s(50, MACHINE) == 2
    assert decode_tokens_per_s(50, MACHINE, batch=8, fraction=0.5) == 8


#: Every coefficient another power of ten, so that each can be read off a sum.
TIMES = KernelTimes(
    threads=2,
    piece=8,
    tokens=(1, 4, 16),
    products={"a": ((1.0, 3.0), (2.0, 4.0), (10.0, 10.0)), "b": ((5.0, 5.0), (5.0, 5.0), (5.0, 5.0))},
    heads={"a": ((1.0, 3.0), (2.0, 4.0), (10.0, 10.0)), "b": ((5.0, 5.0), (5.0, 5.0), (5.0, 5.0))},
    streaming=((100, 0.0), (10_000, 1.0)),
    block=1e3,
    token=1e4,
    norms=1e5,
    activation=1e7,
    alone=AttentionTimes(placed=1e6, query=1e15, pair=1e8),
    alone_streamed=AttentionTimes(placed=3e6, query=3e15, pair=3e8, byte=1e7),
    together=AttentionTimes(placed=0.0, query=0.0, pair=1e9),
    step=1e10,
    step_streamed=1e10,
    sequence=1e11,
    begin=1e16,
    begin_block=1e17,
    logit=1e12,
    lookup=1e13,
    unpacked=1e14,
)
BLOCK = BlockShape(
    (ProductShape("a", 6, 40), ProductShape("b", 7, 40)), width=2, attended=3, inner=5, cached_bytes=4
)
SHAPE = ModelShape((BLOCK, replace(BLOCK, window=3)), ProductShape("b", 11, 20), vocab_size=13)


@pytest.mark.parametrize(("batch", "context"), [(1, 0), (1, 9), (3, 2), (4, 7)])
def test_a_decoding_step_is_the_sum_of_its_parts(batch: int, context: int) -> None:
    own = math.ceil(batch / 2)
    pairs = batch * (context + 1) + batch * min(context + 1, 3)
    a = {1: 1.0, 3: 5 / 3, 4: 2.0}[batch]
    streamed = 0.5 * math.log10((SHAPE.bytes + 4 * pairs) / 100)  # 100 to 10,000 are two factors of ten
    a += streamed * 2
    more = 1 + 2 * streamed  # attention from memory takes three times as long
    blocks = 2 * (1e3 + own * (1e4 + 2e5 + 3e6 * more + 5e7) + 6 * a + 7 * 5)
    around = 1e10 + batch * 1e11 + 11 * 5 + batch * 13 * 1e12
    attention = (2 * batch * 1e15 + pairs * 1e8) * more * 3 + pairs * streamed * 1e7 * 4
    expected = blocks + attention + around
    assert decode_step_seconds(SHAPE, TIMES, batch, context) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("batch", "prompt"), [(1, 1), (1, 8), (1, 21), (3, 5), (2, 16)])
def test_a_prompt_is_read_in_pieces_whose_queries_meet_what_stands_before_them(
    batch: int, prompt: int
) -> None:
    only_attention = replace(
        TIMES, block=0, token=0, norms=0, activation=0, step=0, step_streamed=0, sequence=0,
        begin=0, begin_block=0, logit=0,
        products=dict.fromkeys("ab", ((0.0, 0.0),) * 3), heads=dict.fromkeys("ab", ((0.0, 0.0),) * 3),
    )  # fmt: skip
    met = sum(min(i + 1, window) for _ in range(batch) for i in range(prompt) for window in (math.inf, 3))
    found = prefill_seconds(SHAPE, only_attention, batch, prompt)
    assert found == pytest.approx(met * 3 * 1e9, rel=1e-12)
    only_blocks = replace(only_attention, together=AttentionTimes(0, 0, 0), block=1.0)
    assert prefill_seconds(SHAPE, only_blocks, batch, prompt) == 2 * math.ceil(batch * prompt / 8)


def test_beginning_takes_its_share_of_a_prompt_only() -> None:
    nothing = replace(TIMES, begin=0, begin_block=0)
    more = prefill_seconds(SHAPE, TIMES, 2, 5) - prefill_seconds(SHAPE, nothing, 2, 5)
    assert more == pytest.approx(1e16 + 2 * 1e17)
    assert decode_step_seconds(SHAPE, TIMES, 2, 5) == decode_step_seconds(SHAPE, nothing, 2, 5)


def test_products_between_and_beyond_the_measured_numbers_of_tokens() -> None:
    product = ProductShape("a", 1, 1)
    for tokens, seconds in ((1, 1.0), (4, 2.0), (10, 6.0), (16, 10.0), (28, 18.0)):
        assert TIMES.product_seconds(product, tokens, 0.0) == pytest.approx(seconds)
    assert TIMES.product_seconds(product, 1, 1.0) == 3.0


def test_an_unpacked_embedding_takes_its_share() -> None:
    packed = replace(SHAPE, looked_up=17)
    more = decode_step_seconds(packed, TIMES, 2, 5) - decode_step_seconds(SHAPE, TIMES, 2, 5)
    assert more == pytest.approx(1e13 + 2 * 17 * 1e14)


def test_head_and_step_go_by_what_was_measured_for_them() -> None:
    model = ModelShape((), ProductShape("a", 10, 1000), 0)
    nothing = dict.fromkeys(("sequence", "logit", "lookup", "unpacked"), 0.0)
    times = replace(
        TIMES, heads={"a": ((2.0, 6.0),) * 3}, step=100.0, step_streamed=200.0, **nothing
    )  # fmt: skip
    share = times.streamed_share(1000)
    assert 0 < share < 1
    assert decode_step_seconds(model, times, 1, 0) == pytest.approx(10 * (2 + share * 4) + 100 + share * 100)
