"""Choosing the likeliest token: compiled, it is what PyTorch chooses."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tailorbird.errors import CheckpointError
from tailorbird.kernels import sampling
from tailorbird.run.generate import likeliest


@given(
    rows=st.integers(1, 5), vocabulary=st.integers(1, 70), levels=st.integers(1, 4), seed=st.integers(0, 99)
)
def test_the_first_of_the_largest_is_chosen(rows: int, vocabulary: int, levels: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(levels, (rows, vocabulary), generator=generator).float()  # with many equal ones
    first = [row.index(max(row)) for row in logits.tolist()]
    assert likeliest(logits).tolist() == first


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_refused(
    value: float, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "available", lambda: compiled and sampling.library() is not None)
    logits = torch.zeros(2, 40)
    logits[1, 33] = value
    with pytest.raises(CheckpointError, match="not finite"):
        likeliest(logits)
    logits[1, 33] = -math.inf  # forbids a token
    assert likeliest(logits).tolist() == [0, 0]
