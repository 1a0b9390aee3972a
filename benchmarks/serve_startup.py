"""How long a server takes from the start of its process to ready, and to its first token.

`python -m tailorbird serve MODEL` is started anew in each round. Measured from the start of the process: the
line `ready`, and the first token of a request that is sent at once. The log says where the time went; what it
leaves unexplained is reported, too. In turn with the starts the model's weights are read whole and plainly,
as bytes, which is what no start can be faster than. All of them are in the page cache after the first round,
which isn't counted. Medians; goals: 95 % of the time accounted for, the first token at most 5 s after the
plain read.

    python benchmarks/serve_startup.py [--model demo] [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from machine import add_quiet_option, require_quiet, write_result
from tailorbird.model.location import locate

#: Seconds that the first token may come after the weights could have been read.
GOAL_SECONDS, GOAL_ACCOUNTED = 5.0, 0.95
#: Bytes that are read at a time.
CHUNK = 8 << 20


def read_seconds(directory: Path) -> float:
    """Seconds to read all weights as bytes."""
    buffer = bytearray(CHUNK)
    began = time.perf_counter()
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - began


def start(model: str) -> dict[str, Any]:
    """Seconds to ``ready`` and to ``first_token``, and what share is ``accounted`` for by which ``parts``."""
    began = time.perf_counter()
    server = subprocess.Popen(
        [sys.executable, "-m", "tailorbird", "serve", model, "--port", "0"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert server.stderr is not None
    parts: dict[str, float] = {}
    try:
        for line in server.stderr:
            said = json.loads(line)
            if said["event"] == "startup":
                parts[said["part"]] = said["seconds"]
            if said["event"] == "ready":
                break
        else:
            raise SystemExit(f"the server ended with status {server.wait()}")
        ready = time.perf_counter() - began
        body = {"model": model, "prompt": "def", "max_tokens": 1, "temperature": 0, "ignore_eos": True}
        httpx.post(f"{said['url']}/v1/completions", json=body, timeout=60).raise_for_status()
        first = time.perf_counter() - began
    finally:
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=60)
    accounted = min(1.0, sum(parts.values()) / ready)  # both clocks tick in hundredths
    return {"ready": ready, "first_token": first, "accounted": accounted, "parts": parts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--name", default="serve_startup", help="name of the result file")
    parser.add_argument("--quick", action="store_true", help="one round, nothing kept")
    add_quiet_option(parser)
    arguments = parser.parse_args()
    cores = require_quiet(arguments.even_if_busy)
    directory = Path(locate(arguments.model))
    reads, starts = [], []
    for number in range(1 if arguments.quick else arguments.rounds + 1):
        read, started = read_seconds(directory), start(arguments.model)
        if number or arguments.quick:
            reads.append(read)
            starts.append(started)
    found: dict[str, Any] = {
        name: statistics.median(one[name] for one in starts) for name in ("ready", "first_token", "accounted")
    }
    found["read"] = statistics.median(reads)
    late = found["first_token"] - found["read"]
    console = Console()
    console.print(
        f"ready after {found['ready']:.2f} s, first token after {found['first_token']:.2f} s; "
        f"weights are read in {found['read']:.2f} s, {late:.2f} s less (goal: at most {GOAL_SECONDS:g} s)"
    )
    console.print(f"{found['accounted']:.1%} accounted for (goal: at least {GOAL_ACCOUNTED:.0%})")
    for part, seconds in starts[-1]["parts"].items():
        console.print(f"  {seconds:7.3f} s  {part}")
    if arguments.quick:
        return
    weights = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    data = {"model": arguments.model, "weight_bytes": weights, "others_cores": cores, "median": found}
    console.print(f"written to {write_result(arguments.name, data | {'reads': reads, 'starts': starts})}")


if __name__ == "__main__":
    main()
