"""The loss is that of one pass over each text, however it is cut and whatever runs meanwhile."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressed import save_compressed
from peft_adapters import logits, prompt, save, wrapped
from tailorbird.errors import GateRefused, SettingsError
from tailorbird.formats.packed import IntegerCoding
from tailorbird.kernels import native
from tailorbird.serve.adapters.held_out import WINDOW, Example, mean_loss, windows
from tailorbird.serve.engine import Engine
from tailorbird.serve.interface import EngineOptions
from tailorbird.serve.request import Request, Sampling
from tiny import byte_tokenizer, make_model

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")

#: How far the sums of one pass over a text and of several windows may be apart, in nats.
CLOSE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and adapters `0` to `3`."""
    found = tmp_path_factory.mktemp("held_out")
    dense = save_compressed(found / "m", make_model("qwen2"), IntegerCoding(4, 32))
    byte_tokenizer().save_pretrained(found / "m")
    for seed in range(4):
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"])
        save(wrapped(dense, config, seed), found / "adapters" / str(seed))
    return found


@pytest.fixture
def engine(folder: Path) -> Engine:
    options = EngineOptions(
        str(folder / "m"), {"a": str(folder / "adapters" / "0")}, max_sequences=4,
        adapter_directory=str(folder / "adapters"),
    )  # fmt: skip
    return Engine(options, log=lambda _: None)


def finished(job: Generator[None, None, Any]) -> tuple[Any, int]:
    """What a job gives, and in how many pieces."""
    pieces = 0
    while True:
        try:
            next(job)
            pieces += 1
        except StopIteration as end:
            return end.value, pieces


def reference(made: Engine, examples: list[Example], adapter: Any) -> float:
    """One pass over each text, and the mean over all tokens that count."""
    losses = []
    for example in examples:
        ids = torch.tensor(example.tokens)
        rows = logits(made.runner.model, ids, adapter)  # type: ignore[attr-defined]
        losses.append(torch.nn.functional.cross_entropy(rows[:-1].double(), ids[1:], reduction="none"))
        losses[-1] = losses[-1][example.first - 1 :]
    return float(torch.cat(losses).mean())


@given(st.integers(1, 500), st.integers(1, 500))
@settings(deadline=None)
def test_windows_are_short_cover_a_text_once_and_tell_prompts_from_the_rest(first: int, counted: int) -> None:
    found = windows(first + counted, first)
    assert [token for start, stop in found for token in range(start, stop)] == list(
        range(first + counted - 1)
    )
    for start, stop in found:
        assert 0 < stop - start <= WINDOW
        assert stop <= first - 1 or start >= first - 1


def test_the_loss_is_that_of_one_pass_over_each_text(engine: Engine) -> None:
    examples = [
        Example(tuple(prompt(length, seed=length).tolist()), first)
        for length, first in ((2, 1), (2 * WINDOW + 9, 1), (200, 150), (WINDOW + 1, WINDOW), (90, 89))
    ]
    handle = engine.adapters_of_model().acquire("a")
    loss, pieces = finished(mean_loss(examples, engine.runner, engine.pool, handle))
    assert loss == pytest.approx(reference(engine, examples, handle.adapter), abs=CLOSE)
    assert loss != pytest.approx(reference(engine, examples, None), abs=1e-3)
    assert pieces == sum(len(windows(len(one.tokens), one.first)) for one in examples)
    assert engine.pool.used == 0


def test_a_text_waits_until_it_has_pages(engine: Engine) -> None:
    example = Example(tuple(prompt(100).tolist()))
    handle = engine.adapters_of_model().acquire("a")
    job = mean_loss([example], engine.runner, engine.pool, handle)
    held = engine.pool.take(engine.pool.available - 1)
    assert held is not None
    for _ in range(5):
        next(job)
    assert engine.pool.used == len(held)
    engine.pool.release(held)
    loss, _ = finished(job)
    assert loss == pytest.approx(reference(engine, [example], handle.adapter), abs=CLOSE)


def test_requests_keep_their_version_and_their_bits_while_another_is_published(
    engine: Engine, folder: Path
) -> None:
    """Every version is let in by text that it wrote itself; running texts end as if nothing had happened."""
    plain = Request("old", (5, 6, 7), 60, Sampling(temperature=0, ignore_end=True), adapter="a")

    def written(request: Request) -> list[int]:
        engine.add(request)
        return continued(request.id)

    def continued(id: str) -> list[int]:
        tokens: list[int] = []
        while engine.busy:
            for output in engine.step():
                tokens += output.tokens if output.id == id else ()
        return tokens

    before = written(plain)
    engine.load_adapter("b", str(folder / "adapters" / "1"))
    other = written(Request("b", plain.prompt, 60, plain.sampling, adapter="b"))
    assert other != before
    engine.add(plain)
    tokens = [token for output in engine.step() for token in output.tokens]
    job = engine.publish_adapter("a", str(folder / "adapters" / "1"), [([*plain.prompt, *other], 3)])
    while True:
        try:
            next(job)
        except StopIteration as end:
            published = end.value
            break
        tokens += [token for output in engine.step() for token in output.tokens]
    assert len(tokens) < 60  # it was still running
    assert published["loss"] < published["loss_before"]
    assert tokens + continued("old") == before
    assert written(Request("new", plain.prompt, 60, plain.sampling, adapter="a")) == other
    with pytest.raises(GateRefused, match="at most"):
        finished(engine.publish_adapter("a", str(folder / "adapters" / "0"), [([*plain.prompt, *other], 3)]))
    assert engine.adapters_of_model().version("a") == published["version"]
    assert engine.rollback_adapter("a") == 1
    assert written(Request("again", plain.prompt, 60, plain.sampling, adapter="a")) == before


def test_what_cannot_be_measured_changes_nothing(engine: Engine, folder: Path) -> None:
    path = str(folder / "adapters" / "1")
    wrong: list[list[tuple[list[int], int]]] = [
        [],
        [([1], 1)],
        [([1, 2], 2)],
        [([1, 2], 0)],
        [([1, 99_999], 1)],
    ]
    for held_out in wrong:
        with pytest.raises(SettingsError):
            finished(engine.publish_adapter("a", path, held_out))
    with pytest.raises(SettingsError):
        finished(engine.publish_adapter("a", str(folder / "m"), [([1, 2], 1)]))
    assert engine.adapters_of_model().version("a") == 1
    assert engine.pool.used == 0
