"""The input transform of a weight: what inputs go through before codes, and codes were rounded behind.

Where it is there, codes stand for `W Tᵀ` in place of `W`, and `W x = (W Tᵀ) (T x)`. `T` multiplies each
block of inputs by Hadamard's matrix over the root of its order, and their signs before that
(`kernels/walsh.py`). The layout is written down in `docs/formats.md`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tailorbird.errors import CheckpointError, SettingsError

#: of inputs that are mixed with each other, at most
LARGEST_BLOCK = 1 << 16


@dataclass(frozen=True)
class Transform:
    """Random signs, and a Hadamard matrix for each block of inputs.

    Parameters
    ----------
    block : int
        Inputs that one matrix mixes: a power of two that divides their number.
    """

    block: int

    def __post_init__(self) -> None:
        block = self.block
        if type(block) is not int or not 1 <= block <= LARGEST_BLOCK or block & (block - 1):
            raise SettingsError(
                f"block {block!r}", f"a power of two up to {LARGEST_BLOCK}", "choose another block"
            )

    def tensor_layout(
        self, out_features: int, in_features: int
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name, shape and dtype of `signs`."""
        return {"signs": ((in_features // self.block, self.block), torch.int8)}


def transform_from_dict(data: Any) -> Transform:
    """A transform as it stands in `config.json` and `plan.yaml`: a mapping of `block`.

    Raises
    ------
    CheckpointError
        For anything else.
    """
    if not isinstance(data, dict) or data.keys() != {"block"}:
        raise CheckpointError(
            f"`transform` {data!r}"[:500],
            "a mapping of exactly `block`",
            "correct the file, or read it with a newer version of tailorbird",
        )
    try:
        return Transform(data["block"])
    except SettingsError as error:
        raise CheckpointError(f"`transform` of {error.given}", error.expected, error.remedy) from error


def stated_transform(tensors: Mapping[str, Tensor]) -> Transform | None:
    """The transform of a weight with these tensors, as the shape of `signs` tells; None where there is none.

    Raises
    ------
    CheckpointError
        When the shape is that of no transform.
    """
    if "signs" not in tensors:
        return None
    shape = list(tensors["signs"].shape)
    try:
        return Transform(shape[-1] if len(shape) == 2 else 0)
    except SettingsError:
        raise CheckpointError(
            f"`signs` {shape}",
            "[blocks, block], the latter a power of two",
            "check the file; it may be damaged",
        ) from None


def check_signs(signs: Tensor) -> None:
    """Raise `CheckpointError` unless `signs` holds 1 and -1 alone."""
    if not signs.is_meta and not bool((signs.abs() == 1).all()):
        raise CheckpointError(
            "`signs` with another value than 1 and -1", "these two", "check the file; it may be damaged"
        )
