"""Memory beside other engines: what is counted, when it is read, and what is taken off."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import cpu_peers
import peer_child
from random_models import Shape, write_random
from tailorbird.kernels.blocks import PAGE
from tailorbird.run.pages import page_bytes

SMALL = Shape("llama", 2, 64, 160, 4, 2)
linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the peak")


def test_keys_and_values_that_are_taken_off_are_those_of_the_pages() -> None:
    blocks = [(SMALL.kv_heads, SMALL.width // SMALL.heads)] * SMALL.blocks
    assert PAGE * SMALL.kv_bytes == page_bytes(blocks, torch.bfloat16)


def test_tokens_that_an_order_leaves() -> None:
    held = {order: cpu_peers.held_tokens(order) for order in cpu_peers.ORDERS}
    assert held == {"prefill 512": 512, "decode": 128, "batch 8": 768, "prefill 4096": 4096}


@linux
def test_what_is_taken_after_the_imports_counts() -> None:
    memory = peer_child.Memory()
    memory.imported()
    size = 64 << 20  # too much for the heap, so that it's new
    taken = torch.ones(size, dtype=torch.uint8)
    report = json.loads(memory.report())
    assert report["peak_bytes"] - report["imports_bytes"] >= 0.9 * size
    del taken
    assert json.loads(memory.report())["peak_bytes"] > report["peak_bytes"] - size / 10


@linux
def test_a_child_tells_its_memory_between_orders(tmp_path: Path) -> None:
    source = write_random(SMALL, tmp_path, context=64)
    entry = cpu_peers.Entry("tailorbird", "bf16", 16, str(source))
    process = cpu_peers.Process(entry, sys.executable, "peer_child.py")
    loaded = json.loads(process.ask("memory"))
    assert float(process.ask("prefill 32")) > 0
    assert float(process.ask("batch 2 8 4")) > 0
    ran = json.loads(process.ask("memory"))
    process.end()
    assert ran["imports_bytes"] == loaded["imports_bytes"] > 0
    assert loaded["imports_bytes"] < loaded["peak_bytes"] <= ran["peak_bytes"]


def test_memory_is_read_before_the_first_long_prompt_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Answering:
        def __init__(self, entry: cpu_peers.Entry, *_: str) -> None:
            self.entry = entry

        def ask(self, line: str) -> str:
            asked.append(line)
            return json.dumps({"peak_bytes": len(asked)} if line == "memory" else 1.0)

        def end(self) -> None:
            pass

    monkeypatch.setattr(cpu_peers, "Process", Answering)
    entry = cpu_peers.Entry("tailorbird", "4 bits", 4, "")
    rates, memory = cpu_peers.measure([entry], {"tailorbird": ""}, 2, 0)
    orders = [text for text, _ in cpu_peers.ORDERS.values()]
    assert asked == [*orders[:-1], "memory", orders[-1], *orders, *orders, "memory"]
    assert orders[-1] == cpu_peers.ORDERS[cpu_peers.LONGEST][0]
    assert memory[entry.name] == [{"peak_bytes": 4}, {"peak_bytes": len(asked)}]
    assert all(len(values) == 2 for values in rates[entry.name].values())


def test_beyond_is_what_imports_weights_and_cache_do_not_explain(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    (tmp_path / "tokenizer.json").write_bytes(bytes(100))

    def reading(tokens: int, beyond: int) -> dict[str, int]:
        return {"imports_bytes": 700, "peak_bytes": 700 + 1000 + tokens * SMALL.kv_bytes + beyond}

    goal = int(cpu_peers.MEMORY_GOAL)
    readings = [reading(768, goal), reading(4096, goal + 1)]
    ours = cpu_peers.Entry("tailorbird", "4 bits", 4, str(tmp_path))
    found = cpu_peers.memory_of(ours, SMALL, readings)
    assert [one["beyond_bytes"] for one in found] == [goal, goal + 1]
    assert [one["reached"] for one in found] == [True, False]
    peer = cpu_peers.Entry("llama.cpp", "q4_0", 4, str(tmp_path / "model.safetensors"))
    theirs = cpu_peers.memory_of(peer, SMALL, readings)
    assert [one["beyond_bytes"] for one in theirs] == [goal, goal + 1]
    assert not any("reached" in one for one in theirs)
