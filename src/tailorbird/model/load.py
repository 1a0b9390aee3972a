"""Opens a model for use: compressed or dense, checked, nothing in it executed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tailorbird.model.anatomy import layout_of
from tailorbird.model.checkpoint import Checkpoint, open_checkpoint
from tailorbird.model.file_names import INDEX_FILE
from tailorbird.model.json_file import read_json
from tailorbird.model.naming import check_tensors, translate
from tailorbird.model.outline import build_outline
from tailorbird.model.safetensors_header import damaged


def load(
    directory: str | Path,
    dtype: torch.dtype | None = None,
    verify: bool = False,
    bits: int | None = None,
) -> Any:
    """Load a causal language model for inference on the CPU.

    Gives the same model, bit for bit, as `AutoModelForCausalLM.from_pretrained(directory)`, unless `bits` is
    given.

    Parameters
    ----------
    directory : str or Path
        As `tailorbird.model.checkpoint.locate`: a directory, a Hugging Face id, or `demo`.
    dtype : torch.dtype, optional
        Of activations and float tensors; default: the one that config.json states. Packed codes and
        scales stay as stored.
    verify : bool
        Compare every tensor with its recorded SHA-256 first; reads all weights once more.
    bits : int, optional
        6, 4 or 2: take packed linears as so many of their 8 bits have them (`formats/nested.py`), as with the
        recipe ``double-rounding``. They are made narrower one by one; memory holds them so.

    Returns
    -------
    transformers.PreTrainedModel
        In evaluation mode.

    Raises
    ------
    ModelNotFound, CheckpointError, UnsupportedArchitecture
    SettingsError
        There is no reading at so many bits.
    """
    from tailorbird.model.quantizer import register

    register()
    checkpoint = open_checkpoint(str(directory), bits)
    if verify:
        checkpoint.weights.verify(checkpoint.weights.names)
    with _without_progress():
        return _from_files(checkpoint, dtype) if bits is None else _from_tensors(checkpoint, dtype)


def _from_files(checkpoint: Checkpoint, dtype: torch.dtype | None) -> Any:
    """The model of the files in the checkpoint's directory."""
    from transformers import AutoModelForCausalLM

    index = checkpoint.directory / INDEX_FILE
    if index.exists() and "metadata" not in read_json(index):
        raise damaged(index, "has no `metadata`", "one, which transformers asks for; it may be empty")
    return AutoModelForCausalLM.from_pretrained(
        checkpoint.directory,
        dtype="auto" if dtype is None else dtype,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
    )


def _from_tensors(checkpoint: Checkpoint, dtype: torch.dtype | None) -> Any:
    """The model of tensors that `checkpoint.weights` makes while they are read."""
    from transformers import GenerationConfig

    stored = build_outline(checkpoint.config, layout_of(checkpoint)).model
    expected = stored.state_dict()
    weights = translate(checkpoint.weights, expected, stored.base_model_prefix)
    ignored = check_tensors(weights, expected, dict(stored.all_tied_weights_keys))
    model = type(stored).from_pretrained(
        None,
        config=checkpoint.config,
        state_dict={name: weights.read(name) for name in weights.names if name not in ignored},
        dtype="auto" if dtype is None else dtype,
    )
    model.name_or_path = model.config.name_or_path = str(checkpoint.directory)
    if (checkpoint.directory / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.directory)
    return model


@contextmanager
def _without_progress() -> Iterator[None]:
    """Let transformers show no bar of its own."""
    from transformers.utils import logging

    shows_progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shows_progress:
            logging.enable_progress_bar()


def load_tokenizer(directory: str | Path) -> Any:
    """Load the tokenizer of a model; as `load` for `directory` and errors.

    Returns
    -------
    transformers.PreTrainedTokenizerBase
    """
    return open_checkpoint(str(directory)).tokenizer()
