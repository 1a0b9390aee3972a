"""A recipe: which method compresses, and for `compress` also which coding every linear takes.

Written as one line, ``gptq:bits=4,group=64``, or as a YAML file:

    method: gptq
    settings: {act_order: true}
    coding: {bits: 4, group_size: 64, symmetric: false}
    embedding: {bits: 8, group_size: 64}     # and an untied head; left out, they stay as they are
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tailorbird.errors import SettingsError, nearest
from tailorbird.formats.packed import Coding, IntegerCoding, coding_from_dict, coding_to_dict
from tailorbird.linear import LINEAR_METHODS, LinearMethod

DEFAULT_METHOD = "gptq"
FIELDS = ("method", "settings", "coding", "embedding")
SHORT = {"group": "group_size"}


@dataclass(frozen=True)
class Recipe:
    """A method with its settings, and the codings that `compress` gives to all linears.

    Attributes
    ----------
    name : str
        Name of the method.
    method : LinearMethod
    coding : Coding or None
        For every linear inside the blocks; None where a plan decides.
    embedding : Coding or None
        For the embedding and an untied head; None leaves them.
    """

    name: str
    method: LinearMethod
    coding: Coding | None = None
    embedding: Coding | None = None

    def describe(self) -> dict[str, Any]:
        """The method and its settings in JSON types."""
        return {"name": self.name, **dataclasses.asdict(self.method)}


def make_recipe(
    name: str,
    settings: dict[str, Any] | None = None,
    coding: dict[str, Any] | None = None,
    embedding: dict[str, Any] | None = None,
) -> Recipe:
    """Build a recipe from plain values.

    Raises
    ------
    SettingsError
        Unknown method, setting or value.
    """
    if name not in LINEAR_METHODS:
        raise SettingsError(
            f"method `{name}` is unknown", "a method of `tailorbird methods`", nearest(name, LINEAR_METHODS)
        )
    kind = LINEAR_METHODS[name]
    known = {f.name: f for f in dataclasses.fields(kind)}
    for key, value in (settings or {}).items():
        if key not in known:
            raise SettingsError(f"setting `{key}` of {name}", "a setting of the method", nearest(key, known))
        default = known[key].default
        wanted = (int, float) if isinstance(default, float) else type(default)
        if isinstance(value, bool) != isinstance(default, bool) or not isinstance(value, wanted):
            raise SettingsError(
                f"setting `{key}: {value!r}` of {name}",
                f"a value like {default!r}",
                "correct the recipe",
            )
    return Recipe(name, kind(**(settings or {})), _coding(coding), _coding(embedding))


def _coding(entry: dict[str, Any] | None) -> Coding | None:
    if entry is None:
        return None
    if not isinstance(entry, dict):
        raise SettingsError(
            f"coding {entry!r}", "a mapping such as {bits: 4, group_size: 64}", "correct the recipe"
        )
    full = entry if "kind" in entry else {**coding_to_dict(IntegerCoding(4, 64)), **entry}
    return coding_from_dict(full)


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
    settings: dict[str, Any] = {}
    coding: dict[str, Any] = {}
    embedding: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            raise SettingsError(
                f"`{item}` in recipe `{text}`", "name=value", "write for example gptq:bits=4,group=64"
            )
        key = SHORT.get(key.strip(), key.strip())
        parsed = yaml.safe_load(value)
        if key in ("bits", "group_size", "symmetric", "scale_dtype"):
            coding[key] = parsed
        elif key == "embedding_bits":
            embedding["bits"] = parsed
        else:
            settings[key] = parsed
    if "bits" not in coding:
        raise SettingsError(
            f"recipe `{text}` states no bits", "name:bits=N", "write for example gptq:bits=4,group=64"
        )
    return make_recipe(name, settings, coding, embedding or None)


def _read(path: Path) -> Recipe:
    try:
        data = yaml.safe_load(path.read_text("utf-8"))
    except FileNotFoundError:
        raise SettingsError(f"no recipe at {path}", "a YAML file", "check the path") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"{path} can't be read: {error}", "a YAML file", "correct it") from None
    if not isinstance(data, dict) or "method" not in data:
        raise SettingsError(
            f"{path} holds no recipe", "a mapping with `method` and `coding`", "see docs/commands.md"
        )
    for key in data:
        if key not in FIELDS:
            raise SettingsError(f"`{key}` in {path}", "a field of a recipe", nearest(str(key), FIELDS))
    if data.get("coding") is None:
        raise SettingsError(f"{path} states no coding", "coding: {bits: N, group_size: M}", "add it")
    return make_recipe(str(data["method"]), data.get("settings"), data["coding"], data.get("embedding"))


def recipe_of_plan(plan: Any) -> Recipe:
    """The method that `plan` (a `planfile.Plan`) was made for; the default where it doesn't say."""
    if plan.method is None:
        return make_recipe(DEFAULT_METHOD)
    settings = plan.method.model_dump()
    return make_recipe(settings.pop("name", DEFAULT_METHOD), settings)
