"""The swap: what comes back is what went, or nothing; and the engine writes the same with and without it."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engines import Watched, alone, greedy, served
from tailorbird.errors import SettingsError
from tailorbird.kernels import native
from tailorbird.run.pages import SharedPages, page_bytes
from tailorbird.serve.engine import Engine
from tailorbird.serve.interface import EngineOptions
from tailorbird.serve.swap import Costs, Swap

PAGE_BYTES = 4096
compiled = pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")


class Table:
    """Pages whose contents are a number."""

    def __init__(self, pages: int) -> None:
        self.held = [0] * pages

    def save(self, page: int) -> Tensor:
        return torch.full((PAGE_BYTES // 8,), self.held[page]).view(torch.uint8)

    def restore(self, page: int, data: Tensor) -> None:
        (value,) = set(data.view(torch.int64).tolist())
        self.held[page] = value


def swap_of(table: Table, memory: int, disk: int) -> Swap:
    return Swap(table, 32, PAGE_BYTES, memory * PAGE_BYTES, disk * PAGE_BYTES)


def key_of(number: int) -> bytes:
    return number.to_bytes(16, "big")


@pytest.mark.parametrize(("memory", "disk"), [(3, 0), (0, 4), (2, 5)])
def test_random_use_brings_back_what_was_put_or_nothing(memory: int, disk: int) -> None:
    rng, table = random.Random(memory), Table(4)
    swap = swap_of(table, memory, disk)
    put: list[int] = []  # the last used last
    for _ in range(500):
        page, number = rng.randrange(4), rng.randrange(1, 20)
        if rng.random() < 0.5:
            table.held[page] = number
            swap.put(page, key_of(number))
            put = [*(other for other in put if other != number), number]
        else:
            table.held[page] = -1
            there = swap.wants(key_of(number))
            assert swap.bring(key_of(number), page) == there
            assert table.held[page] == (number if there else -1)
            assert number in put or not there
            if not disk and there:
                put = [*(other for other in put if other != number), number]
        assert swap.pages <= memory + disk
        if not disk or not memory:
            assert swap.pages == min(memory + disk, len(put))
    if not disk:
        assert all(swap.wants(key_of(number)) for number in put[-memory:])


def test_pages_that_no_longer_fit_in_ram_go_on_to_disk() -> None:
    table = Table(1)
    swap = swap_of(table, 2, 2)
    for number in range(1, 6):
        table.held[0] = number
        swap.put(0, key_of(number))
    assert [swap.wants(key_of(number)) for number in range(1, 6)] == [False, True, True, True, True]
    for number in range(2, 6):
        assert swap.bring(key_of(number), 0)
        assert table.held[0] == number
    assert swap.stats()["swapped_out_bytes"] == 5 * PAGE_BYTES
    assert swap.stats()["swapped_in_pages"] == 4


def test_a_page_that_was_damaged_on_disk_is_not_brought_back() -> None:
    table = Table(1)
    swap = swap_of(table, 0, 3)
    for number in (1, 2):
        table.held[0] = number
        swap.put(0, key_of(number))
    file = swap._disk._file
    assert file is not None
    os.pwrite(file.fileno(), b"\xff", PAGE_BYTES // 2)
    assert not swap.bring(key_of(1), 0)
    assert not swap.wants(key_of(1))
    assert table.held[0] == 2
    assert swap.damaged_pages == 1
    os.ftruncate(file.fileno(), PAGE_BYTES)  # the second page is gone
    assert not swap.bring(key_of(2), 0)
    table.held[0] = 3
    swap.put(0, key_of(3))  # its slot is used again
    assert swap.bring(key_of(3), 0)
    assert os.fstat(file.fileno()).st_size <= 2 * PAGE_BYTES


def test_a_full_disk_keeps_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table(1)
    swap = swap_of(table, 0, 100)
    write, most = os.pwrite, 3 * PAGE_BYTES

    def full(descriptor: int, data: memoryview, at: int) -> int:
        if at + len(data) <= most:
            return write(descriptor, data, at)
        if at >= most:
            raise OSError(errno.ENOSPC, "no space left")
        return write(descriptor, data[: most - at], at)

    monkeypatch.setattr(os, "pwrite", full)
    for number in range(1, 10):
        table.held[0] = number
        swap.put(0, key_of(number))
        assert swap.pages <= 3
    there = [number for number in range(1, 10) if swap.wants(key_of(number))]
    assert there == [7, 8, 9]
    for number in there:
        assert swap.bring(key_of(number), 0)
        assert table.held[0] == number


def test_budgets_that_hold_no_page_are_refused() -> None:
    for memory, disk in ((-1, 0), (0, PAGE_BYTES - 1)):
        with pytest.raises(SettingsError, match="at least a page"):
            Swap(Table(1), 32, PAGE_BYTES, memory, disk)


def test_the_file_has_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    table = Table(1)
    swap = swap_of(table, 0, 2)
    swap.put(0, key_of(1))
    file = swap._disk._file
    assert file is not None
    assert os.fstat(file.fileno()).st_dev == tmp_path.stat().st_dev
    assert os.fstat(file.fileno()).st_size == PAGE_BYTES
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_leaves_no_file(tmp_path: Path) -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); from test_swap import *\n"
        "swap = swap_of(Table(1), 0, 9)\n"
        "swap.put(0, key_of(1)); print(swap.pages, flush=True); sys.stdin.read()"
    )
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join([*paths, *sys.path])}
    with subprocess.Popen(
        [sys.executable, "-c", program, paths[0]],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == b"1\n"
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


def test_what_is_slower_than_computing_is_left_and_tried_again_later() -> None:
    costs = Costs(page_tokens=10)
    assert costs.worth("disk")
    for tokens in (10, 100, 40, 70) * 5:
        costs.stepped(tokens, 0.5 + 0.001 * tokens)
    assert costs.computing == pytest.approx(0.01, rel=1e-6)
    costs.read("memory", 0.009)
    costs.read("disk", 0.02)
    assert costs.worth("memory")
    refused = 0
    while not costs.worth("disk"):
        refused += 1
    assert 60 < refused < 80


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pages_come_back_bit_by_bit(dtype: torch.dtype) -> None:
    shapes = [(2, 8), (1, 16)]
    pages = SharedPages(shapes, dtype, 3)
    for pool in (*pages.keys, *pages.values):
        pool.copy_(torch.randn(pool.shape))
    before = [pool.clone() for pool in (*pages.keys, *pages.values)]
    data = pages.save(1)
    assert data.dtype == torch.uint8
    assert len(data) == page_bytes(shapes, dtype)
    for pool in (*pages.keys, *pages.values):
        pool[1] = 0
    pages.restore(2, data)
    for pool, was in zip((*pages.keys, *pages.values), before, strict=True):
        assert torch.equal(pool[2], was[1])
        assert torch.equal(pool[0], was[0])
        assert not pool[1].any()


def check_schedule(path: str, seed: int, damage: bool = False, **swap: int) -> Engine:
    """Random requests over few pages: each text as it is alone, and pages and copies accounted for."""
    rng = random.Random(seed)
    made = Engine(EngineOptions(path, max_sequences=4, step_tokens=33, **swap), log=lambda _: None)
    assert made.swap is not None
    made.swap.costs.worth = lambda tier: True  # type: ignore[method-assign]
    made.pool.take(made.pool.pages - 12)  # held, so that sequences are preempted
    held, run = made.pool.used, Watched(made)
    openings = [tuple(rng.randrange(256) for _ in range(rng.randrange(40, 110))) for _ in range(4)]
    sent = []
    for number in range(14):
        prompt = (*rng.choice(openings), *(rng.randrange(256) for _ in range(rng.randrange(1, 9))))
        sent.append(greedy(str(number), prompt, rng.randrange(1, 50), tenant=rng.choice("ab")))
        made.add(sent[-1])
        for _ in range(rng.randrange(6)):
            run.step()
            file = made.swap._disk._file
            if damage and file is not None and (size := os.fstat(file.fileno()).st_size):
                os.pwrite(file.fileno(), bytes(64), rng.randrange(size))
            assert made.swap.pages <= made.swap._memory.pages + made.swap._disk.pages
    run.run()
    assert made.pool.used == held
    for request in sent:
        tokens, rows = alone(made, request.prompt, request.max_tokens)
        assert run.tokens[request.id, 0] == tokens
        for at, row in enumerate(rows):
            text = [*request.prompt, *tokens[:at]]
            assert torch.equal(run.logits[request.id, len(text), hash(tuple(text))], row)
    return made


@compiled
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("memory", "disk"), [(6, 0), (0, 40), (4, 10)])
def test_texts_are_the_same_with_a_swap(seed: int, memory: int, disk: int, tmp_path: Path) -> None:
    path = served(tmp_path / "m", max_position_embeddings=256)
    one = Engine(EngineOptions(path), log=lambda _: None).runner.page_bytes
    made = check_schedule(path, seed, swap_memory_bytes=memory * one, swap_disk_bytes=disk * one)
    stats = made.stats()
    assert stats["swapped_out_pages"] > 0
    assert stats["swapped_in_pages"] > 0 or not disk
    assert stats["swapped_in_bytes"] == stats["swapped_in_pages"] * one


@compiled
def test_texts_are_the_same_with_a_swap_that_damages_pages(tmp_path: Path) -> None:
    path = served(tmp_path / "m", max_position_embeddings=256)
    assert check_schedule(path, 5, damage=True, swap_disk_bytes=1 << 30).stats()["swap_damaged_pages"] > 0


@compiled
def test_a_prompt_that_was_swapped_out_is_not_read_again(tmp_path: Path) -> None:
    path = served(tmp_path / "m", max_position_embeddings=256)
    made = Engine(EngineOptions(path, swap_disk_bytes=1 << 30), log=lambda _: None)
    made.pool.take(made.pool.pages - 6)
    cached = []
    for id, first in (("a", 1), ("b", 2), ("again", 1)):
        run = Watched(made)
        made.add(greedy(id, (first, *range(160)), 2))
        run.run()
        cached.append(run.outputs[0].cached_tokens)
    assert cached[:2] == [0, 0]
    assert cached[2] == 160
    assert made.stats()["swapped_in_pages"] >= 4
