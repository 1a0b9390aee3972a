"""Beam search in the engine: the texts of transformers, in any company and with few pages."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from engines import Watched, alone, engine, greedy, served
from peft_adapters import save, wrapped
from tailorbird.errors import SettingsError
from tailorbird.kernels import native
from tailorbird.kernels.blocks import PAGE
from tailorbird.model.load import load, load_tokenizer
from tailorbird.serve.engine import Engine
from tailorbird.serve.request import BeamSearch, Grammar, Output, Request, Sampling
from tiny import make_model, save_model

compiled = pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")

#: Two texts whose scores are nearer than this may change places.
TIED = 1e-4


def search(id: str, prompt: tuple[int, ...], count: int, beams: BeamSearch, **more: Any) -> Request:
    return Request(id, prompt, count, more.pop("sampling", Sampling()), beams=beams, **more)


def of_transformers(
    model: Any, prompt: tuple[int, ...], count: int, beams: BeamSearch, stop: list[int] | None, least: int = 0
) -> list[tuple[list[int], float]]:
    """All beams' texts, without the stop token, and their log-probabilities over their lengths' power."""
    with torch.inference_mode():
        made = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=count, num_beams=beams.num_beams, length_penalty=beams.length_penalty,
            early_stopping=beams.early_stopping, num_return_sequences=beams.num_beams, do_sample=False,
            eos_token_id=stop, pad_token_id=0, min_new_tokens=least or None, return_dict_in_generate=True,
            output_scores=True, repetition_penalty=1.0,
        )  # fmt: skip
    texts = []
    for row, score in zip(made.sequences[:, len(prompt) :].tolist(), made.sequences_scores, strict=True):
        end = next((at for at, token in enumerate(row) if token in (stop or [])), len(row))
        texts.append((row[:end], float(score)))
    return texts


def check(outputs: list[Output], expected: list[tuple[list[int], float]], penalty: float) -> None:
    """The same texts with the same scores, in an order that only ties may change."""
    assert len(outputs) <= len(expected)
    for output, (text, score) in zip(outputs, expected, strict=False):
        assert output.cumulative_logprob is not None
        length = len(output.tokens) + (output.finish == "stop")
        assert output.cumulative_logprob / length**penalty == pytest.approx(score, abs=TIED)
        others = [other for other, its in expected if abs(its - score) < TIED]
        assert list(output.tokens) in others
        if len(others) == 1:
            assert list(output.tokens) == text


def finished(run: Watched, id: str) -> list[Output]:
    return sorted((output for output in run.outputs if output.id == id), key=lambda output: output.index)


@compiled
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("seed", range(4))
def test_texts_are_those_of_transformers(architecture: str, seed: int, tmp_path: Path) -> None:
    path = str(save_model(tmp_path / "m", architecture, dtype=torch.float32))
    made, rng = engine(path, max_sequences=16, step_tokens=40), random.Random(seed)
    model = make_model(architecture, dtype=torch.float32)
    for number in range(4):
        prompt = tuple(rng.randrange(256) for _ in range(rng.randrange(1, 70)))
        stop = rng.sample(range(256), rng.choice([1, 40]))
        early: Any = rng.choice([True, False, "never"])
        beams = BeamSearch(rng.randrange(2, 6), rng.choice([0.0, 1.0, 2.0, -0.5]), early)
        count, least = rng.randrange(1, 30), rng.choice([0, 0, 3])
        run = Watched(made)
        request = search(
            str(number), prompt, count, beams, n=rng.randrange(1, beams.num_beams + 1),
            stop=frozenset(stop), sampling=Sampling(min_tokens=min(least, count), logprobs=2),
        )  # fmt: skip
        made.add(request)
        run.run()
        outputs = finished(run, request.id)
        assert [output.index for output in outputs] == list(range(request.n))
        expected = of_transformers(model, prompt, count, beams, stop, min(least, count))
        check(outputs, expected, beams.length_penalty)
        for output in outputs:
            assert len(output.logprobs) == len(output.tokens)
            if output.finish == "length":
                total = sum(item.logprob for item in output.logprobs)
                assert total == pytest.approx(output.cumulative_logprob, abs=1e-4)
        assert made.pool.used == 0


@compiled
def test_the_demo_writes_what_transformers_writes(tmp_path: Path) -> None:
    model = load("demo").float()
    model.config.dtype = torch.float32
    model.save_pretrained(tmp_path)
    load_tokenizer("demo").save_pretrained(tmp_path)
    made = engine(str(tmp_path), max_sequences=8)
    prompt = tuple(made._tokenizer("def read_lines(path):\n    ")["input_ids"])
    beams = BeamSearch(4, 1.0)
    run = Watched(made)
    made.add(search("a", prompt, 24, beams, n=4))
    run.run()
    check(finished(run, "a"), of_transformers(model, prompt, 24, beams, sorted(made.stop)), 1.0)


@compiled
def test_texts_with_an_adapter_are_those_of_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    path = str(save_model(tmp_path / "m", "llama", dtype=torch.float32))
    changed = wrapped(
        make_model("llama", dtype=torch.float32), peft.LoraConfig(r=4, target_modules=["q_proj"])
    )
    made = engine(path, max_sequences=8, adapters={"tuned": str(save(changed, tmp_path / "a"))})
    prompt, beams, run = tuple(range(50)), BeamSearch(3), Watched(made)
    made.add(search("plain", prompt, 12, beams, n=3))
    made.add(search("tuned", prompt, 12, beams, n=3, adapter="tuned"))
    run.run()
    stop = sorted(made.stop)
    check(finished(run, "tuned"), of_transformers(changed, prompt, 12, beams, stop), 1.0)
    check(finished(run, "plain"), of_transformers(make_model("llama"), prompt, 12, beams, stop), 1.0)
    assert finished(run, "tuned")[0].tokens != finished(run, "plain")[0].tokens


def random_searches(seed: int) -> list[Request]:
    rng = random.Random(seed)
    opening = tuple(rng.randrange(256) for _ in range(40))
    found = []
    for number in range(5):
        prompt = (*opening[: rng.randrange(41)], *(rng.randrange(256) for _ in range(rng.randrange(1, 20))))
        beams = BeamSearch(rng.randrange(2, 6), 1.0, rng.choice([True, False]))
        stop = frozenset(rng.sample(range(256), 20))
        found.append(search(str(number), prompt, rng.randrange(1, 50), beams, n=2, stop=stop))
    return found


@compiled
@pytest.mark.parametrize("seed", range(5))
def test_company_few_pages_and_few_places_change_nothing(seed: int, tmp_path: Path) -> None:
    path, requests = served(tmp_path / "m", max_position_embeddings=256), random_searches(seed)
    roomy = engine(path, max_sequences=16)
    expected = {}
    for request in requests:
        run = Watched(roomy)
        roomy.add(request)
        run.run()
        expected[request.id] = [
            (output.tokens, output.cumulative_logprob) for output in finished(run, request.id)
        ]
    rng = random.Random(seed)
    tight = engine(
        path, max_sequences=rng.choice([1, 3, 6]), step_tokens=rng.choice([7, 33]),
        swap_disk_bytes=rng.choice([0, 1 << 30]),
    )  # fmt: skip
    tight.pool.take(tight.pool.pages - rng.choice([8, 11]))
    held, run = tight.pool.used, Watched(tight)
    for number, request in enumerate(requests):
        tight.add(request)
        tight.add(greedy(f"other {number}", (number, 1, 2), 20))
        for _ in range(rng.randrange(8)):
            run.step()
    tight.add(search("cancelled", (1, 2, 3), 40, BeamSearch(4)))
    for _ in range(5):
        run.step()
    tight.cancel("cancelled")
    run.run()
    assert tight.pool.used == held
    assert not tight._sequences
    for request in requests:
        found = [(output.tokens, output.cumulative_logprob) for output in finished(run, request.id)]
        assert found == expected[request.id]
    for number in range(len(requests)):
        assert run.tokens[f"other {number}", 0] == alone(tight, (number, 1, 2), 20)[0]


@pytest.mark.parametrize(
    ("kind", "architecture", "changes"),
    [
        ("paged", "llama", {"hidden_act": "tanh"}),
        ("modules", "falcon", {"alibi": True, "new_decoder_architecture": False}),
    ],
)
def test_models_that_run_through_their_modules_are_searched(
    kind: str, architecture: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    path = str(save_model(tmp_path / "m", architecture, **changes))
    made, beams = engine(path, max_sequences=4), BeamSearch(3)
    assert made.info["path"] == kind
    run = Watched(made)
    made.add(search("a", (5, 6, 7), 8, beams, n=3))
    run.run()
    dense = make_model(architecture, **changes)
    expected = of_transformers(dense, (5, 6, 7), 8, beams, sorted(made.stop))
    check(finished(run, "a"), expected, 1.0)


@compiled
def test_beams_share_the_pages_of_what_they_have_in_common(tmp_path: Path) -> None:
    made = engine(served(tmp_path / "m"), max_sequences=8)
    made.add(search("a", tuple(range(64)), 20, BeamSearch(4), sampling=Sampling(ignore_end=True)))
    most = 0
    while made.busy:
        made.step()
        most = max(most, made.pool.used)
    assert most == 2 + 4  # the prompt's, and one for each beam's own tokens


@compiled
def test_logits_that_are_no_numbers_end_the_search(tmp_path: Path) -> None:
    made = engine(served(tmp_path / "m"))
    step = made.runner.step
    made.runner.step = lambda pieces: [row * torch.nan for row in step(pieces)]  # type: ignore[method-assign]
    made.add(search("a", (1, 2), 5, BeamSearch(3), n=2))
    outputs = made.step()
    assert [(output.index, output.finish) for output in outputs] == [(0, "error"), (1, "error")]
    assert not made.busy
    assert made.pool.used == 0


@compiled
def test_a_search_that_fails_late_fails_once_and_alone(tmp_path: Path) -> None:
    """All beams fill a page in the step whose logits are bad."""
    made = engine(served(tmp_path / "m"), max_sequences=8)
    made.add(greedy("other", (9, 8, 7), 50))
    made.add(search("a", (1, 2), 60, BeamSearch(3), n=2, sampling=Sampling(ignore_end=True)))
    run, step = Watched(made), made.runner.step

    def bad(pieces: Any) -> list[torch.Tensor]:
        broken = [piece.sequence.beams and len(piece.sequence.tokens) == PAGE for piece in pieces]
        rows = step(pieces)
        return [row * torch.nan if is_bad else row for row, is_bad in zip(rows, broken, strict=True)]

    made.runner.step = bad  # type: ignore[method-assign]
    run.run()
    assert [output.finish for output in finished(run, "a")] == ["error", "error"]
    assert run.tokens["other", 0] == alone(made, (9, 8, 7), 50)[0]
    assert made.pool.used == 0


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: BeamSearch(0), "num_beams"),
        (lambda: BeamSearch(2, length_penalty=float("nan")), "length_penalty"),
        (lambda: BeamSearch(2, early_stopping="soon"), "early_stopping"),  # type: ignore[arg-type]
        (lambda: search("a", (1,), 2, BeamSearch(2), n=3), "n 3 with num_beams 2"),
        (lambda: search("a", (1,), 2, BeamSearch(2), sampling=Sampling(grammar=Grammar("json"))), "grammar"),
        (lambda: search("a", (1,), 2, BeamSearch(2), sampling=Sampling(presence_penalty=1.0)), "penalties"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make: Any, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        make()


def test_searches_and_their_texts_travel_between_processes() -> None:
    for early in (True, False, "never"):
        request = search("a", (1, 2), 5, BeamSearch(3, 0.5, early), n=2)  # type: ignore[arg-type]
        assert Request.from_wire(request.to_wire()) == request
    output = Output("a", 0, (1,), finish="stop", cumulative_logprob=-1.5)
    assert Output.from_wire(output.to_wire()) == output


@compiled
def test_more_beams_than_tokens_that_go_on_are_refused(tmp_path: Path) -> None:
    made: Engine = engine(served(tmp_path / "m"))
    with pytest.raises(SettingsError, match="num_beams 100"):
        made.add(search("a", (1, 2), 5, BeamSearch(100), stop=frozenset(range(200))))
    assert not made.busy
