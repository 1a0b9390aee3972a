"""Adapters for a checkpoint whose source's channels were scaled, shifted (`linear/folds.py`) or rotated.

Such a fold divides what a linear reads by s and multiplies its weight's columns by s, or divides a linear's
rows. An adapter that was trained on the source expects inputs and outputs as they were: with s_in over its
inputs and s_out over its outputs, B A becomes diag(1 / s_out) B A diag(s_in), which is exact but for the
rounding of the folded norm. One that was trained on the folded checkpoint fits as it is. Which of both an
adapter is only its config can tell. After a rotation (`linear/rotate`), and for linears whose inputs were
shifted, which would take a bias, only the latter is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from tailorbird.errors import SettingsError
from tailorbird.formats.peft import CONFIG_FILE
from tailorbird.kernels.adapters import LinearAdapter
from tailorbird.linear.folds import FOLDS_FILE, read_folds
from tailorbird.linear.rotate.weights import ROTATION_FILE
from tailorbird.model.anatomy import read_anatomy
from tailorbird.model.checkpoint import Checkpoint
from tailorbird.model.location import same_model
from tailorbird.plan.planfile import load_plan
from tailorbird.serve.adapters.source import Source

#: kinds that a fold passes through: what they are made of are products and factors alone
_PLAIN = ("LORA", "VERA", "IA3")


@dataclass(frozen=True, eq=False)
class Folds:
    """The scales of a folded checkpoint, and which of its inputs were shifted; or that it was rotated.

    Attributes
    ----------
    served, source : str
        Directory of the checkpoint, and what it was made of, as its plan names it.
    inputs, outputs : mapping of str to Tensor
        Module path -> by what its inputs or outputs were divided, float32.
    shifted : frozenset of str
        Paths of linears whose inputs were shifted.
    rotated : bool
        Every linear reads or writes other channels than in the source.
    """

    served: str
    source: str
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    shifted: frozenset[str] = frozenset()
    rotated: bool = False

    def needed(self, source: Source, adapted: Mapping[str, object]) -> bool:
        """Whether the adapter must be scaled to fit.

        Raises
        ------
        SettingsError
            It adapts folded linears, and doesn't say on what it was trained, or can't be scaled; or linears
            with shifted inputs or of a rotated model, and wasn't trained on that.
        """
        changed = self.inputs.keys() | self.outputs.keys() | self.shifted
        touched = [p for p in adapted if self.rotated or p in changed]
        named = source.config.get("base_model_name_or_path")
        if not touched or same_model(named, self.served):
            return False
        where = f"{source.directory / CONFIG_FILE}"
        shifted = [p for p in touched if p in self.shifted]
        if self.rotated or shifted:
            how = f"rotated against those of its source (`{touched[0]}`)"
            if shifted:
                how = f"shifted against those of its source (`{shifted[0]}`)"
            raise SettingsError(
                f"{where}: `base_model_name_or_path` is {str(named)[:200]!r}, and the channels of the "
                f"checkpoint in {self.served} are {how}",
                "an adapter that was trained on this checkpoint",
                f"train it on this checkpoint; if it was, write that into {CONFIG_FILE}",
            )
        if not same_model(named, self.source):
            raise SettingsError(
                f"{where}: `base_model_name_or_path` is {str(named)[:200]!r}, and the checkpoint in "
                f"{self.served} has other channel scales than its source {self.source!r} (`{touched[0]}`)",
                "the one of these two on which the adapter was trained",
                f"write it into {CONFIG_FILE}",
            )
        plain = source.config.get("peft_type") in _PLAIN and not source.config.get("use_dora")
        if not plain or source.stored_biases or source.config.get("lora_bias"):
            raise SettingsError(
                f"{where}: an adapter with DoRA, biases or a shared basis, trained on {self.source!r}, for a "
                f"checkpoint with other channel scales (`{touched[0]}`)",
                "one of " + ", ".join(_PLAIN) + " without these, which can be scaled to fit",
                "train it on this checkpoint, or compress the source by a method without a fold",
            )
        return True

    def refuse_source(self, source: Source, how: str) -> None:
        """SettingsError for what a text begins with, unless it was tuned on this checkpoint.

        Parameters
        ----------
        source : Source
        how : str
            What was done to the channels that it has.
        """
        named = source.config.get("base_model_name_or_path")
        if not same_model(named, self.served):
            raise SettingsError(
                f"{source.directory / CONFIG_FILE}: `base_model_name_or_path` is {str(named)[:200]!r}, and "
                f"channels of the checkpoint in {self.served} are {how} against those of its source",
                "an adapter that was tuned on this checkpoint",
                f"tune it on this checkpoint; if it was, write that into {CONFIG_FILE}",
            )

    def applied(self, path: str, linear: LinearAdapter) -> LinearAdapter:
        """What an adapter of the source makes of the linear at `path` of the folded checkpoint."""
        down, up = linear.down, linear.up
        if isinstance(down, Tensor) and path in self.inputs:
            down = down.float() * self.inputs[path]
        if isinstance(up, Tensor) and path in self.outputs:
            up = up.float() / self.outputs[path][:, None]
        return replace(linear, down=down, up=up)


def folds_of(checkpoint: Checkpoint) -> Folds | None:
    """The folds of a checkpoint; None where nothing was folded or rotated.

    Raises
    ------
    CheckpointError
        Their file is damaged.
    """
    directory = checkpoint.directory
    rotated = (directory / ROTATION_FILE).exists()
    if not rotated and not (directory / FOLDS_FILE).exists():
        return None
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    shifted: set[str] = set()
    for block in read_folds(directory, read_anatomy(checkpoint)):
        for pair, scales in block.pairs:
            outputs[pair.source] = inputs[pair.target] = scales
        for group, scales in block.norms:
            inputs |= dict.fromkeys(group.linears, scales)
        for group, *_ in block.shifts:
            shifted.update(group.linears)
    plan = directory / "plan.yaml"
    source = load_plan(plan).source if plan.exists() else None
    named = (source and source.model) or "unknown"
    return Folds(str(directory), named, inputs, outputs, frozenset(shifted), rotated)
