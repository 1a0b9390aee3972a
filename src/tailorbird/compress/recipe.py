"""A recipe: which method compresses, and for `compress` also which coding every linear takes.

Written as one line, ``gptq:bits=4,group=64``, ``gptq:codebook=nf4,group=64``, ``ganq:table=3``, ``df11``, or
with a rotation and a fold before the method and what learns after it,
``hadamard+awq+gptq+eora+signround+distil:bits=4,group=64,distil.steps=500``, with the inputs of all linears
rounded to bytes, ``smoothing+gptq:bits=8,group=64,activation=int8``, or as a YAML file:

    method: gptq
    settings: {act_order: true}
    coding: {bits: 4, group_size: 64, symmetric: false}
    embedding: {bits: 8, group_size: 64}     # and an untied head; left out, they stay as they are
    correction: eora                         # left out, nothing stands beside what was rounded
    correction_settings: {rank: 8}
    activation: int8                         # or int8-static, fp8, int4; left out: where it costs little
    rotation: hadamard                       # left out, nothing is rotated
    rotation_settings: {seed: 1}
    fold: awq                                # left out, nothing is folded
    fold_settings: {grid: 20}
    block: signround                         # left out, blocks aren't learned
    block_settings: {steps: 200}
    whole: distil                            # left out, the model isn't learned as a whole
    whole_settings: {steps: 250}
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tailorbird.compress.blocks import BLOCK_METHODS
from tailorbird.compress.blocks.flatquant import FlatQuant
from tailorbird.compress.blocks.method import BlockMethod
from tailorbird.compress.whole import WHOLE_METHODS
from tailorbird.compress.whole.method import ModelMethod
from tailorbird.errors import CheckpointError, SettingsError, nearest
from tailorbird.formats.codebooks import LEVELS, VECTOR_UNITS
from tailorbird.formats.packed import (
    BinaryCoding,
    CodebookCoding,
    Coding,
    DoubleCoding,
    FloatCoding,
    IntegerCoding,
    ScaledCoding,
    TableCoding,
    VectorCoding,
    coding_from_dict,
    coding_to_dict,
)
from tailorbird.kernels.reference import INT8, ROUNDED_TO
from tailorbird.linear import FOLDS, LINEAR_METHODS, FoldMethod, LinearMethod
from tailorbird.linear.correct import CORRECTIONS, Correction
from tailorbird.linear.lossless.df11 import Df11
from tailorbird.linear.quantize.double_rounding import DoubleRounding, check_nestable
from tailorbird.linear.quantize.gptq import Gptq
from tailorbird.linear.quantize.higgs import Higgs, normal_grid
from tailorbird.linear.quantize.rtn import Rtn
from tailorbird.linear.rotate import ROTATIONS
from tailorbird.linear.rotate.hadamard import Hadamard
from tailorbird.linear.settings import check_codes
from tailorbird.plan.yaml_file import plain_value, read_yaml

DEFAULT_METHOD = "gptq"
FIELDS = (
    "method", "settings", "coding", "embedding", "activation", "rotation", "rotation_settings", "fold",
    "fold_settings", "correction", "correction_settings", "block", "block_settings", "whole",
    "whole_settings",
)  # fmt: skip
#: What a recipe joins, in this order: a method rounds, all others may be left out.
STAGES: dict[str, dict[str, Any]] = {
    "rotation": ROTATIONS, "fold": FOLDS, "method": LINEAR_METHODS, "correction": CORRECTIONS,
    "block": BLOCK_METHODS, "whole": WHOLE_METHODS,
}  # fmt: skip
ORDER = (
    "a rotation, a fold, a linear method, a correction, a block method, a model method, in that order; all "
    "may be left out but the linear method"
)
EXAMPLE_CHAIN = "gptq+signround+distil"
#: stands between them
JOINT = "+"
SHORT = {"group": "group_size"}
#: what a line may state of the coding
CODING = (
    "bits", "codebook", "double", "table", "binary", "symmetric", "scale_dtype", "table_dtype", "group_size",
)  # fmt: skip
EXAMPLE = "write for example gptq:bits=4,group=64"

_Kind = TypeVar("_Kind", bound=LinearMethod | Hadamard | FoldMethod | Correction | BlockMethod)


@dataclass(frozen=True)
class Recipe:
    """A method with its settings, and the codings that `compress` gives to all linears.

    Attributes
    ----------
    name : str
        Name of the method, with those of the others in their order: ``gptq``, ``awq+gptq+signround``.
    method : LinearMethod
    coding : Coding or None
        For every linear inside the blocks; None where a plan decides.
    embedding : Coding or None
        For the embedding and an untied head; None leaves them.
    activation : {"int8", "int8-static", "fp8", "int4", None}
        To what linears inside the blocks round their inputs; None where it isn't stated.
    rotation : Hadamard or None
        Turns the channels of the source before all else.
    fold : FoldMethod or None
        Moves scales before the linears are rounded.
    correction : Correction or None
        Puts a low-rank part beside the linears that were rounded.
    block : BlockMethod or None
        Learns the linears of a block together, once they are rounded.
    whole : ModelMethod or None
        Learns all of them together, after all blocks.
    """

    name: str
    method: LinearMethod
    coding: Coding | None = None
    embedding: Coding | None = None
    activation: str | None = None
    rotation: Hadamard | None = None
    fold: FoldMethod | None = None
    correction: Correction | None = None
    block: BlockMethod | None = None
    whole: ModelMethod | None = None

    @property
    def needs(self) -> frozenset[str]:
        """What the methods read: "gram", "cross", "attention", "sketch"; "outputs" of the source's blocks."""
        fold = self.fold.needs if self.fold is not None else frozenset()
        after = (self.correction, self.block, self.whole)
        return self.method.needs.union(fold, *(one.requirements for one in after if one is not None))

    @property
    def rounding(self) -> dict[str, Any]:
        """The linear method alone, as `describe` has it; scores depend on it, and on `correcting`."""
        name = next(part for part in self.name.split(JOINT) if part in LINEAR_METHODS)
        return {"name": name, **dataclasses.asdict(self.method)}

    @property
    def correcting(self) -> dict[str, Any] | None:
        """The correction alone, likewise: scores count what it leaves."""
        if self.correction is None:
            return None
        name = next(part for part in self.name.split(JOINT) if part in CORRECTIONS)
        return {"name": name, **dataclasses.asdict(self.correction)}

    @property
    def rotation_facts(self) -> dict[str, Any] | None:
        """Name and settings of the rotation, in JSON types."""
        if self.rotation is None:
            return None
        return {"name": self.name.partition(JOINT)[0], **dataclasses.asdict(self.rotation)}

    def describe(self) -> dict[str, Any]:
        """All methods and their settings in JSON types."""
        described = {**self.rounding, "name": self.name}
        others: dict[str, Any] = {
            "rotation_settings": self.rotation, "fold_settings": self.fold,
            "correction_settings": self.correction, "block_settings": self.block,
            "whole_settings": self.whole,
        }  # fmt: skip
        return described | {key: dataclasses.asdict(one) for key, one in others.items() if one is not None}


def make_recipe(
    name: str,
    settings: dict[str, Any] | None = None,
    coding: dict[str, Any] | None = None,
    embedding: dict[str, Any] | None = None,
    rotation_settings: dict[str, Any] | None = None,
    fold_settings: dict[str, Any] | None = None,
    correction_settings: dict[str, Any] | None = None,
    block_settings: dict[str, Any] | None = None,
    whole_settings: dict[str, Any] | None = None,
    activation: str | None = None,
) -> Recipe:
    """Build a recipe from plain values.

    Parameters
    ----------
    name : str
        Of a method, and what comes before and after it: ``gptq``, ``awq+gptq+signround+distil``.
    settings, rotation_settings, fold_settings, correction_settings, block_settings, whole_settings : optional
        Dicts: of the linear method, and of the others by what each is.
    coding, embedding : dict, optional
        As in ``config.json``; left out are 4 bits, or with `codebook` those of its codes, and groups of 64.
        ``table: 3`` is a table per row for codes of 3 bits. With ``double-rounding`` 8 bits without zero
        points are left out.
    activation : str, optional
        ``int8``: all linears inside the blocks round their inputs to bytes. ``int8-static``, with
        scales fixed in calibration, ``fp8``, ``int4``: to these, in products of floats.

    Raises
    ------
    SettingsError
        Unknown method, setting or value, or a coding that the methods don't go with.
    """
    stages = _stages(name)
    stated = {
        "rotation": rotation_settings, "fold": fold_settings, "correction": correction_settings,
        "block": block_settings, "whole": whole_settings,
    }  # fmt: skip
    for stage, given in stated.items():
        if given is not None and stage not in stages:
            raise SettingsError(
                f"{stage}_settings for `{name}`",
                f"a recipe with one of {', '.join(STAGES[stage])}, which they belong to",
                "name it in the recipe, or leave them out",
            )
    made: dict[str, Any] = {
        stage: _with_settings(stages[stage], STAGES[stage][stages[stage]], given)
        for stage, given in (stated | {"method": settings}).items()
        if stage in stages
    }
    usual = IntegerCoding(8, 64, symmetric=True) if stages["method"] == DoubleRounding.name else None
    recipe = Recipe(
        name, **made, coding=_coding(coding, usual), embedding=_coding(embedding), activation=activation
    )
    _check_coding(recipe, stages["method"])
    _check_activation(recipe)
    check_end(recipe.embedding, "embedding and head")
    if recipe.fold is not None and "sketch" in recipe.method.needs:
        raise SettingsError(
            f"`{name}`, whose fold changes weights that are sketched before",
            "a method that reads no sketch behind a fold",
            "leave out the fold, or choose another method",
        )
    if isinstance(recipe.method, Df11):
        _check_lossless(recipe)
    if isinstance(recipe.method, Gptq) and recipe.method.reorders and (recipe.block or recipe.whole):
        raise SettingsError(
            f"`{name}` with act_order and without static_groups",
            "columns in the order of their inputs, in which they learn",
            "leave static_groups as it is, or leave out what learns",
        )
    _check_transform(recipe)
    return recipe


def _check_transform(recipe: Recipe) -> None:
    """Refuse to learn scales of weights beside which something stands that wouldn't be scaled."""
    if recipe.block is None or not recipe.block.transform:
        return
    if isinstance(recipe.block, FlatQuant):
        _check_matrices(recipe)
    if recipe.correction is not None or recipe.method.outliers:
        beside = "a correction" if recipe.correction is not None else "outliers"
        raise SettingsError(
            f"`{recipe.name}` with transform and {beside} beside the weights that it scales",
            "weights that stand alone",
            "leave out transform, or what stands beside the weights",
        )


def _check_matrices(recipe: Recipe) -> None:
    """Refuse what would be lost behind matrices, or would learn in front of them."""
    if isinstance(recipe.method, Rtn) and recipe.correction is None and recipe.whole is None:
        return
    raise SettingsError(
        f"`{recipe.name}`, in which flatquant rounds all weights anew, behind matrices of their inputs",
        "rtn before it, and nothing between them or after it",
        "write rtn+flatquant, with a rotation or a fold before it",
    )


def _check_lossless(recipe: Recipe) -> None:
    """Refuse what can't stand beside a method that keeps every bit of all places."""
    if JOINT in recipe.name:
        raise SettingsError(
            f"`{recipe.name}`, in which other methods change weights that one keeps",
            "it alone",
            "write df11",
        )
    if recipe.coding is not None or recipe.embedding is not None:
        raise SettingsError(
            f"`{recipe.name}` with a coding that is stated",
            "none, as all weights keep their bits in bfloat16",
            "write df11 without settings",
        )


def _check_coding(recipe: Recipe, method: str) -> None:
    """Refuse a coding that a method of the recipe doesn't go with."""
    coding = recipe.coding
    if coding is None or isinstance(coding, FloatCoding):
        return
    check_codes(method, recipe.method.makes, coding)
    if isinstance(recipe.method, DoubleRounding):
        check_nestable(coding)
    if isinstance(recipe.method, Higgs):
        normal_grid(Higgs.name, coding)
    if isinstance(coding, DoubleCoding | TableCoding | BinaryCoding) and recipe.fold:
        raise SettingsError(
            f"`{recipe.name}` with {_values_of(coding)}",
            "integers or a codebook, whose steps the fold evens out",
            "state bits instead, or leave out the fold",
        )
    if not isinstance(coding, IntegerCoding) and (recipe.block or recipe.whole):
        raise SettingsError(
            f"`{recipe.name}` with {_values_of(coding)}",
            "integers, whose codes and scales are what learns",
            "state bits instead, or leave out what learns",
        )


def _values_of(coding: Coding) -> str:
    """What codes of a coding without integers stand for, for messages."""
    if isinstance(coding, DoubleCoding):
        return "codes for scales"
    if isinstance(coding, CodebookCoding | VectorCoding):
        return f"codebook {coding.codebook}"
    return "signs and magnitudes" if isinstance(coding, BinaryCoding) else "tables"


def _check_activation(recipe: Recipe) -> None:
    """Refuse inputs that are rounded to what isn't known, or before weights that aren't codes of groups."""
    if recipe.activation is None:
        return
    if recipe.activation not in ROUNDED_TO:
        raise SettingsError(
            f"activation {recipe.activation!r}",
            "one of " + ", ".join(f"`{name}`" for name in ROUNDED_TO),
            f"write activation={INT8}, or leave it out",
        )
    if not isinstance(recipe.coding, ScaledCoding):
        held = "no weights in codes" if recipe.coding is None else f"weights of {recipe.coding.label}"
        raise SettingsError(
            f"activation {recipe.activation} beside {held}",
            "integers or a codebook, whose groups say which inputs share a scale",
            "state bits or a codebook, or leave out activation",
        )


def check_end(coding: Coding | None, place: str) -> None:
    """Refuse tables where a row is a token: one would take as much as its codes. And scales that are codes.

    Those are expanded for all rows where a few are looked up. And points and signs, which no embedding is
    read from quickly.

    Raises
    ------
    SettingsError
        Naming `place`.
    """
    if isinstance(coding, VectorCoding | DoubleCoding | TableCoding | BinaryCoding):
        raise SettingsError(
            f"{_values_of(coding)} at {place}", "integers, a codebook or floats there", "state bits instead"
        )


def _stages(name: str) -> dict[str, str]:
    """The methods that a name joins, by what each is: rotation, fold, method, and so on.

    Raises
    ------
    SettingsError
        One is unknown, stands in the wrong order, or none of them rounds.
    """
    order, found = list(STAGES), dict[str, str]()
    for part in name.split(JOINT):
        stage = next((stage for stage, known in STAGES.items() if part in known), None)
        if stage is None:
            every = [one for known in STAGES.values() for one in known]
            raise SettingsError(
                f"method `{part}` is unknown", "methods of `tailorbird methods`", nearest(part, every)
            )
        if found and order.index(stage) <= order.index(list(found)[-1]):
            raise SettingsError(f"`{part}` in `{name}`", ORDER, f"write for example {EXAMPLE_CHAIN}")
        found[stage] = part
    if "method" not in found:
        raise SettingsError(f"`{name}`, in which nothing rounds", ORDER, f"write for example {EXAMPLE_CHAIN}")
    return found


def _with_settings(name: str, kind: type[_Kind], settings: Any) -> _Kind:
    """The method or fold `kind` with `settings`, each known and of the right type."""
    if settings is None:
        return kind()
    if not isinstance(settings, dict):
        raise SettingsError(f"settings {settings!r} of {name}", "a mapping", "correct the recipe")
    known: dict[str, Any] = {f.name: f for f in dataclasses.fields(kind)}
    for key, value in settings.items():
        if key not in known:
            raise SettingsError(
                f"setting `{key}` of {name}", "a setting of the method", nearest(str(key), known)
            )
        default = known[key].default
        wanted = (int, float) if isinstance(default, float) else type(default)
        if isinstance(value, bool) != isinstance(default, bool) or not isinstance(value, wanted):
            raise SettingsError(
                f"setting `{key}: {value!r}` of {name}",
                f"a value like {default!r}",
                "correct the recipe",
            )
    return kind(**settings)


def _coding(entry: dict[str, Any] | None, usual: IntegerCoding | None = None) -> Coding | None:
    """The coding of an entry; what it leaves out is as in `usual`, or as `make_recipe` says."""
    if entry is None:
        return None
    if not isinstance(entry, dict):
        raise SettingsError(
            f"coding {entry!r}", "a mapping such as {bits: 4, group_size: 64}", "correct the recipe"
        )
    default: Coding = usual or IntegerCoding(4, 64)
    if "codebook" in entry:
        points, known = str(entry["codebook"]) in VECTOR_UNITS, (*LEVELS, *VECTOR_UNITS)
        if "kind" not in entry and str(entry["codebook"]) not in known:
            raise SettingsError(
                f"codebook {entry['codebook']!r}", "one of " + ", ".join(known),
                nearest(str(entry["codebook"]), known),
            )  # fmt: skip
        default = VectorCoding("gauss2x4", 64) if points else CodebookCoding("nf4", 64)
    if "table" in entry and "bits" in entry:
        raise SettingsError(
            f"table {entry['table']} and bits {entry['bits']}", "one of them", "leave out the other"
        )
    if "table" in entry and "kind" not in entry:
        default, entry = TableCoding(4), {"bits" if key == "table" else key: entry[key] for key in entry}
    if "binary" in entry and "kind" not in entry:
        default, entry = _binary(entry)
    if "double" in entry and "kind" not in entry:
        default, entry = _doubled(entry, default)
    full = entry if "kind" in entry else {**coding_to_dict(default), **entry}
    try:
        return coding_from_dict(full)
    except CheckpointError as error:
        raise SettingsError(error.given, error.expected, error.remedy) from None


def _binary(entry: dict[str, Any]) -> tuple[Coding, dict[str, Any]]:
    """The coding and the entry that `binary` means, without it."""
    if entry["binary"] is not True:
        raise SettingsError(f"binary {entry['binary']!r}", "true", "write true, or leave it out")
    others = [key for key in ("bits", "codebook", "table") if key in entry]
    if others:
        raise SettingsError(
            f"binary and {others[0]} {entry[others[0]]}", "one of them", "leave out the other"
        )
    return BinaryCoding(64), {key: value for key, value in entry.items() if key != "binary"}


def _doubled(entry: dict[str, Any], default: Coding) -> tuple[Coding, dict[str, Any]]:
    """The coding and the entry that `double` means, without it."""
    rest = {key: value for key, value in entry.items() if key != "double"}
    if not isinstance(entry["double"], bool):
        raise SettingsError(f"double {entry['double']!r}", "true or false", "write one of the two")
    if not entry["double"]:
        return default, rest
    if not isinstance(default, CodebookCoding):
        points = isinstance(default, VectorCoding)
        given = f"double with {entry['codebook']}" if points else "double without a codebook"
        raise SettingsError(
            given,
            "it where scales of a codebook become codes of 8 bits",
            "write for example rtn:codebook=nf4,group=64,double=true",
        )
    return DoubleCoding(default.codebook, default.group_size), rest


def planned_recipe(name: str) -> Recipe:
    """`make_recipe` for a plan that follows from a budget.

    Raises
    ------
    SettingsError
        As `make_recipe`, with the codings that a plan would choose among; and for a method with one coding,
        where nothing is left to choose.
    """
    recipe = make_recipe(name)
    if isinstance(recipe.method, DoubleRounding):
        raise SettingsError(
            f"a fit by `{name}`",
            "a method of integers of any width, among which a plan chooses",
            f"give all linears 8 bits: compress --recipe {name}:bits=8,group=64",
        )
    if isinstance(recipe.method, Df11):
        raise SettingsError(
            f"a fit by `{name}`",
            "a method of codes, among which a plan chooses",
            f"give all linears one coding: compress --recipe {name}",
        )
    if recipe.method.makes == {BinaryCoding.kind}:
        raise SettingsError(
            f"a fit by `{name}`",
            "a method of codes of several widths, among which a plan chooses",
            f"give all linears one coding: compress --recipe {name}:binary=true,group=64",
        )
    if IntegerCoding.kind not in recipe.method.makes:
        tables = TableCoding.kind in recipe.method.makes
        coding: Coding = TableCoding(3) if tables else CodebookCoding("gauss3", 64)
        _check_coding(dataclasses.replace(recipe, coding=coding), recipe.rounding["name"])
    return recipe


def parse_recipe(text: str) -> Recipe:
    """A recipe from one line (``gptq:bits=4,group=64``) or from a YAML file.

    Raises
    ------
    SettingsError
        Naming what is wrong.
    """
    if text.endswith((".yaml", ".yml")):
        return _read(Path(text))
    name, _, rest = text.partition(":")
    stated: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not value:
            raise SettingsError(f"`{item}` in recipe `{text}`", "name=value", EXAMPLE)
        if SHORT.get(key, key) in {SHORT.get(known, known) for known in stated}:
            raise SettingsError(f"`{key}` twice in recipe `{text}`", "each setting once", "leave one out")
        try:
            stated[key] = plain_value(value)
        except ValueError:
            raise SettingsError(f"`{key}` of {len(value)} digits", "a smaller number", EXAMPLE) from None
    coding = {SHORT.get(key, key): stated.pop(key) for key in (*SHORT, *CODING) if key in stated}
    embedding = {"bits": stated.pop("embedding_bits")} if "embedding_bits" in stated else None
    activation = stated.pop("activation", None)
    others = _settings_of_others(name, stated)
    method = next((LINEAR_METHODS[one] for one in name.split(JOINT) if one in LINEAR_METHODS), None)
    known = [f.name for f in dataclasses.fields(method)] if method is not None else list(stated)
    for key in stated:
        if key not in known:
            raise SettingsError(
                f"setting `{key}` of {name}",
                "a setting of the method or of the coding",
                nearest(key, {*SHORT, *CODING, "activation", "embedding_bits", *known}),
            )
    lossless = method is Df11
    stated_coding = coding if coding or not lossless else None
    recipe = make_recipe(name, stated, stated_coding, embedding, **others, activation=activation)
    if not lossless and not coding.keys() & {"bits", "codebook", "table", "binary"}:
        raise SettingsError(
            f"recipe `{text}` states no bits",
            "name:bits=N, name:codebook=nf4, name:table=N or name:binary=true",
            EXAMPLE,
        )
    return recipe


def _settings_of_others(name: str, stated: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Settings of all but the linear method, written ``signround.steps=100``; taken out of `stated`."""
    found: dict[str, dict[str, Any]] = {}
    joined = name.split(JOINT)
    for key in [key for key in stated if "." in key]:
        method, _, setting = key.partition(".")
        stage = next((stage for stage, known in STAGES.items() if method in known and method in joined), None)
        if stage in (None, "method"):
            raise SettingsError(
                f"setting `{key}` of {name}",
                "a setting behind the name of a method beside the one that rounds",
                f"write for example {EXAMPLE_CHAIN}:bits=3,signround.steps=100",
            )  # fmt: skip
        found.setdefault(f"{stage}_settings", {})[setting] = stated.pop(key)
    return found


def _read(path: Path) -> Recipe:
    data = read_yaml(path, "recipe")
    if not isinstance(data, dict) or "method" not in data:
        raise SettingsError(
            f"{path} holds no recipe", "a mapping with `method` and `coding`", "see docs/commands.md"
        )
    for key in data:
        if key not in FIELDS:
            raise SettingsError(f"`{key}` in {path}", "a field of a recipe", nearest(str(key), FIELDS))
    if data.get("coding") is None and data["method"] != "df11":
        raise SettingsError(f"{path} states no coding", "coding: {bits: N, group_size: M}", "add it")
    stages = [data.get(stage) for stage in STAGES]
    others = {key: data.get(key) for key in FIELDS if key.endswith("_settings")}
    return make_recipe(
        JOINT.join(str(stage) for stage in stages if stage is not None), data.get("settings"),
        data.get("coding"), data.get("embedding"), activation=data.get("activation"), **others,
    )  # fmt: skip


def recipe_of_plan(plan: Any) -> Recipe:
    """The method that `plan` (a `planfile.Plan`) was made for; the default where it doesn't say."""
    if plan.method is None:
        return make_recipe(DEFAULT_METHOD)
    settings = plan.method.model_dump()
    name = settings.pop("name")
    keys = [f"{stage}_settings" for stage in STAGES if stage != "method"]
    others = {key: settings.pop(key, None) for key in keys}
    return make_recipe(name, settings, **others)
