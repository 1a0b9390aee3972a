"""Compiled blocks in any threads and forked processes: always the bits that one thread gives alone."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compressed import save_compressed
from forked import true_in_child
from tailorbird.formats.packed import IntegerCoding
from tailorbird.kernels import native
from tailorbird.model.load import load
from tailorbird.run.fused import FusedModel
from tailorbird.run.generate import FusedDecoding
from tiny import make_model

pytestmark = [
    pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler"),
    pytest.mark.usefixtures("two_threads"),
]


def compressed(directory: Path, architecture: str = "llama", bits: int = 4, **config: int) -> Any:
    save_compressed(directory, make_model(architecture, **config), IntegerCoding(bits, 32))
    return load(str(directory))


def fused(directory: Path, architecture: str = "llama", bits: int = 4, **config: int) -> FusedModel:
    return FusedModel(compressed(directory, architecture, bits, **config))


def logits(model: FusedModel, seed: int = 0, sequences: int = 2) -> Tensor:
    """After a prompt and after each of some tokens, in pages of their own."""
    ids = torch.randint(0, 256, (sequences, 50), generator=torch.Generator().manual_seed(seed))
    decoding = FusedDecoding(model)
    return torch.cat([decoding.read(part) for part in ids.split([40, 1, 1, 8], dim=1)])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system doesn't fork")
@pytest.mark.parametrize("threads_after", [1, 2, 3])
def test_a_forked_child_goes_on(threads_after: int, tmp_path: Path) -> None:
    model = fused(tmp_path / "m")
    expected = logits(model)

    def work() -> bool:
        torch.set_num_threads(threads_after)
        return torch.equal(logits(model), expected) and torch.equal(logits(model), expected)

    assert true_in_child(work)
    assert torch.equal(logits(model), expected)


def test_more_threads_than_cores_change_no_bit(tmp_path: Path) -> None:
    model = fused(tmp_path / "m", "qwen2")
    torch.set_num_threads(1)
    expected = logits(model)
    torch.set_num_threads(8)
    assert torch.equal(logits(model), expected)


def test_models_of_unlike_shapes_take_turns(tmp_path: Path) -> None:
    models = [
        fused(tmp_path / "small", bits=3),
        fused(tmp_path / "wide", "mistral", 8, hidden_size=128, intermediate_size=352, num_hidden_layers=3),
        fused(tmp_path / "other", "gpt2"),
    ]
    expected = [logits(model) for model in models]
    for sequences in (5, 1, 2):  # what a larger batch leaves behind mustn't show
        alike = [logits(model, sequences=sequences) for model in reversed(models)]
        if sequences == 2:
            assert all(map(torch.equal, reversed(alike), expected))
    decodings = [FusedDecoding(model) for model in models]
    ids = torch.randint(0, 256, (2, 50), generator=torch.Generator().manual_seed(0))
    turns = [[decoding.read(part) for decoding in decodings] for part in ids.split([40, 1, 1, 8], dim=1)]
    for found, alone in zip(zip(*turns, strict=True), expected, strict=True):
        assert torch.equal(torch.cat(found), alone)


@pytest.mark.parametrize("shared", [False, True])
def test_calls_at_the_same_time_give_the_bits_of_calls_alone(shared: bool, tmp_path: Path) -> None:
    """Every caller has blocks and pages of its own; `shared`: over the weights of one model."""
    if shared:
        one = compressed(tmp_path / "m")
        models = [FusedModel(one) for _ in range(3)]
    else:
        models = [fused(tmp_path / "m"), fused(tmp_path / "n", "qwen2"), fused(tmp_path / "o", bits=2)]
    expected = [logits(model, seed) for seed, model in enumerate(models)]
    found: list[bool] = []

    def work(seed: int) -> None:
        found.extend(torch.equal(logits(models[seed], seed), expected[seed]) for _ in range(25))

    callers = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(found) == 75
    assert all(found)
