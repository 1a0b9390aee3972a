"""The engine against one request at a time: the same tokens and the same bits, whatever else is served."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compressed import save_compressed
from compressing import compress
from engines import Watched, alone, engine, greedy, pruned, served
from guessed import guess_always
from results import text_file
from tailorbird.errors import BudgetError, SettingsError
from tailorbird.evaluate.speed import linear_paths
from tailorbird.formats.modules import CompressedLinear
from tailorbird.formats.packed import (
    CodebookCoding,
    Coding,
    DoubleCoding,
    EntropyCoding,
    FloatCoding,
    IntegerCoding,
    ScaledCoding,
    TableCoding,
    VectorCoding,
)
from tailorbird.kernels import native
from tailorbird.run.generate import ModuleDecoding
from tailorbird.run.parts import ARCHITECTURES
from tailorbird.serve.engine import Engine
from tailorbird.serve.request import Grammar, Request, Sampling
from tiny import byte_tokenizer, make_model, save_model

pytestmark = pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")

#: codes whose groups have a scale each, by which inputs may be rounded to bytes
SCALED: list[ScaledCoding] = [
    *(IntegerCoding(bits, 32, symmetric=bits % 2 == 0) for bits in (2, 3, 4, 5, 6, 8)),
    *(CodebookCoding(codebook, 32) for codebook in ("nf4", "fp4", "gauss2", "gauss3", "gauss4")),
    *(VectorCoding(codebook, 32) for codebook in ("gauss2x2", "gauss2x4", "gauss3x2", "gauss4x2")),
]
CODINGS: list[Coding] = [*SCALED, DoubleCoding("nf4", 32), *(TableCoding(bits) for bits in (2, 3, 4))]
#: weights of 16 bits; an entropy coding's bytes follow from the weights
PLAIN: list[Coding] = [FloatCoding("bfloat16"), EntropyCoding(1)]
#: what stands beside codes, and the tensor by which a linear has it
PARTS = {
    "spqr:bits=3,group=32,outliers=0.03": "values",
    "llm-int8:bits=8,group=32,symmetric=true,outliers=0.07": "values",
    "gptq+eora:bits=3,group=32,eora.rank=4": "up",
    "higgs:codebook=gauss3,group=32,block=16": "signs",
}


def packed_linears(made: Engine) -> list[CompressedLinear]:
    return [module for module in made.model.modules() if isinstance(module, CompressedLinear)]


def check_random_schedule(made: Engine, seed: int, requests: int) -> None:
    """Requests at random moments, some cancelled; every text and its logits as they are alone."""
    rng, run, held = random.Random(seed), Watched(made), made.pool.used
    openings = [tuple(rng.randrange(256) for _ in range(rng.randrange(1, 90))) for _ in range(3)]
    sent, gone = {}, set()
    for number in range(requests):
        prompt = (*rng.choice(openings), *(rng.randrange(256) for _ in range(rng.randrange(1, 9))))
        times, who, priority = rng.choice([1, 1, 1, 3]), rng.choice("ab"), rng.randrange(2)
        request = greedy(str(number), prompt, rng.randrange(1, 24), n=times, tenant=who, priority=priority)
        sent[request.id] = request
        made.add(request)
        for _ in range(rng.randrange(6)):
            run.step()
        if rng.random() < 0.1:
            victim = rng.choice(list(sent))
            gone.add(victim)
            made.cancel(victim)
    run.run()
    assert made.pool.used == held
    for id, request in sent.items():
        if id in gone:
            continue
        tokens, rows = alone(made, request.prompt, request.max_tokens)
        for index in range(request.n):
            assert run.tokens[id, index] == tokens
            assert run.finish[id, index] == "length"
        for at, row in enumerate(rows):
            text = [*request.prompt, *tokens[:at]]
            found = run.logits.get((id, len(text), hash(tuple(text))))
            assert found is not None
            assert torch.equal(found, row)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_every_architecture_serves_the_bits_of_generate(architecture: str, tmp_path: Path) -> None:
    path = served(tmp_path / "m", architecture)
    made = engine(path, max_sequences=4, step_tokens=24)
    check_random_schedule(made, seed=1, requests=8)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("architecture", ["gemma2", "gpt_neox", "qwen2"])
def test_random_schedules_with_few_pages_serve_the_bits_of_generate(
    architecture: str, seed: int, tmp_path: Path
) -> None:
    rng, path = random.Random(seed), served(tmp_path / "m", architecture)
    made = engine(path, max_sequences=rng.choice([1, 3, 6]), step_tokens=rng.choice([7, 24, 60]))
    made.pool.take(made.pool.pages - rng.choice([4, 6, 30]))  # hold the others
    check_random_schedule(made, seed, requests=16)


@pytest.mark.parametrize("coding", CODINGS, ids=lambda coding: coding.label)
def test_every_coding_serves_the_bits_of_generate(coding: Coding, tmp_path: Path) -> None:
    made = engine(served(tmp_path / "m", coding=coding), max_sequences=6, step_tokens=40)
    assert made.info["path"] == "fused"
    check_random_schedule(made, seed=2, requests=8)


@pytest.mark.parametrize("coding", SCALED, ids=lambda coding: coding.label)
def test_inputs_rounded_to_bytes_serve_the_bits_of_generate(coding: Coding, tmp_path: Path) -> None:
    made = engine(served(tmp_path / "m", coding=coding, rounds=True), max_sequences=6, step_tokens=40)
    assert made.info["path"] == "fused"
    assert all(linear.rounds for linear in packed_linears(made))
    check_random_schedule(made, seed=2, requests=8)


@pytest.mark.parametrize("coding", PLAIN, ids=lambda coding: coding.label)
def test_weights_of_16_bits_serve_the_bits_of_generate(coding: Coding, tmp_path: Path) -> None:
    path = served(tmp_path / "m", coding=coding, dtype=torch.bfloat16)
    made = engine(path, max_sequences=6, step_tokens=40)
    assert (made.info["path"], made.model.dtype) == ("fused", torch.bfloat16)
    check_random_schedule(made, seed=2, requests=8)


@pytest.mark.parametrize("activations", ["exact", "auto"])
@pytest.mark.parametrize("recipe", PARTS)
def test_what_stands_beside_codes_serves_the_bits_of_generate(
    recipe: str, activations: str, tmp_path: Path
) -> None:
    source = save_model(tmp_path / "source")
    compress(source, text_file(tmp_path), tmp_path / "m", recipe, activations=activations)
    made = engine(str(tmp_path / "m"), max_sequences=6, step_tokens=40)
    assert made.info["path"] == "fused"
    assert any(getattr(linear, PARTS[recipe]) is not None for linear in packed_linears(made))
    assert any(linear.rounds for linear in packed_linears(made)) == (activations == "auto")
    check_random_schedule(made, seed=2, requests=8)


def test_a_checkpoint_whose_blocks_have_heads_of_their_own_is_served(tmp_path: Path) -> None:
    made = engine(pruned(tmp_path / "m"), max_sequences=4, step_tokens=24)
    assert made.info["path"] == "fused"
    assert made.model.model.layers[1].self_attn.k_proj.out_features == 16
    assert made.model.model.layers[0].self_attn.k_proj.out_features == 32
    check_random_schedule(made, seed=4, requests=8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_models_are_served_by_the_blocks_and_write_what_their_modules_write(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    path = str(save_model(tmp_path / "m", "llama", dtype=dtype))
    made = engine(path, max_sequences=4, step_tokens=24)
    assert made.info["path"] == "fused"
    check_random_schedule(made, seed=3, requests=6)
    run = Watched(made)
    made.add(greedy("a", (4, 2), 20))
    run.run()
    fed, decoding = torch.tensor([[4, 2]]), ModuleDecoding(made.model)
    for token in run.tokens["a", 0]:
        best = decoding.read(fed)[0].topk(2)
        if float(best.values[0] - best.values[1]) < (1e-4 if dtype == torch.float32 else 0.05):
            break  # whichever of the two was taken
        assert token == int(best.indices[0])
        fed = torch.tensor([[token]])


@pytest.mark.parametrize("seed", range(4))
def test_few_pages_small_steps_and_guesses_change_nothing(seed: int, tmp_path: Path) -> None:
    path = served(tmp_path / "m", max_position_embeddings=256)
    rng = random.Random(seed)
    made = engine(path, max_sequences=rng.choice([2, 5]), step_tokens=rng.choice([7, 33]))
    made.pool.take(made.pool.pages - rng.choice([10, 14]))  # hold the others, so that sequences are preempted
    held = made.pool.used
    rng = random.Random(seed)
    run = Watched(made)
    sent = []
    for number in range(10):
        prompt = tuple(rng.randrange(4) for _ in range(rng.randrange(1, 60)))
        sent.append(greedy(str(number), prompt, rng.randrange(1, 80)))
        made.add(sent[-1])
        for _ in range(rng.randrange(5)):
            run.step()
    run.run()
    assert made.pool.used == held
    for request in sent:
        assert run.tokens[request.id, 0] == alone(made, request.prompt, request.max_tokens)[0]


@pytest.mark.parametrize("activation", ["silu", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_without_one_floating_parameter_is_served(
    activation: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    dense = make_model("olmo", hidden_act=activation).to(dtype)
    save_compressed(tmp_path / "m", dense, CODINGS[2], embedding=CODINGS[2])
    byte_tokenizer().save_pretrained(tmp_path / "m")
    made = engine(str(tmp_path / "m"))
    assert list(made.model.parameters()) == []
    assert made.model.dtype == dtype
    run = Watched(made)
    made.add(greedy("a", (5, 6, 7), 6))
    run.run()
    assert run.tokens["a", 0] == alone(made, (5, 6, 7), 6)[0]
    assert sum(linear_paths(made.model, 1).values()) > 0
    made.embed([1, 2])
    found = made.model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False, eos_token_id=-1)
    assert found.shape == (1, 6)


def test_a_model_that_neither_blocks_nor_pages_suit_is_served_by_its_modules(tmp_path: Path) -> None:
    path = str(save_model(tmp_path / "m", "falcon", alibi=True, new_decoder_architecture=False))
    made = engine(path, max_sequences=3, step_tokens=16)
    assert made.info["path"] == "modules"
    assert "ALiBi" in made.info["note"]
    assert "0 of 2 blocks" in made.info["note"]
    run = Watched(made)
    requests = [greedy(str(i), tuple(range(i, i + 20)), 6) for i in range(4)]
    for request in requests:
        made.add(request)
    run.run()
    for request in requests:
        assert run.tokens[request.id, 0] == alone(made, request.prompt, 6)[0]
    with pytest.raises(SettingsError, match="compiled blocks"):
        made.load_adapter("a", str(tmp_path))


def test_who_gives_up_pages_gives_up_the_cache_of_the_modules(tmp_path: Path) -> None:
    path = str(save_model(tmp_path / "m", "falcon", alibi=True, new_decoder_architecture=False))
    made = engine(path, max_sequences=3)
    made.pool.take(made.pool.pages - 4)
    run = Watched(made)
    requests = [greedy(str(i), tuple(range(i, i + 20)), 50) for i in range(3)]
    for request in requests:
        made.add(request)
    while made.busy:
        run.step()
        assert len(made.runner._caches) <= 3 - len(made.scheduler.waiting)  # type: ignore[attr-defined]
    assert made.scheduler.preemptions
    for request in requests:
        assert run.tokens[request.id, 0] == alone(made, request.prompt, 50)[0]


@pytest.mark.parametrize(
    ("kind", "architecture", "changes"),
    [
        ("fused", "llama", {}),
        ("paged", "llama", {"hidden_act": "tanh"}),
        ("modules", "falcon", {"alibi": True, "new_decoder_architecture": False}),
    ],
)
def test_each_block_of_a_step_counts_as_getting_on(
    kind: str, architecture: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    made = engine(str(save_model(tmp_path / "m", architecture, **changes)))
    assert made.info["path"] == kind
    made.add(greedy("a", (1, 2), 3))
    seen = [made.progress()]
    while made.busy:
        made.step()
        seen.append(made.progress())
    assert seen == sorted(set(seen))
    made.embed([1, 2])
    assert made.progress() > seen[-1]


def test_seeds_give_the_same_text_whatever_else_is_served(tmp_path: Path) -> None:
    made = engine(served(tmp_path / "m"), max_sequences=8, step_tokens=32)
    sampling = Sampling(temperature=1.0, top_p=0.9, seed=7, ignore_end=True)
    texts = []
    for others in (0, 5):
        run = Watched(made)
        for number in range(others):
            made.add(Request(f"other {number}", (number, 3, 4), 15))
        made.add(Request("mine", (1, 2, 3), 12, sampling))
        run.run()
        texts.append(run.tokens["mine", 0])
    assert texts[0] == texts[1]


def test_guesses_are_checked_many_at_once(tmp_path: Path) -> None:
    made = engine(served(tmp_path / "m"), max_sequences=2)
    guess_always(made.guessing)
    run = Watched(made)
    made.add(greedy("a", (1, 2, 3) * 8, 90))
    run.run()
    tokens, _ = alone(made, (1, 2, 3) * 8, 90)
    assert run.tokens["a", 0] == tokens
    assert made.stats()["drafted_tokens"] > 0
    assert made.stats()["accepted_tokens"] > 0  # this model soon repeats itself


def test_prompts_that_begin_alike_are_read_once_and_only_for_their_tenant(tmp_path: Path) -> None:
    made = engine(served(tmp_path / "m"), max_sequences=4)
    prompt = tuple(range(100))
    cached = []
    for id, tenant in (("a", ""), ("b", ""), ("c", "other")):
        run = Watched(made)
        made.add(greedy(id, (*prompt, 7), 2, tenant=tenant))
        run.run()
        cached.append(run.outputs[0].cached_tokens)
    assert cached == [0, 96, 0]


def test_stop_tokens_end_a_text_and_stay_out_of_it(tmp_path: Path) -> None:
    made = engine(served(tmp_path / "m"))
    tokens, _ = alone(made, (5, 6, 7), 10)
    run = Watched(made)
    made.add(Request("a", (5, 6, 7), 10, Sampling(temperature=0), stop=frozenset({tokens[3]})))
    run.run()
    first = tokens.index(tokens[3])
    assert run.tokens["a", 0] == tokens[:first]
    assert run.finish["a", 0] == "stop"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda made: greedy("x", tuple([1] * made.context), 1), "context"),
        (lambda made: greedy("x", (1, 99_999), 1), "token 99999"),
        (lambda made: greedy("x", (1,), 1, adapter="none"), "none"),
        (lambda made: greedy("twice", (1,), 1), "twice"),
        (lambda made: Request("x", (1,), 1, Sampling(logit_bias={999: 1.0})), "logit_bias"),
    ],
)
def test_what_cannot_be_served_is_refused_and_leaves_nothing(
    wrong: Callable[[Engine], Request], said: str, tmp_path: Path
) -> None:
    made = engine(served(tmp_path / "m"))
    made.add(greedy("twice", (1, 2), 4))
    with pytest.raises(SettingsError, match=said):
        made.add(wrong(made))
    run = Watched(made)
    run.run()
    assert list(run.tokens) == [("twice", 0)]
    assert made.pool.used == 0


def test_settings_that_let_nothing_follow_refuse_their_text_alone(tmp_path: Path) -> None:
    pytest.importorskip("xgrammar")
    made = engine(served(tmp_path / "m"))
    run = Watched(made)
    wrong = Sampling(min_tokens=5, grammar=Grammar("regex", "aa"))
    made.add(Request("wrong", (1, 2), 9, wrong, n=2))
    made.add(greedy("right", (1, 2), 9))
    run.run()
    assert run.finish == {("wrong", 0): "refused", ("wrong", 1): "refused", ("right", 0): "length"}
    assert len(run.tokens["wrong", 0]) == 2
    assert "min_tokens" in next(output.error or "" for output in run.outputs if output.finish == "refused")
    assert made.pool.used == 0


def test_too_little_memory_says_what_would_do(tmp_path: Path) -> None:
    path = served(tmp_path / "m")
    with pytest.raises(BudgetError, match="at least"):
        engine(path, memory_bytes=1000)


def test_embeddings_have_length_one_and_tell_texts_apart(tmp_path: Path) -> None:
    made = engine(served(tmp_path / "m"))
    first, again, other = (torch.tensor(made.embed(ids)) for ids in ((1, 2, 3), (1, 2, 3), (9, 8)))
    assert first.norm() == pytest.approx(1, abs=1e-5)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-3)


def test_a_checkpoint_of_8_bits_is_served_at_fewer(tmp_path: Path) -> None:
    path = served(tmp_path / "m", coding=IntegerCoding(8, 32, symmetric=True))
    made, whole = engine(path, bits=4, max_sequences=2), engine(path, max_sequences=2)
    assert any("int4 g32 sym" in name for name in linear_paths(made.model, 1))
    made.model.save_pretrained(tmp_path / "narrow")
    byte_tokenizer().save_pretrained(tmp_path / "narrow")
    stored = engine(str(tmp_path / "narrow"), max_sequences=2)
    found = []
    for one in (made, stored, whole):
        run = Watched(one)
        one.add(greedy("a", (3, 1, 4, 1, 5), 8))
        run.run()
        found.append(run)
    first, second, other = (run.logits for run in found)
    assert found[0].tokens == found[1].tokens
    assert first.keys() == second.keys()
    assert all(torch.equal(row, second[at]) for at, row in first.items())
    assert any(at not in other or not torch.equal(row, other[at]) for at, row in first.items())
