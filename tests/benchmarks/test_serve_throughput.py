"""Serving is compared on prompts that no engine has seen, and goes on where it was stopped."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import statistics
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import machine
import serve_child
import serve_throughput
from cpu_peers import Entry
from serve_throughput import MIXES, SEQUENCES, SINGLE, WAYS, cells_in, load_of, served, warm_up

ENGINES = {"transformers": "bf16", "tailorbird": "4 bits", "llama.cpp": "q4_0", "openvino": "int4"}


class Stopped(Exception):
    """Takes the place of a kill."""


class Answering:
    """Takes the place of an engine's process: a token of each request every `pace` seconds."""

    asked: ClassVar[list[tuple[str, list[Any]]]] = []
    left, cached = 10**6, 0

    def __init__(self, entry: Entry, *_: str) -> None:
        self.entry, self.pace = entry, {"transformers": 0.4, "tailorbird": 0.05}.get(entry.engine, 0.1)

    def ask(self, line: str) -> str:
        """See `Process`."""
        if Answering.left == 0:
            raise Stopped
        Answering.left -= 1
        load, _ = json.loads(line)
        self.asked.append((self.entry.name, load))
        times = [[at + self.pace * (n + 1) for n in range(new)] for at, _, new in load]
        return json.dumps({"times": times, "cached_tokens": self.cached})

    def end(self) -> None:
        """See `Process`."""


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, list[Any]]]:
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    monkeypatch.setattr(serve_throughput, "Process", Answering)
    monkeypatch.setattr(Answering, "asked", [])
    monkeypatch.setattr(Answering, "left", 10**6)
    monkeypatch.setattr(serve_throughput, "read_bandwidth", lambda: 1.0)
    monkeypatch.setattr(serve_throughput, "pythons", lambda _: dict.fromkeys(ENGINES, ""))
    monkeypatch.setattr(serve_throughput, "installed_version", lambda *_: "1")
    entries = [Entry(engine, format, 4, "") for engine, format in ENGINES.items()]
    monkeypatch.setattr(serve_throughput, "prepare", lambda *_: entries)
    monkeypatch.setattr(serve_throughput, "write_random", lambda shape, folder, **_: folder)
    monkeypatch.setattr(serve_throughput, "round_plainly", lambda source, folder, *_: folder)
    return Answering.asked


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> dict[str, Any]:
    """Content of the result file, whether the run came to its end or not."""
    monkeypatch.setattr(sys, "argv", ["benchmark", "peers", "--even-if-busy", *arguments])
    with contextlib.suppress(Stopped):
        serve_throughput.main()
    found: dict[str, Any] = json.loads((machine.RESULTS / "serve_throughput.json").read_text())
    return found


def test_no_prompt_is_sent_twice() -> None:
    loads = [warm_up()]
    for cell in cells_in({}, ["110M"], 32):
        cell["per_second"] = 1.0
        loads += [load_of(cell, number) for number in range(5)]
    prompts = [tuple(prompt) for load in loads for _, prompt, _ in load]
    assert len(set(prompts)) == len(prompts) == 16 + 5 * (32 + 16 + 16 + 8)
    # nor the beginning of one, as long as a page
    beginnings = [prompt[:32] for prompt in prompts if len(prompt) >= 32]
    assert len(set(beginnings)) == len(beginnings)


def test_at_saturation_as_many_requests_wait_as_run_at_once() -> None:
    for cell in cells_in({}, ["110M"], 32):
        cell["per_second"] = 2.0
        load = load_of(cell, 0)
        assert len(load) == cell["requests"]
        if cell["way"] == "saturation":
            assert len(load) >= SEQUENCES
            assert {at for at, _, _ in load} == {0.0}
        else:
            times = [at for at, _, _ in load]
            assert times == sorted(times)
            assert len(load) / times[-1] == pytest.approx(2.0, rel=0.8)


def test_a_prompt_that_a_cache_knew_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Answering, "cached", 32)
    with pytest.raises(SystemExit, match="32 tokens of prompts in a cache"):
        served(Answering(Entry("tailorbird", "4 bits", 4, "")), warm_up())  # type: ignore[arg-type]


def test_it_goes_on_where_it_was_stopped(
    answering: list[tuple[str, list[Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    warming = len(ENGINES)
    monkeypatch.setattr(Answering, "left", warming + 6)  # in the middle of the second round
    part = run(monkeypatch, "--rounds", "2")
    assert [len(one["rounds"]) for one in part["cells"][0]["engines"].values()] == [1, 1, 2, 2]
    monkeypatch.setattr(Answering, "left", 10**6)
    whole = run(monkeypatch, "--rounds", "2")
    names = {f"{engine} {format}" for engine, format in ENGINES.items()}
    assert [(cell["mix"], cell["way"]) for cell in whole["cells"]] == list(itertools.product(MIXES, WAYS))
    assert all({*cell["engines"]} == names for cell in whole["cells"])
    assert all(len(one["rounds"]) == 2 for cell in whole["cells"] for one in cell["engines"].values())
    # each engine got each load once, and all the same ones
    sent = {
        name: [json.dumps(load) for engine, load in answering if engine == name and len(load) > 1]
        for name in names
    }
    counted = {name: set(loads) - {json.dumps(warm_up())} for name, loads in sent.items()}
    assert len({frozenset(loads) for loads in counted.values()}) == 1
    assert all(len(loads) == 2 + 8 for loads in sent.values())  # two warm-ups
    measured = len(answering)
    run(monkeypatch, "--rounds", "2")
    assert len(answering) == measured
    run(monkeypatch, "--rounds", "2", "--requests", "16")
    assert len(answering) > measured


def test_ours_is_compared_round_by_round(
    answering: list[tuple[str, list[Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run(monkeypatch, "--rounds", "3")
    for cell in found["cells"]:
        ours = cell["engines"]["tailorbird 4 bits"]["rounds"]
        assert {pair["peer"].split()[0] for pair in cell["compared"]} == {*ENGINES} - {"tailorbird"}
        for pair in cell["compared"]:
            its = cell["engines"][pair["peer"]]["rounds"]
            ratios = [a["all_tokens_per_s"] / b["all_tokens_per_s"] for a, b in zip(ours, its, strict=True)]
            assert pair["throughput_ratio"] == statistics.median(ratios)
            assert (pair["goal"] is None) == (cell["way"] == "arrivals")
    at_once, later = found["cells"][:2]
    slowest = min(one["requests_per_s"] for one in at_once["engines"].values())
    assert later["per_second"] == pytest.approx(0.6 * slowest)
    assert {*found["single"]["110M"]["rows"]} == {*SINGLE}
    assert found["single"]["110M"]["rows"]["tailorbird"]["of_generate"] == pytest.approx(2.0)


@pytest.mark.parametrize("engine", ["tailorbird", "generate", "http"])
@pytest.mark.usefixtures("two_threads")
def test_our_engines_write_what_they_are_told_and_say_what_they_knew(engine: str) -> None:
    rng = random.Random(0)
    load = [(0.0, [rng.randrange(3, 4000) for _ in range(length)], 5) for length in (40, 7, 70)]
    server: serve_child.Server = serve_child.ENGINES[engine]("demo", 2)
    try:
        times = serve_child.run(server, load, 2)
        assert [len(one) for one in times] == [5, 5, 5]
        assert all(0 < a <= b for one in times for a, b in itertools.pairwise(one))
        assert server.cached_tokens() == 0
        serve_child.run(server, load, 2)
        assert (server.cached_tokens() > 0) == (engine != "generate")
    finally:
        server.end()
