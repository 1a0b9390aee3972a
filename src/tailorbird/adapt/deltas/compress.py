"""`adapters compress` and `adapters expand`: a LoRA adapter as signs and one scalar for each tensor.

How a tensor is stored is said in `ternary.py`. The directory holds

    adapter_config.json   as it was, and so `tailorbird.json` where there is one
    compeft.safetensors   one tensor `code`, uint8: of each tensor quotients, remainders and signs
    compeft.json          density, alpha, and of each tensor, in the order of the code, what reads it

PEFT's own directory comes back from `expand`. A saved adapter doesn't say where its training began, so that A
and B themselves are compressed, not what training changed in them.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tailorbird.adapt.deltas.combine import check_density
from tailorbird.adapt.deltas.lora_file import LoraFile
from tailorbird.adapt.deltas.ternary import Coded, Signs, decode, deviation, encode, largest
from tailorbird.adapt.merge.adapted import AdaptedModel
from tailorbird.adapt.merge.adapter import LoraAdapter
from tailorbird.adapt.merge.files import DTYPES
from tailorbird.adapt.save import ORIGIN
from tailorbird.calibrate.job import Job, check_output
from tailorbird.calibrate.text import Windows, held_out_windows, read_documents
from tailorbird.errors import CheckpointError, SettingsError
from tailorbird.evaluate.checkpoint import LONGEST_HELD_OUT_WINDOW
from tailorbird.evaluate.streamed import measure_quality
from tailorbird.formats.peft import CONFIG_FILE, DOWN, PREFIX, UP, WEIGHTS_FILE, is_finite
from tailorbird.linear.product import Product
from tailorbird.model.anatomy import Anatomy, read_anatomy
from tailorbird.model.checkpoint import Checkpoint, open_checkpoint
from tailorbird.model.json_file import read_json
from tailorbird.model.weights import Weights
from tailorbird.model.writing import write_tensors, write_text
from tailorbird.progress import Progress, Silent

CODE_FILE, FACTS_FILE = "compeft.safetensors", "compeft.json"
#: share of entries that stay; alpha where there is no text, and those that are tried on it
DENSITY, ALPHA = 0.05, 1.0
ALPHAS = (0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)
#: of text on which each alpha is tried
TRIAL_TOKENS = 8192
_VERSION = 1
#: entries of a tensor that is expanded
_MOST_ENTRIES = 1 << 31
_DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


@dataclass(frozen=True)
class CompressResult:
    """A compressed adapter.

    Attributes
    ----------
    output : str
    density, alpha : float
    entries, kept : int
        Of all tensors, and those of them that aren't 0.
    error : float
        Norm of what is lost of the changes ``s B A``, relative to theirs.
    bytes_before, bytes_after : int
        Of the files, headers and configs included.
    loss_adapter, loss_compressed : float or None
        On held-out text, nats per token; None without text.
    """

    output: str
    density: float
    alpha: float
    entries: int
    kept: int
    error: float
    bytes_before: int
    bytes_after: int
    loss_adapter: float | None
    loss_compressed: float | None


@dataclass(frozen=True)
class ExpandResult:
    """An adapter in PEFT's layout again; `bytes` are those of its files."""

    output: str
    bytes: int


@dataclass(frozen=True, eq=False)
class _Tensor:
    """One tensor: what stays of it, and what it was."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    deviation: float
    signs: Signs

    def scale(self, alpha: float) -> float:
        """The magnitude of its entries, a number that its dtype holds."""
        return torch.tensor(alpha * self.deviation, dtype=self.dtype).item()

    def expanded(self, alpha: float) -> Tensor:
        return self.signs.tensor(self.shape, self.scale(alpha), self.dtype)


def compress_adapter(
    adapter: Path,
    output: Path,
    density: float = DENSITY,
    model: str | None = None,
    data: str | None = None,
    progress: Progress | None = None,
) -> CompressResult:
    """Compress a LoRA adapter to signs of its largest entries and a scalar for each tensor.

    Parameters
    ----------
    adapter : Path
        Directory in PEFT's layout; it stays as it is.
    output : Path
        Must not exist.
    density : float
        Share of each tensor's entries that stay.
    model, data : str, optional
        The adapter's model, and held-out text on which alpha is chosen from `ALPHAS`; both or none.
    progress : Progress, optional

    Raises
    ------
    SettingsError
        Settings that don't fit, or what isn't a plain LoRA.
    CheckpointError
        The adapter is damaged.
    TextError
        The text can't be used.
    """
    progress = progress or Silent()
    check_density(density)
    if (model is None) != (data is None):
        raise SettingsError(
            "--model alone" if data is None else "--data alone",
            "a model and text, on which alpha is chosen, or neither", "give both --model and --data",
        )  # fmt: skip
    check_output(output)
    lora = LoraFile.open(adapter)
    trial = _Trial.open(model, data) if model is not None and data is not None else None
    if trial is not None:
        LoraAdapter.open(adapter, trial.checkpoint, trial.anatomy)  # refused before work begins
    record = {
        "command": "compress", "adapter": lora.fingerprint, "density": density,
        "model": trial and trial.checkpoint.fingerprint, "text": trial and trial.windows.fingerprint,
    }  # fmt: skip
    with Job(output, record) as job:
        tensors = {name: _read(lora, name, density) for name in lora.weights.names}
        alpha, before, after = ALPHA, None, None
        if trial is not None:
            progress.stage("choose alpha", len(ALPHAS) + 1)
            before = trial.loss(adapter, job.work)
            progress.advance(note="as it was")
            losses = {}
            for alpha in ALPHAS:
                scratch = job.work / "trial"
                scratch.mkdir(exist_ok=True)
                _copy_settings(adapter, scratch)
                expanded = {name: one.expanded(alpha) for name, one in tensors.items()}
                write_tensors(scratch / WEIGHTS_FILE, expanded)
                losses[alpha] = trial.loss(scratch, job.work)
                progress.advance(note=f"{alpha:g}")
            alpha = min(losses, key=lambda one: losses[one])
            after = losses[alpha]
        _copy_settings(adapter, job.partial)
        _write(job.partial, tensors, density, alpha)
        size = _file_bytes(job.partial, (CONFIG_FILE, CODE_FILE, FACTS_FILE))
        job.publish()
    progress.done()
    return CompressResult(
        str(output), density, alpha, sum(math.prod(one.shape) for one in tensors.values()),
        sum(len(one.signs.places) for one in tensors.values()), _error(lora, tensors, alpha),
        _file_bytes(adapter, (CONFIG_FILE, WEIGHTS_FILE)), size, before, after,
    )  # fmt: skip


def expand_adapter(directory: Path, output: Path) -> ExpandResult:
    """Write a compressed adapter in PEFT's layout, with the dtypes that it had.

    Raises
    ------
    SettingsError
        `output` exists.
    CheckpointError
        Files are missing or damaged, or don't belong together.
    """
    check_output(output)
    tensors = _expanded(directory)
    code = Weights.open_file(directory / CODE_FILE)
    with Job(output, {"command": "expand", "code": code.hash("code")}) as job:
        write_tensors(job.partial / WEIGHTS_FILE, tensors)
        _copy_settings(directory, job.partial)
        size = _file_bytes(job.partial, (CONFIG_FILE, WEIGHTS_FILE))
        job.publish()
    return ExpandResult(str(output), size)


@dataclass(frozen=True, eq=False)
class _Trial:
    """Where alphas are tried."""

    checkpoint: Checkpoint
    anatomy: Anatomy
    windows: Windows

    @classmethod
    def open(cls, model: str, data: str) -> _Trial:
        checkpoint = open_checkpoint(model)
        anatomy = read_anatomy(checkpoint)
        tokenizer = checkpoint.tokenizer()
        longest = min(anatomy.context, LONGEST_HELD_OUT_WINDOW)
        documents = read_documents(Path(data), tokenizer)
        return cls(checkpoint, anatomy, held_out_windows(documents, tokenizer, longest, TRIAL_TOKENS))

    def loss(self, adapter: Path, scratch: Path) -> float:
        """Of the model with an adapter, nats per token."""
        opened = LoraAdapter.open(adapter, self.checkpoint, self.anatomy)
        adapted = AdaptedModel(self.checkpoint, self.anatomy, opened)
        return math.log(measure_quality(adapted, None, self.windows.ids, scratch).perplexity_before)


def _read(lora: LoraFile, name: str, density: float) -> _Tensor:
    tensor = lora.weights.read(name)
    return _Tensor(tuple(tensor.shape), tensor.dtype, deviation(tensor), largest(tensor, density))


def _error(lora: LoraFile, tensors: Mapping[str, _Tensor], alpha: float) -> float:
    """Relative error of all changes, from the Gram matrices of their factors."""
    lost = energy = 0.0
    for name in lora.shapes:
        product = lora.product(name)
        assert product is not None  # it is one of its own linears
        down = tensors[f"{PREFIX}{name}.{DOWN}"].expanded(alpha).float()
        up = tensors[f"{PREFIX}{name}.{UP}"].expanded(alpha).float() * lora.scales[name]
        both = Product(torch.cat([product.up, -up], dim=1), torch.cat([product.down, down]))
        lost, energy = lost + both.energy(), energy + product.energy()
    return math.sqrt(lost / energy) if energy > 0 else 0.0


def _write(directory: Path, tensors: Mapping[str, _Tensor], density: float, alpha: float) -> None:
    facts: dict[str, Any] = {}
    streams: list[np.ndarray[Any, Any]] = []
    for name, one in tensors.items():
        coded = encode(one.signs)
        streams += [coded.quotients, coded.remainders, coded.negative]
        facts[name] = {
            "shape": one.shape, "dtype": str(one.dtype).removeprefix("torch."), "scale": one.scale(alpha),
            "kept": coded.kept, "remainder_bits": coded.remainder_bits,
            "quotient_bytes": coded.quotients.nbytes,
        }  # fmt: skip
    write_tensors(directory / CODE_FILE, {"code": torch.from_numpy(np.concatenate(streams))})
    stated = {"version": _VERSION, "density": density, "alpha": alpha, "tensors": facts}
    write_text(directory / FACTS_FILE, json.dumps(stated, separators=(",", ":")) + "\n")


def _expanded(directory: Path) -> dict[str, Tensor]:
    """All tensors of a compressed adapter."""
    for name in (CONFIG_FILE, FACTS_FILE, CODE_FILE):
        if not (directory / name).is_file():
            raise CheckpointError(
                f"{directory} has no {name}", "a directory that `adapters compress` wrote", "check the path"
            )
    stated = read_json(directory / FACTS_FILE)
    facts = stated.get("tensors")
    if stated.get("version") != _VERSION or not isinstance(facts, dict):
        raise _damaged(directory, f"version {stated.get('version')!r}", f"version {_VERSION} with `tensors`")
    code = Weights.open_file(directory / CODE_FILE).read("code").numpy()
    if code.dtype != np.uint8 or code.ndim != 1:
        raise _damaged(directory, f"`code` of {code.dtype}", "bytes")
    tensors: dict[str, Tensor] = {}
    start = 0
    for name, fact in facts.items():
        coded, stop = _slice(directory, name, fact, code, start)
        shape = tuple(fact["shape"])
        try:
            signs = decode(coded)
        except ValueError as error:
            raise _damaged(directory, f"`{name}`: {error}", "streams of one tensor") from None
        if len(signs.places) and int(signs.places[-1]) >= math.prod(shape):
            raise _damaged(directory, f"`{name}` has entries beyond {list(shape)}", "entries of its own")
        tensors[name] = signs.tensor(shape, fact["scale"], _DTYPE_NAMES[fact["dtype"]])
        start = stop
    if start != len(code):
        raise _damaged(directory, f"{len(code)} bytes of code", f"{start}, as {FACTS_FILE} says")
    return tensors


def _slice(
    directory: Path, name: str, fact: Any, code: np.ndarray[Any, Any], start: int
) -> tuple[Coded, int]:
    """The streams of one tensor, and where they end."""
    counts = ("kept", "remainder_bits", "quotient_bytes")
    shape = fact.get("shape") if isinstance(fact, dict) else None
    sound = (
        isinstance(shape, list)
        and all(type(side) is int and side > 0 for side in shape)
        and math.prod(shape) <= _MOST_ENTRIES
        and all(type(fact.get(count)) is int and fact[count] >= 0 for count in counts)
        and fact["remainder_bits"] < 32
        and fact["kept"] <= math.prod(shape)
        and is_finite(fact.get("scale"))
        and fact.get("dtype") in _DTYPE_NAMES
    )
    if not sound:
        raise _damaged(directory, f"`{name[:200]}` is described by {str(fact)[:200]}", "what was written")
    kept, bits = fact["kept"], fact["remainder_bits"]
    middle = start + fact["quotient_bytes"]
    last = middle - (-kept * bits // 8)
    stop = last - (-kept // 8)
    if stop > len(code):
        raise _damaged(directory, f"the code ends within `{name}`", "all of its bytes")
    return Coded(kept, bits, code[start:middle], code[middle:last], code[last:stop]), stop


def _copy_settings(source: Path, target: Path) -> None:
    """What lies beside an adapter's tensors."""
    for name in (CONFIG_FILE, ORIGIN):
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)


def _damaged(directory: Path, given: str, expected: str) -> CheckpointError:
    return CheckpointError(f"{directory}: {given}", expected, "compress the adapter anew")


def _file_bytes(directory: Path, names: tuple[str, ...]) -> int:
    """Of the files of an adapter that are there."""
    found = [directory / name for name in (*names, ORIGIN)]
    return sum(path.stat().st_size for path in found if path.exists())
