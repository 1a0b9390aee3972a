"""`adapters apply`: a dense checkpoint from a base and a fine-tune in signs (`bitdelta.py`).

Tensors are read and written in files of about a gibibyte, so that one of them is in memory at a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from tailorbird.adapt.deltas.bitdelta import DELTA_FILE, FACTS_FILE, VERSION, rebuilt
from tailorbird.adapt.deltas.signs import SignedChange
from tailorbird.adapt.merge.files import DTYPES
from tailorbird.calibrate.job import Job, check_output
from tailorbird.errors import CheckpointError, SettingsError
from tailorbird.model.anatomy import LinearPlace, read_anatomy
from tailorbird.model.checkpoint import Checkpoint, copy_companions, open_checkpoint
from tailorbird.model.file_names import INDEX_FILE
from tailorbird.model.identity import identity
from tailorbird.model.json_file import read_json
from tailorbird.model.weights import Weights
from tailorbird.model.writing import write_json, write_tensors
from tailorbird.progress import Progress, Silent

#: bytes of tensors in a file, unless one tensor has more
_FILE_BYTES = 1 << 30
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


@dataclass(frozen=True)
class ApplyResult:
    """A dense checkpoint; `bytes` are those of its tensors."""

    output: str
    bytes: int


def apply_bitdelta(base: str, delta: Path, output: Path, progress: Progress | None = None) -> ApplyResult:
    """Write the fine-tune that a delta holds as a dense checkpoint.

    Parameters
    ----------
    base : str
        The model from which the delta was made.
    delta : Path
        What `adapters bitdelta` wrote.
    output : Path
        Must not exist.
    progress : Progress, optional

    Raises
    ------
    SettingsError
        The delta was made from another base.
    CheckpointError
        Files are missing or damaged.
    """
    progress = progress or Silent()
    check_output(output)
    opened = _Delta.open(base, delta)
    base_weights = opened.base.weights
    names = sorted((set(base_weights.names) - set(opened.absent)) | set(opened.others))
    sizes = {name: (opened.weights if name in opened.others else base_weights).info(name) for name in names}
    groups = _groups(names, [sizes[name].nbytes for name in names])
    total = 0
    with Job(output, {"command": "apply", "base": identity(opened.base), "delta": opened.mark}) as job:
        progress.stage("apply", len(groups))
        placed: dict[str, str] = {}
        for number, group in enumerate(groups, start=1):
            file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            tensors = {name: opened.tensor(name) for name in group}
            write_tensors(job.partial / file, tensors)
            placed |= dict.fromkeys(group, file)
            total += sum(tensor.nbytes for tensor in tensors.values())
            progress.advance(note=file)
        write_json(job.partial / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": placed})
        shutil.copyfile(delta / "config.json", job.partial / "config.json")
        copy_companions(delta, job.partial)
        job.publish()
    progress.done()
    return ApplyResult(str(output), total)


@dataclass(frozen=True, eq=False)
class _Delta:
    """A delta whose headers fit a base."""

    base: Checkpoint
    weights: Weights
    places: dict[str, LinearPlace]
    dtypes: dict[str, torch.dtype]
    others: frozenset[str]
    absent: frozenset[str]

    @property
    def mark(self) -> str:
        return self.weights.header_digest

    @classmethod
    def open(cls, base: str, directory: Path) -> _Delta:
        for name in (FACTS_FILE, DELTA_FILE, "config.json"):
            if not (directory / name).is_file():
                raise CheckpointError(
                    f"{directory} has no {name}", "a directory that `adapters bitdelta` wrote",
                    "check the path",
                )  # fmt: skip
        facts = read_json(directory / FACTS_FILE)
        if facts.get("version") != VERSION:
            raise _damaged(directory, f"version {facts.get('version')!r}", f"version {VERSION}")
        checkpoint = open_checkpoint(base)
        if facts.get("base") != identity(checkpoint):
            raise SettingsError(
                f"{directory}, a delta of {facts.get('base_name')!r} with other weights than {base}",
                "the model from which the delta was made", "give that model as BASE",
            )  # fmt: skip
        weights = Weights.open_file(directory / DELTA_FILE)
        known = {place.name: place for place in read_anatomy(checkpoint).linears()}
        linears = facts.get("linears")
        if not isinstance(linears, dict) or not _sound(linears, known, weights):
            raise _damaged(directory, "linears that don't fit its base or its tensors", "what was written")
        others, absent = (facts.get(part) for part in ("others", "absent"))
        own = {f"{name}.{part}" for name in linears for part in ("signs", "scale")}
        if not _strings(others) or not _strings(absent) or own | set(others) != set(weights.names):
            raise _damaged(directory, f"tensors that {FACTS_FILE} doesn't name", "what was written")
        return cls(
            checkpoint, weights, {known[name].weight_name: known[name] for name in linears},
            {name: _DTYPES[dtype] for name, dtype in linears.items()}, frozenset(others), frozenset(absent),
        )  # fmt: skip

    def tensor(self, name: str) -> Tensor:
        """A tensor of the fine-tune."""
        if name in self.others:
            return self.weights.read(name)
        if name not in self.places:
            return self.base.weights.read(name)
        place = self.places[name]
        change = SignedChange(
            self.weights.read(f"{place.name}.signs"), float(self.weights.read(f"{place.name}.scale")),
            place.in_features, self.dtypes[place.name],
        )  # fmt: skip
        return rebuilt(self.base.weights, place, change)


def _sound(linears: dict[str, Any], known: dict[str, LinearPlace], weights: Weights) -> bool:
    """Whether each is a linear of the base, with signs and scale of its shape."""
    for name, dtype in linears.items():
        place, signs, scale = known.get(name), f"{name}.signs", f"{name}.scale"
        if place is None or dtype not in _DTYPES or signs not in weights or scale not in weights:
            return False
        shape = (place.out_features, -(-place.in_features // 8))
        if (weights.info(signs).shape, weights.info(signs).dtype) != (shape, torch.uint8):
            return False
        if (weights.info(scale).shape, weights.info(scale).dtype) != ((1,), torch.float32):
            return False
    return True


def _strings(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _groups(names: Sequence[str], sizes: Sequence[int]) -> list[list[str]]:
    """Names in their order, each group of at most `_FILE_BYTES` or one tensor."""
    groups: list[list[str]] = []
    room = 0
    for name, size in zip(names, sizes, strict=True):
        if size > room or not groups:
            groups.append([])
            room = _FILE_BYTES
        groups[-1].append(name)
        room -= size
    return groups


def _damaged(directory: Path, given: str, expected: str) -> CheckpointError:
    return CheckpointError(f"{directory}: {given}", expected, "make the delta anew")
