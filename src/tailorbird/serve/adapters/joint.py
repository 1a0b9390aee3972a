"""Many adapters of one linear in a basis that they share: B_i A_i ≈ U C_i V, with a small core C_i for each.

    minimize  Σ_i ‖B_i A_i − U C_i V‖²   over U [out, r] and V [r, in] with orthonormal columns and rows

For any U and V the best cores are ``C_i = Uᵀ B_i A_i Vᵀ``, and they leave ``Σ ‖B_i A_i‖² − Σ ‖C_i‖²``.
Given V, the best U are the r leading left singular vectors of all ``B_i A_i Vᵀ`` beside each other, and
likewise V given U; doing one after the other never makes it worse. Each adapter is given norm 1 before, so
that large ones don't take the basis for themselves. Adapters that have little in common form clusters with a
basis each: every adapter goes where it loses least, bases follow, until nobody moves (`share`).

Compress then Serve: https://arxiv.org/abs/2407.00066 (its joint diagonalization with full cores).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tailorbird.linear.product import Product

#: Most rounds of U and V, the gain in a round that isn't worth another, and most moves between clusters.
ROUNDS, GAIN, MOVES = 50, 1e-6, 20


@dataclass(frozen=True, eq=False)
class Basis:
    """What adapters share; rounded, columns and rows needn't be orthonormal any more.

    Attributes
    ----------
    up : Tensor[out_features, rank], float32
    down : Tensor[rank, in_features], float32
    """

    up: Tensor
    down: Tensor

    def core(self, product: Product) -> Tensor:
        """The best core of an adapter in this basis, ``[rank, rank]``."""
        return torch.linalg.lstsq(self.up, product.up).solution @ (
            torch.linalg.lstsq(self.down.T, product.down.T).solution.T
        )

    def lost(self, product: Product) -> float:
        """Share of an adapter's squared norm that the best core leaves; 0 of nothing."""
        whole = product.energy()
        if whole == 0:
            return 0.0
        core = self.core(product)
        meant = ((self.up.T @ product.up) @ (product.down @ self.down.T) * core).sum()
        made = (core.T @ (self.up.T @ self.up) @ core * (self.down @ self.down.T)).sum()
        return max(0.0, float(whole - 2 * meant + made) / whole)


def shared_basis(products: Sequence[Product], rank: int) -> Basis:
    """The basis in which these adapters, each with norm 1, lose least.

    Parameters
    ----------
    products : sequence of Product
        Of one linear; those that are zero count for nothing.
    rank : int
        At most the lesser of ``out_features`` and ``in_features``.

    Returns
    -------
    Basis
    """
    known = [(one, math.sqrt(energy)) for one in products if (energy := one.energy()) > 0]
    out_features, in_features = len(products[0].up), products[0].down.shape[1]
    if not known:
        return Basis(torch.eye(out_features, rank), torch.eye(rank, in_features))
    ups, downs = [product.up / norm for product, norm in known], [product.down for product, _ in known]
    # Everything lies in what the rows of all `down` span, and in what the columns of all `up` do.
    down = _leading(torch.cat([_scaled(a, b) for b, a in zip(ups, downs, strict=True)]).T, rank).T
    kept = 0.0
    for _ in range(ROUNDS):
        up = _leading(torch.cat([b @ (a @ down.T) for b, a in zip(ups, downs, strict=True)], 1), rank)
        half = [(up.T @ b) @ a for b, a in zip(ups, downs, strict=True)]
        down = _leading(torch.cat(half).T, rank).T
        now = sum(float((part @ down.T).square().sum()) for part in half)
        if now - kept <= GAIN * len(known):
            break
        kept = now
    return Basis(up, down)


def _scaled(down: Tensor, up: Tensor) -> Tensor:
    """Rows whose Gram matrix is that of the rows of ``up @ down``: R `down`, for the R of ``up = Q R``."""
    return torch.linalg.qr(up, mode="r").R @ down


def _leading(matrix: Tensor, count: int) -> Tensor:
    """So many leading left singular vectors of ``[rows, columns]``; orthonormal beyond its rank, too."""
    rows, columns = matrix.shape
    if columns >= rows:
        return torch.linalg.eigh((matrix @ matrix.T).double()).eigenvectors.flip(1)[:, :count].to(matrix)
    vectors = torch.linalg.svd(matrix.double(), full_matrices=count > columns).U[:, :count]
    return vectors.to(matrix)
