"""Cells of tuning benchmarks: beside each stands what it was run under; other conditions are told."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import machine
import quantized_starts
import tune_methods

FOUND = {
    "loss_before": 2.0, "loss_after": 1.5, "loss_at_start": 1.9, "steps": 40, "trainable_parameters": 10,
    "adapter_bytes": 40, "peak_rss_bytes": 100, "tokens_per_s": 5.0,
}  # fmt: skip


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """Arguments of the cells that are run, in place of running them."""
    calls: list[dict[str, Any]] = []
    examples = tmp_path / "train.jsonl", tmp_path / "held-out.jsonl"
    for file in examples:
        file.write_text("{}")

    def run_cell(settings: dict[str, Any]) -> dict[str, Any]:
        calls.append(settings)
        Path(settings["output"]).mkdir(parents=True)
        (Path(settings["output"]) / "history.json").write_text('{"looks": [{"loss": 1.9}]}')
        return FOUND

    for module in (machine, tune_methods, quantized_starts):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    for module in (tune_methods, quantized_starts):
        monkeypatch.setattr(module, "run_cell", run_cell)
        monkeypatch.setattr(module, "prepare", lambda *_: examples)
    monkeypatch.setattr(quantized_starts, "round_plainly", lambda source, output, *_, **__: output)
    monkeypatch.setattr(tune_methods, "packed", lambda model, folder: folder / "packed")
    monkeypatch.setattr(tune_methods, "methods", lambda: {
        "lora": {"method": "lora"}, "qzo": {"method": "qzo"}, "full galore": {"method": "full"},
    })  # fmt: skip
    return calls


def run(benchmark: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
    benchmark.main()


METHODS = (tune_methods, ("--even-if-busy", "--task", "bodies"))
STARTS = (quantized_starts, ("--bits", "2"))


@pytest.mark.parametrize(("benchmark", "arguments"), [METHODS, STARTS])
def test_a_cell_of_other_conditions_is_told_and_run_anew_where_that_is_asked_for(
    benchmark: Any, arguments: tuple[str, ...], ran: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run(benchmark, monkeypatch, *arguments)
    once = len(ran)
    assert once >= 3
    run(benchmark, monkeypatch, *arguments, "--refresh")
    assert len(ran) == once
    assert "other" not in capsys.readouterr().out
    now = machine.describe()
    monkeypatch.setattr(tune_methods, "describe", lambda: {**now, "threads": 99, "processor": "another"})
    run(benchmark, monkeypatch, *arguments)
    assert len(ran) == once
    assert capsys.readouterr().out.count("other processor, threads: kept; --refresh runs it anew") == once
    run(benchmark, monkeypatch, *arguments, "--refresh")
    assert len(ran) == 2 * once
    run(benchmark, monkeypatch, *arguments)
    assert len(ran) == 2 * once
    for file in machine.RESULTS.rglob("*.json"):
        conditions = json.loads(file.read_text())["conditions"]
        assert (conditions["threads"], conditions["processor"]) == (99, "another")
        assert len(conditions["fingerprint"]) == 64
        assert not set(conditions["settings"]) & set(tune_methods.PLACES)


def test_a_cell_that_doesnt_state_its_conditions_is_kept_and_told(
    ran: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cell = machine.RESULTS / "tune_methods" / "demo" / "bodies" / "lora.json"
    cell.parent.mkdir(parents=True)
    cell.write_text(json.dumps(FOUND))
    run(tune_methods, monkeypatch, *METHODS[1])
    assert [one["method"] for one in ran] == ["qzo", "full"]
    assert "lora is of conditions that it doesn't state: kept" in capsys.readouterr().out


def test_other_examples_are_other_conditions(tmp_path: Path) -> None:
    files = tmp_path / "a", tmp_path / "b"
    for file in files:
        file.write_text("1")
    settings = {"model": "demo", "data": str(files[0]), "rank": 2}
    before = tune_methods.conditions(settings, "demo", files)
    assert tune_methods.conditions({**settings, "data": "elsewhere"}, "demo", files) == before
    others = [tune_methods.conditions({**settings, "rank": 3}, "demo", files)]
    files[1].write_text("2")
    others.append(tune_methods.conditions(settings, "demo", files))
    assert len({one["fingerprint"] for one in (before, *others)}) == 3


def test_qzo_learns_on_a_packed_model(ran: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    run(tune_methods, monkeypatch, *METHODS[1])
    models = {one["method"]: Path(one["model"]).name for one in ran}
    assert models == {"lora": "demo", "qzo": "packed", "full": "demo"}


def test_every_optimizer_that_learns_weights_has_a_cell() -> None:
    from tailorbird.adapt.optimizers.registry import OPTIMIZERS, optimizer_named

    assert set(tune_methods.RATES) == set(OPTIMIZERS) - {"sgd", "adahessian"}
    for name in tune_methods.RATES:
        optimizer_named(name, **tune_methods.OPTIMIZERS.get(name, {}))
    cells = tune_methods.methods()
    assert {"lora r1", "lora r2", "lora r32", "qzo", "full apollo-mini"} <= set(cells)
    assert cells["full galore"]["optimizer_settings"] == {"rank": 32}
