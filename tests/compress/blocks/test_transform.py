"""OmniQuant's transformation: the block computes what it did, and scales find what a grid alone can't."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from learned_weights import files, weight_of
from results import digests
from tailorbird import api
from tailorbird.calibrate.stream import StreamingModel
from tailorbird.compress.blocks.omniquant import OmniQuant, OmniQuantWeight
from tailorbird.compress.blocks.training import learn
from tailorbird.compress.blocks.transform import BlockTransform, LearnedScales
from tailorbird.compress.folds import BlockFolding
from tailorbird.compress.recipe import parse_recipe
from tailorbird.errors import SettingsError
from tailorbird.formats.packed import Coding, IntegerCoding
from tailorbird.linear.folds import FOLDS_FILE
from tailorbird.linear.quantize.rtn import Rtn
from tailorbird.model.anatomy import read_anatomy
from tailorbird.model.checkpoint import open_checkpoint
from tailorbird.model.weights import Weights
from tiny import save_model

EQUAL_HEADS = {"num_key_value_heads": 4}
CODING = IntegerCoding(3, 32)


@dataclass
class Scaled:
    """Block 1 of a tiny model in float64, of which every linear is rounded and learns."""

    model: StreamingModel
    block: nn.Module
    folding: BlockFolding
    transform: BlockTransform
    weights: dict[str, OmniQuantWeight]
    originals: dict[str, torch.Tensor]

    def run(self) -> torch.Tensor:
        x = torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        return self.model.run_block(self.block, 1, x)

    def set(self, weights: dict[str, torch.Tensor]) -> None:
        for place in self.folding.anatomy.linears:
            self.model.set_weight(self.block, place, weights[place.name].detach())

    def draw_scales(self) -> None:
        """Powers of two, which float32 divides by without error."""
        generator = torch.Generator().manual_seed(1)
        for _, scales in self.transform.scales:
            drawn = torch.randint(-3, 4, scales.logarithms.shape, generator=generator)
            scales.settled = torch.pow(2.0, drawn)
            with torch.no_grad():
                scales.logarithms.copy_(scales.settled.log())

    def fold(self) -> None:
        for fold, scales in self.transform.scales:
            assert scales.settled is not None
            self.folding.add(fold, scales.settled)


def scaled(folder: Path, architecture: str) -> Scaled:
    heads = EQUAL_HEADS if architecture in ("llama", "gemma2") else {}
    checkpoint = open_checkpoint(str(save_model(folder / "model", architecture, **heads)))
    anatomy = read_anatomy(checkpoint)
    model = StreamingModel(checkpoint, anatomy, torch.float64)
    block, own = model.load_block(1), anatomy.blocks[1]
    tensors = {name: checkpoint.weights.read(name) for name in own.other}
    codings: dict[str, Coding] = {place.name: CODING for place in own.linears}
    folding = BlockFolding(None, model, block, own, codings, tensors)
    originals = {place.name: model.weight_of(block, place) for place in own.linears}
    weights = {}
    for name, weight in originals.items():
        learned = OmniQuant(transform=True).begin(weight.float(), Rtn()(weight.float(), None, CODING), CODING)
        assert isinstance(learned, OmniQuantWeight)
        weights[name] = learned
    transform = BlockTransform(own, weights, folding.effective)
    return Scaled(model, block, folding, transform, weights, originals)


@pytest.mark.parametrize(
    ("architecture", "folds", "tolerance"),
    [("llama", 4, 1e-12), ("gpt2", 2, 1e-12), ("opt", 3, 1e-12), ("gemma2", 4, 1e-5)],
)
def test_a_block_computes_what_it_did_before_the_rounding(
    architecture: str, folds: int, tolerance: float, tmp_path: Path
) -> None:
    """Gemma adds one to the weights of its norms, which float32 rounds."""
    one = scaled(tmp_path, architecture)
    assert len(one.transform.scales) == folds
    before = one.run()
    one.draw_scales()
    one.set({name: one.transform.transformed(name, weight) for name, weight in one.originals.items()})
    assert not torch.allclose(one.run(), before, atol=1e-2)  # neither norms nor biases have followed
    one.fold()
    torch.testing.assert_close(one.run(), before, rtol=0, atol=tolerance * float(before.abs().max()))


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_what_learns_in_a_block_as_it_is_stands_for_what_is_stored_in_the_folded_one(
    architecture: str, tmp_path: Path
) -> None:
    one = scaled(tmp_path, architecture)
    one.draw_scales()
    one.set({name: weight().double() for name, weight in one.weights.items()})
    learning = one.run()
    one.set({name: weight.packed().dequantize().double() for name, weight in one.weights.items()})
    one.fold()
    torch.testing.assert_close(one.run(), learning, rtol=0, atol=1e-5 * float(learning.abs().max()))


def test_scales_of_one_change_nothing(tmp_path: Path) -> None:
    one = scaled(tmp_path, "llama")
    for name, weight in one.weights.items():
        packed = Rtn()(one.originals[name].float(), None, CODING)
        assert torch.equal(weight(), packed.dequantize())


def test_a_grid_spans_the_weights_that_were_scaled() -> None:
    """One that spans all weights of its group does so for any scales, but for its zero point's rounding."""
    weight, coding = weight_of(), IntegerCoding(3, 32, False)
    learned = OmniQuant().begin(weight, Rtn(clip_search=False)(weight, None, coding), coding)
    assert isinstance(learned, OmniQuantWeight)
    scales = LearnedScales(weight.shape[1], lambda asked: asked)
    with torch.no_grad():
        scales.logarithms += 0.5 * weight_of(1, weight.shape[1], 3)[0]
        learned.inputs = scales
        scaled_weight = weight * scales()
        _, steps, zeros = learned.from_zero()
    for group, columns in enumerate(scaled_weight.split(32, dim=1)):
        step = steps[:, group]
        assert ((step * (7 - zeros[:, group]) - columns.amax(1)).abs() <= 1.1 * step).all()
        assert ((-step * zeros[:, group] - columns.amin(1)).abs() <= 1.1 * step).all()


def test_channels_that_count_more_get_finer_grids(tmp_path: Path) -> None:
    """Four channels of 32 are thirty times as loud as the others, which share their groups."""
    weight, coding = weight_of(8, 32), IntegerCoding(3, 0, False)
    x = torch.randn(4, 64, 32, generator=torch.Generator().manual_seed(2))
    x[..., :4] *= 30
    packed = Rtn(clip_search=False)(weight, None, coding)
    module = nn.Linear(32, 8, bias=False).requires_grad_(False)
    module.weight.copy_(packed.dequantize())
    method = OmniQuant(steps=200, batch=4, transform=True, transform_rate=0.02)
    learned = method.begin(weight, packed, coding)
    assert isinstance(learned, OmniQuantWeight)
    learned.inputs = LearnedScales(32, lambda asked: asked)
    inputs, targets = files(tmp_path, x, x @ weight.t())
    found = learn(method, {"w": module}, {"w": learned}, module.forward, inputs, targets, 0, [(0, 4)])
    assert found.after < 0.5 * found.before
    assert learned.inputs()[:4].mean() > 1.3 * learned.inputs()[4:].mean()


def compress(model: Path, text: Path, output: Path, recipe: str) -> api.FitResult:
    return api.compress(
        str(model), output, recipe=recipe, calibration=str(text), sequences=16, length=48,
        measure_speed=False, measure_spread=False, max_kl=100.0, max_perplexity_increase=1e9,
    )  # fmt: skip


@pytest.mark.parametrize("fold", ["", "awq+"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_compression_records_what_it_learned(
    architecture: str, fold: str, text: Path, tmp_path: Path
) -> None:
    """The gate holds norms, biases and rows against the source after the recorded folds."""
    heads: dict[str, Any] = EQUAL_HEADS if architecture == "llama" else {}
    model = save_model(tmp_path / "model", architecture, dtype=torch.bfloat16, **heads)
    settings = "omniquant.steps=20,omniquant.batch=4,omniquant.transform=true,omniquant.transform_rate=0.02"
    recipe = f"{fold}rtn+omniquant:bits=3,group=32,{settings}"
    compress(model, text, tmp_path / "out", recipe)
    scales = Weights.open_file(tmp_path / "out" / FOLDS_FILE)
    assert len(scales.names) == 2 * (4 if architecture == "llama" else 2)
    assert any(not torch.allclose(scales.read(n), torch.ones(()), rtol=0.02) for n in scales.names)
    compress(model, text, tmp_path / "again", recipe)
    assert digests(tmp_path / "again") == digests(tmp_path / "out")


@pytest.mark.parametrize(
    ("recipe", "beside"), [("rtn+eora+omniquant", "a correction"), ("spqr+omniquant", "outliers")]
)
def test_weights_beside_which_something_stands_are_refused(recipe: str, beside: str) -> None:
    with pytest.raises(SettingsError, match=f"{beside} beside the weights"):
        parse_recipe(f"{recipe}:bits=3,omniquant.transform=true")
    parse_recipe(f"{recipe}:bits=3")
