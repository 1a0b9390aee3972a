"""How far the outputs of a linear move when its weight is replaced by an approximation.

With the Gram matrix `H = E[x x^T]` of the inputs, the mean squared change of output `i` is
`d_i H d_i^T`, where `d_i` is row `i` of the difference of the weights; summed over the outputs it is
`tr(D H D^T)`. Nothing is run and no input is needed. What a change means for the model's loss is not
known here.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: weights handled at once; some three temporaries of this many values live at a time
CHUNK_VALUES = 1 << 21
#: rows that a linear hardly uses are compared with this fraction of its mean output energy
LEAST_ROW_ENERGY = 1e-6


def row_energies(weight: Tensor, gram: Tensor | None = None) -> Tensor:
    """Mean squared output `w_i H w_i^T` of every row of a weight.

    Parameters
    ----------
    weight : Tensor[out_features, in_features], float
    gram : Tensor[in_features, in_features] or None
        None stands for the identity: then it's the squared norm of the row.

    Returns
    -------
    Tensor[out_features], float64
        Never negative.
    """
    return _difference_energies(weight, None, gram)


def row_errors(weight: Tensor, approximation: Tensor, gram: Tensor | None = None) -> Tensor:
    """Relative squared output error of every row, `d_i H d_i^T / w_i H w_i^T`.

    Parameters
    ----------
    weight, approximation : Tensor[out_features, in_features], float
    gram : Tensor[in_features, in_features] or None
        None stands for the identity.

    Returns
    -------
    Tensor[out_features], float32
        A row whose own energy is below `LEAST_ROW_ENERGY` of the mean over rows is compared with that
        instead, so that a row of zeros has error 0 where it stayed zero and a finite one elsewhere; if
        the whole weight has no energy, errors are absolute.
    """
    energies = row_energies(weight, gram)
    floor = LEAST_ROW_ENERGY * energies.mean()
    if float(floor) == 0:
        energies, floor = torch.ones_like(energies), torch.ones_like(floor)
    errors = _difference_energies(weight, approximation, gram)
    return (errors / torch.maximum(energies, floor)).float()


def output_error(
    weight: Tensor, approximation: Tensor, gram: Tensor | None = None, energy: float | None = None
) -> float:
    """Relative squared output error of the whole linear, `tr(D H D^T) / tr(W H W^T)`.

    Parameters
    ----------
    weight, approximation : Tensor[out_features, in_features], float
    gram : Tensor[in_features, in_features] or None
        None stands for the identity.
    energy : float or None
        `tr(W H W^T)`, where it is known already.

    Returns
    -------
    float
        Not negative; the absolute error where the weight has no energy at all.
    """
    if energy is None:
        energy = float(row_energies(weight, gram).sum())
    error = float(_difference_energies(weight, approximation, gram).sum())
    return error / energy if energy > 0 else error


def _difference_energies(weight: Tensor, approximation: Tensor | None, gram: Tensor | None) -> Tensor:
    """`d_i H d_i^T` per row, `d` being the difference of the weights, or the weight alone."""
    out_features, in_features = weight.shape
    energies = torch.empty(out_features, dtype=torch.float64, device=weight.device)
    step = max(64, CHUNK_VALUES // in_features)
    for start in range(0, out_features, step):
        rows = slice(start, start + step)
        difference = weight[rows].float()
        if approximation is not None:
            difference = difference - approximation[rows].float()
        products = difference if gram is None else difference @ gram
        energies[rows] = (products * difference).sum(-1, dtype=torch.float64)
    return energies.clamp_(min=0)
