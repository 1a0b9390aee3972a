"""`fit` hands every flag on, prints what came out, and says in its status whether a dry run fits."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tailorbird.api as real_api

FLAGS = {
    "--calibration": ("calibration", "text.txt", "text.txt"),
    "--evaluation": ("evaluation", "held", "held"),
    "--context": ("context", "512", 512),
    "--concurrency": ("concurrency", "3", 3),
    "--min-speed": ("min_speed", "30tok/s", "30tok/s"),
    "--max-latency": ("max_latency", "40ms", "40ms"),
    "--sequences": ("sequences", "16", 16),
    "--length": ("length", "128", 128),
    "--effort": ("effort", "best", "best"),
    "--method": ("method", "rtn", "rtn"),
    "--keep": ("keep", "head", ["head"]),
    "--max-kl": ("max_kl", "0.5", 0.5),
    "--max-perplexity-increase": ("max_perplexity_increase", "2.5", 2.5),
    "--target": ("target", "gguf", "gguf"),
    "--activations": ("activations", "exact", "exact"),
    "--seed": ("seed", "7", 7),
}


def test_every_flag_reaches_the_call(command: Any, api: Any) -> None:
    values = [part for flag, (_, text, _) in FLAGS.items() for part in (flag, text)]
    done = command(
        "fit", "m", "--memory", "1.5GiB", "--output", "o", "--frontier", "--resume", "--allow-slower", *values
    )
    assert done.status == 0
    arguments = api.arguments
    assert (arguments["model"], arguments["memory"], Path(arguments["output"])) == ("m", "1.5GiB", Path("o"))
    assert {name: arguments[name] for name, _, _ in FLAGS.values()} == {n: v for n, _, v in FLAGS.values()}
    assert (arguments["frontier"], arguments["resume"], arguments["dry_run"]) == (True, True, False)
    assert arguments["allow_slower"] is True


def test_without_flags_the_defaults_are_those_of_the_python_call(command: Any, api: Any) -> None:
    assert command("fit", "m", "--memory", "50%", "-o", "o").status == 0
    parameters = inspect.signature(real_api.fit).parameters
    for name, value in api.arguments.items():
        if name not in ("model", "memory", "output", "progress"):
            assert value == parameters[name].default, name


def test_the_model_must_be_given(command: Any, api: Any) -> None:
    done = command("fit", "--memory", "50%", "-o", "o")
    assert (done.status, api.calls) == (2, [])


@pytest.mark.parametrize("flag", ["--context", "--concurrency", "--sequences", "--max-kl"])
def test_negative_numbers_are_refused(command: Any, api: Any, flag: str) -> None:
    done = command("fit", "m", "--memory", "50%", "-o", "o", flag, "-1")
    assert (done.status, api.calls) == (2, [])


def test_the_table_shows_before_predicted_and_after_and_the_report(command: Any, api: Any) -> None:
    out = command("fit", "m", "--memory", "50%", "-o", "o").out
    row = next(line for line in out.splitlines() if line.startswith("KL, mean"))
    assert row.split() == ["KL,", "mean", "0", "0.0161", "0.0183", "nats/token"]
    assert "out/python-8m/report.html" in out
    assert "4 of 4 checks" in out


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_warnings_go_to_standard_error(command: Any, api: Any, flags: list[str]) -> None:
    api.answers["fit"] = replace(api.answers["fit"], warnings=["SLOWER than [the] source", "few tokens"])
    done = command("fit", "m", "--memory", "50%", "-o", "o", *flags)
    assert done.err.index("few tokens") < done.err.index("SLOWER than [the] source")
    assert "SLOWER" not in done.out or flags


@pytest.mark.parametrize("fits", [True, False])
def test_a_dry_run_needs_no_output_and_its_status_says_whether_it_fits(
    command: Any, api: Any, dry_run: Any, fits: bool
) -> None:
    api.answers["fit"] = replace(dry_run, fits=fits, advice=None if fits else "use --sequences 8")
    text, as_json = (command("fit", "m", "--memory", "50%", "--dry-run", *flag) for flag in ([], ["--json"]))
    assert text.status == as_json.status == (0 if fits else 2)
    assert "256 MiB" in text.out
    assert ("use --sequences 8" in text.out) == (not fits)
    assert json.loads(as_json.out)["fits"] is fits
    assert api.calls[0][1]["dry_run"] is True


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, None),
        ({"asked_step_seconds": 0.04}, "not known before kernels are timed"),
        (
            {"asked_step_seconds": 0.04, "fastest_step_seconds": 2.5e-4, "fastest_tokens_per_s": 4000.0},
            "0.250 ms, 4,000 tok/s, predicted",
        ),
    ],
)
def test_a_dry_run_shows_the_speed_that_was_asked_for_and_what_can_be_had(
    command: Any, api: Any, dry_run: Any, fields: dict[str, float], said: str | None
) -> None:
    api.answers["fit"] = replace(dry_run, **fields)
    out = command("fit", "m", "--memory", "50%", "--dry-run").out
    assert ("40.0 ms" in out) == bool(fields)
    assert ("fastest possible" in out) == bool(fields)
    assert said is None or said in out
