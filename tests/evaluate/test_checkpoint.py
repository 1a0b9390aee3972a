"""`evaluate` measures a model and its reference on windows that both can read."""

from __future__ import annotations

from pathlib import Path

import pytest

import tailorbird
from tailorbird.errors import SettingsError
from tiny import save_model


def test_windows_are_no_longer_than_the_shorter_context(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("alpha beta gamma delta " * 40)
    text = str(tmp_path / "text.txt")
    long = str(save_model(tmp_path / "long", "gpt2"))
    short = str(save_model(tmp_path / "short", "gpt2", n_positions=32))
    against = tailorbird.evaluate(long, text=text, reference=short)
    assert against.kl_mean is not None
    assert against.perplexity == tailorbird.evaluate(long, text=text, context=32).perplexity
    with pytest.raises(SettingsError, match=r"a context of 64 tokens.*2 to 32 tokens"):
        tailorbird.evaluate(long, text=text, reference=short, context=64)
