"""What compressions begin with, where a test file has nothing else in mind."""

from __future__ import annotations

from pathlib import Path

import pytest

from results import text_file
from tiny import save_model


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_file(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))
