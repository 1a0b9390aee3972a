"""A model whose own weights were tuned, as a checkpoint that `load`, transformers and `serve` open.

Tensors have the names and dtypes of the source; those that weren't learned are copied, block by block, so
that no second model is in memory. Config, tokenizer and licences are the source's, and ``tailorbird.json``
says how the result came to be.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from tailorbird.adapt.save import ORIGIN
from tailorbird.errors import UnsupportedArchitecture
from tailorbird.formats.packed import LowRank
from tailorbird.model.anatomy import Anatomy
from tailorbird.model.checkpoint import Checkpoint
from tailorbird.model.json_file import read_json
from tailorbird.model.shards import file_count, file_name, write_index
from tailorbird.model.writing import write_json, write_tensors

CONFIG = "config.json"


def check_names(checkpoint: Checkpoint, changed: Iterable[str]) -> None:
    """Make sure that what is learned can be written.

    Parameters
    ----------
    checkpoint : Checkpoint
        Whose anatomy was read: its tensors have the names of the model's parameters.
    changed : iterable of str

    Raises
    ------
    UnsupportedArchitecture
        The model calls one of its parameters otherwise than its files do.
    """
    missing = [name for name in changed if name not in checkpoint.weights]
    if missing:
        raise UnsupportedArchitecture(
            f"{checkpoint.directory} has no tensor `{missing[0]}`, which the model would learn",
            "a checkpoint with the names of the model's parameters",
            "tune an adapter, or save the model anew with transformers' `save_pretrained`",
        )


def write_checkpoint(
    directory: Path,
    checkpoint: Checkpoint,
    anatomy: Anatomy,
    changed: Mapping[str, Tensor],
    origin: Mapping[str, Any],
    parts: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> int:
    """Write a checkpoint with these tensors changed; returns the bytes of all its tensors.

    Parameters
    ----------
    directory : Path
        Exists.
    checkpoint : Checkpoint
        The source.
    anatomy : Anatomy
        Of it.
    changed : mapping of str to Tensor
        By their names in the checkpoint; of any dtype, rounded to the source's.
    origin : mapping
        JSON types, how it came to be.
    parts : mapping of str to (Tensor, Tensor), optional
        Low-rank parts, up and down by the path of the packed linear that they stand beside; rounded to
        bfloat16.

    Raises
    ------
    ResourceError
        The disk is full, or can't be written to.
    """
    weights, written = checkpoint.weights, 0
    for part, names in enumerate(_parts(checkpoint, anatomy)):
        tensors = {}
        for name in names:
            if name in changed:
                tensors[name] = changed[name].detach().to(weights.info(name).dtype)
            else:
                tensors[name] = weights.read(name)
        for path, factors in (parts or {}).items():
            if f"{path}.codes" in tensors:
                factored = zip(("up", "down"), factors, strict=True)
                tensors |= {f"{path}.{name}": one.bfloat16().contiguous() for name, one in factored}
        write_tensors(directory / file_name(anatomy, part), tensors)
        written += sum(tensor.nbytes for tensor in tensors.values())
    write_index(directory, anatomy)
    _write_config(directory, checkpoint, parts or {})
    checkpoint.copy_companions(directory)
    write_json(directory / ORIGIN, dict(origin))
    return written


def _write_config(
    directory: Path, checkpoint: Checkpoint, parts: Mapping[str, tuple[Tensor, Tensor]]
) -> None:
    """The source's config, with the low-rank parts that are new."""
    if not parts:
        shutil.copyfile(checkpoint.directory / CONFIG, directory / CONFIG)
        return
    config = read_json(checkpoint.directory / CONFIG)
    for path, (_, down) in parts.items():
        config["quantization_config"]["modules"][path]["low_rank"] = asdict(LowRank(len(down)))
    write_json(directory / CONFIG, config)


def _parts(checkpoint: Checkpoint, anatomy: Anatomy) -> list[list[str]]:
    """Names of the tensors of each file: what lies outside the blocks, the blocks, an untied head."""
    left = [name for name in checkpoint.weights.names if name not in anatomy.ignored]
    inside = []
    for block in anatomy.blocks:
        inside.append([name for name in left if name.startswith(f"{block.name}.")])
        left = [name for name in left if not name.startswith(f"{block.name}.")]
    head = [name for name in left if not anatomy.tied and name.startswith(f"{anatomy.head}.")]
    parts = [[name for name in left if name not in head], *inside, *([] if anatomy.tied else [head])]
    assert len(parts) == file_count(anatomy)
    return parts
