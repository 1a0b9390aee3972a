"""Speed beside other engines on the CPU: the same shapes, each at its own 4 and 8 bits, in turns.

Random-weight Llamas of 110 M and 0.5 B parameters, and a GPT-2 of its smallest size. Every engine runs in
a process and an environment of its own and keeps its model loaded; in each round every one reads a prompt of
512 tokens, writes 64 tokens after a prompt of 64, and 32 tokens of 8 sequences, and reads a prompt of 4,096.
Two threads; medians over the rounds. With `--beside 2`, two processes that never rest want the same cores
meanwhile.

Memory is the most that was resident (`peer_child.py` says what counts) less what was after the imports, and
less what nobody can do without: the bytes of the weights' files, and keys and values of the largest context
that ran, at 16 bits. It is read when all has run once but for the long prompt, and at the end. The cache is
counted alike for everyone: that llama.cpp makes room for 8,192 tokens in advance, and that OpenVINO keeps 8
bits, shows in the rest.

The environments lie in one folder, each with the name of its engine:

    python -m venv FOLDER/llama.cpp && FOLDER/llama.cpp/bin/pip install numpy gguf llama-cpp-python
    python -m venv FOLDER/openvino && FOLDER/openvino/bin/pip install torch optimum-intel openvino nncf
    python benchmarks/cpu_peers.py FOLDER [--models 110M 0.5B] [--rounds 5]
    python benchmarks/cpu_peers.py FOLDER --models 110M --beside 2 --name cpu_peers_beside
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cpu_speed import SIZES, read_bandwidth
from machine import add_quiet_option, require_quiet, write_result
from packed_models import round_plainly
from random_models import Shape, write_random

HERE = Path(__file__).parent
#: What an engine is told, and how many tokens that is; what needs most memory comes last.
ORDERS = {
    "prefill 512": ("prefill 512", 512),
    "decode": ("decode 64 64", 64),
    "batch 8": ("batch 8 64 32", 256),
    "prefill 4096": ("prefill 4096", 4096),
}
LONGEST = "prefill 4096"
#: Our width -> weights that share a scale: 4.31 and 8.19 bits a weight. OpenVINO's share it among 128, and at
#: 8 bits among a row; llama.cpp's among 32.
GROUPS = {4: 64, 8: 128}
#: Goals against the best peer of a class.
GOALS = {"prefill 512": 1.10, "prefill 4096": 1.0, "decode": 1.10, "batch 8": 1.15}
#: Bytes beyond imports, weights, keys and values that are the goal for tailorbird.
MEMORY_GOAL = 120e6
#: llama.cpp's names of its formats -> its numbers for them.
LLAMA_CPP = {"q4_0": 2, "q4_k_m": 15, "q8_0": 7}


@dataclass(frozen=True)
class Entry:
    """One engine with one format; class 4, 8 or 16 bits."""

    engine: str
    format: str
    bits: int
    path: str

    @property
    def name(self) -> str:
        return f"{self.engine} {self.format}"


class Process:
    """An engine in a process and an environment of its own, which answers lines with lines.

    Parameters
    ----------
    entry : Entry
    python : str
        Interpreter of its environment.
    script : str
        The file beside this one that it runs, with engine and path, and whatever follows.
    """

    def __init__(self, entry: Entry, python: str, script: str, *arguments: str) -> None:
        self.entry = entry
        self.process = subprocess.Popen(
            [python, str(HERE / script), entry.engine, entry.path, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"},
        )  # fmt: skip
        self._answer()

    def ask(self, line: str) -> str:
        """Its answer to a line."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.entry.name} ended with status {self.process.wait()}")
        return line

    def end(self) -> None:
        """Let it go, and wait until it is gone."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def pythons(folder: Path) -> dict[str, str]:
    """Engine -> its interpreter; those that aren't there are left out."""
    own = {"tailorbird": sys.executable, "transformers": sys.executable}
    peers = {engine: folder / engine / "bin" / "python" for engine in ("llama.cpp", "openvino")}
    return own | {engine: str(path) for engine, path in peers.items() if path.exists()}


def prepare(size: str, folder: Path, python: dict[str, str], console: Console) -> list[Entry]:
    """The model of that size in every format."""
    source = write_random(SIZES[size], folder / "source", context=8192)
    entries = [Entry("transformers", "bf16", 16, str(source))]
    for bits, group in GROUPS.items():
        path = round_plainly(source, folder / f"{bits}-bits", bits, group)
        entries.append(Entry("tailorbird", f"{bits} bits", bits, str(path)))
    if "llama.cpp" in python:
        maker = [python["llama.cpp"], str(HERE / "llama_cpp_model.py")]
        run([*maker, "write", str(source), str(folder / "f16.gguf")])
        for name, number in LLAMA_CPP.items():
            path = folder / f"{name}.gguf"
            run([*maker, "quantize", str(folder / "f16.gguf"), str(path), str(number)])
            entries.append(Entry("llama.cpp", name, int(name[1]), str(path)))
    if "openvino" in python:
        for bits in (4, 8):
            path = folder / f"openvino-{bits}"
            command = [
                str(Path(python["openvino"]).parent / "optimum-cli"), "export", "openvino",
                "--model", str(source), "--task", "text-generation-with-past",
                "--weight-format", f"int{bits}", str(path),
            ]  # fmt: skip
            run(command + (["--group-size", "128", "--ratio", "1.0"] if bits == 4 else []))
            entries.append(Entry("openvino", f"int{bits}", bits, str(path)))
    console.print(f"{size}: " + ", ".join(entry.name for entry in entries))
    return entries


def installed_version(python: str, package: str) -> str:
    """Version of a package in an engine's environment."""
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def run(command: list[str]) -> None:
    """Run a command, and stop with what it said where it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{command[0]} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def held_tokens(order: str) -> int:
    """Tokens whose keys and values are there when an order has run."""
    word, *numbers = ORDERS[order][0].split()
    sequences, *lengths = map(int, numbers if word == "batch" else ("1", *numbers))
    return sequences * sum(lengths)


def weight_bytes(path: Path) -> int:
    """Of the files that hold a model's weights."""
    files = [path] if path.is_file() else [*path.glob("*.safetensors"), *path.glob("openvino_model.bin")]
    return sum(file.stat().st_size for file in files)


def memory_of(entry: Entry, shape: Shape, readings: list[dict[str, int]]) -> list[dict[str, Any]]:
    """What an engine took beyond what it can't do without, before and after the longest prompt."""
    contexts = (max(held_tokens(order) for order in ORDERS if order != LONGEST), held_tokens(LONGEST))
    weights, found = weight_bytes(Path(entry.path)), []
    for tokens, reading in zip(contexts, readings, strict=True):
        keys_and_values = tokens * shape.kv_bytes
        beyond = reading["peak_bytes"] - reading["imports_bytes"] - weights - keys_and_values
        one = {
            "context_tokens": tokens, "weight_bytes": weights, "kv_bytes": keys_and_values, **reading,
            "beyond_bytes": beyond,
        }  # fmt: skip
        if entry.engine == "tailorbird":
            one["reached"] = beyond <= MEMORY_GOAL
        found.append(one)
    return found


def measure(
    entries: list[Entry], python: dict[str, str], rounds: int, beside: int
) -> tuple[dict[str, dict[str, list[float]]], dict[str, list[dict[str, int]]]]:
    """Tokens per second of every engine and order, round by round in turns; and readings of its memory."""
    processes = [Process(entry, python[entry.engine], "peer_child.py") for entry in entries]
    rates: dict[str, dict[str, list[float]]] = {e.name: {order: [] for order in ORDERS} for e in entries}
    memory: dict[str, list[dict[str, int]]] = {entry.name: [] for entry in entries}

    def read_memory() -> None:
        for process in processes:
            memory[process.entry.name].append(json.loads(process.ask("memory")))

    restless = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(beside)]
    try:
        for number in range(rounds + 1):
            for order, (text, tokens) in ORDERS.items():
                if number == 0 and order == LONGEST:
                    read_memory()
                for process in processes if number % 2 else reversed(processes):
                    seconds = float(process.ask(text))
                    if number:  # the first round warms up
                        rates[process.entry.name][order].append(tokens / seconds)
        read_memory()
    finally:
        for other in restless:
            other.kill()
            other.wait()
        for process in processes:
            process.end()
    return rates, memory


def compare(
    size: str,
    entries: list[Entry],
    rates: dict[str, dict[str, list[float]]],
    memory: dict[str, list[dict[str, int]]],
) -> list[dict[str, Any]]:
    """A row for every engine; ours with its ratio to the best peer of its class."""
    rows = []
    medians = {
        entry.name: {order: statistics.median(values) for order, values in rates[entry.name].items()}
        for entry in entries
    }
    for entry in entries:
        row: dict[str, Any] = {
            "model": size, "engine": entry.engine, "format": entry.format, "bits": entry.bits,
            "tokens_per_s": medians[entry.name], "rounds": rates[entry.name],
            "memory": memory_of(entry, SIZES[size], memory[entry.name]),
        }  # fmt: skip
        peers = [e for e in entries if e.bits == entry.bits and e.engine != "tailorbird"]
        if entry.engine == "tailorbird" and peers:
            row["against_best_peer"] = {}
            for order in ORDERS:
                best = max(peers, key=lambda peer: medians[peer.name][order])
                ratio = medians[entry.name][order] / medians[best.name][order]
                row["against_best_peer"][order] = {
                    "peer": best.name, "ratio": ratio, "reached": ratio >= GOALS[order]
                }  # fmt: skip
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("peers", type=Path, help="folder of the engines' environments")
    parser.add_argument("--models", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--beside", type=int, default=0, help="processes that never rest meanwhile")
    parser.add_argument("--name", default="cpu_peers", help="name of the result file")
    add_quiet_option(parser)
    arguments = parser.parse_args()
    busy = require_quiet(arguments.even_if_busy)
    console = Console()
    python = pythons(arguments.peers)
    versions = {
        engine: installed_version(python[engine], package)
        for engine, package in (("llama.cpp", "llama-cpp-python"), ("openvino", "openvino"))
        if engine in python
    }
    found: dict[str, Any] = {"read_bandwidth": read_bandwidth(), "peers": versions, "rows": []}
    for size in arguments.models:
        with tempfile.TemporaryDirectory(prefix="cpu-peers-") as folder:
            entries = prepare(size, Path(folder), python, console)
            measured = measure(entries, python, arguments.rounds, arguments.beside)
            found["rows"] += compare(size, entries, *measured)
        write_result(
            arguments.name, {"others_cores": busy, "beside": arguments.beside, "group_sizes": GROUPS, **found}
        )  # what is measured is kept
    table = Table("model", "engine", *ORDERS, title="tokens per second (ratio to the best peer of the class)")
    for row in found["rows"]:
        against = row.get("against_best_peer", {})
        cells = [
            f"{row['tokens_per_s'][order]:.0f}" + (f" ({against[order]['ratio']:.2f})" if against else "")
            for order in ORDERS
        ]
        table.add_row(row["model"], f"{row['engine']} {row['format']}", *cells)
    console.print(table)
    table = Table(
        "model", "engine", "tokens held", "peak over imports", "weights", "KV", "beyond",
        title=f"MB; goal for tailorbird: at most {MEMORY_GOAL / 1e6:.0f} beyond weights and KV",
    )  # fmt: skip
    for row in found["rows"]:
        for one in row["memory"]:
            over = one["peak_bytes"] - one["imports_bytes"]
            sizes = (over, one["weight_bytes"], one["kv_bytes"], one["beyond_bytes"])
            cells = [f"{size / 1e6:.0f}" for size in sizes]
            if "reached" in one:
                cells[-1] += " (reached)" if one["reached"] else " (missed)"
            table.add_row(
                row["model"], f"{row['engine']} {row['format']}", str(one["context_tokens"]), *cells
            )
    console.print(table)


if __name__ == "__main__":
    main()
