"""`speed` hands every flag on and names the paths."""

from __future__ import annotations

from typing import Any


def test_every_flag_reaches_the_call(command: Any, api: Any) -> None:
    done = command(
        *("speed", "m", "--prompt-tokens", "9", "--new-tokens", "8", "--batch", "2", "--threads", "1")
    )
    assert done.status == 0
    arguments = dict(api.arguments)
    del arguments["progress"]
    assert arguments == {
        "model": "m",
        "prompt_tokens": 9,
        "new_tokens": 8,
        "batch": 2,
        "threads": 1,
        "device": "cpu",
    }


def test_the_paths_that_ran_are_named(command: Any, api: Any) -> None:
    out = command("speed", "m").out
    assert "int4 planes (7)" in out
    assert "56.0 tokens/s" in out
