"""What merging lost, as a small adapter: the best step of low rank from the merged weight to its target.

With `D = T - M` and the Gram matrix `H` of the inputs, the output error that a product `U V` leaves is
`tr((D - U V) H (D - U V)^T)`. For any `H = L L^T` that is the squared norm of `D L - U (V L)`, whose best
approximation of rank r is its truncated singular value decomposition (Eckart and Young), mapped back:

    D L = P S Q^T,    U = P_r S_r^(1/2),    V = S_r^(1/2) Q_r^T L^-1

The closed form is that of Zhang et al. 2024, "QERA: an Analytical Framework for Quantization Error
Reconstruction" (arXiv:2410.06040). `L` is a Cholesky factor here, and `H` damped so that it has one. Factors
of a lower rank are the first columns and rows of those of a higher one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tailorbird.errors import TailorbirdError
from tailorbird.linear.product import Product

#: added to the diagonal of the Gram matrix, as a fraction of its mean; raised tenfold while that isn't enough
DAMPING, RETRIES = 1e-3, 5
#: columns beyond the rank, and steps, of the randomized decomposition
OVERSAMPLING, STEPS = 16, 4


def best_product(difference: Tensor, gram: Tensor | None, rank: int, seed: int = 0) -> Product:
    """The best approximation of a difference of weights, at most of this rank, in the metric of the inputs.

    Parameters
    ----------
    difference : Tensor[out_features, in_features], float32
    gram : Tensor[in_features, in_features], float32, or None
        None stands for the identity.
    rank : int
    seed : int
        Of the randomized decomposition (Halko et al. 2009, arXiv:0909.4061), which is exact where `rank`
        comes near the smaller side of the matrix.

    Raises
    ------
    TailorbirdError
        When the Gram matrix can't be factorized.
    """
    rank = min(rank, *difference.shape)
    factor = None if gram is None else _factor(gram)
    scaled = difference if factor is None else difference @ factor
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        left, sizes, right = torch.svd_lowrank(scaled, min(rank + OVERSAMPLING, *scaled.shape), STEPS)
    roots = sizes[:rank].sqrt()
    down = (right[:, :rank] * roots).t()
    if factor is not None:
        down = torch.linalg.solve_triangular(factor, down, upper=False, left=False)
    return Product((left[:, :rank] * roots).contiguous(), down.contiguous())


def _factor(gram: Tensor) -> Tensor:
    """The lower triangular `L` with `L L^T = H + l I`."""
    mean = float(gram.diagonal().mean())
    if mean == 0:
        return torch.eye(len(gram))
    for retry in range(RETRIES + 1):
        damped = gram.clone()
        damped.diagonal().add_(mean * DAMPING * 10**retry)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if int(failed) == 0 and bool(lower.diagonal().isfinite().all()):
            return lower
    raise TailorbirdError(
        f"a Gram matrix that can't be factorized with damping up to {DAMPING * 10**RETRIES:g}",
        "the mean outer product of finite inputs",
        "calibrate with other text",
    )
