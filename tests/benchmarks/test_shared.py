"""What the benchmarks share: busy machines are noticed, results carry their circumstances, models open."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import machine
from random_models import write_random_llama
from tailorbird.hardware.probe import processor_name
from tailorbird.model.checkpoint import open_checkpoint
from tailorbird.model.load import load

SHAPE = {"blocks": 3, "hidden": 64, "intermediate": 160, "heads": 4, "kv_heads": 2, "vocabulary": 300}


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="only Linux tells who is busy")
def test_another_busy_process_is_noticed() -> None:
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        assert machine.others_cores(0.5) > machine.QUIET_CORES
    finally:
        busy.kill()
        busy.wait()


def test_a_busy_machine_is_refused_unless_that_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "others_cores", lambda: 0.5)
    with pytest.raises(SystemExit, match="--even-if-busy"):
        machine.require_quiet(even_if_busy=False)
    assert machine.require_quiet(even_if_busy=True) == 0.5
    monkeypatch.setattr(machine, "others_cores", lambda: 0.01)
    assert machine.require_quiet(even_if_busy=False) == 0.01


def test_results_carry_machine_versions_and_date(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "RESULTS", tmp_path / "results")
    data = json.loads(machine.write_result("some", {"rows": [1]}).read_text())
    assert data["rows"] == [1]
    assert data["machine"]["cores"] >= 1
    assert data["machine"]["processor"] == processor_name()
    assert data["versions"]["torch"] == torch.__version__
    assert data["date"].startswith("20")


@pytest.mark.parametrize("tied", [False, True])
def test_random_model_opens_with_the_stated_shape_and_the_same_bytes(tmp_path: Path, tied: bool) -> None:
    first, again = (
        open_checkpoint(str(write_random_llama(tmp_path / name, tied=tied, **SHAPE))) for name in "ab"
    )
    assert first.content_hash() == again.content_hash()
    block = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 160 + 2 * 64
    assert first.parameters == 3 * block + 64 + (1 if tied else 2) * 300 * 64
    assert len(first.weights.files) == 3 + 2
    model = load(tmp_path / "a")
    ids = torch.tensor([first.tokenizer()("text")["input_ids"]])
    assert ids.tolist()[0] != []
    assert torch.isfinite(model(ids).logits).all()
    assert model.dtype == torch.bfloat16
