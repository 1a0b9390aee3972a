"""Texts that begin with what an adapter learned are those of PEFT's model, whatever is served beside them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compressed import save_compressed
from engines import FOUR_BITS, OTHERS, Watched, engine, greedy, saved
from tailorbird.adapt.methods.attach import attach
from tailorbird.adapt.methods.registry import method_named
from tailorbird.adapt.open import load_adapted
from tailorbird.adapt.save import write_adapter
from tailorbird.kernels import native
from tailorbird.kernels.blocks import PAGE
from tailorbird.model.checkpoint import open_checkpoint
from tailorbird.model.identity import identity
from tailorbird.model.load import load
from tailorbird.serve.engine import Engine
from tailorbird.serve.request import Request
from tiny import byte_tokenizer, make_model

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")

KINDS = ("prompt-tuning", "prefix-tuning")
#: logits that lie closer are equally good; and how far the served ones may be off
TIE, CLOSE = 1e-4, 2e-3
#: below, at and above a page, and more than one
PLACES = (1, 5, PAGE, PAGE + 8)
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def model(directory: Path, architecture: str = "llama", **config: Any) -> str:
    """A compressed model whose texts may be 256 tokens."""
    long = {"n_positions": 256} if architecture == "gpt2" else {"max_position_embeddings": 256}
    save_compressed(directory, make_model(architecture, **long, **config), FOUR_BITS)
    byte_tokenizer().save_pretrained(directory)
    return str(directory)


def learned(path: str, directory: Path, kind: str, places: int, seed: int = 1) -> str:
    """What `tune` writes for a model, far from where it starts."""
    loaded = load(path)
    generator = torch.Generator().manual_seed(seed)
    method = attach(method_named(kind, tokens=places), loaded, {}, generator)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    directory.mkdir()
    origin = {"base": identity(open_checkpoint(path)), "base_name": path}
    write_adapter(directory, {}, method, [], path, origin)
    return str(directory)


class Reference:
    """Models by the name of the adapter, each for one text at a time."""

    def __init__(self, path: str, adapters: dict[str, str]) -> None:
        self.models: dict[str | None, Any] = {None: load(path)}
        for name, directory in adapters.items():
            self.models[name] = load_adapted(path, Path(directory))

    def logits(self, adapter: str | None, ids: list[int]) -> Tensor:
        """Behind each token of a text ``[tokens, vocab_size]``."""
        with torch.no_grad():
            found = self.models[adapter](input_ids=torch.tensor([ids])).logits[0]
        return found[-len(ids) :].float()

    def check(self, request: Request, tokens: list[int], logits: dict[Any, Tensor] | None = None) -> None:
        """Every token is the best, or as good as the best; and the logits are those that were served."""
        assert len(tokens) == request.max_tokens
        text = [*request.prompt, *tokens]
        rows = self.logits(request.adapter, text)[len(request.prompt) - 1 : -1]
        for row, token in zip(rows, tokens, strict=True):
            assert float(row.max() - row[token]) < TIE
        if logits is None:
            return
        begun = (
            self.models[request.adapter].peft_config["default"].num_virtual_tokens if request.adapter else 0
        )
        whole = [*range(-1, -1 - begun, -1), *text]
        for row, at in zip(rows, range(begun + len(request.prompt), len(whole)), strict=True):
            served = logits[request.id, at, hash(tuple(whole[:at]))]
            torch.testing.assert_close(served, row, atol=CLOSE, rtol=CLOSE)


def check_mixed(
    made: Engine, reference: Reference, names: list[str | None], seed: int, requests: int, longest: int = 20
) -> Watched:
    """Requests at random moments, of all adapters, some with several continuations, some cancelled."""
    rng, run, held = random.Random(seed), Watched(made), made.pool.used
    openings = [tuple(rng.randrange(256) for _ in range(rng.randrange(1, 60))) for _ in range(2)]
    sent, gone = {}, set()
    for number in range(requests):
        prompt = (*rng.choice(openings), *(rng.randrange(256) for _ in range(rng.randrange(1, 6))))
        request = greedy(
            str(number), prompt, rng.randrange(1, longest), n=rng.choice([1, 1, 3]),
            adapter=names[number % len(names)],
        )  # fmt: skip
        sent[request.id] = request
        made.add(request)
        for _ in range(rng.randrange(5)):
            run.step()
        if rng.random() < 0.1:
            gone.add(request.id)
            made.cancel(request.id)
    run.run()
    assert made.pool.used == held
    for id in sent.keys() - gone:
        for index in range(sent[id].n):
            reference.check(sent[id], run.tokens[id, index], run.logits)
    return run


def served(path: str, adapters: dict[str, str], **options: Any) -> Engine:
    return engine(path, adapters=adapters, **options)


@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_those_of_the_tuned_model(kind: str, places: int, tmp_path: Path) -> None:
    path = model(tmp_path / "m")
    adapters = {"a": learned(path, tmp_path / "a", kind, places)}
    made = served(path, adapters, max_sequences=4, step_tokens=24)
    assert made.info["path"] == "fused"
    reference = Reference(path, adapters)
    check_mixed(made, reference, ["a", None], places, 8)
    plain, begun = (torch.tensor(made.embed((1, 2, 3), name)) for name in (None, "a"))
    assert not torch.allclose(plain, begun, atol=1e-3)


@pytest.mark.parametrize(
    "architecture", ["gemma2", "gpt2", "gpt_neox", "mistral", "opt", "phi3", "qwen3", "falcon"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_block_begins_with_them(kind: str, architecture: str, tmp_path: Path) -> None:
    if (architecture, kind) == ("falcon", "prefix-tuning"):
        pytest.skip("tune has no prefix tuning for it")
    path = model(tmp_path / "m", architecture)
    adapters = {"a": learned(path, tmp_path / "a", kind, 37)}
    made = served(path, adapters, max_sequences=4, step_tokens=24)
    assert made.info["path"] == "fused"
    check_mixed(made, Reference(path, adapters), ["a"], 3, 4)


@pytest.mark.parametrize("architecture", sorted(OTHERS))
@pytest.mark.parametrize("kind", KINDS)
def test_modules_over_pages_begin_with_them(kind: str, architecture: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "m", architecture)
    adapters = {"a": learned(path, tmp_path / "a", kind, 37)}
    made = served(path, adapters, max_sequences=4, step_tokens=24)
    assert made.info["path"] == "paged"
    check_mixed(made, Reference(path, adapters), ["a", None], 4, 5, longest=12)
