"""Adapters of PEFT's kinds are served as they were tuned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from compressed import save_compressed
from peft_adapters import logits, opened, prompt
from tailorbird.adapt.deltas.lora_file import LoraFile
from tailorbird.adapt.methods.attach import attach
from tailorbird.adapt.methods.peft import OF_PEFT
from tailorbird.adapt.methods.registry import OF_BEGINNINGS
from tailorbird.adapt.places import places_of
from tailorbird.adapt.save import write_adapter
from tailorbird.adapt.wrap import attached
from tailorbird.errors import SettingsError
from tailorbird.formats.packed import IntegerCoding
from tailorbird.kernels import native
from tailorbird.model.anatomy import read_anatomy
from tailorbird.model.checkpoint import open_checkpoint
from tailorbird.model.load import load
from tailorbird.run.fused import FusedModel
from tailorbird.serve.adapters.kinds import open_adapter
from tiny import make_model

pytest.importorskip("peft")
pytestmark = pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")

SERVED = {"dora": {"rank": 4}, "pissa": {"rank": 4}, "vera": {"rank": 32}, "ia3": {}}


def tuned(name: str, folder: Path, architecture: str) -> tuple[FusedModel, Path, torch.Tensor]:
    """A packed model for serving, an adapter beside it, and the logits that the tuned model gives."""
    settings: dict[str, Any] = SERVED.get(name, {})
    if name == "vblora":
        settings = {"length": 32}
    save_compressed(folder / "m", make_model(architecture), IntegerCoding(4, 32))
    model = load(str(folder / "m")).requires_grad_(False)
    places = places_of(model, read_anatomy(open_checkpoint(str(folder / "m"))))
    method = attach(
        (OF_PEFT | OF_BEGINNINGS)[name](**settings), model, places, torch.Generator().manual_seed(0)
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    (folder / "a").mkdir()
    write_adapter(folder / "a", places, method, list(places), "base", {})
    with torch.no_grad(), attached(model, places, method):
        expected = model(prompt()[None], use_cache=False).logits[0]
    return FusedModel(load(str(folder / "m"))), folder / "a", expected


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("name", SERVED)
def test_what_was_tuned_is_served(name: str, architecture: str, tmp_path: Path) -> None:
    fused, directory, expected = tuned(name, tmp_path, architecture)
    found = logits(fused, prompt(), opened(fused, directory))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert float((found - logits(fused, prompt(), None)).abs().max()) > 1e-2


@pytest.mark.parametrize("name", sorted(OF_PEFT.keys() - SERVED.keys()))
def test_others_are_refused_by_name(name: str, tmp_path: Path) -> None:
    fused, directory, _ = tuned(name, tmp_path, "llama")
    with pytest.raises(SettingsError, match="peft_type"):
        open_adapter(directory, fused.linears)


@pytest.mark.parametrize("name", sorted(OF_BEGINNINGS))
def test_what_is_no_change_of_linears_is_refused_where_only_that_helps(name: str, tmp_path: Path) -> None:
    fused, directory, _ = tuned(name, tmp_path, "llama")
    with pytest.raises(SettingsError, match=r"before every text .* an adapter of linears"):
        open_adapter(directory, fused.linears)
    with pytest.raises(SettingsError, match="are no change of weights"):
        LoraFile.open(directory)
