"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available():  # before anything imports Triton, which looks only once
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))

ASSETS = Path(os.environ.get("TAILORBIRD_ASSETS", Path(__file__).parents[2] / "shared" / "assets"))


@pytest.fixture(scope="session")
def assets() -> Path:
    """Folder of small trained models and texts; tests that need them skip where it is absent."""
    if not (ASSETS / "models").is_dir():
        pytest.skip(f"no trained models at {ASSETS}; set TAILORBIRD_ASSETS to a folder that has them")
    return ASSETS


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has a cache of its own, so that none reads what another left."""
    monkeypatch.setenv("TAILORBIRD_CACHE", str(tmp_path / "tailorbird-cache"))


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Two threads, whatever the machine has; the number before is put back."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
