"""Threads that go through steps together (`cpp/team.h`): each piece once, in order, whoever is late."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on PATH")
@pytest.mark.parametrize(
    "sanitizer", ["", pytest.param("-fsanitize=thread", marks=pytest.mark.full)], ids=["plain", "sanitized"]
)
def test_pieces_are_done_once_and_steps_in_their_order(sanitizer: str, tmp_path: Path) -> None:
    program, source = tmp_path / "team", Path(__file__).parent / "team.cpp"
    flags = ["-O1", "-g", "-std=c++17", "-pthread", *sanitizer.split()]
    subprocess.run(["g++", *flags, str(source), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stdout + done.stderr[-2000:]
