"""The linear methods by name: each makes a packed weight from a weight, statistics and a coding.

A method is a frozen dataclass of its settings that is called. Its class states where it comes from and
which statistics it may ask for, its instances (`needs`) which they do with their settings. Folds, which
move scales between tensors before the rounding, are listed beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol

from torch import Tensor

from tailorbird.calibrate.statistics import LinearStatistics
from tailorbird.formats.packed import Coding, PackedWeight
from tailorbird.linear.lossless.df11 import Df11
from tailorbird.linear.quantize.awq import Awq
from tailorbird.linear.quantize.bcq import Bcq
from tailorbird.linear.quantize.billm import Billm
from tailorbird.linear.quantize.cfp import Cfp
from tailorbird.linear.quantize.decoupleq import Decoupleq
from tailorbird.linear.quantize.double_rounding import DoubleRounding
from tailorbird.linear.quantize.fptq import Fptq
from tailorbird.linear.quantize.ganq import Ganq
from tailorbird.linear.quantize.gptq import Gptq
from tailorbird.linear.quantize.higgs import Higgs
from tailorbird.linear.quantize.leanquant import Leanquant
from tailorbird.linear.quantize.llm_int8 import LlmInt8
from tailorbird.linear.quantize.outliertune import Outliertune
from tailorbird.linear.quantize.quantease import Quantease
from tailorbird.linear.quantize.rtn import Rtn
from tailorbird.linear.quantize.smoothing import Smoothing
from tailorbird.linear.quantize.spqr import Spqr
from tailorbird.linear.quantize.yaqa import Yaqa


class LinearMethod(Protocol):
    """What every linear method offers.

    Attributes
    ----------
    family : str
        The folder it belongs to: "quantize", "lossless".
    kind : str
        "linear method".
    paper : str
        Authors, year and number of the paper.
    makes : frozenset of str
        Kinds of the codings of codes that it makes; every method rounds to floats, too.
    requirements : frozenset of str
        Statistics that some setting reads: "gram", "cross", "attention", "sketch".
    needs : frozenset of str
        Those that these settings read.
    outliers : float
        Share of a linear's weights that these settings keep in a sparse part (`linear/outliers.py`).
    least_token : float
        How little a token may count in them (`calibrate/importance.py`); 1 where all count alike.
    """

    family: ClassVar[str]
    kind: ClassVar[str]
    paper: ClassVar[str]
    requirements: ClassVar[frozenset[str]]
    makes: ClassVar[frozenset[str]]
    __dataclass_fields__: ClassVar[dict]

    @property
    def needs(self) -> frozenset[str]: ...

    @property
    def outliers(self) -> float: ...

    @property
    def least_token(self) -> float: ...

    def __call__(
        self, weight: Tensor, statistics: LinearStatistics | None, coding: Coding
    ) -> PackedWeight: ...

    def prepare(self, statistics: LinearStatistics | None) -> Callable[[Tensor, Coding], PackedWeight]:
        """The method for all weights that read one input; what depends on that alone is worked out once."""
        ...


class FoldMethod(Protocol):
    """What every fold offers; attributes as of `LinearMethod`."""

    family: ClassVar[str]
    kind: ClassVar[str]
    paper: ClassVar[str]
    requirements: ClassVar[frozenset[str]]
    __dataclass_fields__: ClassVar[dict]

    @property
    def needs(self) -> frozenset[str]: ...

    def scales(
        self, weights: Sequence[Tensor], statistics: LinearStatistics, codings: Sequence[Coding]
    ) -> Tensor:
        """By what an input is divided, ``[in_features]`` float32 and positive; ones leave it as it is.

        `weights` ``[out_features, in_features]`` are all that read the input, `statistics` are its own, and
        `codings` say what each weight will be rounded to.
        """
        ...


LINEAR_METHODS: dict[
    str,
    type[
        Rtn
        | Gptq
        | Spqr
        | LlmInt8
        | Quantease
        | Leanquant
        | Decoupleq
        | DoubleRounding
        | Ganq
        | Bcq
        | Billm
        | Yaqa
        | Higgs
        | Df11
    ],
] = {
    "rtn": Rtn,
    "gptq": Gptq,
    "spqr": Spqr,
    "llm-int8": LlmInt8,
    "quantease": Quantease,
    "leanquant": Leanquant,
    "decoupleq": Decoupleq,
    "double-rounding": DoubleRounding,
    "ganq": Ganq,
    "bcq": Bcq,
    "billm": Billm,
    "yaqa": Yaqa,
    "higgs": Higgs,
    "df11": Df11,
}
FOLDS: dict[str, type[Awq | Smoothing | Fptq | Cfp | Outliertune]] = {
    "awq": Awq, "smoothing": Smoothing, "fptq": Fptq, "cfp": Cfp, "outliertune": Outliertune,
}  # fmt: skip
