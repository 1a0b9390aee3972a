"""Batches: every request answered once, whatever interrupts it; what can't be one is refused by its line."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fake_engine import FAILING
from tailorbird import api
from tailorbird.errors import ResumeError, SettingsError
from tailorbird.progress import Silent
from tailorbird.serve.batch import BatchResult, read_lines, resume, run_batch
from tailorbird.serve.interface import EngineOptions


def line(id: str, **body: Any) -> dict[str, Any]:
    fields = {"model": "demo", "prompt": [5, 6, 7], "max_tokens": 3} | body
    return {"custom_id": id, "method": "POST", "url": "/v1/completions", "body": fields}


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    return path


def answers(path: Path) -> dict[str, Any]:
    found = [json.loads(one) for one in path.read_text().splitlines()]
    assert len({one["custom_id"] for one in found}) == len(found)
    return {one["custom_id"]: one["response"] for one in found}


def answer(source: Path, target: Path, engine: str = "fake_engine:FakeEngine") -> BatchResult:
    return run_batch(EngineOptions("demo", max_sequences=3), source, target, Silent(), engine=engine)


def test_every_request_is_answered_and_mistakes_fail_alone(tmp_path: Path) -> None:
    lines = [line(str(number), prompt=[number + 1, 9]) for number in range(20)]
    lines += [line("wrong", temperature=-1), line("failing", prompt=[FAILING]), line("other", model="none")]
    lines += [line("no number", temperature=float("nan")), line("half", prompt="\ud800")]
    result = answer(write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl")
    found = answers(tmp_path / "out.jsonl")
    assert set(found) == {one["custom_id"] for one in lines}
    assert (result.requests, result.failed, result.resumed) == (25, 5, 0)
    for id in ("wrong", "no number", "half"):
        assert found[id]["status_code"] == 400
    assert found["other"]["status_code"] == 404
    assert found["failing"]["status_code"] >= 400
    for number in range(20):
        assert found[str(number)]["status_code"] == 200
        assert found[str(number)]["body"]["usage"]["prompt_tokens"] == 2
    assert not list(tmp_path.glob("*.partial"))


def test_what_was_answered_is_not_asked_again(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [line(str(number)) for number in range(6)])
    whole = answer(source, tmp_path / "whole.jsonl")
    kept = (tmp_path / "whole.jsonl").read_text().splitlines()
    partial = tmp_path / "out.jsonl.partial"
    resume(partial, {"source": "another", "model": "demo"})
    with pytest.raises(ResumeError, match="another model or other requests"):
        answer(source, tmp_path / "out.jsonl")
    partial.unlink()
    assert whole.requests == 6

    resume(partial, {"source": hashlib.sha256(source.read_bytes()).hexdigest(), "model": "demo"})
    with partial.open("a") as file:
        file.write(kept[0] + "\n" + kept[1] + "\n" + kept[2][:40])  # cut off in the middle of a line
    result = answer(source, tmp_path / "out.jsonl")
    assert (result.resumed, result.requests) == (2, 6)
    assert set(answers(tmp_path / "out.jsonl")) == {str(number) for number in range(6)}


def test_only_newlines_end_a_line(tmp_path: Path) -> None:
    ends = "\u2028 \u2029 \x85 \x0b \x0c \x1c"
    lines = [line(f"{number}{ends}", prompt=f"{number}{ends}", max_tokens=60) for number in range(3)]
    source = tmp_path / "in.jsonl"
    source.write_text("\r\n".join(json.dumps(one, ensure_ascii=False) for one in lines), encoding="utf-8")
    answer(source, tmp_path / "whole.jsonl")
    whole = (tmp_path / "whole.jsonl").read_text(encoding="utf-8").split("\n")
    texts = {
        one["custom_id"]: one["response"]["body"]["choices"][0]["text"] for one in map(json.loads, whole[:-1])
    }
    assert texts == {one["custom_id"]: one["body"]["prompt"] for one in lines}

    partial = tmp_path / "out.jsonl.partial"
    resume(partial, {"source": hashlib.sha256(source.read_bytes()).hexdigest(), "model": "demo"})
    with partial.open("a", encoding="utf-8") as file:
        file.write(f"{whole[0]}\n{whole[1]}\n")
    assert answer(source, tmp_path / "out.jsonl").resumed == 2


def test_what_guesses_tokens_is_told_to_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tailorbird.serve.batch.run_batch", lambda options, *_, **__: options)
    options: Any = api.batch("demo", tmp_path / "in", tmp_path / "out", draft="self:skip", max_sequences=2)
    assert (options.draft, options.max_sequences) == ("self:skip", 2)


def test_a_killed_batch_goes_on(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [line(str(number), max_tokens=40) for number in range(60)])
    target = tmp_path / "out.jsonl"
    code = (
        "from pathlib import Path; from tailorbird.serve.batch import run_batch\n"
        "from tailorbird.serve.interface import EngineOptions; from tailorbird.progress import Silent\n"
        f"run_batch(EngineOptions('demo', max_sequences=2), Path({str(source)!r}), Path({str(target)!r}),"
        " Silent(), engine='fake_engine:paced')"
    )
    child = subprocess.Popen([sys.executable, "-c", code])
    partial = tmp_path / "out.jsonl.partial"
    deadline = time.monotonic() + 60
    while not (partial.exists() and partial.read_text().count("\n") > 3):
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    result = answer(source, target)
    assert result.resumed >= 3
    assert set(answers(target)) == {str(number) for number in range(60)}
    assert result.failed == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "line 1"),
        ("[]", "a JSON object"),
        (json.dumps({"url": "/v1/completions", "body": {}}), "custom_id"),
        (json.dumps({"custom_id": "a", "url": "/v2", "body": {}}), "/v1/completions"),
        (json.dumps(line("a") | {"method": "GET"}), "POST"),
        (json.dumps(line("a") | {"body": []}), "the fields of the request"),
        (json.dumps(line("a", stream=True)), "stream"),
        (json.dumps(line("a")) + "\n" + json.dumps(line("a")), "line 2"),
        ("\n\n", "without a request"),
        (json.dumps(line("half \ud800")), "line 1.*surrogate"),
        ('{"custom_id": "a", "body": ' + "[" * 100_000, "line 1.*recursion"),
    ],
)
def test_lines_that_are_no_requests_are_named(text: str, said: str, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(text)
    with pytest.raises(SettingsError, match=said):
        read_lines(source)


def test_nothing_is_written_over(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [line("a")])
    (tmp_path / "out.jsonl").write_text("mine")
    with pytest.raises(SettingsError, match="exists"):
        answer(source, tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == "mine"
    with pytest.raises(SettingsError, match="directory"):
        answer(source, tmp_path / "nowhere" / "out.jsonl")
    with pytest.raises(SettingsError, match="correct the path"):
        answer(tmp_path / "none.jsonl", tmp_path / "other.jsonl")
