"""Heads learn to guess what their model writes, resume to the same bits, and change no token."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from engines import engine
from guessed import AlwaysAsked, model, texts_of
from tailorbird.drafting import train
from tailorbird.drafting.heads import Heads, model_facts, read_heads, write_heads
from tailorbird.drafting.train import train_heads
from tailorbird.errors import CheckpointError, ResumeError, SettingsError
from tailorbird.kernels import native
from tailorbird.model.load import load
from tailorbird.run.fused import FusedModel
from tailorbird.serve.request import Request, Sampling
from tiny import byte_tokenizer, make_model, save_model

pytestmark = pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")

SMALL: dict[str, Any] = {"sequences": 24, "length": 48, "epochs": 3, "count": 2}


class Stop(Exception):
    """Stands for a kill."""


def asked(path: str, heads: Path, widths: tuple[int, ...] = (2, 1)) -> Any:
    made = engine(path, draft=str(heads))
    made.guessing = AlwaysAsked(made.guessing.guessers[0], lambda: list(widths))
    return made


def accepted_share(path: str, heads: Path, requests: list[Request], plain: Any) -> float:
    made = asked(path, heads, (1, 1))
    assert texts_of(made, requests, random.Random(0)) == plain
    stats = made.stats()
    assert stats["drafted_tokens/heads"] > 0
    return stats["accepted_tokens/heads"] / stats["drafted_tokens/heads"]


def model_that_can_be_foreseen(directory: Path) -> str:
    """One whose blocks add nothing: what follows depends on the last token alone, and is nearly certain."""
    made = make_model("llama", max_position_embeddings=256)
    for layer in made.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    made.model.embed_tokens.weight.data *= 40
    made.lm_head.weight.data *= 15
    made.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return str(directory)


def test_trained_heads_guess_better_and_change_nothing(tmp_path: Path) -> None:
    path = model_that_can_be_foreseen(tmp_path / "m")
    requests = [
        Request(str(number), (number, 7), 50, Sampling(temperature=number % 2, seed=3, ignore_end=True))
        for number in range(6)
    ]
    plain = texts_of(engine(path, speculative=False), requests)
    fused = FusedModel(load(path))
    (tmp_path / "none").mkdir()
    write_heads(tmp_path / "none", Heads(fused.width, 2), model_facts(fused))
    trained = train_heads(path, tmp_path / "heads", **(SMALL | {"sequences": 200, "epochs": 5}))
    assert trained.acceptance[0] > 0.3
    assert trained.tokens_per_step > 1.3
    before, after = (
        accepted_share(path, tmp_path / name, requests, plain) for name in ("none", "heads")
    )  # fmt: skip
    assert after > 0.1 + before


def test_an_interrupted_training_goes_on_to_the_same_heads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = model(tmp_path / "m")
    settings = SMALL | {"sequences": 4, "length": 24}
    whole = train_heads(path, tmp_path / "whole", **settings)
    save = train._save

    def stop(directory: Path, *rest: Any) -> None:
        if directory.name == "epoch-2":
            raise Stop
        save(directory, *rest)

    monkeypatch.setattr(train, "_save", stop)
    with pytest.raises(Stop):
        train_heads(path, tmp_path / "again", **settings)
    monkeypatch.setattr(train, "_save", save)
    with pytest.raises(ResumeError, match="seed"):
        train_heads(path, tmp_path / "again", **settings, seed=5)
    again = train_heads(path, tmp_path / "again", **settings, resume=True)
    assert again.acceptance == whole.acceptance
    for name in ("heads.json", "heads.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(file.name for file in (tmp_path / "again").iterdir()) == ["heads.json", "heads.safetensors"]


def test_guesses_of_training_and_serving_are_the_same(tmp_path: Path) -> None:
    path = model(tmp_path / "m")
    train_heads(path, tmp_path / "heads", **(SMALL | {"epochs": 1, "sequences": 4}))
    made = asked(path, tmp_path / "heads", (1, 1))
    fused, guesser = made.runner.model, made.guessing.guessers[0]
    seen: list[tuple[list[int], Any]] = []
    guess = guesser.guess

    def watched(sequences: Any, widths: Any) -> Any:
        found = guess(sequences, widths)
        seen.extend((list(text.tokens), one) for text, one in zip(sequences, found, strict=True))
        return found

    guesser.guess = watched
    texts_of(made, [Request("a", (1, 2, 3), 20, Sampling(temperature=0, ignore_end=True))])
    heads, lesson = read_heads(tmp_path / "heads", fused), train._Lesson(fused, 2)
    assert len(seen) > 10
    for tokens, one in seen:
        if len(one) < 2:
            continue
        ids = torch.tensor([[*tokens, *one.tokens]])
        length = ids.shape[1]
        pages = fused.pages(1)
        pages.reach(length)
        places = torch.arange(length, dtype=torch.int32)
        states = fused.normed(fused.read(ids[0], places, torch.zeros_like(places), pages))[None]
        with torch.no_grad():
            logits = lesson.guesses(heads, states, ids, torch.tensor([[0, len(tokens) - 2]]))
        assert [int(row.argmax()) for row in logits][: len(one)] == list(one.tokens)


def test_new_heads_add_nothing() -> None:
    heads, hidden = Heads(8, 2), torch.randn(3, 8)
    assert torch.equal(heads(1, hidden, [torch.randn(3, 8)] * 2), hidden)


def test_damaged_heads_and_unsuited_models_are_refused(tmp_path: Path) -> None:
    path = model(tmp_path / "m")
    train_heads(path, tmp_path / "heads", **(SMALL | {"epochs": 1, "sequences": 2}))
    fused = FusedModel(engine(path).model)
    described = tmp_path / "heads" / "heads.json"
    described.write_text(described.read_text().replace('"heads": 2', '"heads": 3'))
    with pytest.raises(CheckpointError, match=r"3\.in"):
        read_heads(tmp_path / "heads", fused)
    described.write_text(described.read_text().replace('"version": 1', '"version": 9'))
    with pytest.raises(CheckpointError, match="version 9"):
        read_heads(tmp_path / "heads", fused)
    with pytest.raises(SettingsError, match="--length"):
        train_heads(path, tmp_path / "short", length=3)
    modules = str(save_model(tmp_path / "modules", "llama", hidden_act="tanh"))
    with pytest.raises(SettingsError, match="compiled blocks"):
        train_heads(modules, tmp_path / "no")
