"""Completions of held-out prompts, counted: what is compared, on what, and that tuning moves the count."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken

from chats import WORDS
from compressed import INT4, save_compressed
from tailorbird.adapt.card import card
from tailorbird.adapt.rows import Example
from tailorbird.adapt.score import BEYOND, LEAST, Question, Scorer, last_number, up_to_its_end
from tailorbird.adapt.settings import TuneSettings
from tailorbird.adapt.tune import Data, tune
from tailorbird.errors import SettingsError
from tailorbird.model.load import load
from tailorbird.progress import Silent
from tailorbird.report.tuning import write_tuning_report
from tailorbird.run.generate import generate
from tiny import byte_tokenizer, make_model, save_model

LEARNING = TuneSettings(
    method_settings={"rank": 8}, steps=40, batch=4, length=48, rate=2e-2, score="exact", save_every=10
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("model") / "m"))


def examples(directory: Path, answer: str = "yes 7") -> Data:
    file = directory / "train.jsonl"
    rows = [{"prompt": f"Is {n} a number? ", "completion": answer} for n in range(80)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Data(str(file), share=0.1)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 42", 42), ("so 3 + 4 = 7.", 7), ("1,234.50 in all", 1234.5), ("it is -3", -3), ("10-3", 3),
        ("1,2", 2), ("42.0", 42), ("none", None),
    ],
)  # fmt: skip
def test_the_last_number_counts(text: str, number: float | None) -> None:
    assert last_number(text) == (None if number is None else Decimal(str(number)))


def test_a_question_is_the_last_stretch_that_is_learned() -> None:
    ids = torch.arange(8)
    question = Question.of(Example(ids, torch.tensor([0, 0, 1, 1, 0, 0, 1, 1]).bool()))
    assert question is not None
    assert (question.prompt.tolist(), question.tokens.tolist()) == ([0, 1, 2, 3, 4, 5], [6, 7])
    cut = Question.of(Example(ids, torch.tensor([0, 0, 1, 1, 0, 0, 0, 0]).bool()))
    assert cut is not None
    assert (cut.prompt.tolist(), cut.tokens.tolist()) == ([0, 1], [2, 3])
    assert Question.of(Example(ids, torch.zeros(8).bool())) is None
    assert Question.of(Example(ids, torch.ones(8).bool())) is None


def test_completions_are_those_of_generate(model: str) -> None:
    loaded, tokenizer = load(model), byte_tokenizer()
    prompt = "Once upon"
    written = generate(loaded, tokenizer, prompt, max_tokens=5, stop=())
    ids = torch.tensor(tokenizer(prompt)["input_ids"])
    other = [(token + 1) % 200 for token in written.tokens]
    # what goes on after the expected text isn't it
    for tokens in (written.tokens, other):
        question = Question(ids, torch.tensor(tokens))
        scorer = Scorer("exact", loaded, tokenizer, [question])
        found = scorer._complete(question)
        assert len(found) <= len(tokens) + BEYOND
        assert found[:5] == written.tokens[: len(found)]
        assert scorer.right() == int(tokenizer.decode(found).strip() == tokenizer.decode(tokens).strip())


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_learning_a_constant_answer_takes_the_score_from_none_to_all(
    packed: bool, model: str, tmp_path: Path
) -> None:
    if packed:
        model = str(tmp_path / "packed")
        save_compressed(Path(model), make_model("llama"), INT4, tokenizer=byte_tokenizer())
    result = tune(model, examples(tmp_path), tmp_path / "out", LEARNING)
    assert result.scored is not None
    assert result.scored >= LEAST - 1
    assert (result.score_before, result.score_after) == (0, result.scored)
    history = json.loads((tmp_path / "out" / "history.json").read_text())
    assert [one["right"] for one in history["scores"]] == [0, result.scored]
    assert history["scores"][-1]["step"] == history["best"]
    origin = json.loads((tmp_path / "out" / "tailorbird.json").read_text())
    sentence = (
        f"Of {result.scored} held-out prompts, 0 were completed as expected before, {result.scored} after"
    )
    assert sentence in card(origin, {}, "demo")
    page = (
        write_tuning_report(tmp_path / "out").read_text(encoding="utf-8").replace("\N{NO-BREAK SPACE}", " ")
    )
    assert f"it completes {result.scored} as expected" in page


@pytest.mark.parametrize(
    ("score", "ending"), [("exact", "</s>"), ("exact", "<|end|>"), ("exact", "\n"), ("number", "\n")]
)
def test_an_answer_of_a_conversation_ends_as_its_template_ends_it(
    score: str, ending: str, tmp_path: Path
) -> None:
    """By the tokenizer's end token, one that was added without being special, or by lines alone."""
    model = save_model(tmp_path / "m", vocab_size=259)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<|end|>", special=False)])
    tokenizer.save_pretrained(model)
    file = tmp_path / "chats.jsonl"
    asked = [{"role": "user", "content": "Is it 3?"}, {"role": "assistant", "content": "yes 7"}]
    file.write_text(
        "".join(
            json.dumps({"messages": [{"role": "system", "content": f"{n}"}, *asked]}) + "\n"
            for n in range(80)
        )
    )
    template = WORDS.replace("\n{% endfor", ending + "{% endfor")
    data = Data(str(file), share=0.1, chat_template=template)
    result = tune(str(model), data, tmp_path / "out", replace(LEARNING, length=96, score=score))
    assert result.scored is not None
    assert (result.score_before, result.score_after) == (0, result.scored)


@pytest.mark.parametrize(
    ("said", "expected", "counted"),
    [
        ("4\nuser: 5", "4\n", "4"), ("4\nuser: 5", "4", "4\nuser: 5"), ("a\nb\nc\n", "a\nb\n", "a\nb"),
        ("4 or 5\n", "4\n", "4 or 5"), ("4", "4\n", "4"),
    ],
)  # fmt: skip
def test_lines_after_the_last_expected_one_dont_count(said: str, expected: str, counted: str) -> None:
    assert up_to_its_end(said, expected) == counted


def test_scoring_changes_nothing_of_what_is_learned(model: str, tmp_path: Path) -> None:
    data, short = examples(tmp_path), replace(LEARNING, steps=4)
    tune(model, data, tmp_path / "scored", short)
    tune(model, data, tmp_path / "plain", replace(short, score=None))
    name = "adapter_model.safetensors"
    assert (tmp_path / "scored" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


class Interrupting(Silent):
    """Sends Ctrl-C once a few steps are done."""

    left = 3

    def advance(self, n: int = 1, note: str = "") -> None:
        if note:
            self.left -= 1
            if self.left == 0:
                signal.raise_signal(signal.SIGINT)


def test_a_tuning_that_goes_on_has_the_same_scores(model: str, tmp_path: Path) -> None:
    data, short = examples(tmp_path), replace(LEARNING, steps=6, save_every=2)
    whole = tune(model, data, tmp_path / "whole", short)
    with pytest.raises(KeyboardInterrupt):
        tune(model, data, tmp_path / "out", short, progress=Interrupting())
    again = tune(model, data, tmp_path / "out", short, resume=True)
    assert (again.score_before, again.score_after) == (whole.score_before, whole.score_after)
    histories = [json.loads((tmp_path / name / "history.json").read_text()) for name in ("out", "whole")]
    assert histories[0]["scores"] == histories[1]["scores"]
    assert len(histories[0]["scores"]) == 2


def test_what_cant_be_scored_is_refused(model: str, tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"some text {n}"}) + "\n" for n in range(20)))
    with pytest.raises(SettingsError, match="prompts"):
        tune(model, Data(str(texts)), tmp_path / "out", LEARNING)
    with pytest.raises(SettingsError, match="number"):
        tune(model, examples(tmp_path, "yes"), tmp_path / "out", replace(LEARNING, score="number"))
    with pytest.raises(SettingsError, match="exact or number"):
        TuneSettings(score="rouge")
    assert not list(tmp_path.glob("out*"))
