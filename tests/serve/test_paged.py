"""The engine over a model's own modules: each text as `generate` writes it, with adapters and guesses too."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compressed import save_compressed
from engines import OTHERS, pruned, saved
from peft_adapters import save, wrapped
from tailorbird.formats.packed import BinaryCoding, Coding, IntegerCoding
from tailorbird.kernels import native
from tailorbird.run.generate import ModuleDecoding
from tailorbird.run.parts import Unsuited
from tailorbird.serve import runner
from tailorbird.serve.engine import Engine
from tailorbird.serve.guess.pace import Pace
from tailorbird.serve.interface import EngineOptions
from tailorbird.serve.request import Output, Request, Sampling
from tiny import byte_tokenizer, make_model

#: logits that lie closer are equally good
TIE = 1e-4
#: most places, as a share of all that a test looks at, where two tokens may be equally good
MOST_TIES = 0.02

Record = Callable[[str, object], None]


def engine(path: str, **options: Any) -> Engine:
    made = Engine(EngineOptions(path, **options), log=lambda _: None)
    assert made.info["path"] == "paged"
    assert made.info["note"]
    return made


def greedy(id: str, prompt: tuple[int, ...], count: int, **more: Any) -> Request:
    return Request(id, prompt, count, Sampling(temperature=0, ignore_end=True), **more)


def run(made: Engine, found: list[Output], steps: int = 20_000) -> None:
    for _ in range(steps):
        if not made.busy:
            return
        found += made.step()
    assert steps < 20_000, "it doesn't end"


def texts_in(outputs: list[Output]) -> dict[tuple[str, int], list[int]]:
    texts: dict[tuple[str, int], list[int]] = {}
    for output in outputs:
        texts.setdefault((output.id, output.index), []).extend(output.tokens)
    return texts


def check_greedy(model: Any, prompt: tuple[int, ...], tokens: list[int], count: int) -> int:
    """Every token is the best by the model's own modules, one request alone, or as good as the best.

    Returns at how many places another token would have been as good.
    """
    assert len(tokens) == count
    decoding, fed = ModuleDecoding(model), torch.tensor([prompt])
    ties = 0
    for token in tokens:
        logits = decoding.read(fed)[0]
        assert float(logits.max() - logits[token]) < TIE
        if float(logits.topk(2).values.diff().abs()) < TIE:
            ties += 1
        else:
            assert token == int(logits.argmax())
        fed = torch.tensor([[token]])
    return ties


def check_ties(record_property: Record, ties: int, places: int) -> None:
    """At few places two tokens were equally good; the test's record says at how many."""
    record_property("ties", f"{ties} of {places} places")
    assert ties <= MOST_TIES * places, f"{ties} of {places} places are ties"


def check_random_schedule(
    made: Engine,
    record_property: Record,
    seed: int,
    requests: int,
    symbols: int = 256,
    longest: int = 30,
) -> None:
    """Requests at random moments that share prefixes, some with several continuations, some cancelled."""
    rng = random.Random(seed)
    openings = [tuple(rng.randrange(symbols) for _ in range(rng.randrange(1, 80))) for _ in range(3)]
    found: list[Output] = []
    sent, gone, held = {}, set(), made.pool.used
    for number in range(requests):
        prompt = (*rng.choice(openings), *(rng.randrange(symbols) for _ in range(rng.randrange(1, 9))))
        request = greedy(str(number), prompt, rng.randrange(1, longest), n=rng.choice([1, 1, 1, 3]))
        sent[request.id] = request
        made.add(request)
        run(made, found, rng.randrange(6))
        if rng.random() < 0.1:
            gone.add(request.id)
            made.cancel(request.id)
    run(made, found)
    assert made.pool.used == held
    texts, ties, places = texts_in(found), 0, 0
    for id in sent.keys() - gone:
        for index in range(sent[id].n):
            ties += check_greedy(made.model, sent[id].prompt, texts[id, index], sent[id].max_tokens)
            places += sent[id].max_tokens
    check_ties(record_property, ties, places)


def refuse(model: Any) -> None:
    raise Unsuited("no compiled blocks here")


@pytest.mark.parametrize("architecture", sorted(OTHERS))
def test_every_text_is_written_as_alone(architecture: str, tmp_path: Path, record_property: Record) -> None:
    path = saved(tmp_path / "m", architecture)
    made = engine(path, max_sequences=4, step_tokens=24)
    check_random_schedule(made, record_property, seed=1, requests=8)
    assert made.stats()["cached_tokens"] > 0


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3_text", "gpt2", "opt", "qwen2", "phi3"])
def test_packed_models_without_compiled_blocks_write_the_same(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Record
) -> None:
    monkeypatch.setattr(runner, "FusedModel", refuse)
    save_compressed(tmp_path / "m", make_model(architecture), IntegerCoding(4, 32))
    byte_tokenizer().save_pretrained(tmp_path / "m")
    made = engine(str(tmp_path / "m"), max_sequences=4, step_tokens=24)
    check_random_schedule(made, record_property, seed=2, requests=6)


def test_a_checkpoint_whose_blocks_have_heads_of_their_own_writes_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Record
) -> None:
    monkeypatch.setattr(runner, "FusedModel", refuse)
    made = engine(pruned(tmp_path / "m"), max_sequences=4, step_tokens=24)
    check_random_schedule(made, record_property, seed=4, requests=6)


@pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")
@pytest.mark.parametrize(
    ("coding", "ordered", "said"),
    [
        (BinaryCoding(32), False, "a linear of coding binary g32"),
        (IntegerCoding(4, 32), True, "a linear with reordered inputs"),
    ],
    ids=["binary", "reordered"],
)
def test_formats_that_compiled_blocks_do_not_run_write_the_same(
    coding: Coding, ordered: bool, said: str, tmp_path: Path, record_property: Record
) -> None:
    save_compressed(tmp_path / "m", make_model("llama"), coding, ordered=ordered, tokenizer=byte_tokenizer())
    made = engine(str(tmp_path / "m"), max_sequences=4, step_tokens=24)
    assert said in made.info["note"]
    check_random_schedule(made, record_property, seed=3, requests=6)


def test_a_trained_model_with_heads_of_eight_channels_writes_its_stories(
    assets: Path, record_property: Record
) -> None:
    made = engine(str(assets / "models" / "stories260k"), max_sequences=4, step_tokens=32)
    tokenizer, found = made._tokenizer, list[Output]()
    prompts = [
        tuple(tokenizer(text).input_ids) for text in ("Once upon a time", "One day, a dog", "Once there")
    ]
    for number, prompt in enumerate(prompts):
        made.add(greedy(str(number), prompt, 60))
        run(made, found, 3)
    run(made, found)
    texts = texts_in(found)
    ties = sum(
        check_greedy(made.model, prompt, texts[str(number), 0], 60) for number, prompt in enumerate(prompts)
    )
    check_ties(record_property, ties, 60 * len(prompts))


@pytest.mark.parametrize("seed", range(3))
def test_few_pages_small_steps_and_guesses_change_nothing(
    seed: int, tmp_path: Path, record_property: Record
) -> None:
    rng = random.Random(seed)
    path = saved(tmp_path / "m", "granite", max_position_embeddings=256)
    made = engine(path, max_sequences=rng.choice([3, 5]), step_tokens=rng.choice([7, 33]))
    made.pool.take(made.pool.pages - rng.choice([5, 6]))  # hold the others, so that sequences are preempted
    check_random_schedule(made, record_property, seed, requests=12, symbols=4, longest=60)
    assert made.stats()["preemptions"] > 0


def test_guesses_are_checked_many_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Record
) -> None:
    monkeypatch.setattr(Pace, "seconds", lambda self, tokens: 1.0)  # as if more tokens took no longer
    made = engine(saved(tmp_path / "m", "granite"), max_sequences=2)
    prompt, found = (1, 2, 3) * 8, list[Output]()
    made.add(greedy("a", prompt, 90))
    run(made, found)
    check_ties(record_property, check_greedy(made.model, prompt, texts_in(found)["a", 0], 90), 90)
    assert made.stats()["accepted_tokens"] > 0  # this model soon repeats itself


@pytest.mark.parametrize("kind", ["lora", "dora", "vera", "ia3"])
def test_texts_of_a_step_have_adapters_of_their_own(
    kind: str, tmp_path: Path, record_property: Record
) -> None:
    peft = pytest.importorskip("peft")
    path = saved(tmp_path / "m", "granite")
    config = {
        "lora": lambda: peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]),
        "dora": lambda: peft.LoraConfig(r=4, target_modules=["v_proj", "up_proj"], use_dora=True),
        "vera": lambda: peft.VeraConfig(r=8, target_modules=["q_proj", "o_proj"]),
        "ia3": lambda: peft.IA3Config(
            target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
    }[kind]
    made = engine(path, max_sequences=4, step_tokens=24, adapter_directory=str(tmp_path))
    models = {None: made.model}
    for seed, name in enumerate(["a", "b"]):
        models[name] = wrapped(made.model, config(), seed)
        made.load_adapter(name, str(save(models[name], tmp_path / name)))
    sent, found, rng = {}, list[Output](), random.Random(0)
    for number in range(9):
        prompt = (1, 2, 3, 4, *(rng.randrange(256) for _ in range(rng.randrange(40, 60))))
        request = greedy(str(number), prompt, 6, adapter=[None, "a", "b"][number % 3])
        sent[request.id] = request
        made.add(request)
        run(made, found, 2)
    run(made, found)
    texts = texts_in(found)
    ties = sum(
        check_greedy(models[request.adapter], request.prompt, texts[id, 0], 6) for id, request in sent.items()
    )
    check_ties(record_property, ties, 6 * len(sent))
    plain, adapted = (torch.tensor(made.embed((1, 2, 3), name)) for name in (None, "a"))
    assert not torch.allclose(plain, adapted, atol=1e-3)
