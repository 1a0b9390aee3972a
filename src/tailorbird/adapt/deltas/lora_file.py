"""A LoRA adapter read by itself, without the model that it is for.

Which linears it changes, and their shapes, follow from its tensors; whether they fit a model is found where a
model is (`adapt/merge/adapter.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tailorbird.adapt.merge.adapter import LoraSettings
from tailorbird.adapt.merge.files import files_fingerprint, read_config, shape_problems
from tailorbird.adapt.save import ORIGIN
from tailorbird.errors import CheckpointError, SettingsError
from tailorbird.formats.peft import CONFIG_FILE, DOWN, PREFIX, UP, WEIGHTS_FILE
from tailorbird.linear.product import Product
from tailorbird.model.json_file import read_json
from tailorbird.model.location import same_model
from tailorbird.model.weights import Weights


@dataclass(frozen=True, eq=False)
class LoraFile:
    """An adapter whose config and headers agree; made by `LoraFile.open`.

    Attributes
    ----------
    directory : Path
    fingerprint : str
        SHA-256 over the bytes of both files, hex.
    settings : LoraSettings
    weights : Weights
        Its tensors, not read yet.
    shapes : mapping of str to (int, int)
        ``(out_features, in_features)`` of the linears that it changes, by name.
    ranks : mapping of str to int
    scales : mapping of str to float
        What ``B A`` is multiplied with.
    """

    directory: Path
    fingerprint: str
    settings: LoraSettings
    weights: Weights
    shapes: Mapping[str, tuple[int, int]]
    ranks: Mapping[str, int]
    scales: Mapping[str, float]

    @property
    def base(self) -> str | None:
        """What its config calls the model that it is for."""
        named = self.settings.config.get("base_model_name_or_path")
        return named if isinstance(named, str) and named else None

    @property
    def base_identity(self) -> str | None:
        """Of the weights that it was tuned on (`model/identity.py`), where the file beside it says so."""
        path = self.directory / ORIGIN
        stated = read_json(path).get("base") if path.exists() else None
        return stated if isinstance(stated, str) else None

    def product(self, name: str) -> Product | None:
        """The change of one linear, read from the file; None where it stays as it is.

        Raises
        ------
        CheckpointError
            It isn't finite.
        """
        if name not in self.shapes:
            return None
        down = self.weights.read(f"{PREFIX}{name}.{DOWN}", torch.float32)
        up = self.weights.read(f"{PREFIX}{name}.{UP}", torch.float32) * self.scales[name]
        if not bool(up.isfinite().all()):
            raise CheckpointError(
                f"{self.directory}: the matrices for `{name}` aren't finite once scaled",
                "finite numbers", "check `lora_alpha` and `r`",
            )  # fmt: skip
        return Product(up, down)

    @classmethod
    def open(cls, directory: Path) -> LoraFile:
        """Read config and headers; no tensor is read.

        Raises
        ------
        SettingsError
            It isn't a plain LoRA.
        CheckpointError
            Files are missing, damaged or pickled, or tensors don't fit each other; names them.
        """
        settings = LoraSettings(directory, read_config(directory))
        settings.check()
        weights = Weights.open_file(directory / WEIGHTS_FILE)
        scaling = settings.scaling()
        shapes: dict[str, tuple[int, int]] = {}
        ranks: dict[str, int] = {}
        scales: dict[str, float] = {}
        problems = []
        for tensor in weights.names:
            name, ending = _parts(tensor)
            if ending is None:
                problems.append(f"`{tensor}` is no part of a LoRA")
            elif name not in shapes:
                down, up = f"{PREFIX}{name}.{DOWN}", f"{PREFIX}{name}.{UP}"
                ranks[name], scales[name] = scaling(name)
                outputs, inputs = _side(weights, up, 0), _side(weights, down, -1)
                shapes[name] = (outputs, inputs)
                problems += shape_problems(weights, {down: (ranks[name], inputs), up: (outputs, ranks[name])})
        if problems or not shapes:
            raise CheckpointError(
                f"{directory / WEIGHTS_FILE}: tensor " + "; ".join(problems[:6] or ["names: there are none"]),
                "for each linear A [r, in_features] and B [out_features, r], in float32, bfloat16 or "
                "float16, and nothing else",
                f"check `r` and `rank_pattern` in {CONFIG_FILE}, or save the adapter with PEFT anew",
            )
        return cls(directory, files_fingerprint(directory), settings, weights, shapes, ranks, scales)


def check_one_base(adapters: Sequence[LoraFile]) -> None:
    """Refuse adapters of different bases, or that give one linear different shapes.

    Bases are told apart by the weights that adapters were tuned on, or else by their names.

    Raises
    ------
    SettingsError
        Names two of them.
    """
    first = adapters[0]
    for other in adapters[1:]:
        named = (first.base, other.base)
        known = (first.base_identity, other.base_identity)
        if None not in known:
            differ = known[0] != known[1]
        else:
            differ = None not in named and not same_model(named[0], str(named[1]))
        if differ:
            raise SettingsError(
                f"{first.directory} of {named[0]!r} and {other.directory} of {named[1]!r}",
                "adapters of one base",
                f"give adapters of one model; if these are names of one, make them equal in {CONFIG_FILE}",
            )
    shapes: dict[str, tuple[Path, tuple[int, int]]] = {}
    for adapter in adapters:
        for name, shape in adapter.shapes.items():
            directory, other_shape = shapes.setdefault(name, (adapter.directory, shape))
            if other_shape != shape:
                raise SettingsError(
                    f"`{name}` is {list(other_shape)} in {directory} and "
                    f"{list(shape)} in {adapter.directory}",
                    "the same linears in all adapters", "give adapters of one model",
                )  # fmt: skip


def _parts(tensor: str) -> tuple[str, str | None]:
    """Name of the linear, and which of its matrices a tensor is; None where it is neither."""
    for ending in (DOWN, UP):
        if tensor.startswith(PREFIX) and tensor.endswith(f".{ending}"):
            return tensor[len(PREFIX) : -len(ending) - 1], ending
    return tensor, None


def _side(weights: Weights, tensor: str, axis: int) -> int:
    """One side of a matrix; 0 where there is no such matrix, which then shows as a problem."""
    shape = weights.info(tensor).shape if tensor in weights else ()
    return shape[axis] if len(shape) == 2 else 0
