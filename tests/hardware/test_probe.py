"""A probe is complete, plausible, cached for this machine only, and never trusts a damaged cache."""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from tailorbird.hardware import probe as probe_module
from tailorbird.hardware.cache import cache_directory
from tailorbird.hardware.probe import probe, simd_features, usable_cores


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements small enough for many in one test."""
    monkeypatch.setattr(probe_module, "MEMORY_BYTES", 1 << 20)
    monkeypatch.setattr(probe_module, "DISK_BYTES", 1 << 20)
    monkeypatch.setattr(probe_module, "DISK_CHUNK", 1 << 19)
    monkeypatch.setattr(probe_module, "MATMUL_SECONDS", 0.0)


class Listener:
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.total = 0

    def stage(self, name: str, total: int) -> None:
        self.total += total

    def advance(self, n: int = 1, note: str = "") -> None:
        self.notes += [note] * n

    def note(self, text: str) -> None:
        raise AssertionError(text)

    def done(self) -> None:
        raise AssertionError("a probe is one stage of longer work")


def test_fields_and_values(tmp_path: Path) -> None:
    start = time.perf_counter()
    found = probe(directory=tmp_path)
    assert time.perf_counter() - start < 40, "meant for 6 s on a quiet machine"
    data = asdict(found)
    promised = "cores simd memory_bytes read_bandwidth copy_bandwidth disk_bandwidth matmul devices"
    assert set(promised.split()) | {"memory_available_bytes", "disk_free_bytes"} == set(data)
    assert json.loads(json.dumps(data)) == data
    assert 1 <= found.cores <= (os.cpu_count() or 1)
    assert found.memory_available_bytes <= found.memory_bytes
    for rate in (found.read_bandwidth, found.copy_bandwidth, found.disk_bandwidth):
        assert 1e6 < rate < 1e14
    assert set(found.matmul) == {"fp32", "bf16", "int8"}
    assert all(rate is None or 1e7 < rate < 1e16 for rate in found.matmul.values())
    assert not list(tmp_path.glob(".tailorbird-probe-*")), "the measuring file is gone"


def test_second_call_reads_the_cache_and_refresh_measures(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, again, refreshed = Listener(), Listener(), Listener()
    threads = torch.get_num_threads()
    found = probe(directory=tmp_path, progress=first)
    assert probe(directory=tmp_path, progress=again).matmul == found.matmul
    probe(refresh=True, directory=tmp_path, progress=refreshed)
    assert len(first.notes) == first.total == len(refreshed.notes) > 0
    assert again.notes == []
    assert torch.get_num_threads() == threads
    monkeypatch.setattr(probe_module, "processor_name", lambda: "another processor")
    elsewhere = Listener()
    probe(directory=tmp_path, progress=elsewhere)
    assert len(elsewhere.notes) == first.total


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: "{",
        lambda entry: "[]",
        lambda entry: json.dumps({**entry, "schema": 99}),
        lambda entry: json.dumps({**entry, "disks": []}),
        lambda entry: json.dumps({**entry, "rates": {**entry["rates"], "read_bandwidth": 0}}),
        lambda entry: json.dumps({**entry, "rates": {**entry["rates"], "copy_bandwidth": math.nan}}),
        lambda entry: json.dumps({**entry, "rates": {**entry["rates"], "matmul": {}}}),
        lambda entry: json.dumps({**entry, "rates": {**entry["rates"], "devices": [{"nme": "x"}]}}),
    ],
)
def test_damaged_cache_is_measured_anew_and_replaced(quick: None, tmp_path: Path, damage: Any) -> None:
    probe(directory=tmp_path)
    path = cache_directory() / "probe.json"
    path.write_text(damage(json.loads(path.read_text())))
    listener = Listener()
    probe(directory=tmp_path, progress=listener)
    assert len(listener.notes) == listener.total > 1
    assert json.loads(path.read_text())["schema"] == probe_module.SCHEMA
    assert [p.name for p in path.parent.iterdir()] == ["probe.json"]


def test_a_cache_that_cannot_be_written_is_no_failure(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TAILORBIRD_CACHE", str(tmp_path / "file" / "cache"))
    assert probe(directory=tmp_path).read_bandwidth > 0


def test_a_directory_that_does_not_exist_yet_is_measured_above(quick: None, tmp_path: Path) -> None:
    assert probe(directory=tmp_path / "a" / "b").disk_bandwidth == probe(directory=tmp_path).disk_bandwidth


def test_an_unwritable_disk_has_no_rate_and_is_asked_again(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError

    with monkeypatch.context() as patched:
        patched.setattr(probe_module.tempfile, "NamedTemporaryFile", refuse)
        assert probe(directory=tmp_path).disk_bandwidth is None
    assert probe(directory=tmp_path).disk_bandwidth is not None


def test_missing_product_is_none(quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "_int_mm")
    assert probe(directory=tmp_path).matmul["int8"] is None


def test_quota_cuts_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_module, "cpu_quota", lambda: 0.5)
    assert usable_cores() == 1


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ({"flags": "fpu amx_int8 avx2 avx512_vnni"}, ["avx2", "avx512_vnni", "amx_int8"]),
        ({"features": "fp asimd i8mm"}, ["asimd", "i8mm"]),
    ],
)
def test_simd_of_both_families(
    monkeypatch: pytest.MonkeyPatch, cpuinfo: dict[str, str], expected: list[str]
) -> None:
    monkeypatch.setattr(probe_module, "_cpuinfo", lambda: cpuinfo)
    assert simd_features() == expected


def test_generations_of_one_name_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"model name": "AMD EPYC", "cpu family": "25", "model": "17"}
    monkeypatch.setattr(probe_module, "_cpuinfo", lambda: fields)
    before = probe_module.machine_identity()
    fields["cpu family"] = "26"
    assert probe_module.processor_name() == "AMD EPYC (family 26, model 17)"
    assert probe_module.machine_identity() != before
    del fields["cpu family"], fields["model"]
    assert probe_module.processor_name() == "AMD EPYC"
