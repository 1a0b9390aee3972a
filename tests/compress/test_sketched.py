"""YAQA and weighted tokens inside a compression: what they read is there, resumed to the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from compressing import compress
from results import digests
from tailorbird.compress.pipeline import SKETCHES, Pipeline
from tailorbird.errors import SettingsError
from tailorbird.linear.quantize.yaqa import Yaqa
from tailorbird.plan import backward
from tiny import save_model

YAQA = "yaqa:bits=2,group=32,embedding_bits=4"
ATTENTION = "gptq:bits=2,group=32,least_token=0.01"


@pytest.mark.parametrize("where", ["the sketching", "the blocks"])
def test_a_killed_run_ends_with_the_same_bytes(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    compress(model, text, tmp_path / "whole", YAQA)
    owner = backward._Backward if where == "the sketching" else Pipeline
    untouched, left = owner._block, [1]

    def killed(self: Any, what: Any) -> Any:
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return untouched(self, what)

    with monkeypatch.context() as patched:
        patched.setattr(owner, "_block", killed)
        with pytest.raises(KeyboardInterrupt):
            compress(model, text, tmp_path / "broken", YAQA)
    assert (tmp_path / "broken.partial" / ".job" / SKETCHES).exists()
    compress(model, text, tmp_path / "broken", YAQA, resume=True)
    assert digests(tmp_path / "broken") == digests(tmp_path / "whole")
    assert not (tmp_path / "broken" / ".job").exists()


def test_every_linear_of_the_blocks_is_rounded_by_a_sketch_of_its_own(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    untouched = Yaqa.round
    shapes: list[tuple[torch.Size, torch.Size, torch.Size]] = []

    def watched(self: Yaqa, rounding: Any, target: torch.Tensor, coding: Any) -> Any:
        sketch = rounding.statistics.sketch
        if sketch is not None:
            shapes.append((target.shape, sketch.outputs.shape, sketch.inputs.shape))
        return untouched(self, rounding, target, coding)

    monkeypatch.setattr(Yaqa, "round", watched)
    compress(model, text, tmp_path / "out", YAQA)
    assert len(shapes) == 2 * 7
    for (out_features, in_features), outputs, inputs in shapes:
        assert outputs == (out_features, out_features)
        assert inputs == (in_features, in_features)


def test_tokens_that_receive_attention_count_more(model: Path, text: Path, tmp_path: Path) -> None:
    compress(model, text, tmp_path / "weighted", ATTENTION)
    compress(model, text, tmp_path / "alike", ATTENTION.replace("0.01", "1.0"))
    compress(model, text, tmp_path / "default", ATTENTION.partition(",least")[0])
    assert digests(tmp_path / "alike") == digests(tmp_path / "default")
    assert digests(tmp_path / "weighted") != digests(tmp_path / "default")


def test_attention_that_is_hidden_is_refused_before_work(text: Path, tmp_path: Path) -> None:
    hidden = save_model(tmp_path / "falcon", "falcon")
    with pytest.raises(SettingsError, match="can't be looked into"):
        compress(hidden, text, tmp_path / "out", ATTENTION)
    assert not list(tmp_path.glob("out*"))


def test_a_fold_before_a_sketch_is_refused_before_work(model: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="sketched before"):
        compress(model, text, tmp_path / "out", f"awq+{YAQA}")
    assert not list(tmp_path.glob("out*"))
