"""A LoRA adapter in PEFT's layout, as the change that it makes to the weight of each linear.

    T = W + s B A,    s = alpha / r, or alpha / sqrt(r) for rsLoRA (https://arxiv.org/abs/2312.03732)

LoRA (https://arxiv.org/abs/2106.09685) is the one kind that is nothing else than such a change. What is more
than that is refused by name. `fan_in_fan_out` only says that the weight itself is stored as `[in, out]`: A
`[r, in]` and B `[out, r]` stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tailorbird.adapt.merge.change import LowRankChange
from tailorbird.adapt.merge.files import (
    AdapterSettings,
    files_fingerprint,
    folded,
    read_config,
    refuse_tensors,
    shape_problems,
)
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
from tailorbird.linear.product import Product
from tailorbird.model.anatomy import Anatomy
from tailorbird.model.checkpoint import Checkpoint
from tailorbird.model.weights import Weights
from tailorbird.model.writing import write_json, write_tensors

#: settings that are read here, or say nothing about what the tensors of a plain LoRA mean
_UNDERSTOOD = frozenset(
    {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights",
     "fan_in_fan_out", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout",
     "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config", "megatron_core",
     "qalora_group_size"}
)  # fmt: skip
_INSTEAD = "serve it beside the model (`tailorbird serve --adapter`), or train a plain LoRA"


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

    def change(self, name: str) -> LowRankChange | None:
        """The change of one linear, read from the file; None where it stays as it is."""
        if name not in self._scales:
            return None
        down = self._weights.read(f"{PREFIX}{name}.{DOWN}", torch.float32)
        up = self._weights.read(f"{PREFIX}{name}.{UP}", torch.float32) * self._scales[name]
        if name in self._inputs:
            down = down * self._inputs[name]
        if name in self._outputs:
            up = up / self._outputs[name][:, None]
        return LowRankChange(up, down)

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
        inputs, outputs = folded(settings, checkpoint, anatomy, scales)
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


class LoraSettings(AdapterSettings):
    """What adapter_config.json says of a LoRA."""

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
            raise self.refused("peft_type", "LORA, or GLORA for a merge", _INSTEAD)
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
        self.refuse_others(_UNDERSTOOD, "which is more than a plain LoRA", _INSTEAD)

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
        refuse_tensors(weights, known, problems, "A [r, in_features] and B [out_features, r]")
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
