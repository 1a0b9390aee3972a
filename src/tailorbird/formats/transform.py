"""The input transform of a weight: what inputs go through before codes, and codes were rounded behind.

Where it is there, codes stand for `W T⁻¹` in place of `W`, and `W x = (W T⁻¹) (T x)`. There are two kinds.
`T` multiplies each block of inputs by Hadamard's matrix over the root of its order, and their signs before
that (`kernels/walsh.py`); or it is the Kronecker product of two matrices that were learned
(`kernels/kronecker.py`). The layout is written down in `docs/formats.md`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from tailorbird.errors import CheckpointError, SettingsError
from tailorbird.kernels import kronecker, walsh

#: tensors of a transform
TRANSFORM_PARTS = ("signs", "left", "right")
#: of inputs that are mixed with each other, at most
LARGEST_BLOCK = 1 << 16
MATRIX_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
#: least singular value of a matrix, over its greatest
LEAST_RATIO = 1e-5


@dataclass(frozen=True)
class Transform:
    """Random signs, and a Hadamard matrix for each block of inputs; or two matrices.

    Parameters
    ----------
    block : int
        Inputs that one matrix mixes; it divides their number. Of signs a power of two; of two matrices the
        order of the second, that of the first being the number of blocks.
    matrices : {"bfloat16", "float16", "float32", None}
        The dtype of two matrices; None for signs.
    """

    block: int
    matrices: str | None = None

    def __post_init__(self) -> None:
        block = self.block
        if self.matrices is not None and self.matrices not in list(MATRIX_DTYPES):
            raise SettingsError(
                f"matrices {self.matrices!r}", "one of " + ", ".join(MATRIX_DTYPES), "choose another dtype"
            )
        power = "a power of two" if self.matrices is None else "a whole number"
        allowed = type(block) is int and 1 <= block <= LARGEST_BLOCK
        if not allowed or (self.matrices is None and block & (block - 1)):
            raise SettingsError(f"block {block!r}", f"{power} up to {LARGEST_BLOCK}", "choose another block")

    @property
    def word(self) -> str:
        """What it does to inputs."""
        return "rotated" if self.matrices is None else "mixed"

    def __str__(self) -> str:
        matrices = "" if self.matrices is None else f" and matrices in {self.matrices}"
        return f"blocks of {self.block}{matrices}"

    def tensor_layout(
        self, out_features: int, in_features: int
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name, shape and dtype of `signs`, or of `left` and `right`."""
        if in_features % self.block:
            raise CheckpointError(
                f"a transform of blocks of {self.block} for {in_features} inputs",
                "blocks that divide the inputs",
                "check the file; it may be damaged",
            )
        blocks = in_features // self.block
        if self.matrices is None:
            return {"signs": ((blocks, self.block), torch.int8)}
        dtype = MATRIX_DTYPES[self.matrices]
        return {"left": ((blocks, blocks), dtype), "right": ((self.block, self.block), dtype)}


def kronecker_transform(in_features: int, dtype: str) -> Transform:
    """Two matrices whose orders are as near to each other as the divisors of `in_features` allow."""
    order = next(n for n in range(math.isqrt(in_features), 0, -1) if in_features % n == 0)
    return Transform(in_features // order, dtype)


def transform_to_dict(transform: Transform) -> dict[str, Any]:
    """A transform as it stands in `config.json`."""
    return {key: value for key, value in asdict(transform).items() if value is not None}


def transform_from_dict(data: Any) -> Transform:
    """A transform as it stands in `config.json` and `plan.yaml`: a mapping of `block`, and maybe `matrices`.

    Raises
    ------
    CheckpointError
        For anything else.
    """
    if not isinstance(data, dict) or not {"block"} <= data.keys() <= {"block", "matrices"}:
        raise CheckpointError(
            f"`transform` {data!r}"[:500],
            "a mapping of `block`, and of `matrices` where there are two",
            "correct the file, or read it with a newer version of tailorbird",
        )
    try:
        return Transform(**data)
    except SettingsError as error:
        raise CheckpointError(f"`transform` of {error.given}", error.expected, error.remedy) from error


def stated_transform(tensors: Mapping[str, Tensor | None]) -> Transform | None:
    """The transform of a weight with these tensors, as shapes and dtypes tell; None where there is none.

    Raises
    ------
    CheckpointError
        When the shape or dtype is that of no transform.
    """
    signs, right = tensors.get("signs"), tensors.get("right")
    if signs is None and right is None:
        return None
    name, tensor = ("signs", signs) if signs is not None else ("right", right)
    assert tensor is not None
    shape = list(tensor.shape)
    dtype = next((known for known, one in MATRIX_DTYPES.items() if one == tensor.dtype), str(tensor.dtype))
    try:
        return Transform(shape[-1] if len(shape) == 2 else 0, None if name == "signs" else dtype)
    except SettingsError:
        raise CheckpointError(
            f"`{name}` {shape} of {tensor.dtype}",
            "[blocks, block], the latter a power of two" if name == "signs" else "[block, block], floats",
            "check the file; it may be damaged",
        ) from None


def transform_tensors(tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Those of a weight's tensors that are its transform's."""
    found = {name: tensors.get(name) for name in TRANSFORM_PARTS}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def transformed(x: Tensor, tensors: Mapping[str, Tensor | None]) -> Tensor:
    """``T x`` for every vector of the last axis; `x` where `tensors` have no transform."""
    signs, left, right = (tensors.get(name) for name in TRANSFORM_PARTS)
    if signs is not None:
        return walsh.rotate(x, signs)
    return x if left is None or right is None else kronecker.mix(x, left, right)


def weight_behind(weight: Tensor, tensors: Mapping[str, Tensor | None]) -> Tensor:
    """``W T⁻¹`` of a weight ``[out_features, in_features]``, likewise."""
    signs, left, right = (tensors.get(name) for name in TRANSFORM_PARTS)
    if signs is not None:
        return walsh.rotate(weight, signs)
    return weight if left is None or right is None else kronecker.behind(weight, left, right)


def weight_in_front(weight: Tensor, tensors: Mapping[str, Tensor | None]) -> Tensor:
    """``V T`` of what codes ``[out_features, in_features]`` stand for, likewise."""
    signs, left, right = (tensors.get(name) for name in TRANSFORM_PARTS)
    if signs is not None:
        return walsh.rotate_back(weight, signs)
    return weight if left is None or right is None else kronecker.in_front(weight, left, right)


def check_transform(tensors: Mapping[str, Tensor | None]) -> None:
    """Raise `CheckpointError` unless `signs` are 1 and -1 alone, and matrices finite and invertible."""
    for name, tensor in transform_tensors(tensors).items():
        if tensor.is_meta:
            continue
        if name == "signs":
            if not bool((tensor.abs() == 1).all()):
                raise CheckpointError(
                    "`signs` with another value than 1 and -1",
                    "these two",
                    "check the file; it may be damaged",
                )
        elif not invertible(tensor):
            raise CheckpointError(
                f"`{name}` that has no inverse", "finite, and far from singular", "compress the model again"
            )


def invertible(matrix: Tensor) -> bool:
    """Whether a matrix is square and finite, and its singular values differ by no more than `LEAST_RATIO`.

    ``A Aᵀ`` less what its least eigenvalue must exceed is positive definite in all but the worst matrices
    that are good: a triangular factor tells, and singular values, which take far longer, are for the rest.
    """
    if matrix.dim() != 2 or len(set(matrix.shape)) != 1:
        return False
    wide = matrix.detach().double()
    gram = wide @ wide.T
    squares = float(gram.trace())  # no less than the square of the greatest singular value
    if not math.isfinite(squares):
        return False
    gram.diagonal().sub_(2 * LEAST_RATIO**2 * squares)  # twice: far beyond what the products are rounded by
    if int(torch.linalg.cholesky_ex(gram).info) == 0:
        return True
    values = torch.linalg.svdvals(wide)
    return bool(values[-1] > LEAST_RATIO * values[0])
