"""The sparse part of a weight: some values in 16 bits, by rows, that are added to what its codes stand
for.

How many there are is stated beside the coding, so that the bytes are known before the values are. The
layout is written down in `docs/formats.md`; who runs it is `kernels/additions.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tailorbird.errors import CheckpointError, SettingsError

VALUE_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
#: names of its tensors, in the order of the stored layout
SPARSE_PARTS = ("counts", "columns", "values")
#: columns of a wider weight, and how many of them a row may have, don't fit in 16 bits
NARROW = (1 << 16) - 1
_MOST = (1 << 31) - 1


@dataclass(frozen=True)
class Sparse:
    """What stands beside the base of a weight: a matrix that is zero but for some values, added to it.

    Parameters
    ----------
    nonzeros : int
        Values that are stored, from 1.
    dtype : str
        Of the values: "bfloat16" or "float16".
    """

    nonzeros: int
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if type(self.nonzeros) is not int or not 1 <= self.nonzeros <= _MOST:
            raise SettingsError(
                f"nonzeros {self.nonzeros!r}", f"a whole number from 1 to {_MOST}", "choose another number"
            )
        if self.dtype not in VALUE_DTYPES:
            raise SettingsError(f"dtype {self.dtype!r}", " or ".join(VALUE_DTYPES), "choose another dtype")

    def tensor_layout(
        self, out_features: int, in_features: int
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name, shape and dtype of `counts`, `columns` and `values`."""
        narrow = torch.uint16 if in_features <= NARROW else torch.int32
        return {
            "counts": ((out_features,), narrow),
            "columns": ((self.nonzeros,), narrow),
            "values": ((self.nonzeros,), VALUE_DTYPES[self.dtype]),
        }


def sparse_from_dict(data: Any) -> Sparse:
    """A sparse part as it stands in `config.json` and `plan.yaml`: a mapping of `nonzeros` and `dtype`.

    Raises
    ------
    CheckpointError
        For anything else.
    """
    if not isinstance(data, dict) or data.keys() != {"nonzeros", "dtype"}:
        raise CheckpointError(
            f"`sparse` {data!r}"[:500],
            "a mapping of exactly `nonzeros` and `dtype`",
            "correct the file, or read it with a newer version of tailorbird",
        )
    if not isinstance(data["dtype"], str):
        raise CheckpointError(f"`sparse` of dtype {data['dtype']!r}"[:500], "its name", "correct the file")
    try:
        return Sparse(**data)
    except SettingsError as error:
        raise CheckpointError(f"`sparse` of {error.given}", error.expected, error.remedy) from error


def stated_sparse(tensors: Mapping[str, Tensor]) -> Sparse | None:
    """The sparse part of a weight with these tensors, as far as `values` tells; None where there is none."""
    values = tensors.get("values")
    if values is None:
        return None
    dtype = next((name for name, known in VALUE_DTYPES.items() if known == values.dtype), "bfloat16")
    return Sparse(max(1, values.numel()), dtype)


def sparse_rows(matrix: Tensor, mask: Tensor, dtype: str = "bfloat16") -> dict[str, Tensor]:
    """The tensors of a sparse part: the values of `matrix` where `mask` is true, rounded.

    Parameters
    ----------
    matrix : Tensor[out_features, in_features], float
    mask : Tensor[out_features, in_features], bool
        True at least once.
    dtype : str
        "bfloat16" or "float16".
    """
    out_features, in_features = matrix.shape
    layout = Sparse(int(mask.sum()), dtype).tensor_layout(out_features, in_features)
    found = mask.sum(1), mask.nonzero()[:, 1], matrix[mask]
    return {name: one.to(dtype) for (name, (_, dtype)), one in zip(layout.items(), found, strict=True)}


def row_numbers(counts: Tensor) -> Tensor:
    """The row of every value, int64."""
    return torch.arange(len(counts), device=counts.device).repeat_interleave(counts.long())


def with_sparse(base: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """`base` plus the sparse part, in the dtype of `base` ``[out_features, in_features]``; a new tensor."""
    places = row_numbers(tensors["counts"]), tensors["columns"].long()
    return base.index_put(places, tensors["values"].to(base.dtype), accumulate=True)


def part_of_rows(tensors: Mapping[str, Tensor], rows: slice) -> dict[str, Tensor]:
    """The sparse part of some rows that follow each other."""
    counts = tensors["counts"].long()
    start = int(counts[: rows.start].sum()) if rows.start else 0
    inside = slice(start, start + int(counts[rows].sum()))
    return {
        "counts": tensors["counts"][rows],
        "columns": tensors["columns"][inside],
        "values": tensors["values"][inside],
    }


def whole_columns(tensors: Mapping[str, Tensor], in_features: int) -> Tensor:
    """The inputs whose column the sparse part fills in every row, rising, int64."""
    filled = torch.bincount(tensors["columns"].long(), minlength=in_features)
    return (filled == len(tensors["counts"])).nonzero().squeeze(1)


def check_sparse(tensors: Mapping[str, Tensor], in_features: int) -> None:
    """Raise `CheckpointError` unless counts and columns describe rows of a weight.

    Parameters
    ----------
    tensors : mapping
        `counts`, `columns` and `values`, of the shapes and dtypes of `Sparse.tensor_layout`.
    in_features : int
    """
    counts, columns = tensors["counts"].long(), tensors["columns"].int()
    if counts.is_meta:
        return
    if int(counts.sum()) != len(columns) or bool((counts < 0).any()):
        raise CheckpointError(
            f"`counts` of {int(counts.sum())} values in all, or of less than none in a row",
            f"{len(columns)} in all, as many as there are columns",
            "check the file; it may be damaged",
        )
    rows = row_numbers(counts)
    inside = bool(((columns >= 0) & (columns < in_features)).all())
    if not inside or bool(((columns.diff() <= 0) & (rows.diff() == 0)).any()):
        raise CheckpointError(
            "`columns` name an input that doesn't exist, or don't rise within a row",
            f"of each row rising numbers from 0 to {in_features - 1}",
            "check the file; it may be damaged",
        )
