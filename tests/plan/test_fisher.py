"""The streamed Fisher diagonal is that of plain automatic differentiation, and predicts small divergences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tailorbird.calibrate.stream import StreamingModel
from tailorbird.model.anatomy import read_anatomy
from tailorbird.model.checkpoint import open_checkpoint
from tailorbird.plan.candidates import PROBE_KEY, probe_rounding
from tailorbird.plan.fisher import fisher_coefficients, fisher_diagonals, quadratic_divergence
from tailorbird.plan.places import uses_of
from tailorbird.plan.sensitivity import measure_divergence
from tiny import fresh, save_model, untie

#: untied; tied; tied, its weights stored the other way round; tied and the embedding scaled
ARCHITECTURES = ("llama", "qwen2", "gpt2", "gemma3_text")
SEED = 5


def streaming(directory: Path) -> StreamingModel:
    checkpoint = open_checkpoint(str(directory))
    return StreamingModel(checkpoint, read_anatomy(checkpoint))


def tokens(windows: int, length: int) -> torch.Tensor:
    return torch.randint(0, 256, (windows, length), generator=torch.Generator().manual_seed(3))


def streamed_diagonals(model: StreamingModel, ids: torch.Tensor, scratch: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}

    def keep(name: str, diagonal: torch.Tensor) -> float:
        found[name] = diagonal.clone()
        return 0.0

    fisher_diagonals(model, ids, lambda name, _, f: keep(name, f), fresh(scratch), SEED)
    return found


def whole_model_diagonals(directory: Path, places: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """By differentiating the whole model once per window in float64, with labels drawn in the same way."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        drawn_from = model(ids).logits.softmax(-1)
    generator = torch.Generator().manual_seed(SEED)
    labels = torch.stack([torch.multinomial(p, 1, generator=generator)[:, 0] for p in drawn_from])
    model.double()
    untie(model)
    model.get_input_embeddings().padding_idx = None
    parameters = {name: model.get_submodule(name).weight for name in places}
    squares = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for row, drawn in zip(ids, labels, strict=True):
        log_probability = model(row[None]).logits[0].log_softmax(-1)
        likelihood = log_probability[torch.arange(len(row)), drawn].sum()
        for name, g in zip(parameters, torch.autograd.grad(likelihood, [*parameters.values()]), strict=True):
            squares[name] += g.square()
    return {name: total / ids.numel() for name, total in squares.items()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_diagonal_is_that_of_the_whole_model(architecture: str, tmp_path: Path) -> None:
    directory = save_model(tmp_path / "model", architecture)
    model = streaming(directory)
    ids = tokens(3, 20)
    ids[:, 0] = 257  # the padding token, whose row no training would touch
    found = streamed_diagonals(model, ids, tmp_path)
    names = [place.name for place in uses_of(model.anatomy)]
    expected = whole_model_diagonals(directory, names, ids)
    assert set(found) == set(names)
    transposed = {linear.name for linear in model.anatomy.linears() if linear.transposed}
    for name in names:
        exact = expected[name].T if name in transposed else expected[name]
        assert float(exact.max()) > 0, name
        torch.testing.assert_close(
            found[name].double(), exact, rtol=1e-3, atol=1e-5 * float(exact.max()), msg=name
        )


def test_coefficient_is_half_the_quadratic_form_over_the_error(tmp_path: Path) -> None:
    model = streaming(save_model(tmp_path / "model", "qwen2"))
    ids = tokens(2, 16)
    errors = {place.name: {PROBE_KEY: 0.04} for place in uses_of(model.anatomy)}
    silent = model.anatomy.blocks[0].linears[0].name
    errors[silent] = {PROBE_KEY: 0.0}
    coefficients = fisher_coefficients(model, ids, errors, fresh(tmp_path), SEED)

    def reduce(name: str, weight: torch.Tensor, diagonal: torch.Tensor) -> float:
        change = (probe_rounding(weight) - weight).double()
        return 0.5 * float((diagonal.double() * change * change).sum()) / 0.04

    expected = fisher_diagonals(model, ids, reduce, fresh(tmp_path), SEED)
    expected[silent] = 0.0  # where rounding changes nothing there is nothing to scale
    assert coefficients == pytest.approx(expected, rel=1e-5)


def test_random_changes_cost_what_the_diagonal_says(tmp_path: Path) -> None:
    """Where changes of different weights are independent, the rest of the matrix has no say on average."""
    model = streaming(save_model(tmp_path / "model"))
    ids = tokens(24, 32)
    diagonals = streamed_diagonals(model, ids, tmp_path)
    changes: dict[str, torch.Tensor] = {}

    def perturb(name: str, weight: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(len(changes))
        changes[name] = torch.randn(weight.shape, generator=generator) * 0.02 * float(weight.std())
        return weight + changes[name]

    measured = measure_divergence(model, uses_of(model.anatomy), ids, perturb, fresh(tmp_path))
    for name, kl in measured.items():
        predicted = quadratic_divergence(diagonals[name], changes[name])
        assert predicted == pytest.approx(kl, rel=0.5), name


def test_the_same_seed_gives_the_same_labels_and_nothing_is_left_on_disk(tmp_path: Path) -> None:
    model = streaming(save_model(tmp_path / "model", "gpt2"))
    ids, scratch = tokens(2, 12), tmp_path / "scratch"
    scratch.mkdir()
    first, again = (streamed_diagonals(model, ids, scratch) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not list(scratch.rglob("streams/*"))
