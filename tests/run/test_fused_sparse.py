"""Compiled blocks add the sparse parts of linears, and keep apart what only those multiply."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from compressing import compress
from readings import assert_alike, by_modules, in_pieces, tokens
from results import text_file
from tailorbird.formats.modules import CompressedLinear
from tailorbird.kernels import native
from tailorbird.model.load import load
from tailorbird.run.fused import FusedModel, obstacle
from tiny import save_model

pytestmark = pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")

SPQR = "spqr:bits=3,group=32,outliers=0.03"
LLM_INT8 = "llm-int8:bits=8,group=32,symmetric=true,outliers=0.07"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_file(tmp_path_factory.mktemp("text"))


def sparse(
    folder: Path, text: Path, recipe: str, architecture: str = "llama", activations: str = "exact"
) -> Any:
    """A small model whose linears have sparse parts."""
    source = save_model(folder / "source", architecture)
    compress(source, text, folder / "out", recipe, activations=activations)
    model = load(folder / "out", dtype=torch.float32)
    assert any(linear.values is not None for linear in linears(model))
    return model


def linears(model: Any) -> list[CompressedLinear]:
    return [module for module in model.modules() if isinstance(module, CompressedLinear)]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3", "gpt_neox", "falcon", "olmo2", "opt"])
def test_logits_are_those_of_the_modules(architecture: str, text: Path, tmp_path: Path) -> None:
    model = sparse(tmp_path, text, SPQR, architecture)
    assert_alike(model, tokens(3), [33, 34, 64])


@pytest.mark.parametrize(
    "recipe",
    [
        "quantease:bits=3,group=32,outliers=0.02",
        "spqr+eora:bits=3,group=32,outliers=0.03,eora.rank=4",
        LLM_INT8,
    ],
)
def test_every_method_that_has_one_agrees(recipe: str, text: Path, tmp_path: Path) -> None:
    model = sparse(tmp_path, text, recipe)
    assert_alike(model, tokens(2), [40])


@pytest.mark.parametrize("recipe", [SPQR, LLM_INT8])
def test_rounded_inputs_agree_up_to_their_rounding(recipe: str, text: Path, tmp_path: Path) -> None:
    model = sparse(tmp_path, text, recipe, activations="auto")
    assert any(linear.rounds for linear in linears(model))
    ids = tokens(2)
    logits, expected = in_pieces(model, ids, [50]), by_modules(model, ids)
    assert float((logits - expected).norm() / expected.norm()) < 5e-3


def test_inputs_apart_do_not_widen_the_steps_of_others(text: Path, tmp_path: Path) -> None:
    """Huge inputs that only the sparse part multiplies; rounded with the others they would swallow those."""
    model = sparse(tmp_path, text, LLM_INT8, activations="auto")
    layer = model.model.layers[0]
    readers = layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj
    apart = readers[0].inputs_apart()
    assert len(apart) > 0
    assert all(one.rounds and torch.equal(one.inputs_apart(), apart) for one in readers)
    with torch.no_grad():
        layer.input_layernorm.weight[apart] *= 1000.0
    ids = tokens(2)
    expected = by_modules(model, ids)

    def off(logits: torch.Tensor) -> float:
        return float((logits - expected).norm() / expected.norm())

    assert off(in_pieces(model, ids, [50])) < 5e-3
    fused = FusedModel(model)
    for linear in fused.blocks[0].attention_in:
        linear.apart, linear.apart_count = None, 0
    assert off(in_pieces(model, ids, [50], fused)) > 5e-2


@pytest.mark.parametrize("version", native.versions())
@pytest.mark.parametrize("activations", ["exact", "auto"])
def test_every_version_gives_the_same_bits_whatever_runs_beside(
    version: int, activations: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = sparse(tmp_path, text, LLM_INT8, activations=activations)
    ids = tokens(5)
    expected = by_modules(model, ids)
    monkeypatch.setattr("tailorbird.kernels.blocks.best_version", lambda: version)
    together = in_pieces(model, ids, [40])
    assert float((together - expected).norm() / expected.norm()) < 5e-3
    assert torch.equal(in_pieces(model, ids[3:4], [3, 35]), together[3:4])


def test_rotated_inputs_of_which_some_are_kept_apart_are_left_to_the_modules(
    text: Path, tmp_path: Path
) -> None:
    model = sparse(tmp_path, text, LLM_INT8, activations="auto")
    linear = model.model.layers[1].self_attn.o_proj
    assert linear.rounds
    assert len(linear.inputs_apart()) > 0
    linear.signs = torch.ones(1, linear.in_features, dtype=torch.int8)
    assert "kept apart" in str(obstacle(model))
