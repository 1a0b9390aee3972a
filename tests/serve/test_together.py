"""Searches, adapters, swap, guesses, preemption and held-out text at once, with few pages: the same bits."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from engines import Watched, engine, served
from guessed import guess_always
from peft_adapters import save, wrapped
from tailorbird.errors import GateRefused
from tailorbird.kernels import native
from tailorbird.serve.adapters.store import NoRoom
from tailorbird.serve.engine import Engine
from tailorbird.serve.request import BeamSearch, Request, Sampling
from tiny import make_model

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")

#: architectures, and the linears that adapters change
LINEARS = {
    "gemma2": ["q_proj", "down_proj"],
    "gpt_neox": ["query_key_value", "dense_4h_to_h"],
    "qwen2": ["q_proj", "down_proj"],
}
QUICK_SEEDS, SEEDS = 4, 12
INVOCATION = [250, 251]
SHAPE = {"max_position_embeddings": 256}
#: Pages of the longest text, and those that adapters may take beside it: each takes one.
LONGEST, OF_ADAPTERS = 8, 2
STEPS = 20_000


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model `m`, and adapters `0` to `3`, of which the odd ones must be invoked."""
    found = tmp_path_factory.mktemp("together")
    served(found / "m", request.param, **SHAPE)
    for seed in range(4):
        invoked = {"alora_invocation_tokens": INVOCATION} if seed % 2 else {}
        config = peft.LoraConfig(r=4, target_modules=LINEARS[request.param], task_type="CAUSAL_LM", **invoked)
        save(wrapped(make_model(request.param, **SHAPE), config, seed), found / "adapters" / str(seed))
    return found


def made(folder: Path, **options: Any) -> Engine:
    adapters = {str(seed): str(folder / "adapters" / str(seed)) for seed in range(4)}
    return engine(str(folder / "m"), adapters=adapters, adapter_directory=str(folder / "adapters"), **options)


def tight(folder: Path, rng: random.Random) -> Engine:
    """Room for one text of full length, and all guesses are made, whether they pay or not."""
    found = made(
        folder, max_sequences=rng.choice([3, 6, 8]), step_tokens=rng.choice([9, 40, 100]),
        draft=rng.choice(["self:skip", str(folder / "m")]), swap_memory_bytes=rng.choice([0, 1 << 20]),
        swap_disk_bytes=rng.choice([0, 1 << 20]),
    )  # fmt: skip
    assert found.store is not None
    assert found.store._room is not None
    assert found._longest == LONGEST * found.runner.page_tokens
    found.pool.take(found.pool.pages - LONGEST - OF_ADAPTERS)
    found.store._room._most, found.store._warm_bytes = OF_ADAPTERS, OF_ADAPTERS * found.runner.page_bytes
    guess_always(found.guessing)
    return found


def some_requests(rng: random.Random) -> list[Request]:
    opening, found = [rng.randrange(250) for _ in range(90)], []
    for number in range(14):
        prompt = opening[: rng.randrange(1, 91)] + (INVOCATION if rng.random() < 0.5 else [])
        prompt += [rng.randrange(256) for _ in range(rng.randrange(1, 25))]
        beams = BeamSearch(rng.randrange(2, 5)) if rng.random() < 0.25 else None
        found.append(
            Request(
                str(number), tuple(prompt), rng.randrange(1, 40),
                Sampling(rng.choice([0, 0.8]), seed=number, ignore_end=rng.random() < 0.7),
                n=2 if beams else rng.choice([1, 1, 2, 3]), beams=beams, tenant=rng.choice("ab"),
                adapter=rng.choice([None, "0", "1", "2", "3"]), priority=rng.choice([0, 0, 1]),
            )
        )  # fmt: skip
    return found


@pytest.mark.parametrize("folder", LINEARS, indirect=True)
@pytest.mark.parametrize(
    "seed",
    [*range(QUICK_SEEDS), *(pytest.param(n, marks=pytest.mark.full) for n in range(QUICK_SEEDS, SEEDS))],
)
def test_everything_at_once_writes_what_is_written_in_peace(seed: int, folder: Path) -> None:
    rng = random.Random(seed)
    requests = some_requests(rng)
    peace = Watched(made(folder, max_sequences=16, speculative=False))
    for request in requests:
        peace.engine.add(request)
    peace.run()
    run = Watched(tight(folder, rng))
    held, cancelled = run.engine.pool.used, set[str]()
    jobs = [run.engine.publish_adapter("new", str(folder / "adapters" / "2"), [(range(60), 1)])]
    for request in requests:
        run.engine.add(request)
        for _ in range(rng.randrange(5)):
            run.step()
        if rng.random() < 0.15:
            cancelled.add(rng.choice(requests[: int(request.id) + 1]).id)
            for id in cancelled:
                run.engine.cancel(id)
    for _ in range(STEPS):
        if not run.engine.busy and not jobs:
            break
        run.step()
        for job in list(jobs):
            with contextlib.suppress(NoRoom, GateRefused):
                if next(job, job) is None:
                    continue
            jobs.remove(job)
    else:
        raise AssertionError("it doesn't end")
    for request in requests:
        for index in range(request.n if request.id not in cancelled else 0):
            assert run.tokens[request.id, index] == peace.tokens[request.id, index]
            assert run.finish[request.id, index] == peace.finish[request.id, index]
    chosen_from = {place: row for place, row in peace.logits.items() if place[0] not in cancelled}
    assert chosen_from.keys() <= run.logits.keys()
    assert all(torch.equal(run.logits[place], row) for place, row in chosen_from.items())
    assert run.engine.guessing.stats()["accepted_tokens"]
    assert run.engine.pool.used == held
    assert run.engine.store is not None
    assert run.engine.store._reservations == run.engine.store._handles == set()
    assert not any(record.of for record in run.engine.guessing._records.values())
