"""Compiled blocks rotate the inputs of linears that want it, and of no other reader of theirs."""

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
from tailorbird.kernels.adapters import LinearAdapter, Segment
from tailorbird.model.load import load
from tailorbird.run.fused import FusedModel, obstacle
from tiny import save_model

pytestmark = pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_file(tmp_path_factory.mktemp("text"))


def turned(
    folder: Path,
    text: Path,
    architecture: str = "llama",
    recipe: str = "higgs",
    activations: str = "exact",
    **config: Any,
) -> Any:
    """A small model whose linears read rotated inputs."""
    given, _, settings = recipe.partition(":")
    coding = settings or "codebook=gauss3,group=32,block=16"
    source = save_model(folder / "source", architecture, **config)
    compress(source, text, folder / "out", f"{given}:{coding}", activations=activations)
    return load(folder / "out", dtype=torch.float32)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3", "gpt_neox", "falcon", "olmo2", "opt"])
def test_logits_are_those_of_the_modules(architecture: str, text: Path, tmp_path: Path) -> None:
    model = turned(tmp_path, text, architecture)
    linears = [module for module in model.modules() if isinstance(module, CompressedLinear)]
    assert any(module.signs is not None for module in linears)
    assert_alike(model, tokens(3), [33, 34, 64])


@pytest.mark.parametrize(
    "recipe",
    [
        "higgs:codebook=gauss2x2,group=32",
        "higgs:codebook=gauss2x4,group=32,block=4",
        "higgs+eora:codebook=gauss3,group=32,eora.rank=4",
        "higgs:codebook=gauss4,group=32,block=1",
        "higgs:codebook=gauss3,group=32,feedback=true",
    ],
)
def test_every_coding_and_what_stands_beside_agree(recipe: str, text: Path, tmp_path: Path) -> None:
    model = turned(tmp_path, text, recipe=recipe, intermediate_size=176)
    assert_alike(model, tokens(2), [40])


def test_rounded_inputs_agree_up_to_their_rounding(text: Path, tmp_path: Path) -> None:
    model = turned(tmp_path, text, activations="auto")
    linears = [module for module in model.modules() if isinstance(module, CompressedLinear)]
    assert any(linear.rounds and linear.signs is not None for linear in linears)
    ids = tokens(2)
    logits, expected = in_pieces(model, ids, [50]), by_modules(model, ids)
    assert float((logits - expected).norm() / expected.norm()) < 5e-3


@pytest.mark.parametrize("version", native.versions())
def test_every_version_gives_the_same_bits_whatever_runs_beside(
    version: int, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = turned(tmp_path, text)
    ids = tokens(5)
    expected = by_modules(model, ids)
    monkeypatch.setattr("tailorbird.kernels.blocks.best_version", lambda: version)
    together = in_pieces(model, ids, [40])
    torch.testing.assert_close(together, expected, atol=2e-5, rtol=1e-4)
    assert torch.equal(in_pieces(model, ids[3:4], [3, 35]), together[3:4])


def test_one_that_is_not_turned_reads_the_inputs_as_they_come(text: Path, tmp_path: Path) -> None:
    """Beside two that are, in one step."""
    model = turned(tmp_path, text)
    for layer in model.model.layers:
        linear = layer.self_attn.k_proj
        plain = CompressedLinear(linear.in_features, linear.out_features, linear.coding, bias=False)
        for part in ("codes", "scales"):
            getattr(plain, part).copy_(getattr(linear, part))
        layer.self_attn.k_proj = plain.eval()
    assert_alike(model, tokens(2), [40])


def test_adapters_read_the_inputs_as_they_come(text: Path, tmp_path: Path) -> None:
    model = turned(tmp_path, text)
    fused, ids = FusedModel(model), tokens(1)[0]
    draw = torch.Generator().manual_seed(0)
    linears, hooks = {}, []
    for index, layer in enumerate(model.model.layers):
        for role, module in (("q", layer.self_attn.q_proj), ("down", layer.mlp.down_proj)):
            down = torch.randn(4, module.in_features, generator=draw)
            up = torch.randn(module.out_features, 4, generator=draw)
            linears[index, role] = LinearAdapter(down, up, scale=0.1)
            hooks.append(
                module.register_forward_hook(
                    lambda _, x, y, down=down, up=up: y + 0.1 * (x[0] @ down.t() @ up.t())
                )
            )
    expected = by_modules(model, ids[None])[0]
    for hook in hooks:
        hook.remove()
    pages, count = fused.pages(1), len(ids)
    pages.reach(count)
    found = fused.step(
        ids, torch.arange(count, dtype=torch.int32), torch.zeros(count, dtype=torch.int32), pages,
        torch.arange(count), [Segment(0, count, fused.adapter(linears))],
    )  # fmt: skip
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3)


def test_readers_of_one_input_with_unlike_signs_are_left_to_the_modules(text: Path, tmp_path: Path) -> None:
    model = turned(tmp_path, text)
    model.model.layers[1].mlp.up_proj.signs.neg_()
    assert "different signs" in str(obstacle(model))
    model = turned(tmp_path / "again", text)
    model.model.layers[1].self_attn.o_proj.signs.neg_()  # the only one that reads them
    assert obstacle(model) is None
