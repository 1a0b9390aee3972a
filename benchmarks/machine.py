"""What every benchmark shares: is the machine quiet, what machine is it, and where the numbers go.

A number is worth keeping only with the machine, the versions and the date beside it, and a time only from a
machine on which nothing else ran.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

import tailorbird
from tailorbird.hardware.memory import total_bytes
from tailorbird.hardware.probe import processor_name, usable_cores

RESULTS = Path(__file__).parent / "results"
#: Cores' worth of other processes' work that a benchmark of time puts up with.
QUIET_CORES = 0.1


def others_cores(seconds: float = 1.0) -> float:
    """Cores that anything but this process keeps busy.

    Watches /proc/stat (time stolen by other virtual machines included) while this process sleeps; elsewhere
    the load average of the last minute, which counts this process too.
    """
    if not Path("/proc/stat").exists():
        return os.getloadavg()[0]
    began, busy, own = time.perf_counter(), _busy_seconds(), _own_seconds()
    time.sleep(seconds)
    elapsed = time.perf_counter() - began
    return max(0.0, (_busy_seconds() - busy - (_own_seconds() - own)) / elapsed)


def add_quiet_option(parser: argparse.ArgumentParser) -> None:
    """The option that `require_quiet` obeys."""
    parser.add_argument(
        "--even-if-busy",
        action="store_true",
        help="measure although other processes run; noted in the result",
    )


def require_quiet(even_if_busy: bool) -> float:
    """Stop unless the machine is quiet or the user doesn't mind; returns the cores that others keep busy."""
    cores = others_cores()
    if cores > QUIET_CORES and not even_if_busy:
        raise SystemExit(
            f"other processes keep {cores:.2f} cores busy · expected: at most {QUIET_CORES} · "
            "stop them, or add --even-if-busy and don't quote the times"
        )
    return cores


def describe() -> dict[str, Any]:
    """The machine that runs this."""
    return {
        "processor": processor_name(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "memory_bytes": total_bytes(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def write_result(name: str, data: dict[str, Any]) -> Path:
    """Write ``results/<name>.json`` with machine, versions and date before `data`; returns its path."""
    whole = {
        "benchmark": name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe(),
        "versions": versions(),
        **data,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    partial = path.with_suffix(".json.partial")
    partial.write_text(json.dumps(whole, indent=1) + "\n")
    partial.replace(path)  # whole, or as it was
    return path


def kept_result(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What ``results/<name>.json`` holds, for a run that goes on with it; nothing where it can't.

    Parameters
    ----------
    name : str
    settings : dict
        On which every number depends: those of the file, under the same key, are the same, and so are machine
        and versions.
    """
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return {}
    found: dict[str, Any] = json.loads(path.read_text())
    expected = {"settings": settings, "machine": describe(), "versions": versions()}
    others = [key for key, value in expected.items() if found.get(key) != value]
    if others:
        print(f"{path.name} has other {', '.join(others)}: everything is measured anew", flush=True)
        return {}
    return found


def versions() -> dict[str, str]:
    """Of what every number depends on."""
    return {
        "tailorbird": tailorbird.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _busy_seconds() -> float:
    """Seconds that all cores together have been busy since the machine started, stolen time included."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    user, nice, system, _idle, _waiting, irq, softirq, steal = map(int, fields)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
