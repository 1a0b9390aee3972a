"""NEON's version of products and blocks gives the portable version's bits, here in an emulated processor."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

#: Where Debian's g++-aarch64-linux-gnu puts the system's libraries.
SYSTEM = Path("/usr/aarch64-linux-gnu")
FLAGS = ["-O3", "-std=c++17", "-fopenmp", "-Wno-psabi"]  # those of setup.py


@pytest.mark.full
def test_neon_gives_the_bits_of_the_portable_version(tmp_path: Path) -> None:
    compiler, run = "aarch64-linux-gnu-g++", ["qemu-aarch64", "-cpu", "max", "-L", str(SYSTEM)]
    if platform.machine() == "aarch64":
        compiler, run = "g++", []
    for tool in [compiler, *run[:1]]:
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} on PATH (Debian: g++-aarch64-linux-gnu and qemu-user)")
    program = tmp_path / "neon"
    source = Path(__file__).parent / "neon.cpp"
    subprocess.run([compiler, *FLAGS, str(source), "-o", str(program)], check=True)
    for seed in range(3):
        done = subprocess.run(
            [*run, str(program), str(seed), "8"], capture_output=True, text=True, check=False, timeout=600
        )
        assert done.returncode == 0, done.stdout + done.stderr[-3000:]
