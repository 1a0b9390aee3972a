"""Text in files: read into documents, and divided into calibration and held-out text.

Plain text, JSON lines and Parquet, alone or in directories. The two sides never share a document. What
a tokenizer makes of the documents stands in `text`.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tailorbird.errors import TextError

READ_LIMIT = 64 << 20  # bytes; far more than calibration and evaluation together use
SMALLEST_PART = 2048  # bytes of a document cut from a longer file
HEAD = 512  # bytes by which two documents are held to be the same

#: endings of plain text files
PLAIN = frozenset(
    {
        ".txt", ".text", ".md", ".rst", ".tex", ".log", ".org", ".csv", ".tsv", ".srt",
        ".html", ".htm", ".css", ".xml", ".svg", ".yaml", ".yml", ".toml", ".ini", ".cfg", ".conf",
        ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".rs", ".go", ".java", ".kt", ".swift",
        ".js", ".ts", ".tsx", ".jsx", ".rb", ".php", ".pl", ".lua", ".r", ".jl", ".hs", ".ml", ".scala",
        ".clj", ".ex", ".erl", ".sh", ".bash", ".sql",
    }
)  # fmt: skip
KNOWN = PLAIN | {".jsonl", ".parquet"}

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Document:
    """One text.

    Attributes
    ----------
    text : str
    source : str
        The file it came from, with the line or row where the file holds several.
    part : int
        Number within a longer text that was cut: part n + 1 goes on directly where part n of the same
        source ends.
    """

    text: str
    source: str
    part: int = 0


def read_documents(path: Path, tokenizer: Any, limit_bytes: int = READ_LIMIT) -> list[Document]:
    """Read all documents of a file or directory.

    A plain text file is one document; where it is the only one, it is cut at blank lines into parts of
    at least 2 KiB, which joined give the text back. ``.jsonl`` holds one document per line, ``.parquet``
    one per row, each with ``text`` or ``messages`` (which go through the tokenizer's chat template). A
    directory stands for all files in it of these kinds, at any depth, in sorted order; hidden ones are
    skipped.

    Parameters
    ----------
    path : Path
    tokenizer : transformers tokenizer
        Used for ``messages`` only.
    limit_bytes : int
        No more than this is read; a logged warning says where reading stopped.

    Raises
    ------
    TextError
        Whatever makes the text unusable, with file and line.
    """
    path = Path(path)
    try:
        is_directory = path.is_dir()
        if not is_directory and not path.is_file():
            state = "is not a regular file" if path.exists() else "does not exist"
            raise TextError(f"text {path} {state}", "a file or directory of text", "check the path")
    except (OSError, ValueError) as error:
        raise TextError(f"text {path}: {error}", "a file or directory of text", "check the path") from None
    if is_directory:
        return _cut_if_alone(_read_directory(path, tokenizer, limit_bytes))
    if path.suffix.lower() not in KNOWN:
        raise TextError(
            f"text {path} of the kind `{path.suffix or 'none'}`",
            "plain text (.txt .md .py ...), .jsonl or .parquet",
            "give another file, or if it is plain text a name that ends in `.txt`",
        )
    documents, _ = _read_file(path, tokenizer, limit_bytes)
    if not documents:
        raise TextError(f"text {path} is empty", "some text", "give another file")
    return _cut_if_alone(documents)


def split_held_out(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """Set every tenth document aside, and further ones until a tenth of the text is held out.

    The text is counted in UTF-8 bytes, so that it is split alike for every tokenizer. Documents that
    begin alike stay on one side, and no more than half is held out where that can be helped.

    Returns
    -------
    calibration, held_out : list of Document
        Both in the order given; `check_disjoint` accepts them.

    Raises
    ------
    TextError
        If nothing is left on one side.
    """
    heads = [_head(document) for document in documents]
    sizes = [len(document.text.encode("utf-8")) for document in documents]
    alike: dict[bytes, list[int]] = {}
    for index, head in enumerate(heads):
        alike.setdefault(head, []).append(index)
    groups = [(members, sum(sizes[i] for i in members)) for members in alike.values()]
    whole = sum(sizes)
    # a group comes when its first every-tenth document does; then those before them: 9 19 ... 8 18 ...
    groups.sort(key=lambda group: min(((9 - i) % 10, i) for i in group[0]))
    held: set[int] = set()
    held_bytes = 0
    for most in (whole // 2, whole):  # more than half only where there is no other way
        for members, size in groups:
            tenth = any(i % 10 == 9 for i in members)
            if not tenth and held and 10 * held_bytes >= whole:
                break
            if held_bytes + size <= most and len(held) + len(members) < len(documents):
                held.update(members)
                held_bytes += size
        if held:
            break
    else:
        raise TextError(
            f"{len(documents)} document{'s' if len(documents) != 1 else ''} of which none can be set aside "
            "to measure on",
            f"at least 2 documents that differ in their first {HEAD} bytes",
            "give more text, or held-out text of its own with --evaluation",
        )
    calibration = [document for i, document in enumerate(documents) if i not in held]
    return calibration, [document for i, document in enumerate(documents) if i in held]


def check_disjoint(calibration: Iterable[Document], held_out: Iterable[Document]) -> None:
    """Refuse two texts that share a document, by its first 512 bytes.

    Raises
    ------
    TextError
        Naming a shared document.
    """
    seen = {_head(document): document for document in calibration}
    for document in held_out:
        twin = seen.get(_head(document))
        if twin is not None:
            raise TextError(
                f"the held-out document {_where(document)} begins like {_where(twin)} "
                "of the calibration text",
                "texts without a common document: quality on text that was calibrated on proves nothing",
                "remove it from one of them",
            )


def _read_directory(path: Path, tokenizer: Any, limit_bytes: int) -> list[Document]:
    documents: list[Document] = []
    unreadable: list[str] = []
    left = limit_bytes
    for file in _files(path):
        if left <= 0:
            _log.warning("text %s: read the first %d bytes, up to %s", path, limit_bytes, file)
            break
        try:
            found, used = _read_file(file, tokenizer, left)
        except _NotText as error:
            unreadable.append(str(error))
            continue
        documents += found
        left -= used
    if unreadable:
        _log.warning("text %s: skipped %d files, such as %s", path, len(unreadable), unreadable[0])
    if not documents:
        raise TextError(
            f"directory {path} holds no text",
            "files with text (.txt .md .py ... .jsonl .parquet)",
            f"none could be read, such as {unreadable[0]}" if unreadable else "give another directory",
        )
    return documents


def _files(directory: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(directory):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            file = Path(folder, name)
            if not name.startswith(".") and file.suffix.lower() in KNOWN and file.is_file():
                yield file


class _NotText(TextError):
    """A file whose bytes are no text; among many files, it is left out."""


def _read_file(path: Path, tokenizer: Any, limit_bytes: int) -> tuple[list[Document], int]:
    """The documents of one file (none where it is empty) and how many bytes were read."""
    try:
        match path.suffix.lower():
            case ".jsonl":
                return _read_jsonl(path, tokenizer, limit_bytes)
            case ".parquet":
                return _read_parquet(path, tokenizer, limit_bytes)
        return _read_plain(path, limit_bytes)
    except OSError as error:
        raise _NotText(
            f"text {path} cannot be read ({error.strerror or error})",
            "a readable file",
            "check its permissions",
        ) from None


def _read_plain(path: Path, limit_bytes: int) -> tuple[list[Document], int]:
    with path.open("rb") as file:
        data = file.read(limit_bytes + 1)
    used = min(len(data), limit_bytes)
    if len(data) > limit_bytes:
        data = data[:limit_bytes]
        data = data[: data.rfind(b"\n") + 1] or data[: -_incomplete(data) or None]
        _log.warning("text %s: read the first %d bytes", path, len(data))
    text = _decode(data, path)
    return ([Document(text, str(path))] if text.strip() else []), used


def _incomplete(data: bytes) -> int:
    """How many bytes at the end belong to a character that was cut off."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte >= 0xC0:  # a first byte, which says how many follow
            return back if back < (2 if byte < 0xE0 else 3 if byte < 0xF0 else 4) else 0
        if byte < 0x80:
            return 0
    return 0


def _decode(data: bytes, path: Path, line: int | None = None) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"{path}, line {line}" if line is not None else f"{path}"
        raise _NotText(
            f"text {where}: byte {error.start} is not UTF-8",
            "text in UTF-8",
            "convert it, for example with iconv",
        ) from None


def _cut_if_alone(documents: list[Document]) -> list[Document]:
    """A single text file in parts of at least 2 KiB that end behind blank lines; joined they are the file."""
    if len(documents) != 1 or Path(documents[0].source).suffix.lower() not in PLAIN:
        return documents
    document = documents[0]
    parts: list[str] = []
    start = position = size = 0
    for line in document.text.splitlines(keepends=True):
        position += len(line)
        size += len(line.encode("utf-8"))
        if size >= SMALLEST_PART and not line.strip():
            parts.append(document.text[start:position])
            start, size = position, 0
    rest = document.text[start:]
    if rest and (size >= SMALLEST_PART or not parts):
        parts.append(rest)
    elif rest:
        parts[-1] += rest
    return [Document(text, document.source, index) for index, text in enumerate(parts)]


def _read_jsonl(path: Path, tokenizer: Any, limit_bytes: int) -> tuple[list[Document], int]:
    documents: list[Document] = []
    used = number = 0
    with path.open("rb") as file:
        while True:
            line = file.readline(limit_bytes - used + 1)
            if not line:
                break
            if used + len(line) > limit_bytes:
                if not documents:
                    raise _NotText(
                        f"text {path}: line {number + 1} is longer than {limit_bytes} bytes",
                        "one document per line",
                        "split it into lines",
                    )
                _log.warning("text %s: read the first %d lines, %d bytes", path, number, used)
                used = limit_bytes
                break
            used += len(line)
            number += 1
            text = _decode(line, path, number)
            if text.strip():
                where = f"{path}, line {number}"
                try:
                    record = json.loads(text)
                except (ValueError, RecursionError) as error:
                    raise TextError(
                        f"text {where} is not JSON ({error})", "one JSON object per line", "correct that line"
                    ) from None
                documents += _document(record, where, tokenizer)
    return documents, used


def _read_parquet(path: Path, tokenizer: Any, limit_bytes: int) -> tuple[list[Document], int]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise TextError(
            f"text {path} is a Parquet file", "the package pyarrow, which reads it", "pip install pyarrow"
        ) from None
    documents: list[Document] = []
    used = row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = [name for name in ("text", "messages") if name in file.schema_arrow.names][:1]
            if not columns:
                names = ", ".join(f"`{name}`" for name in file.schema_arrow.names[:20])
                raise TextError(
                    f"text {path} has the columns {names}",
                    "a column `text` or `messages`",
                    "rename the column",
                )
            for batch in file.iter_batches(batch_size=256, columns=columns):
                for value in batch.column(0).to_pylist():
                    row += 1
                    documents += _document({columns[0]: value}, f"{path}, row {row}", tokenizer)
                used += batch.nbytes
                if used >= limit_bytes and row < file.metadata.num_rows:
                    _log.warning("text %s: read the first %d rows, %d bytes", path, row, used)
                    break
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise TextError(
            f"text {path} is not readable as Parquet ({str(error)[:200]})", "a Parquet file", "write it anew"
        ) from None
    return documents, used


def _document(record: Any, where: str, tokenizer: Any) -> list[Document]:
    """The document of one JSON line or table row; none where it is blank."""
    if not isinstance(record, dict):
        raise TextError(
            f"text {where} holds a {type(record).__name__}",
            "an object with `text` or `messages`",
            "correct it",
        )
    if "text" in record:
        text = record["text"]
        if not isinstance(text, str):
            raise TextError(
                f"text {where}: `text` is a {type(text).__name__}", "a string", "correct or remove it"
            )
    elif "messages" in record:
        text = _conversation(record["messages"], where, tokenizer)
    else:
        keys = ", ".join(f"`{key}`" for key in list(record)[:10]) or "no keys"
        raise TextError(
            f"text {where} has {keys}", "`text` or `messages`", "rename the key that holds the text"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise TextError(
            f"text {where} holds half of a character (a lone surrogate)",
            "Unicode text",
            "correct or remove it",
        ) from None
    return [Document(text, where)] if text.strip() else []


def _conversation(messages: Any, where: str, tokenizer: Any) -> str:
    """A conversation as the model sees it."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) and "role" in m for m in messages):
        raise TextError(
            f"text {where}: `messages` is no conversation",
            'a list of objects such as {"role": "user", "content": "..."}',
            "correct or remove it",
        )
    if getattr(tokenizer, "chat_template", None) is None:
        raise TextError(
            f"text {where} holds `messages`, but the model has no chat template",
            "a model with a chat template, or `text`",
            "write the conversation out as `text`",
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # a template is a program of the model's author and may raise anything
        raise TextError(
            f"text {where}: the model's chat template refuses `messages` ({str(error)[:200]})",
            "a conversation in the roles and order that the model knows",
            "correct or remove it",
        ) from None


def _head(document: Document) -> bytes:
    return document.text[:HEAD].encode("utf-8")[:HEAD]


def _where(document: Document) -> str:
    return f"{document.source}, part {document.part}" if document.part else document.source
