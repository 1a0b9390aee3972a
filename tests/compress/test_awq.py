"""Folds inside a compression: exact for the block, better for the rounding, recorded, checked, resumed."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tailorbird import api
from tailorbird.calibrate.job import Job
from tailorbird.calibrate.statistics import LinearStatistics
from tailorbird.compress import fit, manifest, planning
from tailorbird.compress import work as work_module
from tailorbird.compress.gate import Verdict, examine
from tailorbird.compress.recipe import Recipe, make_recipe
from tailorbird.errors import CheckpointError
from tailorbird.formats.packed import Coding, FloatCoding
from tailorbird.linear.folds import FOLDS_FILE, read_folds
from tailorbird.linear.quantize.awq import Awq, Fold
from tailorbird.linear.quantize.outliertune import Outliertune
from tailorbird.model.file_names import INDEX_FILE
from tailorbird.model.weights import Weights
from tailorbird.model.writing import write_tensors
from tailorbird.plan.planfile import load_plan
from tailorbird.plan.score_cache import ScoreCache
from tailorbird.plan.scores import Scores
from tailorbird.progress import Silent
from tiny import save_model

ATTENTION, GATED = "self_attn.v_proj->self_attn.o_proj", "mlp.up_proj->mlp.down_proj"
#: architecture -> folds of every block: norms, and pairs of linears
FOLDED = {
    "llama": {"input_layernorm", "post_attention_layernorm", ATTENTION, GATED},
    "qwen2": {"input_layernorm", "post_attention_layernorm", ATTENTION, GATED},
    "gemma2": {"input_layernorm", "pre_feedforward_layernorm", ATTENTION, GATED},
    "gpt2": {"ln_1", "ln_2"},
    "phi3": {"input_layernorm", "post_attention_layernorm"},
    "opt": {"self_attn_layer_norm", "final_layer_norm", "self_attn.v_proj->self_attn.out_proj"},
}
#: as many value heads as heads, so that values fold into the output projection
EQUAL_HEADS = {"num_key_value_heads": 4}

NO_SCORES = Scores((), {}, "")


@dataclass
class Made:
    """A compressed tiny model and everything that the gate is called with."""

    work: work_module.Work
    directory: Path
    codings: dict[str, Coding]
    rows: dict[str, Tensor]
    measured: dict[str, dict[str, float]]
    scratch: Path

    def verdict(self, directory: Path) -> Verdict:
        texts = self.work.texts
        return examine(
            self.work.checkpoint, self.work.anatomy, directory, self.codings, self.rows,
            texts.held_out.ids, texts.held_out_texts, 10.0, self.scratch, Silent(),
        )  # fmt: skip

    def copy(self, tmp_path: Path) -> Path:
        return Path(shutil.copytree(self.directory, tmp_path / "copy", ignore=shutil.ignore_patterns(".job")))


def save_source(folder: Path, architecture: str, dtype: torch.dtype) -> Path:
    heads = EQUAL_HEADS if architecture in ("llama", "qwen2", "gemma2") else {}
    model = save_model(folder / "model", architecture, dtype=dtype, **heads)
    rng = random.Random(0)
    lines = [json.dumps({"text": "".join(rng.choices("abcdefgh \n", k=300))}) for _ in range(30)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    return model


def open_work(folder: Path, recipe: Recipe) -> work_module.Work:
    return work_module.open_work(
        str(folder / "model"), recipe, calibration=str(folder / "text.jsonl"), evaluation=None, sequences=8,
        length=64, context=None, target=None, seed=0, progress=None,
    )  # fmt: skip


def make(folder: Path, recipe: Recipe, output: str = "out") -> Made:
    """Compress without scores: the pipeline needs none but the head's, and no head is compressed here."""
    work = open_work(folder, recipe)
    codings = planning.codings_of_recipe(work)
    job = Job(folder / output, {"test": 1})
    try:
        compression = fit.compression_of(work, NO_SCORES, ScoreCache({}), codings)
        measured = fit.compress_into(work, job, compression)
    finally:
        job.close()
    return Made(work, job.partial, codings, fit.recorded_rows(job), measured, job.work / "streams")


def recipe_of(method: str, bits: int, group_size: int = 32) -> Recipe:
    fold_settings = {"grid": 5} if method.startswith("awq") else None
    return make_recipe(method, coding={"bits": bits, "group_size": group_size}, fold_settings=fold_settings)


def large_scales(
    self: Awq, weights: Sequence[Tensor], statistics: LinearStatistics, codings: Sequence[Coding]
) -> Fold:
    """A fold that would ruin the model if one of its sides were forgotten."""
    generator = torch.Generator().manual_seed(len(weights))
    exponents = torch.rand(len(statistics.mean_abs), generator=generator) * 4 - 2
    return Fold(exponents.exp2(), 1.0, 0.0, 1.0)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("architecture", FOLDED)
def test_a_fold_leaves_the_function_of_the_model(
    architecture: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_source(tmp_path, architecture, torch.float32)
    monkeypatch.setattr(Awq, "__call__", large_scales)
    made = make(tmp_path, recipe_of(f"awq+{method}", 8))
    expected = {
        "->".join(f"{block.name}.{end}" for end in fold.split("->")) + ".scales"
        for block in made.work.anatomy.blocks
        for fold in FOLDED[architecture]
    }
    assert set(Weights.open_file(made.directory / FOLDS_FILE).names) == expected
    verdict = made.verdict(made.directory)
    assert verdict.passed, [c for c in verdict.checks if not c.passed]
    assert verdict.quality is not None
    assert verdict.quality.kl_mean < 1e-4
    assert max(entry["error"] for entry in made.measured.values()) < 1e-3
    names = {name for name in made.work.checkpoint.weights.names if "norm" in name or ".ln_" in name}
    stored, source = Weights.open(made.directory), made.work.checkpoint.weights
    changed = {n for n in names if not torch.equal(stored.read(n), source.read(n))}
    assert len(changed) >= 2 * len(made.work.anatomy.blocks)


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "gpt_neox", "qwen2"])
def test_a_shift_leaves_the_function_of_the_model_where_there_are_biases(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_source(tmp_path, architecture, torch.float32)
    monkeypatch.setattr(Outliertune, "shift", large_shift)
    made = make(tmp_path, recipe_of("outliertune+gptq", 8))
    folds = read_folds(made.directory, made.work.anatomy)
    shifted = {group.norm for block in folds for group, *_ in block.shifts}
    norms = {group.norm for block in made.work.anatomy.blocks for group in block.norm_groups}
    assert shifted == (norms if architecture != "qwen2" else set())  # RMS norms have no biases
    assert not any(block.pairs for block in folds)
    verdict = made.verdict(made.directory)
    assert verdict.passed, [c for c in verdict.checks if not c.passed]
    assert verdict.quality is not None
    assert verdict.quality.kl_mean < 1e-3
    if shifted:
        directory = made.copy(tmp_path)
        change(directory, ".shift", 1.5)
        caught = failed(made.verdict(directory))["unchanged"]
        assert caught is not None
        assert caught.endswith(".bias")
        assert caught.startswith(made.work.anatomy.blocks[0].name)


def large_shift(self: Outliertune, inputs: Iterable[Tensor]) -> Tensor:
    """A shift that would ruin the model if one of its sides were forgotten."""
    return torch.randn(next(iter(inputs)).shape[-1], generator=torch.Generator().manual_seed(0)) * 3


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """qwen2 in bfloat16, with biases and with a few channels that matter much more than others."""
    folder = tmp_path_factory.mktemp("awq")
    save_salient_source(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Awq, "__call__", large_scales)
        return make(folder, recipe_of("awq+rtn", 4))


def save_salient_source(folder: Path) -> None:
    model = save_source(folder, "qwen2", torch.bfloat16)
    weights = Weights.open(model)
    tensors = {name: weights.read(name) for name in weights.names}
    for name, tensor in tensors.items():
        if "layernorm" in name:
            tensor[::16] *= 12
    write_tensors(model / "model.safetensors", tensors, hashes=False)


def change(directory: Path, suffix: str, factor: float) -> str:
    """Multiply the first value of the first tensor whose name ends in `suffix`; hashes are made anew."""
    for path in sorted(directory.glob("*.safetensors")):
        weights = Weights.open_file(path)
        tensors = {name: weights.read(name) for name in weights.names}
        for name in weights.names:
            if name.endswith(suffix):
                tensors[name].view(-1)[0] *= factor
                write_tensors(path, tensors)
                return name
    raise LookupError(suffix)


def failed(verdict: Verdict) -> dict[str, str | None]:
    return {check.name: check.place for check in verdict.checks if not check.passed}


def test_the_gate_passes_a_sound_fold_in_bfloat16(made: Made) -> None:
    verdict = made.verdict(made.directory)
    assert verdict.passed, failed(verdict)


@pytest.mark.parametrize("suffix", ["0.input_layernorm.weight", "1.self_attn.v_proj.bias"])
def test_a_folded_tensor_that_was_changed_is_caught_and_named(
    made: Made, tmp_path: Path, suffix: str
) -> None:
    directory = made.copy(tmp_path)
    name = change(directory, suffix, 1.01)
    assert failed(made.verdict(directory)) == {"unchanged": name}


def test_a_norm_that_was_set_back_is_caught(made: Made, tmp_path: Path) -> None:
    directory = made.copy(tmp_path)
    name = "model.layers.0.post_attention_layernorm.weight"
    path = directory / json.loads((directory / INDEX_FILE).read_text())["weight_map"][name]
    weights = Weights.open_file(path)
    tensors = {n: weights.read(n) for n in weights.names} | {name: made.work.checkpoint.weights.read(name)}
    write_tensors(path, tensors)
    assert failed(made.verdict(directory))["unchanged"] == name


def test_recorded_scales_of_a_norm_that_were_changed_are_caught(made: Made, tmp_path: Path) -> None:
    directory = made.copy(tmp_path)
    change(directory, "0.input_layernorm.scales", 1.1)
    assert failed(made.verdict(directory))["unchanged"] == "model.layers.0.input_layernorm.weight"


def test_recorded_scales_of_a_pair_that_were_changed_are_caught(made: Made, tmp_path: Path) -> None:
    directory = made.copy(tmp_path)
    change(directory, "0.mlp.up_proj->model.layers.0.mlp.down_proj.scales", 2.0)
    assert failed(made.verdict(directory))["weights"] == "model.layers.0.mlp.up_proj"


def test_lost_scales_are_caught(made: Made, tmp_path: Path) -> None:
    directory = made.copy(tmp_path)
    (directory / FOLDS_FILE).unlink()
    assert {"unchanged", "weights"} <= set(failed(made.verdict(directory)))


@pytest.mark.parametrize("damage", ["flipped", "unknown", "negative", "shape"])
def test_damaged_scales_are_refused(made: Made, tmp_path: Path, damage: str) -> None:
    directory = made.copy(tmp_path)
    path = directory / FOLDS_FILE
    weights = Weights.open_file(path)
    tensors = {name: weights.read(name) for name in weights.names}
    name = weights.names[0]
    if damage == "flipped":
        data = bytearray(path.read_bytes())
        data[-2] ^= 1
        path.write_bytes(data)
    else:
        scales = tensors.pop(name)
        changed = {"unknown": scales, "negative": -scales, "shape": scales[1:].contiguous()}[damage]
        write_tensors(path, tensors | {name + ".2" * (damage == "unknown"): changed})
    with pytest.raises(CheckpointError):
        read_folds(directory, made.work.anatomy)
    assert "files" in failed(made.verdict(directory))


def test_scales_count_in_no_index_and_stand_in_the_plan(made: Made) -> None:
    weights = Weights.open(made.directory)
    assert not any(name.endswith("layernorm.scales") or "->" in name for name in weights.names)
    entries = manifest.fold_entries(read_folds(made.directory, made.work.anatomy))
    assert entries is not None
    assert entries[:3] == [
        {
            "source": "model.layers.0.self_attn.v_proj",
            "linears": ["model.layers.0.self_attn.o_proj"],
            "scales_file": FOLDS_FILE,
        },
        {
            "source": "model.layers.0.mlp.up_proj",
            "linears": ["model.layers.0.mlp.down_proj"],
            "scales_file": FOLDS_FILE,
        },
        {
            "norm": "model.layers.0.input_layernorm",
            "linears": [f"model.layers.0.self_attn.{role}_proj" for role in "qkv"],
            "scales_file": FOLDS_FILE,
        },
    ]


@pytest.mark.parametrize("becomes", [None, FloatCoding("bfloat16")])
def test_a_norm_is_folded_only_where_all_its_readers_become_integers(
    becomes: Coding | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_source(tmp_path, "llama", torch.float32)
    monkeypatch.setattr(Awq, "__call__", large_scales)
    others = dict.fromkeys(("model.layers.0.self_attn.k_proj", "model.layers.0.mlp.up_proj"), becomes)
    chosen = planning.codings_of_recipe

    def mixed(work: work_module.Work) -> dict[str, Coding]:
        return {n: c for n, c in (chosen(work) | others).items() if c is not None}

    monkeypatch.setattr(planning, "codings_of_recipe", mixed)
    made = make(tmp_path, recipe_of("awq+rtn", 8))
    folds = read_folds(made.directory, made.work.anatomy)[0]
    assert [pair.kind for pair, _ in folds.pairs] == ["v->o"]
    assert folds.norms == ()
    verdict = made.verdict(made.directory)
    assert verdict.passed, failed(verdict)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_at_three_bits_the_scales_that_are_found_lower_the_error(method: str, tmp_path: Path) -> None:
    save_salient_source(tmp_path)
    # a grid of one exponent, 0, finds nothing; everything else is alike
    recipes = {
        grid: make_recipe(f"awq+{method}", coding={"bits": 3}, fold_settings={"grid": grid})
        for grid in (1, 8)
    }
    without, folded = (make(tmp_path, recipe, f"grid-{grid}") for grid, recipe in recipes.items())
    assert not (without.directory / FOLDS_FILE).exists()
    assert (folded.directory / FOLDS_FILE).exists()
    before, after = (sum(entry["error"] for entry in made.measured.values()) for made in (without, folded))
    assert after < 0.97 * before
    for made in (without, folded):
        verdict = made.verdict(made.directory)
        assert verdict.passed, failed(verdict)


def test_an_interrupted_fold_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_salient_source(tmp_path)
    recipe = recipe_of("awq+gptq", 4)
    expected = contents(make(tmp_path, recipe, "whole").directory)
    assert FOLDS_FILE in expected
    calls = iter(range(100))
    search = Awq.__call__

    def interrupted(self: Awq, *given: object) -> Fold:
        if next(calls) == 5:  # in the second block, after its pairs and the first of its norms
            raise KeyboardInterrupt
        return search(self, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(Awq, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, recipe, "broken")
    resumed = make(tmp_path, recipe, "broken")
    assert next(calls) == 5 + 1 + 4  # the first block's four searches were not made again
    assert contents(resumed.directory) == expected


def contents(directory: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in directory.iterdir()
        if path.suffix in (".safetensors", ".json")
    }


def test_a_result_with_folds_is_compressed_again_by_its_plan(tmp_path: Path) -> None:
    save_source(tmp_path, "llama", torch.float32)
    (tmp_path / "recipe.yaml").write_text(
        "method: rtn\ncoding: {bits: 3, group_size: 64}\nfold: awq\nfold_settings: {grid: 4}\n"
    )
    arguments: Any = {
        "calibration": str(tmp_path / "text.jsonl"), "sequences": 8, "length": 64, "measure_speed": False,
    }  # fmt: skip
    model = str(tmp_path / "model")
    api.compress(model, tmp_path / "first", recipe=str(tmp_path / "recipe.yaml"), **arguments)
    plan = load_plan(tmp_path / "first" / "plan.yaml")
    assert plan.method is not None
    assert plan.method.model_dump() == {
        "name": "awq+rtn", "clip_search": True, "fold_settings": {"grid": 4, "clip_search": False},
    }  # fmt: skip
    assert plan.folds
    assert all(fold.scales_file == FOLDS_FILE for fold in plan.folds)
    api.compress(model, tmp_path / "second", plan=tmp_path / "first" / "plan.yaml", **arguments)
    names = [path.name for path in (tmp_path / "first").glob("*.safetensors")]
    assert FOLDS_FILE in names
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
