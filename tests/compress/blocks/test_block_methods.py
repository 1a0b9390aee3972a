"""What learns inside a block begins at what was rounded, stores what it learned, and never loses."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from learned_weights import begun, files, weight_of
from tailorbird.compress.blocks import BLOCK_METHODS
from tailorbird.compress.blocks.cbq import Cbq
from tailorbird.compress.blocks.efficientqat import EfficientQat
from tailorbird.compress.blocks.flexround import FlexRound
from tailorbird.compress.blocks.omniquant import OmniQuant
from tailorbird.compress.blocks.signround import SignRound
from tailorbird.compress.blocks.training import learn
from tailorbird.compress.whole import WHOLE_METHODS
from tailorbird.errors import SettingsError
from tailorbird.formats.packed import IntegerCoding
from tailorbird.linear.quantize.rtn import Rtn

CODINGS = [
    IntegerCoding(bits, group, symmetric, dtype)
    for bits, group, symmetric, dtype in (
        (2, 32, False, "bfloat16"), (3, 64, True, "float16"),
        (4, 0, False, "float16"), (8, 32, True, "bfloat16"),
    )
]  # fmt: skip
METHODS: dict[str, Any] = {**BLOCK_METHODS, **WHOLE_METHODS}
#: begins behind matrices: `test_flatquant.py`
ANEW = "flatquant"

each_coding = pytest.mark.parametrize("coding", CODINGS, ids=lambda coding: coding.label)
each_method = pytest.mark.parametrize("name", METHODS)
each_that_goes_on = pytest.mark.parametrize("name", sorted(METHODS.keys() - {ANEW}))


@each_coding
@each_that_goes_on
def test_it_begins_at_what_was_rounded(coding: IntegerCoding, name: str) -> None:
    weight = weight_of()
    # codes that aren't the nearest, as a method with feedback chooses them
    packed = Rtn()(weight + 0.3 * weight_of(seed=1), None, coding)
    learned = METHODS[name]().begin(weight, packed, coding)
    assert torch.equal(learned(), packed.dequantize())
    again = learned.packed()
    assert again.tensors.keys() == packed.tensors.keys()
    assert all(torch.equal(again.tensors[part], packed.tensors[part]) for part in packed.tensors)


@each_coding
@each_that_goes_on
def test_what_is_stored_is_what_was_learned(coding: IntegerCoding, name: str) -> None:
    learned = begun(METHODS[name](), coding)
    before = learned().detach()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in learned.parameters():
            if parameter.requires_grad:
                parameter += 0.4 * torch.randn(parameter.shape, generator=generator)
    learned.limit()
    assert torch.equal(learned.packed().dequantize(), learned())
    assert not torch.equal(learned(), before)


@pytest.mark.parametrize(
    "method",
    [
        SignRound(steps=100, batch=4, scale_rate=1e-9),
        FlexRound(steps=100, batch=4, rate=0.05, scale_rate=0.0),
        EfficientQat(steps=100, batch=4, rate=0.05, scale_rate=0.0, zero_rate=0.0),
        Cbq(steps=100, batch=4, rate=0.05, scale_rate=0.0),
    ],
    ids=lambda method: type(method).__name__,
)
def test_a_weight_of_few_numbers_comes_near_the_best_of_all_codes(tmp_path: Path, method: Any) -> None:
    """One output, five inputs, two bits: every choice of codes can be tried."""
    found_best = 0
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        mixing = torch.randn(5, 5, generator=generator)
        x = torch.randn(4, 64, 5, generator=generator) @ mixing
        module = nn.Linear(5, 1, bias=False).requires_grad_(False)
        module.weight.copy_(torch.randn(1, 5, generator=generator))
        weight, coding = module.weight.clone(), IntegerCoding(2, 0)
        packed = Rtn()(weight, None, coding)
        learned = method.begin(weight, packed, coding)
        scale, zero = learned.began.scales, learned.began.zeros
        every = torch.tensor(list(itertools.product(range(4), repeat=5)), dtype=torch.float32)
        gram = torch.einsum("wti,wtj->ij", x, x)
        gaps = (every - zero) * scale - weight
        errors = torch.einsum("ci,ij,cj->c", gaps, gram, gaps)
        module.weight.copy_(packed.dequantize())
        folder = tmp_path / str(seed)
        folder.mkdir()
        inputs, targets = files(folder, x, x @ weight.t())
        result = learn(method, {"w": module}, {"w": learned}, module.forward, inputs, targets, 0, [(0, 4)])
        gap = (learned() if result.better else packed.dequantize()).detach() - weight
        error = float((gap @ gram @ gap.t()).item())
        start = packed.dequantize() - weight
        assert error <= float((start @ gram @ start.t()).item()) * (1 + 1e-5)
        found_best += error <= float(errors.min()) * 1.01 + 1e-6
    assert found_best >= 5


@pytest.mark.parametrize(
    "wild",
    [
        SignRound(steps=1, batch=1, rate=0.5, scale_rate=0.5),
        FlexRound(steps=1, batch=1, rate=1.0, scale_rate=1.0),
        EfficientQat(steps=1, batch=1, rate=3.0, scale_rate=0.5, zero_rate=2.0),
        OmniQuant(steps=1, batch=1, rate=9.0),
        Cbq(steps=1, batch=1, rate=9.0, scale_rate=0.5),
    ],
    ids=lambda method: type(method).__name__,
)
def test_what_ends_farther_from_the_source_is_not_kept(tmp_path: Path, wild: Any) -> None:
    weight, coding = weight_of(4, 32), IntegerCoding(4, 32)
    x = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(1))
    packed = Rtn()(weight, None, coding)
    module = nn.Linear(32, 4, bias=False).requires_grad_(False)
    module.weight.copy_(packed.dequantize())
    inputs, targets = files(tmp_path, x, x @ weight.t())
    found = learn(
        wild, {"w": module}, {"w": wild.begin(weight, packed, coding)}, module.forward, inputs, targets,
        0, [(0, 2)],
    )  # fmt: skip
    assert found.after > found.before
    assert not found.better
    assert torch.equal(module.weight, packed.dequantize())


@pytest.mark.parametrize(
    "settings",
    [{"steps": 0}, {"batch": 0}, {"rate": -1.0}, {"rate": float("nan")}, {"rate": float("inf")}],
    ids=str,
)
@each_method
def test_settings_out_of_range_are_refused(name: str, settings: dict[str, float]) -> None:
    with pytest.raises(SettingsError, match=f"{next(iter(settings))} .* of {name}"):
        METHODS[name](**settings)
