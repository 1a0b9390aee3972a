"""`adapters share` hands on which adapters share what, and tells what each lost."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from tailorbird.cli.adapters import SHARE_EXAMPLE
from tailorbird.errors import SettingsError


def test_every_argument_reaches_the_call(command: Any, api: Any) -> None:
    flags = "a/fr a/de -o out --rank 8 --clusters 2"
    done = command("adapters", "share", "m", *flags.split())
    assert done.status == 0, done.err
    given = {name: value for name, value in api.arguments.items() if name != "progress"}
    assert given == {
        "model": "m", "directories": [Path("a/fr"), Path("a/de")], "output": Path("out"), "rank": 8,
        "clusters": 2, "device": "cpu",
    }  # fmt: skip


def test_what_each_lost_and_the_bytes_are_shown(command: Any, api: Any) -> None:
    done = command("adapters", "share", "m", "fr", "de", "-o", "out")
    lines = [line.split() for line in done.out.splitlines()]
    assert lines[:3] == [["adapter", "basis", "lost"], ["fr", "0", "12.50%"], ["de", "1", "0.00%"]]
    for fact in ("4.00 MiB", "1.00 MiB", "out/shared"):
        assert fact in done.out
    fields = json.loads(command("adapters", "share", "m", "fr", "-o", "out", "--json").out)
    assert set(fields) == set(api.answers["share_adapters"].__dataclass_fields__)


def test_the_example_of_the_help_is_accepted(command: Any, api: Any) -> None:
    assert SHARE_EXAMPLE in command("adapters", "share", "--help").out
    assert command(*shlex.split(SHARE_EXAMPLE)[2:]).status == 0
    assert api.arguments["rank"] == 32


@pytest.mark.parametrize(
    "wrong", [["-o", "out"], ["fr"], ["fr", "-o", "out", "--rank", "0"], ["fr", "-o", "o", "--clusters", "0"]]
)
def test_wrong_command_lines_exit_2_before_any_work(command: Any, api: Any, wrong: list[str]) -> None:
    done = command("adapters", "share", "m", *wrong)
    assert (done.status, api.calls) == (2, [])


def test_a_users_mistake_exits_2(command: Any, api: Any) -> None:
    api.answers["share_adapters"] = SettingsError("two adapters called 'fr'", "different names", "rename one")
    done = command("adapters", "share", "m", "a/fr", "b/fr", "-o", "out")
    assert (done.status, done.out) == (2, "")
    assert "two adapters called 'fr'" in done.err
