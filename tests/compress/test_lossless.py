"""`compress --recipe df11`: smaller files of the very same model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import tailorbird
from compressing import killed_at_block
from results import digests, text_file
from tailorbird.adapt.merge.pipeline import packed_places
from tailorbird.compress.recipe import make_recipe, parse_recipe, planned_recipe
from tailorbird.compress.stored_model import StoredModel
from tailorbird.errors import ExportError, SettingsError
from tailorbird.kernels import entropy
from tailorbird.model.anatomy import read_anatomy
from tailorbird.model.checkpoint import open_checkpoint
from tailorbird.model.load import load
from tailorbird.plan.planfile import load_plan
from tiny import save_model

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3]])


def compress(source: Path, output: Path, text: Path, **settings: Any) -> Any:
    return tailorbird.compress(
        str(source), output, calibration=str(text), sequences=4, length=32, measure_speed=False,
        measure_spread=False, **({"recipe": "df11"} | settings),
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A source, a text, and what became of the source."""
    folder = tmp_path_factory.mktemp("df11")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TAILORBIRD_CACHE", str(folder / "cache"))
        source, text = save_model(folder / "source", dtype=torch.bfloat16), text_file(folder)
        compress(source, folder / "out", text)
    return source, text, folder / "out"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def plan_with(made: tuple[Path, Path, Path], folder: Path, change: Any) -> Path:
    """The plan of the result, changed."""
    plan = yaml.safe_load((made[2] / "plan.yaml").read_text())
    change(plan)
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan))
    return folder / "plan.yaml"


@pytest.mark.parametrize(("architecture", "tied"), [("llama", True), ("gpt2", True), ("gpt_neox", False)])
def test_the_result_is_the_source(tmp_path: Path, architecture: str, tied: bool) -> None:
    source = save_model(tmp_path / "in", architecture, dtype=torch.bfloat16, tie_word_embeddings=tied)
    result = compress(source, tmp_path / "out", text_file(tmp_path))
    assert result.accepted
    assert result.kl_mean == 0
    before, after = load(source), load(tmp_path / "out")
    assert torch.equal(logits(before), logits(after))
    state = after.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in before.state_dict().items())


def test_bytes_are_those_of_the_plan(made: tuple[Path, Path, Path]) -> None:
    source, _, output = made
    tensors = {name: t for file in output.glob("*.safetensors") for name, t in load_file(file).items()}
    for place in load_plan(output / "plan.yaml").places:
        parts = [tensor.nbytes for name, tensor in tensors.items() if name.rpartition(".")[0] == place.name]
        assert len(parts) == 4
        assert place.bytes == sum(parts)
    stored = sum(tensor.nbytes for tensor in tensors.values())
    assert stored < 0.8 * open_checkpoint(str(source)).weights.total_bytes


def test_its_plan_gives_the_same_files(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    source, text, output = made
    compress(source, tmp_path / "out", text, recipe=None, plan=output / "plan.yaml")
    assert digests(tmp_path / "out") == digests(output)


@pytest.mark.parametrize("stop_at", [0, 1])
def test_a_run_stopped_at_a_block_ends_with_the_same_bytes(
    made: tuple[Path, Path, Path], tmp_path: Path, stop_at: int
) -> None:
    source, text, output = made
    with killed_at_block(stop_at):
        compress(source, tmp_path / "out", text)
    compress(source, tmp_path / "out", text, resume=True)
    assert digests(tmp_path / "out") == digests(output)


def with_linears_rounded(plan: dict[str, Any], method: str) -> None:
    """A plan whose linears are rounded by `method`, and whose ends keep their coding."""
    plan["method"] = {"name": method}
    for place in plan["places"]:
        if place["role"] not in ("embedding", "head", "tied"):
            place["coding"] = {"kind": "integer", "bits": 4, "group_size": 32}


def test_weights_that_a_rotation_changes_are_not_coded(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    plan = plan_with(made, tmp_path, partial(with_linears_rounded, method="hadamard+rtn"))
    with pytest.raises(SettingsError, match="beside a rotation"):
        compress(made[0], tmp_path / "out", made[1], recipe=None, plan=plan)
    assert not list(tmp_path.glob("out*"))


def test_an_embedding_keeps_its_bits_beside_codes(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    source, text, _ = made
    plan = plan_with(made, tmp_path, partial(with_linears_rounded, method="rtn"))
    compress(source, tmp_path / "out", text, recipe=None, plan=plan)
    before, after = load(source), load(tmp_path / "out")
    assert torch.equal(before.get_input_embeddings().weight, after.get_input_embeddings().weight)
    assert not torch.equal(logits(before), logits(after))


def test_a_place_may_be_a_float_of_another_dtype(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    def narrow(plan: dict[str, Any]) -> None:
        plan["places"][1]["coding"] = {"kind": "float", "dtype": "float16"}

    source, text, _ = made
    compress(source, tmp_path / "out", text, recipe=None, plan=plan_with(made, tmp_path, narrow))
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(load(source)), atol=1e-2, rtol=1e-2)


def test_a_plan_that_states_other_bytes_is_refused(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    def one_more(plan: dict[str, Any]) -> None:
        plan["places"][1]["coding"]["stream_bytes"] += 1

    source, text, _ = made
    with pytest.raises(SettingsError, match="which its weights take"):
        compress(source, tmp_path / "out", text, recipe=None, plan=plan_with(made, tmp_path, one_more))


def test_a_source_of_another_dtype_is_refused(tmp_path: Path) -> None:
    source = save_model(tmp_path / "in", dtype=torch.float32)
    with pytest.raises(SettingsError, match="in float32, to be entropy-coded"):
        compress(source, tmp_path / "out", text_file(tmp_path))


@pytest.mark.parametrize(
    "recipe", ["df11:bits=4", "awq+df11", "df11+eora", "df11:clip_search=true", "df11:table=3", "df11:x"]
)
def test_nothing_stands_beside_it(recipe: str) -> None:
    with pytest.raises(SettingsError):
        parse_recipe(recipe)


def test_is_a_recipe_without_settings(tmp_path: Path) -> None:
    assert parse_recipe("df11") == make_recipe("df11")
    (tmp_path / "recipe.yaml").write_text("method: df11\n")
    assert parse_recipe(str(tmp_path / "recipe.yaml")) == make_recipe("df11")


def test_no_budget_chooses_it() -> None:
    with pytest.raises(SettingsError, match=r"compress --recipe df11$"):
        planned_recipe("df11")


@pytest.mark.parametrize("form", ["gguf", "compressed-tensors"])
def test_exports_that_cannot_hold_it_are_refused(
    made: tuple[Path, Path, Path], tmp_path: Path, form: str
) -> None:
    with pytest.raises(ExportError, match="dense"):
        tailorbird.export(made[2], to=form, output=tmp_path / "b")


def test_the_dense_export_reads_the_source(made: tuple[Path, Path, Path]) -> None:
    stored, weights = StoredModel.open(made[2]), open_checkpoint(str(made[0])).weights
    for matrix in stored.matrices:
        assert torch.equal(stored.dense(matrix, torch.bfloat16), weights.read(f"{matrix.name}.weight"))


def test_an_adapter_is_not_merged_into_it(made: tuple[Path, Path, Path]) -> None:
    checkpoint = open_checkpoint(str(made[2]))
    with pytest.raises(SettingsError, match="export it to `dense`"):
        packed_places(checkpoint, read_anatomy(checkpoint))


def test_trained_weights_take_what_their_entropy_says(assets: Path) -> None:
    weights = open_checkpoint(str(assets / "models" / "python-7m")).weights
    stored = bound = plain = 0.0
    for name in weights.names:
        weight = weights.read(name)
        if weight.dim() != 2:
            continue
        counts = entropy.exponent_counts(weight)
        shares = counts[counts > 0] / counts.sum()
        bound += weight.numel() * (8 - float((shares * np.log2(shares)).sum())) / 8
        tensors = entropy.encode(weight)
        assert torch.equal(entropy.decode(tensors), weight)
        stored += sum(tensor.nbytes for tensor in tensors.values())
        plain += weight.nbytes
    assert bound < stored < 1.01 * bound
    assert stored < 0.7 * plain
