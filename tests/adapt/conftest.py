"""A tiny model and a text to tune it on."""

from __future__ import annotations

import json

import pytest

from tailorbird.adapt.tune import Data
from tiny import save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Directory of a tiny Llama."""
    return str(save_model(tmp_path_factory.mktemp("model") / "m"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Sixty short examples, a tenth of them held out."""
    file = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [{"prompt": f"{n} plus {n} is ", "completion": f"{2 * n}, always"} for n in range(60)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Data(str(file), share=0.1)
