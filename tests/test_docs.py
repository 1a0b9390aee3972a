"""The documents name what exists: every path, every command, every flag and every field."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.main import get_command

from tailorbird.adapt.methods.registry import KNOWN
from tailorbird.adapt.optimizers.registry import OPTIMIZERS
from tailorbird.api import methods
from tailorbird.cli.main import app

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    *(ROOT / "docs").glob("*.md"),
    *(ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "README.md")),
]
COMMANDS = get_command(app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_path_that_is_named_exists(document: Path) -> None:
    named = re.findall(r"`((?:\w+/)+\w+\.(?:py|md|j2|json))`", document.read_text(encoding="utf-8"))
    missing = [
        path
        for path in named
        if not (ROOT / path).exists() and not (ROOT / "src" / "tailorbird" / path).exists()
    ]
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_inside_the_repository_leads_somewhere(document: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", document.read_text(encoding="utf-8"))
    assert [link for link in links if not (document.parent / link).exists()] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_of_every_command_is_documented_and_no_other(name: str) -> None:
    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    shared, *_ = re.split(r"^## `", text, maxsplit=1, flags=re.MULTILINE)
    section = re.search(rf"^## `{name}`\n(.*?)(?=^## |\Z)", text, flags=re.MULTILINE | re.DOTALL)
    assert section is not None
    own = re.sub(rf"`(?!{name} )[a-z]+ --[a-z-]+`", "", section[1])
    documented = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", own))
    in_common = set(re.findall(r"^\| `(--[a-z]+)", shared, flags=re.MULTILINE)) | {"--help"}
    known = set(in_common)
    below = getattr(COMMANDS[name], "commands", {}).values()
    for parameter in [parameter for one in (COMMANDS[name], *below) for parameter in one.params]:
        spellings = {option for option in parameter.opts if option.startswith("-")}
        known |= spellings | set(parameter.secondary_opts)
        assert not spellings or spellings & (documented | in_common), spellings
    assert documented <= known


def test_the_readme_counts_what_the_registries_have() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    counts = re.findall(r"what the (\d+) methods\s+and (\d+) optimizers are", text)
    assert counts == [(str(len(KNOWN)), str(len(OPTIMIZERS)))]


def test_every_method_of_tuning_has_a_row() -> None:
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert [
        name for name in (*KNOWN, *OPTIMIZERS) if not re.search(rf"^\| `{name}` \|", text, re.MULTILINE)
    ] == []


def test_costs_in_the_documents_are_those_of_the_catalogue() -> None:
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    section = re.search(r"^### What they cost.*?\n(.*?)(?=^## )", text, flags=re.MULTILINE | re.DOTALL)
    assert section is not None
    rows = re.findall(r"^\| `([\w-]+)` \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", section[1], flags=re.MULTILINE)
    known = {
        row.name: (row.cost, row.memory)
        for row in methods()
        if row.family not in ("adapter", "full", "start", "optimizer")
    }
    assert {name: (cost, memory) for name, cost, memory, _ in rows} == known
    assert len(rows) == len(known)


def test_stated_times_are_those_of_the_measured_cells_but_for_a_factor_of_two() -> None:
    cells = ROOT / "benchmarks/results/quality_per_byte/gpt2-wikitext2-1m/2-bits"
    seconds = {path.stem: json.loads(path.read_text()).get("seconds") for path in cells.glob("*.json")}
    stated = {row.name: float(row.cost.removesuffix("x gptq")) for row in methods() if "x gptq" in row.cost}
    assert stated
    for name, times in stated.items():
        subjects = (name, f"gptq+{name}", f"{name}+gptq", f"rtn+{name}")
        measured = next(seconds[subject] for subject in subjects if seconds.get(subject))
        assert 0.5 <= measured / seconds["gptq"] / times <= 2, name
