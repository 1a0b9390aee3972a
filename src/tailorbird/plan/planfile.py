"""plan.yaml: one choice per place, what it was predicted to cost and what it did cost.

The file is made by `fit` and `compress`, edited by hand, and read again by ``compress --plan``; only
``places`` with ``name`` and ``coding`` is required. It comes from strangers as often as from us, so it
is read by `yaml_file`, and every mistake is answered with the path of its field. Whether the named
places exist in a model is for the caller to say.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, JsonValue, Strict, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from tailorbird.errors import CheckpointError, SettingsError, nearest
from tailorbird.formats.packed import (
    BinaryCoding,
    CodebookCoding,
    Coding,
    FloatCoding,
    IntegerCoding,
    LowRank,
    TableCoding,
    VectorCoding,
    coding_from_dict,
    low_rank_from_dict,
    stored_bytes,
)
from tailorbird.formats.sparse import Sparse, sparse_from_dict
from tailorbird.formats.transform import Transform, transform_from_dict
from tailorbird.model.writing import write_text
from tailorbird.plan.yaml_file import FLOAT, read_yaml, refuse, shortened

SCHEMA = 1  # version of plan.yaml's layout

#: The largest whole number that a plan holds.
MOST_COUNT = 2**62
Count = Annotated[int, Field(ge=0, le=MOST_COUNT)]
Dimension = Annotated[int, Field(ge=1, le=2**31)]
Cost = Annotated[float, Field(allow_inf_nan=False)]
Name = Annotated[str, Field(min_length=1, max_length=1000)]


class _Section(BaseModel):
    """Strict in types, closed to unknown fields, never changed."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


def _check(read: Callable[[dict[str, Any]], object], entry: _Section) -> None:
    """Let `read` judge an entry, and give its objection in pydantic's form."""
    try:
        read(entry.model_dump())
    except CheckpointError as error:
        raise PydanticCustomError(
            "coding", "{given}", {"given": error.given, "expected": error.expected}
        ) from None


class _CodingEntry(_Section):
    @model_validator(mode="after")
    def _allowed(self) -> _CodingEntry:
        _check(coding_from_dict, self)
        return self

    def coding(self) -> Coding:
        """The coding that these fields state."""
        return coding_from_dict(self.model_dump())


class IntegerEntry(_CodingEntry):
    """`IntegerCoding` with defaults for what a hand-written plan leaves out."""

    kind: Literal["integer"]
    bits: int
    group_size: int
    symmetric: bool = IntegerCoding.symmetric
    scale_dtype: str = IntegerCoding.scale_dtype


class CodebookEntry(_CodingEntry):
    """`CodebookCoding`, likewise."""

    kind: Literal["codebook"]
    codebook: str
    group_size: int
    scale_dtype: str = CodebookCoding.scale_dtype


class VectorEntry(_CodingEntry):
    """`VectorCoding`, likewise."""

    kind: Literal["vector"]
    codebook: str
    group_size: int
    scale_dtype: str = VectorCoding.scale_dtype


class DoubleEntry(_CodingEntry):
    """`DoubleCoding`."""

    kind: Literal["double"]
    codebook: str
    group_size: int


class TableEntry(_CodingEntry):
    """`TableCoding`, likewise."""

    kind: Literal["table"]
    bits: int
    table_dtype: str = TableCoding.table_dtype


class BinaryEntry(_CodingEntry):
    """`BinaryCoding`, likewise."""

    kind: Literal["binary"]
    group_size: int
    table_dtype: str = BinaryCoding.table_dtype


class EntropyEntry(_CodingEntry):
    """`EntropyCoding`."""

    kind: Literal["entropy"]
    stream_bytes: int


class FloatEntry(_CodingEntry):
    """`FloatCoding`."""

    kind: Literal["float"]
    dtype: str = FloatCoding.dtype


class LowRankEntry(_Section):
    """`LowRank`."""

    rank: int
    dtype: str = LowRank.dtype

    @model_validator(mode="after")
    def _allowed(self) -> LowRankEntry:
        _check(low_rank_from_dict, self)
        return self

    def low_rank(self) -> LowRank:
        """What these fields state."""
        return LowRank(self.rank, self.dtype)


class SparseEntry(_Section):
    """`Sparse`."""

    nonzeros: int
    dtype: str = Sparse.dtype

    @model_validator(mode="after")
    def _allowed(self) -> SparseEntry:
        _check(sparse_from_dict, self)
        return self

    def sparse(self) -> Sparse:
        """What these fields state."""
        return Sparse(self.nonzeros, self.dtype)


class TransformEntry(_Section):
    """`Transform`."""

    block: int
    matrices: Literal["bfloat16", "float16", "float32"] | None = None

    @model_validator(mode="after")
    def _allowed(self) -> TransformEntry:
        _check(transform_from_dict, self)
        return self

    def transform(self) -> Transform:
        """What these fields state."""
        return Transform(self.block, self.matrices)


class Costs(_Section):
    """What a choice costs: `error` relative to the place's own output, `kl` in nats per token.

    `damping` stands where error feedback took more of it than its method states.
    """

    error: Cost | None = None
    kl: Cost | None = None
    damping: Cost | None = None


class Place(_Section):
    """The choice at one place.

    Attributes
    ----------
    name : str
        Module path of the linear or the embedding.
    coding : IntegerEntry, CodebookEntry, or any other entry of a kind of coding
    role, block : str, int
        As in the anatomy.
    shape : (int, int)
        ``(out_features, in_features)``.
    bytes : int
        Of the stored tensors. Counted anew from shape and coding; where that shows that the coding was
        edited, what was predicted and measured for the former one is dropped.
    low_rank : LowRankEntry or None
        What a correction puts beside the base.
    sparse : SparseEntry or None
        What the linear method does.
    transform : TransformEntry or None
        What inputs go through before the codes of the linear method.
    activation : {"int8", "int8-static", "fp8", "int4", None}
        ``int8``: the inputs may be rounded to bytes where that is faster. The others are always rounded to,
        in products of floats.
    predicted, measured : Costs
    """

    name: Name
    role: str | None = None
    block: Count | None = None
    shape: Annotated[tuple[Dimension, Dimension], Strict(False)] | None = None
    coding: Annotated[
        IntegerEntry
        | CodebookEntry
        | VectorEntry
        | DoubleEntry
        | TableEntry
        | BinaryEntry
        | EntropyEntry
        | FloatEntry,
        Field(discriminator="kind"),
    ]
    low_rank: LowRankEntry | None = None
    sparse: SparseEntry | None = None
    transform: TransformEntry | None = None
    bytes: Count | None = None
    activation: Literal["int8", "int8-static", "fp8", "int4"] | None = None
    predicted: Costs | None = None
    measured: Costs | None = None

    @model_validator(mode="after")
    def _recount(self) -> Place:
        if self.shape is None:
            return self
        out_features, in_features = self.shape
        coding = self.coding.coding()
        low_rank = None if self.low_rank is None else self.low_rank.low_rank()
        sparse = None if self.sparse is None else self.sparse.sparse()
        transform = None if self.transform is None else self.transform.transform()
        plain, ordered = (
            stored_bytes(coding, out_features, in_features, has_order, low_rank, sparse, transform)
            for has_order in (False, True)
        )
        if self.bytes not in (plain, ordered):
            if self.bytes is not None:
                object.__setattr__(self, "predicted", None)
                object.__setattr__(self, "measured", None)
            object.__setattr__(self, "bytes", plain)
        return self


class Source(_Section):
    """What was compressed."""

    model: str | None = None
    fingerprint: str | None = None
    content_hash: str | None = None
    architecture: str | None = None
    parameters: Count | None = None
    licence: str | None = None


class BudgetEntry(_Section):
    """The budget as given and in bytes."""

    text: str | None = None
    total_bytes: Count | None = None
    kv_bytes: Count | None = None
    context: Count | None = None
    concurrency: Count | None = None
    step_seconds: Cost | None = None
    speed_text: str | None = None
    max_kl: Cost | None = None


class Text(_Section):
    """Calibration or held-out text: where it came from and which windows of it were used."""

    source: str | None = None
    fingerprint: str | None = None
    tokens: Count | None = None
    sequences: Count | None = None
    length: Count | None = None
    documents: Count | None = None
    licence: str | None = None


class Method(_Section):
    """The linear method by name; its settings are further fields, which the method checks."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, JsonValue] = Field(init=False)

    name: Name


class Fold(_Section):
    """Scales that were moved from a norm, or from the rows of a linear, into linears that read its output.

    Exactly one of `norm` and `source` is given.
    """

    norm: Name | None = None
    source: Name | None = None
    linears: list[Name]
    scales_file: str | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> Fold:
        if (self.norm is None) == (self.source is None):
            raise PydanticCustomError("fold_origin", "either `norm` or `source`, the linear")
        return self


class Plan(_Section):
    """The whole of plan.yaml; the attributes are its fields, `schema_version` being ``schema``."""

    schema_version: int = Field(default=SCHEMA, alias="schema", ge=SCHEMA, le=SCHEMA)
    tailorbird: str | None = None
    source: Source | None = None
    budget: BudgetEntry | None = None
    method: Method | None = None
    allocator: Name | None = None
    target: Literal["gguf", "compressed-tensors"] | None = None
    calibration: Text | None = None
    evaluation: Text | None = None
    machine: dict[str, JsonValue] | None = None
    versions: dict[str, str] | None = None
    seed: Count | None = None
    folds: list[Fold] | None = None
    remarks: list[str] | None = None
    result: dict[str, JsonValue] | None = None
    places: list[Place] = Field(min_length=1)

    @model_validator(mode="after")
    def _no_place_twice(self) -> Plan:
        first: dict[str, int] = {}
        for index, place in enumerate(self.places):
            earlier = first.setdefault(place.name, index)
            if earlier != index:
                raise PydanticCustomError(
                    "duplicate_place",
                    "`{name}` at places[{earlier}] and again at places[{index}]",
                    {"name": place.name, "earlier": earlier, "index": index},
                )
        return self

    def codings(self) -> dict[str, Coding]:
        """The coding of each place by its name."""
        return {place.name: place.coding.coding() for place in self.places}


def load_plan(path: Path) -> Plan:
    """Read a plan, as written by `save_plan` or by hand.

    Raises
    ------
    SettingsError
        Whatever is wrong with the file, with the path of the field.
    """
    data = read_yaml(Path(path), "plan")
    if not isinstance(data, dict):
        raise _refuse(
            path, f"holds {_kind(data)}", "a mapping with `places`", "see docs/formats.md for an example"
        )
    schema = data.get("schema", SCHEMA)
    if type(schema) is int and schema != SCHEMA:
        raise _refuse(
            path, f"schema: {schema}", f"{SCHEMA}", "read it with the version of tailorbird that wrote it"
        )
    try:
        return Plan.model_validate(data)
    except ValidationError as invalid:
        errors = invalid.errors(include_url=False)
        errors.sort(key=lambda error: error["type"] != "extra_forbidden")  # a misspelt field is also missing
        raise _explain(path, data, errors[0], len(errors) - 1) from None


def save_plan(plan: Plan, path: Path) -> None:
    """Write a plan: the same plan gives the same bytes, and the file appears whole or not at all.

    Raises
    ------
    ResourceError
        Where the disk or the directory refuses.
    """
    data = plan.model_dump(by_alias=True, exclude_none=True)
    for place in data["places"]:
        for key in ("shape", "coding", "low_rank", "sparse", "transform", "predicted", "measured"):
            if key in place:
                place[key] = _Line(place[key]) if isinstance(place[key], dict) else _Row(place[key])
    for fold in data.get("folds", ()):
        fold["linears"] = _Row(fold["linears"])
    body = yaml.dump(
        data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=1 << 30
    )
    write_text(Path(path), _HEADER + body)


_HEADER = """\
# One choice per place. Edit a coding and run: tailorbird compress MODEL --plan THIS_FILE -o OUT
#   coding: {kind: integer, bits: 2 3 4 5 6 or 8, group_size: 32 64 128 ... or 0 for one group per row,
#            symmetric: true or false, scale_dtype: bfloat16 or float16}
#   coding: {kind: codebook, codebook: nf4 fp4 gauss2 gauss3 or gauss4, group_size and scale_dtype likewise}
#   coding: {kind: vector, codebook: gauss2x2 gauss2x4 gauss3x2 or gauss4x2, group_size and scale_dtype
#            likewise}, for higgs and rtn
#   coding: {kind: double, codebook: nf4, group_size likewise}, scales in 8 bits, for rtn
#   coding: {kind: table, bits: 2 3 or 4, table_dtype: bfloat16 or float16}, for rtn, leanquant, ganq, bcq
#   coding: {kind: binary, group_size and table_dtype likewise}, for rtn and billm
#   coding: {kind: entropy, stream_bytes: 5423}, for df11; the bytes follow from the source's weights
#   coding: {kind: float, dtype: bfloat16, float16 or float32}
#   activation: int8, where inputs may be rounded to bytes; fp8, int4 or int8-static (bytes with one scale for
#               the linear, which is found anew), where they are, in products of floats
#   low_rank: {rank: 8, dtype: bfloat16 or float16}, where the method names a correction
#   sparse: {nonzeros: 655, dtype: bfloat16}, where the method keeps outliers; follows from its settings
#   transform: {block: 1024}, where the method rotates inputs; likewise;
#              {block: 16, matrices: bfloat16}, where a block method mixes them
# A place that is not listed stays as the source stores it. `bytes` is counted anew from shape and coding;
# `predicted` and `measured` (error relative to the place's output, kl in nats per token) are a record.
"""


class _Line(dict[str, Any]):
    """A mapping that is written on one line."""


class _Row(list[Any]):
    """A list that is written on one line."""


class _Dumper(yaml.SafeDumper):
    """Writes strings that the reader would take for numbers in quotes, and no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(
    _Line, lambda dumper, data: dumper.represent_mapping("tag:yaml.org,2002:map", data, flow_style=True)
)
_Dumper.add_representer(
    _Row, lambda dumper, data: dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)
)
_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"'
    ),  # YAML folds some line breaks that are not escaped
)
_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(f"(?:{FLOAT.pattern})$"), list("-+.0123456789")
)


_SECTIONS: dict[str, type[BaseModel]] = {
    "": Plan, "source": Source, "budget": BudgetEntry, "calibration": Text, "evaluation": Text, "folds": Fold,
    "places": Place, "predicted": Costs, "measured": Costs, "integer": IntegerEntry,
    "codebook": CodebookEntry, "vector": VectorEntry, "double": DoubleEntry, "table": TableEntry,
    "binary": BinaryEntry, "entropy": EntropyEntry, "float": FloatEntry,
    "low_rank": LowRankEntry, "sparse": SparseEntry, "transform": TransformEntry,
}  # fmt: skip


def _explain(path: Path, data: dict[str, Any], error: ErrorDetails, others: int) -> SettingsError:
    """What pydantic found, in words and with the path of the field."""
    parts = list(error["loc"])
    section = next((part for part in reversed(parts[:-1]) if isinstance(part, str)), "")
    if "coding" in parts:  # the kind stands in pydantic's path but not in the file
        parts = [part for i, part in enumerate(parts) if not (i and parts[i - 1] == "coding")]
    field = (
        "`"
        + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).lstrip(".")
        + "`"
    )
    if len(parts) > 2 and parts[0] == "places" and isinstance(parts[1], int):
        place = data["places"][parts[1]]
        if isinstance(place, dict) and isinstance(place.get("name"), str):
            field += f" of `{place['name'][:200]}`"
    more = f" (and {others} more)" if others else ""
    match error["type"]:
        case "extra_forbidden":
            known = [info.alias or name for name, info in _SECTIONS[section].model_fields.items()]
            return _refuse(
                path,
                f"has the unknown field {field}{more}",
                "a field of a plan",
                nearest(str(parts[-1]), known),
            )
        case "missing":
            return _refuse(path, f"lacks {field}{more}", "a plan with that field", "add it")
        case "duplicate_place":
            return _refuse(path, f"names {error['msg']}{more}", "each place once", "remove one of them")
        case "coding":
            allowed = error["ctx"]["expected"]
            return _refuse(path, f"states at {field} {error['msg']}{more}", allowed, "correct that coding")
        case "union_tag_invalid":
            kind = shortened(error["ctx"]["tag"])
            return _refuse(
                path,
                f"states at {field} the unknown kind {kind}{more}",
                "`integer`, `codebook`, `vector`, `double`, `table`, `binary`, `entropy` or `float`",
                "read it with a newer version of tailorbird, or correct the kind",
            )
        case "union_tag_not_found":
            return _refuse(
                path,
                f"lacks `kind` at {field}{more}",
                "`kind: integer`, `kind: codebook`, `kind: vector`, `kind: double`, `kind: table`, "
                "`kind: binary`, `kind: entropy` or `kind: float`",
                "add it",
            )
    message = error["msg"][0].lower() + error["msg"][1:]
    return _refuse(
        path, f"states at {field} {shortened(error['input'])}{more}", message, "correct that field"
    )


def _refuse(path: Path, given: str, expected: str, remedy: str) -> SettingsError:
    return refuse("plan", path, given, expected, remedy)


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
