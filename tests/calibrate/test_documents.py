"""Documents are read whole and in order, divided without overlap, and what is unusable is named."""

from __future__ import annotations

import json
import logging
import os
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailorbird.calibrate.documents import (
    HEAD,
    SMALLEST_PART,
    Document,
    check_disjoint,
    read_documents,
    split_held_out,
)
from tailorbird.errors import TextError
from tiny import byte_tokenizer

TOKENIZER = byte_tokenizer()
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


def chat_tokenizer(template=TEMPLATE):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8"))
    return path


def texts(path, tokenizer=TOKENIZER, **options):
    return [document.text for document in read_documents(path, tokenizer, **options)]


@given(st.lists(st.sampled_from(["word " * 100, "é" * 500, "", "  ", "x", "\x0c"]), max_size=40))
def test_a_file_alone_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path_factory, lines):
    text = "start\n" + "\n".join(lines)
    path = write(tmp_path_factory.mktemp("text") / "a.txt", text)
    parts = read_documents(path, TOKENIZER)
    assert "".join(part.text for part in parts) == text
    assert [part.part for part in parts] == list(range(len(parts)))
    for part in parts[:-1]:
        assert part.text.splitlines()[-1].strip() == ""
        assert len(part.text.encode()) >= SMALLEST_PART
    assert read_documents(path.parent, TOKENIZER) == parts  # alone in a directory it is alone too
    if len(parts) > 1:
        assert len(parts[-1].text.encode()) >= SMALLEST_PART


def test_every_line_of_jsonl_is_a_document_that_names_its_line(tmp_path):
    path = write(
        tmp_path / "a.jsonl", '{"text": "one\\n\\n"}\n\n{"text": "  "}\r\n{"text": "tw\u2028o", "n": 1}'
    )
    assert read_documents(path, TOKENIZER) == [
        Document("one\n\n", f"{path}, line 1"),
        Document("tw\u2028o", f"{path}, line 4"),
    ]


def test_messages_go_through_the_chat_template(tmp_path):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    path = write(tmp_path / "a.jsonl", json.dumps({"messages": messages}))
    assert texts(path, chat_tokenizer()) == ["<user>hi<assistant>yes"]
    with pytest.raises(TextError, match="no chat template"):
        read_documents(path, TOKENIZER)
    with pytest.raises(TextError, match=r"line 1.*alternate"):
        read_documents(path, chat_tokenizer("{{ raise_exception('roles must alternate') }}"))
    with pytest.raises(TextError, match="line 1: the model's chat template refuses"):
        read_documents(path, chat_tokenizer("{{ ''.__class__.__mro__ }}{{ no.thing.here }}"))


def test_parquet_gives_the_same_documents_as_jsonl(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [f"row {i}" for i in range(600)]
    parquet.write_table(arrow.table({"n": range(600), "text": rows}), tmp_path / "a.parquet")
    found = read_documents(tmp_path / "a.parquet", TOKENIZER)
    assert [document.text for document in found] == rows
    assert found[-1].source.endswith("row 600")
    assert len(texts(tmp_path / "a.parquet", limit_bytes=1)) < 600
    talks = [[{"role": "user", "content": "hi"}]]
    parquet.write_table(arrow.table({"messages": talks}), tmp_path / "b.parquet")
    assert texts(tmp_path / "b.parquet", chat_tokenizer()) == ["<user>hi"]
    parquet.write_table(arrow.table({"body": rows}), tmp_path / "c.parquet")
    with pytest.raises(TextError, match="`body`"):
        read_documents(tmp_path / "c.parquet", TOKENIZER)
    parquet.write_table(arrow.table({"text": ["a", None]}), tmp_path / "d.parquet")
    with pytest.raises(TextError, match="row 2"):
        read_documents(tmp_path / "d.parquet", TOKENIZER)
    whole = (tmp_path / "a.parquet").read_bytes()
    footer = int.from_bytes(whole[-8:-4], "little") + 8
    for broken in (b"PAR1 nonsense", whole[:-20], b"PAR1" + bytes(len(whole) - 4 - footer) + whole[-footer:]):
        with pytest.raises(TextError):
            read_documents(write(tmp_path / "e.parquet", broken), TOKENIZER)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(TextError, match="pip install pyarrow"):
        read_documents(write(tmp_path / "a.parquet", b"PAR1"), TOKENIZER)


def test_a_directory_is_read_in_sorted_order_without_hidden_files(tmp_path, caplog):
    write(tmp_path / "b.txt", "second\n\n" * 1000)
    write(tmp_path / "a.md", "first")
    write(tmp_path / "sub" / "c.PY", "third")
    write(tmp_path / "sub" / "d.jsonl", '{"text": "fourth"}\n{"text": "fifth"}')
    write(tmp_path / ".hidden.txt", "no")
    write(tmp_path / ".git" / "x.txt", "no")
    write(tmp_path / "sub" / "picture.png", b"\x89PNG")
    write(tmp_path / "sub" / "empty.txt", "")
    write(tmp_path / "sub" / "latin.txt", "é".encode("latin-1"))
    os.symlink(tmp_path, tmp_path / "sub" / "loop")
    os.mkfifo(tmp_path / "fifo.txt")
    with caplog.at_level(logging.WARNING):
        assert texts(tmp_path) == ["first", "second\n\n" * 1000, "third", "fourth", "fifth"]
    assert "skipped 1 files" in caplog.text
    assert "latin.txt" in caplog.text


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.txt", "", "is empty"),
        ("a.txt", " \n \n", "is empty"),
        ("a.txt", b"ab\xff", "byte 2 is not UTF-8"),
        ("a.txt", "a".encode("utf-16"), "UTF-8"),
        ("a.doc", "x", "kind `.doc`"),
        ("a.jsn", "x", "kind `.jsn`.*plain text .*jsonl or .parquet"),
        ("README", "x", "kind `none`"),
        ("a.jsonl", "", "is empty"),
        ("a.jsonl", '{"text": "a"}\n{"text": ', "line 2 is not JSON"),
        ("a.jsonl", "[" * 100_000, "line 1 is not JSON"),
        ("a.jsonl", '{"n": ' + "9" * 5000 + "}", "line 1 is not JSON"),
        ("a.jsonl", "[1]", "line 1 holds a list"),
        ("a.jsonl", '{"body": "a"}', "line 1 has `body`"),
        ("a.jsonl", "{}", "no keys"),
        ("a.jsonl", '{"text": "a"}\n{"text": 3}', "line 2: `text` is a int"),
        ("a.jsonl", '{"text": null}', "NoneType"),
        ("a.jsonl", '{"text": "\\ud800"}', "line 1.*surrogate"),
        ("a.jsonl", '{"messages": "hi"}', "no conversation"),
        ("a.jsonl", '{"messages": [{"content": "hi"}]}', "no conversation"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', "line 2: byte"),
    ],
)
def test_unusable_text_is_named(tmp_path, name, data, says):
    with pytest.raises(TextError, match=says):
        read_documents(write(tmp_path / name, data), TOKENIZER)


@pytest.mark.parametrize("name", ["song.mp3", "photo.png", "talk.docx", "table.xlsx", "data.json"])
def test_another_kind_of_file_is_not_taken_for_a_slip_of_the_pen(tmp_path, name):
    write(tmp_path / name, "x")
    with pytest.raises(TextError, match="give another file") as refused:
        read_documents(tmp_path / name, None)
    assert "did you mean" not in str(refused.value)


def test_paths_that_lead_to_no_text_are_named(tmp_path):
    with pytest.raises(TextError, match="does not exist"):
        read_documents(tmp_path / "none.txt", TOKENIZER)
    with pytest.raises(TextError, match="holds no text"):
        read_documents(tmp_path, TOKENIZER)
    write(tmp_path / "a.txt", b"\xff")
    with pytest.raises(TextError, match=r"none could be read.*a\.txt"):
        read_documents(tmp_path, TOKENIZER)
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(TextError, match="not a regular file"):
        read_documents(tmp_path / "pipe.txt", TOKENIZER)
    with pytest.raises(TextError):
        read_documents(tmp_path / ("x" * 5000), TOKENIZER)


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5, 1000, 4097])
def test_no_more_than_the_limit_is_read_and_it_says_so(tmp_path, caplog, limit):
    whole = "é😀" * 20 + "\n" + "line é\n" * 3000
    path = write(tmp_path / "a.txt", whole)
    with caplog.at_level(logging.WARNING):
        try:
            found = "".join(texts(path, limit_bytes=limit))
        except TextError:
            assert limit < 2  # not one character
            return
    assert whole.startswith(found)
    assert limit - 100 < len(found.encode()) <= limit
    assert "read the first" in caplog.text


def test_the_limit_counts_all_files_of_a_directory(tmp_path, caplog):
    for i in range(9):
        write(tmp_path / f"{i}.txt", f"{i}" * 99 + "\n")
    write(tmp_path / "a.jsonl", '{"text": "' + "x" * 500 + '"}')
    assert len(texts(tmp_path)) == 10
    assert sum(len(text) for text in texts(tmp_path, limit_bytes=350)) <= 350
    assert len(texts(tmp_path, limit_bytes=950)) == 9
    assert "read the first" in caplog.text
    with pytest.raises(TextError, match="line 1 is longer"):
        read_documents(tmp_path / "a.jsonl", TOKENIZER, limit_bytes=100)
    path = write(tmp_path / "b.jsonl", '{"text": "a"}\n' * 10)
    assert len(texts(path, limit_bytes=50)) == 3


DOCUMENTS = st.lists(
    st.builds(
        Document,
        st.text("ab", min_size=1, max_size=3) | st.text("é", min_size=400, max_size=900),
        st.just("f"),
    ),
    min_size=2,
    max_size=45,
)


@given(DOCUMENTS)
def test_a_split_loses_nothing_and_shares_nothing(documents):
    if len({document.text.encode()[:HEAD] for document in documents}) == 1:
        with pytest.raises(TextError, match="--evaluation"):
            split_held_out(documents)
        return
    calibration, held_out = split_held_out(documents)
    assert calibration
    assert held_out
    check_disjoint(calibration, held_out)
    assert sorted(map(id, calibration + held_out)) == sorted(map(id, documents))
    for side in (calibration, held_out):
        positions = [next(i for i, d in enumerate(documents) if d is document) for document in side]
        assert positions == sorted(positions)


def test_every_tenth_document_is_held_out():
    documents = [Document(f"document {i:03}", "f") for i in range(100)]
    _, held_out = split_held_out(documents)
    assert held_out == documents[9::10]


def test_further_documents_are_held_out_until_a_tenth_of_the_text_is():
    documents = [Document(f"{i:03}" + "x" * (5 if i % 10 == 9 else 1000), "f") for i in range(100)]
    calibration, held_out = split_held_out(documents)
    share = sum(len(d.text) for d in held_out) / sum(len(d.text) for d in documents)
    assert 0.1 <= share < 0.12
    assert set(documents[9::10]) <= set(held_out)
    assert len(calibration) > 80


def test_one_document_can_not_be_split():
    with pytest.raises(TextError, match="1 document of which none"):
        split_held_out([Document("a", "f")])


def test_a_document_in_both_texts_is_named():
    shared = "é" * HEAD
    calibration = [Document("x", "c, line 1"), Document(shared + "1", "c, line 2")]
    with pytest.raises(TextError, match=r"h, line 7 begins like c, line 2"):
        check_disjoint(calibration, [Document("y", "h, line 6"), Document(shared + "2", "h, line 7")])
    check_disjoint(calibration, [Document("a" + shared, "h, line 8")])
