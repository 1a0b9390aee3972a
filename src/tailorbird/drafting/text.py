"""Windows of text that heads learn from, and others on which they are measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tailorbird.calibrate.documents import read_documents, split_held_out
from tailorbird.calibrate.text import token_windows
from tailorbird.model.checkpoint import Checkpoint
from tailorbird.model.location import demo_text, locate
from tailorbird.progress import Progress
from tailorbird.run.generate import sample_text

#: Windows to learn from for each one to measure on.
LEARNED_PER_HELD_OUT = 8


def windows_of(
    checkpoint: Checkpoint,
    model: Any,
    tokenizer: Any,
    data: str | None,
    sequences: int,
    length: int,
    seed: int,
    progress: Progress,
) -> tuple[Tensor, Tensor, str]:
    """Windows to learn from, others to measure on, both int64 ``[n, length]``, and where they come from.

    Without `data` the demo has texts of its own, and another model writes some itself.

    Raises
    ------
    TextError
        Whatever is wrong with the text.
    """
    held_out = max(1, sequences // LEARNED_PER_HELD_OUT)
    if data is None and checkpoint.directory != locate("demo"):
        ids = sample_text(model, tokenizer, sequences + held_out, length, seed, progress=progress)
        return ids[:sequences], ids[sequences:], "written by the model itself"
    if data is None:
        learned = read_documents(demo_text("calibration"), tokenizer)
        others, source = read_documents(demo_text("held_out"), tokenizer), "the demo's own texts"
    else:
        learned, others = split_held_out(read_documents(Path(data), tokenizer))
        source = data
    return (
        token_windows(learned, tokenizer, length, sequences, seed).ids.to(torch.int64),
        token_windows(others, tokenizer, length, held_out, seed).ids.to(torch.int64),
        source,
    )
