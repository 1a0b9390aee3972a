"""Counted operations agree with what PyTorch counts, and predicted seconds obey the slower resource."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tailorbird.hardware.cost import (
    decode_tokens_per_s,
    forward_flops,
    gptq_flops,
    gram_flops,
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
