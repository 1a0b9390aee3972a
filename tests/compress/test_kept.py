"""What passes over a block keep on disk changes how often linears are computed, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from compressing import compress
from results import digests
from tailorbird.calibrate import kept
from tailorbird.compress.pipeline import Pipeline
from tailorbird.evaluate import streamed
from tiny import ARCHITECTURES, save_model

CODES = "bits=3,group=32,embedding_bits=8"
BATCHES = 4


@pytest.fixture(autouse=True)
def two_windows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "BATCH_TOKENS", 64)


def both_ways(model: Path, text: Path, folder: Path, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compress with room on the disk and without: equal bytes."""
    compress(model, text, folder / "kept", recipe)
    with monkeypatch.context() as patched:
        patched.setattr(kept, "ROOM", 1 << 60)
        compress(model, text, folder / "anew", recipe)
    assert digests(folder / "kept") == digests(folder / "anew")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_architecture_sees_a_difference(
    architecture: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_model(tmp_path / "model", architecture)
    both_ways(model, text, tmp_path, f"gptq:{CODES}", monkeypatch)


@pytest.mark.parametrize(
    "recipe",
    [
        "awq+gptq", "outliertune+rtn", "yaqa", "rtn+eora", "gptq+signround:signround.steps=4,",
        "rtn+omniquant:omniquant.transform=true,omniquant.steps=4,", "gptq+cbq:cbq.steps=4,",
        "gptq:least_token=0.01,", "gptq:asymmetric=false,",
    ],
)  # fmt: skip
def test_no_recipe_sees_a_difference(
    recipe: str, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both_ways(model, text, tmp_path, f"{recipe if ':' in recipe else recipe + ':'}{CODES}", monkeypatch)


def test_each_linear_is_computed_once_in_either_model(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block, forward = Pipeline._block, nn.Linear.forward
    calls: list[tuple[int, ...]] = []
    inside: list[Pipeline] = []

    def watched(self: nn.Linear, x: Tensor) -> Tensor:
        if inside:
            calls.append(tuple(x.shape[:-1]))
        return forward(self, x)

    def entered(self: Pipeline, anatomy: Any) -> Any:
        inside.append(self)
        try:
            return block(self, anatomy)
        finally:
            inside.clear()

    monkeypatch.setattr(nn.Linear, "forward", watched)
    monkeypatch.setattr(Pipeline, "_block", entered)
    compress(model, text, tmp_path / "out", f"gptq:{CODES}")
    models, blocks, linears = 2, 2, 7
    assert calls == [(2, 32)] * (models * blocks * linears * BATCHES)


def test_nothing_stays_on_the_disk(model: Path, text: Path, tmp_path: Path) -> None:
    compress(model, text, tmp_path / "out", f"gptq:{CODES}")
    assert not [*tmp_path.rglob("input-*"), *tmp_path.rglob("output-*")]
