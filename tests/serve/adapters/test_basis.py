"""A shared basis is in memory once and counts once, as long as any adapter needs it."""

from __future__ import annotations

import ctypes
import gc
import random
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from peft_adapters import opened, opened_for_modules, pair, save, wrapped
from tailorbird.kernels import native
from tailorbird.kernels.adapters import Adapter, BasisPart, TiledRows
from tailorbird.run.fused import FusedModel
from tailorbird.run.module_adapters import ModuleAdapter
from tailorbird.run.paged import PagedModel
from tailorbird.serve.adapters.kinds import open_adapter, read_linears
from tailorbird.serve.adapters.share import share
from tailorbird.serve.adapters.store import AdapterStore, Handle, NoRoom

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")

COUNT = 12


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FusedModel | PagedModel]:
    fused, dense = pair(tmp_path_factory.mktemp("model") / "m", "llama")
    return {"fused": fused, "paged": PagedModel(dense)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, models: Any) -> Path:
    """`COUNT` adapters `0`, `1`, ... in two bases of rank 8; `whole` has none."""
    found = tmp_path_factory.mktemp("adapters")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    dense = models["paged"].model
    given = [save(wrapped(dense, config, seed=i), found / "given" / str(i)) for i in range(COUNT)]
    share(models["fused"].linears, given, found / "shared", rank=8)
    share(models["fused"].linears, given[:3], found / "others", rank=5)
    return found


def laid_out(model: FusedModel | PagedModel, directory: Path) -> Adapter | ModuleAdapter:
    return opened(model, directory) if isinstance(model, FusedModel) else opened_for_modules(model, directory)


@pytest.mark.parametrize("path", ["fused", "paged"])
def test_many_adapters_fit_where_their_basis_and_cores_do(path: str, models: Any, folder: Path) -> None:
    model = models[path]
    one = laid_out(model, folder / "shared" / "0")
    basis = sum(one.shared.values())
    own = one.nbytes - basis
    assert basis > COUNT * own / 4  # it would matter
    store = AdapterStore(model, basis + (COUNT - 1) * own)
    for i in range(COUNT):
        store.register(str(i), folder / "shared" / str(i), trusted=True)
    held = [store.acquire(str(i)) for i in range(COUNT - 1)]
    assert store.bytes == basis + (COUNT - 1) * own
    with pytest.raises(NoRoom, match=rf"take {store.bytes} of {store.bytes} bytes"):
        store.acquire(str(COUNT - 1))
    waiting = store.reserve(str(COUNT - 1))
    assert not store.has_room(waiting, spare=False)
    store.release(held.pop())
    assert store.has_room(waiting, spare=False)
    store.fetch(waiting, spare=False).result(20)
    assert store.bytes == basis + (COUNT - 1) * own
    store.close()


def test_the_basis_goes_with_its_last_adapter(models: Any, folder: Path) -> None:
    model = models["fused"]
    linears = read_linears(open_adapter(folder / "shared" / "0", model.linears))
    store = AdapterStore(model, 1 << 24)
    for i in range(3):
        store.register(str(i), folder / "shared" / str(i), trusted=True)
        store.release(store.acquire(str(i)))
    parts = [weakref.ref(linear.up) for linear in linears.values() if isinstance(linear.up, BasisPart)]
    assert len(parts) == len(linears)
    del linears
    for left in (2, 1, 0):
        gc.collect()
        assert all(part() is not None for part in parts)
        assert store.drop_oldest()
        assert (store.bytes == 0) == (left == 0)
    gc.collect()
    assert all(part() is None for part in parts)
    store.close()


def in_memory(adapters: Iterable[Any]) -> int:
    """Bytes of all tensors and tables of compiled blocks' adapters, each tensor once."""
    found, tables = {}, 0
    for adapter in adapters:
        tables += ctypes.sizeof(adapter._table)
        for one in adapter._kept:
            tensor = one.tiles if isinstance(one, TiledRows) else one
            found[tensor.data_ptr()] = tensor.nbytes
    return tables + sum(found.values())


def test_what_a_store_counts_is_what_there_is(models: Any, folder: Path) -> None:
    model, rng = models["fused"], random.Random(0)
    directories = [*sorted((folder / "shared").glob("*/")), *sorted((folder / "others").glob("*/"))]
    directories += sorted((folder / "given").glob("*/"))[:4]
    most = 2 * opened(model, directories[0]).nbytes
    store = AdapterStore(model, most)
    for i, directory in enumerate(directories):
        store.register(str(i), directory, trusted=True)
    held: list[Handle] = []
    for _ in range(150):
        if held and rng.random() < 0.45:
            store.release(held.pop(rng.randrange(len(held))))
        else:
            try:
                held.append(store.acquire(str(rng.randrange(len(directories)))))
            except NoRoom:
                assert held
        warm = [version.adapter for version in store._warm]
        assert store.bytes == in_memory(warm) <= most
    for handle in held:
        store.release(handle)
    while store.drop_oldest():
        pass
    assert store.bytes == 0
    store.close()
