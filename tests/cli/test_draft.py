"""`draft` hands on what to train on what, and tells how good the heads are."""

from __future__ import annotations

from typing import Any

import pytest


def test_every_argument_reaches_the_call(command: Any, api: Any) -> None:
    flags = "--data x.txt --heads 2 --epochs 5 --sequences 9 --length 33 --seed 4 --resume"
    done = command("draft", "m", "-o", "h", *flags.split())
    assert done.status == 0
    given = {name: value for name, value in api.arguments.items() if name != "progress"}
    assert given | {"output": str(given["output"])} == {
        "model": "m", "output": "h", "data": "x.txt", "heads": 2, "epochs": 5, "sequences": 9, "length": 33,
        "seed": 4, "resume": True, "device": "cpu",
    }  # fmt: skip


def test_the_share_of_right_guesses_is_shown(command: Any, api: Any) -> None:
    done = command("draft", "m", "-o", "h")
    for fact in ("50%, 25%", "1.62 expected", "4,096 tokens", "out/heads"):
        assert fact in done.out


@pytest.mark.parametrize(
    "wrong", [["--heads", "0"], ["--heads", "7"], ["--epochs", "0"], ["--sequences", "1"]]
)
def test_wrong_flags_exit_2_before_any_work(command: Any, api: Any, wrong: list[str]) -> None:
    done = command("draft", "m", "-o", "h", *wrong)
    assert (done.status, api.calls) == (2, [])
