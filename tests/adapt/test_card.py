"""The card says what the adapter's files say, its fields are the Hub's, and no name can leave its place."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from sample_tuning import CONFIG, origin
from tailorbird.adapt.card import SERVED, card, checkpoint_card
from tailorbird.formats.peft import BEGINNINGS
from tailorbird.serve.adapters.basis import PEFT_TYPE
from tailorbird.serve.adapters.kinds import KINDS

HOSTILE = [
    "a/b\n---\nlicense: mit",
    "```\n# Heading <script>alert(1)</script>\n",
    "'; rm -rf ~; '",
    '"); import os; os.system("x") #',
    "``` `` ` |x| [a](javascript:x) \\",
    "models/über ✓: {yes} # no",
    "\x00\x1b[31m\ud800",
    " ",
]


def split(text: str) -> tuple[dict[str, Any], str]:
    """Front matter and body."""
    found = re.match(r"---\n(.*?)\n---\n(.*)\Z", text, re.DOTALL)
    assert found is not None
    return yaml.safe_load(found[1]), found[2]


def blocks(body: str) -> list[tuple[str, str]]:
    """Language and content of each block of code."""
    return [(found[2], found[3]) for found in re.finditer(r"^(`{3,})(\w+)\n(.*?)\n\1$", body, re.M | re.S)]


def test_the_fields_are_the_hubs() -> None:
    fields, _ = split(card(origin(), CONFIG, "org/model-8b"))
    assert fields == {
        "library_name": "peft", "pipeline_tag": "text-generation", "base_model": "org/model-8b",
        "base_model_relation": "adapter", "license": "apache-2.0", "tags": ["tailorbird", "lora"],
    }  # fmt: skip


def test_a_checkpoints_card_needs_no_base() -> None:
    stated = origin(method={**origin()["method"], "method": "lisa", "method_settings": {"layers": 3}})
    fields, body = split(checkpoint_card(stated, "org/model-8b"))
    assert fields == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "base_model": "org/model-8b",
        "base_model_relation": "finetune", "license": "apache-2.0", "tags": ["tailorbird", "lisa"],
    }  # fmt: skip
    assert "2.5000 nats per learned token before, 1.5000 after" in body
    assert "- layers: `3`" in body
    assert not re.search("adapter", body, re.IGNORECASE)
    for language, code in blocks(body):
        if language == "python":
            ast.parse(code)
    for name in HOSTILE:
        fields, body = split(checkpoint_card(origin(base_licence=name), name))
        assert fields["library_name"] == "transformers"
        assert [language for language, _ in blocks(body)] == ["python", "sh"]


@pytest.mark.parametrize("kind", sorted(BEGINNINGS))
def test_what_is_no_change_of_weights_is_served_and_not_merged(kind: str) -> None:
    fields, body = split(card(origin(), {"peft_type": kind}, "org/model-8b"))
    assert fields["tags"] == ["tailorbird", kind.lower(), origin()["method"]["method"]]
    assert [language for language, _ in blocks(body)] == ["python", "sh"]
    assert blocks(body)[1][1].startswith("tailorbird serve org/model-8b --adapter")
    assert "merge_and_unload" not in body


def test_an_adapter_of_tailorbirds_own_is_opened_by_tailorbird_alone() -> None:
    body = split(card(origin(), CONFIG | {"peft_type": "TAILORBIRD"}, "demo"))[1]
    (found,) = blocks(body)
    assert "load_adapted('demo', Path(" in found[1]
    assert ast.parse(found[1])
    assert "PeftModel" not in body
    assert "serve demo" not in body


@pytest.mark.parametrize("own", [False, True], ids=["in PEFT's layout", "in its own form"])
def test_glora_is_merged_and_not_served(own: bool) -> None:
    kind = {"peft_type": "TAILORBIRD", "method": "glora"} if own else {"peft_type": "GLORA"}
    body = split(card(origin(), kind, "demo"))[1]
    assert [language for language, _ in blocks(body)] == ["python", "sh"]
    assert blocks(body)[1][1].startswith("tailorbird adapters merge demo")
    assert "serve demo" not in body


def test_kinds_that_are_said_to_be_served_are() -> None:
    assert set(SERVED) == set(KINDS) - {PEFT_TYPE}
    assert "serve" not in split(card(origin(), CONFIG | {"peft_type": "LOHA"}, "demo"))[1]


def test_a_base_on_this_machine_is_not_named_as_one_of_the_hubs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "base_model" in split(card(origin(), CONFIG, "models/small"))[0]
    (tmp_path / "models" / "small").mkdir(parents=True)
    for name in ("models/small", str(tmp_path), "demo", "./models/small"):
        assert "base_model" not in split(card(origin(), CONFIG, name))[0]


@pytest.mark.parametrize(
    ("stated", "fields"),
    [
        ("MIT", {"license": "mit"}),
        ("Our Licence: free\nfor all", {"license": "other", "license_name": "Our Licence: free\nfor all"}),
        (None, {}),
    ],
)
def test_the_bases_licence_is_named_as_the_hub_knows_it(stated: str | None, fields: dict[str, str]) -> None:
    found, _ = split(card(origin(base_licence=stated), CONFIG, "a/b"))
    assert {name: value for name, value in found.items() if name.startswith("license")} == fields


def test_everything_that_decides_the_adapter_is_said() -> None:
    _, body = split(card(origin(), CONFIG, "models/python-8m"))
    for fact in (
        "5f" * 32, "a7" * 32, "12,345", "2,345,678", "1,234,567", "data/train.jsonl", "chat", "2.5000",
        "1.5000", "cosine", "adamw", "- rank: `8`", "- alpha: `16.0`", "q_proj, v_proj", "0.1.0",
    ):  # fmt: skip
        assert fact in body, fact


def test_losses_that_are_not_known_are_not_made_up() -> None:
    _, body = split(card(origin(loss_before=None, loss_after=None), CONFIG, "a/b"))
    assert "Held-out loss" not in body
    assert "No examples were held out" in body


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_leaves_its_place(name: str) -> None:
    found = origin(base_licence=name, base_name=name, tailorbird=name)
    found["data"]["source"] = name
    found["method"]["method_settings"] = {name: name}
    found["method"]["method"] = name
    fields, body = split(card(found, CONFIG, name))
    assert set(fields) <= {"library_name", "pipeline_tag", "license", "license_name", "tags"}
    assert [language for language, _ in blocks(body)] == ["python", "sh", "sh"]
    assert re.findall(r"^#+ (\w+)", re.sub(r"^(`{3,}).*?^\1$", "", body, flags=re.M | re.S), re.M) == [
        "Adapter", "Base", "Data", "Settings", "Use",
    ]  # fmt: skip
    outside = re.sub(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", "", body, flags=re.DOTALL)
    assert "<" not in outside
    assert "](" not in outside.replace("[PEFT](https://huggingface.co/docs/peft)", "")
    assert "\x1b" not in outside


@pytest.mark.parametrize("name", HOSTILE)
def test_code_means_the_base_whatever_it_is_called(name: str) -> None:
    (_, load), (_, serve), (_, merge) = blocks(card(origin(), CONFIG, name))
    calls = [node for node in ast.walk(ast.parse(load)) if isinstance(node, ast.Call)]
    assert [ast.literal_eval(call.args[0]) for call in calls if len(call.args) == 1] == [name]
    named = name.encode("utf-8", "replace").decode()
    assert shlex.split(serve) == ["tailorbird", "serve", named, "--adapter", "tuned=path/to/adapter"]
    assert shlex.split(merge)[:4] == ["tailorbird", "adapters", "merge", named]


@pytest.mark.parametrize("changes", [{"peft_type": "VERA"}, {"use_dora": True}])
def test_what_tailorbird_cannot_merge_is_merged_by_peft(changes: dict[str, Any]) -> None:
    body = card(origin(), CONFIG | changes, "a/b")
    assert "adapters merge" not in body
    assert "merge_and_unload" in body


def test_the_same_tuning_has_the_same_card() -> None:
    assert card(origin(), CONFIG, "a/b") == card(origin(), CONFIG, "a/b")
