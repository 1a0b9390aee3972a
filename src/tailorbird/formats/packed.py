"""The stored form of a linear: its coding, its tensors, their exact sizes.

The layout is canonical, the same on every machine, and written down in `docs/formats.md`. Reading and
writing of files happens in `model/`; running in `kernels/`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tailorbird.errors import CheckpointError, SettingsError, nearest
from tailorbird.formats import codebooks
from tailorbird.formats.sparse import (
    SPARSE_PARTS,
    Sparse,
    check_sparse,
    sparse_rows,
    stated_sparse,
    with_sparse,
)
from tailorbird.formats.transform import (
    MATRIX_DTYPES,
    TRANSFORM_PARTS,
    Transform,
    check_transform,
    stated_transform,
    transform_tensors,
    weight_in_front,
)
from tailorbird.kernels import dynamic_codes, entropy
from tailorbird.kernels.packing import check_bits, pack_codes, packed_width
from tailorbird.kernels.reference import dequantize, group_layout

#: version of the stored layout; raised when an old reader would misread a new checkpoint
SCHEMA_VERSION = 1

GROUP_SIZES = (0, 32, 64, 96, 128, 160, 192, 224, 256)
SCALE_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
#: of the values of a row's table
TABLE_DTYPES = SCALE_DTYPES
TABLE_BITS = (2, 3, 4)
#: of the factors of a low-rank part
FACTOR_DTYPES = SCALE_DTYPES
#: names of the tensors of a weight that is stored as codes, in the order of the stored layout
ENTROPY_PARTS = ("lengths", "sizes", "stream", "rest")
#: of scales that are codes themselves
SCALE_PARTS = ("scale_sizes", "scale_mean")
PARTS = (
    *("codes", "scales", *SCALE_PARTS, "tables", "zeros", "order", *TRANSFORM_PARTS, "up", "down"),
    *SPARSE_PARTS,
    *ENTROPY_PARTS,
)
#: those of them that stand beside the base
BESIDE = ("up", "down", *SPARSE_PARTS)
FLOAT_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
#: of a stream: far above any weight's
_MOST_BYTES = (1 << 40) - 1
_SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def _grouped_label(values: str, group_size: int, scale_dtype: str, *more: str) -> str:
    """Short name of codes with scales of groups; bfloat16 goes without saying."""
    scales = () if scale_dtype == "bfloat16" else (_SHORT[scale_dtype],)
    return " ".join((values, f"g{group_size}" if group_size else "row", *more, *scales))


def _one_of(field: str, given: Any, allowed: Iterable[int] | Iterable[str]) -> None:
    # types too: 64.0 equals 64, but is no group size
    if not any(type(given) is type(value) and given == value for value in allowed):
        raise SettingsError(
            f"{field} {given!r}",
            "one of " + ", ".join(map(str, allowed)),
            f"choose another {field}",
        )


@dataclass(frozen=True)
class IntegerCoding:
    """Grouped integers: `scale * (code - zero)` with one scale and zero point per group of a row.

    Parameters
    ----------
    bits : int
        Bits per code: 2, 3, 4, 5, 6 or 8.
    group_size : int
        Consecutive stored columns that share a scale: 32 to 256 in steps of 32; 0 is one group per row.
        The last group of a row may be shorter.
    symmetric : bool
        True: the zero point is `2**(bits - 1)` everywhere and isn't stored. False: one integer zero point
        per group, packed with the same bits.
    scale_dtype : str
        "bfloat16" or "float16".
    """

    kind: ClassVar[str] = "integer"
    levels: ClassVar[None] = None
    bits: int
    group_size: int
    symmetric: bool = False
    scale_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        check_bits(self.bits)
        _one_of("group_size", self.group_size, GROUP_SIZES)
        _one_of("scale_dtype", self.scale_dtype, SCALE_DTYPES)
        if not isinstance(self.symmetric, bool):
            raise SettingsError(f"symmetric {self.symmetric!r}", "true or false", "write one of the two")

    @property
    def label(self) -> str:
        """Short name: `int4 g64`, `int4 g64 sym`, `int8 row`, `int3 g32 fp16`."""
        sign = ("sym",) if self.symmetric else ()
        return _grouped_label(f"int{self.bits}", self.group_size, self.scale_dtype, *sign)


@dataclass(frozen=True)
class CodebookCoding:
    """Codes for the levels of a codebook: `scale * levels[code]`, one scale per group of a row.

    Parameters
    ----------
    codebook : str
        "nf4" or "fp4", of 4 bits, or "gauss2", "gauss3" or "gauss4" (`codebooks`).
    group_size : int
        As of `IntegerCoding`.
    scale_dtype : str
        "bfloat16" or "float16".
    """

    kind: ClassVar[str] = "codebook"
    codebook: str
    group_size: int
    scale_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        _one_of("codebook", self.codebook, codebooks.LEVELS)
        _one_of("group_size", self.group_size, GROUP_SIZES)
        _one_of("scale_dtype", self.scale_dtype, SCALE_DTYPES)

    @property
    def bits(self) -> int:
        """Bits per code: 2, 3 or 4."""
        return codebooks.bits_of(self.codebook)

    @property
    def symmetric(self) -> bool:
        """True: no zero points are stored."""
        return True

    @property
    def levels(self) -> Tensor:
        """What the codes stand for, up to the scale: int8 `[2**bits]`, ascending."""
        return codebooks.LEVELS[self.codebook]

    @property
    def label(self) -> str:
        """Short name: `nf4 g64`, `nf4 row`, `nf4 g64 fp16`."""
        return _grouped_label(self.codebook, self.group_size, self.scale_dtype)


@dataclass(frozen=True)
class VectorCoding:
    """Codes for the points of a vector codebook: each stands for several neighbouring values of a row.

    ``scale * points[code]``, one scale per group of a row. Where the columns don't divide by the dimension,
    the last code of a row has coordinates that stand for nothing.

    Parameters
    ----------
    codebook : str
        "gauss2x2", "gauss2x4", "gauss3x2" or "gauss4x2" (`codebooks`): bits of a value x dimension.
    group_size : int
        As of `IntegerCoding`.
    scale_dtype : str
        "bfloat16" or "float16".
    """

    kind: ClassVar[str] = "vector"
    codebook: str
    group_size: int
    scale_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        _one_of("codebook", self.codebook, codebooks.POINTS)
        _one_of("group_size", self.group_size, GROUP_SIZES)
        _one_of("scale_dtype", self.scale_dtype, SCALE_DTYPES)

    @property
    def dimension(self) -> int:
        """Values that a code stands for: 2 or 4."""
        return self.levels.shape[1]

    @property
    def code_bits(self) -> int:
        """Bits per code: 4, 6 or 8."""
        return codebooks.bits_of(self.codebook)

    @property
    def bits(self) -> int:
        """Bits per value: 2, 3 or 4."""
        return self.code_bits // self.dimension

    @property
    def symmetric(self) -> bool:
        """True: no zero points are stored."""
        return True

    @property
    def levels(self) -> Tensor:
        """What the codes stand for, up to the scale: int8 `[2**code_bits, dimension]`."""
        return codebooks.POINTS[self.codebook]

    @property
    def label(self) -> str:
        """Short name: `gauss2x4 g64`, `gauss3x2 row`."""
        return _grouped_label(self.codebook, self.group_size, self.scale_dtype)


@dataclass(frozen=True)
class DoubleCoding:
    """A codebook's codes whose scales are codes, too: of 8 bits, for the distances from their mean.

    Double quantization of Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs"
    (arXiv:2305.14314). The scales of a weight, row after row, less their mean, are coded in blocks of 256
    with one float32 each (`kernels/dynamic_codes.py`). What they stand for is rounded to bfloat16, so that
    all that reads a codebook with such scales reads this, once they are expanded.

    Parameters
    ----------
    codebook : str
        As of `CodebookCoding`.
    group_size : int
        As of `IntegerCoding`.
    """

    kind: ClassVar[str] = "double"
    codebook: str
    group_size: int

    def __post_init__(self) -> None:
        _ = self.expanded

    @property
    def expanded(self) -> CodebookCoding:
        """The coding of the same codes beside the scales themselves."""
        return CodebookCoding(self.codebook, self.group_size)

    @property
    def bits(self) -> int:
        """Bits per code: those of the codebook."""
        return codebooks.bits_of(self.codebook)

    @property
    def symmetric(self) -> bool:
        """True: no zero points are stored."""
        return True

    @property
    def levels(self) -> Tensor:
        """As of `CodebookCoding`."""
        return codebooks.LEVELS[self.codebook]

    @property
    def label(self) -> str:
        """Short name: `nf4 g64 double`."""
        return f"{self.expanded.label} double"


@dataclass(frozen=True)
class TableCoding:
    """Codes for the values of a table that each row has for itself: `tables[row, code]`, without scales.

    Parameters
    ----------
    bits : int
        Bits per code: 2, 3 or 4; a table holds `2**bits` values.
    table_dtype : str
        Of the values: "bfloat16" or "float16".
    """

    kind: ClassVar[str] = "table"
    levels: ClassVar[None] = None
    #: a row is one group
    group_size: ClassVar[int] = 0
    bits: int
    table_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        _one_of("bits", self.bits, TABLE_BITS)
        _one_of("table_dtype", self.table_dtype, TABLE_DTYPES)

    @property
    def symmetric(self) -> bool:
        """True: no zero points are stored."""
        return True

    @property
    def label(self) -> str:
        """Short name: `table3`, `table4 fp16`."""
        suffix = "" if self.table_dtype == "bfloat16" else f" {_SHORT[self.table_dtype]}"
        return f"table{self.bits}{suffix}"


@dataclass(frozen=True)
class BinaryCoding:
    """Signs, each before one of two magnitudes that a group of a row has for itself.

    The upper bit of a code is 1 where its value isn't negative, the lower bit says which magnitude it has:
    `(code & 2) - 1` times `tables[row, group, code & 1]`. So `2 + 32 / group_size` bits stand for a weight.

    Parameters
    ----------
    group_size : int
        As of `IntegerCoding`.
    table_dtype : str
        Of the magnitudes: "bfloat16" or "float16".
    """

    kind: ClassVar[str] = "binary"
    levels: ClassVar[None] = None
    bits: ClassVar[int] = 2
    group_size: int
    table_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        _one_of("group_size", self.group_size, GROUP_SIZES)
        _one_of("table_dtype", self.table_dtype, TABLE_DTYPES)

    @property
    def symmetric(self) -> bool:
        """True: no zero points are stored."""
        return True

    @property
    def label(self) -> str:
        """Short name: `binary g64`, `binary row`, `binary g64 fp16`."""
        return _grouped_label("binary", self.group_size, self.table_dtype)


@dataclass(frozen=True)
class FloatCoding:
    """Plain floating-point values.

    Parameters
    ----------
    dtype : str
        "bfloat16", "float16" or "float32".
    """

    kind: ClassVar[str] = "float"
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        _one_of("dtype", self.dtype, FLOAT_DTYPES)

    @property
    def bits(self) -> int:
        """Bits per value: 16 or 32."""
        return 8 * FLOAT_DTYPES[self.dtype].itemsize

    @property
    def label(self) -> str:
        """Short name: `bf16`, `fp16`, `fp32`."""
        return _SHORT[self.dtype]


@dataclass(frozen=True)
class EntropyCoding:
    """bfloat16 to the bit, its exponents in codes of variable length (`kernels/entropy.py`).

    Parameters
    ----------
    stream_bytes : int
        Of these codes. They follow from the weights alone, and are stated so that the bytes of a weight are
        known before its tensors are.
    """

    kind: ClassVar[str] = "entropy"
    #: of a value that is decoded
    bits: ClassVar[int] = 16
    stream_bytes: int

    def __post_init__(self) -> None:
        if type(self.stream_bytes) is not int or not 1 <= self.stream_bytes <= _MOST_BYTES:
            raise SettingsError(
                f"stream_bytes {self.stream_bytes!r}",
                f"a whole number from 1 to {_MOST_BYTES}",
                "state the bytes that the weights take",
            )

    @property
    def label(self) -> str:
        """Short name: `df11`."""
        return "df11"


#: codings of codes with scales of groups
GroupedCoding = IntegerCoding | CodebookCoding
#: codings of codes whose groups have a scale in 16 bits, by which inputs may be rounded
ScaledCoding = GroupedCoding | VectorCoding
#: codings of codes
CodesCoding = ScaledCoding | DoubleCoding | TableCoding | BinaryCoding
#: those of weights that are held by modules of tailorbird's own
PackedCoding = CodesCoding | EntropyCoding
Coding = PackedCoding | FloatCoding
_CODINGS = (
    IntegerCoding, CodebookCoding, VectorCoding, DoubleCoding, TableCoding, BinaryCoding, EntropyCoding,
    FloatCoding,
)  # fmt: skip
_KINDS: dict[str, type[Coding]] = {coding.kind: coding for coding in _CODINGS}


def coding_to_dict(coding: Coding) -> dict[str, Any]:
    """The coding as it stands in `config.json` and `plan.yaml`: `kind` and every field."""
    return {"kind": coding.kind, **dataclasses.asdict(coding)}


def coding_from_dict(data: Any) -> Coding:
    """Inverse of `coding_to_dict`.

    Raises
    ------
    CheckpointError
        For anything but a mapping with a known kind and exactly that kind's fields, with allowed values.
    """
    if not isinstance(data, dict):
        raise CheckpointError(
            f"coding {data!r}", "a mapping with the key `kind`", "write the coding as a mapping"
        )
    kind = data.get("kind")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise CheckpointError(
            f"coding of kind {kind!r}",
            "one of " + ", ".join(f"`{known}`" for known in _KINDS),
            "read it with a newer version of tailorbird, or correct the file",
        )
    fields = {field.name for field in dataclasses.fields(_KINDS[kind])}
    given = {key for key in data if key != "kind"}
    for key in sorted(given - fields, key=str):
        raise CheckpointError(
            f"unknown field {key!r} in a coding of kind `{kind}`",
            ", ".join(sorted(fields)),
            nearest(str(key), fields),
        )
    for key in sorted(fields - given):
        raise CheckpointError(
            f"a coding of kind `{kind}` without `{key}`",
            ", ".join(sorted(fields)),
            "add the missing field",
        )
    try:
        return _KINDS[kind](**{key: data[key] for key in fields})
    except SettingsError as error:
        raise CheckpointError(f"coding with {error.given}", error.expected, error.remedy) from error


@dataclass(frozen=True)
class LowRank:
    """What stands beside the base of a weight: a product `up @ down` of two thin matrices, added to it.

    Parameters
    ----------
    rank : int
        Columns of `up` and rows of `down`, from 1.
    dtype : str
        Of both: "bfloat16" or "float16".
    """

    rank: int
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1:
            raise SettingsError(f"rank {self.rank!r}", "a whole number from 1", "choose another rank")
        _one_of("dtype", self.dtype, FACTOR_DTYPES)

    def tensor_layout(
        self, out_features: int, in_features: int
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """As the function of this name: `up` and `down`."""
        dtype = FACTOR_DTYPES[self.dtype]
        return {"up": ((out_features, self.rank), dtype), "down": ((self.rank, in_features), dtype)}


def low_rank_from_dict(data: Any) -> LowRank:
    """A low-rank part as it stands in `config.json` and `plan.yaml`: a mapping of `rank` and `dtype`.

    Raises
    ------
    CheckpointError
        For anything else.
    """
    fields = {"rank", "dtype"}
    if not isinstance(data, dict) or data.keys() != fields:
        raise CheckpointError(
            f"`low_rank` {data!r}"[:500],
            "a mapping of exactly `rank` and `dtype`",
            "correct the file, or read it with a newer version of tailorbird",
        )
    try:
        return LowRank(**data)
    except SettingsError as error:
        raise CheckpointError(f"`low_rank` of {error.given}", error.expected, error.remedy) from error


def tensor_layout(
    coding: Coding,
    out_features: int,
    in_features: int,
    has_order: bool = False,
    low_rank: LowRank | None = None,
    sparse: Sparse | None = None,
    transform: Transform | None = None,
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name, shape and dtype of every stored tensor of a weight `[out_features, in_features]`.

    `has_order` says whether the columns are stored in another order than that of the inputs; `low_rank`
    and `sparse` which parts stand beside codes; `transform` what inputs go through before these.
    """
    if isinstance(coding, FloatCoding):
        return {"weight": ((out_features, in_features), FLOAT_DTYPES[coding.dtype])}
    if isinstance(coding, EntropyCoding):
        return {
            "lengths": ((entropy.EXPONENTS,), torch.uint8),
            "sizes": ((entropy.block_count(out_features, in_features),), torch.int32),
            "stream": ((coding.stream_bytes,), torch.uint8),
            "rest": ((out_features, in_features), torch.uint8),
        }
    groups, _ = group_layout(in_features, coding.group_size)
    count, bits = in_features, coding.bits
    if isinstance(coding, VectorCoding):
        count, bits = -(-in_features // coding.dimension), coding.code_bits
    layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "codes": ((out_features, packed_width(count, bits)), torch.uint8),
    }
    if isinstance(coding, TableCoding):
        layout["tables"] = ((out_features, 1 << coding.bits), TABLE_DTYPES[coding.table_dtype])
    elif isinstance(coding, BinaryCoding):
        layout["tables"] = ((out_features, groups, 2), TABLE_DTYPES[coding.table_dtype])
    elif isinstance(coding, DoubleCoding):
        layout["scales"] = ((out_features, groups), torch.uint8)
        layout["scale_sizes"] = ((dynamic_codes.blocks_of(out_features * groups),), torch.float32)
        layout["scale_mean"] = ((1,), torch.float32)
    else:
        layout["scales"] = ((out_features, groups), SCALE_DTYPES[coding.scale_dtype])
    if not coding.symmetric:
        layout["zeros"] = ((out_features, packed_width(groups, coding.bits)), torch.uint8)
    if has_order:
        layout["order"] = ((in_features,), torch.int32)
    for part in (transform, low_rank, sparse):
        if part is not None:
            layout |= part.tensor_layout(out_features, in_features)
    return layout


def unpacking(coding: CodesCoding) -> dict[str, Any]:
    """What those who read codes, such as `reference.dequantize`, are told of a coding."""
    bits = coding.code_bits if isinstance(coding, VectorCoding) else coding.bits
    told: dict[str, Any] = {"bits": bits, "group_size": coding.group_size}
    return told if coding.levels is None else {**told, "levels": coding.levels}


def coded_scales(scales: Tensor) -> dict[str, Tensor]:
    """Scales `[out_features, groups]`, finite, as those of a `DoubleCoding` are stored."""
    values = scales.float().flatten()
    mean = values.mean(0, keepdim=True)
    codes = torch.empty(len(values), dtype=torch.uint8, device=scales.device)
    sizes = torch.empty(dynamic_codes.blocks_of(len(values)), device=scales.device)
    dynamic_codes.encode(values - mean, codes, sizes, signed=True)
    return {"scales": codes.view(scales.shape), "scale_sizes": sizes, "scale_mean": mean}


def expanded_scales(tensors: Mapping[str, Tensor | None]) -> Tensor | None:
    """The scales `[out_features, groups]` among stored tensors, as what reads codes takes them."""
    scales, sizes, mean = (tensors.get(name) for name in ("scales", *SCALE_PARTS))
    if scales is None or sizes is None or mean is None:
        return scales
    values = dynamic_codes.decode(scales.flatten(), sizes, signed=True)
    return values.add_(mean).bfloat16().view(scales.shape)


def stored_bytes(
    coding: Coding,
    out_features: int,
    in_features: int,
    has_order: bool = False,
    low_rank: LowRank | None = None,
    sparse: Sparse | None = None,
    transform: Transform | None = None,
) -> int:
    """Exact bytes of the tensors of `tensor_layout`: those of codes and of what is beside them; or floats."""
    layout = tensor_layout(coding, out_features, in_features, has_order, low_rank, sparse, transform)
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in layout.values())


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight `[out_features, in_features]`, oriented as in `nn.Linear`, in its stored form.

    Parameters
    ----------
    coding : Coding
    out_features, in_features : int
    tensors : dict[str, Tensor]
        Integer coding: `codes` uint8 `[out, ceil(in * bits / 8)]`, `scales` `[out, groups]`, `zeros` uint8
        `[out, ceil(groups * bits / 8)]` unless symmetric, and where columns are permuted `order` int32
        `[in]` (stored column j is input `order[j]`). Codebook: the same without zeros. Table: `codes`,
        `order` likewise, and `tables` `[out, 2**bits]`. Binary: as table, with `tables` `[out, groups, 2]`.
        Vector: as codebook, with as many codes in a row as its values take, `ceil(in / dimension)`. Double:
        as codebook, but `scales` uint8, with `scale_sizes` float32 `[ceil(out * groups / 256)]` and
        `scale_mean` float32 `[1]`. Any of these may have, in place of an order, a transform
        (`formats/transform.py`), and a low-rank part, `up` `[out, rank]` and `down` `[rank, in]`, in 16 bits
        and of the inputs as they come, and a sparse part likewise (`formats/sparse.py`). Entropy coding:
        `lengths`, `sizes`, `stream` and `rest` (`kernels/entropy.py`). Float coding: `weight` `[out, in]`.

    Raises
    ------
    CheckpointError
        When a tensor is missing, unknown, of another shape or dtype, `order` is no permutation, the
        transform is none, or the sparse part names places that don't exist.
    """

    coding: Coding
    out_features: int
    in_features: int
    tensors: dict[str, Tensor]

    def __post_init__(self) -> None:
        layout = tensor_layout(
            self.coding, self.out_features, self.in_features, "order" in self.tensors, self.low_rank,
            self.sparse, self.transform,
        )  # fmt: skip
        for name in sorted(self.tensors.keys() ^ layout.keys()):
            state = "unknown tensor" if name in self.tensors else "no tensor"
            raise CheckpointError(
                f"{state} `{name}` in a packed weight of coding `{self.coding.label}`",
                "exactly " + ", ".join(layout),
                "check the file or the coding that is stated for it",
            )
        for name, (shape, dtype) in layout.items():
            tensor = self.tensors[name]
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise CheckpointError(
                    f"`{name}` {list(tensor.shape)} of {tensor.dtype}",
                    f"{list(shape)} of {dtype} for `{self.coding.label}` "
                    f"[{self.out_features}, {self.in_features}]",
                    "check the file or the coding that is stated for it",
                )
        if "order" in self.tensors:
            check_order(self.tensors["order"])
        turned = transform_tensors(self.tensors)
        if "order" in self.tensors and turned:
            raise CheckpointError(
                f"`order` and `{min(turned)}` of one weight", "one of them", "check the file or the layout"
            )
        check_transform(turned)
        if "values" in self.tensors:
            check_sparse(self.tensors, self.in_features)

    @classmethod
    def from_codes(
        cls,
        values: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        coding: GroupedCoding,
        order: Tensor | None = None,
    ) -> PackedWeight:
        """Pack codes that a rounding method has chosen.

        Parameters
        ----------
        values : Tensor[out_features, in_features], integer
            Codes in `[0, 2**bits)`, columns in the order in which they are stored.
        scales : Tensor[out_features, groups], floating point
            Already rounded to the coding's scale dtype (the tensor itself may be wider).
        zeros : Tensor[out_features, groups], integer, or None
            None exactly for a symmetric coding and for a codebook.
        coding : IntegerCoding or CodebookCoding
        order : Tensor[in_features], integer, or None
            Stored column `j` is input `order[j]`.

        Raises
        ------
        ValueError
            When codes or zeros don't fit the bits, scales change when stored, or `zeros` contradicts
            the coding.
        """
        if (zeros is None) != coding.symmetric:
            raise ValueError("zeros are given exactly when the coding isn't symmetric")
        stored = scales.to(SCALE_DTYPES[coding.scale_dtype])
        if not torch.equal(stored.float(), scales.float()):
            raise ValueError(f"scales must be finite and already rounded to {coding.scale_dtype}")
        tensors = {"codes": pack_codes(values, coding.bits), "scales": stored.contiguous()}
        if zeros is not None:
            tensors["zeros"] = pack_codes(zeros, coding.bits)
        if order is not None:
            tensors["order"] = order.to(torch.int32).contiguous()
        out_features, in_features = values.shape
        return cls(coding, out_features, in_features, tensors)

    @property
    def expanded(self) -> PackedWeight:
        """The same with scales that aren't codes; itself where they never were."""
        if not isinstance(self.coding, DoubleCoding):
            return self
        tensors = {name: tensor for name, tensor in self.tensors.items() if name not in SCALE_PARTS}
        scales = expanded_scales(self.tensors)
        assert scales is not None
        return dataclasses.replace(self, coding=self.coding.expanded, tensors={**tensors, "scales": scales})

    @classmethod
    def from_points(
        cls, values: Tensor, scales: Tensor, coding: VectorCoding, in_features: int
    ) -> PackedWeight:
        """Pack codes for the points of a vector codebook.

        Parameters
        ----------
        values : Tensor[out_features, ceil(in_features / dimension)], integer
            Codes in `[0, 2**code_bits)`.
        scales : Tensor[out_features, groups], floating point
            Already rounded to the coding's scale dtype (the tensor itself may be wider).
        coding : VectorCoding
        in_features : int

        Raises
        ------
        ValueError
            When codes don't fit the bits, or scales change when stored.
        """
        stored = scales.to(SCALE_DTYPES[coding.scale_dtype])
        if not torch.equal(stored.float(), scales.float()):
            raise ValueError(f"scales must be finite and already rounded to {coding.scale_dtype}")
        tensors = {"codes": pack_codes(values, coding.code_bits), "scales": stored.contiguous()}
        return cls(coding, len(values), in_features, tensors)

    @classmethod
    def from_tables(
        cls, values: Tensor, tables: Tensor, coding: TableCoding | BinaryCoding, order: Tensor | None = None
    ) -> PackedWeight:
        """Pack codes for the values of tables, or for the magnitudes of groups.

        Parameters
        ----------
        values : Tensor[out_features, in_features], integer
            Codes in `[0, 2**bits)`, columns in the order in which they are stored.
        tables : Tensor[out_features, 2**bits] or [out_features, groups, 2], floating point
            Already rounded to the coding's dtype (the tensor itself may be wider).
        coding : TableCoding or BinaryCoding
        order : Tensor[in_features], integer, or None
            Stored column `j` is input `order[j]`.

        Raises
        ------
        ValueError
            When codes don't fit the bits, or tables change when stored.
        """
        stored = tables.to(TABLE_DTYPES[coding.table_dtype])
        if not torch.equal(stored.float(), tables.float()):
            raise ValueError(f"tables must be finite and already rounded to {coding.table_dtype}")
        out_features, in_features = values.shape
        tensors = {"codes": pack_codes(values, coding.bits), "tables": stored.contiguous()}
        if order is not None:
            tensors["order"] = order.to(torch.int32).contiguous()
        return cls(coding, out_features, in_features, tensors)

    @classmethod
    def from_float(cls, weight: Tensor, coding: FloatCoding) -> PackedWeight:
        """A weight `[out_features, in_features]` rounded to a floating-point coding."""
        out_features, in_features = weight.shape
        stored = weight.detach().to(FLOAT_DTYPES[coding.dtype]).contiguous()
        return cls(coding, out_features, in_features, {"weight": stored})

    @classmethod
    def from_bfloat16(cls, weight: Tensor) -> PackedWeight:
        """A bfloat16 weight `[out_features, in_features]`, entropy-coded; all of its bits come back."""
        out_features, in_features = weight.shape
        tensors = entropy.encode(weight.detach().cpu())
        return cls(EntropyCoding(len(tensors["stream"])), out_features, in_features, tensors)

    def with_low_rank(self, up: Tensor, down: Tensor, dtype: str = "bfloat16") -> PackedWeight:
        """This base, with the product of `up` `[out, rank]` and `down` `[rank, in]` beside it, rounded."""
        factors = {"up": up, "down": down}
        rounded = {name: factor.to(FACTOR_DTYPES[dtype]).contiguous() for name, factor in factors.items()}
        return dataclasses.replace(self, tensors=self.tensors | rounded)

    def with_sparse(self, matrix: Tensor, mask: Tensor, dtype: str = "bfloat16") -> PackedWeight:
        """This weight, with the values of `matrix` where `mask` is true beside it, rounded.

        Both are `[out, in]`; with a mask that is true nowhere it's this very weight.
        """
        if not bool(mask.any()):
            return self
        return dataclasses.replace(self, tensors=self.tensors | sparse_rows(matrix, mask, dtype))

    def with_transform(self, signs: Tensor) -> PackedWeight:
        """The weight whose rotated inputs (`kernels/walsh.py`) these codes are for.

        `signs` `[in / block, block]` are 1 and -1; `W Tᵀ` was packed.
        """
        return dataclasses.replace(self, tensors=self.tensors | {"signs": signs.to(torch.int8).contiguous()})

    def with_matrices(self, left: Tensor, right: Tensor, dtype: str = "bfloat16") -> PackedWeight:
        """The weight whose mixed inputs (`kernels/kronecker.py`) these codes are for.

        `left` `[a, a]` and `right` `[b, b]`, with `a b` inputs, are rounded; `W T⁻¹` was packed, of the
        rounded ones.
        """
        matrices = {"left": left, "right": right}
        stored = {name: one.detach().to(MATRIX_DTYPES[dtype]).contiguous() for name, one in matrices.items()}
        return dataclasses.replace(self, tensors=self.tensors | stored)

    @property
    def behind_transform(self) -> PackedWeight:
        """The codes alone, as a weight of inputs that were transformed."""
        tensors = self.base.tensors
        kept = {name: tensor for name, tensor in tensors.items() if name not in TRANSFORM_PARTS}
        return dataclasses.replace(self, tensors=kept)

    @property
    def base(self) -> PackedWeight:
        """The same without what stands beside its codes."""
        kept = {name: tensor for name, tensor in self.tensors.items() if name not in BESIDE}
        return dataclasses.replace(self, tensors=kept)

    @property
    def parts_beside(self) -> dict[str, Tensor]:
        """The tensors of what stands beside the base."""
        return {name: self.tensors[name] for name in BESIDE if name in self.tensors}

    @property
    def named_part(self) -> str | None:
        """What there is besides codes, in words: `name_part`."""
        return name_part(self.low_rank, self.sparse, self.transform)

    def product(self) -> Tensor:
        """The low-rank part, float32 `[out_features, in_features]`: `up @ down`, or zeros."""
        if self.low_rank is None:
            return torch.zeros(self.out_features, self.in_features)
        return self.tensors["up"].float() @ self.tensors["down"].float()

    def beside(self) -> Tensor:
        """All that stands beside the base, float32 `[out_features, in_features]`."""
        product = self.product()
        return product if self.sparse is None else with_sparse(product, self.tensors)

    @property
    def sparse(self) -> Sparse | None:
        """The sparse part, as far as `values` tells; None where there is none."""
        return stated_sparse(self.tensors)

    @property
    def transform(self) -> Transform | None:
        """What inputs go through before the codes; None where they don't."""
        return stated_transform(self.tensors)

    @property
    def low_rank(self) -> LowRank | None:
        """The low-rank part, as far as `up` tells; None where there is none."""
        if "up" not in self.tensors:
            return None
        up = self.tensors["up"]
        dtype = next((name for name, known in FACTOR_DTYPES.items() if known == up.dtype), "bfloat16")
        return LowRank(max(1, up.shape[-1]) if up.dim() else 1, dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight `[out_features, in_features]` in the order of the inputs."""
        if isinstance(self.coding, FloatCoding):
            return self.tensors["weight"].to(dtype)
        if isinstance(self.coding, EntropyCoding):
            return entropy.decode(self.tensors).to(dtype)
        if not self.parts_beside:
            return self._dequantized_base(dtype)
        return with_parts(self._dequantized_base(), self.tensors).to(dtype)

    def _dequantized_base(self, dtype: torch.dtype = torch.float32) -> Tensor:
        assert isinstance(self.coding, CodesCoding)
        turned = transform_tensors(self.tensors)
        weight = dequantize(
            self.tensors["codes"],
            expanded_scales(self.tensors),
            self.tensors.get("zeros"),
            in_features=self.in_features,
            dtype=torch.float32 if turned else dtype,
            order=self.tensors.get("order"),
            tables=self.tensors.get("tables"),
            **unpacking(self.coding),
        )
        return weight_in_front(weight, turned).to(dtype)


def name_part(low_rank: LowRank | None, sparse: Sparse | None, transform: Transform | None) -> str | None:
    """Words for what a weight has besides codes, for messages; None where nothing is."""
    if transform is not None:
        return "input transform"
    if low_rank is not None:
        return "low-rank part"
    return None if sparse is None else "sparse part"


def with_parts(base: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """`base` plus those parts beside it that are among `tensors`, float32 `[out_features, in_features]`."""
    weight = base.float()
    if "up" in tensors:
        weight = torch.addmm(weight, tensors["up"].float(), tensors["down"].float())
    return with_sparse(weight, tensors) if "values" in tensors else weight


def check_order(order: Tensor) -> None:
    """Raise `CheckpointError` unless `order` holds every number from 0 to its length once."""
    if order.is_meta:
        return
    if not torch.equal(torch.sort(order.long()).values, torch.arange(len(order), device=order.device)):
        raise CheckpointError(
            "`order` names an input twice or one that doesn't exist",
            f"a permutation of 0 to {len(order) - 1}",
            "check the file; it may be damaged",
        )
