"""Compiled blocks under sanitizers, in the tests of adapters and of what linears have beside codes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = Path("src", "tailorbird", "kernels")
FLAGS = ("-O1", "-g1", "-std=c++17", "-fopenmp", "-Wno-psabi", "-shared", "-fPIC")


def runtime(name: str) -> str:
    return subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()


@pytest.mark.full
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on PATH")
@pytest.mark.skipif(sys.platform != "linux", reason="sanitizers are loaded as Linux does it")
def test_blocks_touch_nothing_that_is_not_theirs(tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("_native*")
    shutil.copytree(ROOT / "src" / "tailorbird", tmp_path / "src" / "tailorbird", ignore=ignored)
    library = tmp_path / KERNELS / f"_native{EXTENSION_SUFFIXES[0]}"
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    source = tmp_path / KERNELS / "cpp" / "library.cpp"
    subprocess.run(["g++", *FLAGS, *sanitizers, str(source), "-o", str(library)], check=True)
    environment = os.environ | {
        "LD_PRELOAD": f"{runtime('libasan.so')}:{runtime('libubsan.so')}", "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": str(tmp_path / "src"), "OMP_NUM_THREADS": "2",
    }  # fmt: skip
    files = ("test_fused_sparse.py", "test_fused_turns.py", "test_adapters.py")
    tests = [str(ROOT / "tests" / "run" / name) for name in files]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "gpt2 or eora or apart"]
    done = subprocess.run(
        [*command, *tests], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
