"""Steps that need no gradients: what they estimate, what they leave alone, and that they learn."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressed import INT4, save_compressed
from tailorbird.adapt.methods.adapter import Place
from tailorbird.adapt.methods.attach import attach
from tailorbird.adapt.methods.registry import method_named
from tailorbird.adapt.methods.zeroth.direction import Direction
from tailorbird.adapt.methods.zeroth.moved import Moved
from tailorbird.adapt.methods.zeroth.weights import MovedWeights
from tailorbird.adapt.optimizers.sgd import Sgd
from tailorbird.adapt.rows import Row
from tailorbird.adapt.step import Diverged, held_out_loss
from tailorbird.adapt.trunk import Trunk
from tailorbird.adapt.whole import check_names, write_checkpoint
from tailorbird.adapt.wrap import attached
from tailorbird.adapt.zeroth import ZerothStep
from tailorbird.errors import SettingsError, UnsupportedArchitecture
from tailorbird.formats.modules import CompressedLinear
from tailorbird.formats.packed import TableCoding
from tailorbird.model.anatomy import read_anatomy
from tailorbird.model.checkpoint import open_checkpoint
from tailorbird.model.load import load
from tiny import byte_tokenizer, make_model, save_model
from tuning import examples, open_model

ROWS = [Row.of(examples((19, 8), 258)), Row.of(examples((11,), 258, seed=1))]


def on(
    model: Any, places: dict[str, Place], name: str = "mezo", rate: float = 0.0, **settings: Any
) -> tuple[ZerothStep, Moved]:
    """A step of a method on a model."""
    method = attach(method_named(name, **settings), model, places, torch.Generator().manual_seed(5))
    assert isinstance(method, Moved)
    learned = [one for one in method.parameters() if one.requires_grad]
    groups = [{"params": learned, "lr": rate, "base_lr": rate}]
    return ZerothStep(Trunk(model), method, Sgd(momentum=0.0).build(groups), 24), method


def take(step: ZerothStep, number: int = 0) -> float:
    """One step on `ROWS`; its loss."""
    step.begin(ROWS, number, 100, 1.0)
    while step.advance():
        pass
    return step.finish().loss


def copies(model: nn.Module) -> dict[str, Tensor]:
    """All tensors of a model, as they are now."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def differing(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """Names of the tensors that aren't the same bits."""
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


class Quadratic(nn.Module):
    """Two linears with a loss whose gradient autograd knows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)
        self.x, self.y = torch.randn(20, 3), torch.randn(20, 2)

    def loss(self) -> Tensor:
        return (self.second(self.first(self.x)) - self.y).square().mean()

    def places(self) -> dict[str, Place]:
        return {
            name: Place(name, name, 0, module.in_features, module.out_features, module)
            for name, module in (("first", self.first), ("second", self.second))
        }


def slope(model: Quadratic, method: Moved, direction: Direction) -> float:
    """The two-point difference over two epsilons."""
    losses = []
    with torch.no_grad():
        for by in (method.epsilon, -method.epsilon):
            with method.moved(direction, by):
                losses.append(float(model.loss()))
    return (losses[0] - losses[1]) / (2 * method.epsilon)


def test_the_slope_times_the_direction_is_the_gradient_on_average() -> None:
    model = Quadratic()
    method = MovedWeights(model.places(), 1e-3, 0.0, torch.Generator())
    model.loss().backward()
    gradient = torch.cat([one.grad.flatten() for one in model.parameters() if one.grad is not None])
    found = []
    for step in range(2000):
        direction = method.direction(step)
        parts = [direction.part(number, one).flatten() for number, one in enumerate(method.weights)]
        found.append(slope(model, method, direction) * torch.cat(parts))
    estimates = torch.stack(found)
    errors = (estimates.mean(0) - gradient) / (estimates.std(0) / math.sqrt(len(found)))
    assert float(errors.abs().max()) < 4
    assert 0.5 < float(errors.square().mean()) < 2


def test_the_difference_is_the_gradient_along_the_direction_to_second_order() -> None:
    model = Quadratic().double()
    model.x, model.y = model.x.double(), model.y.double()
    # float32 is what weights may be; the mathematics is looked at in float64
    method = MovedWeights(Quadratic().places(), 1e-3, 0.0, torch.Generator())
    method.__dict__["linears"] = [model.first, model.second]
    method.weights = nn.ParameterList([model.first.weight, model.second.weight])
    model.loss().backward()
    direction = method.direction(0)
    exact = sum(
        float((direction.part(number, one) * one.grad).sum()) for number, one in enumerate(model.parameters())
    )
    errors = []
    for method.epsilon in (1e-1, 1e-2):
        errors.append(abs(slope(model, method, direction) - exact))
    assert errors[1] < 0.02 * errors[0]
    assert errors[1] < 1e-2 * abs(exact)


@pytest.mark.parametrize("settings", [{}, {"method": "lora", "rank": 4}, {"method": "loldu", "rank": 4}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_at_rate_zero_changes_no_bit(
    settings: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    model, places = open_model(save_model(tmp_path / "m"), dtype)
    step, method = on(model, places, **settings)
    before, learned = copies(model), copies(method)
    with attached(model, places, method):
        expected = held_out_loss(step.trunk, ROWS, 24)
        step.begin(ROWS, 0, 1, 1.0)
        turns = 0
        while step.advance():
            # an adapter renames modules while it's in place
            assert not differing(method, learned) if settings else not differing(model, before)
            turns += 1
        facts = step.finish()
    assert turns == 4
    assert facts.loss == pytest.approx(expected, rel=2e-2)
    assert facts.norm > 0
    assert not differing(model, before)
    assert not settings or not differing(method, learned)


def test_nothing_drifts_in_a_thousand_passes() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = Quadratic().to(dtype)
        before = copies(model)
        method = MovedWeights(model.places(), 1e-3, 0.0, torch.Generator())
        for number in range(1000):
            with torch.no_grad(), method.moved(method.direction(number), 0.1):
                outputs = model.second(model.first(torch.ones(1, 3, dtype=dtype)))
        assert torch.isfinite(outputs).all()
        assert not differing(model, before)


def test_an_earlier_state_is_made_again_from_the_first_weights(tmp_path: Path) -> None:
    model, places = open_model(save_model(tmp_path / "m"), torch.bfloat16)
    step, method = on(model, places, rate=1e-3)
    for number in range(2):
        take(step, number)
    early, weights = copies(method), copies(model)
    take(step, 2)
    assert differing(model, weights)
    with pytest.raises(ValueError, match="began with"):
        method.load_state_dict(early)
    method.begin_from(open_checkpoint(str(tmp_path / "m")).weights.read)
    method.load_state_dict(early)
    assert not differing(model, weights)
    assert sum(tensor.nbytes for tensor in method.state_dict().values()) == 2 * 8


def test_a_pass_that_fails_leaves_the_weights_as_they_were(tmp_path: Path) -> None:
    model, places = open_model(save_model(tmp_path / "m"))
    step, _ = on(model, places)
    before = copies(model)

    def fail(*_: Any) -> None:
        raise RuntimeError("on purpose")

    # an own forward that fails, so that the hook behind it never runs
    model.model.layers[1].mlp.up_proj.forward = fail
    step.begin(ROWS, 0, 1, 1.0)
    with pytest.raises(RuntimeError, match="on purpose"):
        step.advance()
    assert not differing(model, before)


def test_updates_of_bfloat16_arrive_on_average() -> None:
    linear = nn.Linear(64, 64, bias=False).bfloat16()
    place = Place("one", "q", 0, 64, 64, linear)
    method = MovedWeights({"one": place}, 1e-3, 0.0, torch.Generator())
    start = linear.weight.detach().float()
    wanted = torch.zeros_like(start)
    for step in range(1000):
        direction = method.direction(step)
        method.move(direction, 1e-5)
        wanted += 1e-5 * direction.part(0, linear.weight)
    arrived = linear.weight.detach().float() - start
    # a thousand roundings of steps of up to 2^-11 add noise without a direction
    assert abs(float((arrived - wanted).mean())) < 4 * float((arrived - wanted).std()) / 64
    assert float((arrived * wanted).sum() / wanted.square().sum()) == pytest.approx(1, abs=0.5)
    nearest = (start.bfloat16() + (1e-5 * direction.part(0, linear.weight)).bfloat16()).float() - start
    assert float((nearest != 0).float().mean()) < 0.05  # rounded to nearest, next to nothing arrives


def test_sparse_touches_only_small_weights(tmp_path: Path) -> None:
    model, places = open_model(save_model(tmp_path / "m"))
    step, method = on(model, places, "sparse-mezo", 1e-3, share=0.25)
    before = copies(model)
    take(step)
    for path in places:
        was, now = before[f"{path}.weight"], model.get_submodule(path).weight
        moved = was != now
        assert float(moved.float().mean()) == pytest.approx(0.25, abs=0.01)
        assert float(was[moved].abs().max()) < float(was[~moved].abs().min())
    assert differing(model, before) == {f"{path}.weight" for path in places}
    assert not [name for name, one in method.state_dict().items() if one.dtype == torch.bool]


def test_qzo_changes_only_scales_and_the_forward_sees_them(tmp_path: Path) -> None:
    save_compressed(tmp_path / "m", make_model("llama"), INT4, tokenizer=byte_tokenizer())
    model, places = open_model(tmp_path / "m")
    step, method = on(model, places, "qzo", 1e-4)
    before, expected = copies(model), held_out_loss(step.trunk, ROWS, 24)
    take(step)
    assert differing(model, before) == {f"{path}.scales" for path in places}
    found = held_out_loss(step.trunk, ROWS, 24)
    assert found != expected
    directory = tmp_path / "tuned"
    directory.mkdir()
    checkpoint, changed = open_checkpoint(str(tmp_path / "m")), method.checkpoint_tensors()
    assert changed is not None
    check_names(checkpoint, changed)
    written = write_checkpoint(directory, checkpoint, read_anatomy(checkpoint), changed, {})
    assert written == checkpoint.weights.total_bytes
    again = load(directory, verify=True)
    assert isinstance(again.model.layers[0].mlp.up_proj, CompressedLinear)
    assert not differing(again, copies(model))
    open_checkpoint(str(directory)).tokenizer()
    assert held_out_loss(Trunk(again), ROWS, 24) == found


def test_qzo_learns_in_float32_keeps_signs_and_follows_no_slope_beyond_the_clip(tmp_path: Path) -> None:
    save_compressed(tmp_path / "m", make_model("llama"), INT4, tokenizer=byte_tokenizer())
    model, places = open_model(tmp_path / "m")
    linear = places["model.layers.0.mlp.up_proj"].module
    linear.scales[0] *= -1
    step, method = on(model, places, "qzo", 1.0, clip=1e-9)
    before = copies(method)
    take(step)
    moved = method.state_dict()["scales.0"] - before["scales.0"]
    direction = method.direction(0).part(0, moved)
    assert 0 < float(moved.abs().max()) <= 1.01e-9 * float(direction.abs().max()) + 1e-8
    signs = linear.scales.sign()
    method.move(method.direction(1), 1.0)
    assert torch.equal(linear.scales.sign(), signs)
    assert float(linear.scales.float().abs().min()) > 0
    method.load_state_dict(before)
    learned = dict(zip(places, method.get_submodule("scales"), strict=True))["model.layers.0.mlp.up_proj"]
    assert torch.equal(linear.scales, learned.to(linear.scales.dtype))


@pytest.mark.parametrize(
    ("name", "settings", "dtype"),
    [
        ("mezo", {}, torch.bfloat16),
        ("mezo", {"method": "lora"}, torch.float32),
        ("sparse-mezo", {}, torch.float32),
        ("qzo", {}, torch.float32),
    ],
)
def test_what_is_resumed_ends_with_the_same_bits(
    name: str, settings: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    if name == "qzo":
        save_compressed(tmp_path / "m", make_model("llama"), INT4, tokenizer=byte_tokenizer())
    else:
        save_model(tmp_path / "m")
    ends = []
    for pause in (None, 2):
        kept: dict[str, Tensor] = {}
        for first, last in ((0, 4),) if pause is None else ((0, pause), (pause, 4)):
            model, places = open_model(tmp_path / "m", dtype)
            step, method = on(model, places, name, 1e-3, **settings)
            method.load_state_dict(kept or method.state_dict())
            with attached(model, places, method):
                for number in range(first, last):
                    take(step, number)
            kept = copies(method)
        ends.append((kept, copies(model)))
    assert not differing(method, ends[0][0])
    assert not differing(model, ends[0][1])


def test_a_loss_that_is_not_finite_stops_and_changes_nothing(tmp_path: Path) -> None:
    model, places = open_model(save_model(tmp_path / "m"))
    step, _ = on(model, places, rate=1.0)
    model.lm_head.weight.data[0, 0] = torch.nan
    before = copies(model)
    with pytest.raises(Diverged):
        take(step)
    assert differing(model, before) == {"lm_head.weight"}  # NaN, which equals nothing


def test_methods_that_take_part_in_updates_are_refused(tmp_path: Path) -> None:
    model, places = open_model(save_model(tmp_path / "m"))
    for name in ("allora", "elalora", "ist", "mezo"):
        with pytest.raises(SettingsError, match=f"`{name}` under a method of zeroth order"):
            on(model, places, method=name)
    for name in ("full", "lisa", "lomo"):
        with pytest.raises(SettingsError, match=f"`{name}`, which changes the model's own weights"):
            on(model, places, method=name)
    with pytest.raises(SettingsError, match="packed"):
        on(model, places, "qzo")
    save_compressed(tmp_path / "t", make_model("llama"), TableCoding(3), tokenizer=byte_tokenizer())
    with pytest.raises(SettingsError, match="packed weights that have scales"):
        on(*open_model(tmp_path / "t"), "qzo")
    with pytest.raises(UnsupportedArchitecture, match=r"no tensor `model\.other\.weight`"):
        check_names(open_checkpoint(str(tmp_path / "m")), ["model.other.weight"])


def test_packed_weights_are_refused_by_mezo(tmp_path: Path) -> None:
    save_compressed(tmp_path / "m", make_model("llama"), INT4, tokenizer=byte_tokenizer())
    model, places = open_model(tmp_path / "m")
    with pytest.raises(SettingsError, match="packed"):
        on(model, places)


@pytest.mark.parametrize(
    ("settings", "rate"), [({"epsilon": 1e-3}, 3e-3), ({"method": "lora", "epsilon": 1e-2}, 2e-2)]
)
def test_the_loss_falls(settings: dict[str, Any], rate: float, tmp_path: Path) -> None:
    model, places = open_model(save_model(tmp_path / "m"))
    step, method = on(model, places, rate=rate, **settings)
    with attached(model, places, method):
        before = held_out_loss(step.trunk, ROWS, 24)
        for number in range(60):
            take(step, number)
        assert held_out_loss(step.trunk, ROWS, 24) < before - 0.02


@pytest.mark.full
def test_a_step_takes_the_memory_of_reading(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from tiny import make_config

    config = make_config("llama", hidden_size=768, intermediate_size=2048, num_hidden_layers=24)
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(tmp_path / "m")
    byte_tokenizer().save_pretrained(tmp_path / "m")
    peaks = {
        what: int(
            json.loads(
                subprocess.run(
                    [sys.executable, __file__, str(tmp_path / "m"), what],
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                    capture_output=True, text=True, check=True,
                ).stdout
            )
        )
        for what in ("read", "step")
    }  # fmt: skip
    print(peaks)
    assert peaks["step"] < 1.05 * peaks["read"]


def _child(directory: str, what: str) -> None:
    """Peak resident bytes of this process beyond its imports: it reads rows, or takes steps on them."""
    from tailorbird.hardware.memory import (
        peak_resident_bytes,
        reset_peak,
        resident_bytes,
        return_freed_memory,
    )

    return_freed_memory()
    tiny = Path(directory) / "small"
    take(on(*open_model(save_model(tiny), torch.bfloat16))[0])  # imports everything

    started = resident_bytes()
    model, places = open_model(directory, torch.bfloat16)
    step, _ = on(model, places, rate=1e-6)
    reset_peak()
    for number in range(3):
        take(step, number) if what == "step" else held_out_loss(step.trunk, ROWS, 24)
    print(peak_resident_bytes() - started)


if __name__ == "__main__":
    _child(*sys.argv[1:])
