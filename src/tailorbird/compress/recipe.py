"""A recipe: which method compresses, and for `compress` also which coding every linear takes.

Written as one line, ``gptq:bits=4,group=64`` or ``gptq:codebook=nf4,group=64``, or with a fold before the
method, ``awq+gptq:bits=4,group=64``, or as a YAML file:

    method: gptq
    settings: {act_order: true}
    coding: {bits: 4, group_size: 64, symmetric: false}
    embedding: {bits: 8, group_size: 64}     # and an untied head; left out, they stay as they are
    fold: awq                                # left out, nothing is folded
    fold_settings: {grid: 20}
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tailorbird.errors import CheckpointError, SettingsError, nearest
from tailorbird.formats.packed import CodebookCoding, Coding, IntegerCoding, coding_from_dict, coding_to_dict
from tailorbird.linear import FOLDS, LINEAR_METHODS, LinearMethod
from tailorbird.linear.quantize.awq import Awq
from tailorbird.linear.quantize.gptq import Gptq
from tailorbird.linear.quantize.rtn import Rtn
from tailorbird.plan.yaml_file import plain_value, read_yaml

DEFAULT_METHOD = "gptq"
FIELDS = ("method", "settings", "coding", "embedding", "fold", "fold_settings")
#: stands between a fold and the method that rounds after it
JOINT = "+"
SHORT = {"group": "group_size"}
#: what a line may state of the coding
CODING = ("bits", "codebook", "symmetric", "scale_dtype", "group_size")
EXAMPLE = "write for example gptq:bits=4,group=64"

_Kind = TypeVar("_Kind", bound=Rtn | Gptq | Awq)


@dataclass(frozen=True)
class Recipe:
    """A method with its settings, and the codings that `compress` gives to all linears.

    Attributes
    ----------
    name : str
        Name of the method, behind that of the fold where there is one: ``gptq``, ``awq+gptq``.
    method : LinearMethod
    coding : Coding or None
        For every linear inside the blocks; None where a plan decides.
    embedding : Coding or None
        For the embedding and an untied head; None leaves them.
    fold : Awq or None
        Moves scales before the linears are rounded.
    """

    name: str
    method: LinearMethod
    coding: Coding | None = None
    embedding: Coding | None = None
    fold: Awq | None = None

    @property
    def needs(self) -> frozenset[str]:
        """Statistics that the method or the fold reads: "gram", "cross"."""
        return self.method.needs | (self.fold.needs if self.fold is not None else frozenset())

    def describe(self) -> dict[str, Any]:
        """The method, the fold and their settings in JSON types."""
        described = {"name": self.name, **dataclasses.asdict(self.method)}
        if self.fold is not None:
            described["fold_settings"] = dataclasses.asdict(self.fold)
        return described


def make_recipe(
    name: str,
    settings: dict[str, Any] | None = None,
    coding: dict[str, Any] | None = None,
    embedding: dict[str, Any] | None = None,
    fold_settings: dict[str, Any] | None = None,
) -> Recipe:
    """Build a recipe from plain values.

    Parameters
    ----------
    name : str
        Of a method, or of a fold and a method: ``gptq``, ``awq+gptq``.
    settings, fold_settings : dict, optional
        Of the method and of the fold.
    coding, embedding : dict, optional
        As in ``config.json``; left out are 4 bits, or with `codebook` those of its codes, and groups of 64.

    Raises
    ------
    SettingsError
        Unknown method, setting or value.
    """
    fold_name, joint, method_name = name.rpartition(JOINT)
    if method_name in FOLDS:
        raise SettingsError(
            f"`{name}`, which ends with a fold",
            "a linear method that rounds after it",
            f"write {method_name}{JOINT}{DEFAULT_METHOD}",
        )
    if method_name not in LINEAR_METHODS:
        raise SettingsError(
            f"method `{method_name}` is unknown",
            "a linear method of `tailorbird methods`",
            nearest(method_name, LINEAR_METHODS),
        )
    if joint and fold_name not in FOLDS:
        raise SettingsError(
            f"fold `{fold_name}` of `{name}` is unknown",
            "a fold of `tailorbird methods`, then a linear method",
            nearest(fold_name, FOLDS),
        )
    if fold_settings is not None and not joint:
        raise SettingsError(
            f"fold_settings for `{name}`", "a fold that they belong to", f"write awq{JOINT}{name}"
        )
    method = _with_settings(method_name, LINEAR_METHODS[method_name], settings)
    fold = _with_settings(fold_name, FOLDS[fold_name], fold_settings) if joint else None
    return Recipe(name, method, _coding(coding), _coding(embedding), fold)


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


def _coding(entry: dict[str, Any] | None) -> Coding | None:
    if entry is None:
        return None
    if not isinstance(entry, dict):
        raise SettingsError(
            f"coding {entry!r}", "a mapping such as {bits: 4, group_size: 64}", "correct the recipe"
        )
    default = CodebookCoding("nf4", 64) if "codebook" in entry else IntegerCoding(4, 64)
    full = entry if "kind" in entry else {**coding_to_dict(default), **entry}
    try:
        return coding_from_dict(full)
    except CheckpointError as error:
        raise SettingsError(error.given, error.expected, error.remedy) from None


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
        if not equals:
            raise SettingsError(f"`{item}` in recipe `{text}`", "name=value", EXAMPLE)
        try:
            stated[key] = plain_value(value)
        except ValueError:
            raise SettingsError(f"`{key}` of {len(value)} digits", "a smaller number", EXAMPLE) from None
    coding = {SHORT.get(key, key): stated.pop(key) for key in (*SHORT, *CODING) if key in stated}
    embedding = {"bits": stated.pop("embedding_bits")} if "embedding_bits" in stated else None
    method = LINEAR_METHODS.get(name.rpartition(JOINT)[2])
    known = [f.name for f in dataclasses.fields(method)] if method is not None else list(stated)
    for key in stated:
        if key not in known:
            raise SettingsError(
                f"setting `{key}` of {name}",
                "a setting of the method or of the coding",
                nearest(key, {*SHORT, *CODING, "embedding_bits", *known}),
            )
    recipe = make_recipe(name, stated, coding, embedding)
    if not coding.keys() & {"bits", "codebook"}:
        raise SettingsError(f"recipe `{text}` states no bits", "name:bits=N, or name:codebook=nf4", EXAMPLE)
    return recipe


def _read(path: Path) -> Recipe:
    data = read_yaml(path, "recipe")
    if not isinstance(data, dict) or "method" not in data:
        raise SettingsError(
            f"{path} holds no recipe", "a mapping with `method` and `coding`", "see docs/commands.md"
        )
    for key in data:
        if key not in FIELDS:
            raise SettingsError(f"`{key}` in {path}", "a field of a recipe", nearest(str(key), FIELDS))
    if data.get("coding") is None:
        raise SettingsError(f"{path} states no coding", "coding: {bits: N, group_size: M}", "add it")
    method, fold = str(data["method"]), data.get("fold")
    name = method if fold is None else f"{fold}{JOINT}{method}"
    return make_recipe(
        name, data.get("settings"), data["coding"], data.get("embedding"), data.get("fold_settings")
    )


def recipe_of_plan(plan: Any) -> Recipe:
    """The method that `plan` (a `planfile.Plan`) was made for; the default where it doesn't say."""
    if plan.method is None:
        return make_recipe(DEFAULT_METHOD)
    settings = plan.method.model_dump()
    name, fold_settings = settings.pop("name"), settings.pop("fold_settings", None)
    return make_recipe(name, settings, fold_settings=fold_settings)
