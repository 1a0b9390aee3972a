"""What a grammar can't hold of a JSON schema is refused by name; the rest goes through unchanged."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tailorbird.errors import SettingsError
from tailorbird.serve.json_schema import MOST_NESTED, checked

TEXT = {"type": "string"}


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"not": TEXT}, "not"),
        (
            {"type": "object", "properties": {"a": {"type": "integer", "multipleOf": 3}}},
            r"multipleOf.*properties\.a",
        ),
        ({"type": "array", "items": TEXT, "uniqueItems": True}, "uniqueItems"),
        ({"anyOf": [TEXT, {"if": {}, "then": {}}]}, r"if.*anyOf\.1"),
        ({"$defs": {"x": {"type": "array", "contains": TEXT}}}, r"contains.*\$defs\.x"),
        ({"allOf": [TEXT, {"type": "integer"}]}, "allOf"),
        ({"$ref": "https://example.org/schema"}, r"\$ref"),
        ({"$ref": "#/$defs/a", "minimum": 4}, "minimum"),
        ({"type": "string", "anyOf": [{"type": "integer"}]}, "type beside anyOf"),
        ({"type": "object", "properties": {}, "anyOf": [{"type": "object"}]}, "properties beside anyOf"),
        ({"type": "string", "enum": ["a", 1]}, "another type"),
        ({"type": "integer", "const": True}, "another type"),
        ({"minLength": 3}, "minLength without a type"),
        ({"type": "string", "pattern": "a", "maxLength": 3}, "maxLength beside pattern"),
        ({"type": "string", "pattern": 'a"b'}, "escapes"),
        ({"type": "string", "pattern": r"a\\b"}, "escapes"),
        ({"type": "string", "pattern": r"a\tb"}, "escapes"),
        ({"type": "string", "pattern": "[\x01-z]"}, "escapes"),
        ({"type": "string", "pattern": r"a\u{22}b"}, "escapes"),
        ({"type": "string", "pattern": r"\u{001f}"}, "escapes"),
        ({"type": "string", "pattern": "a$b"}, r"a\$b"),
        ({"type": "object", "patternProperties": {"a|b^": True}}, r"b\^"),
        ({"type": "object", "patternProperties": {r"\x1f": True}}, "escapes"),
        ({"type": "object", "required": ["a"]}, "required 'a'"),
        ({"type": "object", "properties": {"b": TEXT}, "required": ["b", "a"]}, "required 'a'"),
    ],
)
def test_what_a_grammar_cannot_hold_is_refused_by_name(schema: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        checked(json.dumps(schema))


@pytest.mark.parametrize(
    "schema",
    [
        True,
        {},
        {"title": "T", "description": "d", "default": 1, "type": "integer", "minimum": 1},
        {"type": ["string", "null"], "enum": ["a", None]},
        {"type": "string", "pattern": r"^[\w\"]+\d{2}\.[^\\]\]$"},
        {"properties": {"not": TEXT, "if": {"type": "number", "const": 1}}, "required": ["not"]},
        {"anyOf": [TEXT, {"type": "null"}], "default": None, "title": "Optional"},
        {"type": "array", "items": {"$ref": "#/$defs/a"}, "uniqueItems": False, "$defs": {"a": TEXT}},
    ],
)
def test_other_schemas_are_the_same_afterwards(schema: Any) -> None:
    assert json.loads(checked(json.dumps(schema))) == schema


def test_nesting_is_bounded_and_nonsense_is_no_json() -> None:
    def nested(depth: int) -> str:
        return '{"type":"array","items":' * (depth - 1) + "{}" + "}" * (depth - 1)

    checked(nested(MOST_NESTED))
    for depth in (MOST_NESTED + 1, 5000):
        with pytest.raises(SettingsError, match="deeper"):
            checked(nested(depth))
    with pytest.raises(SettingsError, match="no JSON"):
        checked("{")
