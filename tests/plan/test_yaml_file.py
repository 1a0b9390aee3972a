"""A file that is not YAML is answered with line and column, in words of ours."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import yaml

from tailorbird.errors import SettingsError
from tailorbird.plan.yaml_file import plain_value, read_yaml

SOUND = "a: [1, 2]\nb: {c: 'd', é: 😀}\nlist:\n- x\n- y\n"
#: what stands in place of a piece, and stops the reader right there
BREAKS = ("@", "`", "\x07", "\x00", "%")


def refusal(tmp_path: Path, text: str) -> SettingsError:
    path = tmp_path / "a.yaml"
    path.write_text(text, "utf-8")
    with pytest.raises(SettingsError) as refused:
        read_yaml(path, "recipe")
    return refused.value


@pytest.mark.parametrize("mark", BREAKS)
@pytest.mark.parametrize(("piece", "line", "column"), [("[1", 1, 4), ("😀", 2, 16), ("x", 4, 3)])
def test_the_place_is_where_the_file_stops_being_yaml(
    tmp_path: Path, mark: str, piece: str, line: int, column: int
) -> None:
    error = refusal(tmp_path, SOUND.replace(piece, mark))
    start = f"recipe {tmp_path / 'a.yaml'} is not YAML: reading stops at line {line}, column {column}"
    assert re.fullmatch(re.escape(start) + r"(, inside what begins at line \d+, column \d+)?", error.given)
    assert "`name: value`" in error.expected


def test_control_the_sound_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(SOUND, "utf-8")
    assert read_yaml(tmp_path / "a.yaml", "recipe") == {
        "a": [1, 2], "b": {"c": "d", "é": "😀"}, "list": ["x", "y"],
    }  # fmt: skip


def parser_words(text: str) -> list[str]:
    """What the parser says of `text`, if it is no YAML."""
    try:
        list(yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))
    except yaml.MarkedYAMLError as error:
        return [words for words in (error.problem, error.context) if words]
    return []


def test_no_words_of_the_parser_are_shown(tmp_path: Path) -> None:
    chance = random.Random(0)
    refused = 0
    for _ in range(300):
        at = chance.randrange(len(SOUND))
        text = SOUND[:at] + chance.choice("[]{}'\"@&*!|>%:-\t\n") + SOUND[at:]
        words = parser_words(text)
        if words:
            refused += 1
            message = str(refusal(tmp_path, text))
            assert re.search(r"line \d+, column \d+", message)
            assert not any(word in message for word in words)
    assert refused > 50


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None), ("~", None), ("true", True), ("False", False), ("yes", "yes"), ("12", 12), ("-3", -3),
        ("012", "012"), ("1e-3", 0.001), ("1.", 1.0), ("1.5", 1.5), ("[4", "[4"), ("a: b", "a: b"),
    ],
)  # fmt: skip
def test_scalars_are_those_of_the_core_schema(text: str, value: object) -> None:
    assert plain_value(text) == value
    assert type(plain_value(text)) is type(value)
