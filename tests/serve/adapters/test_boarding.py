"""Who finds no room for its adapter waits, and gets the version of when it came; nobody waits for ever."""

from __future__ import annotations

import random
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from compressed import save_compressed
from peft_adapters import opened, save, wrapped
from tailorbird.errors import UnknownAdapter
from tailorbird.formats.packed import IntegerCoding
from tailorbird.kernels import native
from tailorbird.run.fused import FusedModel
from tailorbird.serve.adapters.boarding import MOST_PASSES, Boarding, Ticket
from tailorbird.serve.adapters.room import AdapterRoom
from tailorbird.serve.adapters.store import AdapterStore
from tailorbird.serve.engine import Engine
from tailorbird.serve.interface import EngineOptions
from tailorbird.serve.page_pool import PagePool
from tailorbird.serve.request import Output, Request, Sampling
from tiny import byte_tokenizer, make_model

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")

MANY, ROOM = 6, 2
#: Steps after which a request that waits for ever is given up.
STEPS = 5000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and adapters `0`, `1`, ... of the same size."""
    found = tmp_path_factory.mktemp("boarding")
    dense = save_compressed(found / "m", make_model("qwen2"), IntegerCoding(4, 32))
    byte_tokenizer().save_pretrained(found / "m")
    for seed in range(MANY):
        made = wrapped(dense, peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"]), seed)
        save(made, found / "adapters" / str(seed))
    return found


@pytest.fixture(scope="module")
def fused(folder: Path) -> FusedModel:
    from tailorbird.model.load import load

    return FusedModel(load(str(folder / "m")))


@pytest.fixture
def store(fused: FusedModel, folder: Path) -> Iterator[AdapterStore]:
    """Room for `ROOM` adapters of those that are registered."""
    size = opened(fused, folder / "adapters" / "0").nbytes
    made = AdapterStore(fused, ROOM * size)
    for i in range(MANY):
        made.register(str(i), folder / "adapters" / str(i))
    yield made
    made.close()


def run(boarding: Boarding, ticket: Ticket) -> None:
    """Ask until it may run, with nothing else going on."""
    for _ in range(20):
        if boarding.ready(ticket):
            return
        boarding.look_ahead()
        boarding.settle(20)
    raise AssertionError("it may never run")


def blocked(boarding: Boarding, ticket: Ticket) -> bool:
    """Whether it may not run, even when all is read that is being read."""
    for _ in range(3):
        if boarding.ready(ticket):
            return False
        boarding.settle(20)
    return True


def test_who_finds_no_room_waits_until_there_is_some(store: AdapterStore) -> None:
    boarding = Boarding(store)
    first, second, third = (boarding.take(str(i)) for i in range(3))
    run(boarding, first)
    run(boarding, second)
    assert blocked(boarding, third)
    boarding.give_back(first)
    run(boarding, third)
    for ticket in (second, third):
        boarding.give_back(ticket)
    with pytest.raises(UnknownAdapter):
        boarding.take("none")


def test_a_request_gets_the_version_of_when_it_came(store: AdapterStore, folder: Path) -> None:
    boarding = Boarding(store)
    old = boarding.take("0")
    store.register("0", folder / "adapters" / "1")
    store.register("0", folder / "adapters" / "2")  # now that version is neither served nor the one before
    new = boarding.take("0")
    assert old.reservation.salt != new.reservation.salt
    run(boarding, old)
    run(boarding, new)
    assert old.handle is not None
    assert new.handle is not None
    assert (old.handle.version, new.handle.version) == (1, store.version("0"))
    store.unregister("0")
    for ticket in (old, new):
        boarding.give_back(ticket)
    assert store.bytes == 0


def test_those_behind_pass_a_bounded_number_of_times(store: AdapterStore) -> None:
    """Adapter 0 is always in use by somebody, so that there would never be room for 2."""
    boarding = Boarding(store)
    held = [boarding.take("0"), boarding.take("1")]
    for ticket in held:
        run(boarding, ticket)
    waits = boarding.take("2")
    assert blocked(boarding, waits)
    passed = 0
    while True:
        assert blocked(boarding, waits)
        other = boarding.take("0")
        if not boarding.ready(other):
            break
        passed += 1
        boarding.give_back(held[0])
        held[0] = other
    assert passed == MOST_PASSES
    boarding.give_back(held[0])
    run(boarding, waits)
    boarding.give_back(held[1])
    run(boarding, other)


def test_adapters_are_laid_out_ahead_in_room_that_nobody_waiting_needs(
    store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    plain = AdapterStore._read
    monkeypatch.setattr(
        AdapterStore, "_read", lambda self, version: (read.append(version.name), plain(self, version))[1]
    )
    boarding = Boarding(store)
    running = boarding.take("0")
    run(boarding, running)
    waiting = [boarding.take(str(i)) for i in (1, 2, 3)]
    for _ in range(4):
        boarding.look_ahead()
        boarding.settle(20)
    assert read == ["0", "1"]  # for 2 and 3 there is no room beside what runs and what waits
    boarding.give_back(running)
    for _ in range(4):
        boarding.look_ahead()
        boarding.settle(20)
    assert read == ["0", "1", "2"]
    assert boarding.ready(waiting[0])
    assert boarding.ready(waiting[1])  # at once, as they are there
    boarding.give_back(waiting[2])
    assert blocked(boarding, boarding.take("4"))


def test_reading_ahead_does_not_stop_who_asks(store: AdapterStore, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    plain = AdapterStore._read

    def slow(self: AdapterStore, version: Any) -> Any:
        assert go.wait(20)
        return plain(self, version)

    monkeypatch.setattr(AdapterStore, "_read", slow)
    boarding = Boarding(store)
    ticket = boarding.take("0")
    boarding.look_ahead()
    assert not boarding.ready(ticket)
    assert not boarding.ready(ticket)
    go.set()
    run(boarding, ticket)


def test_pages_are_left_for_an_adapter_while_it_is_read(
    fused: FusedModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, begun = threading.Event(), threading.Event()
    plain = AdapterStore._read

    def slow(self: AdapterStore, version: Any) -> Any:
        begun.set()
        assert go.wait(20)
        return plain(self, version)

    monkeypatch.setattr(AdapterStore, "_read", slow)
    pool, size = PagePool(8), opened(fused, folder / "adapters" / "0").nbytes
    room = AdapterRoom(pool, -(-size // 4), 6, lambda pages: None)
    store = AdapterStore(fused, room.most_bytes, room=room)
    store.register("0", folder / "adapters" / "0")
    boarding = Boarding(store)
    ticket = boarding.take("0")
    assert not boarding.ready(ticket)
    assert begun.wait(20)
    pool.wanted = 0  # the next step
    assert not boarding.ready(ticket)
    assert pool.wanted == 4
    boarding.settle(0.01)  # returns, though nothing was read: there may be messages meanwhile
    go.set()
    run(boarding, ticket)
    assert pool.lent == 4
    store.close()


# --- in the engine -------------------------------------------------------------------------------


def engine(folder: Path, fused: FusedModel, **options: Any) -> Engine:
    adapters = {str(i): str(folder / "adapters" / str(i)) for i in range(MANY)}
    made = Engine(EngineOptions(str(folder / "m"), adapters, **options), log=lambda _: None)
    assert made.store is not None
    made.store._warm_bytes = ROOM * opened(fused, folder / "adapters" / "0").nbytes
    return made


def greedy(id: str, adapter: str | None, count: int, **more: Any) -> Request:
    return Request(id, (5, 6, 7), count, Sampling(temperature=0, ignore_end=True), adapter=adapter, **more)


def finished(made: Engine, outputs: list[Output]) -> None:
    for _ in range(STEPS):
        if not made.busy:
            return
        outputs += made.step()
    raise AssertionError("a request waits for ever")


def texts(outputs: list[Output]) -> dict[tuple[str, int], list[int]]:
    found: dict[tuple[str, int], list[int]] = {}
    for output in outputs:
        found.setdefault((output.id, output.index), []).extend(output.tokens)
    return found


@pytest.mark.parametrize("seed", range(3))
def test_more_adapters_than_find_room_are_served_in_turn(seed: int, folder: Path, fused: FusedModel) -> None:
    rng = random.Random(seed)
    alone = engine(folder, fused)
    expected = {}
    for name in (None, *map(str, range(MANY))):
        outputs: list[Output] = []
        alone.add(greedy("alone", name, 20))
        finished(alone, outputs)
        expected[name] = texts(outputs)["alone", 0]
    assert len({tuple(tokens) for tokens in expected.values()}) > MANY // 2
    made = engine(folder, fused, max_sequences=rng.choice([2, 8]), step_tokens=16)
    outputs, sent = [], {}
    for number in range(40):
        name = rng.choice([None, *map(str, range(MANY))])
        request = greedy(
            str(number), name, rng.randrange(1, 20), n=rng.choice([1, 1, 3]), tenant=rng.choice("ab")
        )
        sent[request.id] = request
        made.add(request)
        for _ in range(rng.randrange(4)):
            outputs += made.step()
        if rng.random() < 0.15:
            victim = rng.choice(list(sent))
            made.cancel(victim)
            del sent[victim]
    finished(made, outputs)
    found = texts(outputs)
    for id, request in sent.items():
        for index in range(request.n):
            assert found[id, index] == expected[request.adapter][: request.max_tokens]
    assert made.pool.used == 0
    assert made.store is not None
    assert made.store._reservations == made.store._handles == set()


def test_requests_without_an_adapter_go_on_while_one_waits_for_room(folder: Path, fused: FusedModel) -> None:
    made = engine(folder, fused)
    outputs: list[Output] = []
    for name in ("0", "1"):
        made.add(greedy(name, name, 60))
    while len({output.id for output in outputs}) < ROOM:
        outputs += made.step()
    made.add(greedy("2", "2", 5))
    made.add(greedy("plain", None, 5))
    finished(made, outputs)
    ends = [output.id for output in outputs if output.finish]
    assert ends.index("plain") < ends.index("2")
    assert len(texts(outputs)["2", 0]) == 5


def test_an_adapter_that_has_gone_ends_its_request_with_an_error(
    folder: Path, fused: FusedModel, tmp_path: Path
) -> None:
    made = engine(folder, fused, adapter_directory=str(tmp_path))
    shutil.copytree(folder / "adapters" / "0", tmp_path / "gone")
    made.load_adapter("gone", str(tmp_path / "gone"))
    (tmp_path / "gone" / "adapter_model.safetensors").unlink()
    made.add(greedy("bad", "gone", 5, n=2))
    made.add(greedy("good", "1", 5))
    outputs: list[Output] = []
    finished(made, outputs)
    bad = [output for output in outputs if output.id == "bad"]
    assert [(output.index, output.finish) for output in bad] == [(0, "error"), (1, "error")]
    assert "missing" in (bad[0].error or "") or "adapter_model" in (bad[0].error or "")
    assert len(texts(outputs)["good", 0]) == 5
