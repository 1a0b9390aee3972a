"""Our LoRA is PEFT's: the same tensors give the same logits, and the same gradients."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from compressed import save_compressed
from tailorbird.adapt.methods.low_rank import Lora, LowRank
from tailorbird.adapt.methods.rslora import RsLora
from tailorbird.adapt.places import places_of
from tailorbird.adapt.save import write_adapter
from tailorbird.adapt.wrap import attached
from tailorbird.model.anatomy import read_anatomy
from tailorbird.model.checkpoint import open_checkpoint
from tailorbird.model.load import load
from tiny import make_model, save_model
from tuning import merge

peft = pytest.importorskip("peft")

IDS = torch.randint(0, 256, (1, 24), generator=torch.Generator().manual_seed(3))


def logits_of_both(
    model: Any, places: dict[str, Any], method: Any, made: Any, *, scaled: bool
) -> torch.Tensor:
    """Ours, once they and all gradients are PEFT's; with `scaled`, PEFT's `up` has the scaling in it."""
    expected = made(input_ids=IDS, use_cache=False).logits
    with attached(model, places, method):
        found = model(input_ids=IDS, use_cache=False).logits
        functional.cross_entropy(found[0, :-1], IDS[0, 1:]).backward()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    functional.cross_entropy(expected[0, :-1], IDS[0, 1:]).backward()
    for path in places:
        addition, layer = method.addition(path), made.base_model.model.get_submodule(path)
        assert isinstance(addition, LowRank)
        down, up = layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad
        torch.testing.assert_close(addition.down.grad, down, rtol=1e-3, atol=1e-6)
        factor = addition.scaling if scaled else 1.0
        torch.testing.assert_close(addition.up.grad, factor * up, rtol=1e-3, atol=1e-6)
    return found


@pytest.mark.parametrize("base", ["llama", "gpt2", "packed"])
def test_peft_computes_the_same(base: str, tmp_path: Path) -> None:
    if base == "packed":
        save_compressed(tmp_path / "m", make_model("llama"))
    else:
        save_model(tmp_path / "m", base)
    model = load(str(tmp_path / "m")).requires_grad_(False)
    places = places_of(model, read_anatomy(open_checkpoint(str(tmp_path / "m"))))
    method = Lora(rank=4, alpha=8).attach(places, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    (tmp_path / "a").mkdir()
    write_adapter(tmp_path / "a", places, method, list(places), "base", {})
    made = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "a", is_trainable=True).eval()
    logits_of_both(model, places, method, made, scaled=True)


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_rslora_is_what_peft_trains_with_use_rslora(rank: int, tmp_path: Path) -> None:
    save_model(tmp_path / "m")
    model = load(str(tmp_path / "m")).requires_grad_(False)
    places = places_of(model, read_anatomy(open_checkpoint(str(tmp_path / "m"))))
    method = RsLora(rank, alpha=3.0).attach(places, torch.Generator().manual_seed(0))
    config = peft.LoraConfig(r=rank, lora_alpha=3.0, use_rslora=True, target_modules=list(places))
    made = peft.get_peft_model(copy.deepcopy(model), config).eval()
    with torch.no_grad():
        for path in places:
            addition, layer = method.addition(path), made.base_model.model.get_submodule(path)
            assert isinstance(addition, LowRank)
            addition.up.normal_(0, 0.05, generator=torch.Generator().manual_seed(len(path)))
            layer.lora_A["default"].weight.copy_(addition.down)
            layer.lora_B["default"].weight.copy_(addition.up)
    found = logits_of_both(model, places, method, made, scaled=False)
    (tmp_path / "a").mkdir()
    write_adapter(tmp_path / "a", places, method, list(places), "base", {})
    read = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "a").eval()
    torch.testing.assert_close(read(input_ids=IDS, use_cache=False).logits, found, rtol=1e-5, atol=1e-5)
    merge(places, method)
    merged = model(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(merged, made.merge_and_unload()(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)
