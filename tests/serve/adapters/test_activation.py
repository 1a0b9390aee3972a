"""An activated adapter acts from its last invocation on, as in PEFT; pages before are the base model's."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compressed import save_compressed
from peft_adapters import opened, save, wrapped
from tailorbird.formats.packed import IntegerCoding
from tailorbird.kernels import native
from tailorbird.kernels.adapters import Adapter, Segment
from tailorbird.kernels.blocks import PAGE
from tailorbird.run.fused import FusedModel
from tailorbird.serve.adapters.activation import first_adapted
from tailorbird.serve.adapters.held_out import Example, mean_loss
from tailorbird.serve.adapters.versions import read_records
from tailorbird.serve.engine import Engine
from tailorbird.serve.interface import EngineOptions
from tailorbird.serve.page_pool import prefix_key
from tailorbird.serve.request import Output, Request, Sampling
from tailorbird.serve.sequence import Sequence
from tiny import byte_tokenizer, make_model

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")

INVOCATION = (250, 251, 250)
#: How far logits of compiled blocks and of PEFT's modules in float32 may be apart.
CLOSE = 2e-4


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A directory with a model and an activated adapter, and that adapter in PEFT's model."""
    folder = tmp_path_factory.mktemp("activation")
    dense = save_compressed(folder / "m", make_model("qwen2"), IntegerCoding(4, 32))
    byte_tokenizer().save_pretrained(folder / "m")
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"], task_type="CAUSAL_LM",
        alora_invocation_tokens=list(INVOCATION),
    )  # fmt: skip
    model = wrapped(dense, config)
    save(model, folder / "activated")
    return folder, model


def engine(folder: Path, **options: Any) -> Engine:
    made = EngineOptions(str(folder / "m"), {"a": str(folder / "activated")}, **options)
    return Engine(made, log=lambda _: None)


def fused_of(engine: Engine) -> FusedModel:
    return engine.runner.model  # type: ignore[attr-defined,no-any-return]


def logits(fused: FusedModel, ids: list[int], adapter: Adapter, start: int) -> Tensor:
    """Logits after each token of one text, whose adapter acts from `start` on, read in one piece."""
    count = len(ids)
    pages = fused.pages(1)
    pages.reach(count)
    segments = [Segment(start, count, adapter)] if start < count else []
    positions, zeros = torch.arange(count, dtype=torch.int32), torch.zeros(count, dtype=torch.int32)
    return fused.step(torch.tensor(ids), positions, zeros, pages, torch.arange(count), segments)


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randrange(250) for _ in range(length))


def greedy(
    id: str, tokens: tuple[int, ...], adapter: str | None = "a", count: int = 6, **more: Any
) -> Request:
    return Request(id, tokens, count, Sampling(temperature=0, ignore_end=True), adapter=adapter, **more)


def written(made: Engine, *requests: Request) -> dict[tuple[str, int], list[int]]:
    """Tokens of each continuation."""
    found: dict[tuple[str, int], list[int]] = {}
    for request in requests:
        made.add(request)
    while made.busy:
        for output in made.step():
            found.setdefault((output.id, output.index), []).extend(output.tokens)
    return found


def first_output(made: Engine, request: Request) -> Output:
    made.add(request)
    outputs: list[Output] = []
    while made.busy:
        outputs += made.step()
    return outputs[0]


def alone(fused: FusedModel, tokens: tuple[int, ...], adapter: Adapter, start: int, count: int) -> list[int]:
    ids = list(tokens)
    for _ in range(count):
        ids.append(int(logits(fused, ids, adapter, start)[-1].argmax()))
    return ids[len(tokens) :]


@given(
    st.lists(st.integers(0, 2), max_size=12),
    st.lists(st.integers(0, 2), min_size=1, max_size=3),
    st.lists(st.integers(0, 2), max_size=12),
)
def test_the_last_invocation_counts_from_its_first_token_on(
    before: list[int], invocation: list[int], after: list[int]
) -> None:
    start = first_adapted([*before, *invocation, *after], invocation)
    tokens = [*before, *invocation, *after]
    assert start is not None
    assert start >= len(before)
    assert tokens[start : start + len(invocation)] == invocation
    config = peft.LoraConfig(alora_invocation_tokens=invocation, task_type="CAUSAL_LM")
    from peft.tuners.lora.variants import calculate_alora_offsets

    assert calculate_alora_offsets({"a": config}, "a", torch.tensor([tokens])) == [len(tokens) - start]
    assert first_adapted(tokens, [9]) is None
    assert first_adapted(tokens, None) == 0


@pytest.mark.parametrize(
    "tokens",
    [
        (*prompt(40), *INVOCATION, *prompt(5, 1)),
        (*prompt(7), *INVOCATION),
        (*INVOCATION, *prompt(9), *INVOCATION, *prompt(3)),
        (*INVOCATION, *prompt(20)),
        prompt(20),
        (250, 251, 250, 251, 250, 3),  # invocations that overlap
    ],
    ids=["late", "at the end", "twice", "at the start", "never", "overlapping"],
)
def test_logits_are_those_of_peft(made: tuple[Path, Any], tokens: tuple[int, ...]) -> None:
    from peft.tuners.lora.variants import calculate_alora_offsets

    folder, model = made
    ids = torch.tensor([tokens])
    offsets = calculate_alora_offsets(model.peft_config, "default", ids)
    with torch.no_grad():
        expected = model(input_ids=ids, alora_offsets=offsets, use_cache=False).logits[0].float()
    served = engine(folder, step_tokens=16)
    fused = fused_of(served)
    start = first_adapted(tokens, INVOCATION)
    adapter = opened(fused, folder / "activated")
    found = logits(fused, list(tokens), adapter, len(tokens) if start is None else start)
    assert torch.allclose(found, expected, atol=CLOSE)
    assert written(served, greedy("x", tokens, count=1))["x", 0] == [int(expected[-1].argmax())]


@pytest.mark.parametrize("seed", range(4))
def test_any_schedule_gives_what_one_pass_gives_whose_segment_begins_there(
    made: tuple[Path, Any], seed: int
) -> None:
    """Prompts share beginnings with those of the base model, are cut into pieces and preempted."""
    folder, _ = made
    rng = random.Random(seed)
    served = engine(folder, max_sequences=rng.choice([2, 5]), step_tokens=rng.choice([9, 40]))
    fused = fused_of(served)
    adapter = opened(fused, folder / "activated")
    held = served.pool.take(served.pool.pages - 16)
    assert held is not None
    opening, sent = prompt(70, seed), []
    tokens: dict[str, list[int]] = {}

    def step() -> None:
        for output in served.step():
            if output.index == 0:
                tokens.setdefault(output.id, []).extend(output.tokens)

    for number in range(10):
        begin = opening[: rng.randrange(1, 71)]
        invoked = rng.random() < 0.7
        text = (*begin, *(INVOCATION if invoked else ()), *prompt(rng.randrange(1, 20), number))
        sent.append(
            greedy(
                str(number), text, rng.choice(["a", "a", None]), rng.randrange(1, 12), n=rng.choice([1, 2])
            )
        )
        served.add(sent[-1])
        for _ in range(rng.randrange(4)):
            step()
    while served.busy:
        step()
    assert served.pool.used == len(held)
    for request in sent:
        start = first_adapted(request.prompt, INVOCATION)
        begin_at = 1 << 20 if start is None or request.adapter is None else start
        assert tokens[request.id] == alone(fused, request.prompt, adapter, begin_at, request.max_tokens)


def test_pages_before_the_invocation_are_shared_with_the_base_both_ways(made: tuple[Path, Any]) -> None:
    folder, _ = made
    shared = prompt(2 * PAGE + 5)
    invoked = (*shared, *INVOCATION, *prompt(PAGE, 1))
    served = engine(folder)
    assert first_output(served, greedy("base", (*shared, 7), None)).cached_tokens == 0
    assert first_output(served, greedy("a", invoked)).cached_tokens == 2 * PAGE
    # What was read with the adapter is found by who has the adapter, and by nobody else.
    assert first_output(served, greedy("again", (*invoked, 7))).cached_tokens == 3 * PAGE
    assert first_output(served, greedy("plain", (*invoked, 7), None)).cached_tokens == 2 * PAGE
    assert first_output(served, greedy("stranger", invoked, tenant="other")).cached_tokens == 0
    other = engine(folder)
    assert first_output(other, greedy("a", invoked)).cached_tokens == 0
    assert first_output(other, greedy("base", (*shared, 7), None)).cached_tokens == 2 * PAGE


def test_a_page_is_shared_only_where_the_adapter_acts_from_the_same_token_on() -> None:
    """What an answer repeats of an invocation was read with the adapter; in the next prompt it invokes."""
    once, again = (*prompt(4), *INVOCATION), (*prompt(5, 1), *INVOCATION)
    tokens = (*once, *again, *prompt(PAGE, 2))
    request = Request("x", tokens)
    answered, asked, plain = (
        Sequence(request, 0, 0, None, None, b"", list(tokens), adapted_from=start, adapter_salt=salt)
        for start, salt in ((4, b"a"), (12, b"a"), (0, b""))
    )
    keys = [text.keys_of_full_pages(PAGE, PAGE)[0] for text in (answered, asked, plain)]
    assert len(set(keys)) == 3
    assert keys[2] == prefix_key(b"", tokens[:PAGE])


def test_embeddings_and_losses_are_adapted_from_the_invocation_on(made: tuple[Path, Any]) -> None:
    folder, _ = made
    served = engine(folder)
    fused = fused_of(served)
    tokens = (*prompt(80), *INVOCATION, *prompt(40, 1))
    handle = served.adapters_of_model().acquire("a")
    job = mean_loss([Example(tokens)], served.runner, served.pool, handle)
    while True:
        try:
            next(job)
        except StopIteration as end:
            loss = end.value
            break
    rows = logits(fused, list(tokens), handle.adapter, 80)
    expected = torch.nn.functional.cross_entropy(rows[:-1], torch.tensor(tokens[1:]))
    assert loss == pytest.approx(float(expected), abs=1e-5)
    assert served.embed(prompt(20), "a") == served.embed(prompt(20), None)
    assert served.embed(tokens, "a") != served.embed(tokens, None)


def test_a_later_process_knows_the_invocation_before_it_reads_the_adapter(
    made: tuple[Path, Any], tmp_path: Path
) -> None:
    folder, _ = made
    state = tmp_path / "state.json"
    tokens = (*prompt(40), *INVOCATION)
    before = written(engine(folder, adapter_state=str(state)), greedy("x", tokens))
    assert read_records(state)[1]["a"][0].invocation == INVOCATION
    assert written(engine(folder, adapter_state=str(state)), greedy("x", tokens)) == before
