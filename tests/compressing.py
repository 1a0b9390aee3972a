"""Compressions of tiny models, and their being killed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tailorbird import api
from tailorbird.compress.pipeline import Pipeline


def compress(model: Path, text: Path, output: Path, recipe: str | None = None, **settings: Any) -> Any:
    """With few tokens, whatever the gate thinks of the quality."""
    return api.compress(
        str(model), output, recipe=recipe, calibration=str(text), sequences=8, length=32,
        measure_speed=False, measure_spread=False, max_kl=100.0, max_perplexity_increase=1e9, **settings,
    )  # fmt: skip


def copied(source: Path, target: Path) -> Path:
    """The files of a checkpoint in another directory, which is there."""
    for file in source.glob("*"):
        if file.is_file():
            (target / file.name).write_bytes(file.read_bytes())
    return target


def modules_of(output: Path) -> dict[str, Any]:
    """What a checkpoint's config.json says of its compressed modules."""
    config = json.loads((output / "config.json").read_text())
    modules: dict[str, Any] = config["quantization_config"]["modules"]
    return modules


@contextmanager
def killed_at_block(number: int) -> Iterator[None]:
    """What is compressed in here ends as by Ctrl-C where this block of the model begins."""
    whole = Pipeline._block

    def killed(self: Pipeline, anatomy: Any) -> Any:
        if anatomy.index == number:
            raise KeyboardInterrupt
        return whole(self, anatomy)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Pipeline, "_block", killed)
        with pytest.raises(KeyboardInterrupt):
            yield
