"""What the copies that travel together measure is the divergence of the whole model, place by place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tailorbird.calibrate.ledger import Ledger
from tailorbird.calibrate.stream import StreamingModel
from tailorbird.formats.packed import IntegerCoding
from tailorbird.linear.quantize.rtn import Rtn
from tailorbird.model.anatomy import read_anatomy
from tailorbird.model.checkpoint import open_checkpoint
from tailorbird.plan.places import Place, uses_of
from tailorbird.plan.sensitivity import measure_divergence
from tiny import fresh, save_model, untie

#: untied; tied; tied and its weights stored the other way round
ARCHITECTURES = ("llama", "qwen2", "gpt2")
CODING = IntegerCoding(2, 32)


def streaming(directory: Path) -> StreamingModel:
    checkpoint = open_checkpoint(str(directory))
    return StreamingModel(checkpoint, read_anatomy(checkpoint))


def tokens(windows: int, length: int) -> torch.Tensor:
    return torch.randint(0, 256, (windows, length), generator=torch.Generator().manual_seed(3))


def rounded(name: str, weight: torch.Tensor) -> torch.Tensor:
    return Rtn()(weight, None, CODING).dequantize()


@torch.no_grad()
def brute_force(directory: Path, model: StreamingModel, ids: torch.Tensor) -> dict[str, float]:
    """One whole model per place, with that one weight replaced; all in float64."""
    whole = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64).eval()
    untie(whole)
    source = whole(ids).logits.log_softmax(-1)
    transposed = {linear.name for linear in model.anatomy.linears() if linear.transposed}
    found = {}
    for place in uses_of(model.anatomy):
        parameter = whole.get_submodule(place.name).weight
        original = parameter.clone()
        weight = (original.T if place.name in transposed else original).float().contiguous()
        change = rounded(place.name, weight)
        parameter.copy_(change.T if place.name in transposed else change)
        other = whole(ids).logits.log_softmax(-1)
        found[place.name] = float((source.exp() * (source - other)).sum(-1).mean())
        parameter.copy_(original)
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_divergence_of_every_place_is_that_of_the_whole_model(architecture: str, tmp_path: Path) -> None:
    # Larger weights than a fresh model's, so that divergences stand far above float32's noise.
    directory = save_model(tmp_path / "model", architecture, initializer_range=0.2)
    model, ids, scratch = streaming(directory), tokens(3, 24), tmp_path / "scratch"
    scratch.mkdir()
    measured = measure_divergence(model, uses_of(model.anatomy), ids, rounded, Ledger(scratch))
    expected = brute_force(directory, model, ids)
    assert list(measured) == [place.name for place in uses_of(model.anatomy)]
    assert measured == pytest.approx(expected, rel=2e-5)
    assert min(measured.values()) > 1e-5


def test_what_is_not_changed_does_not_diverge(tmp_path: Path) -> None:
    model = streaming(save_model(tmp_path / "model", "llama"))
    places = uses_of(model.anatomy)
    same = measure_divergence(
        model, places, tokens(2, 16), lambda name, weight: weight.clone(), fresh(tmp_path)
    )
    assert set(same.values()) == {0.0}


def test_a_place_is_measured_alike_alone_and_among_others(tmp_path: Path) -> None:
    model = streaming(save_model(tmp_path / "model", "qwen2"))
    ids, places = tokens(2, 16), uses_of(model.anatomy)
    together = measure_divergence(model, places, ids, rounded, fresh(tmp_path))
    for place in (places[0], places[3], places[-1]):
        assert measure_divergence(model, [place], ids, rounded, fresh(tmp_path)) == {
            place.name: together[place.name]
        }


def test_the_source_is_left_as_it_was(tmp_path: Path) -> None:
    model = streaming(save_model(tmp_path / "model", "llama"))
    ids, place = tokens(2, 16), Place(model.anatomy.head, len(model.anatomy.blocks))
    before = model.end_weight(place.name).clone()
    first = measure_divergence(model, [place], ids, rounded, fresh(tmp_path))
    assert torch.equal(model.end_weight(place.name), before)
    assert measure_divergence(model, [place], ids, rounded, fresh(tmp_path)) == first


def test_divergences_far_below_float32s_rounding_are_seen(tmp_path: Path) -> None:
    model = streaming(save_model(tmp_path / "model", "llama"))
    ids = tokens(2, 24)

    def nudged(factor: float) -> dict[str, float]:
        def perturb(name: str, weight: torch.Tensor) -> torch.Tensor:
            generator = torch.Generator().manual_seed(len(name))
            return weight + factor * torch.randn(weight.shape, generator=generator)

        return measure_divergence(model, uses_of(model.anatomy), ids, perturb, fresh(tmp_path))

    large, small = nudged(1e-3), nudged(1e-4)
    assert min(small.values()) < 1e-9
    for name, kl in large.items():  # a tenth of the change, a hundredth of the divergence
        assert small[name] == pytest.approx(kl / 100, rel=0.2), name
