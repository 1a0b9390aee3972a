"""What stands beside a linear's base: y += U (V x), and y += S x with a sparse S, compiled and exact.

U and V are a low-rank part, S is a sparse part, few values in 16 bits by rows; a packed weight may have
both (`formats/packed.py`). Sums are float32 and go from the first rank to the last, or over every fourth
value of a row, the four sums added as (0 + 1) + (2 + 3); then they are added to y, which is rounded to
its dtype. So a row of y has the same bits alone and among others.
"""

from __future__ import annotations

import ctypes
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from tailorbird.kernels.adapters import LinearAdapter, TiledRows
from tailorbird.kernels.native import ONE_THREAD, best_version, library

_ACTIVATIONS = (torch.float32, torch.bfloat16)


class SparseStructure(ctypes.Structure):
    """`SparseRows` of `cpp/block.h`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("offsets", "columns", "values")),
        *((name, ctypes.c_int64) for name in ("rows", "in_features")),
        *((name, ctypes.c_int32) for name in ("wide", "half")),
    ]


@dataclass(frozen=True, eq=False)
class SparseRows:
    """A matrix `[out_features, in_features]` that is zero but for some values; contiguous tensors on the CPU.

    Parameters
    ----------
    offsets : Tensor[out_features + 1], int64
        Row `i` has the values from ``offsets[i]`` to ``offsets[i + 1] - 1``.
    columns : Tensor[values], uint16 or int32
        A column may occur more than once; its values are added.
    values : Tensor[values], bfloat16 or float16
    in_features : int

    Raises
    ------
    ValueError
        For other dtypes, offsets that don't rise from 0 to the number of values, or columns beyond the last.
    """

    offsets: Tensor
    columns: Tensor
    values: Tensor
    in_features: int

    def __post_init__(self) -> None:
        for name, tensor, dtypes in (
            ("offsets", self.offsets, (torch.int64,)),
            ("columns", self.columns, (torch.uint16, torch.int32)),
            ("values", self.values, (torch.bfloat16, torch.float16)),
        ):
            on_cpu = tensor.device.type == "cpu"
            if tensor.dtype not in dtypes or tensor.dim() != 1 or not on_cpu or not tensor.is_contiguous():
                expected = " or ".join(str(dtype) for dtype in dtypes)
                raise ValueError(
                    f"{name} are {tensor.dtype} {list(tensor.shape)} on {tensor.device}; "
                    f"expected contiguous {expected} of one dimension on the CPU"
                )
        count = len(self.values)
        ends = len(self.offsets) > 0 and int(self.offsets[0]) == 0 and int(self.offsets[-1]) == count
        if not ends or len(self.columns) != count or bool((self.offsets.diff() < 0).any()):
            raise ValueError(
                f"{len(self.offsets)} offsets for {len(self.columns)} columns and {count} values; expected "
                "offsets that rise from 0 to the number of values, and a column for each"
            )
        columns = self.columns.int()
        if count and not 0 <= int(columns.min()) <= int(columns.max()) < self.in_features:
            raise ValueError(
                f"columns {int(columns.min())} to {int(columns.max())}; expected 0 to {self.in_features - 1}"
            )

    @property
    def out_features(self) -> int:
        return len(self.offsets) - 1

    def described(self) -> SparseStructure:
        """As compiled code reads it, as long as this matrix is kept."""
        return SparseStructure(
            self.offsets.data_ptr(), self.columns.data_ptr(), self.values.data_ptr(), self.out_features,
            self.in_features,
            int(self.columns.dtype == torch.int32), int(self.values.dtype == torch.float16),
        )  # fmt: skip


class StoredRows:
    """A stored sparse part as `add_sparse` reads it, checked once; CPU.

    Parameters
    ----------
    counts : Tensor[out_features], uint16 or int32
        How many values each row has.
    columns, values
        As of `SparseRows`.
    in_features : int
    """

    def __init__(self, counts: Tensor, columns: Tensor, values: Tensor, in_features: int) -> None:
        self._sources = _Sources(counts, columns, values)
        offsets = torch.zeros(len(counts) + 1, dtype=torch.int64)
        offsets[1:] = counts.long().cumsum(0)
        columns, values = columns.detach().contiguous(), values.detach().contiguous()
        self.rows = SparseRows(offsets, columns, values, in_features)

    def current(self, *tensors: Tensor) -> bool:
        """Whether these are the very tensors that were read, unchanged since."""
        return self._sources.are(*tensors)


class LowRankFactors:
    """U and V as `add_low_rank` reads them, laid out once; CPU.

    Parameters
    ----------
    up : Tensor[out_features, rank], bfloat16 or float16
    down : Tensor[rank, in_features], bfloat16 or float16
    """

    def __init__(self, up: Tensor, down: Tensor) -> None:
        self._sources = _Sources(up, down)
        up, down = (one.float() if one.dtype == torch.float16 else one for one in (up, down))
        self.up, self.down = TiledRows(up), down.detach().contiguous()

    def current(self, up: Tensor, down: Tensor) -> bool:
        """Whether these are the very tensors that were laid out, unchanged since."""
        return self._sources.are(up, down)


class _Sources:
    """Tensors from which something was made, and the state that they were in."""

    def __init__(self, *tensors: Tensor) -> None:
        self._known = [(weakref.ref(one), _version(one)) for one in tensors]

    def are(self, *tensors: Tensor) -> bool:
        """Whether they are just these, unchanged since."""
        given = zip(self._known, tensors, strict=True)
        return all(source() is one and version == _version(one) for (source, version), one in given)


def _version(tensor: Tensor) -> int:
    """Number of in-place changes so far; inference tensors don't count them."""
    return 0 if tensor.is_inference() else tensor._version


def serves(x: Tensor) -> bool:
    """Whether activations have a dtype and device that the compiled additions take."""
    return x.dtype in _ACTIVATIONS and x.device.type == "cpu"


def dense(sparse: SparseRows, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix `[out_features, in_features]`, exact where no column occurs twice in a row."""
    rows = torch.arange(sparse.out_features).repeat_interleave(sparse.offsets.diff())
    whole = torch.zeros(sparse.out_features, sparse.in_features, dtype=dtype)
    return whole.index_put_((rows, sparse.columns.long()), sparse.values.to(dtype), accumulate=True)


def low_rank_reference(y: Tensor, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """The exact `add_low_rank`: float64 until the result is rounded to the dtype of `y`."""
    return (y.double() + x.double() @ down.double().t() @ up.double().t()).to(y.dtype)


def sparse_reference(y: Tensor, x: Tensor, sparse: SparseRows) -> Tensor:
    """The exact `add_sparse`: float64 until the result is rounded to the dtype of `y`."""
    return (y.double() + x.double() @ dense(sparse, torch.float64).t()).to(y.dtype)


def sparse_linear(x: Tensor, counts: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """``S x`` by PyTorch on any device, through which a gradient of `x` passes; the dense S never exists.

    Parameters
    ----------
    x : Tensor[..., in_features]
        At most float64; what is narrower than float32 is multiplied in float32.
    counts, columns, values
        As of `StoredRows`.

    Returns
    -------
    Tensor[..., out_features]
        In the dtype of `x`.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    out_features = len(counts)
    rows = torch.arange(out_features, device=x.device).repeat_interleave(counts.long())
    matrix = torch.sparse_coo_tensor(
        torch.stack([rows, columns.long()]), values.to(wide), (out_features, x.shape[-1]),
        check_invariants=True, is_coalesced=True,
    )  # fmt: skip
    product = torch.sparse.mm(matrix, x.reshape(-1, x.shape[-1]).t().to(wide)).t()
    return product.to(x.dtype).reshape(*x.shape[:-1], out_features)


def add_low_rank(
    y: Tensor, x: Tensor, down: Tensor, up: Tensor | TiledRows, version: int | None = None
) -> Tensor:
    """``y + U (V x)``, a new tensor.

    Parameters
    ----------
    y : Tensor[rows, out_features], float32 or bfloat16
    x : Tensor[rows, in_features], float32 or bfloat16
    down : Tensor[rank, in_features], float32 or bfloat16, contiguous
        V.
    up : Tensor[out_features, rank], float32 or bfloat16, contiguous; or the same laid out
        U.
    version : int, optional
        Instructions to use, up to `native.best_version()`, which is the default.

    Raises
    ------
    ValueError
        For shapes or dtypes that don't fit.
    """
    total, inputs = _activations(y, x)
    linear = LinearAdapter(down, up)
    linear.check(y.shape[1], x.shape[1], "low-rank part")
    kept: list[Tensor | TiledRows] = []
    described = linear.described(kept)
    library().tailorbird_adapt(
        ctypes.byref(described), inputs.data_ptr(), x.shape[1], total.data_ptr(), y.shape[1], len(y),
        _threads(len(y) * down.numel()), best_version() if version is None else version,
    )  # fmt: skip
    return total.to(y.dtype)


def add_sparse(y: Tensor, x: Tensor, sparse: SparseRows, version: int | None = None) -> Tensor:
    """``y + S x``, a new tensor; `y`, `x` and `version` as in `add_low_rank`.

    Raises
    ------
    ValueError
        For shapes or dtypes that don't fit.
    """
    total, inputs = _activations(y, x)
    if (y.shape[1], x.shape[1]) != (sparse.out_features, sparse.in_features):
        raise ValueError(
            f"y {list(y.shape)} and x {list(x.shape)}; expected {sparse.out_features} and "
            f"{sparse.in_features} columns"
        )
    library().tailorbird_add_sparse(
        ctypes.byref(sparse.described()), inputs.data_ptr(), total.data_ptr(), len(y),
        _threads(len(y) * len(sparse.values)), best_version() if version is None else version,
    )  # fmt: skip
    return total.to(y.dtype)


def _activations(y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 copy of `y` that may be written to, and `x` in float32."""
    if y.dim() != 2 or x.dim() != 2 or len(x) != len(y):
        raise ValueError(f"y {list(y.shape)} and x {list(x.shape)}; expected matrices with as many rows")
    if (
        y.dtype not in _ACTIVATIONS
        or x.dtype not in _ACTIVATIONS
        or {y.device.type, x.device.type} != {"cpu"}
    ):
        raise ValueError(
            f"y {y.dtype} on {y.device}, x {x.dtype} on {x.device}; expected float32 or bfloat16 on the CPU"
        )
    return y.to(torch.float32, copy=True).contiguous(), x.float().contiguous()


def _threads(work: int) -> int:
    return 1 if work <= ONE_THREAD else torch.get_num_threads()
