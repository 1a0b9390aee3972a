"""A LoRA adapter in PEFT's layout, as the change that it makes to the weight of each linear.

    T = W + s B A,    s = alpha / r, or alpha / sqrt(r) for rsLoRA (https://arxiv.org/abs/2312.03732)

LoRA (https://arxiv.org/abs/2106.09685) is the one kind that is nothing else than such a change. What is more
than that is refused by name. `fan_in_fan_out` only says that the weight itself is stored as `[in, out]`: A
`[r, in]` and B `[out, r]` stay as they are.

For a checkpoint whose channels were scaled (`linear/folds.py`) an adapter of its source is scaled to fit.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tailorbird.adapt.save import ORIGIN
from tailorbird.errors import CheckpointError, SettingsError
from tailorbird.formats.peft import (
    BEGINNINGS,
    CHANGES_WEIGHTS,
    CONFIG_FILE,
    DOWN,
    PREFIX,
    UP,
    WEIGHTS_FILE,
    Patterns,
    compile_patterns,
    is_finite,
    lora_config,
    lora_tensors,
    matching,
)
from tailorbird.linear.folds import FOLDS_FILE, read_folds
from tailorbird.linear.rotate.weights import ROTATION_FILE
from tailorbird.model.anatomy import Anatomy
from tailorbird.model.checkpoint import Checkpoint, open_checkpoint
from tailorbird.model.identity import identity
from tailorbird.model.json_file import read_json
from tailorbird.model.location import same_model
from tailorbird.model.weights import Weights
from tailorbird.model.writing import write_json, write_tensors
from tailorbird.plan.planfile import load_plan

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: settings that are read here, or say nothing about what the tensors of a plain LoRA mean
_UNDERSTOOD = frozenset(
    {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias",
     "init_lora_weights", "fan_in_fan_out", "target_modules", "exclude_modules", "layers_to_transform",
     "layers_pattern", "lora_dropout", "auto_mapping", "base_model_name_or_path", "revision",
     "inference_mode", "task_type", "peft_version", "loftq_config", "eva_config", "corda_config",
     "lora_ga_config", "velora_config", "megatron_core", "qalora_group_size"}
)  # fmt: skip
_INSTEAD = "serve it beside the model (`tailorbird serve --adapter`), or train a plain LoRA"
#: problems that one message lists
_MOST_PROBLEMS = 6


@dataclass(frozen=True, eq=False)
class Product:
    """The change of one weight, ``up @ down``.

    Attributes
    ----------
    up : Tensor[out_features, rank], float32
    down : Tensor[rank, in_features], float32
    """

    up: Tensor
    down: Tensor

    def delta(self) -> Tensor:
        """The change itself, ``[out_features, in_features]``."""
        return self.up @ self.down

    def output(self, x: Tensor) -> Tensor:
        """What it adds to the output for inputs ``[..., in_features]``."""
        return (x @ self.down.t()) @ self.up.t()

    def first(self, rank: int) -> Product:
        """The product of the first columns and rows."""
        return Product(self.up[:, :rank].contiguous(), self.down[:rank].contiguous())


class Products(Protocol):
    """Changes by the names of linears."""

    def product(self, name: str) -> Product | None:
        """That of one linear, or None where it stays as it is."""
        ...


@dataclass(frozen=True, eq=False)
class LoraAdapter:
    """An adapter whose config and headers fit a checkpoint; made by `LoraAdapter.open`.

    Attributes
    ----------
    directory : Path
    fingerprint : str
        SHA-256 over the bytes of both files, hex.
    """

    directory: Path
    fingerprint: str
    _weights: Weights
    _scales: Mapping[str, float]
    _inputs: Mapping[str, Tensor]
    _outputs: Mapping[str, Tensor]

    @property
    def names(self) -> tuple[str, ...]:
        """The linears that it changes."""
        return tuple(self._scales)

    def product(self, name: str) -> Product | None:
        """The change of one linear, read from the file; CheckpointError where it isn't finite."""
        if name not in self._scales:
            return None
        down = self._weights.read(f"{PREFIX}{name}.{DOWN}", torch.float32)
        up = self._weights.read(f"{PREFIX}{name}.{UP}", torch.float32) * self._scales[name]
        if name in self._inputs:
            down = down * self._inputs[name]
        if name in self._outputs:
            up = up / self._outputs[name][:, None]
        return Product(up, down)

    @classmethod
    def open(cls, directory: Path, checkpoint: Checkpoint, anatomy: Anatomy) -> LoraAdapter:
        """Read config and headers and hold them against the checkpoint; no tensor is read.

        Parameters
        ----------
        directory : Path
            With adapter_config.json and adapter_model.safetensors.
        checkpoint : Checkpoint
        anatomy : Anatomy
            Of that checkpoint.

        Raises
        ------
        SettingsError
            It isn't a plain LoRA, or was made for another model.
        CheckpointError
            Files are missing, damaged or pickled, or tensors don't fit the model; names them.
        """
        config = read_config(directory)
        weights = Weights.open_file(directory / WEIGHTS_FILE)
        settings = LoraSettings(directory, config)
        settings.check()
        settings.check_base(checkpoint)
        scales = settings.scales(weights, anatomy)
        inputs, outputs = _folded(settings, checkpoint, anatomy, scales)
        return cls(directory, files_fingerprint(directory), weights, scales, inputs, outputs)


def write_lora(
    directory: Path, products: Mapping[str, Product], base: str, further: Mapping[str, Any] | None = None
) -> int:
    """Write products as a LoRA adapter in PEFT's layout, whose scaling is 1.

    Parameters
    ----------
    directory : Path
        Made if it doesn't exist.
    products : mapping of str to Product
        By the names of linears.
    base : str
        The model that it is for.
    further : mapping, optional
        Settings of its config beside those that follow from the products.

    Returns
    -------
    int
        Bytes of its tensors.
    """
    directory.mkdir(exist_ok=True)
    tensors = lora_tensors({name: (one.up, one.down) for name, one in products.items()})
    config = lora_config({name: one.down.shape[0] for name, one in products.items()}, base)
    write_tensors(directory / WEIGHTS_FILE, tensors)
    write_json(directory / CONFIG_FILE, config | dict(further or {}))
    return sum(tensor.nbytes for tensor in tensors.values())


def files_fingerprint(directory: Path) -> str:
    """SHA-256 over the bytes of an adapter's config and weights, hex."""
    digest = hashlib.sha256()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        with (directory / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def read_config(directory: Path) -> dict[str, Any]:
    """`adapter_config.json` of an adapter; CheckpointError where files are missing or pickled."""
    if not directory.is_dir():
        raise CheckpointError(
            f"there is no directory {directory}",
            f"an adapter's, with {CONFIG_FILE} and {WEIGHTS_FILE}",
            "check the path",
        )
    if not (directory / WEIGHTS_FILE).exists() and (directory / "adapter_model.bin").exists():
        raise CheckpointError(
            f"{directory} has pickled weights only (adapter_model.bin)",
            f"{WEIGHTS_FILE}; opening a pickle can run any code, and tailorbird never does",
            "if you trust the file, load it with PEFT and save it anew with `save_pretrained`",
        )
    return read_json(directory / CONFIG_FILE)


@dataclass(frozen=True, eq=False)
class LoraSettings:
    """What adapter_config.json says.

    Attributes
    ----------
    directory : Path
    config : dict
    """

    directory: Path
    config: dict[str, Any]

    def refused(self, name: str, expected: str, remedy: str | None = None) -> SettingsError:
        """The error for one setting."""
        given = repr(self.config.get(name))[:200]
        return SettingsError(
            f"{self.directory / CONFIG_FILE}: `{name}` is {given}",
            expected,
            remedy or f"correct {CONFIG_FILE}, or train the adapter anew with another `{name}`",
        )

    def check(self) -> None:
        """Refuse what isn't a plain LoRA."""
        kind = self.config.get("peft_type")
        if kind in BEGINNINGS:
            raise self.refused(
                "peft_type",
                f"LORA; {BEGINNINGS[kind]} are no change of weights",
                "run it with PEFT, or tune with another method, such as lora",
            )
        if kind != "LORA":
            raise self.refused("peft_type", "LORA, the kind that can be merged", _INSTEAD)
        if self.config.get("bias") not in (None, "none"):
            raise self.refused("bias", "none: biases of the model aren't merged", _INSTEAD)
        start = self.config.get("init_lora_weights")
        if isinstance(start, str) and start.startswith(CHANGES_WEIGHTS):
            raise self.refused(
                "init_lora_weights",
                "one that leaves the model's weights alone",
                "save the adapter for the weights as they are (PEFT's "
                "`path_initial_model_for_weight_conversion`)",
            )
        for name, value in self.config.items():
            if name not in _UNDERSTOOD and value not in (None, False, "", [], {}):
                raise self.refused(name, f"no `{name}`, which is more than a plain LoRA", _INSTEAD)

    def check_base(self, checkpoint: Checkpoint) -> None:
        """Refuse an adapter that was tuned on other weights, where the file beside it says on which."""
        path = self.directory / ORIGIN
        base = read_json(path).get("base") if path.exists() else None
        if base is None or base == identity(checkpoint):
            return
        # where the files call tensors by older names, the adapter may know them by those
        if base != identity(open_checkpoint(str(checkpoint.directory))):
            raise SettingsError(
                f"{path}: an adapter of weights with the identity {str(base)[:64]}",
                f"one of {checkpoint.directory}, whose weights are {identity(checkpoint)}",
                "give the checkpoint on which it was tuned",
            )

    def scales(self, weights: Weights, anatomy: Anatomy) -> dict[str, float]:
        """Linears that the file changes, and s of each, once it holds their tensors and no others."""
        scaling = self.scaling()
        scales: dict[str, float] = {}
        problems: list[str] = []
        known: set[str] = set()
        for place in anatomy.linears():
            own, scale = scaling(place.name)
            shapes = {
                f"{PREFIX}{place.name}.{DOWN}": (own, place.in_features),
                f"{PREFIX}{place.name}.{UP}": (place.out_features, own),
            }
            if any(name in weights for name in shapes):
                scales[place.name] = scale
                problems += shape_problems(weights, shapes)
                known |= shapes.keys()
        for name in sorted(set(weights.names) - known):
            problems.append(f"`{name}` {list(weights.info(name).shape)} belongs to no linear of the blocks")
        if not problems and not scales:
            problems.append("for linears of the blocks there is none")
        if problems:
            more = len(problems) - _MOST_PROBLEMS
            raise CheckpointError(
                f"{weights.files[0]}: tensor " + "; ".join(problems[:_MOST_PROBLEMS])
                + (f"; and {more} more" if more > 0 else ""),
                "for each linear that the adapter changes A [r, in_features] and B [out_features, r], in "
                "float32, bfloat16 or float16, and nothing else",
                "check that the adapter was trained for this model, on linears of its blocks only",
            )  # fmt: skip
        return scales

    def scaling(self) -> Callable[[str], tuple[int, float]]:
        """What gives rank and s of a linear by its name; SettingsError where the config doesn't say them."""
        ranks, alphas = self._patterns("rank_pattern"), self._patterns("alpha_pattern")
        rank, alpha = self.config.get("r"), self.config.get("lora_alpha")
        if type(rank) is not int or rank < 1:
            raise self.refused("r", "a whole number of at least 1")
        if not is_finite(alpha):
            raise self.refused("lora_alpha", "a finite number")
        stable = self.config.get("use_rslora") or False
        if not isinstance(stable, bool):
            raise self.refused("use_rslora", "true or false")

        def of(name: str) -> tuple[int, float]:
            own = matching(ranks, name, rank)
            if type(own) is not int or own < 1:
                raise self.refused("rank_pattern", "ranks, whole numbers of at least 1")
            return own, matching(alphas, name, alpha) / (math.sqrt(own) if stable else own)

        return of

    def _patterns(self, name: str) -> Patterns:
        found = compile_patterns(self.config.get(name) or {})
        if found is None:
            raise self.refused(
                name, "regular expressions with a few repeats, none of a group, and a finite number for each"
            )
        return found


def shape_problems(weights: Weights, shapes: Mapping[str, tuple[int, int]]) -> list[str]:
    """What is wrong with an adapter's tensors of these names, if they should have these shapes."""
    found = []
    for name, shape in shapes.items():
        if name not in weights:
            found.append(f"`{name}` {list(shape)} is missing")
        elif weights.info(name).shape != shape:
            found.append(f"`{name}` is {list(weights.info(name).shape)}, not {list(shape)}")
        elif weights.info(name).dtype not in DTYPES:
            found.append(f"`{name}` is stored as {weights.info(name).dtype}")
    return found


def _folded(
    settings: LoraSettings, checkpoint: Checkpoint, anatomy: Anatomy, scales: Mapping[str, float]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By what inputs and outputs of linears were divided, where the adapter is one of the source.

    Raises
    ------
    SettingsError
        It changes folded linears, and doesn't say on what it was trained; or the source was rotated, or the
        inputs of such linears were shifted, and the adapter isn't one of the checkpoint itself.
    """
    directory = checkpoint.directory
    named = settings.config.get("base_model_name_or_path")
    if (directory / ROTATION_FILE).exists() and not same_model(named, str(directory)):
        raise settings.refused(
            "base_model_name_or_path",
            f"{str(directory)!r}, whose channels are rotated against those of its source",
            f"train it on this checkpoint; if it was, write that into {CONFIG_FILE}",
        )
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    shifted: set[str] = set()
    if not (directory / FOLDS_FILE).exists():
        return inputs, outputs
    for block in read_folds(directory, anatomy):
        for pair, factors in block.pairs:
            outputs[pair.source] = inputs[pair.target] = factors
        for group, factors in block.norms:
            inputs |= dict.fromkeys(group.linears, factors)
        for group, *_ in block.shifts:
            shifted.update(group.linears)
    touched = [name for name in scales if name in inputs or name in outputs or name in shifted]
    if not touched or same_model(named, str(directory)):
        return {}, {}
    for name in touched:
        if name in shifted:
            raise settings.refused(
                "base_model_name_or_path",
                f"{str(directory)!r}, whose channels are shifted against those of its source (`{name}`)",
                f"train it on this checkpoint; if it was, write that into {CONFIG_FILE}",
            )
    plan = directory / "plan.yaml"
    stated = load_plan(plan).source if plan.exists() else None
    source = (stated and stated.model) or "unknown"
    if not same_model(named, source):
        raise settings.refused(
            "base_model_name_or_path",
            f"{str(directory)!r} or its source {source!r}, which have other channel scales (`{touched[0]}`)",
            f"write the one of these two on which the adapter was trained into {CONFIG_FILE}",
        )
    return inputs, outputs
