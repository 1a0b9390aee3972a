"""`export` hands on what to write where."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def test_every_argument_reaches_the_call(command: Any, api: Any) -> None:
    assert command("export", "d", "--to", "gguf", "-o", "f").status == 0
    assert [str(api.arguments[name]) for name in ("directory", "to", "output")] == ["d", "gguf", "f"]
    assert isinstance(api.arguments["directory"], Path)


def test_format_and_output_must_be_given(command: Any, api: Any) -> None:
    assert command("export", "d", "-o", "f").status == 2
    assert command("export", "d", "--to", "gguf").status == 2
    assert api.calls == []


def test_the_distance_the_growth_and_the_remarks_are_shown(command: Any, api: Any) -> None:
    done = command("export", "d", "--to", "dense", "-o", "f")
    assert "1.00e-05 nats/token" in done.out
    assert "4.00 MiB (+300.0 %)" in done.out
    assert done.err == "scales were widened\n"
