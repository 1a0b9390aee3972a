"""Errors from the Gram matrix are the errors of the outputs."""

from __future__ import annotations

import pytest
import torch

from tailorbird.linear import error as measure
from tailorbird.linear.error import output_error, row_energies, row_errors


def case(rows: int = 9, columns: int = 12) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(200, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    weight = torch.randn(rows, columns, generator=generator)
    return x, weight, weight + 0.1 * torch.randn(rows, columns, generator=generator)


def test_errors_are_those_of_the_outputs() -> None:
    x, weight, approximation = case()
    gram = x.T @ x / len(x)
    outputs, changes = (x @ weight.T).double(), (x @ (weight - approximation).T).double()
    expected = changes.square().sum(0) / outputs.square().sum(0)
    torch.testing.assert_close(row_errors(weight, approximation, gram).double(), expected, rtol=1e-4, atol=0)
    total = float(changes.square().sum() / outputs.square().sum())
    assert output_error(weight, approximation, gram) == pytest.approx(total, rel=1e-4)
    torch.testing.assert_close(row_energies(weight, gram), outputs.square().mean(0), rtol=1e-4, atol=0)


def test_no_gram_matrix_stands_for_the_identity() -> None:
    _, weight, approximation = case()
    identity = torch.eye(weight.shape[1])
    assert output_error(weight, approximation) == pytest.approx(output_error(weight, approximation, identity))
    torch.testing.assert_close(row_errors(weight, approximation), row_errors(weight, approximation, identity))


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, approximation = case(rows=200)
    gram = x.T @ x / len(x)
    whole = row_errors(weight, approximation, gram)
    monkeypatch.setattr(measure, "CHUNK_VALUES", 1)
    torch.testing.assert_close(row_errors(weight, approximation, gram), whole, rtol=1e-5, atol=1e-9)


def test_rows_and_weights_of_zeros_have_finite_errors() -> None:
    x, weight, approximation = case()
    gram = x.T @ x / len(x)
    weight[3] = 0
    kept = approximation.clone()
    kept[3] = 0
    assert row_errors(weight, kept, gram)[3] == 0
    assert 0 < float(row_errors(weight, approximation, gram)[3]) < float("inf")
    nothing = torch.zeros_like(weight)
    assert output_error(nothing, nothing, gram) == 0
    assert 0 < output_error(nothing, approximation, gram) < float("inf")
    assert bool(row_errors(nothing, approximation, gram).isfinite().all())
