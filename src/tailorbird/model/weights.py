"""The tensors of a checkpoint directory, over all its safetensors shards.

Bodies are read with `pread` into fresh memory, never mapped, so that only what is asked for becomes
resident, and NaN and Inf are refused. Headers are read in `safetensors_header.py`, files are written
in `writing.py`, and what the tensors mean is the anatomy's business.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from tailorbird.errors import CheckpointError
from tailorbird.model.file_names import INDEX_FILE, SINGLE_FILE
from tailorbird.model.json_file import read_json
from tailorbird.model.safetensors_header import (
    MAX_NAME,
    Header,
    TensorInfo,
    damaged,
    open_regular,
    read_header,
)

#: bytes read, checked and cast at a time
CHUNK = 4 << 20


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
        raise damaged(index, "has no `weight_map`", "a `weight_map` from tensor names to files")
    for name, shard in places.items():
        if (
            not isinstance(shard, str)
            or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,250}", shard)
            or not shard.endswith(".safetensors")
        ):
            raise damaged(
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

    def __init__(self, directory: Path, headers: dict[str, Header]) -> None:
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
        headers: dict[str, Header] = {}
        found: dict[str, str] = {}
        for shard in shards:
            headers[shard] = header = read_header(directory / shard)
            for name in header.tensors:
                if name in found:
                    raise damaged(
                        directory / shard, f"tensor `{name}` lies in `{found[name]}` too", "each tensor once"
                    )
                found[name] = shard
        if places is not None:
            for name, shard in places.items():
                if found.get(name) != shard:
                    where = f"lies in `{found[name]}`" if name in found else "is in no shard"
                    raise damaged(
                        directory / INDEX_FILE, f"tensor `{name[:MAX_NAME]}` {where}", f"`{shard}` to hold it"
                    )
            for name, shard in found.items():
                if name not in places:
                    raise damaged(
                        directory / shard, f"tensor `{name}` is not in the index", f"an entry in {INDEX_FILE}"
                    )
        if not found:
            raise damaged(directory / shards[0], "holds no tensor", "the weights of a model")
        return cls(directory, headers)

    @classmethod
    def open_file(cls, file: Path) -> Weights:
        """The tensors of one safetensors file, whatever else lies beside it; raises as `open`."""
        return cls(file.parent, {file.name: read_header(file)})

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
                raise damaged(
                    info.file,
                    f"the body of tensor `{name}` was changed after it was written",
                    f"bytes with the SHA-256 {self._hashes[name].hex()}",
                )

    def _pieces(
        self, info: TensorInfo, offset: int, nbytes: int, memory: Callable[[int, int], torch.Tensor]
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Fill `memory(start, n)` (uint8 `[n]`) with successive pieces of a body and yield them."""
        handle = open_regular(info.file)
        try:
            for start in range(0, nbytes, CHUNK):
                piece = memory(start, min(CHUNK, nbytes - start))
                view = piece.numpy().data
                done = 0
                while done < len(view):
                    try:
                        count = os.preadv(handle, [view[done:]], offset + start + done)
                    except OSError as error:
                        raise damaged(
                            info.file,
                            f"tensor `{info.name}` cannot be read ({error.strerror})",
                            "a sound disk",
                        ) from None
                    if count == 0:
                        raise damaged(
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
            may_overflow = target.is_floating_point and (
                not source.is_floating_point or torch.finfo(target).max < torch.finfo(source).max
            )
            buffer = torch.empty(min(CHUNK, nbytes), dtype=torch.uint8)
            for start, piece in self._pieces(info, offset, nbytes, lambda start, n: buffer[:n]):
                self._check(info, piece, start + skip)
                first = start // source.itemsize
                part = values[first : first + len(piece) // source.itemsize]
                part.copy_(piece.view(source))
                if may_overflow and not _all_finite(part):
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
                raise damaged(info.file, f"tensor `{info.name}` holds booleans other than 0 and 1", "0 or 1")
            return
        if not info.dtype.is_floating_point:
            return
        values = piece.view(info.dtype)
        if not _all_finite(values):
            wide = values.to(torch.float32) if info.dtype.itemsize == 1 else values
            first = int(torch.isfinite(wide).to(torch.uint8).argmin())
            index = position // info.dtype.itemsize + first
            raise damaged(
                info.file,
                f"tensor `{info.name}` holds {float(wide[first])} at flat index {index}",
                "finite numbers",
            )


def _all_finite(values: torch.Tensor) -> bool:
    """Whether there is no NaN and no Inf; the extremes tell, and take no memory to find."""
    if values.dtype.itemsize == 1:
        values = values.to(torch.float32)
    low, high = torch.aminmax(values)
    return math.isfinite(low) and math.isfinite(high)
