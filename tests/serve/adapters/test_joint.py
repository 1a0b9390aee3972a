"""The basis that many adapters share: as good as it can be where that is known, else within bounds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tailorbird.linear.product import Product
from tailorbird.serve.adapters.joint import Basis, shared_basis


def random_products(count: int, rank: int, out: int = 20, inside: int = 30, seed: int = 0) -> list[Product]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Product(torch.randn(out, rank, generator=generator), torch.randn(rank, inside, generator=generator))
        for _ in range(count)
    ]


def kept(basis: Basis, products: list[Product]) -> float:
    return sum(1 - basis.lost(product) for product in products)


def best_of_one_side(matrices: list[Tensor], rank: int) -> float:
    """No basis keeps more than the best U alone, with V free."""
    beside = torch.cat(matrices, 1)
    return float(torch.linalg.svdvals(beside)[:rank].square().sum())


def test_one_adapter_keeps_its_leading_singular_values() -> None:
    (product,) = random_products(1, 6)
    values = torch.linalg.svdvals(product.up @ product.down).square()
    for rank in (1, 3, 6, 9):
        expected = float(values[rank:].sum() / values.sum())
        assert shared_basis([product], rank).lost(product) == pytest.approx(expected, abs=1e-5)


def test_adapters_that_lie_in_one_basis_lose_nothing() -> None:
    generator = torch.Generator().manual_seed(3)
    up, down = torch.randn(20, 5, generator=generator), torch.randn(5, 30, generator=generator)
    products = [Product(up @ torch.randn(5, 5, generator=generator) * 10**size, down) for size in (-3, 0, 3)]
    basis = shared_basis(products, 5)
    assert max(basis.lost(product) for product in products) < 1e-5
    for product in products:
        made = basis.up @ basis.core(product) @ basis.down
        assert torch.allclose(made, product.up @ product.down, rtol=1e-3, atol=1e-5 * product.energy() ** 0.5)


@pytest.mark.parametrize("seed", range(4))
def test_a_basis_lies_between_the_bounds_and_no_step_from_it_is_better(seed: int) -> None:
    products, rank = random_products(6, 3, seed=seed), 5
    basis = shared_basis(products, rank)
    matrices = [product.delta() / product.energy() ** 0.5 for product in products]
    found = kept(basis, products)
    assert (
        found <= min(best_of_one_side(matrices, rank), best_of_one_side([m.T for m in matrices], rank)) + 1e-4
    )
    # With all leading left vectors, and all leading right ones, each side chosen without the other.
    left = torch.linalg.svd(torch.cat(matrices, 1)).U[:, :rank]
    right = torch.linalg.svd(torch.cat(matrices)).Vh[:rank]
    assert found >= kept(Basis(left, right), products) - 1e-5
    generator = torch.Generator().manual_seed(seed)
    for _ in range(20):
        other = Basis(
            torch.linalg.qr(basis.up + 0.05 * torch.randn(basis.up.shape, generator=generator)).Q,
            torch.linalg.qr(basis.down.T + 0.05 * torch.randn(basis.down.T.shape, generator=generator)).Q.T,
        )
        assert kept(other, products) <= found + 1e-4


def test_cores_are_the_best_for_a_basis_that_is_not_orthonormal() -> None:
    (product,) = random_products(1, 4, seed=5)
    generator = torch.Generator().manual_seed(6)
    basis = Basis(torch.randn(20, 3, generator=generator), torch.randn(3, 30, generator=generator))
    matrix = (product.up @ product.down).double()
    expected = torch.linalg.pinv(basis.up.double()) @ matrix @ torch.linalg.pinv(basis.down.double())
    core = basis.core(product)
    assert torch.allclose(core.double(), expected, atol=1e-4)
    left = matrix - basis.up.double() @ expected @ basis.down.double()
    assert basis.lost(product) == pytest.approx(float(left.square().sum() / matrix.square().sum()), abs=1e-4)


def test_adapters_that_are_zero_take_no_part() -> None:
    products = random_products(2, 2)
    zero = Product(torch.zeros(20, 2), torch.randn(2, 30))
    alone, beside = shared_basis(products, 4), shared_basis([zero, *products], 4)
    assert kept(beside, products) == pytest.approx(kept(alone, products), abs=1e-5)
    assert shared_basis([zero], 2).lost(zero) == 0
