"""The fastest launch is found once, kept, and given up where its device, Triton or kernel changes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tailorbird.hardware.cache import cache_directory, forget_kernel_times
from tailorbird.kernels import triton_runtime, triton_tuning
from tailorbird.kernels.triton_tuning import Launch, choose, magnitude

pytestmark = pytest.mark.skipif(not triton_runtime.installed(), reason="the package triton isn't installed")

CPU = torch.device("cpu")
LAUNCHES = (Launch(4, 2, (64, 64)), Launch(8, 2, (128, 64)), Launch(4, 3))


class Stopwatch:
    """A timer that says how long each launch takes, and counts what it was asked."""

    def __init__(self, *seconds: float) -> None:
        self.seconds = dict(zip(LAUNCHES, seconds, strict=True))
        self.asked: list[Launch] = []

    def run(self, launch: Launch) -> None:
        self.asked.append(launch)

    def time(self, call: Callable[[], Any]) -> float:
        call()
        seconds = self.seconds[self.asked[-1]]
        if math.isinf(seconds):
            raise triton_runtime.triton.runtime.errors.OutOfResources(300_000, 101_376, "shared memory")
        return seconds

    def choose(self, kernel: str = "kernel", case: tuple = (64, "bf16")) -> Launch:
        return choose(kernel, case, LAUNCHES, self.run, CPU, self.time)


@pytest.fixture(autouse=True)
def forget() -> None:
    """As a new process begins."""
    triton_tuning._table_in.cache_clear()


def table() -> Path:
    (path,) = cache_directory().glob("kernels-*.json")
    return path


def test_the_fastest_is_taken_and_timed_once() -> None:
    watch = Stopwatch(3.0, 1.0, 2.0)
    assert watch.choose() == LAUNCHES[1]
    assert watch.asked == list(LAUNCHES)
    assert watch.choose() == LAUNCHES[1]
    triton_tuning._table_in.cache_clear()
    assert watch.choose() == LAUNCHES[1]
    assert len(watch.asked) == len(LAUNCHES)


def test_each_kernel_and_case_has_its_own() -> None:
    first, second = Stopwatch(3.0, 1.0, 2.0), Stopwatch(3.0, 2.0, 1.0)
    assert first.choose() == LAUNCHES[1]
    assert second.choose(case=(128, "bf16")) == LAUNCHES[2]
    assert second.choose("other") == LAUNCHES[2]
    assert first.choose() == LAUNCHES[1]
    assert len(json.loads(table().read_text())["launches"]) == 3


def test_what_another_process_kept_stays() -> None:
    Stopwatch(3.0, 1.0, 2.0).choose("first")
    entry = json.loads(table().read_text())
    entry["launches"]["second 64 bf16"] = [4, 3, []]
    table().write_text(json.dumps(entry))
    Stopwatch(1.0, 2.0, 3.0).choose("third")
    assert json.loads(table().read_text())["launches"] == {
        "first 64 bf16": [8, 2, [128, 64]],
        "second 64 bf16": [4, 3, []],
        "third 64 bf16": [4, 2, [64, 64]],
    }


def test_a_launch_that_does_not_fit_is_left_out() -> None:
    assert Stopwatch(math.inf, 2.0, 1.0).choose() == LAUNCHES[2]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda entry: {**entry, "schema": entry["schema"] + 1},
        lambda entry: {**entry, "identity": {**entry["identity"], "triton": "0.1"}},
        lambda entry: {**entry, "launches": {name: [16, 9, []] for name in entry["launches"]}},
        lambda entry: {**entry, "launches": dict.fromkeys(entry["launches"], "fast")},
        lambda entry: [],
    ],
)
def test_what_is_no_longer_true_is_timed_again(spoil: Callable[[Any], Any]) -> None:
    Stopwatch(3.0, 1.0, 2.0).choose()
    table().write_text(json.dumps(spoil(json.loads(table().read_text()))))
    triton_tuning._table_in.cache_clear()
    again = Stopwatch(1.0, 2.0, 3.0)
    assert again.choose() == LAUNCHES[0]
    assert again.asked == list(LAUNCHES)


def test_a_refreshed_probe_forgets_launches() -> None:
    Stopwatch(3.0, 1.0, 2.0).choose()
    forget_kernel_times()
    assert not list(cache_directory().glob("kernels-*.json"))


def test_nothing_is_timed_where_there_is_nothing_to_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Stopwatch(3.0, 1.0, 2.0)
    assert choose("kernel", (), LAUNCHES[2:], watch.run, CPU, watch.time) == LAUNCHES[2]
    monkeypatch.setattr(triton_tuning, "interpreted", lambda: True)
    assert choose("kernel", (), LAUNCHES, watch.run, CPU) == LAUNCHES[0]
    assert watch.asked == []


def test_while_a_graph_is_recorded_the_default_is_taken_and_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    recording = True
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Test (96 GB)")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: recording)
    watch = Stopwatch(3.0, 1.0, 2.0)
    assert choose("kernel", (), LAUNCHES, watch.run, cuda, watch.time) == LAUNCHES[0]
    assert watch.asked == []
    recording = False
    assert choose("kernel", (), LAUNCHES, watch.run, cuda, watch.time) == LAUNCHES[1]
    recording = True
    assert choose("kernel", (), LAUNCHES, watch.run, cuda, watch.time) == LAUNCHES[1]
    assert table().name == "kernels-NVIDIA-Test-96-GB-.json"


def test_sizes_share_a_choice_up_to_a_power_of_two() -> None:
    assert [magnitude(n) for n in (0, 1, 2, 3, 64, 65, 2048)] == [1, 1, 2, 4, 64, 128, 2048]
