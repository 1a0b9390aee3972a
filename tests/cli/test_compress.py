"""`compress` hands every flag on."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import tailorbird.api as real_api


def test_every_flag_reaches_the_call(command: Any, api: Any) -> None:
    done = command(
        *("compress", "m", "-o", "o", "--plan", "plan.yaml", "--calibration", "c", "--evaluation", "e"),
        *("--sequences", "4", "--length", "64", "--max-kl", "1", "--max-perplexity-increase", "5"),
        *("--activations", "exact", "--allow-slower", "--resume", "--seed", "3"),
    )
    assert done.status == 0
    arguments = dict(api.arguments)
    del arguments["progress"]
    assert arguments == {
        "model": "m",
        "output": Path("o"),
        "recipe": None,
        "plan": Path("plan.yaml"),
        "calibration": "c",
        "evaluation": "e",
        "sequences": 4,
        "length": 64,
        "max_kl": 1.0,
        "activations": "exact",
        "allow_slower": True,
        "max_perplexity_increase": 5.0,
        "resume": True,
        "seed": 3,
        "device": "cpu",
    }


def test_without_flags_the_defaults_are_those_of_the_python_call(command: Any, api: Any) -> None:
    assert command("compress", "m", "-o", "o", "--recipe", "rtn").status == 0
    parameters = inspect.signature(real_api.compress).parameters
    for name, value in api.arguments.items():
        if name not in ("model", "output", "recipe", "progress"):
            assert value == parameters[name].default, name
    assert api.arguments["recipe"] == "rtn"
