"""Blocks that are computed again for their gradients: what they are afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tailorbird.adapt.recompute import recomputing


def doubled(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


@pytest.mark.parametrize("raises", [False, True])
def test_a_block_is_afterwards_what_it_was_with_a_forward_of_its_own_or_without(raises: bool) -> None:
    plain, wrapped = nn.Linear(2, 2), nn.Linear(2, 2)
    wrapped.forward = doubled  # type: ignore[method-assign, assignment]
    x = torch.ones(1, 2, requires_grad=True)
    try:
        # one of them twice, as blocks may share a module
        with recomputing([plain, wrapped, wrapped]):
            assert torch.equal(wrapped(x), 2 * x)
            assert not {plain.forward, wrapped.forward} & {doubled}
            if raises:
                raise ValueError
    except ValueError:
        assert raises
    assert "forward" not in vars(plain)
    assert vars(wrapped)["forward"] is doubled
    assert torch.equal(wrapped(x), 2 * x)
