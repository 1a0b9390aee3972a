"""Which modules run through compiled kernels while they're tuned, and that they stay what they were after."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compressed import save_compressed
from tailorbird.adapt.quick import quickened
from tailorbird.formats.packed import CodebookCoding, Coding, IntegerCoding
from tailorbird.kernels import native
from tailorbird.model.load import load
from tiny import make_model

pytestmark = pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")


@pytest.mark.parametrize("coding", [None, IntegerCoding(4, 32), CodebookCoding("nf4", 32)])
def test_norms_and_gates_of_any_base_are_found(tmp_path: Path, coding: Coding | None) -> None:
    model = make_model("llama", dtype=torch.bfloat16)
    if coding is not None:
        save_compressed(tmp_path / "packed", model, coding)
        model = load(tmp_path / "packed", dtype=torch.bfloat16)
    ids = torch.arange(12).view(1, -1)
    expected = model(ids).logits
    layers = model.config.num_hidden_layers
    with quickened(model) as count, torch.no_grad():
        assert count == 3 * layers + 1  # two norms and a gate in each, and the last norm
        found = model(ids).logits
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
    assert torch.equal(model(ids).logits, expected)
