"""The diagonal of the Hessian from gradients on both sides: each draw exact, their mean right, resumable."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from tailorbird.adapt.curvature import CurvedStep, Signs
from tailorbird.adapt.methods.adapter import Attached
from tailorbird.adapt.optimizers.registry import optimizer_named
from tailorbird.adapt.optimizers.rule import Sampling, seed_of
from tailorbird.adapt.rows import IGNORED, Row
from tailorbird.adapt.settings import TuneSettings
from tailorbird.adapt.step import Step
from tailorbird.adapt.trunk import Trunk
from tailorbird.adapt.tune import Data, preview_tuning, tune
from tailorbird.adapt.wrap import attached
from tailorbird.errors import SettingsError
from tiny import save_model
from tuning import additions, examples, open_model, still

SEED = 3


class Quadratic:
    """What a step needs of a model whose loss is ``θᵀ A θ / 2`` at each place."""

    packs = True

    def __init__(self, matrix: Tensor, parameter: nn.Parameter) -> None:
        self.matrix, self.parameter = matrix, parameter

    def reading(self, row: Row) -> Any:
        return nullcontext()

    def loss(self, row: Row) -> Tensor:
        flat = self.parameter.reshape(-1)
        return row.learned * (flat @ self.matrix @ flat) / 2


class Own(Attached):
    """Parameters of a model, by themselves."""

    def __init__(self, *parameters: nn.Parameter) -> None:
        super().__init__()
        self.own = nn.ParameterList(parameters)


def curved(trunk: Any, method: Attached, distance: float = 1e-3, every: int = 1) -> CurvedStep:
    """A step in any dtype, that leaves parameters where they are."""
    group = {"params": list(method.parameters()), "lr": 0.0, "base_lr": 0.0, "seed": SEED}
    optimizer: Any = torch.optim.SGD([group])
    return CurvedStep(trunk, method, optimizer, 1000, Sampling(every, distance))


def sampled(step: CurvedStep, rows: list[Row], number: int = 0) -> list[Tensor]:
    """The diagonals that step `number` samples."""
    step.begin(rows, number, 10_000, 1.0)
    while step.advance():
        pass
    return [one.hessian_diagonal for one in step.parameters]  # type: ignore[attr-defined]


def test_of_a_quadratic_each_sample_is_exact_and_their_mean_is_the_diagonal() -> None:
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    matrix = half @ half.T
    parameter = nn.Parameter(torch.randn(3, 4, generator=generator, dtype=torch.float64))
    step = curved(Quadratic(matrix, parameter), Own(parameter))
    rows = [Row.of(examples((6, 5), 100))]
    samples = []
    for number in range(600):
        samples.append(sampled(step, rows, number)[0].reshape(-1))
        signs = Signs([parameter], seed_of(SEED, number)).of(0).reshape(-1)
        torch.testing.assert_close(samples[-1], signs * (matrix @ signs), rtol=1e-6, atol=1e-6)
    found = torch.stack(samples)
    error = found.std(0) / math.sqrt(len(found))
    assert ((found.mean(0) - matrix.diagonal()).abs() <= 4 * error).all()
    assert error.max() < 0.1 * matrix.diagonal().mean()


def test_of_a_model_it_is_what_differentiating_twice_gives(tmp_path: Path) -> None:
    directory = save_model(tmp_path / "m")
    model, _ = open_model(directory, torch.float64)
    dense = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64, attn_implementation="eager")
    name = "model.layers.1.input_layernorm.weight"
    parameter = model.get_parameter(name).requires_grad_(True)
    rows = [Row.of([one]) for one in examples((21, 9), 258)]

    def loss(weight: Tensor) -> Tensor:
        """The mean over learned places, of the dense copy with another norm."""
        total = torch.zeros((), dtype=torch.float64)
        for row in rows:
            logits = torch.func.functional_call(
                dense, {name: weight}, (row.ids[None],), {"use_cache": False}
            ).logits[0]
            total = total + cross_entropy(logits, row.targets, ignore_index=IGNORED, reduction="sum")
        return total / sum(row.learned for row in rows)

    hessian = torch.autograd.functional.hessian(loss, parameter.detach().clone())
    # the loss of tuning is float32, whose rounding a wider difference hides
    step = curved(Trunk(model), Own(parameter), distance=2e-2)
    found = torch.stack([sampled(step, rows, number)[0] for number in range(40)])
    for number, one in enumerate(found):
        signs = Signs([parameter], seed_of(SEED, number)).of(0)
        exact = signs * (hessian @ signs)
        assert (one - exact).norm() < 0.02 * exact.norm()
    error = found.std(0) / math.sqrt(len(found))
    assert ((found.mean(0) - hessian.diagonal()).abs() <= 5 * error).all()


def test_it_leaves_parameters_gradients_and_loss_as_they_were(tmp_path: Path) -> None:
    model, places = open_model(save_model(tmp_path / "m"))
    trunk, method = Trunk(model), additions(places)
    rows = [Row.of(examples((37, 20), 258))]
    before = [one.detach().clone() for one in method.parameters()]
    with attached(model, places, method):
        plain = Step(trunk, method, still(method), 20)
        plain.begin(rows, 0, 1, 1.0)
        while plain.advance():
            pass
        expected = [one.grad for one in method.parameters()]
        loss = plain.finish().loss
        step = CurvedStep(trunk, method, still(method), 20, Sampling(1, 1e-3))
        step.begin(rows, 0, 1, 1.0)
        while step.advance():
            assert all(map(torch.equal, before, method.parameters()))
        assert all(map(torch.equal, expected, [one.grad for one in method.parameters()]))
        assert step.finish().loss == loss


def test_a_sample_is_taken_when_due_and_for_what_begins_to_learn() -> None:
    parameter, other = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(2))
    model, rows = Quadratic(torch.eye(4), parameter), [Row.of(examples((6,), 100))]
    optimizer = optimizer_named("adahessian").build([{"params": [parameter, other]}])
    step = CurvedStep(model, Own(parameter, other), optimizer, 1000, Sampling(3, 1e-3))  # type: ignore[arg-type]
    taken = []
    for number in range(1, 8):
        if number == 5:
            optimizer.state.pop(parameter)
        taken.append(sampled(step, rows, number)[0] is not None)
        step.finish()
    assert taken == [True, False, True, False, True, True, False]
    assert float(optimizer.state[parameter]["samples"]) == 2
    assert other not in optimizer.state


def settings(**changed: Any) -> TuneSettings:
    given = {
        "method_settings": {"rank": 2}, "steps": 5, "batch": 2, "length": 48, "evaluate_every": 5,
        "rate": 1e-2, "save_every": 1, "optimizer": "adahessian", "optimizer_settings": {"every": 2},
    }  # fmt: skip
    return TuneSettings(**{**given, **changed})


def test_tuning_learns_and_resumes_bit_for_bit(
    model: str, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = tune(model, data, tmp_path / "whole", settings())
    assert result.loss_before is not None
    assert result.loss_after is not None
    assert result.loss_after < result.loss_before
    finish = CurvedStep.finish

    def interrupted(step: CurvedStep) -> Any:
        if step._number == 3:  # between two samples
            raise KeyboardInterrupt
        return finish(step)

    with monkeypatch.context() as patched:
        patched.setattr(CurvedStep, "finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tune(model, data, tmp_path / "resumed", settings())
    tune(model, data, tmp_path / "resumed", settings(), resume=True)
    whole, resumed = (
        (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "resumed")
    )
    assert whole == resumed


def test_a_preview_counts_the_reads_of_samples(model: str, data: Data) -> None:
    each, rare = (
        preview_tuning(model, data, settings(optimizer_settings={"every": every})) for every in (1, 1000)
    )
    assert each.predicted_seconds > 1.5 * rare.predicted_seconds


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"method": "lomo", "method_settings": {}}, "frees it at once"),
        ({"method": "mezo", "method_settings": {}}, "zeroth order"),
        ({"method": "lomo", "method_settings": {}, "optimizer": "sgg",
          "optimizer_settings": {"inner": "adahessian"}}, "frees it at once"),
    ],
)  # fmt: skip
def test_where_it_cant_be_sampled_it_is_refused_before_work(
    changed: dict[str, Any], message: str, model: str, data: Data, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=message):
        tune(model, data, tmp_path / "out", settings(**changed))
    assert list(tmp_path.iterdir()) == []


def test_a_model_of_16_bits_is_refused(data: Data, tmp_path: Path) -> None:
    coarse = save_model(tmp_path / "m", dtype=torch.bfloat16)
    with pytest.raises(SettingsError, match="computes in bfloat16"):
        tune(str(coarse), data, tmp_path / "out", settings())
