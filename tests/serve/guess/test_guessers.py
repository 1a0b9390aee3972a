"""The guessers: what each guesses is right where it should be, and no guess changes a token."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engines import engine
from guessed import AlwaysAsked, model, texts_of
from peft_adapters import save, wrapped
from tailorbird.drafting.heads import Heads, model_facts, write_heads
from tailorbird.errors import SettingsError
from tailorbird.kernels import native
from tailorbird.run.fused import FusedModel
from tailorbird.serve.engine import Engine
from tailorbird.serve.guess.model import DraftModel
from tailorbird.serve.guess.skip import SkippingSelf, evenly
from tailorbird.serve.request import Request, Sampling
from tiny import byte_tokenizer, make_model, save_model

pytestmark = pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")


def random_heads(directory: Path, path: str) -> str:
    """Heads that learned nothing: they guess what the model's head makes of the last hidden state."""
    fused = FusedModel(engine(path).model)
    directory.mkdir()
    write_heads(directory, Heads(fused.width, 3), model_facts(fused))
    return str(directory)


def drafts_of(kind: str, path: str, tmp_path: Path) -> str:
    """What ``--draft`` names."""
    if kind == "heads":
        return random_heads(tmp_path / "heads", path)
    if kind == "other":
        return model(tmp_path / "other", num_hidden_layers=1, intermediate_size=64)
    return {"same": path, "skip": "self:skip"}[kind]


def asked(path: str, draft: str, widths: Callable[[], list[int]], **options: Any) -> Engine:
    made = engine(path, draft=draft, **options)
    made.guessing = AlwaysAsked(made.guessing.guessers[0], widths)
    return made


SAMPLINGS = (
    Sampling(temperature=0, ignore_end=True),
    Sampling(temperature=1.0, seed=4, ignore_end=True),
    Sampling(temperature=0.9, top_p=0.8, seed=9, presence_penalty=0.4, ignore_end=True),
)


@pytest.mark.parametrize("kind", ["same", "other", "skip", "heads"])
def test_preempted_cancelled_and_doubled_texts_stay_the_same(kind: str, tmp_path: Path) -> None:
    path, rng = model(tmp_path / "m", num_hidden_layers=3), random.Random(1)
    requests = [
        Request(str(number), tuple(range(number, number + 30)), 50, rng.choice(SAMPLINGS), n=1 + number % 2)
        for number in range(6)
    ]
    plain = texts_of(engine(path, speculative=False), requests)
    made = asked(path, drafts_of(kind, path, tmp_path), lambda: [3, 2, 1][: rng.randrange(4)])
    made.pool.take(made.pool.pages - 6)  # hold the others, so that sequences are preempted
    held = made.pool.used
    found = texts_of(made, requests, rng, cancelled=["3"])
    assert found == {key: text for key, text in plain.items() if key[0] != "3"}
    assert made.pool.used == held
    assert made.scheduler.preemptions > 0
    guesser: Any = made.guessing.guessers[0]
    if isinstance(guesser, DraftModel):
        assert guesser.pool.used == 0
        assert not guesser._readings
    assert made.stats()[f"drafted_tokens/{guesser.name}"] > 0


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_draft_model_that_is_the_model_is_always_right(sampling: Sampling, tmp_path: Path) -> None:
    path = model(tmp_path / "m")
    requests = [Request(str(number), tuple(range(number, 40)), 60, sampling) for number in range(3)]
    plain = texts_of(engine(path, speculative=False), requests)
    made = asked(path, path, lambda: [1, 1, 1])
    assert texts_of(made, requests, random.Random(0)) == plain
    stats = made.stats()
    assert stats["accepted_tokens/model"] == stats["drafted_tokens/model"] > 0


def test_the_model_with_no_block_left_out_is_always_right_with_adapters_too(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    path = model(tmp_path / "m")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    dense = make_model("llama", max_position_embeddings=256)
    adapter = save(wrapped(dense, config), tmp_path / "adapter")
    made = engine(path, draft="self:skip", adapters={"a": str(adapter)})
    blocks = len(made.runner.model.blocks)
    whole = SkippingSelf("whole", made.runner, evenly(blocks, blocks), made.scheduler.has_room)  # type: ignore[arg-type]
    made.guessing = AlwaysAsked(whole, lambda: [1, 1, 1])
    requests = [
        Request(str(number), (1, 2, number), 40, SAMPLINGS[number], adapter="a" if number else None)
        for number in range(3)
    ]
    plain = texts_of(engine(path, speculative=False, adapters={"a": str(adapter)}), requests)
    assert texts_of(made, requests) == plain
    stats = made.stats()
    assert stats["accepted_tokens/whole"] == stats["drafted_tokens/whole"] > 0


def test_texts_that_begin_alike_are_read_once_by_the_draft_model_too(tmp_path: Path) -> None:
    path = model(tmp_path / "m")
    made = asked(path, path, lambda: [1])
    for number in range(2):
        texts_of(made, [Request(str(number), (*range(100), number), 3, SAMPLINGS[0])])
    guesser: Any = made.guessing.guessers[0]
    read: list[int] = []
    step = guesser.model.step

    def watched(ids: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        read.append(len(ids))
        return step(ids, *rest, **more)

    guesser.model.step = watched
    texts_of(made, [Request("again", (*range(100), 9), 3, SAMPLINGS[0])])
    assert read[0] == 101 + 1 - 96


def test_long_prompts_are_read_by_the_draft_model_bit_by_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tailorbird.serve.guess.model.CATCH_UP", 16)
    path = model(tmp_path / "m")
    requests = [Request(str(number), tuple(range(number, 90)), 40, SAMPLINGS[0]) for number in range(2)]
    plain = texts_of(engine(path, speculative=False), requests)
    made = asked(path, path, lambda: [1, 1])
    assert texts_of(made, requests) == plain
    stats = made.stats()
    assert stats["accepted_tokens/model"] == stats["drafted_tokens/model"] > 0


def test_blocks_that_run_are_spread_evenly() -> None:
    for blocks in range(1, 40):
        for kept in range(1, blocks + 1):
            chosen = [block for span in evenly(blocks, kept) for block in span]
            assert len(chosen) == kept
            assert chosen == sorted(set(chosen))
            gaps = [b - a for a, b in itertools.pairwise(chosen)]
            assert not gaps or max(gaps) - min(gaps) <= 1
            assert kept < 2 or (chosen[0], chosen[-1]) == (0, blocks - 1)


def test_what_does_not_fit_is_refused_and_says_why(tmp_path: Path) -> None:
    path = model(tmp_path / "m")
    other = model(tmp_path / "other")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(other)
    with pytest.raises(SettingsError, match="vocabulary"):
        engine(path, draft=other)
    heads = random_heads(tmp_path / "heads", model(tmp_path / "wider", hidden_size=128))
    with pytest.raises(SettingsError, match="train heads on this model"):
        engine(path, draft=heads)
    modules = str(save_model(tmp_path / "modules", "llama", hidden_act="tanh"))
    with pytest.raises(SettingsError, match="compiled blocks"):
        engine(modules, draft="self:skip")


def test_the_memory_of_a_draft_model_counts(tmp_path: Path) -> None:
    path = model(tmp_path / "m")
    weights = sum(
        t.nbytes for t in {t.data_ptr(): t for t in engine(path).model.state_dict().values()}.values()
    )
    memory = 4 * weights
    alone, both = engine(path, memory_bytes=memory), engine(path, memory_bytes=memory, draft=path)
    assert both.pool.pages < alone.pool.pages
    assert both.guessing.guessers[0].pool.pages == both.pool.pages  # type: ignore[attr-defined]
