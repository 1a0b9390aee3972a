"""Writes the files of a checkpoint: each appears whole under its name, or not at all.

Every file is written under a temporary name beside its own, flushed to the disk and renamed. The
same tensors give the same bytes in every process; nothing that varies (time, host, order of a
dictionary) gets into a safetensors file. The safetensors library writes its metadata in an order
that differs from process to process, so the header is laid out here, as its format says
(https://huggingface.co/docs/safetensors), and any reader of safetensors reads it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

from tailorbird.errors import ResourceError
from tailorbird.model.safetensors_header import DTYPE_NAMES, HASH_PREFIX, MAX_NAME
from tailorbird.model.weights import CHUNK

#: ends the name of a file that isn't finished: `.<name>.<process id>.unfinished`
UNFINISHED = ".unfinished"


def tensor_hash(tensor: torch.Tensor) -> str:
    """SHA-256 over the raw bytes of a tensor in row-major order, hex."""
    return hashlib.sha256(_raw(tensor).numpy().data).hexdigest()


def write_tensors(
    path: Path,
    tensors: dict[str, torch.Tensor],
    hashes: bool = True,
    written: Callable[[torch.Tensor], None] | None = None,
) -> None:
    """Write a safetensors file.

    Beside `tensors` at most one of them is in memory a second time, and only if it isn't contiguous
    on the CPU.

    Parameters
    ----------
    path : Path
        Replaced if it exists.
    tensors : dict of str to Tensor
        Any shape; dtypes of `safetensors_header.DTYPES`. Laid out by falling item size, then by name.
    hashes : bool
        Record `sha256:<name>` of every body in the metadata, for `Weights.verify`.
    written : callable, optional
        Is told of each tensor whose body was written.

    Raises
    ------
    ResourceError
        The disk is full, the directory read-only or missing.
    ValueError
        A name or dtype that the format cannot hold.
    """
    for name, tensor in tensors.items():
        if not (name and name.isascii() and name.isprintable() and len(name) <= MAX_NAME):
            raise ValueError(f"{name!r} cannot name a tensor")
        if name == "__metadata__" or tensor.dtype not in DTYPE_NAMES:
            raise ValueError(f"safetensors cannot hold `{name}` of {tensor.dtype}")
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    # A hash in hex has one length, so the header's size is known before the bodies are read.
    digests = dict.fromkeys(tensors, "0" * 64) if hashes else {}
    header = _header(tensors, order, digests)
    with _replacing(path) as file:
        file.write(header)
        for name in order:
            body = _raw(tensors[name]).numpy().data
            digest = hashlib.sha256()
            for start in range(0, len(body), CHUNK):
                piece = body[start : start + CHUNK]
                digest.update(piece)
                file.write(piece)
            if hashes:
                digests[name] = digest.hexdigest()
            if written is not None:
                written(tensors[name])
        file.seek(0)
        file.write(_header(tensors, order, digests))


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file; raises ResourceError where the disk or the directory refuses."""
    with _replacing(path) as file:
        file.write(text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write JSON with two spaces of indentation, keys in the order given, a newline at the end.

    Raises
    ------
    ResourceError
        As `write_text`.
    ValueError
        `value` holds NaN or Inf, which JSON has no word for.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _header(tensors: dict[str, torch.Tensor], order: list[str], digests: dict[str, str]) -> bytes:
    metadata = {"format": "pt", "tailorbird": "1"} | {
        HASH_PREFIX + name: digests[name] for name in sorted(digests)
    }
    entries: dict[str, Any] = {"__metadata__": metadata}
    position = 0
    for name in order:
        tensor = tensors[name]
        end = position + tensor.numel() * tensor.dtype.itemsize
        entries[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)  # so that the bodies are aligned
    return len(text).to_bytes(8, "little") + text


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, uint8 `[nbytes]`; a copy only if it isn't contiguous on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the name `path` when the block ends well, and vanishes when it doesn't."""
    _remove_abandoned(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{UNFINISHED}")
    try:
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        remedy = {
            errno.ENOSPC: "free some space or choose another disk",
            errno.EDQUOT: "free some space or choose another disk",
            errno.EFBIG: "raise the limit of files' sizes (ulimit -f) or choose another disk",
            errno.ENOENT: "create the directory first",
        }.get(error.errno or 0, "choose a directory that you may write to")
        raise ResourceError(
            f"{path} cannot be written ({error.strerror})", "a writable directory with enough space", remedy
        ) from error


def _remove_abandoned(path: Path) -> None:
    """Remove what a killed process left of an earlier attempt to write `path`."""
    prefix = f".{path.name}."
    with suppress(OSError):
        for sibling in path.parent.iterdir():
            if sibling.name.startswith(prefix) and sibling.name.endswith(UNFINISHED):
                process = sibling.name.removeprefix(prefix).removesuffix(UNFINISHED)
                if process.isdigit() and not Path(f"/proc/{process}").exists():
                    sibling.unlink()
