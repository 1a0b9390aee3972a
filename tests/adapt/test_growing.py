"""Steps whose batch grows: lengths of single gradients are exact, and a stop changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tailorbird.adapt.growing import GrowingStep
from tailorbird.adapt.optimizers.batch_growth import BatchGrowth
from tailorbird.adapt.rows import Row
from tailorbird.adapt.settings import TuneSettings
from tailorbird.adapt.step import Step
from tailorbird.adapt.trunk import Trunk
from tailorbird.adapt.tune import Data, preview_tuning, tune
from tailorbird.adapt.wrap import attached
from tailorbird.errors import SettingsError
from tiny import save_model
from tuning import additions, examples, gradients, open_model, still


class Told(BatchGrowth):
    """Remembers what it was told."""

    told: tuple[Any, ...] = ()

    def observe(self, *told: Any) -> None:
        self.told = told


def test_lengths_are_those_of_each_rows_gradient(tmp_path: Path) -> None:
    model, places = open_model(save_model(tmp_path / "m"))
    trunk, method, growth = Trunk(model), additions(places), Told(2, 8)
    rows = [Row.of([one]) for one in examples((37, 20, 9), 258)]
    whole = sum(row.learned for row in rows)
    with attached(model, places, method):
        step = GrowingStep(trunk, method, still(method), 1000, growth, recomputed=model.model.layers)
        loss, found, turns = gradients(step, rows)
        expected = gradients(Step(trunk, method, still(method), 1000), rows)
        alone = [gradients(Step(trunk, method, still(method), 1000), [row])[1] for row in rows]
    assert turns == 3
    assert loss == pytest.approx(expected[0], rel=1e-5)
    assert torch.allclose(found, expected[1], rtol=1e-4, atol=1e-7)
    read, learned, squares, square = growth.told
    assert (read, learned) == (3, [row.learned for row in rows])
    added = [one * row.learned / whole for one, row in zip(alone, rows, strict=True)]
    assert squares == pytest.approx([float(one.square().sum()) for one in added], rel=1e-4)
    assert square == pytest.approx(float(found.square().sum()), rel=1e-5)


def settings(**changed: Any) -> TuneSettings:
    given = {
        "method_settings": {"rank": 2}, "steps": 6, "batch": 2, "length": 48, "rate": 5e-3, "save_every": 1,
        "evaluate_every": 3, "grow_batch": 12, "grow_tolerance": 0.4,
    }  # fmt: skip
    return TuneSettings(**{**given, **changed})


def test_it_grows_and_resumes_bit_for_bit(
    model: str, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune(model, data, tmp_path / "whole", settings())
    tokens = [one["tokens"] for one in json.loads((tmp_path / "whole" / "history.json").read_text())["steps"]]
    assert len(tokens) == 6
    assert max(tokens) > 2 * tokens[0]
    finish, sizes = GrowingStep.finish, []

    def interrupted(step: GrowingStep) -> Any:
        sizes.append(step.growth.rows)
        if step._number == 4:
            raise KeyboardInterrupt
        return finish(step)

    with monkeypatch.context() as patched:
        patched.setattr(GrowingStep, "finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tune(model, data, tmp_path / "resumed", settings())
    assert sizes == sorted(sizes)
    assert sizes[0] == 2 < sizes[-1] <= 12
    tune(model, data, tmp_path / "resumed", settings(), resume=True)
    whole, resumed = (
        (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "resumed")
    )
    assert whole == resumed


def test_a_batch_that_may_not_grow_reads_what_steps_without_growth_read(
    model: str, data: Data, tmp_path: Path
) -> None:
    tune(model, data, tmp_path / "same", settings(grow_batch=2))
    tune(model, data, tmp_path / "plain", settings(grow_batch=None))
    same, plain = (
        json.loads((tmp_path / name / "history.json").read_text())["steps"] for name in ("same", "plain")
    )
    assert [one["tokens"] for one in same] == [one["tokens"] for one in plain]
    assert [one["loss"] for one in same] == pytest.approx([one["loss"] for one in plain], rel=1e-3)


def test_a_preview_tells_the_time_of_the_largest_steps(model: str, data: Data) -> None:
    growing, plain = (preview_tuning(model, data, settings(grow_batch=most)) for most in (200, None))
    assert growing.predicted_seconds > 10 * plain.predicted_seconds


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"method": "lomo", "method_settings": {}}, "for `lomo` .* adds up the gradients"),
        ({"method": "mezo", "method_settings": {}}, "for `mezo` .* adds up the gradients"),
        ({"optimizer": "adahessian"}, "reads each row once"),
        ({"batch": 1}, "at least 2 rows"),
        ({"grow_batch": 1}, "at least the 2 rows"),
    ],
)
def test_where_a_batch_cant_grow_it_is_refused_before_work(
    changed: dict[str, Any], message: str, model: str, data: Data, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=message):
        tune(model, data, tmp_path / "out", settings(**changed))
    assert list(tmp_path.iterdir()) == []


def test_epochs_of_unknown_length_are_refused() -> None:
    with pytest.raises(SettingsError, match="number of steps"):
        settings(steps=None)
