"""An adapter that `tune` wrote and that is no change of weights, in place on a model again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tailorbird.adapt.methods.adapter import OWN_TYPE, Attached
from tailorbird.adapt.methods.attach import attach
from tailorbird.adapt.methods.peft.injected import library
from tailorbird.adapt.methods.registry import method_named
from tailorbird.adapt.methods.wrapped import Wrapped
from tailorbird.adapt.places import places_of
from tailorbird.adapt.save import ORIGIN
from tailorbird.adapt.wrap import put
from tailorbird.errors import CheckpointError, SettingsError
from tailorbird.formats.peft import BEGINNINGS, CONFIG_FILE, WEIGHTS_FILE
from tailorbird.model.anatomy import read_anatomy
from tailorbird.model.checkpoint import open_checkpoint
from tailorbird.model.identity import identity
from tailorbird.model.json_file import read_json
from tailorbird.model.load import load
from tailorbird.model.weights import Weights

#: Tensors that one message names.
_MOST_NAMED = 6


def load_adapted(model: str, directory: Path, dtype: torch.dtype | None = None) -> Any:
    """A model with an adapter that no other tool knows, such as a mixture of experts, or learned beginnings.

    Texts begin with learned tokens, keys and values through PEFT's own model.

    Parameters
    ----------
    model : str
        Directory, Hugging Face id or ``demo``, of the weights that the adapter was tuned on.
    directory : Path
        As `tune` wrote it, with `OWN_TYPE` or one of `BEGINNINGS` in its config.
    dtype : torch.dtype, optional
        As of `load`.

    Returns
    -------
    transformers.PreTrainedModel or peft.PeftModel
        In evaluation mode.

    Raises
    ------
    SettingsError
        The adapter is one of another type, or belongs to other weights.
    ResourceError
        PEFT is needed, and isn't installed.
    CheckpointError
        Its files are missing or damaged, or hold other tensors than the method has on this model.
    """
    kind = read_json(directory / CONFIG_FILE).get("peft_type")
    if kind != OWN_TYPE and kind not in BEGINNINGS:
        raise SettingsError(
            f"{directory} holds an adapter of type {kind}", "one of " + ", ".join((OWN_TYPE, *BEGINNINGS)),
            "load it with PEFT, or serve it with --adapter",
        )  # fmt: skip
    origin, checkpoint = _origin(directory / ORIGIN), open_checkpoint(model)
    if origin["base"] != identity(checkpoint):
        raise SettingsError(
            f"an adapter of {origin['base_name']} for {model}", "the weights that it was tuned on",
            f"give {origin['base_name']}",
        )  # fmt: skip
    loaded = load(model, dtype=dtype).requires_grad_(False)
    settings = origin["method"]
    places = {}  # beginnings change no linear, and suit models whose blocks aren't understood
    if kind == OWN_TYPE:
        places = places_of(loaded, read_anatomy(checkpoint), settings["targets"])
    method = attach(
        method_named(settings["method"], **settings["method_settings"]), loaded, places,
        torch.Generator().manual_seed(settings["seed"]),
    )  # fmt: skip
    weights, writer = Weights.open_file(directory / WEIGHTS_FILE), _writer(method)
    own = writer.files()
    _refuse_others(weights, writer.state_dict() if own is None else own[0], settings["method"])
    if kind in BEGINNINGS:
        made = library().PeftModel.from_pretrained(loaded, directory).eval()
        made.word_embeddings = loaded.get_input_embeddings()  # PEFT finds no packed ones
        return made
    writer.load_state_dict({name: weights.read(name) for name in weights.names})
    put(loaded, places, method.requires_grad_(False))
    return loaded


def _origin(file: Path) -> dict[str, Any]:
    """What `tune` wrote of the weights that an adapter is for, and of its method."""
    origin = read_json(file)
    missing = [name for name in ("base", "base_name", "method") if name not in origin]
    if missing:
        raise CheckpointError(
            f"{file} doesn't say `{'`, `'.join(missing)}`", "the file as `tailorbird tune` wrote it",
            "copy it once more from where the adapter was tuned",
        )  # fmt: skip
    return origin


def _refuse_others(weights: Weights, expected: Mapping[str, Tensor], method: str) -> None:
    """CheckpointError where a file's tensors aren't those that a method has on the model."""
    problems = [
        f"`{name}` {list(expected[name].shape)} is missing" for name in expected if name not in weights
    ]
    for name in weights.names:
        stored = list(weights.info(name).shape)
        if name not in expected:
            problems.append(f"`{name}` {stored} is none of the method's")
        elif stored != list(expected[name].shape):
            problems.append(f"`{name}` is {stored}, not {list(expected[name].shape)}")
    if problems:
        more = len(problems) - _MOST_NAMED
        raise CheckpointError(
            f"{weights.files[0]}: tensor " + "; ".join(problems[:_MOST_NAMED])
            + (f"; and {more} more" if more > 0 else ""),
            f"the {len(expected)} tensors of `{method}` with the settings in {ORIGIN}",
            "copy all files of the adapter once more from where it was tuned, or tune anew",
        )  # fmt: skip


def _writer(method: Attached) -> Attached:
    """The part of a method whose tensors are those of the file: within wrappers, the one with `files`."""
    while isinstance(method, Wrapped) and method.inner.files() is not None:
        method = method.inner
    return method
