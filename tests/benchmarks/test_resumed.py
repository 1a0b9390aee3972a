"""Benchmarks that are written as they go: what is there under the same settings isn't measured again."""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import compression_time
import machine
import tune_speed


class Stopped(Exception):
    """Takes the place of a kill."""


class Measured:
    """Takes the place of subjects in processes of their own: numbers that tell when they were measured."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.left = 10**6

    def __call__(self, *call: Any) -> float:
        if self.left == 0:
            raise Stopped
        self.left -= 1
        self.calls.append(call)
        return float(len(self.calls))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Measured:
    found = Measured()
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    monkeypatch.setattr(tune_speed, "make_models", lambda folder: {"bf16": folder, "4 bits": folder})

    def of_tuning(python: str, subject: str, model: Path, targets: str, batch: Any, steps: int) -> Any:
        seconds = found(batch, targets, subject)
        return {"seconds": [seconds, seconds], "loaded_bytes": 100, "peak_bytes": 100 + round(seconds)}

    def of_compression(name: str, *_: Any) -> Any:
        seconds = found(name)
        return {"failed": "no memory"} if name == "gptq" else {"seconds": seconds, "peak_rss_bytes": 7}

    monkeypatch.setattr(tune_speed, "measure", of_tuning)
    monkeypatch.setattr(compression_time, "seconds_of", of_compression)
    monkeypatch.setattr(compression_time, "write_random_llama", lambda folder, **_: folder)
    monkeypatch.setattr(compression_time, "write_text", lambda path: path)
    opened = type("Opened", (), {"ids": Path("ids"), "linears": [], "transposed": False})
    monkeypatch.setattr(compression_time, "open_subject", lambda *_: opened)
    return found


def run(benchmark: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> dict[str, Any]:
    """Content of the result file, whether the run came to its end or not."""
    monkeypatch.setattr(sys, "argv", ["benchmark", "--even-if-busy", *arguments])
    name = benchmark.__name__
    with contextlib.suppress(Stopped):
        benchmark.main()
    found: dict[str, Any] = json.loads((machine.RESULTS / f"{name}.json").read_text())
    assert not list(machine.RESULTS.glob("*.partial"))
    return found


def test_tuning_goes_on_where_it_was_stopped(measured: Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    cells, subjects = 4, len(tune_speed.SUBJECTS)
    measured.left = 9  # in the middle of a round
    part = run(tune_speed, monkeypatch, "--rounds", "2")
    assert sum(len(one["rounds"]) for cell in part["cells"] for one in cell["subjects"].values()) == 9
    measured.left = 10**6
    whole = run(tune_speed, monkeypatch, "--rounds", "2")
    assert len(measured.calls) == cells * subjects * 2
    assert {call: measured.calls.count(call) for call in measured.calls} == dict.fromkeys(measured.calls, 2)
    assert measured.calls[:4] == measured.calls[4:8][::-1]
    for cell in whole["cells"]:
        for found in cell["subjects"].values():
            speeds = [
                cell["batch"][0] * cell["batch"][1] / statistics.median(one["seconds"])
                for one in found["runs"]
            ]
            assert found["rounds"] == speeds
            assert found["tokens_per_s"] == statistics.median(speeds)
            assert found["bytes_above_weights"] == statistics.median(
                one["peak_bytes"] - 100 for one in found["runs"]
            )
    more = run(tune_speed, monkeypatch, "--rounds", "3")
    assert len(measured.calls) == cells * subjects * 3
    assert (
        more["cells"][0]["subjects"]["peft"]["rounds"][:2] == whole["cells"][0]["subjects"]["peft"]["rounds"]
    )
    run(tune_speed, monkeypatch, "--rounds", "3")
    assert len(measured.calls) == cells * subjects * 3


def test_other_settings_and_again_measure_anew(
    measured: Measured, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tune_speed, monkeypatch, "--rounds", "1")
    once = len(measured.calls)
    run(tune_speed, monkeypatch, "--rounds", "1", "--again")
    assert len(measured.calls) == 2 * once
    found = run(tune_speed, monkeypatch, "--rounds", "1", "--steps", "3")
    assert len(measured.calls) == 3 * once
    assert "other settings" in capsys.readouterr().out
    assert {len(one["runs"]) for cell in found["cells"] for one in cell["subjects"].values()} == {1}
    monkeypatch.setattr(machine, "describe", lambda: {"processor": "another"})
    run(tune_speed, monkeypatch, "--rounds", "1", "--steps", "3")
    assert len(measured.calls) == 4 * once


def test_compression_goes_on_where_it_was_stopped(
    measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured.left = 4
    part = run(compression_time, monkeypatch, "--rounds", "2")
    assert {row["subject"]: len(row["runs"]) for row in part["rows"]} == {
        "gptq-plain": 2, "gptq": 1, "gptq+signround": 1,
    }  # fmt: skip
    measured.left = 10**6
    whole = run(compression_time, monkeypatch, "--rounds", "2")
    assert [name for (name,) in measured.calls] == [
        "gptq-plain", "gptq", "gptq+signround", "gptq-plain", "gptq+signround",
    ]  # fmt: skip
    rows = {row["subject"]: row for row in whole["rows"]}
    assert rows["gptq"]["failed"] == "no memory"
    assert rows["gptq+signround"]["seconds"] == statistics.median([3.0, 5.0])
    assert set(whole) >= {"others_cores", "peers", "rows"}
    run(compression_time, monkeypatch, "--rounds", "2", "--subjects", "gptq-plain", "--again")
    assert [name for (name,) in measured.calls[5:]] == ["gptq-plain"] * 2
    kept = run(compression_time, monkeypatch, "--rounds", "2")
    assert len(measured.calls) == 7
    assert {row["subject"]: len(row["runs"]) for row in kept["rows"]} == {
        "gptq-plain": 2, "gptq": 1, "gptq+signround": 2,
    }  # fmt: skip


def test_a_result_is_there_whole_or_as_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    path = machine.write_result("some", {"rows": [1]})
    before = path.read_text()

    def stopped(*_: Any) -> None:
        raise Stopped

    monkeypatch.setattr(Path, "replace", stopped)
    with pytest.raises(Stopped):
        machine.write_result("some", {"rows": [1, 2]})
    assert path.read_text() == before
