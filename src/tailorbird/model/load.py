"""Opens a model for use: compressed or dense, checked, nothing in it executed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tailorbird.model.checkpoint import open_checkpoint


def load(directory: str | Path, dtype: torch.dtype | None = None, verify: bool = False) -> Any:
    """Load a causal language model for inference on the CPU.

    Gives the same model, bit for bit, as `AutoModelForCausalLM.from_pretrained(directory)`.

    Parameters
    ----------
    directory : str or Path
        As `tailorbird.model.checkpoint.locate`: a directory, a Hugging Face id, or `demo`.
    dtype : torch.dtype, optional
        Of activations and float tensors; default: the one that config.json states. Packed codes and
        scales stay as stored.
    verify : bool
        Compare every tensor with its recorded SHA-256 first; reads all weights once more.

    Returns
    -------
    transformers.PreTrainedModel
        In evaluation mode.

    Raises
    ------
    ModelNotFound, CheckpointError, UnsupportedArchitecture
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from tailorbird.model.quantizer import register

    register()
    checkpoint = open_checkpoint(str(directory))
    if verify:
        checkpoint.weights.verify(checkpoint.weights.names)
    shows_progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return AutoModelForCausalLM.from_pretrained(
            checkpoint.directory,
            dtype="auto" if dtype is None else dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
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
