"""Texts that begin with what an adapter learned are those of PEFT's model, whatever is served beside them."""

from __future__ import annotations

import asyncio
import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compressed import save_compressed
from engines import FOUR_BITS, OTHERS, PAGE_BYTES, Watched, engine, greedy, saved
from folded_models import save_folded
from guessed import guess_always
from over_http import asked
from peft_adapters import change_config, save, wrapped
from tailorbird.adapt.methods.attach import attach
from tailorbird.adapt.methods.registry import method_named
from tailorbird.adapt.open import load_adapted
from tailorbird.adapt.save import write_adapter
from tailorbird.errors import CheckpointError, GateRefused, SettingsError, TailorbirdError
from tailorbird.kernels import native
from tailorbird.kernels.blocks import PAGE
from tailorbird.linear.rotate.weights import ROTATION_FILE
from tailorbird.model.checkpoint import open_checkpoint
from tailorbird.model.identity import identity
from tailorbird.model.load import load
from tailorbird.run.parts import Unsuited
from tailorbird.serve import runner
from tailorbird.serve.adapters.held_out import Example, mean_loss, pieces
from tailorbird.serve.adapters.versions import read_records
from tailorbird.serve.engine import Engine
from tailorbird.serve.interface import EngineOptions
from tailorbird.serve.request import BeamSearch, Request, Sampling
from tiny import byte_tokenizer, make_model, save_model

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")

KINDS = ("prompt-tuning", "prefix-tuning")
#: logits that lie closer are equally good; and how far the served ones may be off
TIE, CLOSE = 1e-4, 2e-3
#: below, at and above a page, and more than one
PLACES = (1, 5, PAGE, PAGE + 8)
TENSORS = "adapter_model.safetensors"


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
    directory.mkdir(parents=True)
    made = {"method": kind, "method_settings": {"tokens": places}, "targets": ["all"], "seed": seed}
    origin = {"base": identity(open_checkpoint(path)), "base_name": path, "method": made}
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
        config = self.models[request.adapter].peft_config["default"] if request.adapter else None
        begun = getattr(config, "num_virtual_tokens", 0)
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


def company(folder: Path) -> tuple[str, dict[str, str], Reference]:
    """A model, adapters of three kinds, and models with them."""
    path = str(folder / "m")
    dense = save_compressed(folder / "m", make_model("llama", max_position_embeddings=256), FOUR_BITS)
    byte_tokenizer().save_pretrained(path)
    adapters = {
        "prompt": learned(path, folder / "prompt", "prompt-tuning", 37, 1),
        "prefix": learned(path, folder / "prefix", "prefix-tuning", 5, 2),
    }
    reference = Reference(path, adapters)
    reference.models["lora"] = wrapped(dense, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    adapters["lora"] = str(save(reference.models["lora"], folder / "lora"))
    return path, adapters, reference


NAMES: list[str | None] = ["prompt", "lora", None, "prefix"]


def no_blocks(model: Any) -> None:
    raise Unsuited("no compiled blocks here")


@pytest.mark.parametrize("over", ["fused", "paged"])
@pytest.mark.parametrize("seed", range(2))
def test_all_kinds_share_steps_while_pages_are_short(
    seed: int, over: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if over == "paged":
        monkeypatch.setattr(runner, "FusedModel", no_blocks)
    path, adapters, reference = company(tmp_path)
    made = served(path, adapters, max_sequences=5, step_tokens=(7, 33)[seed])
    assert made.info["path"] == over
    for name in adapters:
        made.embed((1, 2), name)  # they have their room
    made.pool.take(made.pool.available - 9)
    check_mixed(made, reference, NAMES, seed, 14, longest=60)
    assert made.stats()["preemptions"] > 0


def test_pages_that_were_swapped_or_dropped_come_back(tmp_path: Path) -> None:
    path, adapters, reference = company(tmp_path)
    made = served(path, adapters, max_sequences=4, step_tokens=40, swap_memory_bytes=8 << 20)
    store = made.adapters_of_model()
    made.swap.costs.worth = lambda tier: True  # type: ignore[union-attr, method-assign]
    for name in adapters:
        made.embed((1, 2), name)
    held = made.pool.take(made.pool.available - 12)
    check_mixed(made, reference, NAMES, 5, 16, longest=40)
    assert made.stats()["swapped_in_pages"] > 0
    made.pool.release(held)
    while store.drop_oldest():
        pass
    assert store.bytes == 0
    check_mixed(made, reference, NAMES, 5, 4)


def test_bits_are_those_of_a_text_alone(tmp_path: Path) -> None:
    path, adapters, _ = company(tmp_path)
    requests = [
        greedy(str(number), tuple(range(number, 3 * number + 20)), 12, adapter=NAMES[number % 4])
        for number in range(8)
    ]
    together = Watched(served(path, adapters, max_sequences=8, step_tokens=16, speculative=False))
    for request in requests:
        together.engine.add(request)
    together.run()
    for request in requests:
        alone = Watched(served(path, adapters, step_tokens=512, speculative=False))
        alone.engine.add(request)
        alone.run()
        assert alone.tokens[request.id, 0] == together.tokens[request.id, 0]
        for key, row in alone.logits.items():
            assert torch.equal(row, together.logits[key])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("places", [5, PAGE, PAGE + 8])
def test_texts_find_pages_of_others_and_count_their_prompts_only(
    kind: str, places: int, tmp_path: Path
) -> None:
    path = model(tmp_path / "m")
    adapters = {name: learned(path, tmp_path / name, kind, places, seed) for seed, name in enumerate("ab")}
    made, prompt = served(path, adapters), tuple(range(70))

    def cached(id: str, name: str | None, text: tuple[int, ...] = prompt) -> int:
        run = Watched(made)
        made.add(greedy(id, text, 1, adapter=name))
        run.run()
        assert made.pool.used == 0
        return run.outputs[0].cached_tokens

    whole = (places + len(prompt) - 1) // PAGE * PAGE - places
    assert cached("0", "a") == 0
    assert cached("1", "a") == whole
    assert cached("2", "b") == 0  # another version's are others, and so are nobody's
    assert cached("3", None) == 0
    assert cached("4", "a", (*prompt[:-1], 200)) == whole
    assert cached("5", "a", (9, *prompt)) == 0
    # the first page goes, those behind it stay
    made.add(greedy("keys", prompt, 1, adapter="a"))
    (sequence,) = made.scheduler.waiting
    (first,) = made.pool.find(sequence.keys_of_full_pages(PAGE, PAGE))
    made.cancel("keys")
    made.pool.release([first])
    made.pool._idle.move_to_end(first, last=False)
    held = made.pool.take(len(made.pool._blank) + 1)
    assert held is not None
    assert first in held
    made.pool.release(held)
    assert cached("6", "a") == (whole if places >= PAGE else 0)


@pytest.mark.parametrize("kind", KINDS)
def test_beams_and_generate_are_those_of_peft(kind: str, tmp_path: Path) -> None:
    path = model(tmp_path / "m")
    adapters = {"a": learned(path, tmp_path / "a", kind, 37)}
    made, reference = served(path, adapters, max_sequences=6), Reference(path, adapters)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    for beams in (1, 3):
        expected = reference.models["a"].generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, num_beams=beams,
            do_sample=False, eos_token_id=-1, pad_token_id=0,
        )  # fmt: skip
        run = Watched(made)
        searched = None if beams == 1 else BeamSearch(beams)
        sampling = Sampling(temperature=0, ignore_end=True)
        made.add(Request(str(beams), tuple(ids[0].tolist()), 20, sampling, adapter="a", beams=searched))
        run.run()
        assert run.tokens[str(beams), 0] == expected[0, -20:].tolist()
        assert made.pool.used == 0


def test_searches_are_the_same_while_pages_are_short(tmp_path: Path) -> None:
    path, adapters, _ = company(tmp_path)
    found = []
    for pages in (9, 0):
        made = served(path, adapters, max_sequences=6, step_tokens=24, speculative=False)
        for name in adapters:
            made.embed((1, 2), name)
        held = made.pool.take(made.pool.available - pages) if pages else []
        assert held is not None
        run = Watched(made)
        for number, name in enumerate(NAMES):
            prompt = tuple(range(number, number + 45))
            made.add(Request(str(number), prompt, 40, Sampling(), adapter=name, n=2, beams=BeamSearch(3)))
            made.add(greedy(f"greedy {number}", prompt, 40, adapter=name))
        run.run()
        assert made.pool.used == len(held)
        assert (made.stats()["preemptions"] > 0) == bool(pages)
        found.append(run.tokens)
    assert found[0] == found[1]


def test_guesses_from_the_text_itself_change_nothing(tmp_path: Path) -> None:
    path, adapters, reference = company(tmp_path)
    made = served(path, adapters, max_sequences=4, draft="self:skip")
    guess_always(made.guessing)
    run, prompt = Watched(made), (1, 2, 3) * 8
    begun = [greedy(f"begun {name}", prompt, 60, adapter=name) for name in ("prompt", "prefix")]
    for request in begun:
        made.add(request)
    run.run()
    stats = made.stats()
    assert stats["accepted_tokens/lookup"] > 0
    assert stats["drafted_tokens"] == stats["drafted_tokens/lookup"]
    requests = [greedy(str(name), prompt, 60, adapter=name) for name in NAMES]
    for request in requests:
        made.add(request)
    run.run()
    stats = made.stats()
    assert stats["drafted_tokens"] > stats["drafted_tokens/lookup"]  # for those without learned places
    plain = Watched(served(path, adapters, max_sequences=4, speculative=False))
    for request in (*begun, *requests):
        reference.check(request, run.tokens[request.id, 0], run.logits if request in begun else None)
        plain.engine.add(request)
    plain.run()
    assert run.tokens == plain.tokens
    assert made.pool.used == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", KINDS)
def test_dense_models_begin_with_them(
    kind: str, architecture: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    path = str(save_model(tmp_path / "m", architecture, dtype=dtype))
    adapters = {"a": learned(path, tmp_path / "a", kind, 20)}
    made, ids = served(path, adapters), [4, 2, 7]
    expected = Reference(path, adapters).logits("a", ids)[-1]
    run = Watched(made)
    made.add(greedy("a", tuple(ids), 1, adapter="a"))
    run.run()
    (found,) = run.logits.values()
    assert float((found - expected).norm() / expected.norm()) < (0.02 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_and_losses_begin_with_them(kind: str, tmp_path: Path) -> None:
    path = model(tmp_path / "m")
    for name, places in (("a", 37), ("b", 5)):
        learned(path, tmp_path / "adapters" / name, kind, places)
    made = engine(path, adapter_directory=str(tmp_path / "adapters"))
    made.load_adapter("x", str(tmp_path / "adapters" / "a"))
    reference = Reference(path, {name: str(tmp_path / "adapters" / name) for name in "ab"})
    ids = list(range(40, 140))
    with torch.no_grad():
        output = reference.models["a"](input_ids=torch.tensor([ids]), output_hidden_states=True)
    mean = output.hidden_states[-1][0, -len(ids) :].mean(0)
    torch.testing.assert_close(torch.tensor(made.embed(ids, "x")), mean / mean.norm(), atol=1e-5, rtol=1e-4)

    def loss(name: str, text: list[int], first: int = 1) -> float:
        rows = reference.logits(name, text)[first - 1 : -1]
        return float(torch.nn.functional.cross_entropy(rows, torch.tensor(text[first:])))

    handle = made.adapters_of_model().acquire("x")
    measured = finished(mean_loss([Example(tuple(ids), 30)], made.runner, made.pool, handle))
    assert measured == pytest.approx(loss("a", ids, 30), abs=1e-4)
    made.adapters_of_model().release(handle)
    # a text of the whole context is cut, in the same pieces for both
    long = [(7 * place) % 256 for place in range(256)]
    parts = [long[:219], long[219:]]
    before, after = (
        sum(loss(name, part) * (len(part) - 1) for part in parts) / sum(len(part) - 1 for part in parts)
        for name in "ab"
    )
    job = made.publish_adapter("x", str(tmp_path / "adapters" / "b"), [(long, 1)])
    try:
        told = finished(job)
        losses = told["loss"], told["loss_before"]
        assert losses[0] <= losses[1]
    except GateRefused as refused:
        found = re.search(r"loss of ([\d.]+) .*at most ([\d.]+),", str(refused))
        assert found is not None
        losses = float(found[1]), float(found[2])
        assert losses[0] > losses[1]
    assert losses == pytest.approx((after, before), abs=1e-4)
    assert made.pool.used == 0
    with pytest.raises(SettingsError, match="256 tokens behind the 37 places"):
        finished(made.publish_adapter("x", str(tmp_path / "adapters" / "a"), [(long, 9)]))
    assert made.pool.used == 0


def finished(job: Any) -> Any:
    while True:
        try:
            next(job)
        except StopIteration as end:
            return end.value


def test_a_text_is_cut_without_losing_what_can_be_foretold() -> None:
    long = Example(tuple(range(21)))
    assert pieces(long, 21) == [long]
    assert [one.tokens for one in pieces(long, 10)] == [tuple(range(10)), tuple(range(10, 20))]
    assert pieces(Example(long.tokens, 2), 10) == [Example(long.tokens, 2)]


@pytest.mark.parametrize("kind", KINDS)
def test_places_count_in_the_context(kind: str, tmp_path: Path) -> None:
    path = model(tmp_path / "m")
    made = served(path, {"a": learned(path, tmp_path / "a", kind, 40)})
    run = Watched(made)
    made.add(greedy("a", tuple(range(200)), 56, adapter="a"))
    run.run()
    assert run.finish["a", 0] == "length"
    assert len(run.tokens["a", 0]) == 256 - 40 - 200
    for call in (
        lambda: made.add(greedy("b", tuple(range(216)), 1, adapter="a")),
        lambda: made.embed(list(range(217)), "a"),
    ):
        with pytest.raises(SettingsError, match=r"21[67] tokens.*21[56]"):
            call()
    made.add(greedy("c", tuple(range(215)), 1, adapter="a"))
    run.run()
    assert len(run.tokens["c", 0]) == 1
    assert made.pool.used == 0
    assert made.boarding is not None
    assert not made.boarding._waiting


def test_a_prompt_that_fits_only_without_them_is_a_clients_mistake(tmp_path: Path) -> None:
    path = model(tmp_path / "m")
    places = dict(zip(KINDS, (40, 5), strict=True))
    adapters = {kind: learned(path, tmp_path / kind, kind, places[kind]) for kind in KINDS}

    async def check() -> None:
        async with asked(EngineOptions(path, adapters, memory_bytes=PAGE_BYTES)) as client:
            for kind in KINDS:
                most = 256 - places[kind]
                for length, route, body in (
                    (most, "completions", {"prompt": [7] * most, "max_tokens": 1}),
                    (most, "completions", {"prompt": [7] * most, "stream": True, "max_tokens": 1}),
                    (most, "completions", {"prompt": [[1], [7] * most], "num_beams": 2, "max_tokens": 1}),
                    (
                        most + 3,
                        "chat/completions",
                        {"messages": [{"role": "user", "content": "x" * (most - 14)}]},
                    ),
                    (most + 1, "embeddings", {"input": [7] * (most + 1)}),
                ):
                    answer = await client.post(f"/v1/{route}", json={"model": kind} | body)
                    error = answer.json()["error"]
                    fitting = most if route == "embeddings" else most - 1
                    assert (answer.status_code, error["code"]) == (400, "context_length_exceeded")
                    assert error["type"] == "invalid_request_error"
                    assert f"{length} tokens behind the {places[kind]} places" in error["message"]
                    assert f"at most {fitting}, for a context of 256" in error["message"]
                for route, body in (
                    ("completions", {"prompt": [7] * (most - 1), "max_tokens": 1}),
                    ("embeddings", {"input": [7] * most}),
                ):
                    answer = await client.post(f"/v1/{route}", json={"model": kind} | body)
                    assert answer.status_code == 200
            assert (await client.get("/status")).json()["stats"]["kv_pages_used"] == 0

    asyncio.run(check())


def test_adapters_of_eight_bits_leave_them_as_they_are(tmp_path: Path) -> None:
    path, adapters, reference = company(tmp_path)
    made = served(path, adapters, adapter_bits=8)
    check_mixed(made, reference, ["prompt", "prefix", None], 6, 6)


def test_they_take_the_bytes_that_they_are_said_to_take(tmp_path: Path) -> None:
    path, adapters, _ = company(tmp_path)
    made = served(path, adapters)
    store, size = made.adapters_of_model(), made.runner.page_bytes
    for name, expected in (("prompt", 2 * size + 4 * 37 * 64), ("prefix", size)):
        before = store.bytes
        handle = store.acquire(name)
        assert store.bytes - before == handle.adapter.nbytes == expected
        pages: Any = handle.adapter
        assert sum(page.nbytes for page in pages.pages) == -(-handle.places // PAGE) * size


def broken(directory: Path, target: Path, **changes: Any) -> str:
    """A copy with another config."""
    shutil.copytree(directory, target)
    change_config(target, changes)
    return str(target)


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("prompt-tuning", {"token_dim": 32}, "`token_dim` is 32.*64: the width"),
        ("prompt-tuning", {"num_virtual_tokens": 6}, r"is \[5, 64\], not \[6, 64\]"),
        ("prompt-tuning", {"num_virtual_tokens": None}, "`num_virtual_tokens` is None"),
        ("prompt-tuning", {"num_virtual_tokens": 255}, "`num_virtual_tokens` is 255.*at most 254"),
        ("prompt-tuning", {"num_transformer_submodules": 2}, "`num_transformer_submodules` is 2.*1: a model"),
        ("prompt-tuning", {"modules_to_save": ["lm_head"]}, "`modules_to_save`"),
        ("prefix-tuning", {"num_layers": 3}, "`num_layers` is 3.*2: the blocks"),
        ("prefix-tuning", {"num_attention_heads": 4}, "`num_attention_heads` is 4.*2: its heads"),
        ("prefix-tuning", {"token_dim": 64}, "`token_dim` is 64.*32: the channels"),
        ("prefix-tuning", {"num_virtual_tokens": 300}, "at most 254"),
        ("prefix-tuning", {"encoder_reparameterization_type": "LSTM"}, "encoder_reparameterization_type"),
    ],
)
def test_configs_of_another_model_are_refused(
    kind: str, changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    path = model(tmp_path / "m")
    directory = Path(learned(path, tmp_path / "a", kind, 5))
    made = engine(path, adapter_directory=str(tmp_path))
    with pytest.raises(TailorbirdError, match=said):
        made.load_adapter("a", broken(directory, tmp_path / "b", **changes))
    assert made.adapters() == []
    made.load_adapter("a", str(directory))


def test_tensors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = model(tmp_path / "m")
    made = engine(path, adapter_directory=str(tmp_path))
    (tmp_path / "wrong").mkdir()
    for kind in KINDS:
        directory = tmp_path / kind
        learned(path, directory, kind, 5)
        tensor = load_file(directory / TENSORS)["prompt_embeddings"]
        wrong = {
            "one too many": {"prompt_embeddings": tensor, "more": tensor.clone()},
            "is missing": {"other": tensor},
            r"is \[5, 16\], not": {"prompt_embeddings": tensor[:, :16].contiguous()},
            "is stored as torch.int8": {"prompt_embeddings": tensor.to(torch.int8)},
        }
        for number, (said, tensors) in enumerate(wrong.items()):
            other = shutil.copytree(directory, tmp_path / "wrong" / f"{kind}{number}")
            save_file(tensors, other / TENSORS)
            with pytest.raises(CheckpointError, match=said):
                made.load_adapter("a", str(other))
        infinite = shutil.copytree(directory, tmp_path / "wrong" / f"{kind} infinite")
        save_file(
            {"prompt_embeddings": tensor.index_fill(0, torch.tensor([1]), torch.inf)}, infinite / TENSORS
        )
        made.load_adapter("infinite", str(infinite))
        with pytest.raises(CheckpointError, match="prompt_embeddings"):
            made.embed((1, 2), "infinite")
        run = Watched(made)
        made.add(greedy("a", (1, 2), 4, adapter="infinite"))
        run.run()
        assert run.finish["a", 0] == "error"
        assert made.pool.used == 0


def test_a_projection_must_have_been_carried_out(tmp_path: Path) -> None:
    path = model(tmp_path / "m")
    made = engine(path, adapter_directory=str(tmp_path))
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=12,
        num_attention_heads=2, token_dim=32, num_layers=2,
    )  # fmt: skip
    tuned = peft.get_peft_model(load(path), config).eval()
    made.load_adapter("a", str(save(tuned, tmp_path / "a")))
    run, ids = Watched(made), [1, 2, 3]
    made.add(greedy("a", tuple(ids), 1, adapter="a"))
    run.run()
    (found,) = run.logits.values()
    with torch.no_grad():
        expected = tuned(input_ids=torch.tensor([ids])).logits[0, -1]
    torch.testing.assert_close(found, expected, atol=CLOSE, rtol=CLOSE)
    other = shutil.copytree(tmp_path / "a", tmp_path / "b")
    save_file({"prompt_embeddings": torch.zeros(5, 32)}, other / TENSORS)
    with pytest.raises(CheckpointError, match=r"\[5, 32\], not \[5, 128\].*writes what the projection gives"):
        made.load_adapter("b", str(other))


def test_what_peft_saves_is_served(tmp_path: Path) -> None:
    path = model(tmp_path / "m")
    made, ids = engine(path, adapter_directory=str(tmp_path)), [1, 2, 3]
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    tuned = peft.get_peft_model(load(path), config).eval()
    tuned.word_embeddings = tuned.get_base_model().get_input_embeddings()  # PEFT finds no packed ones
    made.load_adapter("a", str(save(tuned, tmp_path / "a")))
    run = Watched(made)
    made.add(greedy("a", tuple(ids), 1, adapter="a"))
    run.run()
    (found,) = run.logits.values()
    with torch.no_grad():
        expected = tuned(input_ids=torch.tensor([ids])).logits[0, -1]
    torch.testing.assert_close(found, expected, atol=CLOSE, rtol=CLOSE)


def test_blocks_with_keys_of_several_shapes_take_learned_tokens_only(tmp_path: Path) -> None:
    path = model(tmp_path / "m")
    made = engine(path, adapter_directory=str(tmp_path))
    tuned: Any = made.runner
    tuned.model.page_shapes = [(2, 16), (1, 16)]
    learned(path, tmp_path / "a", "prefix-tuning", 5)
    with pytest.raises(SettingsError, match=r"keys of 1 x 16 and 2 x 16.*prompt-tuning"):
        made.load_adapter("a", str(tmp_path / "a"))


def test_models_that_read_tokens_only_take_learned_keys_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "FusedModel", no_blocks)
    path = model(tmp_path / "m")
    for kind in KINDS:
        learned(path, tmp_path / kind, kind, 5)
    made = engine(path, adapter_directory=str(tmp_path))
    tuned: Any = made.runner
    assert tuned.model.takes_embeddings
    tuned.model.takes_embeddings = False
    with pytest.raises(SettingsError, match="reads tokens only"):
        made.load_adapter("a", str(tmp_path / "prompt-tuning"))
    made.load_adapter("a", str(tmp_path / "prefix-tuning"))


def test_a_state_of_before_is_read_and_places_outlive_the_process(tmp_path: Path) -> None:
    path, adapters, reference = company(tmp_path)
    state = tmp_path / "state.json"
    served(path, adapters, adapter_state=str(state))
    assert {name: [r.places for r in of] for name, of in read_records(state)[1].items()} == {
        "lora": [0], "prefix": [5], "prompt": [37],
    }  # fmt: skip
    check_mixed(engine(path, adapter_state=str(state)), reference, NAMES, 7, 4)
    found = json.loads(state.read_text())
    del found["adapters"]["prompt"], found["adapters"]["prefix"]
    for record in found["adapters"]["lora"]:
        del record["places"]
    state.write_text(json.dumps(found))
    check_mixed(engine(path, adapter_state=str(state)), reference, ["lora", None], 8, 4)


@pytest.fixture(scope="module")
def folded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source and its folded checkpoint."""
    folder = tmp_path_factory.mktemp("folded")
    source = save_model(folder / "source", "qwen2", num_key_value_heads=4)
    save_folded(source, folder / "folded")
    return source, folder / "folded"


def test_folds_leave_what_enters_the_blocks_as_it_is(folded: tuple[Path, Path], tmp_path: Path) -> None:
    adapters = {"a": learned(str(folded[0]), tmp_path / "a", "prompt-tuning", 5)}
    source, other = (torch.tensor(served(str(path), adapters).embed((1, 2, 3), "a")) for path in folded)
    torch.testing.assert_close(source, other, atol=1e-5, rtol=1e-4)


def test_what_was_tuned_before_a_fold_that_changes_it_is_refused(
    folded: tuple[Path, Path], tmp_path: Path
) -> None:
    source, scaled = folded
    rotated = Path(shutil.copytree(source, tmp_path / "rotated"))
    (rotated / ROTATION_FILE).write_text("{}")
    for kind, checkpoint, said in (
        ("prefix-tuning", scaled, "scaled or shifted against"),
        ("prefix-tuning", rotated, "rotated against"),
        ("prompt-tuning", rotated, "rotated against"),
    ):
        made = engine(str(checkpoint), adapter_directory=str(tmp_path))
        directory = tmp_path / f"{kind} {checkpoint.name}"
        learned(str(source), directory, kind, 5)
        with pytest.raises(SettingsError, match=f"{said}.*tuned on this checkpoint"):
            made.load_adapter("a", str(directory))
        made.load_adapter(
            "a",
            broken(directory, tmp_path / f"{directory.name} own", base_model_name_or_path=str(checkpoint)),
        )
