"""Installed packages: a wheel brings the compiled library along; without a compiler there is a way, too."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
NOWHERE = dict.fromkeys(("CC", "CXX", "LDSHARED", "LDCXXSHARED"), "/nonexistent/compiler")

#: Products through a linear of the installed package, its paths, and what it logs.
USE = """
import json, logging, sys
import torch
import tailorbird
from tailorbird.formats.modules import CompressedLinear
from tailorbird.formats.packed import IntegerCoding, PackedWeight
from tailorbird.kernels import native

said = []
handler = logging.Handler()
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger("tailorbird").addHandler(handler)
codes = torch.arange(48 * 128).view(48, 128) * 7 % 16
packed = PackedWeight.from_codes(codes, torch.ones(48, 2), None, IntegerCoding(4, 64, symmetric=True), None)
linear = CompressedLinear.from_packed(packed, rounds=True)
exact = all(
    torch.equal(linear(torch.eye(128, dtype=dtype)).float(), packed.dequantize().t())
    for dtype in (torch.float32, torch.bfloat16)
)
paths = [linear.path(1, dtype) for dtype in (torch.float32, torch.bfloat16)]
found = {"file": tailorbird.__file__, "native": native.available(), "paths": paths, "exact": exact}
print(json.dumps(found | {"said": [line for line in said if "compiler" in line]}))
"""


def build(folder: Path, environment: dict[str, str]) -> Path:
    """A wheel of this source, as `make wheel` builds it, but with the tools that are here already."""
    pytest.importorskip("setuptools", minversion="77", reason="no setuptools of 77 or later here")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    ignored = shutil.ignore_patterns("*.so", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT / "src", source / "src", ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    subprocess.run(
        [*command, "--no-build-isolation", "--wheel-dir", folder / "dist", source],
        env=environment,
        check=True,
    )
    (wheel,) = (folder / "dist").glob("*.whl")
    return wheel


def use(wheel: Path, folder: Path) -> Any:
    """What `USE` says of the wheel in an environment of its own, which has no compiler on its path."""
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    command = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
    ]
    subprocess.run([*command, wheel], check=True)
    (packages,) = (folder / "venv" / "lib").glob("*/site-packages")
    (packages / "others.pth").write_text(str(Path(torch.__file__).parents[1]) + "\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= NOWHERE | {"PATH": str(python.parent)}
    done = subprocess.run(
        [python, "-c", USE], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert Path(found["file"]).is_relative_to(packages)
    return found


@pytest.mark.full
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on PATH")
def test_a_wheel_brings_the_compiled_library_along(tmp_path: Path) -> None:
    found = use(build(tmp_path, dict(os.environ)), tmp_path)
    assert found["native"]
    assert found["paths"] == ["native-int8", "native-int8"]
    assert found["exact"]
    assert found["said"] == []


def test_without_a_compiler_the_package_installs_and_multiplies(tmp_path: Path) -> None:
    wheel = build(tmp_path, os.environ | NOWHERE | {"PATH": str(Path(sys.executable).parent)})
    found = use(wheel, tmp_path)
    assert not found["native"]
    assert not any(path.startswith("native") for path in found["paths"])
    assert found["exact"]
    assert len(found["said"]) == 1
    assert "native-int8 or native-float" in found["said"][0]
