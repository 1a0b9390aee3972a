"""A tuning that is killed anywhere, any number of times, ends with every byte that it would have had."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from forked import in_child
from tailorbird.adapt import checkpoints
from tailorbird.adapt.settings import TuneSettings
from tailorbird.adapt.tune import Data, tune
from tailorbird.progress import Silent

STEPS = 6
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method_settings": {"rank": 2}, "rate": 5e-3},
    "own weights": {
        "method": "full", "optimizer": "galore", "optimizer_settings": {"rank": 4, "interval": 2},
        "rate": 1e-3,
    },
    "zeroth order": {"method": "mezo", "rate": 1e-3},
    "growing batch": {"method_settings": {"rank": 2}, "rate": 5e-3, "grow_batch": 6, "grow_tolerance": 0.2},
}  # fmt: skip
#: what history.json has of a step that isn't the same in any two runs
TIMES = ("seconds", "resident_bytes")


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Killing(Silent):
    """Kills the process after a step, before its state is written."""

    def __init__(self, after: int) -> None:
        self.left = after

    def advance(self, n: int = 1, note: str = "") -> None:
        if note.startswith("loss"):
            self.left -= 1
            if self.left == 0:
                kill()


def kill_in_writing() -> None:
    """Let the next state's tensors be written, and then the process be killed."""

    def write_json(*_: Any) -> None:
        kill()

    checkpoints.write_json = write_json  # type: ignore[assignment]


def outputs(directory: Path) -> dict[str, Any]:
    """Every file of a result, byte by byte; of the history all but times."""
    found: dict[str, Any] = {
        str(file.relative_to(directory)): file.read_bytes()
        for file in directory.rglob("*")
        if file.is_file() and file.name != "history.json"
    }
    history = json.loads((directory / "history.json").read_text())
    for step in history["steps"]:
        assert all(step.pop(name) > 0 for name in TIMES)
    return found | {"history.json": history}


@pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.full) for seed in range(2, 12))]
)
@pytest.mark.parametrize("name", METHODS)
def test_killed_anywhere_it_ends_with_the_same_bytes(
    name: str, seed: int, model: str, data: Data, tmp_path: Path
) -> None:
    draw = random.Random(f"{name} {seed}")
    settings = TuneSettings(
        **METHODS[name], steps=STEPS, batch=2, length=48, evaluate_every=2, save_every=draw.randint(1, 3)
    )
    tune(model, data, tmp_path / "whole", settings)
    expected, out = outputs(tmp_path / "whole"), tmp_path / "out"
    killed = 0
    for _ in range(draw.randint(2, 4)):
        after, writing = draw.randint(1, 3), draw.random() < 0.4

        def run(after: int = after, writing: bool = writing) -> None:
            if writing:
                kill_in_writing()
            tune(model, data, out, settings, progress=Silent() if writing else Killing(after))

        status = in_child(run)
        if status == 0:  # it came to its end before
            break
        assert status == -signal.SIGKILL
        assert not out.exists()
        killed += 1
    assert killed
    if not out.exists():
        tune(model, data, out, settings, resume=True)
    found = outputs(out)
    assert found.keys() == expected.keys()
    assert [file for file in expected if found[file] != expected[file]] == []


def test_what_is_compared_is_all_that_is_written(model: str, data: Data, tmp_path: Path) -> None:
    settings = TuneSettings(steps=1, batch=2, length=48)
    tune(model, data, tmp_path / "out", settings)
    assert outputs(tmp_path / "out").keys() == {
        "adapter_config.json", "adapter_model.safetensors", "README.md", "tailorbird.json", "history.json"
    }  # fmt: skip
