"""Grammars: whatever the logits, text that ends is text that fits; what nothing fits is refused."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tailorbird.errors import SettingsError
from tailorbird.model.load import load_tokenizer
from tailorbird.model.location import locate
from tailorbird.serve.grammar import CACHE_BYTES, MOST_TEXT, Compiler, Matcher
from tailorbird.serve.request import Grammar, Sampling
from tailorbird.serve.sampling import Sampler, choose

pytestmark = pytest.mark.skipif(importlib.util.find_spec("xgrammar") is None, reason="without xgrammar")

#: More than the tokenizer knows, and no multiple of 32.
PADDING = 37


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(locate("demo"))


@pytest.fixture(scope="module")
def compiler(tokenizer: Any) -> Compiler:
    return Compiler(tokenizer, len(tokenizer) + PADDING)


def written(compiler: Compiler, tokenizer: Any, grammar: Grammar, seed: int, most: int = 400) -> str | None:
    """Text from random logits that lean to an end; None where it has none by `most` tokens."""
    end = tokenizer.eos_token_id
    matcher = compiler.matcher(grammar, {end})
    sampler = Sampler(Sampling(grammar=grammar), (), {end}, compiler.vocab_size, seed, matcher)
    generator = torch.Generator().manual_seed(seed)
    closing = [tokenizer.convert_tokens_to_ids(mark) for mark in '"}],@.']
    tokens: list[int] = []
    for _ in range(most):
        logits = torch.randn(1, compiler.vocab_size, generator=generator) * 2
        logits[0, end] += 8
        logits[0, closing] += 6
        token = choose(logits, [sampler])[0].token
        assert matcher.complete or token != end
        sampler.accept(token)
        if sampler.finished:
            assert token == end
            return str(tokenizer.decode(tokens))
        assert token < len(tokenizer)
        tokens.append(token)
    return None


@pytest.mark.parametrize(
    ("least", "most"), [(0, 128), (0, 129), (5, 300), (150, None), (200, 450), (256, 256)]
)
def test_strings_have_the_length_that_is_asked_for(
    compiler: Compiler, tokenizer: Any, least: int, most: int | None
) -> None:
    schema = {"type": "string", "minLength": least} | ({} if most is None else {"maxLength": most})
    matcher = compiler.matcher(Grammar("json_schema", json.dumps(schema)), {tokenizer.eos_token_id})
    lengths = {0, 1, least, least + 1, 128, 256, 700, *((most, most + 1) if most else ())}
    for length in sorted(lengths | {max(0, least - 1)}):
        text, string = matcher.copy(), json.dumps("é" * length, ensure_ascii=False)
        fits = all(text.accept(token) for token in tokenizer.encode(string)) and text.complete
        assert fits == (least <= length and (most is None or length <= most))


def is_person(value: Any) -> bool:
    return (
        list(value) in (["name", "age", "tags"], ["name", "tags"])
        and isinstance(value["name"], str) and len(value["name"]) <= 12
        and (type(value.get("age", 0)) is int and 0 <= value.get("age", 0) <= 150)
        and isinstance(value["tags"], list) and len(value["tags"]) <= 3
        and all(tag in ("red", "green", None) for tag in value["tags"])
    )  # fmt: skip


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "maxItems": 3, "items": {"enum": ["red", "green", None]}},
    },
    "required": ["name", "tags"],
}


ADDRESSES = r"(\w+@[a-z]+\.(com|org) ?){1,3}"


@pytest.mark.parametrize(
    ("grammar", "fits"),
    [
        (Grammar("json_schema", json.dumps(PERSON)), lambda text: is_person(json.loads(text))),
        (Grammar("json"), lambda text: json.loads(text) is not ...),
        (Grammar("regex", r"[a-c]{2,5}(-\d+)?é?"), re.compile(r"[a-c]{2,5}(-\d+)?é?").fullmatch),
        (Grammar("regex", ADDRESSES), re.compile(ADDRESSES).fullmatch),
        (
            Grammar("ebnf", 'root ::= sum\nsum ::= [0-9] ("+" sum)? | "(" sum ")"'),
            lambda text: text.count("(") == text.count(")") and eval(text) >= 0,
        ),
    ],
    ids=["schema", "json", "regex", "address", "ebnf"],
)
def test_text_that_ends_fits(
    compiler: Compiler, tokenizer: Any, grammar: Grammar, fits: Callable[[str], Any]
) -> None:
    texts = [written(compiler, tokenizer, grammar, seed) for seed in range(12)]
    ended = [text for text in texts if text is not None]
    assert len(ended) >= 6
    assert all(fits(text) for text in ended)


@pytest.mark.parametrize(
    "schema",
    [
        {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "string", "maxLength": 3}},
            "additionalProperties": {"type": "boolean"}, "minProperties": 2, "required": ["b"],
        },
        {"type": "object", "patternProperties": {"^a.*$": {"type": "integer"}}},
        {"type": "object", "propertyNames": {"type": "string", "maxLength": 2}, "maxProperties": 3},
        {"type": "object", "minProperties": 2},
        {"type": "array", "prefixItems": [{"type": "integer"}], "items": {"type": "boolean"}, "maxItems": 4},
        {"type": "array", "minItems": 3},
        {"type": "number", "minimum": -2.5, "exclusiveMaximum": 3.75},
        {"type": "integer", "exclusiveMinimum": -13, "exclusiveMaximum": 1000},
        {"type": "string", "minLength": 2, "maxLength": 4},
        {"type": "string", "pattern": "^[ -~]{2}$"},
        {"type": ["integer", "null", "string"], "minimum": 3, "maxLength": 2},
        {"anyOf": [{"type": "integer", "minimum": 7}, {"type": "array", "items": {"type": "null"}}]},
        {"$defs": {"n": {"items": {"$ref": "#/$defs/n"}, "maxItems": 2}}, "$ref": "#/$defs/n"},
        {"enum": [1, "1", None, [], {"a": 'é"'}, 1.5, True]},
    ],
    ids=lambda schema: json.dumps(schema)[:50],
)  # fmt: skip
def test_a_validator_agrees_that_text_fits_its_schema(
    compiler: Compiler, tokenizer: Any, schema: dict[str, Any]
) -> None:
    validator = pytest.importorskip("jsonschema_rs").Draft202012Validator(schema)
    grammar = Grammar("json_schema", json.dumps(schema))
    texts = [written(compiler, tokenizer, grammar, seed, most=150) for seed in range(20)]
    ended = [text for text in texts if text is not None]
    assert len(ended) >= 5
    for text in ended:
        validator.validate(json.loads(text))


KEYWORDS = st.sampled_from(
    ["type", "properties", "items", "minLength", "pattern", "required", "allOf", "anyOf", "enum", "const",
     "$ref", "minItems", "minimum", "patternProperties", "additionalProperties", "prefixItems", "format",
     "$defs"]
)  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=2)
    | st.sampled_from(["object", "string", "array", "#", "#/$defs/a", "^[a"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(KEYWORDS, inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@given(schema=st.dictionaries(KEYWORDS, VALUES, max_size=4))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_nonsense_in_a_schema_is_compiled_or_refused(compiler: Compiler, schema: dict[str, Any]) -> None:
    with contextlib.suppress(SettingsError):
        assert not compiler.matcher(Grammar("json_schema", json.dumps(schema))).finished


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("json_schema", '{"type": "integer", "minimum": 5, "maximum": 1}'),
        Grammar("json_schema", '{"type": "object", "properties": {"a": false}, "required": ["a"]}'),
        Grammar("json_schema", '{"enum": []}'),
        Grammar("json_schema", "false"),
        Grammar("json_schema", '{"type": "nothing"}'),
        Grammar("json_schema", "{"),
        Grammar("json_schema", '{"$ref": "#/$defs/a"}'),
        Grammar("regex", "("),
        Grammar("regex", r"(a)\1"),
        Grammar("regex", r"[^\s\S]"),
        Grammar("regex", "\ud800"),
        Grammar("ebnf", "root ::= root"),
        Grammar("ebnf", "root ::= other"),
        Grammar("ebnf", ""),
        Grammar("regex", "a" * (MOST_TEXT["regex"] + 1)),
    ],
)
def test_what_nothing_fits_and_what_is_no_grammar_is_refused(compiler: Compiler, grammar: Grammar) -> None:
    with pytest.raises(SettingsError) as caught:
        compiler.matcher(grammar)
    assert ".cc:" not in str(caught.value)


def allowed(matcher: Matcher, vocab_size: int) -> set[int]:
    bits = matcher.mask()
    if bits is None:
        return set(range(vocab_size))
    return {t for t in range(vocab_size) if int(bits[t // 32]) >> t % 32 & 1}


def test_exactly_what_the_mask_allows_is_accepted(compiler: Compiler, tokenizer: Any) -> None:
    matcher = compiler.matcher(Grammar("regex", "(ab|a){1,3}"))
    for token in tokenizer("aaba")["input_ids"][:2]:
        assert matcher.accept(token)
    may = allowed(matcher, compiler.vocab_size)
    taken = {t for t in range(compiler.vocab_size) if matcher.copy().accept(t)}
    assert may == taken
    assert not matcher.accept(-1)
    assert not matcher.accept(compiler.vocab_size)


def test_tokens_taken_back_leave_no_trace(compiler: Compiler, tokenizer: Any) -> None:
    matcher = compiler.matcher(Grammar("regex", "[0-9]{1,3}"))
    digit, end = tokenizer.convert_tokens_to_ids("7"), tokenizer.eos_token_id
    start = allowed(matcher, compiler.vocab_size)
    assert end not in start
    assert matcher.accept(digit)
    one = allowed(matcher, compiler.vocab_size)
    assert end in one
    assert matcher.accept(digit)
    assert matcher.accept(end)
    assert matcher.finished
    assert allowed(matcher, compiler.vocab_size) == set()
    assert not matcher.accept(digit)
    matcher.rollback(2)
    assert not matcher.finished
    assert allowed(matcher, compiler.vocab_size) == one
    for count in (2, -1):
        with pytest.raises(ValueError):
            matcher.rollback(count)
    matcher.rollback(1)
    assert allowed(matcher, compiler.vocab_size) == start


def test_copies_go_their_own_ways(compiler: Compiler, tokenizer: Any) -> None:
    a, b = (tokenizer.convert_tokens_to_ids(c) for c in "ab")
    matcher = compiler.matcher(Grammar("regex", "aa|ab"))
    assert matcher.accept(a)
    copy = matcher.copy()
    assert copy.accept(b)
    assert copy.complete
    assert not matcher.complete
    assert matcher.accept(a)
    copy.rollback(2)
    assert copy.accept(a)


def test_ordinary_tokens_can_end_a_text_but_not_be_in_it(compiler: Compiler, tokenizer: Any) -> None:
    a, b = (tokenizer.convert_tokens_to_ids(c) for c in "ab")
    matcher = compiler.matcher(Grammar("regex", "[ab]+"), {b})
    assert b not in allowed(matcher, compiler.vocab_size)
    assert matcher.accept(a)
    assert b in allowed(matcher, compiler.vocab_size)
    assert tokenizer.eos_token_id not in allowed(matcher, compiler.vocab_size)
    assert matcher.accept(b)
    assert matcher.finished


def test_an_accepted_token_must_be_allowed(compiler: Compiler, tokenizer: Any) -> None:
    grammar = Grammar("regex", "a+")
    sampler = Sampler(Sampling(grammar=grammar), (), (), compiler.vocab_size, 0, compiler.matcher(grammar))
    with pytest.raises(ValueError, match="grammar"):
        sampler.accept(tokenizer.convert_tokens_to_ids("b"))
    assert sampler.length == 0


def test_compiled_grammars_are_kept_within_bounds(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bound = 200_000
    monkeypatch.setattr("tailorbird.serve.grammar.CACHE_BYTES", bound)
    compiler = Compiler(tokenizer, len(tokenizer))
    sizes = []
    for count in range(1, 60):
        compiler.matcher(Grammar("regex", f"[a-z]{{{count}}}x\\w+[0-9]*"))
        sizes.append(compiler.cached_bytes)
    assert sizes[0] > 0
    assert max(sizes) <= 1.5 * bound < CACHE_BYTES  # xgrammar lets the newest one in first
    assert sizes[0] * len(sizes) > bound


def test_without_xgrammar_the_extra_is_named(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    with pytest.raises(SettingsError, match=r"tailorbird\[serve\]"):
        Compiler(tokenizer, len(tokenizer))


def test_python_goes_on_while_a_heavy_pattern_is_compiled(compiler: Compiler) -> None:
    heavy = Grammar("regex", "(a|b|c|[a-z0-9]|\\w)?" * 80)
    compiled = threading.Event()

    def compile() -> None:
        compiler.matcher(heavy)
        compiled.set()

    thread = threading.Thread(target=compile)
    longest, turns = 0.0, 0
    began = last = time.monotonic()
    thread.start()
    while not compiled.wait(0.001):
        now = time.monotonic()
        longest, turns, last = max(longest, now - last), turns + 1, now
    thread.join()
    assert turns > 20
    assert longest < (last - began) / 2
