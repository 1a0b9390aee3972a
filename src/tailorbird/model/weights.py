"""The tensors of a checkpoint directory, over all its safetensors shards.

Headers are read and checked here, byte by byte, before anything is believed; bodies are read with
`pread` into fresh memory, never mapped, so that only what is asked for becomes resident.
What the tensors mean is the anatomy's business; writing them is in `writing.py`.

The format is described at https://huggingface.co/docs/safetensors: 8 bytes little-endian length,
a JSON header, then the bodies without holes.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tailorbird.errors import CheckpointError
from tailorbird.model.json_file import parse_json, read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

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
#: bytes read, checked and cast at a time
CHUNK = 4 << 20

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
class _Header:
    tensors: dict[str, TensorInfo]
    hashes: dict[str, bytes]
    digest: bytes
    size: int


def _damaged(file: Path, problem: str, expected: str) -> CheckpointError:
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
        return _damaged(self.file, f"header: {problem}", "a JSON object with one entry per tensor")

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
        return _damaged(file, f"tensor `{name}`: {problem}", expected)

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


def _open(file: Path) -> int:
    try:
        handle = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO would wait for ever
    except FileNotFoundError:
        raise _damaged(file, "the file is missing", "every file of the checkpoint") from None
    except OSError as error:
        raise _damaged(file, f"cannot be opened ({error.strerror})", "a readable file") from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise _damaged(file, "not a regular file", "a safetensors file")
    return handle


def _read_header(file: Path) -> _Header:
    """Read and check the header of one safetensors file against the file's size."""
    handle = _open(file)
    try:
        size = os.fstat(handle).st_size
        if size < 8:
            raise _damaged(file, f"{size} bytes long", "a safetensors file, which has 8 bytes at least")
        length = int.from_bytes(os.pread(handle, 8, 0), "little")
        if length > MAX_HEADER:
            raise _damaged(
                file,
                f"its first 8 bytes announce a header of {length} bytes",
                f"a safetensors header of at most {MAX_HEADER} bytes",
            )
        if length > size - 8:
            raise _damaged(
                file,
                f"truncated: {length - (size - 8)} bytes of the header are missing",
                f"at least {length + 8} bytes",
            )
        data = os.pread(handle, length, 8)
    except OSError as error:
        raise _damaged(file, f"cannot be read ({error.strerror})", "a sound disk") from None
    finally:
        os.close(handle)
    if len(data) != length:
        raise _damaged(file, "became shorter while it was read", "a file that nobody is writing")

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
                raise _damaged(file, f"tensor `{name}` occurs twice in the header", "one entry per tensor")
            tensors[name] = _entry(file, name, scanner.flat_object(MAX_ENTRY), body)
    scanner.end()

    position, before = body, ""
    for info in sorted(tensors.values(), key=lambda info: (info.offset, info.nbytes)):
        if info.offset != position:
            problem = "overlaps" if info.offset < position else "leaves a hole after"
            raise _damaged(
                file,
                f"tensor `{info.name}` {problem} " + (f"`{before}`" if before else "the header"),
                "bodies that follow each other",
            )
        position, before = info.offset + info.nbytes, info.name
    if position > size:
        raise _damaged(file, f"truncated: {position - size} bytes are missing", f"{position} bytes")
    if position < size:
        raise _damaged(file, f"{size - position} bytes follow the last tensor", f"{position} bytes")
    unknown = hashes.keys() - tensors.keys()
    if unknown:
        raise scanner.refuse(f"a hash is recorded for `{min(unknown)[:MAX_NAME]}`, which is not in the file")
    if hashes and len(hashes) < len(tensors):
        missing = min(tensors.keys() - hashes.keys())
        raise scanner.refuse(f"hashes are recorded, but none for `{missing}`")
    return _Header(tensors, hashes, hashlib.sha256(data).digest(), size)


def _shards(directory: Path) -> tuple[list[str], dict[str, str] | None]:
    """Names of the weight files and, where there is an index, its map from tensor to file."""
    if (directory / SINGLE_FILE).exists():
        return [SINGLE_FILE], None
    index = directory / INDEX_FILE
    if not index.exists():
        raise CheckpointError(
            f"{directory} has no weights",
            f"{SINGLE_FILE} or {INDEX_FILE} with its shards",
            "save the model with `save_pretrained(..., safe_serialization=True)`",
        )
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise _damaged(index, "has no `weight_map`", "a `weight_map` from tensor names to files")
    for name, shard in places.items():
        if (
            not isinstance(shard, str)
            or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,250}", shard)
            or not shard.endswith(".safetensors")
        ):
            raise _damaged(
                index,
                f"tensor `{name[:MAX_NAME]}` is said to lie in {shard!r}"[:900],
                "the plain name of a .safetensors file in the same directory",
            )
    return sorted(set(places.values())), places


class Weights:
    """All tensors of a checkpoint, by name.

    Made by `Weights.open`. Nothing but headers is held in memory, and no file is kept open.

    Attributes
    ----------
    directory : Path
    files : list of Path
        The shards, sorted by name.
    names : list of str
        All tensors, sorted.
    total_bytes : int
        Bytes of all bodies; headers are not counted.
    header_digest : str
        SHA-256 over names, sizes and headers of the shards, hex.
    """

    def __init__(self, directory: Path, headers: dict[str, _Header]) -> None:
        self.directory = directory
        self.files = [directory / name for name in sorted(headers)]
        self._infos: dict[str, TensorInfo] = {}
        self._hashes: dict[str, bytes] = {}
        digest = hashlib.sha256()
        for shard in sorted(headers):
            header = headers[shard]
            self._infos |= header.tensors
            self._hashes |= header.hashes
            digest.update(f"{shard}\0{header.size}\0".encode())
            digest.update(header.digest)
        self.names = sorted(self._infos)
        self.total_bytes = sum(info.nbytes for info in self._infos.values())
        self.header_digest = digest.hexdigest()

    @classmethod
    def open(cls, directory: Path) -> Weights:
        """Read and check the headers of all shards in `directory`.

        Parameters
        ----------
        directory : Path
            With `model.safetensors`, or `model.safetensors.index.json` and the shards it names.

        Raises
        ------
        CheckpointError
            A file is missing, truncated or damaged, a tensor has an impossible entry, lies in two
            shards or elsewhere than the index says; names the file and the tensor.
        """
        shards, places = _shards(directory)
        headers: dict[str, _Header] = {}
        found: dict[str, str] = {}
        for shard in shards:
            headers[shard] = header = _read_header(directory / shard)
            for name in header.tensors:
                if name in found:
                    raise _damaged(
                        directory / shard, f"tensor `{name}` lies in `{found[name]}` too", "each tensor once"
                    )
                found[name] = shard
        if places is not None:
            for name, shard in places.items():
                if found.get(name) != shard:
                    where = f"lies in `{found[name]}`" if name in found else "is in no shard"
                    raise _damaged(
                        directory / INDEX_FILE, f"tensor `{name[:MAX_NAME]}` {where}", f"`{shard}` to hold it"
                    )
            for name, shard in found.items():
                if name not in places:
                    raise _damaged(
                        directory / shard, f"tensor `{name}` is not in the index", f"an entry in {INDEX_FILE}"
                    )
        if not found:
            raise _damaged(directory / shards[0], "holds no tensor", "the weights of a model")
        return cls(directory, headers)

    @classmethod
    def open_file(cls, file: Path) -> Weights:
        """The tensors of one safetensors file, whatever else lies beside it; raises as `open`."""
        return cls(file.parent, {file.name: _read_header(file)})

    def __contains__(self, name: object) -> bool:
        return name in self._infos

    def info(self, name: str) -> TensorInfo:
        """What the header says about a tensor; CheckpointError if it is absent."""
        try:
            return self._infos[name]
        except KeyError:
            raise CheckpointError(
                f"{self.directory} has no tensor `{name}`",
                "a tensor of this model",
                "fetch the checkpoint again; a part of it may be lost",
            ) from None

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Read one tensor into fresh memory.

        Parameters
        ----------
        name : str
        dtype : torch.dtype, optional
            Cast to this while reading; the source's own copy never takes more than 4 MiB.

        Returns
        -------
        Tensor
            Contiguous, on the CPU, with the shape of `info(name)`.

        Raises
        ------
        CheckpointError
            The tensor is absent, holds NaN or Inf, doesn't fit into `dtype`, or its file changed.
        """
        info = self.info(name)
        return self._read(info, info.shape, 0, dtype)

    def read_rows(self, name: str, start: int, stop: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Read the rows `start` to `stop` (exclusive) of a tensor: `[stop - start, ...]`; as `read`.

        Raises
        ------
        IndexError
            The rows don't lie within the tensor.
        CheckpointError
            As `read`.
        """
        info = self.info(name)
        if not info.shape or not 0 <= start <= stop <= info.shape[0]:
            raise IndexError(f"rows {start} to {stop} of `{name}`, whose shape is {list(info.shape)}")
        row_bytes = info.nbytes // info.shape[0] if info.shape[0] else 0
        return self._read(info, (stop - start, *info.shape[1:]), start * row_bytes, dtype)

    def hash(self, name: str) -> str:
        """SHA-256 over the stored bytes of one tensor, hex; the body is read in pieces of 4 MiB."""
        digest = hashlib.sha256()
        info = self.info(name)
        buffer = torch.empty(min(CHUNK, info.nbytes), dtype=torch.uint8)
        for _, piece in self._pieces(info, info.offset, info.nbytes, lambda start, n: buffer[:n]):
            digest.update(piece.numpy().data)
        return digest.hexdigest()

    def recorded_hashes(self) -> dict[str, str]:
        """Hashes that the writer recorded: tensor name to SHA-256 in hex; empty if it recorded none."""
        return {name: self._hashes[name].hex() for name in sorted(self._hashes)}

    def verify(self, names: Iterable[str] | None = None) -> None:
        """Compare tensors with their recorded hashes.

        Parameters
        ----------
        names : iterable of str, optional
            Default: every tensor that has a recorded hash.

        Raises
        ------
        CheckpointError
            A body doesn't match its hash, or a tensor asked for by name has none; names the tensor.
        """
        for name in sorted(self._hashes) if names is None else names:
            info = self.info(name)
            if name not in self._hashes:
                raise CheckpointError(
                    f"{info.file}: no hash is recorded for tensor `{name}`",
                    "a checkpoint that tailorbird wrote",
                    "make the checkpoint again, or use it without the check",
                )
            if self.hash(name) != self._hashes[name].hex():
                raise _damaged(
                    info.file,
                    f"the body of tensor `{name}` was changed after it was written",
                    f"bytes with the SHA-256 {self._hashes[name].hex()}",
                )

    def _pieces(
        self, info: TensorInfo, offset: int, nbytes: int, memory: Callable[[int, int], torch.Tensor]
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Fill `memory(start, n)` (uint8 `[n]`) with successive pieces of a body and yield them."""
        handle = _open(info.file)
        try:
            for start in range(0, nbytes, CHUNK):
                piece = memory(start, min(CHUNK, nbytes - start))
                view = piece.numpy().data
                done = 0
                while done < len(view):
                    try:
                        count = os.preadv(handle, [view[done:]], offset + start + done)
                    except OSError as error:
                        raise _damaged(
                            info.file,
                            f"tensor `{info.name}` cannot be read ({error.strerror})",
                            "a sound disk",
                        ) from None
                    if count == 0:
                        raise _damaged(
                            info.file,
                            f"ends within tensor `{info.name}`; it was longer when it was opened",
                            "a file that nobody is writing",
                        )
                    done += count
                yield start, piece
        finally:
            os.close(handle)

    def _read(
        self, info: TensorInfo, shape: tuple[int, ...], skip: int, dtype: torch.dtype | None
    ) -> torch.Tensor:
        source = info.dtype
        target = dtype or source
        count = math.prod(shape)
        nbytes = count * source.itemsize
        result = torch.empty(count * target.itemsize, dtype=torch.uint8)
        values = result.view(target)
        offset = info.offset + skip
        if target == source:
            for start, piece in self._pieces(
                info, offset, nbytes, lambda start, n: result[start : start + n]
            ):
                self._check(info, piece, start + skip)
        else:
            buffer = torch.empty(min(CHUNK, nbytes), dtype=torch.uint8)
            for start, piece in self._pieces(info, offset, nbytes, lambda start, n: buffer[:n]):
                self._check(info, piece, start + skip)
                first = start // source.itemsize
                part = values[first : first + len(piece) // source.itemsize]
                part.copy_(piece.view(source))
                if target.is_floating_point and not _all_finite(part):
                    raise CheckpointError(
                        f"{info.file}: tensor `{info.name}` holds values too large for {target}",
                        f"values that fit; it is stored as {source}",
                        "load the model in a wider dtype",
                    )
        return values.reshape(shape)

    @staticmethod
    def _check(info: TensorInfo, piece: torch.Tensor, position: int) -> None:
        """Refuse NaN and Inf, and booleans that are neither 0 nor 1, in `piece` (uint8)."""
        if info.dtype == torch.bool:
            if len(piece) and int(piece.max()) > 1:
                raise _damaged(info.file, f"tensor `{info.name}` holds booleans other than 0 and 1", "0 or 1")
            return
        if not info.dtype.is_floating_point:
            return
        values = piece.view(info.dtype)
        if not _all_finite(values):
            wide = values.to(torch.float32) if info.dtype.itemsize == 1 else values
            first = int(torch.isfinite(wide).to(torch.uint8).argmin())
            index = position // info.dtype.itemsize + first
            raise _damaged(
                info.file,
                f"tensor `{info.name}` holds {float(wide[first])} at flat index {index}",
                "finite numbers",
            )


def _all_finite(values: torch.Tensor) -> bool:
    if values.dtype.itemsize == 1:
        values = values.to(torch.float32)
    return bool(torch.isfinite(values).all())
