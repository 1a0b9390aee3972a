"""The best approximation of a change of low rank: the truncated singular value decomposition.

    D = P S Q^T,    up = P_r S_r^(1/2),    down = S_r^(1/2) Q_r^T

leaves the least squared error of all products of rank r, the sum of the squares of the other singular values
(Eckart and Young 1936, https://doi.org/10.1007/BF02288367). For a change that is a product already, ``B A``,
the decomposition is that of the small matrix between the orthogonal parts of its factors, and ``B A`` itself
is never formed:

    B = Q_B R_B,    A^T = Q_A R_A,    B A = Q_B (R_B R_A^T) Q_A^T
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from tailorbird.linear.product import Product


@dataclass(frozen=True, eq=False)
class Truncated:
    """A change as a product of low rank, and what that costs.

    Attributes
    ----------
    product : Product
        float32.
    energy : float
        Squared Frobenius norm of the change: the sum of its squared singular values.
    lost : float
        The part of it that the product doesn't hold.
    """

    product: Product
    energy: float
    lost: float

    @property
    def error(self) -> float:
        """Norm of what is lost, relative to that of the change."""
        return relative_error([self])


def relative_error(parts: Iterable[Truncated]) -> float:
    """Norm of what all of them lost, relative to that of all changes; 0 where nothing changes."""
    found = list(parts)
    energy = sum(one.energy for one in found)
    return math.sqrt(sum(one.lost for one in found) / energy) if energy > 0 else 0.0


def truncate_product(product: Product, rank: int) -> Truncated:
    """The best product of at most this rank for a change that is one, in double precision.

    Parameters
    ----------
    product : Product
    rank : int
        At least 1; the result has no more than the change's own.
    """
    up, middle_up = torch.linalg.qr(product.up.double())
    down, middle_down = torch.linalg.qr(product.down.double().T)
    left, sizes, right = torch.linalg.svd(middle_up @ middle_down.T, full_matrices=False)
    return _truncated(up @ left, sizes, right @ down.T, rank)


def truncate(change: Tensor, rank: int) -> Truncated:
    """The best product of at most this rank for any change ``[out_features, in_features]``, float32."""
    left, sizes, right = torch.linalg.svd(change, full_matrices=False)
    return _truncated(left, sizes, right, rank)


def _truncated(left: Tensor, sizes: Tensor, right: Tensor, rank: int) -> Truncated:
    roots, squares = sizes[:rank].sqrt(), sizes.double().square()
    up = (left[:, :rank] * roots).float().contiguous()
    down = (roots[:, None] * right[:rank]).float().contiguous()
    return Truncated(Product(up, down), float(squares.sum()), float(squares[rank:].sum()))
