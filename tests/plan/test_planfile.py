"""A plan survives the file unchanged, a hand-written one is read, and a broken one is answered in words."""

from __future__ import annotations

import os
import random
import re
import tracemalloc

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tailorbird.errors import SettingsError
from tailorbird.formats.packed import CodebookCoding, FloatCoding, IntegerCoding, TableCoding, stored_bytes
from tailorbird.plan.planfile import Plan, load_plan, save_plan
from tailorbird.plan.yaml_file import MAX_BYTES


def place(index, bits=4, **changes):
    return {
        "name": f"model.layers.{index}.mlp.up_proj",
        "role": "up",
        "block": index,
        "shape": [688, 256],
        "coding": {
            "kind": "integer", "bits": bits, "group_size": 64, "symmetric": False, "scale_dtype": "float16",
        },
        "bytes": stored_bytes(IntegerCoding(bits, 64), 688, 256),
        "predicted": {"error": 0.01234, "kl": 1e-7},
        "measured": {"error": 0.0131},
        **changes,
    }  # fmt: skip


def full_plan(**changes):
    text = {
        "source": "/texts/a: b.txt", "fingerprint": "00ff", "tokens": 65536, "sequences": 128, "length": 512,
        "documents": 99, "licence": "PSF",
    }  # fmt: skip
    return {
        "schema": 1,
        "tailorbird": "0.1.0",
        "source": {
            "model": "demo", "fingerprint": "12e5", "content_hash": "0x12", "architecture": "llama",
            "parameters": 4_000_000, "licence": None,
        },
        "budget": {"text": "60%", "total_bytes": 5_000_000, "kv_bytes": 0, "context": None, "concurrency": 1},
        "method": {"name": "gptq", "block_size": 128, "damping": 0.01, "act_order": True},
        "target": "gguf",
        "calibration": text,
        "evaluation": text,
        "machine": {"processor": "no", "cores": 2, "system": "Linux x86_64"},
        "versions": {"torch": "2.13.0+cpu", "python": "3.11"},
        "seed": 0,
        "folds": [
            {"norm": "model.layers.0.norm", "linears": ["a", "b"], "scales_file": "folds.safetensors"},
            {"source": "model.layers.0.up_proj", "linears": ["c"]},
        ],
        "result": {"kl_mean": 1e-05, "perplexity_after": float("inf"), "predicted": {"kl": 2.5}},
        "places": [
            *(place(i) for i in range(3)),
            place(3, coding={"kind": "float", "dtype": "float32"}, bytes=704512),
        ],
        **changes,
    }  # fmt: skip


def load_text(tmp_path, text):
    path = tmp_path / "plan.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return load_plan(path)


def saved(tmp_path, **changes):
    path = tmp_path / "saved.yaml"
    save_plan(Plan.model_validate(full_plan(**changes)), path)
    return path.read_text("utf-8")


MINIMAL = "places: [{name: a, coding: {kind: float}}]\n"


def test_a_plan_comes_back_as_it_was_saved(tmp_path):
    plan = Plan.model_validate(full_plan())
    assert load_text(tmp_path, saved(tmp_path)) == plan
    assert dict(plan.method)["damping"] == 0.01
    assert plan.codings()["model.layers.0.mlp.up_proj"] == IntegerCoding(4, 64, scale_dtype="float16")
    assert plan.codings()["model.layers.3.mlp.up_proj"] == FloatCoding("float32")


def test_saving_what_was_loaded_gives_the_same_bytes(tmp_path):
    text = saved(tmp_path)
    save_plan(load_text(tmp_path, text), tmp_path / "again.yaml")
    assert (tmp_path / "again.yaml").read_text("utf-8") == text
    assert sorted(os.listdir(tmp_path)) == [
        "again.yaml",
        "plan.yaml",
        "saved.yaml",
    ]  # nothing unfinished is left


LIKE_A_NUMBER = r"[-+]?[0-9_]{1,3}[.:eE]?[-+]?[0-9]{0,3}|\.inf|\.nan|~|[Nn]ull|[Yy]es"
TEXT = st.text(st.characters(codec="utf-8"), max_size=12) | st.from_regex(LIKE_A_NUMBER, fullmatch=True)
SCALARS = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | TEXT


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        TEXT, SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(TEXT, SCALARS, max_size=3)
    )
)
def test_every_value_survives_the_file(tmp_path_factory, machine):
    path = tmp_path_factory.mktemp("plan") / "plan.yaml"
    save_plan(Plan.model_validate(full_plan(machine=machine)), path)
    assert load_plan(path).machine == machine


def test_other_yaml_readers_see_the_same_values(tmp_path):
    data = yaml.safe_load(saved(tmp_path))
    assert data["places"][0] == place(0)
    assert data["schema"] == 1


def test_each_coding_stands_on_one_line(tmp_path):
    lines = saved(tmp_path).splitlines()
    codings = [line for line in lines if re.fullmatch(r"  coding: \{kind: .*\}", line)]
    assert len(codings) == 4
    assert lines[0].startswith("#")


def test_a_few_lines_written_by_hand_are_a_plan(tmp_path):
    plan = load_text(
        tmp_path,
        "places:\n"
        "- {name: a, coding: {kind: integer, bits: 3, group_size: 0}}\n"
        "- {name: b, coding: {kind: float}, shape: [4, 8]}\n"
        "- {name: c, coding: {kind: codebook, codebook: nf4, group_size: 32}, shape: [4, 96]}\n"
        "- {name: d, coding: {kind: table, bits: 3}, shape: [4, 96]}\n",
    )
    assert plan.codings() == {
        "a": IntegerCoding(3, 0), "b": FloatCoding(), "c": CodebookCoding("nf4", 32), "d": TableCoding(3)
    }  # fmt: skip
    assert [p.bytes for p in plan.places] == [None, 64, 4 * (48 + 3 * 2), 4 * (36 + 8 * 2)]
    save_plan(plan, tmp_path / "again.yaml")
    assert load_plan(tmp_path / "again.yaml") == plan


def test_integers_edited_to_a_codebook_lose_what_was_measured(tmp_path):
    text = saved(tmp_path)
    coding = "{kind: integer, bits: 4, group_size: 64, symmetric: false, scale_dtype: float16}"
    assert coding in text
    edited = load_text(tmp_path, text.replace(coding, "{kind: codebook, codebook: nf4, group_size: 64}", 1))
    assert edited.places[0].bytes == stored_bytes(CodebookCoding("nf4", 64), 688, 256)
    assert edited.places[0].measured is None


def test_numbers_may_be_written_as_people_write_them(tmp_path):
    plan = load_text(tmp_path, "method: {name: gptq, damping: 1e-2, power: 2E3, text: '1e-2'}\n" + MINIMAL)
    assert plan.method.model_dump() == {"name": "gptq", "damping": 0.01, "power": 2000.0, "text": "1e-2"}


def test_an_edited_coding_is_counted_anew_and_loses_what_was_measured_for_the_old_one(tmp_path):
    text = saved(tmp_path)
    edited = load_text(tmp_path, text.replace("bits: 4", "bits: 8", 1))
    assert edited.places[0].coding.bits == 8
    assert edited.places[0].bytes == stored_bytes(IntegerCoding(8, 64), 688, 256)
    assert edited.places[0].predicted is None
    assert edited.places[0].measured is None
    assert edited.places[1] == load_text(tmp_path, text).places[1]
    assert edited.places[1].measured is not None


def test_bytes_with_a_stored_order_are_right_too(tmp_path):
    with_order = stored_bytes(IntegerCoding(4, 64), 688, 256, has_order=True)
    plan = load_text(tmp_path, saved(tmp_path, places=[place(0, bytes=with_order)]))
    assert plan.places[0].bytes == with_order
    assert plan.places[0].measured is not None


BOMB = "a: &a [x, x]\n" + "".join(
    f"{c}: &{c} [*{p}, *{p}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds nothing"),
        ("- 1", "holds a list"),
        ("places: [", "line"),
        ("places: []", "`places`"),
        ("schema: 1", "lacks `places`"),
        ("schema: 2\n" + MINIMAL, "version of tailorbird that wrote it"),
        ("schema: true\n" + MINIMAL, "`schema`"),
        ("sead: 1\n" + MINIMAL, "did you mean `seed`"),
        ("budget: {kv_byte: 1}\n" + MINIMAL, r"`budget\.kv_byte`.*did you mean `kv_bytes`"),
        ("places: [{nam: b, coding: {kind: float}}]", r"`places\[0\]\.nam`.*`name`"),
        ("places: [{name: a}]", r"lacks `places\[0\]\.coding`"),
        ("places: [{name: a, coding: {bits: 4}}]", r"lacks `kind` at `places\[0\]\.coding`"),
        ("places: [{name: a, coding: {kind: lattice}}]", "unknown kind 'lattice'"),
        ("places: [{name: a, coding: {kind: integer, bits: 7, group_size: 64}}]", "7.*one of 2, 3, 4"),
        ("places: [{name: a, coding: {kind: integer, bits: 4, group_size: 65}}]", r"places\[0\]\.coding.*65"),
        ("places: [{name: a, coding: {kind: integer, bits: '4', group_size: 64}}]", r"coding\.bits.*'4'"),
        ("places: [{name: a, coding: {kind: integer, bitz: 4, group_size: 64}}]", "did you mean `bits`"),
        ("places: [{name: a, coding: {kind: codebook, codebook: nf5, group_size: 64}}]", "'nf5'.*one of nf4"),
        ("places: [{name: a, coding: {kind: table, bits: 5}}]", "bits 5.*one of 2, 3, 4"),
        ("places: [{name: a, coding: {kind: table, bits: 3, group_size: 64}}]", "group_size"),
        ("places: [{name: a, coding: {kind: binary, group_size: 65}}]", r"places\[0\]\.coding.*65"),
        ("places: [{name: a, coding: {kind: binary, group_size: 64, bits: 2}}]", "bits"),
        ("places: [{name: a, coding: {kind: codebook, group_size: 64}}]", r"lacks .*coding\.codebook"),
        ("places: [{name: a, coding: {kind: codebook, codebok: nf4}}]", "did you mean `codebook`"),
        ("places: [{name: a, coding: {kind: codebook, codebook: nf4, group_size: 64, bits: 4}}]", "bits"),
        ("places: [{name: a, coding: {kind: float, dtype: int8}}]", "int8"),
        (MINIMAL + "- {name: a, coding: {kind: float}}\n", "not YAML"),
        (2 * "- {name: a, coding: {kind: float}}\n", "holds a list"),
        ("places:\n" + 2 * "- {name: a, coding: {kind: float}}\n", "`a` at places.0. and again"),
        ("places: [{name: 3, coding: {kind: float}}]", r"`places\[0\]\.name`"),
        ("places: [{name: a, coding: {kind: float}, shape: [0, 4]}]", r"`places\[0\]\.shape\[0\]` of `a`"),
        ("places: [{name: a, coding: {kind: float}, predicted: {kl: .nan}}]", r"predicted\.kl"),
        ("seed: -1\n" + MINIMAL, "`seed` -1"),
        ("seed: 1.0\n" + MINIMAL, "`seed` 1.0"),
        ("target: ggml\n" + MINIMAL, "gguf"),
        ("folds: [{linears: [a]}]\n" + MINIMAL, r"`folds\[0\]`.*either `norm` or `source`"),
        ("folds: [{norm: n, source: v, linears: [a]}]\n" + MINIMAL, "either `norm` or `source`"),
        ("versions: {torch: 2.13}\n" + MINIMAL, "`versions.torch`"),
        ("seed: " + "9" * 5000 + "\n" + MINIMAL, "digits"),
        ("seed: 1\nseed: 2\n" + MINIMAL, "twice"),
        ("1: 2\n" + MINIMAL, "the key 1"),
        ("machine: &m {a: 1}\n" + MINIMAL, "anchor `m`"),
        (BOMB + MINIMAL, "anchor `a`"),
        ("machine: !!python/object/apply:os.system [ls]\n" + MINIMAL, "tag"),
        ("machine: !!binary aGk=\n" + MINIMAL, "tag"),
        ("machine: " + "[" * 5000, "nested"),
        (MINIMAL + "---\n" + MINIMAL, "second document"),
        (b"\xff\xfe", "UTF-8"),
        ("seed: \x00\n", "not YAML"),
    ],
)  # fmt: skip
def test_mistakes_are_named_with_their_field(tmp_path, text, says):
    with pytest.raises(SettingsError, match=re.compile(says, re.DOTALL)):
        load_text(tmp_path, text)


def test_files_that_are_no_plan_are_refused(tmp_path):
    with pytest.raises(SettingsError, match="does not exist"):
        load_plan(tmp_path / "none.yaml")
    with pytest.raises(SettingsError, match="not a regular file"):
        load_plan(tmp_path)
    big = tmp_path / "big.yaml"
    with big.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(SettingsError, match="larger than"):
        load_plan(big)


def test_reading_stops_at_the_limit_of_values(tmp_path, monkeypatch):
    monkeypatch.setattr("tailorbird.plan.yaml_file.MAX_VALUES", 5000)
    text = MINIMAL + "machine: [" + "1," * 200_000 + "]"
    tracemalloc.start()
    try:
        with pytest.raises(SettingsError, match="too many"):
            load_text(tmp_path, text)
        assert tracemalloc.get_traced_memory()[1] < 6 * len(text)
    finally:
        tracemalloc.stop()


SPLICES = [
    b"", b"&a ", b"*a", b"!!python/name:os.system ", b"[", b"{", b"}", b"]", b": ", b"- ", b"\n", b"\t",
    b"\x00", b"\xff", b"null", b".nan", b"1e999", b"-1", b"99999999999999999999", b"'", b'"', b"|", b">",
    b"---\n",    b"<<: ", b"? ", b"#", b"@", b"`", b"%YAML 1.1\n", "\u2028é😀".encode(), b"true", b"0x1f",
    b"kind: float", b"schema: 3\n",
]  # fmt: skip


def mutate(text: bytes, chance: random.Random) -> bytes:
    """A few random changes: bytes replaced, pieces removed, doubled or overwritten by YAML's own marks."""
    for _ in range(chance.randint(1, 4)):
        a, b = sorted(chance.randrange(len(text) + 1) for _ in range(2))
        b = min(b, a + chance.choice([1, 5, 40, 400]))
        kind = chance.random()
        if kind < 0.25:
            text = text[:a] + bytes([chance.randrange(256)]) + text[a + 1 :]
        elif kind < 0.45:
            text = text[:a] + text[b:]
        elif kind < 0.6:
            text = text[:b] + text[a:b] + text[b:]
        else:
            text = text[:a] + chance.choice(SPLICES) + text[b if kind < 0.8 else a :]
    return text


@pytest.mark.parametrize("count", [100, pytest.param(2000, marks=pytest.mark.full)])
def test_mutated_plans_are_read_or_refused(tmp_path, count):
    chance = random.Random(count)
    whole = saved(tmp_path).encode()
    refused = 0
    for _ in range(count):
        text = mutate(whole, chance)
        try:
            plan = load_text(tmp_path, text)
        except SettingsError:
            refused += 1
            continue
        save_plan(plan, tmp_path / "again.yaml")  # whatever is accepted can be written and read
        assert load_plan(tmp_path / "again.yaml").codings() == plan.codings()
    assert refused > count / 4
