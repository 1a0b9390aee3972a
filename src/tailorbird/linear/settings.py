"""Checks that the settings of linear methods share."""

from __future__ import annotations

import math

from tailorbird.errors import SettingsError
from tailorbird.formats.packed import (
    BinaryCoding,
    CodebookCoding,
    DoubleCoding,
    EntropyCoding,
    GroupedCoding,
    IntegerCoding,
    PackedCoding,
    TableCoding,
    VectorCoding,
)

#: what rounds to grids makes of weights
GRIDS = frozenset({IntegerCoding.kind, CodebookCoding.kind})
#: what is behind these names, and how it is asked for
_CODES = {
    IntegerCoding.kind: "integers (bits=4)",
    CodebookCoding.kind: "a codebook (codebook=nf4)",
    VectorCoding.kind: "points (codebook=gauss2x4)",
    DoubleCoding.kind: "a codebook with codes for scales (double=true)",
    TableCoding.kind: "a table of values per row (table=4)",
    BinaryCoding.kind: "signs before two magnitudes (binary=true)",
    EntropyCoding.kind: "bfloat16, entropy-coded",
}


def check_setting(method: str, name: str, given: object, right: bool, expected: str) -> None:
    """Refuse what isn't `right`.

    Raises
    ------
    SettingsError
        Naming the method, its setting, and what was expected.
    """
    if not right:
        raise SettingsError(f"{name} {given!r} of {method}", expected, "correct the setting")


def check_feedback(method: str, damping: float, correction: float, least_token: float) -> None:
    """Refuse a damping, a correction or a least token that error feedback can't have."""
    check_setting(method, "damping", damping, 0 < damping < math.inf, "a number above 0, such as 0.01")
    check_setting(method, "correction", correction, 0 < correction <= 1, "above 0, up to 1")
    check_setting(method, "least_token", least_token, 0 < least_token <= 1, "above 0, up to 1")


def feedback_needs(asymmetric: bool, least_token: float) -> frozenset[str]:
    """What error feedback reads with these settings: "gram", and as they say "cross" and "attention"."""
    named = {"gram": True, "cross": asymmetric, "attention": least_token < 1}
    return frozenset(name for name, read in named.items() if read)


def check_codes(method: str, kinds: frozenset[str], coding: PackedCoding) -> None:
    """Refuse codes that a method doesn't make.

    Parameters
    ----------
    method : str
        Its name.
    kinds : frozenset of str
        Those of the codings that it makes.

    Raises
    ------
    SettingsError
        Naming the coding and what the method makes instead.
    """
    if coding.kind not in kinds:
        expected = " or ".join(words for kind, words in _CODES.items() if kind in kinds)
        makers = {
            VectorCoding.kind: "higgs or rtn",
            DoubleCoding.kind: "rtn",
            TableCoding.kind: "rtn, leanquant, ganq or bcq, which fill tables",
            BinaryCoding.kind: "rtn or billm",
            EntropyCoding.kind: "df11",
        }
        remedy = f"take {makers[coding.kind]}" if coding.kind in makers else "state the coding like this"
        raise SettingsError(f"`{method}` for codes of {coding.label}", expected, remedy)


def on_grids(method: str, coding: PackedCoding) -> GroupedCoding:
    """`coding`, which must be one of grids.

    Raises
    ------
    SettingsError
        As `check_codes`.
    """
    check_codes(method, GRIDS, coding)
    assert isinstance(coding, GroupedCoding)
    return coding
