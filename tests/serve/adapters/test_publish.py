"""A version is let in exactly where its loss is finite and no higher than that of what is served."""

from __future__ import annotations

import math
from collections.abc import Generator
from pathlib import Path

import pytest

from peft_adapters import pair, save, wrapped
from tailorbird.errors import GateRefused, SettingsError
from tailorbird.kernels import native
from tailorbird.run.fused import FusedModel
from tailorbird.serve.adapters.publish import Evaluate, Published
from tailorbird.serve.adapters.publish import publish as publishing
from tailorbird.serve.adapters.store import AdapterStore, Handle

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[FusedModel, list[Path]]:
    """A model, and adapters of ranks 1, 2, ..."""
    folder = tmp_path_factory.mktemp("publish")
    fused, dense = pair(folder / "m", "qwen2")
    configs = [peft.LoraConfig(r=rank, target_modules=["o_proj"]) for rank in range(1, 6)]
    return fused, [save(wrapped(dense, config), folder / str(config.r)) for config in configs]


def rank(handle: Handle) -> Generator[None, None, float]:
    """A loss that tells which adapter was measured."""
    yield
    return float(handle.adapter.rank)


def publish(store: AdapterStore, name: str, path: Path, evaluate: Evaluate) -> Published:
    """Piece after piece, until the end."""
    job = publishing(store, name, path, evaluate)
    try:
        while True:
            next(job)
    except StopIteration as end:
        found: Published = end.value
        return found


def test_only_what_is_no_worse_is_served(made: tuple[FusedModel, list[Path]], tmp_path: Path) -> None:
    fused, paths = made
    store = AdapterStore(fused, 1 << 20, state=tmp_path / "state.json")
    first = publish(store, "a", paths[3], rank)
    assert (first.loss, first.loss_before) == (4, None)
    assert store.bytes > 0  # what was measured is served, and stays laid out
    better = publish(store, "a", paths[1], rank)
    assert (better.loss, better.loss_before, store.version("a")) == (2, 4, better.version)
    in_memory = store.bytes
    with pytest.raises(GateRefused, match=r"has a loss of 3 · expected: at most 2, that of version 2"):
        publish(store, "a", paths[2], rank)
    assert (store.version("a"), store.bytes) == (better.version, in_memory)  # nothing of it is left
    equal = publish(store, "a", paths[1], rank)
    assert store.version("a") == equal.version > better.version
    again = AdapterStore(fused, 1 << 20, state=tmp_path / "state.json")
    assert again.version("a") == equal.version
    assert again.rollback("a") == better.version
    assert store.bytes <= 1 << 20


@pytest.mark.parametrize("loss", [math.nan, math.inf])
@pytest.mark.parametrize("served", [False, True])
def test_a_loss_that_is_not_finite_lets_nothing_in(
    loss: float, served: bool, made: tuple[FusedModel, list[Path]]
) -> None:
    fused, paths = made
    store = AdapterStore(fused, 1 << 20)
    if served:
        store.register("a", paths[0])

    def measured(handle: Handle) -> Generator[None, None, float]:
        yield
        return loss

    with pytest.raises(GateRefused):
        publish(store, "a", paths[1], measured)
    assert store.names() == (["a"] if served else [])


def test_a_new_version_is_compared_with_what_is_served_in_the_end(
    made: tuple[FusedModel, list[Path]],
) -> None:
    """While the loss of rank 4 is measured, rank 1 takes its place: rank 2 isn't let in any more."""
    fused, paths = made
    store = AdapterStore(fused, 1 << 20)
    store.register("a", paths[3])

    def replacing(handle: Handle) -> Generator[None, None, float]:
        if handle.adapter.rank == 4:
            store.register("a", paths[0])
        return (yield from rank(handle))

    with pytest.raises(GateRefused, match="at most 1"):
        publish(store, "a", paths[1], replacing)
    assert store.version("a") == 3  # 1 is rank 4, 2 was staged


def test_what_fails_to_be_measured_leaves_everything_as_it_was(made: tuple[FusedModel, list[Path]]) -> None:
    fused, paths = made
    store = AdapterStore(fused, 1 << 20)
    store.register("a", paths[0])

    def failing(handle: Handle) -> Generator[None, None, float]:
        yield
        raise RuntimeError("no text")

    with pytest.raises(RuntimeError, match="no text"):
        publish(store, "a", paths[1], failing)
    assert (store.version("a"), store.bytes) == (1, 0)
    with pytest.raises(SettingsError, match="an adapter called"):
        publish(store, "a b", paths[1], rank)


def test_who_gives_up_between_two_pieces_leaves_nothing_behind(made: tuple[FusedModel, list[Path]]) -> None:
    fused, paths = made
    store = AdapterStore(fused, 1 << 20)
    store.register("a", paths[3])
    for pieces in (1, 2):  # the new version is measured, then the one that is served
        job = publishing(store, "a", paths[1], rank)
        for _ in range(pieces):
            next(job)
        job.close()
        assert store.version("a") == 1
    store.unregister("a")
    assert store.bytes == 0  # nobody holds a version
