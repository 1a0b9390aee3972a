"""What a compressed checkpoint's `config.json` says about its modules: shapes, codings, absent parts.

This is the value of the key `quantization_config`. Reading it is strict: an unknown key, kind or
version is refused by name, never ignored, because ignoring it would run another model than the one
that was stored. What is built from it stands in `skeleton.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from tailorbird.errors import CheckpointError, nearest
from tailorbird.formats.packed import (
    SCHEMA_VERSION,
    Coding,
    DoubleCoding,
    EntropyCoding,
    FloatCoding,
    LowRank,
    PackedCoding,
    ScaledCoding,
    coding_from_dict,
    coding_to_dict,
    low_rank_from_dict,
    tensor_layout,
)
from tailorbird.formats.sparse import Sparse, sparse_from_dict
from tailorbird.formats.transform import Transform, transform_from_dict, transform_to_dict
from tailorbird.kernels.reference import INT8, INT8_STATIC, ROUNDED_TO, SIMULATED

#: value of `quant_method`, by which transformers knows whose checkpoint it is
METHOD = "tailorbird"
#: keys of a module that are there only where it has the part
_PARTS = ("activation", "input_scale", "low_rank", "sparse", "transform")
#: no model has a dimension, head count or block index beyond this
_LARGEST = 1 << 31
_REMEDY = "compress the model again, or update tailorbird"


@dataclass(frozen=True)
class ModuleLayout:
    """One linear or embedding.

    Parameters
    ----------
    out_features, in_features : int
        Shape of the weight as in `nn.Linear`; of an embedding: rows and width.
    bias : bool
    coding : Coding
    order : bool
        Whether the columns are stored in another order than that of the inputs.
    rounds : bool
        Whether inputs may be rounded to bytes where a fast path does so; of a tied pair those of the head.
    low_rank : LowRank or None
    sparse : Sparse or None
        What stands beside the base; of linears only.
    simulated : {"fp8", "int4", "int8-static", None}
        What inputs are always rounded to.
    transform : Transform or None
        What inputs go through before the base; likewise.
    input_scale : float or None
        The one scale of inputs rounded to ``int8-static``.
    """

    out_features: int
    in_features: int
    coding: Coding
    bias: bool = False
    order: bool = False
    rounds: bool = False
    low_rank: LowRank | None = None
    sparse: Sparse | None = None
    simulated: str | None = None
    transform: Transform | None = None
    input_scale: float | None = None

    def __post_init__(self) -> None:
        values = "float values" if isinstance(self.coding, FloatCoding) else "entropy-coded values"
        floats = isinstance(self.coding, FloatCoding | EntropyCoding)
        if self.parts and floats:
            raise _wrong(f"`{self.parts[0]}` beside {values}", "it only where values are codes")
        if self.sparse is not None and self.sparse.nonzeros > self.out_features * self.in_features:
            raise _wrong(
                f"`sparse` of {self.sparse.nonzeros} nonzeros beside {self.out_features} x "
                f"{self.in_features} weights",
                "at most as many as there are weights",
            )
        if self.activation is not None and floats:
            raise _wrong(f"`activation` {self.activation} with {values}", "it only where values are codes")
        if self.activation is not None and not isinstance(self.coding, ScaledCoding):
            held = "codes for scales" if isinstance(self.coding, DoubleCoding) else "tables"
            raise _wrong(
                f"`activation` {self.activation} with {held}", "it only where a group has a scale of its own"
            )
        if self.activation == INT8_STATIC and self.input_scale is None:
            raise _wrong(f"`activation` {INT8_STATIC} without `input_scale`", "the scale of its inputs")
        if self.activation != INT8_STATIC and self.input_scale is not None:
            raise _wrong(
                f"`input_scale` where `activation` is {self.activation}", f"it only beside {INT8_STATIC}"
            )
        if self.transform is not None and self.in_features % self.transform.block:
            raise _wrong(
                f"`transform` of blocks of {self.transform.block} for {self.in_features} inputs",
                "blocks that divide the inputs",
            )
        if self.transform is not None and self.order:
            raise _wrong("`transform` where `order` is true", "one of them")
        if self.order and floats:
            raise _wrong(f"`order` true with {values}", "order only where values are codes")

    @property
    def activation(self) -> str | None:
        """What inputs are rounded to, `rounds` and `simulated` in one."""
        return INT8 if self.rounds else self.simulated

    @property
    def parts(self) -> list[str]:
        """Keys of what there is besides codes."""
        return [key for key in ("low_rank", "sparse", "transform") if getattr(self, key) is not None]

    def tensor_names(self, module: str) -> tuple[str, ...]:
        """Names under which the weight of `module` is stored, the bias not among them."""
        parts = tensor_layout(
            self.coding, self.out_features, self.in_features, self.order, self.low_rank, self.sparse,
            self.transform,
        )  # fmt: skip
        return tuple(f"{module}.{part}" for part in parts)


@dataclass(frozen=True)
class BlockLayout:
    """Where a block differs from `config.json`.

    Parameters
    ----------
    num_attention_heads, num_key_value_heads : int or None
        None: as in `config.json`.
    attention, mlp : bool
        False: the sublayer is absent, that is, adds nothing to the residual and stores no tensors. Its
        norms stay.
    """

    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    attention: bool = True
    mlp: bool = True


@dataclass(frozen=True)
class ModelLayout:
    """All that differs from a dense checkpoint.

    Parameters
    ----------
    modules : mapping of module path to ModuleLayout
        Every compressed module, and float modules whose shape isn't that of `config.json`.
    embedding, head : str or None
        Paths of the token embedding and of the output head.
    tied : bool
        The head uses the embedding's values, which are stored once, under the embedding's name.
    blocks : mapping of block index to BlockLayout
        Blocks that differ.
    """

    modules: Mapping[str, ModuleLayout]
    embedding: str | None = None
    head: str | None = None
    tied: bool = False
    blocks: Mapping[int, BlockLayout] = field(default_factory=dict)

    def __post_init__(self) -> None:
        embedding = None if self.embedding is None else self.modules.get(self.embedding)
        if embedding is not None and embedding.parts:
            raise _wrong(f"`{embedding.parts[0]}` of the embedding `{self.embedding}`", "it only of linears")
        if self.tied and (self.embedding is None or self.head is None):
            raise _wrong("`tied` without `embedding` and `head`", "the paths of both modules")
        if self.tied and self.head in self.modules:
            raise _wrong(
                f"tied head `{self.head}` among the modules", "its values under the embedding's name only"
            )

    @property
    def shares_codes(self) -> bool:
        """Whether embedding and head are one compressed place."""
        if not self.tied or self.embedding is None or self.embedding not in self.modules:
            return False
        return isinstance(self.modules[self.embedding].coding, PackedCoding)

    def decoded(self) -> ModelLayout:
        """The layout once all entropy-coded weights are plain ones."""
        modules = {n: m for n, m in self.modules.items() if not isinstance(m.coding, EntropyCoding)}
        return replace(self, modules=modules)

    def to_dict(self) -> dict[str, Any]:
        """The value of `quantization_config`, in JSON types."""
        data: dict[str, Any] = {
            "quant_method": METHOD,
            "schema": SCHEMA_VERSION,
            "modules": {
                name: {
                    "out": module.out_features,
                    "in": module.in_features,
                    "bias": module.bias,
                    "coding": coding_to_dict(module.coding),
                    "order": module.order,
                    **({} if module.activation is None else {"activation": module.activation}),
                    **({} if module.input_scale is None else {"input_scale": module.input_scale}),
                    **{part: _part_to_dict(getattr(module, part)) for part in module.parts},
                }
                for name, module in self.modules.items()
            },
            "tied": self.tied,
        }
        if self.embedding is not None:
            data["embedding"] = self.embedding
        if self.head is not None:
            data["head"] = self.head
        if self.blocks:
            data["blocks"] = {str(index): _block_to_dict(block) for index, block in self.blocks.items()}
        return data

    @classmethod
    def from_dict(cls, data: Any) -> ModelLayout:
        """Inverse of `to_dict`.

        Raises
        ------
        CheckpointError
            For another method or schema version, an unknown or missing key, a value of another type
            or out of range; names it.
        """
        where = "quantization_config"
        data = _mapping(data, where)
        if data.get("quant_method") != METHOD:
            raise _wrong(f"{where} of method {data.get('quant_method')!r}", f"`{METHOD}`")
        schema = data.get("schema")
        if schema != SCHEMA_VERSION or isinstance(schema, bool):
            raise _wrong(
                f"{where} of schema {schema!r}", f"schema {SCHEMA_VERSION}, the one this version reads"
            )
        optional = {"embedding", "head", "tied", "blocks"}
        _check_keys(data, where, required={"quant_method", "schema", "modules"}, optional=optional)
        modules = {
            _path(name, f"a key of {where}.modules"): _module(value, f"module `{name}`")
            for name, value in _mapping(data["modules"], f"{where}.modules").items()
        }
        blocks: dict[int, BlockLayout] = {}
        for key, value in _mapping(data.get("blocks", {}), f"{where}.blocks").items():
            if not (isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 10):
                raise _wrong(f"block {key!r}", "an index written as a decimal number")
            if int(key) in blocks:
                raise _wrong(f"block {key!r} twice", "each block once")
            blocks[int(key)] = _block(value, f"block {key}")
        embedding, head = (
            None if data.get(key) is None else _path(data[key], f"{where}.{key}")
            for key in ("embedding", "head")
        )
        return cls(modules, embedding, head, _flag(data.get("tied", False), f"{where}.tied"), blocks)


def _wrong(given: str, expected: str) -> CheckpointError:
    return CheckpointError(given[:500], expected, _REMEDY)


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(f"{where} is {value!r}", "a mapping")
    return value


def _check_keys(data: Mapping[str, Any], where: str, required: set[str], optional: set[str]) -> None:
    known = required | optional
    for key in data:
        if key not in known:
            raise CheckpointError(
                f"unknown key {str(key)[:100]!r} in {where}",
                "only " + ", ".join(sorted(known)),
                nearest(str(key)[:100], known) + f" Else {_REMEDY}",
            )
    for key in sorted(required - data.keys()):
        raise _wrong(f"{where} without `{key}`", ", ".join(sorted(required)))


def _path(value: Any, where: str) -> str:
    if not (
        isinstance(value, str)
        and value.isascii()
        and all(part.isidentifier() or part.isdigit() for part in value.split("."))
    ):
        raise _wrong(f"{where} is {value!r}", "a module path such as `model.layers.0.mlp.up_proj`")
    return value


def _flag(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise _wrong(f"{where} is {value!r}", "true or false")
    return value


def _size(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < _LARGEST:
        raise _wrong(f"{where} is {value!r}", "a whole number from 1")
    return value


def _scale(value: Any, where: str) -> float:
    single = torch.finfo(torch.float32)
    number = isinstance(value, float | int) and not isinstance(value, bool)
    if not number or not single.tiny <= value <= single.max:
        raise _wrong(f"{where} is {value!r}", "a finite number above 0 that float32 holds")
    return float(value)


def _module(value: Any, where: str) -> ModuleLayout:
    data = _mapping(value, where)
    _check_keys(data, where, required={"out", "in", "coding"}, optional={"bias", "order", *_PARTS})
    activation = data.get("activation")
    if "activation" in data and not (isinstance(activation, str) and activation in ROUNDED_TO):
        known = ", ".join(f"`{name}`" for name in ROUNDED_TO)
        raise _wrong(f"`activation` of {where} is {activation!r}", f"one of {known}, or no such key")
    try:
        coding = coding_from_dict(data["coding"])
        low_rank = low_rank_from_dict(data["low_rank"]) if "low_rank" in data else None
        sparse = sparse_from_dict(data["sparse"]) if "sparse" in data else None
        transform = transform_from_dict(data["transform"]) if "transform" in data else None
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error.given}", error.expected, error.remedy) from None
    return ModuleLayout(
        _size(data["out"], f"`out` of {where}"),
        _size(data["in"], f"`in` of {where}"),
        coding,
        _flag(data.get("bias", False), f"`bias` of {where}"),
        _flag(data.get("order", False), f"`order` of {where}"),
        activation == INT8,
        low_rank,
        sparse,
        activation if activation in SIMULATED else None,
        transform,
        _scale(data["input_scale"], f"`input_scale` of {where}") if "input_scale" in data else None,
    )


def _block(value: Any, where: str) -> BlockLayout:
    data = _mapping(value, where)
    sizes, sublayers = ("num_attention_heads", "num_key_value_heads"), ("attention", "mlp")
    _check_keys(data, where, required=set(), optional={*sizes, *sublayers})
    heads = {key: _size(data[key], f"`{key}` of {where}") for key in sizes if key in data}
    for key in sublayers:
        if key in data and data[key] != "absent":
            raise _wrong(f"`{key}` of {where} is {data[key]!r}", "`absent`, or no such key")
    return BlockLayout(**heads, attention="attention" not in data, mlp="mlp" not in data)


def _part_to_dict(part: LowRank | Sparse | Transform) -> dict[str, Any]:
    return transform_to_dict(part) if isinstance(part, Transform) else asdict(part)


def _block_to_dict(block: BlockLayout) -> dict[str, Any]:
    data: dict[str, Any] = {}
    if block.num_attention_heads is not None:
        data["num_attention_heads"] = block.num_attention_heads
    if block.num_key_value_heads is not None:
        data["num_key_value_heads"] = block.num_key_value_heads
    for sublayer in ("attention", "mlp"):
        if not getattr(block, sublayer):
            data[sublayer] = "absent"
    return data
