"""The scale of a linear's inputs, one for all of them, found on calibration text before it is run.

A symmetric scale is the largest magnitude over 127 (Xiao et al. 2022, SmoothQuant, arXiv:2211.10438, whose
static scales are these; PyTorch's ``MinMaxObserver``). One outlier makes such a step coarse for all others,
so that smaller ranges are tried as well, `r max|x|` for the ratios `r` of `RATIOS`, beyond which values are
clipped; the scale is the one with the least squared error

    Σ (x − s · clamp(round(x / s), −127, 127))²,    s = r max|x| / 127

over all inputs of all tokens: what the ``mse`` calibration of NVIDIA's pytorch-quantization and PyTorch's
``HistogramObserver`` look for in a histogram. Here the inputs themselves are rounded, which takes them
twice: once for their largest, once for the errors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tailorbird.errors import TailorbirdError
from tailorbird.kernels.reference import INT8, LARGEST, round_to_scale

#: Ranges that are tried, as shares of the largest magnitude.
RATIOS = tuple(share / 20 for share in range(20, 0, -1))
#: Activations that are rounded at once.
CHUNK_VALUES = 1 << 17
#: Inputs that are nowhere larger are zeros.
LEAST = 1e-30


class InputScale:
    """The static scale of the inputs of one linear, or of several that read the same tensor.

    All inputs are shown to `widen` first, then again to `add`.

    Parameters
    ----------
    in_features : int
    """

    def __init__(self, in_features: int) -> None:
        self._largest = 0.0
        self._errors = torch.zeros(len(RATIOS), in_features, dtype=torch.float64)

    def widen(self, x: Tensor) -> None:
        """Take in the magnitudes of some inputs ``[..., in_features]``.

        Raises
        ------
        TailorbirdError
            Where one isn't finite.
        """
        largest = float(x.abs().max())
        if not largest < float("inf"):
            raise TailorbirdError(
                "inputs of a linear that are not finite, for which there is no scale",
                "finite activations in calibration",
                "calibrate with other text, or leave out the static scales",
            )
        self._largest = max(self._largest, largest)

    @property
    def tried(self) -> list[float]:
        """The scales of `RATIOS`, each a float32."""
        largest = self._largest if self._largest > LEAST else LARGEST[INT8]
        return (torch.tensor(RATIOS) * largest / LARGEST[INT8]).tolist()

    def add(self, x: Tensor) -> None:
        """Add the rounding errors of some inputs."""
        rows = x.reshape(-1, x.shape[-1]).float()
        scales = self.tried
        for part in rows.split(max(1, CHUNK_VALUES // rows.shape[1])):
            for total, scale in zip(self._errors, scales, strict=True):
                total += (round_to_scale(part, scale) - part).square_().sum(0, dtype=torch.float64)

    @property
    def _best(self) -> int:
        return int(self._errors.sum(1).argmin())

    @property
    def scale(self) -> float:
        """The one of `tried` with the least error; of equals the widest."""
        return self.tried[self._best]

    @property
    def squared_errors(self) -> Tensor:
        """Squared errors of each input with `scale`, summed over the tokens, ``[in_features]`` float64."""
        return self._errors[self._best]
