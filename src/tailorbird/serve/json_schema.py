"""Which JSON schemas a grammar can hold.

xgrammar turns a schema into a grammar, and passes over what no grammar expresses, or what it doesn't join.
Text would then be called valid that isn't; such schemas are refused here instead, by the keyword and its
place.

What a schema leaves open may be narrowed: text has the keys in the order of the schema, and no others unless
`additionalProperties` allows them or none are named; a pattern covers the whole string; strings with a
pattern or bounds of their length have nothing in them that JSON escapes. Of `oneOf`, text may fit more than
one, and a format is followed as far as a pattern describes it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from tailorbird.errors import SettingsError
from tailorbird.serve.pattern import held

#: Schemas inside each other; compiling takes the cube of it.
MOST_NESTED = 64

_UNHELD = frozenset(
    {
        "not", "if", "then", "else", "multipleOf", "uniqueItems", "contains", "minContains", "maxContains",
        "dependencies", "dependentRequired", "dependentSchemas", "$dynamicRef", "$recursiveRef",
    }
)  # fmt: skip
#: What decides alone: other constraints beside one of these are passed over.
_ALONE = ("$ref", "anyOf", "oneOf", "allOf", "const", "enum")
#: Constraints from which the type is guessed where it isn't stated, and others.
_TELLING = frozenset({"properties", "additionalProperties", "items", "prefixItems"})
_CONSTRAINTS = _TELLING | {
    "minLength", "maxLength", "pattern", "format", "minimum", "maximum", "exclusiveMinimum",
    "exclusiveMaximum", "minItems", "maxItems", "required", "minProperties", "maxProperties",
    "patternProperties", "propertyNames",
}  # fmt: skip

_BY_NAME = ("properties", "patternProperties", "$defs", "definitions")
_ONE = ("items", "additionalProperties", "propertyNames")
_LISTED = ("prefixItems", "anyOf", "oneOf", "allOf")

#: How often xgrammar 0.2 can repeat something in a pattern of JSON, and up to which length of a string more
#: is written out, which takes seconds to compile.
MOST_TIMES, MOST_UNFOLDED = 128, 4096
#: Classes of characters in a pattern, which the grammar keeps to what JSON takes as it is; and characters, as
#: they are or escaped, that it wouldn't.
_CLASSES = re.compile(r"\[(?:\\.|[^\]\\])*\]", re.DOTALL)
_ESCAPED = re.compile(
    r'["\x00-\x1f]|\\[\\"tnrfvc0]|\\(?:x|u00)(?:[01]|22|5[cC])|\\u\{0*(?:1?[0-9a-fA-F]|22|5[cC])\}'
)
_CONTROL = re.compile(r"[\x00-\x1f]")
#: Strings that JSON writes as they are; to be repeated.
_PLAIN = r'[^\x00-\x1f"\\]'

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,), "array": (list,), "string": (str,), "boolean": (bool,), "null": (type(None),),
    "number": (int, float), "integer": (int,),
}  # fmt: skip


def checked(text: str) -> str:
    """A schema that a grammar can hold, as JSON that xgrammar reads rightly.

    Parameters
    ----------
    text : str
        JSON.

    Raises
    ------
    SettingsError
        It is no JSON, nests too deeply, or says something that a grammar doesn't hold.
    """
    try:
        schema = json.loads(text)
        waiting = [("the schema", schema, 1)]
        while waiting:
            place, part, depth = waiting.pop()
            if depth > MOST_NESTED:
                raise _too_deep()
            if isinstance(part, dict):
                _check(place, part)
                waiting += [(f"{place}.{name}", inner, depth + 1) for name, inner in _inner(part)]
        return json.dumps(_rewritten(schema))
    except json.JSONDecodeError as error:
        raise SettingsError(f"a JSON schema that is no JSON ({error})", "JSON", "correct it there") from error
    except RecursionError as error:
        raise _too_deep() from error
    except (TypeError, AttributeError) as error:
        raise SettingsError(
            f"a JSON schema with a keyword whose value is of the wrong type ({error})",
            "a JSON schema (https://json-schema.org)", "correct it",
        ) from error  # fmt: skip


def _rewritten(schema: Any) -> Any:
    """A schema in other words where xgrammar misreads it.

    It takes no anchors inside a pattern, lets control characters into strings of bounded length, and counts
    items and properties that nothing is said about as none.
    """
    if not isinstance(schema, dict):
        return schema
    after = dict(schema)
    for key in _BY_NAME:
        if isinstance(schema.get(key), dict):
            after[key] = {name: _rewritten(inner) for name, inner in schema[key].items()}
    for key in _ONE:
        if key in schema:
            after[key] = _rewritten(schema[key])
    for key in _LISTED:
        if isinstance(schema.get(key), list):
            after[key] = [_rewritten(inner) for inner in schema[key]]
    if "pattern" in schema:
        after["pattern"] = held(schema["pattern"])
    if isinstance(schema.get("patternProperties"), dict):
        after["patternProperties"] = {held(name): inner for name, inner in after["patternProperties"].items()}
    least, most = after.pop("minLength", None), after.pop("maxLength", None)
    if "minLength" in schema or "maxLength" in schema:
        after["pattern"] = f"^{_of_length(least or 0, most)}$"
    if "minItems" in after and not {"items", "prefixItems"} & set(after):
        after["items"] = {}
    if "minProperties" in after and not {"properties", "patternProperties", "additionalProperties"} & set(
        after
    ):
        after["additionalProperties"] = {}
    return after


def _of_length(least: int, most: int | None) -> str:
    """A pattern for strings of so many characters."""
    highest = least if most is None else most
    if not MOST_TIMES < highest <= MOST_UNFOLDED or least > highest:
        return f"{_PLAIN}{{{least},{'' if most is None else most}}}"
    many, rest = divmod(least, MOST_TIMES)
    needed = f"{_PLAIN}{{{MOST_TIMES}}}" * many + f"{_PLAIN}{{{rest}}}"
    if most is None:
        return f"{needed}{_PLAIN}*"
    many, rest = divmod(most - least, MOST_TIMES)
    allowed = f"{_PLAIN}{{0,{rest}}}"
    for _ in range(many):  # each length in one way only
        allowed = f"({_PLAIN}{{{MOST_TIMES}}}{allowed}|{_PLAIN}{{0,{MOST_TIMES - 1}}})"
    return needed + allowed


def _inner(schema: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The schemas directly inside one, with their places."""
    for key in _BY_NAME:
        if isinstance(schema.get(key), dict):
            yield from ((f"{key}.{name}", inner) for name, inner in schema[key].items())
    for key in _ONE:
        if key in schema:
            yield key, schema[key]
    for key in _LISTED:
        if isinstance(schema.get(key), list):
            yield from ((f"{key}.{i}", inner) for i, inner in enumerate(schema[key]))


def _check(place: str, schema: dict[str, Any]) -> None:
    """Refuse what one schema says itself; those inside it aren't looked at."""
    for key in sorted(_UNHELD & set(schema)):
        if schema[key] is not False:
            raise _refused(f"{key} in {place}", "leave it out, and check the finished text")
    constraints = sorted(_CONSTRAINTS & set(schema))
    alone = [key for key in _ALONE if key in schema]
    if alone:
        values = {"const": [schema.get("const")], "enum": schema.get("enum")}.get(alone[0])
        stated = values is None and "type" in schema
        beside = alone[1:] + constraints + (["type"] if stated else [])
        if beside:
            raise _refused(f"{beside[0]} beside {alone[0]} in {place}", f"move it into what {alone[0]} names")
        if isinstance(values, list) and not all(_is_of(value, schema.get("type")) for value in values):
            raise _refused(f"values of another type than {schema['type']!r} in {place}", "leave them out")
    elif "type" not in schema and constraints and not _TELLING & set(schema):
        raise _refused(f"{constraints[0]} without a type in {place}", "state the type")
    if len(schema.get("allOf", [])) > 1:
        raise _refused(f"allOf with more than one schema in {place}", "join them into one")
    reference = schema.get("$ref", "#")
    if not isinstance(reference, str) or not reference.startswith("#"):
        raise _refused(f"$ref {reference!r} in {place}", "put the other schema into $defs")
    shaped = [key for key in ("pattern", "format") if key in schema]
    sized = [key for key in ("minLength", "maxLength") if key in schema]
    if shaped and (sized or len(shaped) > 1):
        raise _refused(f"{(sized + shaped)[0]} beside {shaped[-1]} in {place}", "say both in one pattern")
    for pattern in [schema.get("pattern", ""), *schema.get("patternProperties", {})]:
        outside = _CLASSES.sub("", pattern)
        if _CONTROL.search(pattern) or _ESCAPED.search(outside):
            raise _refused(
                f"pattern {pattern!r} in {place}, with a character that JSON escapes",
                "leave out quotes, backslashes and control characters, or put them into brackets",
            )
    required, named = schema.get("required", []), schema.get("properties", {})
    missing = [name for name in required if name not in named] if isinstance(required, list) else []
    if missing:
        raise _refused(f"required {missing[0]!r} in {place}, which properties don't describe", "describe it")


def _is_of(value: Any, types: Any) -> bool:
    """Whether a value has a type, or one of some."""
    if types is None:
        return True
    if isinstance(types, list):
        return any(_is_of(value, name) for name in types)
    if isinstance(value, bool):
        return bool(types == "boolean")
    return isinstance(value, _TYPES.get(types, ()))


def _refused(given: str, remedy: str) -> SettingsError:
    return SettingsError(given, "a JSON schema that a grammar can hold", remedy)


def _too_deep() -> SettingsError:
    return SettingsError(
        f"a JSON schema that nests deeper than {MOST_NESTED}", f"at most {MOST_NESTED} levels", "flatten it"
    )
