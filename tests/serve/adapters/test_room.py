"""Adapters, keys and values in one budget: all are served, and their memory together stays below it."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engines import Watched, greedy, served
from peft_adapters import save, wrapped
from tailorbird.errors import ResourceError
from tailorbird.hardware.memory import resident_bytes
from tailorbird.kernels import native
from tailorbird.model.load import load
from tailorbird.run.pages import SharedPages
from tailorbird.serve.adapters.room import AdapterRoom
from tailorbird.serve.adapters.store import NoRoom
from tailorbird.serve.engine import Engine
from tailorbird.serve.interface import EngineOptions
from tailorbird.serve.memory import weight_bytes
from tailorbird.serve.page_pool import PagePool
from tiny import make_model

peft = pytest.importorskip("peft")
compiled = pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")

SHAPE: dict[str, Any] = {"num_key_value_heads": 4, "head_dim": 128, "max_position_embeddings": 1024}
MANY, BUDGET, SLACK = 20, 48 << 20, 16 << 20


@pytest.mark.parametrize("seed", range(5))
def test_pages_are_held_for_the_bytes_that_there_are(seed: int) -> None:
    rng, pool = random.Random(seed), PagePool(20)
    discarded: list[int] = []
    room = AdapterRoom(pool, 100, 12, discarded.extend)
    texts: list[int] = []
    held = 0
    for _ in range(300):
        if rng.random() < 0.4:
            taken = pool.take(rng.randrange(4))
            texts += taken or []
        elif rng.random() < 0.5:
            pool.release(texts)
            texts = []
        else:
            wanted, free, before = rng.randrange(1500), pool.available, len(discarded)
            pages = -(-wanted // 100)
            fits = pages <= held or (pages <= 12 and pages - held <= free)
            assert room.fits(wanted, insist=True) == fits or pages <= held
            if pages <= 12:
                assert pool.wanted == max(0, pages - held)
            assert room.hold(wanted) == fits
            assert len(discarded) - before == (max(0, pages - held) if fits else 0)
            held = pages if fits else held
        assert pool.lent == held
        assert pool.used == len(texts)
    assert room.hold(0)
    assert pool.lent == 0


def test_pages_whose_memory_was_given_back_can_be_written_again() -> None:
    pages = SharedPages([(4, 128), (2, 64)], torch.bfloat16, 64)
    for pool in (*pages.keys, *pages.values):
        pool.fill_(1)
    rng = random.Random(0)
    some = rng.sample(range(64), 40)
    before = resident_bytes()
    pages.discard(some)
    assert before - resident_bytes() > 2 << 20
    for pool in (*pages.keys, *pages.values):
        others = [page for page in range(64) if page not in some]
        assert bool((pool[others] == 1).all())
        pool[some] = 2
        assert bool((pool[some] == 2).all())
        assert bool((pool[others] == 1).all())


def write_adapters(directory: Path) -> list[str]:
    """`MANY` adapters of nearly 3 MB each."""
    model = make_model("llama", **SHAPE)
    save(wrapped(model, peft.LoraConfig(r=256, target_modules=["q_proj", "o_proj"])), directory / "0")
    tensors = load_file(directory / "0" / "adapter_model.safetensors")
    for number in range(1, MANY):
        shutil.copytree(directory / "0", directory / str(number))
        generator = torch.Generator().manual_seed(number)
        noise = {name: 0.02 * torch.randn(t.shape, generator=generator) for name, t in tensors.items()}
        save_file(noise, directory / str(number) / "adapter_model.safetensors")
    return [str(number) for number in range(MANY)]


def budgeted(path: str, adapters: Path, budget: int = BUDGET) -> Engine:
    """An engine with so many bytes beside its weights."""
    weights = weight_bytes(load(path))
    options = EngineOptions(
        path,
        {name: str(adapters / name) for name in map(str, range(MANY))},
        weights + budget,
        step_tokens=256,
    )
    return Engine(options, log=lambda _: None)


def send(made: Engine, run: Watched, requests: Sequence[Any]) -> None:
    """Let requests be served, each as soon as there is room for its adapter."""
    for request in requests:
        while True:
            try:
                made.add(request)
                break
            except NoRoom:
                assert made.busy  # others have it, and will end
                run.step()
        run.step()
    run.run()


def serve_all(path: str, directory: str) -> None:
    """Print the most bytes that came to lie in RAM while adapters and long prompts alternated."""
    made = budgeted(path, Path(directory))
    run = Watched(made)
    made.add(greedy("warm", (1, 2, 3), 8))
    run.run()
    before, most = resident_bytes(), 0
    rng = random.Random(0)
    for turn in range(6):
        names = [None, *rng.sample(range(MANY), 14)] if turn % 2 else [None] * 8
        requests = []
        for number, name in enumerate(names):
            prompt = tuple(rng.randrange(256) for _ in range(900 if name is None else 60))
            adapter = None if name is None else str(name)
            requests.append(greedy(f"{turn} {number}", prompt, 4, adapter=adapter))
        send(made, run, requests)
        run.logits.clear()
        most = max(most, resident_bytes())
        assert made.pool.used == 0
    assert set(run.finish.values()) == {"length"}
    assert made.store is not None
    while made.store.drop_oldest():
        pass
    print(json.dumps({"grown": most - before, "lent": made.pool.lent, "used": made.pool.used}))


@compiled
def test_adapters_and_long_prompts_alternate_within_the_budget(tmp_path: Path) -> None:
    path = served(tmp_path / "m", **SHAPE)
    write_adapters(tmp_path / "adapters")
    program = "import sys; from test_room import serve_all; serve_all(*sys.argv[1:])"
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[2]), *sys.path]
    done = subprocess.run(
        [sys.executable, "-c", program, path, str(tmp_path / "adapters")], check=True, capture_output=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip
    told = json.loads(done.stdout)
    assert BUDGET // 2 < told["grown"] < BUDGET + SLACK
    assert (told["lent"], told["used"]) == (0, 0)


@compiled
def test_adapters_in_a_small_budget_give_what_they_give_in_a_large_one(tmp_path: Path) -> None:
    path = served(tmp_path / "m", **SHAPE)
    write_adapters(tmp_path / "adapters")
    requests = [greedy(str(n), tuple(range(n, n + 50)), 6, adapter=str(n % MANY)) for n in range(2 * MANY)]
    found = []
    for budget in (13 << 20, 1 << 30):
        made = budgeted(path, tmp_path / "adapters", budget)
        run = Watched(made)
        send(made, run, requests)
        found.append(run.tokens)
    assert found[0] == found[1]


@compiled
def test_an_adapter_that_can_never_fit_is_refused_with_what_would_do(tmp_path: Path) -> None:
    path = served(tmp_path / "m", **SHAPE)
    write_adapters(tmp_path / "adapters")
    with pytest.raises(ResourceError, match=r"all adapters together may take.*allow more memory"):
        budgeted(path, tmp_path / "adapters", 4 << 20)


@compiled
def test_an_adapter_finds_room_while_texts_keep_coming(tmp_path: Path) -> None:
    path = served(tmp_path / "m", **SHAPE)
    write_adapters(tmp_path / "adapters")
    made = budgeted(path, tmp_path / "adapters", 14 << 20)
    run, number, rng = Watched(made), 0, random.Random(0)
    for step in range(5000):  # reading goes on beside them, and takes as long as it takes
        while len(made.scheduler.waiting) < 4:  # always more than there are pages for
            made.add(greedy(f"plain {number}", (number % 256, *range(60)), rng.randrange(5, 90)))
            number += 1
        if step == 80:
            assert made.scheduler.running
            made.add(greedy("tuned", (1, 2, 3), 5, adapter="3", priority=-1))
        run.step()
        if ("tuned", 0) in run.finish:
            break
    assert run.finish["tuned", 0] == "length"
