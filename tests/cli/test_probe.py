"""`probe` shows the machine with units."""

from __future__ import annotations

from typing import Any


def test_refresh_reaches_the_call(command: Any, api: Any) -> None:
    assert command("probe", "--refresh").status == 0
    assert api.arguments["refresh"] is True


def test_measurements_carry_their_units(command: Any, api: Any) -> None:
    out = command("probe").out
    assert "23.5 GiB" in out
    assert "18.2 GB/s" in out
    assert "avx512_vnni" in out
