"""The whole server in a process of its own, over a real port."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai

from tailorbird.serve.interface import ENGINE

KEY = "secret"
PROGRAM = """
import json, sys
from tailorbird.serve.interface import EngineOptions
from tailorbird.serve.server import serve

directory, drain, engine, adapters, keys = sys.argv[1:]
options = EngineOptions("demo", json.loads(adapters), adapter_directory=directory)
served = serve(options, port=0, keys=json.loads(keys), drain=float(drain), engine=engine)
print(served.generated_tokens)
"""
TESTS = Path(__file__).parent


@dataclass
class Running:
    """A server in a process of its own."""

    process: subprocess.Popen[str]
    url: str
    first: list[dict[str, Any]]

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0)

    def read_on(self) -> None:
        """Read the log beside what is tested, so that its pipe never fills."""
        threading.Thread(target=lambda: list(self.process.stderr or ()), daemon=True).start()

    def stop(self) -> tuple[int, list[dict[str, Any]], str]:
        """Wait for the end; exit status, what was logged since, and what was printed."""
        out, err = self.process.communicate(timeout=20)
        return self.process.returncode, [json.loads(line) for line in err.splitlines()], out


@contextlib.contextmanager
def running(
    directory: Path, drain: float = 20, engine: str = "fake_engine:paced", keys: Sequence[str] = (KEY,)
) -> Iterator[Running]:
    """A server of the demo model that may load adapters from `directory`; a fake engine says it has one."""
    adapters = {} if engine == ENGINE else {"tuned": "somewhere"}
    paths = [str(TESTS), str(TESTS.parent / "src"), os.environ.get("PYTHONPATH", "")]
    arguments = [str(directory), str(drain), engine, json.dumps(adapters), json.dumps(list(keys))]
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        lines: list[dict[str, Any]] = []
        while not lines or lines[-1]["event"] != "ready":
            line = process.stderr.readline()
            assert line.startswith("{"), line
            lines.append(json.loads(line))
        yield Running(process, lines[-1]["url"], lines)
    finally:
        process.kill()
        process.wait()
