"""What is wrong with the settings is found before texts are read, which may take minutes."""

from __future__ import annotations

import json
import random
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

import tailorbird
from tailorbird.calibrate.job import Job
from tailorbird.compress import planning
from tailorbird.compress import work as work_module
from tailorbird.errors import BudgetError, ResourceError, ResumeError, SettingsError, TextError, UserError
from tailorbird.formats.packed import FloatCoding, IntegerCoding
from tailorbird.plan import predict
from tailorbird.plan.planfile import load_plan
from tiny import save_model

RECIPE = "rtn:bits=4,group=32"


class TextsWereOpened(Exception):
    """Stands for the minutes that texts would take."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("source") / "model"))


@pytest.fixture
def no_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(work: work_module.Work) -> work_module.Texts:
        raise TextsWereOpened

    monkeypatch.setattr(work_module, "open_texts", refuse)


@pytest.fixture
def text(tmp_path: Path) -> str:
    rng = random.Random(0)
    lines = [json.dumps({"text": " ".join(rng.choices(["alpha", "beta", "gamma"], k=60))}) for _ in range(24)]
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(lines))
    return str(path)


@pytest.fixture
def interrupted(model: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The output of a `fit` and of a `compress` that were stopped at their first stage, below this folder."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(planning, "score", stop)
        with pytest.raises(KeyboardInterrupt):
            tailorbird.fit(model, "45%", tmp_path / "fit", calibration=text, sequences=4, length=32)
        with pytest.raises(KeyboardInterrupt):
            tailorbird.compress(
                model, tmp_path / "compress", recipe=RECIPE, calibration=text, sequences=4, length=32
            )
    return tmp_path


def test_control_with_nothing_wrong_texts_are_opened(model: str, tmp_path: Path, no_texts: None) -> None:
    with pytest.raises(TextsWereOpened):
        tailorbird.fit(model, "45%", tmp_path / "out")
    with pytest.raises(TextsWereOpened):
        tailorbird.compress(model, tmp_path / "out", recipe=RECIPE)


@pytest.mark.parametrize(
    ("error", "message", "settings"),
    [
        (SettingsError, "target `guff`", {"target": "guff"}),
        (SettingsError, "memory size `lots`", {"memory": "lots"}),
        (BudgetError, "smallest possible plan", {"memory": "1%"}),
        (BudgetError, "16 bits", {"memory": "100%"}),
        (BudgetError, "KV cache", {"context": 128, "concurrency": 64}),
        (SettingsError, "--concurrency 4", {"concurrency": 4}),
        (SettingsError, "windows of 4096 tokens", {"length": 4096}),
    ],
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_fit_finds_wrong_settings_first(
    model: str,
    tmp_path: Path,
    no_texts: None,
    error: type[UserError],
    message: str,
    settings: dict[str, Any],
    dry_run: bool,
) -> None:
    with pytest.raises(error, match=message):
        tailorbird.fit(model, **{"memory": "45%", "output": tmp_path / "out", "dry_run": dry_run} | settings)


LEARNED = "bits=4,group=32"


@pytest.mark.parametrize("learns", ["distil", "pv-tuning", "step-sizes"])
def test_gradients_of_a_model_that_must_stream_are_refused_by_name_before_work(
    model: str, text: str, tmp_path: Path, learns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "_whole_peak", lambda *_: 1 << 50)
    options: dict[str, Any] = {"calibration": text, "sequences": 4, "length": 32}
    for before in ("gptq", "gptq+signround"):
        with pytest.raises(ResourceError) as caught:
            tailorbird.compress(model, tmp_path / "out", recipe=f"{before}+{learns}:{LEARNED}", **options)
        assert f"`{learns}`, which needs gradients with source and result in memory" in str(caught.value)
        assert f"leave out `{learns}`, without which the model streams through" in str(caught.value)
    with pytest.raises(ResourceError, match=f"`{learns}`, which needs gradients"):
        tailorbird.fit(model, "45%", tmp_path / "out", method=f"gptq+{learns}", **options)
    dry = tailorbird.fit(model, "45%", method=f"gptq+{learns}", dry_run=True, **options)
    assert dry.advice is not None
    assert f"leave out `{learns}`" in dry.advice
    assert [path.name for path in tmp_path.iterdir()] == [Path(text).name]


@pytest.mark.parametrize(
    "learns", ["signround", "flexround", "efficientqat", "omniquant", "cbq", "flatquant"]
)
def test_gradients_of_blocks_that_do_not_fit_are_refused_by_name_before_work(
    model: str, text: str, tmp_path: Path, learns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "LEARNED_COPIES", 1 << 40)
    options: dict[str, Any] = {"calibration": text, "sequences": 4, "length": 32}
    with pytest.raises(ResourceError) as caught:
        tailorbird.compress(model, tmp_path / "out", recipe=f"rtn+{learns}:{LEARNED}", **options)
    assert f"`{learns}`, which needs gradients with all that the updates of a block keep" in str(caught.value)
    if learns != "flatquant":
        with pytest.raises(ResourceError, match=f"leave out `{learns}` and `distil`, without"):
            tailorbird.compress(model, tmp_path / "out", recipe=f"rtn+{learns}+distil:{LEARNED}", **options)
    assert [path.name for path in tmp_path.iterdir()] == [Path(text).name]


def test_a_model_that_does_not_even_stream_blames_no_method(
    model: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "available_bytes", lambda: 0)
    monkeypatch.setattr(predict, "resident_bytes", lambda: 0)
    with pytest.raises(ResourceError, match="of memory") as caught:
        tailorbird.compress(
            model, tmp_path / "out", recipe=f"gptq+distil:{LEARNED}", calibration=text, sequences=4, length=32
        )
    assert "distil" not in str(caught.value)


def test_a_wrong_plan_is_found_first(model: str, tmp_path: Path, no_texts: None) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text("places: [{name: lm_haed, coding: {kind: integer, bits: 4, group_size: 32}}]")
    with pytest.raises(SettingsError, match="did you mean `lm_head`"):
        tailorbird.compress(model, tmp_path / "out", plan=plan)


def test_nothing_to_resume_is_found_first(model: str, tmp_path: Path, no_texts: None) -> None:
    with pytest.raises(ResumeError, match="nothing to resume"):
        tailorbird.fit(model, "45%", tmp_path / "out", resume=True)
    with pytest.raises(ResumeError, match="nothing to resume"):
        tailorbird.compress(model, tmp_path / "out", recipe=RECIPE, resume=True)


def test_an_output_that_exists_is_found_first(model: str, tmp_path: Path, no_texts: None) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(SettingsError, match="exists already"):
        tailorbird.fit(model, "45%", tmp_path / "out")
    with pytest.raises(SettingsError, match="exists already"):
        tailorbird.compress(model, tmp_path / "out", recipe=RECIPE)


def test_unfinished_work_of_another_command_is_found_first(
    model: str, interrupted: Path, no_texts: None
) -> None:
    for settings, message in [
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"memory": "50%"}, r"budget\."),
        ({"method": "rtn"}, 'method.name: "gptq" -> "rtn"'),
        ({"frontier": True}, "frontier: false -> true"),
        ({"target": "gguf"}, 'target: null -> "gguf"'),
    ]:
        with pytest.raises(ResumeError, match=message) as refused:
            tailorbird.fit(model, **{"memory": "45%", "output": interrupted / "fit"} | settings)
        assert "calibration" not in str(refused.value)
    with pytest.raises(ResumeError, match="codings"):
        tailorbird.compress(model, interrupted / "compress", recipe="rtn:bits=5,group=32")
    with pytest.raises(ResumeError, match="budget"):
        tailorbird.compress(model, interrupted / "fit", recipe=RECIPE)


def test_unfinished_work_that_cannot_be_continued_is_found_first(
    model: str, interrupted: Path, no_texts: None
) -> None:
    record = interrupted / "fit.partial" / ".job" / "record.json"
    holder = Job(interrupted / "fit", json.loads(record.read_text()))
    with pytest.raises(ResourceError, match="another process"):
        tailorbird.fit(model, "45%", interrupted / "fit")
    holder.close()
    record.write_text("[")
    with pytest.raises(ResumeError, match="can't be read"):
        tailorbird.fit(model, "45%", interrupted / "fit")
    record.unlink()
    with pytest.raises(ResumeError, match="holds no record"):
        tailorbird.fit(model, "45%", interrupted / "fit")


def test_unfinished_work_is_held_against_the_texts_once_they_are_read(
    model: str, text: str, interrupted: Path
) -> None:
    with pytest.raises(ResumeError, match="with other inputs: calibration: "):
        tailorbird.fit(model, "45%", interrupted / "fit", calibration=text, sequences=3, length=32)


def test_control_unfinished_work_of_the_same_command_goes_on(
    model: str, text: str, interrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Went(Exception):
        pass

    def go(*_: object) -> None:
        raise Went

    monkeypatch.setattr(planning, "score", go)
    same = {"calibration": text, "sequences": 4, "length": 32, "resume": True}
    with pytest.raises(Went):
        tailorbird.fit(model, "45%", interrupted / "fit", **same)
    with pytest.raises(Went):
        tailorbird.compress(model, interrupted / "compress", recipe=RECIPE, **same)


def test_held_out_text_is_read_before_any_is_sampled(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise TextsWereOpened

    monkeypatch.setattr("tailorbird.run.generate.sample_text", refuse)
    with pytest.raises(TextError, match="does not exist"):
        tailorbird.fit(model, "45%", tmp_path / "out", evaluation=str(tmp_path / "none.txt"))
    with pytest.raises(TextsWereOpened):
        tailorbird.fit(model, "45%", tmp_path / "out")


@pytest.mark.parametrize("kept", [("embedding",), ("head", "*.down_proj")])
def test_a_plan_leaves_at_16_bits_what_it_is_told_to_keep(
    model: str, text: str, tmp_path: Path, kept: tuple[str, ...]
) -> None:
    result = tailorbird.fit(
        model, "60%", tmp_path / "out", calibration=text, sequences=4, length=32, keep=kept,
        measure_speed=False, measure_spread=False, allow_slower=True, method="rtn",
    )  # fmt: skip
    places = load_plan(Path(result.output) / "plan.yaml").places
    named = {"embedding": "model.embed_tokens", "head": "lm_head"}
    patterns = [named.get(pattern, pattern) for pattern in kept]
    inside = [place for place in places if any(fnmatch(place.name, pattern) for pattern in patterns)]
    assert inside
    assert all(isinstance(place.coding.coding(), FloatCoding) for place in inside)
    assert any(isinstance(place.coding.coding(), IntegerCoding) for place in places)
    assert result.weight_bytes <= result.budget_bytes


def test_what_is_kept_counts_in_the_smallest_budget(model: str, text: str, tmp_path: Path) -> None:
    with pytest.raises(BudgetError):
        tailorbird.fit(model, "25%", tmp_path / "out", calibration=text, keep=["*"])


def test_a_pattern_that_fits_nothing_is_refused_with_names_near_it(
    model: str, tmp_path: Path, no_texts: None
) -> None:
    with pytest.raises(SettingsError, match=r"--keep embeding.*did you mean `embedding`"):
        tailorbird.fit(model, "45%", tmp_path / "out", keep=["embeding"])


@pytest.mark.parametrize("seed", [-1, 2**62 + 1])
def test_a_seed_that_no_plan_holds_is_refused_before_texts(
    seed: int, model: str, no_texts: None, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=f"a seed of {seed}"):
        tailorbird.fit(model, "50%", tmp_path / "out", seed=seed)
    with pytest.raises(SettingsError, match=f"a seed of {seed}"):
        tailorbird.compress(model, tmp_path / "out", recipe=RECIPE, seed=seed)
    assert not list(tmp_path.iterdir())
