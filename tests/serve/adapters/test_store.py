"""Every name gives its own adapter, whatever else is loaded, evicted, replaced or read at the same time."""

from __future__ import annotations

import json
import random
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from peft_adapters import change_config, logits, opened, pair, prompt, save, wrapped
from tailorbird.errors import CheckpointError, ResourceError, SettingsError
from tailorbird.kernels import native
from tailorbird.kernels.adapters import Adapter
from tailorbird.run.fused import FusedModel
from tailorbird.serve.adapters.store import AdapterStore, NoRoom
from tiny import make_model

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")

IDS = prompt(6)
MANY, WARM = 200, 10
#: A version in a state file, with nothing wrong.
RECORD = {"number": 1, "path": "a", "fingerprint": "", "trusted": False, "invocation": None}


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> FusedModel:
    return pair(tmp_path_factory.mktemp("model") / "m", "qwen2")[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`MANY` directories `0`, `1`, ..., each with another adapter of the same size."""
    found = tmp_path_factory.mktemp("adapters")
    save(wrapped(make_model("qwen2"), peft.LoraConfig(r=2, target_modules=["o_proj"])), found / "0")
    tensors = load_file(found / "0" / "adapter_model.safetensors")
    for i in range(1, MANY):
        shutil.copytree(found / "0", found / str(i))
        generator = torch.Generator().manual_seed(i)
        noise = {n: 0.3 * torch.randn(t.shape, generator=generator) for n, t in tensors.items()}
        save_file(noise, found / str(i) / "adapter_model.safetensors")
    return found


@pytest.fixture(scope="module")
def expected(fused: FusedModel, folder: Path) -> list[Tensor]:
    """What each adapter gives."""
    return [logits(fused, IDS, opened(fused, folder / str(i))) for i in range(MANY)]


@pytest.fixture(scope="module")
def size(fused: FusedModel, folder: Path) -> int:
    """Bytes of one of them in memory."""
    return opened(fused, folder / "0").nbytes


@pytest.fixture
def store(fused: FusedModel, folder: Path, size: int) -> Iterator[AdapterStore]:
    """Room for `WARM` adapters."""
    made = AdapterStore(fused, WARM * size, folder)
    yield made
    made.close()


def gives(fused: FusedModel, adapter: Adapter, wanted: Tensor) -> bool:
    return torch.equal(logits(fused, IDS, adapter), wanted)


def test_every_name_gives_its_adapter_in_a_tenth_of_the_room(
    fused: FusedModel, folder: Path, store: AdapterStore, expected: list[Tensor], size: int
) -> None:
    for i in range(MANY):
        store.register(f"a{i}", folder / str(i))
    assert store.bytes == 0  # none is read before it is needed
    assert len(store.names()) == MANY
    held = [store.acquire(f"a{i}") for i in (3, 50)]
    before = [handle.adapter for handle in held]
    order = [*range(MANY), *random.Random(0).choices(range(MANY), k=100)]
    for i in order:
        handle = store.acquire(f"a{i}")
        assert gives(fused, handle.adapter, expected[i])
        store.release(handle)
        assert store.bytes <= WARM * size
    assert store.bytes == WARM * size
    for i, handle, adapter in zip((3, 50), held, before, strict=True):
        again = store.acquire(f"a{i}")
        assert again.adapter is handle.adapter is adapter  # it stayed where it was
        store.release(again)
        store.release(handle)


def test_the_least_recently_used_goes_first(
    folder: Path, fused: FusedModel, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = AdapterStore(fused, 3 * size)
    read: list[str] = []
    plain = AdapterStore._read
    monkeypatch.setattr(
        AdapterStore, "_read", lambda self, version: (read.append(version.name), plain(self, version))[1]
    )
    for i in range(4):
        store.register(str(i), folder / str(i))
    for name in ("0", "1", "2", "0", "3", "0", "2", "1"):
        store.release(store.acquire(name))
    assert read == ["0", "1", "2", "3", "1"]  # 0, 2 and 1 are left, in that order
    store.fetch(store.reserve("0"), spare=True).result(20)
    store.release(store.acquire("3"))
    store.release(store.acquire("0"))
    assert read == ["0", "1", "2", "3", "1", "3"]
    store.close()


def test_what_is_in_use_is_never_evicted_and_the_room_never_exceeded(
    folder: Path, fused: FusedModel, store: AdapterStore, size: int
) -> None:
    for i in range(WARM + 1):
        store.register(str(i), folder / str(i))
    handles = [store.acquire(str(i)) for i in range(WARM)]
    with pytest.raises(NoRoom, match=rf"take {WARM * size} of {WARM * size} bytes"):
        store.acquire(str(WARM))
    assert store.bytes == WARM * size
    store.release(handles[4])
    handles[4] = store.acquire(str(WARM))
    with pytest.raises(NoRoom):
        store.acquire("4")
    assert [store.acquire(str(i)).adapter is handles[i].adapter for i in range(WARM) if i != 4] == [True] * 9


def test_a_replaced_adapter_stays_with_those_that_hold_it(
    folder: Path, fused: FusedModel, store: AdapterStore, expected: list[Tensor], size: int
) -> None:
    first = store.register("a", folder / "0")
    old = store.acquire("a")
    second = store.register("a", folder / "1")
    new = store.acquire("a")
    assert (old.version, new.version) == (first, second)
    assert first < second == store.version("a")
    assert old.salt != new.salt
    third = store.register("a", folder / "2")  # now the first is neither served nor the one before
    newest = store.acquire("a")
    assert newest.version == third
    for handle, i in ((old, 0), (new, 1), (newest, 2)):
        assert gives(fused, handle.adapter, expected[i])
    assert store.bytes == 3 * size
    store.release(old)
    assert store.bytes == 2 * size
    store.unregister("a")
    assert store.names() == []
    assert gives(fused, new.adapter, expected[1])
    store.release(new)
    store.release(newest)
    assert store.bytes == 0


def test_a_handle_is_released_once(folder: Path, store: AdapterStore) -> None:
    store.register("a", folder / "0")
    handle, other = store.acquire("a"), store.acquire("a")
    assert handle.salt == other.salt
    store.release(handle)
    with pytest.raises(ValueError, match="has back"):
        store.release(handle)
    with pytest.raises(ValueError, match="isn't staged"):
        store.serve(other, None)


def test_files_that_are_served_already_are_no_new_version(fused: FusedModel, folder: Path) -> None:
    store = AdapterStore(fused, 1 << 20)
    before = store.register("a", folder / "0")
    number = store.register("a", folder / "1")
    assert store.register("a", folder / "1") == number == store.version("a")
    assert store.rollback("a") == before


def test_a_rollback_serves_the_version_before(
    folder: Path, fused: FusedModel, store: AdapterStore, expected: list[Tensor]
) -> None:
    for i in range(3):
        store.register("a", folder / str(i))
    assert store.rollback("a") == 2
    handle = store.acquire("a")
    assert gives(fused, handle.adapter, expected[1])
    with pytest.raises(SettingsError, match="which has one version"):
        store.rollback("a")
    with pytest.raises(SettingsError, match="no adapter is called 'b'"):
        store.rollback("b")


def test_many_threads_get_the_right_adapters(
    folder: Path, fused: FusedModel, store: AdapterStore, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While names are replaced, read ahead and evicted; an adapter is told by what was read for it."""
    read: dict[int, str] = {}
    plain = AdapterStore._read

    def noted(self: AdapterStore, version: Any) -> Adapter:
        adapter = plain(self, version)
        read[id(adapter)] = version.record.path
        kept.append(adapter)  # so that no other gets its id
        return adapter

    kept: list[Adapter] = []
    monkeypatch.setattr(AdapterStore, "_read", noted)
    for i in range(30):
        store.register(str(i), folder / str(i))

    def work(seed: int) -> None:
        chosen = random.Random(seed)
        for _ in range(60):
            name = str(chosen.randrange(30))
            if chosen.random() < 0.1:
                store.register(name, folder / name)
            if chosen.random() < 0.2:
                store.fetch(store.reserve(name), spare=True)
            handle = store.acquire(name)
            assert read[id(handle.adapter)] == str(folder / name)
            assert store.bytes <= WARM * size
            store.release(handle)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert len(kept) > 100  # most weren't warm


def test_one_thread_reads_for_all_that_ask(
    folder: Path, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go = threading.Event(), threading.Event()
    reads: list[int] = []
    plain = AdapterStore._read

    def slow(self: AdapterStore, version: Any) -> Adapter:
        reads.append(version.record.number)
        begun.set()
        assert go.wait(20)
        return plain(self, version)

    monkeypatch.setattr(AdapterStore, "_read", slow)
    store.register("a", folder / "0")
    fetched = store.fetch(store.reserve("a"), spare=True)
    assert begun.wait(20)
    assert store.names() == ["a"]  # no lock is held while it is read
    with ThreadPoolExecutor(3) as pool:
        handles = [pool.submit(store.acquire, "a") for _ in range(3)]
        go.set()
        found = {id(handle.result(20).adapter) for handle in handles}
    fetched.result(20)
    assert (len(found), reads) == (1, [1])


def test_what_is_read_ahead_is_warm_and_what_fails_is_told_by_acquire(
    folder: Path, fused: FusedModel, size: int, tmp_path: Path
) -> None:
    store = AdapterStore(fused, WARM * size)
    shutil.copytree(folder / "0", tmp_path / "a")
    store.register("a", tmp_path / "a")
    store.fetch(store.reserve("a"), spare=True).result(20)
    assert store.bytes == size
    store.register("b", shutil.copytree(folder / "1", tmp_path / "b"))
    (tmp_path / "b" / "adapter_model.safetensors").unlink()
    assert isinstance(store.fetch(store.reserve("b"), spare=True).exception(20), CheckpointError)
    with pytest.raises(CheckpointError, match="missing"):
        store.acquire("b")
    with pytest.raises(SettingsError, match="no adapter is called 'c'"):
        store.reserve("c")
    store.close()


def test_files_that_changed_since_they_were_registered_are_refused(
    folder: Path, fused: FusedModel, size: int, expected: list[Tensor], tmp_path: Path
) -> None:
    store = AdapterStore(fused, size)
    directory = Path(shutil.copytree(folder / "0", tmp_path / "a"))
    store.register("a", directory)
    store.register("b", folder / "1")
    change_config(directory, {"lora_alpha": 3})
    with pytest.raises(CheckpointError, match="changed after the adapter was registered"):
        store.acquire("a")
    change_config(directory, {"lora_alpha": 8})
    store.register("a", directory)
    assert gives(fused, store.acquire("a").adapter, expected[0])


@pytest.mark.parametrize("name", ["", " ", "a b", "-a", "a\n", "é", "a" * 201])
def test_names_that_no_url_could_hold_are_refused(name: str, folder: Path, store: AdapterStore) -> None:
    with pytest.raises(SettingsError, match="an adapter called"):
        store.register(name, folder / "0")


def test_what_can_never_be_served_is_refused_at_once(
    folder: Path, fused: FusedModel, store: AdapterStore, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match="below"):
        store.register("a", shutil.copytree(folder / "0", tmp_path / "a"))
    with pytest.raises(CheckpointError, match="no directory"):
        store.register("a", folder / "none")
    with pytest.raises(ResourceError, match="at most the 100 bytes"):
        AdapterStore(fused, 100).register("a", folder / "0")
    assert store.names() == []


def test_versions_outlive_the_process(
    folder: Path, fused: FusedModel, size: int, expected: list[Tensor], tmp_path: Path
) -> None:
    state = tmp_path / "adapters.json"
    store = AdapterStore(fused, WARM * size, folder, state)
    for i, name in enumerate("aabcca"):
        store.register(name, folder / str(i))
    store.unregister("b")
    assert store.rollback("c") == 4
    again = AdapterStore(fused, WARM * size, folder, state)
    assert again.names() == ["a", "c"]
    assert [again.version(name) for name in "ac"] == [6, 4]
    for name, i in (("a", 5), ("c", 3)):
        assert gives(fused, again.acquire(name).adapter, expected[i])
    assert again.rollback("a") == 2
    assert gives(fused, again.acquire("a").adapter, expected[1])
    assert again.register("d", folder / "9") == 7
    third = AdapterStore(fused, WARM * size, folder, state)
    assert [third.version(name) for name in ("a", "c", "d")] == [2, 4, 7]
    narrow = AdapterStore(fused, WARM * size, tmp_path, state)
    with pytest.raises(SettingsError, match="below"):
        narrow.acquire("a")


def test_the_last_of_many_changes_is_the_one_that_is_kept(
    folder: Path, fused: FusedModel, size: int, tmp_path: Path
) -> None:
    state = tmp_path / "adapters.json"
    store = AdapterStore(fused, WARM * size, folder, state)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: store.register(f"a{i % 7}", folder / str(i)), range(40)))
    again = AdapterStore(fused, WARM * size, folder, state)
    assert again.names() == store.names()
    assert [again.version(name) for name in again.names()] == [store.version(n) for n in store.names()]


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 2},
        {"last": 0},
        {"last": None},
        {"adapters": []},
        {"adapters": {"a": []}},
        {"adapters": {"a": [{"number": 1, "path": 3, "fingerprint": ""}]}},
        {"adapters": {"a": [{"number": 1}]}},
        {"adapters": {"a": [RECORD | {"trusted": 1}]}},
        {"adapters": {"a": [RECORD | {"invocation": 5}]}},
        {"adapters": {"a": [RECORD | {"invocation": ["5"]}]}},
        {"adapters": {"a": [RECORD | {"more": 5}]}},
    ],
)
def test_a_damaged_state_is_refused(
    change: dict[str, Any], folder: Path, fused: FusedModel, tmp_path: Path
) -> None:
    state = tmp_path / "adapters.json"
    AdapterStore(fused, 1 << 20, folder, state).register("a", folder / "0")
    state.write_text(json.dumps({**json.loads(state.read_text()), **change}))
    with pytest.raises(CheckpointError, match="isn't what tailorbird writes"):
        AdapterStore(fused, 1 << 20, folder, state)
