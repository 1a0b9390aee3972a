"""Many requests from a file, answered into a file, in OpenAI's batch format.

A line in: ``{"custom_id": ..., "method": "POST", "url": "/v1/chat/completions", "body": {...}}``. A line out:
``{"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error"}``, in no particular order.
Requests take the way of the HTTP API, without the network. Answers are added to ``OUT.partial`` one by one,
and the same command goes on after those that are there.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import httpx

from tailorbird.errors import EngineError, ResumeError, SettingsError
from tailorbird.model.load import load_tokenizer
from tailorbird.progress import Progress
from tailorbird.serve.api.app import create_app
from tailorbird.serve.api.generation import Service
from tailorbird.serve.api.metrics import Metrics
from tailorbird.serve.api.text import Texts
from tailorbird.serve.batch_order import Weight, blended
from tailorbird.serve.interface import ENGINE, EngineOptions
from tailorbird.serve.supervisor import Supervisor

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
#: Tokens that an answer may have where its request doesn't say; for the order only.
USUAL_ANSWER = 256
#: Requests under way for each sequence that runs, so that the engine never waits for one.
AHEAD = 2
#: Status codes that say that the request may fare better later.
TRY_AGAIN = (429, 503)
#: What a request says of its body.
JSON_BODY = {"Content-Type": "application/json"}
#: Seconds before each attempt.
WAITS = (0.0, 0.2, 1.0, 5.0, 15.0)


@dataclass(frozen=True)
class BatchResult:
    """What became of a batch.

    Attributes
    ----------
    output : str
        The file with the answers.
    requests, failed : int
        Lines, and how many of them have an error or a status other than 200.
    resumed : int
        Answers that an interrupted run had left.
    generated_tokens : int
        In this run.
    seconds : float
        Of this run, from the first request on.
    """

    output: str
    requests: int
    failed: int
    resumed: int
    generated_tokens: int
    seconds: float


@dataclass(frozen=True)
class Line:
    """One request of a batch.

    Attributes
    ----------
    custom_id, url : str
    body : bytes
        JSON.
    weight : Weight
        What it reads and writes, for the order.
    """

    custom_id: str
    url: str
    body: bytes
    weight: Weight


def run_batch(
    options: EngineOptions,
    source: Path,
    target: Path,
    progress: Progress,
    *,
    timeout: float = 3600.0,
    engine: str = ENGINE,
) -> BatchResult:
    """Answer every request of `source` into `target`.

    Parameters
    ----------
    options : EngineOptions
    source, target : Path
        Lines of JSON; `target` must not exist.
    progress : Progress
        One stage, a step per request.
    timeout : float
        Seconds that one answer may take.
    engine : str
        ``module:callable`` that makes the engine, in its own process.

    Raises
    ------
    SettingsError
        A line that isn't a request, an id that occurs twice, or a target that exists.
    ResumeError
        What an interrupted run left belongs to another source or model.
    TailorbirdError
        The model can't be loaded.
    """
    if target.exists():
        raise SettingsError(f"{target}, which exists", "a file that doesn't", "choose another, or remove it")
    if not target.absolute().parent.is_dir():
        raise SettingsError(f"{target}", "a file in a directory that exists", "make the directory")
    lines = read_lines(source)
    made_from = {"source": hashlib.sha256(source.read_bytes()).hexdigest(), "model": options.model}
    partial = target.with_name(target.name + ".partial")
    answered = resume(partial, made_from)
    left = [line for line in lines if line.custom_id not in answered]
    order = blended([line.weight for line in left])
    progress.stage("batch", len(left))
    if answered:
        progress.note(f"{len(answered)} of {len(lines)} answers are there already")
    with partial.open("a", encoding="utf-8") as out:
        tokens, seconds = asyncio.run(
            _answer([left[number] for number in order], options, out, progress, timeout, engine)
        )
        os.fsync(out.fileno())
    failed = _publish(partial, target)
    return BatchResult(str(target), len(lines), failed, len(answered), tokens, seconds)


def read_lines(source: Path) -> list[Line]:
    """The requests of a batch file.

    Raises
    ------
    SettingsError
        With the number of the line that is wrong, and why.
    """
    try:
        text = source.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"{source}: {error}", "a file of JSON lines in UTF-8", "correct the path or the file"
        ) from error
    lines: list[Line] = []
    seen: dict[str, int] = {}
    # not `splitlines`: the text of JSON may hold what Unicode calls the end of a line
    for number, written in enumerate(text.split("\n"), 1):
        if not written.strip():
            continue
        line = _line(written, f"{source}, line {number}")
        if line.custom_id in seen:
            first = seen[line.custom_id]
            raise SettingsError(
                f"{source}, line {number}: custom_id {line.custom_id[:100]!r}, as in line {first}",
                "an id of its own for each request",
                "change one of them",
            )
        seen[line.custom_id] = number
        lines.append(line)
    if not lines:
        raise SettingsError(f"{source}, without a request", "at least one line", "add requests to it")
    return lines


def _line(written: str, where: str) -> Line:
    def wrong(given: str, expected: str) -> SettingsError:
        return SettingsError(f"{where}: {given}", expected, "correct the line")

    try:
        value = json.loads(written)
    except (ValueError, RecursionError) as error:
        raise wrong(str(error), "a JSON object") from error
    if not isinstance(value, dict):
        raise wrong(type(value).__name__, "a JSON object")
    custom_id, url, body = (value.get(name) for name in ("custom_id", "url", "body"))
    if not isinstance(custom_id, str) or not custom_id:
        raise wrong(f"custom_id {custom_id!r}", "a string that isn't empty")
    if any("\ud800" <= letter <= "\udfff" for letter in custom_id):
        raise wrong(f"custom_id {custom_id!r}", "whole characters, not half of a surrogate pair")
    if value.get("method", "POST") != "POST" or url not in URLS:
        raise wrong(f"{value.get('method', 'POST')} {url}", "POST, and one of " + ", ".join(URLS))
    if not isinstance(body, dict):
        raise wrong(f"a body of {type(body).__name__}", "the fields of the request")
    if body.get("stream"):
        raise wrong("`stream`", "a request that is answered at once")
    try:
        return Line(custom_id, url, json.dumps(body).encode(), _weight(url, body))
    except RecursionError as error:
        raise wrong(str(error), "a body that nests less deeply") from error


def _weight(url: str, body: dict[str, Any]) -> Weight:
    prompt = body.get("messages", body.get("prompt", body.get("input", "")))
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)
    stated = body.get("max_completion_tokens") or body.get("max_tokens")
    writes = stated if isinstance(stated, int) and stated > 0 else USUAL_ANSWER
    return Weight(text, 1 if url == "/v1/embeddings" else writes)


def resume(partial: Path, made_from: dict[str, str]) -> set[str]:
    """Ids that are answered in an unfinished file, which is begun where there is none.

    A line that was cut off by the interruption is taken away.

    Raises
    ------
    ResumeError
        The file belongs to another batch.
    """
    if not partial.exists():
        partial.write_text(json.dumps(made_from) + "\n", encoding="utf-8")
        return set()
    data = partial.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    head, *rest = whole.decode("utf-8").split("\n")
    if head != json.dumps(made_from):
        raise ResumeError(
            f"{partial}, which was begun with another model or other requests",
            "the same ones",
            "remove it, or name another output",
        )
    if len(whole) < len(data):
        with partial.open("r+b") as file:
            file.truncate(len(whole))
    return {json.loads(line)["custom_id"] for line in rest[:-1]}


def _publish(partial: Path, target: Path) -> int:
    """Give the answers their name; how many of them failed."""
    _, *answers, _ = partial.read_text(encoding="utf-8").split("\n")
    whole = target.with_name(target.name + ".whole")
    whole.write_text("".join(answer + "\n" for answer in answers), encoding="utf-8")
    os.replace(whole, target)
    partial.unlink()
    return sum(json.loads(answer)["response"]["status_code"] != 200 for answer in answers)


async def _answer(
    lines: Sequence[Line],
    options: EngineOptions,
    out: TextIO,
    progress: Progress,
    timeout: float,
    engine: str,
) -> tuple[int, float]:
    """Tokens and seconds of all answers, which are written as they come."""
    if not lines:
        return 0, 0.0
    supervisor = Supervisor(options, engine, log=progress.note)
    metrics = Metrics(lambda: supervisor.stats, lambda: supervisor.ready, lambda: supervisor.restarts)
    try:
        texts = Texts(await asyncio.to_thread(load_tokenizer, options.model))
        await supervisor.start()
        service = Service(supervisor, texts, metrics, options.model, queue=1 << 20, timeout=timeout)
        transport = httpx.ASGITransport(create_app(service, log=lambda *_, **__: None))
        waiting = iter(lines)
        began = time.monotonic()

        async def work(client: httpx.AsyncClient) -> None:
            for line in waiting:  # shared by all workers
                answer = await _post(client, line, supervisor)
                out.write(json.dumps(answer, ensure_ascii=False) + "\n")
                out.flush()
                progress.advance()

        async with httpx.AsyncClient(transport=transport, base_url="http://batch", timeout=None) as client:
            workers = AHEAD * int(supervisor.info["max_sequences"])
            await asyncio.gather(*(work(client) for _ in range(min(workers, len(lines)))))
    finally:
        await supervisor.close()
    return metrics.generated, time.monotonic() - began


async def _post(client: httpx.AsyncClient, line: Line, supervisor: Supervisor) -> dict[str, Any]:
    """The answer to a request; an engine that died is waited for, and the request sent again."""
    for attempt, wait in enumerate(WAITS):
        await asyncio.sleep(wait)
        response = await client.post(line.url, content=line.body, headers=JSON_BODY)
        failed_again = attempt > 0 and response.status_code == 503 and supervisor.ready
        if response.status_code not in TRY_AGAIN or failed_again:
            break
    else:
        raise EngineError(
            f"request {line.custom_id[:100]!r} failed {len(WAITS)} times: {response.text[:300]}",
            "an engine that runs",
            "look at the log above, then run the same command to go on",
        )
    request_id = response.headers.get("x-request-id", "")
    return {
        "id": f"batch_req_{request_id}", "custom_id": line.custom_id, "error": None,
        "response": {
            "status_code": response.status_code, "request_id": request_id, "body": response.json()
        },
    }  # fmt: skip
