"""Products of two factors: what they say of themselves is what the matrix is."""

from __future__ import annotations

import pytest
import torch

from tailorbird.linear.product import Product


def test_the_energy_is_that_of_the_matrix_however_small() -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (1e-8, 1.0, 1e8):
        up, down = (torch.randn(shape, generator=generator) for shape in ((7, 3), (3, 11)))
        product = Product(size * up, down)
        assert product.energy() == pytest.approx(
            float((size * (up @ down)).double().square().sum()), rel=1e-5
        )
    assert Product(torch.zeros(7, 3), torch.ones(3, 11)).energy() == 0.0


def test_the_first_ranks_are_the_sum_of_so_many_outer_products() -> None:
    generator = torch.Generator().manual_seed(1)
    product = Product(torch.randn(5, 4, generator=generator), torch.randn(4, 6, generator=generator))
    outer = sum(torch.outer(product.up[:, k], product.down[k]) for k in range(2))
    torch.testing.assert_close(product.first(2).delta(), outer)
    assert product.first(4).is_finite()
    product.down[3, 0] = torch.inf
    assert not product.is_finite()
    assert product.first(3).is_finite()
