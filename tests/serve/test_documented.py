"""What the documents show of a server is run as it stands there, against one."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest

from peft_adapters import save, wrapped
from tailorbird.model.load import load
from tailorbird.model.location import locate

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
#: A command and the lines that belong to it: those that end with a backslash, or within quotes.
CURL = re.compile(r"^curl(?:[^\n'\\]|'[^']*'|\\\n)*", re.MULTILINE)
ADDRESS = "localhost:8000"
#: A chat template that knows tools, which the demo model has not.
TEMPLATE = """{% for tool in tools or [] %}{{ tool | tojson }}
{% endfor %}{% for message in messages %}{{ message.role }}: {{ message.content }}
{% endfor %}assistant:"""


def shown(kind: str) -> list[Any]:
    """Commands of curl, or blocks of Python that talk to a server, with where they stand."""
    found = []
    for document in DOCUMENTS:
        for language, text in BLOCK.findall(document.read_text(encoding="utf-8")):
            if kind == "curl" and language in ("", "bash"):
                found += [(document.name, one) for one in CURL.findall(text)]
            if kind == language == "python" and ADDRESS in text:
                found.append((document.name, text))
    return [pytest.param(text, id=f"{name}-{number}") for number, (name, text) in enumerate(found)]


@dataclass
class Server:
    """A server on the demo model, in a directory that looks as the documents suppose."""

    directory: Path
    address: str
    lines: list[dict[str, Any]]

    def here(self, text: str) -> str:
        assert ADDRESS in text
        return text.replace(ADDRESS, self.address)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("documented")
    model = directory / "out" / "model"
    shutil.copytree(locate("demo"), model)
    (model / "chat_template.jinja").write_text(TEMPLATE)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    for name in ("support", "french"):
        save(wrapped(load(model), config), directory / "adapters" / name)
    flags = ["--port", "0", "--adapter", "support=adapters/support", "--adapter-directory", "adapters"]
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    process = subprocess.Popen(
        [sys.executable, "-m", "tailorbird", "serve", "out/model", *flags],
        cwd=directory,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    lines: list[dict[str, Any]] = []
    try:
        while not lines or lines[-1]["event"] != "ready":
            lines.append(json.loads(process.stderr.readline()))
        # Logs are read, so that the pipe never fills.
        threading.Thread(target=lambda: list(process.stderr or ()), daemon=True).start()
        yield Server(directory, lines[-1]["url"].removeprefix("http://"), lines)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()
        process.wait()


def test_the_log_accounts_for_the_time_of_the_start(server: Server) -> None:
    ready = server.lines[-1]
    parts = {line["part"]: line["seconds"] for line in server.lines if line["event"] == "startup"}
    assert {"program", "engine: imports", "engine: weights", "http"} < set(parts)
    assert ready["accounted"] >= 0.95
    assert sum(parts.values()) == pytest.approx(ready["startup_seconds"] * ready["accounted"], rel=0.05)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl isn't installed")
@pytest.mark.parametrize("command", shown("curl"))
def test_commands_of_curl_are_answered(server: Server, command: str) -> None:
    done = subprocess.run(
        ["bash", "-c", f"{server.here(command)} --fail-with-body --silent --show-error --max-time 30"],
        cwd=server.directory,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout


@pytest.mark.parametrize("program", shown("python"))
def test_programs_run(server: Server, program: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(server.here(program), "documented", "exec", dont_inherit=True), {"__name__": "documented"})
    assert capsys.readouterr().out


def test_there_is_something_to_run() -> None:
    assert len(shown("curl")) >= 8
    assert len(shown("python")) >= 6
