"""The files of an adapter, of whatever kind: its config, what they hash to, and for which weights they are.

For a checkpoint whose channels were scaled (`linear/folds.py`) an adapter of its source is scaled to fit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tailorbird.adapt.save import ORIGIN
from tailorbird.errors import CheckpointError, SettingsError
from tailorbird.formats.peft import CONFIG_FILE, WEIGHTS_FILE
from tailorbird.linear.folds import FOLDS_FILE, read_folds
from tailorbird.linear.rotate.weights import ROTATION_FILE
from tailorbird.model.anatomy import Anatomy
from tailorbird.model.checkpoint import Checkpoint, open_checkpoint
from tailorbird.model.identity import identity
from tailorbird.model.json_file import read_json
from tailorbird.model.location import same_model
from tailorbird.model.weights import Weights
from tailorbird.plan.planfile import load_plan

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: settings that say nothing about what the tensors mean
SAYS_NOTHING = frozenset(
    {"peft_type", "target_modules", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
     "task_type", "peft_version"}
)  # fmt: skip
#: problems that one message lists
_MOST_PROBLEMS = 6


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
class AdapterSettings:
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

    def refuse_others(self, understood: Iterable[str], expected: str, remedy: str) -> None:
        """Refuse settings beside these and `SAYS_NOTHING`, unless they are empty."""
        known = {*understood, *SAYS_NOTHING}
        for name, value in self.config.items():
            if name not in known and value not in (None, False, "", [], {}):
                raise self.refused(name, f"no `{name}`, {expected}", remedy)

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


def shape_problems(weights: Weights, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
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


def refuse_tensors(weights: Weights, known: Collection[str], problems: list[str], expected: str) -> None:
    """Refuse an adapter that has tensors beside `known`, none of those, or any of the `problems`."""
    for name in sorted(set(weights.names) - set(known)):
        problems.append(f"`{name}` {list(weights.info(name).shape)} belongs to no linear of the blocks")
    if not problems and not known:
        problems.append("for linears of the blocks there is none")
    if problems:
        more = len(problems) - _MOST_PROBLEMS
        raise CheckpointError(
            f"{weights.files[0]}: tensor " + "; ".join(problems[:_MOST_PROBLEMS])
            + (f"; and {more} more" if more > 0 else ""),
            f"for each linear that the adapter changes {expected}, in float32, bfloat16 or float16, and "
            "nothing else",
            "check that the adapter was trained for this model, on linears of its blocks only",
        )  # fmt: skip


def folded(
    settings: AdapterSettings, checkpoint: Checkpoint, anatomy: Anatomy, names: Collection[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By what inputs and outputs of linears were divided, where the adapter is one of the source.

    Parameters
    ----------
    settings : AdapterSettings
    checkpoint : Checkpoint
    anatomy : Anatomy
        Of that checkpoint.
    names : collection of str
        The linears that the adapter changes.

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
    touched = [name for name in names if name in inputs or name in outputs or name in shifted]
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
