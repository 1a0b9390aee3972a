"""What the header of a safetensors file says, believed only when it fits the file.

Each header is read by a scanner of its own, not by a JSON library, because a hostile one would take
some thirty times its size as Python objects. Bodies are read in `weights.py`.

The format is described at https://huggingface.co/docs/safetensors: 8 bytes little-endian length,
a JSON header, then the bodies without holes.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tailorbird.errors import CheckpointError
from tailorbird.model.json_file import parse_json

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

#: bytes; the limit that the format itself sets for a header
MAX_HEADER = 100_000_000
#: bytes of one tensor's entry in the header; a real one takes about 120
MAX_ENTRY = 4096
#: bytes of one string of the metadata
MAX_METADATA_STRING = 1 << 18
MAX_NAME = 512
MAX_DIMENSIONS = 16

HASH_PREFIX = "sha256:"
_REMEDY = "download the file again, or save the model anew with `save_pretrained`"

_SPACE = re.compile(rb"[ \t\r\n]*+")
_STRING = re.compile(rb'"[^"\\\x00-\x1f]*+(?:\\.[^"\\\x00-\x1f]*+)*+"')
_FLAT_OBJECT = re.compile(rb"\{[^{}]*+\}")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a header says about one tensor.

    Attributes
    ----------
    name : str
    dtype : torch.dtype
        As stored.
    shape : tuple of int
    nbytes : int
        Bytes of the body.
    file : Path
        The shard that holds it.
    offset : int
        Where the body begins, in bytes from the start of the file.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    file: Path
    offset: int


@dataclass(frozen=True)
class Header:
    """One file's tensors, recorded hashes, and the SHA-256 of the header's own bytes.

    Attributes
    ----------
    tensors : dict of str to TensorInfo
    hashes : dict of str to bytes
        SHA-256 of the bodies by tensor name; empty, or complete.
    digest : bytes
    size : int
        Bytes of the whole file.
    """

    tensors: dict[str, TensorInfo]
    hashes: dict[str, bytes]
    digest: bytes
    size: int


def damaged(file: Path, problem: str, expected: str) -> CheckpointError:
    """The error for a file whose content is wrong."""
    return CheckpointError(f"{file}: {problem}", expected, _REMEDY)


class _Scanner:
    """Walks over the JSON of a header without building more of it than one entry at a time.

    A hostile header of brackets or empty entries would take some thirty times its size as Python
    objects; here the entries are counted against the file's size as they come.
    """

    def __init__(self, file: Path, data: bytes) -> None:
        self.file = file
        self.data = data
        self.position = 0

    def refuse(self, problem: str) -> CheckpointError:
        return damaged(self.file, f"header: {problem}", "a JSON object with one entry per tensor")

    def mark(self, allowed: bytes) -> bytes:
        """Skip white space and take one of the bytes in `allowed`."""
        skipped = _SPACE.match(self.data, self.position)
        self.position = skipped.end() if skipped else self.position
        found = self.data[self.position : self.position + 1]
        if not found or found not in allowed:
            raise self.refuse(f"byte {self.position} is {found!r} where one of {allowed!r} should stand")
        self.position += 1
        return found

    def string(self, limit: int) -> str:
        self.mark(b'"')
        match = _STRING.match(self.data, self.position - 1)
        if match is None:
            raise self.refuse(
                f"the string at byte {self.position - 1} has no end or holds control characters"
            )
        if match.end() - match.start() - 2 > limit:
            raise self.refuse(f"the string at byte {match.start()} is longer than {limit} bytes")
        self.position = match.end()
        return self._parse(match.start(), match.end())

    def flat_object(self, limit: int) -> Any:
        self.mark(b"{")
        start = self.position - 1
        match = _FLAT_OBJECT.match(self.data, start)
        if match is None or match.end() - start > limit:
            raise self.refuse(f"the entry at byte {start} is not closed within {limit} bytes")
        self.position = match.end()
        return self._parse(start, match.end())

    def _parse(self, start: int, end: int) -> Any:
        try:
            return parse_json(self.data[start:end].decode("utf-8"))
        except ValueError as error:  # UnicodeDecodeError is one too
            raise self.refuse(f"at byte {start}: {error}") from None

    def members(self, limit: int) -> Iterator[str]:
        """Keys of an object; the caller consumes each value before the next key."""
        self.mark(b"{")
        if self.mark(b'"}') == b"}":
            return
        self.position -= 1
        while True:
            key = self.string(limit)
            self.mark(b":")
            yield key
            if self.mark(b",}") == b"}":
                return

    def end(self) -> None:
        rest = _SPACE.match(self.data, self.position)
        if rest is None or rest.end() != len(self.data):
            raise self.refuse(f"something follows the closing brace at byte {self.position}")


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _entry(file: Path, name: str, entry: dict[str, Any], body: int) -> TensorInfo:
    def refuse(problem: str, expected: str) -> CheckpointError:
        return damaged(file, f"tensor `{name}`: {problem}", expected)

    if set(entry) != {"dtype", "shape", "data_offsets"}:
        raise refuse(f"its entry has the keys {sorted(entry)}"[:200], "dtype, shape and data_offsets")
    label, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    dtype = DTYPES.get(label) if isinstance(label, str) else None
    if dtype is None:
        raise refuse(f"dtype {label!r}"[:200], "one of " + " ".join(DTYPES))
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_is_size, shape)):
        raise refuse(f"shape {shape!r}"[:200], f"a list of at most {MAX_DIMENSIONS} sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise refuse(f"data_offsets {offsets!r}"[:200], "two byte positions")
    start, end = offsets
    nbytes = math.prod(shape) * dtype.itemsize
    # torch multiplies the sizes of an empty tensor too, leaving out the zeros
    if math.prod(size for size in shape if size) >= 1 << 63:
        raise refuse(f"shape {shape}"[:200], "fewer than 2**63 values")
    if end - start != nbytes:
        raise refuse(
            f"its bytes run from {start} to {end}, which are {end - start}",
            f"{nbytes} bytes for {label} {shape}",
        )
    return TensorInfo(name, dtype, tuple(shape), nbytes, file, body + start)


def open_regular(file: Path) -> int:
    """Open a regular file for reading; the descriptor is the caller's to close."""
    try:
        handle = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO would wait for ever
    except FileNotFoundError:
        raise damaged(file, "the file is missing", "every file of the checkpoint") from None
    except OSError as error:
        raise damaged(file, f"cannot be opened ({error.strerror})", "a readable file") from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise damaged(file, "not a regular file", "a safetensors file")
    return handle


def read_header(file: Path) -> Header:
    """Read the header of one safetensors file and check it against the file's size.

    Memory stays below twice the file's size, whatever the file holds.

    Raises
    ------
    CheckpointError
        The file is missing or truncated, or an entry is impossible; names the tensor.
    """
    handle = open_regular(file)
    try:
        size = os.fstat(handle).st_size
        if size < 8:
            raise damaged(file, f"{size} bytes long", "a safetensors file, which has 8 bytes at least")
        length = int.from_bytes(os.pread(handle, 8, 0), "little")
        if length > MAX_HEADER:
            raise damaged(
                file,
                f"its first 8 bytes announce a header of {length} bytes",
                f"a safetensors header of at most {MAX_HEADER} bytes",
            )
        if length > size - 8:
            raise damaged(
                file,
                f"truncated: {length - (size - 8)} bytes of the header are missing",
                f"at least {length + 8} bytes",
            )
        data = os.pread(handle, length, 8)
    except OSError as error:
        raise damaged(file, f"cannot be read ({error.strerror})", "a sound disk") from None
    finally:
        os.close(handle)
    if len(data) != length:
        raise damaged(file, "became shorter while it was read", "a file that nobody is writing")

    body = 8 + length
    # Each entry becomes about 400 bytes of Python objects; see _Scanner.
    most_entries = 4096 + size // 512
    entries = 0
    tensors: dict[str, TensorInfo] = {}
    hashes: dict[str, bytes] = {}
    scanner = _Scanner(file, data)
    metadata_seen = False

    def count() -> None:
        nonlocal entries
        entries += 1
        if entries > most_entries:
            raise scanner.refuse(f"more than {most_entries} entries in a file of {size} bytes")

    for name in scanner.members(MAX_NAME):
        count()
        if name == "__metadata__":
            if metadata_seen:
                raise scanner.refuse("`__metadata__` occurs twice")
            metadata_seen = True
            for key in scanner.members(MAX_METADATA_STRING):
                count()
                value = scanner.string(MAX_METADATA_STRING)
                if key.startswith(HASH_PREFIX):
                    hashed = key.removeprefix(HASH_PREFIX)
                    if hashed in hashes or re.fullmatch("[0-9a-f]{64}", value) is None:
                        raise scanner.refuse(f"`{key[:MAX_NAME]}` is recorded twice or is no SHA-256")
                    hashes[hashed] = bytes.fromhex(value)
        else:
            if not (name and name.isascii() and name.isprintable()):
                raise scanner.refuse(f"a tensor is called {name!r}; names are printable ASCII")
            if name in tensors:
                raise damaged(file, f"tensor `{name}` occurs twice in the header", "one entry per tensor")
            tensors[name] = _entry(file, name, scanner.flat_object(MAX_ENTRY), body)
    scanner.end()

    position, before = body, ""
    for info in sorted(tensors.values(), key=lambda info: (info.offset, info.nbytes)):
        if info.offset != position:
            problem = "overlaps" if info.offset < position else "leaves a hole after"
            raise damaged(
                file,
                f"tensor `{info.name}` {problem} " + (f"`{before}`" if before else "the header"),
                "bodies that follow each other",
            )
        position, before = info.offset + info.nbytes, info.name
    if position > size:
        raise damaged(file, f"truncated: {position - size} bytes are missing", f"{position} bytes")
    if position < size:
        raise damaged(file, f"{size - position} bytes follow the last tensor", f"{position} bytes")
    unknown = hashes.keys() - tensors.keys()
    if unknown:
        raise scanner.refuse(f"a hash is recorded for `{min(unknown)[:MAX_NAME]}`, which is not in the file")
    if hashes and len(hashes) < len(tensors):
        missing = min(tensors.keys() - hashes.keys())
        raise scanner.refuse(f"hashes are recorded, but none for `{missing}`")
    return Header(tensors, hashes, hashlib.sha256(data).digest(), size)
