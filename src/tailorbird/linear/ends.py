"""How an embedding and a head are rounded, which take none of what only linears have."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tailorbird.formats.packed import Coding, EntropyCoding, FloatCoding
from tailorbird.linear.lossless.df11 import Df11
from tailorbird.linear.outliers import without_outliers
from tailorbird.linear.quantize.higgs import Higgs
from tailorbird.linear.quantize.rtn import Rtn

if TYPE_CHECKING:
    from tailorbird.linear import LinearMethod


def end_method(method: LinearMethod, coding: Coding) -> LinearMethod:
    """The method without outliers; rounding to nearest, or none, for a coding that it doesn't make.

    Rounding to nearest, too, for one that transforms inputs.
    """
    if isinstance(coding, EntropyCoding):
        return Df11()
    if isinstance(coding, FloatCoding) or (coding.kind in method.makes and not isinstance(method, Higgs)):
        return without_outliers(method)
    return Rtn()
