"""The whole of a tuning: what it writes, that it goes on after any stop, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressed import INT4, save_compressed
from forked import in_child
from tailorbird.adapt import checkpoints
from tailorbird.adapt.open import load_adapted
from tailorbird.adapt.settings import TuneSettings
from tailorbird.adapt.step import Diverged
from tailorbird.adapt.tune import Data, preview_tuning, tune
from tailorbird.errors import (
    BudgetError,
    CheckpointError,
    ResourceError,
    ResumeError,
    SettingsError,
    TextError,
    UnsupportedArchitecture,
)
from tailorbird.model.load import load
from tailorbird.progress import Silent
from tiny import byte_tokenizer, make_model, save_model

SHORT = TuneSettings(
    method_settings={"rank": 2}, steps=6, batch=2, length=48, rate=5e-3, evaluate_every=2, save_every=1
)


class Stopping(Silent):
    """Does something once a step is done."""

    def __init__(self, after: int, do: Any) -> None:
        self.left, self.do, self.tuning = after, do, False

    def stage(self, name: str, total: int) -> None:
        self.tuning = name == "tune"

    def advance(self, n: int = 1, note: str = "") -> None:
        if self.tuning and note:
            self.left -= 1
            if self.left == 0:
                self.do()


def contents(directory: Path) -> dict[str, bytes]:
    """Files of a result, without times."""
    return {file.name: file.read_bytes() for file in directory.iterdir() if file.name.startswith("adapter_")}


@pytest.fixture(scope="module")
def whole(model: str, data: Data, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What comes out when nothing happens."""
    out = tmp_path_factory.mktemp("whole") / "out"
    result = tune(model, data, out, SHORT)
    assert result.loss_after is not None
    assert result.loss_before is not None
    assert result.loss_after < result.loss_before
    assert not out.with_name("out.partial").exists()
    return contents(out)


def test_a_killed_tuning_goes_on_and_ends_with_the_same_bytes(
    model: str, data: Data, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for after in (1, 3, 1):
        kill = Stopping(after, lambda: os.kill(os.getpid(), signal.SIGKILL))
        assert in_child(lambda kill=kill: tune(model, data, out, SHORT, progress=kill)) == -signal.SIGKILL
        assert not out.exists()
    tune(model, data, out, SHORT, resume=True)
    assert contents(out) == whole


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_the_last_whole_step(
    number: int, model: str, data: Data, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out, rare = tmp_path / "out", TuneSettings(**{**vars(SHORT), "save_every": 100})
    with pytest.raises(KeyboardInterrupt):
        tune(model, data, out, rare, progress=Stopping(2, lambda: signal.raise_signal(number)))
    states = list((tmp_path / "out.partial" / ".job" / "states").iterdir())
    assert [state.name for state in states] == ["step-000000002"]
    tune(model, data, out, rare)
    assert contents(out) == whole


def test_a_state_that_cant_be_written_or_read_leaves_the_one_before(
    model: str, data: Data, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, written = tmp_path / "out", []

    def fill(path: Path, tensors: Any, **others: Any) -> None:
        if len(written) == 3:
            path.write_bytes(b"half")
            raise ResourceError("the disk is full", "room", "make some")
        written.append(path)
        original(path, tensors, **others)

    original = checkpoints.write_tensors
    monkeypatch.setattr(checkpoints, "write_tensors", fill)
    with pytest.raises(ResourceError, match="full"):
        tune(model, data, out, SHORT)
    monkeypatch.undo()
    states = sorted((tmp_path / "out.partial" / ".job" / "states").iterdir())
    assert [state.name for state in states] == ["step-000000002", "step-000000003"]
    file = states[1] / checkpoints.TENSORS
    body = bytearray(file.read_bytes())
    body[-5] ^= 1
    file.write_bytes(body)
    tune(model, data, out, SHORT)
    assert contents(out) == whole


def test_offloaded_states_change_no_byte_and_go_on_in_ram(
    model: str, data: Data, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out, states = tmp_path / "out", tmp_path / "states"
    stop = Stopping(3, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        tune(model, data, out, SHORT, progress=stop, offload=states)
    stop = Stopping(2, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        tune(model, data, out, SHORT, progress=stop)
    tune(model, data, out, SHORT, resume=True, offload=states)
    assert contents(out) == whole


def test_weights_learn_the_same_with_offloaded_states(model: str, data: Data, tmp_path: Path) -> None:
    full = TuneSettings(**{**vars(SHORT), "method": "full", "method_settings": {}, "rate": 1e-4, "steps": 2})
    for name, states in (("plain", None), ("offloaded", tmp_path / "states")):
        tune(model, data, tmp_path / name, full, offload=states)
    plain, offloaded = (
        {one.name: one.read_bytes() for one in (tmp_path / name).glob("*.safetensors")}
        for name in ("plain", "offloaded")
    )
    assert plain == offloaded
    with pytest.raises(SettingsError, match="has states"):
        tune(model, data, tmp_path / "no", TuneSettings(method="lomo"), offload=tmp_path / "states")


def test_other_settings_dont_resume(model: str, data: Data, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        tune(model, data, out, SHORT, progress=Stopping(1, lambda: signal.raise_signal(signal.SIGINT)))
    changed = TuneSettings(**{**vars(SHORT), "rate": 1e-3})
    with pytest.raises(ResumeError, match=r"settings\.rate: 0\.005 -> 0\.001"):
        tune(model, data, out, changed)
    with pytest.raises(ResumeError, match="nothing to resume"):
        tune(model, data, tmp_path / "other", SHORT, resume=True)


def test_a_loss_that_isnt_finite_stops_and_keeps_the_last_state(
    model: str, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tailorbird.adapt.trunk import Trunk

    seen, own = [], Trunk.loss

    def spoiled(self: Trunk, row: Any) -> torch.Tensor:
        seen.append(row)
        return own(self, row) * (float("nan") if torch.is_grad_enabled() and len(seen) > 10 else 1.0)

    monkeypatch.setattr(Trunk, "loss", spoiled)
    with pytest.raises(Diverged, match="loss is nan"):
        tune(model, data, tmp_path / "out", SHORT)
    monkeypatch.undo()
    assert list((tmp_path / "out.partial" / ".job" / "states").iterdir())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["lora", "mezo"])
def test_examples_whose_loss_isnt_finite_are_named(
    method: str, data: Data, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tailorbird.adapt.trunk import Trunk

    own, bad = Trunk.loss, byte_tokenizer()("~")["input_ids"][0]

    def spoiled(self: Trunk, row: Any) -> torch.Tensor:
        return own(self, row) * (float("nan") if bool((row.ids == bad).any()) else 1.0)

    monkeypatch.setattr(Trunk, "loss", spoiled)
    train = tmp_path / "train.jsonl"
    rows = [{"prompt": f"{n} is ", "completion": "a\tnumber ~" if n == 11 else "a number"} for n in range(20)]
    train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = TuneSettings(**{**vars(SHORT), "method": method, "method_settings": {"method": "lora"}})
    if method == "lora":
        settings = SHORT
    wrong = r"that of 1 of its \d+ examples isn't finite, which begin with `11 is a\\tnumber ~</s>` "
    with pytest.raises(Diverged, match=wrong):
        tune(model, Data(str(train), validation=data.source), tmp_path / "out", settings)


def test_what_was_written_loads_in_peft(model: str, data: Data, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    tune(model, data, tmp_path / "out", SHORT)
    ids = torch.arange(30)[None]
    base = load(model)
    plain = base(ids).logits
    tuned = peft.PeftModel.from_pretrained(base, tmp_path / "out")(ids).logits
    assert (tuned - plain).norm() > 1e-3 * plain.norm()


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("mixlora", {"rank": 4, "experts": 2}),
        ("goat", {"rank": 4, "experts": 2}),
        ("meft", {"rank": 4, "bits": 4}),
    ],
)
def test_what_is_no_change_of_weights_is_loaded_with_what_it_learned(
    method: str, settings: dict[str, Any], model: str, data: Data, tmp_path: Path
) -> None:
    changed = {"method": method, "method_settings": settings, "memory": 16 << 30}
    result = tune(model, data, tmp_path / "out", TuneSettings(**{**vars(SHORT), **changed}))
    ids = torch.arange(30)[None]
    adapted, again = (load_adapted(model, tmp_path / "out")(ids).logits for _try in range(2))
    plain = load(model)(ids).logits
    assert torch.equal(adapted, again)
    assert (adapted - plain).norm() > 1e-3 * plain.norm()
    assert result.adapter_bytes > 0
    other = save_model(tmp_path / "other", seed=5)
    with pytest.raises(SettingsError, match="tuned on"):
        load_adapted(str(other), tmp_path / "out")


@pytest.mark.parametrize("method", ["mixlora", "prompt-tuning", "glora"])
def test_an_adapter_whose_tensors_are_others_is_refused_by_their_names(
    method: str, data: Data, tmp_path: Path
) -> None:
    base, out = tmp_path / "m", tmp_path / "out"
    save_compressed(base, make_model("llama"), INT4, tokenizer=byte_tokenizer())
    tune(
        str(base),
        data,
        out,
        TuneSettings(**{**vars(SHORT), "method": method, "method_settings": {}, "steps": 1}),
    )
    file, origin_file = out / "adapter_model.safetensors", out / "tailorbird.json"
    whole = load_file(file)
    name, tensor = next((name, one) for name, one in whole.items() if one.dim() == 2)
    others = {one: value for one, value in whole.items() if one != name}
    for tensors, message in (
        (
            others,
            rf"`{re.escape(name)}` \[.*\] is missing .* expected: the {len(whole)} tensors of `{method}`",
        ),
        (whole | {"more": tensor.clone()}, r"`more` \[.*\] is none of the method's"),
        (whole | {name: tensor[:, :-1].contiguous()}, rf"`{re.escape(name)}` is \[.*\], not \[.*\] "),
    ):
        save_file(tensors, file)
        with pytest.raises(CheckpointError, match=message):
            load_adapted(str(base), out)
    save_file(whole, file)
    load_adapted(str(base), out)
    origin_file.write_text("{}")
    with pytest.raises(CheckpointError, match="doesn't say `base`, `base_name`, `method`"):
        load_adapted(str(base), out)


@pytest.mark.parametrize(
    ("method", "inner"),
    [("ist", "glora"), ("density", "glora"), ("mezo", "glora"), ("mezo", "meft"), ("ist", "mixlora")],
)
def test_what_a_wrapped_method_writes_in_its_own_form_is_loaded_as_it_was_learned(
    method: str, inner: str, data: Data, tmp_path: Path
) -> None:
    """Packed linears, beside which GLoRA writes its own tensors: loaded as those of the method within."""
    base = tmp_path / "m"
    save_compressed(base, make_model("llama"), INT4, tokenizer=byte_tokenizer())
    settings: dict[str, Any] = {"method": inner, "rank": 2}
    learning = {"method": method, "method_settings": settings, "rate": 0.05, "steps": 2, "memory": 16 << 30}
    tune(str(base), data, tmp_path / "out", TuneSettings(**{**vars(SHORT), **learning}))
    ids = torch.arange(30)[None]
    adapted = load_adapted(str(base), tmp_path / "out")(input_ids=ids).logits
    plain = load(str(base))(input_ids=ids).logits
    assert not torch.equal(adapted, plain)
    if inner == "mixlora":  # written with what its wrapper holds
        return
    origin_file = tmp_path / "out" / "tailorbird.json"
    origin = json.loads(origin_file.read_text())
    origin["method"] |= {"method": inner, "method_settings": {"rank": 2}}
    origin_file.write_text(json.dumps(origin))
    alone = load_adapted(str(base), tmp_path / "out")(input_ids=ids).logits
    assert torch.equal(adapted, alone)


#: method, its settings
BEGINNINGS = [
    ("prompt-tuning", {"tokens": 4}),
    ("prefix-tuning", {"tokens": 4}),
    ("prefix-tuning", {"tokens": 4, "projection": 8, "start": "zero"}),
]


@pytest.mark.parametrize(("method", "settings"), BEGINNINGS)
@pytest.mark.parametrize("base", ["dense", "packed", "falcon"])
def test_what_texts_begin_with_is_learned_and_goes_on_after_a_stop(
    base: str, method: str, settings: dict[str, Any], model: str, data: Data, tmp_path: Path
) -> None:
    beginning = TuneSettings(
        **{**vars(SHORT), "method": method, "method_settings": settings, "rate": 0.05, "steps": 4}
    )
    if base == "packed":
        save_compressed(tmp_path / "m", make_model("llama"), INT4, tokenizer=byte_tokenizer())
    elif base == "falcon":
        save_model(tmp_path / "m", "falcon")
    directory = model if base == "dense" else str(tmp_path / "m")
    if base == "falcon" and method == "prefix-tuning":
        with pytest.raises(UnsupportedArchitecture, match="use prompt-tuning"):
            tune(directory, data, tmp_path / "out", beginning)
        assert [one.name for one in tmp_path.iterdir()] == ["m"]
        return
    result = tune(directory, data, tmp_path / "out", beginning)
    assert result.loss_after is not None
    assert result.loss_before is not None
    assert result.loss_after < result.loss_before
    ids = torch.arange(30)[None]
    adapted = load_adapted(directory, tmp_path / "out")(input_ids=ids).logits
    assert not torch.equal(adapted[:, -30:], load(directory)(ids).logits)
    if base == "dense":
        again, stop = tmp_path / "again", Stopping(2, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            tune(directory, data, again, beginning, progress=stop)
        tune(directory, data, again, beginning, resume=True)
        assert contents(again) == contents(tmp_path / "out")


def test_what_texts_begin_with_is_learned_in_little_memory_and_without_gradients(
    model: str, data: Data, tmp_path: Path
) -> None:
    """A pass shorter than an example reads it in chunks, its learned tokens first."""
    for number, changed in enumerate(
        (
            {"method": "prompt-tuning", "method_settings": {"tokens": 10}, "pass_tokens": 8},
            {"method": "prefix-tuning", "method_settings": {"tokens": 10}, "pass_tokens": 8},
            {"method": "mezo", "method_settings": {"method": "prompt-tuning", "tokens": 3}, "rate": None},
        )
    ):
        settings = TuneSettings(**{**vars(SHORT), "steps": 1, **changed})
        assert tune(model, data, tmp_path / str(number), settings).steps == 1


def test_the_context_holds_what_texts_begin_with(model: str, data: Data, tmp_path: Path) -> None:
    for method, _ in BEGINNINGS[:2]:
        changed = {"method": method, "method_settings": {"tokens": 81}}
        with pytest.raises(SettingsError, match=r"48 tokens behind 81 learned ones .* at most 47"):
            tune(model, data, tmp_path / "out", TuneSettings(**{**vars(SHORT), **changed}))
        fitting = changed | {"method_settings": {"tokens": 4}, "targets": ("q",)}
        with pytest.raises(SettingsError, match="adapts no linear"):
            tune(model, data, tmp_path / "out", TuneSettings(**{**vars(SHORT), **fitting}))
    assert list(tmp_path.iterdir()) == []


def test_tuning_stops_when_it_gets_no_better(model: str, data: Data, tmp_path: Path) -> None:
    wild = TuneSettings(**{**vars(SHORT), "rate": 2.0, "steps": 40, "evaluate_every": 1, "patience": 2})
    result = tune(model, data, tmp_path / "out", wild)
    assert result.steps < 40
    assert result.best_step is not None
    assert result.steps == result.best_step + 2
    assert result.loss_after is not None
    assert result.loss_before is not None
    assert result.loss_after <= result.loss_before


def test_a_packed_model_is_tuned_too(data: Data, tmp_path: Path) -> None:
    save_compressed(tmp_path / "m", make_model("llama"), INT4, tokenizer=byte_tokenizer())
    result = tune(str(tmp_path / "m"), data, tmp_path / "out", SHORT)
    assert result.loss_after is not None
    assert result.loss_before is not None
    assert result.loss_after < result.loss_before


def test_a_model_that_reads_one_example_at_a_time_is_tuned_too(data: Data, tmp_path: Path) -> None:
    falcon = save_model(tmp_path / "m", "falcon")
    result = tune(str(falcon), data, tmp_path / "out", SHORT)
    assert result.loss_after is not None
    assert result.loss_before is not None
    assert result.loss_after < result.loss_before
    assert "don't share rows" in result.warnings[0]


def test_a_preview_writes_nothing_and_tells_what_would_be_learned(model: str, data: Data) -> None:
    before = sorted(Path(data.source).parent.iterdir())
    found = preview_tuning(model, data, SHORT)
    assert found.steps == 6
    assert found.trainable_parameters > 0
    assert found.predicted_peak_bytes > 0
    assert "always" in found.example
    assert sorted(Path(data.source).parent.iterdir()) == before


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"method": "loro"}, "did you mean `lora`"),
        ({"method_settings": {"rang": 3}}, "did you mean `rank`"),
        ({"method_settings": {"rank": 65}}, "rank"),
        ({"targets": ("q_prj",)}, "did you mean `q_proj`"),
        ({"optimizer": "adam"}, "did you mean `adamw`"),
        ({"schedule": "cosin"}, "did you mean `cosine`"),
        ({"method": "ia3", "method_settings": {}, "rate_ratio": 16.0}, "rate ratio of 16 for ia3"),
        ({"method": "full", "method_settings": {}, "rate_ratio": 2.0}, "rate ratio of 2 for full"),
        ({"length": 129}, "context of 128"),
    ],
)
def test_mistakes_are_told_before_work(
    changed: dict[str, Any], message: str, model: str, data: Data, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=message):
        tune(model, data, tmp_path / "out", TuneSettings(**{**vars(SHORT), **changed}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "changed",
    [{"steps": 0}, {"batch": 0}, {"rate": 0.0}, {"rate": float("nan")}, {"warmup": 2.0}, {"clip": -1.0}],
)
def test_numbers_out_of_range_are_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        TuneSettings(**changed)


def test_too_little_memory_is_told_with_what_it_takes(model: str, data: Data, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"1\.00 MiB of memory, but tuning takes .* at least"):
        tune(model, data, tmp_path / "out", TuneSettings(**{**vars(SHORT), "memory": 1 << 20}))
    assert list(tmp_path.iterdir()) == []


class Noting(Silent):
    """Keeps the remarks."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_what_was_chosen_for_the_memory_is_told_before_it_begins(
    model: str, data: Data, tmp_path: Path
) -> None:
    settings = TuneSettings(**{**vars(SHORT), "steps": 1, "memory": 16 << 30})
    told = preview_tuning(model, data, settings).why
    assert len(told) == 1
    assert re.fullmatch(
        r"chosen: \d+ tokens at a time, no block computed again, which takes .* of 16.00 GiB \(measured\)",
        told[0],
    )
    listening = Noting()
    tune(model, data, tmp_path / "out", settings, progress=listening)
    assert any(line.startswith("chosen: ") for line in listening.notes)
    assert preview_tuning(model, data, SHORT).why == []


def test_wrong_examples_leave_nothing(model: str, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "completion": "b"}\nnot json\n')
    with pytest.raises(TextError, match="line 2"):
        tune(model, Data(str(bad)), tmp_path / "out", SHORT)
    assert list(tmp_path.iterdir()) == [bad]
