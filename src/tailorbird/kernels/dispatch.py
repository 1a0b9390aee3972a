"""Which path multiplies by a packed weight here, and running it.

A path is an entry of `PATHS`: what it serves, how it lays the weight out, how it multiplies. The first
entry that serves a case is taken, else the exact reference. A path whose operators are absent from this
build of PyTorch, or wrong on this processor, is left out, and that is logged once.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from tailorbird.kernels import cpu, native, panels
from tailorbird.kernels.packing import pack_codes
from tailorbird.kernels.reference import dequantize, group_layout

logger = logging.getLogger("tailorbird")

#: name of the path that serves everything: dequantize, then multiply
REFERENCE = "reference"


class GroupedCodes(Protocol):
    """What a path needs to know of a coding."""

    kind: ClassVar[str]

    @property
    def bits(self) -> int: ...
    @property
    def group_size(self) -> int: ...
    @property
    def symmetric(self) -> bool: ...
    @property
    def levels(self) -> Tensor | None: ...


@dataclass(frozen=True, eq=False)
class Path:
    """One fast path.

    Parameters
    ----------
    name : str
        As shown in reports.
    device : str
        Device type that it runs on.
    dtypes : tuple of torch.dtype
        Of the activations.
    max_rows : int
        With more rows than this, dequantizing and a dense product take over.
    runs_here : Callable[[], bool]
        Whether this machine has what it needs.
    missing : str
        What it lacks otherwise.
    serves : Callable[[GroupedCodes, int], bool]
        Whether a coding with so many inputs can be laid out for it.
    prepare : Callable[..., layout]
        Lays stored tensors out; arguments as in `reference.dequantize`.
    multiply : Callable[[Tensor, layout], Tensor]
        `[rows, in_features]` to `[rows, out_features]`.
    example : tuple[int, int]
        (bits, group_size) of the small symmetric weight on which it is tried before it is used.
    rounds : bool
        Whether it rounds activations to bytes (`reference.to_bytes`): for linears that allow it.
    differentiable : bool
        Whether the product can be differentiated by the activations.
    as_stored : bool
        Whether its layout is the stored tensors themselves, so that there is nothing to keep; `prepare` then
        takes `order` too, and the product the activations as they come.
    kinds : tuple of str
        Of the codings that it may serve.
    """

    name: str
    device: str
    dtypes: tuple[torch.dtype, ...]
    max_rows: int
    runs_here: Callable[[], bool]
    missing: str
    serves: Callable[[GroupedCodes, int], bool]
    prepare: Callable[..., Any]
    multiply: Callable[[Tensor, Any], Tensor]
    example: tuple[int, int]
    rounds: bool = False
    differentiable: bool = False
    as_stored: bool = False
    kinds: tuple[str, ...] = ("integer", "codebook", "double")


def _fits_signed_bytes(coding: GroupedCodes, in_features: int) -> bool:
    one_group = group_layout(in_features, coding.group_size)[0] == 1
    return one_group and (coding.bits in (5, 6) or (coding.bits == 8 and coding.symmetric))


def _lazily(module: str, name: str) -> Callable[..., Any]:
    """A function of Triton kernels, whose module isn't imported before it is needed: that takes a while."""

    def call(*arguments: Any, **settings: Any) -> Any:
        return getattr(importlib.import_module(f"tailorbird.kernels.{module}"), name)(*arguments, **settings)

    return call


#: One object: paths with the same `prepare` share their layout.
_triton_planes = _lazily("triton_linear", "prepare")
_has_planes = _lazily("triton_linear", "serves")


def has_triton() -> bool:
    """Whether Triton is installed, without importing it."""
    return importlib.util.find_spec("triton") is not None


#: in order of preference
PATHS = (
    Path(
        name="triton",
        device="cuda",
        dtypes=(torch.bfloat16, torch.float16, torch.float32),
        max_rows=64,
        runs_here=has_triton,
        missing="Triton isn't installed",
        serves=_has_planes,
        prepare=_triton_planes,
        multiply=_lazily("triton_linear", "linear"),
        example=(3, 32),
    ),
    Path(
        name="triton-int8",
        device="cuda",
        dtypes=(torch.bfloat16, torch.float16, torch.float32),
        max_rows=1 << 30,
        runs_here=has_triton,
        missing="Triton isn't installed",
        serves=_has_planes,
        prepare=_triton_planes,
        multiply=_lazily("triton_int8", "linear"),
        example=(3, 32),
        rounds=True,
    ),
    Path(
        name="native-int8",
        device="cpu",
        dtypes=(torch.bfloat16, torch.float32),
        max_rows=1 << 30,
        runs_here=native.available,
        missing="tailorbird was installed without a C++ compiler",
        serves=native.serves,
        prepare=native.tiles,
        multiply=functools.partial(native.linear, int8=True),
        example=(3, 32),
        rounds=True,
        kinds=("integer", "codebook", "double", "vector"),
    ),
    Path(
        name="aten-int8",
        device="cpu",
        dtypes=(torch.bfloat16,),
        max_rows=48,
        runs_here=cpu.has_vector_kernels,
        missing="this processor has neither AVX2 nor AVX-512",
        serves=_fits_signed_bytes,
        prepare=cpu.signed_bytes,
        multiply=cpu.linear_bytes,
        example=(8, 0),
    ),
    Path(
        name="aten-int4",
        device="cpu",
        dtypes=(torch.bfloat16,),
        max_rows=48,
        runs_here=cpu.has_vector_kernels,
        missing="this processor has neither AVX2 nor AVX-512",
        serves=lambda coding, in_features: coding.levels is None and coding.bits <= 4,
        prepare=cpu.nibble_planes,
        multiply=cpu.linear_nibbles,
        example=(4, 32),
    ),
    Path(
        name="aten-int4x2",
        device="cpu",
        dtypes=(torch.bfloat16,),
        max_rows=32,
        runs_here=cpu.has_vector_kernels,
        missing="this processor has neither AVX2 nor AVX-512",
        serves=lambda coding, in_features: coding.bits > 4,
        prepare=cpu.nibble_planes,
        multiply=cpu.linear_nibbles,
        example=(8, 32),
    ),
    Path(
        name="native-float",
        device="cpu",
        dtypes=(torch.float32, torch.bfloat16),
        max_rows=32,
        runs_here=native.available,
        missing="tailorbird was installed without a C++ compiler",
        serves=native.serves,
        prepare=native.tiles,
        multiply=native.linear,
        example=(3, 32),
        kinds=("integer", "codebook", "double", "vector"),
    ),
    Path(
        name="native-tables",
        device="cpu",
        dtypes=(torch.float32, torch.bfloat16),
        max_rows=1 << 30,
        runs_here=native.available,
        missing="tailorbird was installed without a C++ compiler",
        serves=lambda coding, in_features: True,
        prepare=native.table_rows,
        multiply=native.table_linear,
        example=(3, 0),
        kinds=("table",),
    ),
    Path(
        name="native-panels",
        device="cpu",
        dtypes=(torch.bfloat16, torch.float32),
        max_rows=1 << 30,
        runs_here=native.available,
        missing="tailorbird was installed without a C++ compiler",
        serves=panels.serves,
        prepare=panels.StoredWeight,
        multiply=panels.linear,
        example=(3, 32),
        differentiable=True,
        as_stored=True,
    ),
)


@functools.cache
def _say_missing(missing: str, names: tuple[str, ...]) -> None:
    """Log it once for all paths that lack the same."""
    logger.warning(
        "no fast path %s: %s; other paths or the exact reference serve", " or ".join(names), missing
    )


@functools.cache
def works(path: Path) -> bool:
    """Whether `path` runs here and multiplies a small weight right; logged once where not."""
    if not path.runs_here():
        _say_missing(path.missing, tuple(other.name for other in PATHS if other.missing == path.missing))
        return False
    bits, group_size = path.example
    values = (torch.arange(16 * 64).view(16, 64) * 7) % (1 << bits)
    groups, _ = group_layout(64, group_size)
    codes = pack_codes(values, bits).to(path.device)
    scales: Tensor | None = torch.ones(16, groups, dtype=torch.bfloat16, device=path.device)
    settings: dict[str, Any] = {"bits": bits, "group_size": group_size, "in_features": 64}
    if path.kinds == ("table",):
        scales, values = None, torch.arange(16 << bits, device=path.device).view(16, -1)
        settings["tables"] = (values % 251).bfloat16()
    try:
        layout = path.prepare(codes, scales, None, **settings)
        products = [
            path.multiply(torch.eye(64, dtype=dtype, device=path.device), layout) for dtype in path.dtypes
        ]
    except Exception as error:  # a compiler's errors have no closer base
        logger.warning("fast path %s doesn't run here (%s); using the exact reference", path.name, error)
        return False
    weight = dequantize(codes, scales, None, **settings)
    if not all(torch.equal(product.float(), weight.t()) for product in products):
        logger.warning("fast path %s is wrong on this machine; using the exact reference", path.name)
        return False
    return True


def _works(path: Path) -> bool:
    """`works`, which `torch.compile` asks instead of looking into it."""
    return works(path)


# as `torch.compiler.assume_constant_result` does, which would import the compiler, and with it Triton
_works._dynamo_marked_constant = True  # type: ignore[attr-defined]


def find(
    coding: GroupedCodes,
    in_features: int,
    rows: int,
    dtype: torch.dtype,
    device: torch.device,
    rounds: bool = False,
    gradient: bool = False,
) -> Path | None:
    """The fast path for `rows` rows of activations of `dtype` on `device`; None: the reference.

    With `rounds` it may be one that rounds the activations to bytes; with `gradient` the activations need a
    gradient.
    """
    for path in PATHS:
        if (
            path.device == device.type
            and dtype in path.dtypes
            and (rounds or not path.rounds)
            and (path.differentiable or not gradient)
            and 0 < rows <= path.max_rows
            and coding.kind in path.kinds
            and path.serves(coding, in_features)
            and _works(path)
        ):
            return path
    return None


def choose(
    coding: GroupedCodes,
    in_features: int,
    rows: int,
    dtype: torch.dtype,
    device: torch.device,
    rounds: bool = False,
    gradient: bool = False,
) -> str:
    """Name of the path that `rows` rows of activations take: one of `PATHS`, or `"reference"`."""
    path = find(coding, in_features, rows, dtype, device, rounds, gradient)
    return REFERENCE if path is None else path.name
