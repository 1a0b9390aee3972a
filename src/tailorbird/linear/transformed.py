"""Statistics of inputs behind a transform."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from tailorbird.calibrate.statistics import LinearStatistics
from tailorbird.formats.transform import transformed


def transformed_statistics(statistics: LinearStatistics, tensors: Mapping[str, Tensor]) -> LinearStatistics:
    """Statistics of inputs that have gone through a transform, as far as rounding without `cross` reads them.

    Parameters
    ----------
    statistics : LinearStatistics
        Of the inputs as they come.
    tensors : mapping of str to Tensor
        Those of the transform, on the device of the Gram matrix.
    """
    gram = transformed(transformed(statistics.gram, tensors).t(), tensors)
    return replace(statistics, gram=gram, cross=None)
