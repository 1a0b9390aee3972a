"""Quality of a checkpoint on a user's text: the `evaluate` command."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from tailorbird.calibrate.stream import StreamingModel
from tailorbird.calibrate.text import (
    held_out_windows,
    read_documents,
)
from tailorbird.errors import SettingsError, TextError
from tailorbird.evaluate.streamed import measure_quality
from tailorbird.model.anatomy import read_anatomy
from tailorbird.model.checkpoint import demo_text, locate, open_checkpoint
from tailorbird.progress import Progress

HELD_OUT_TOKENS = 32_768
LONGEST_HELD_OUT_WINDOW = 2048


def evaluate(
    model: str,
    text: str | None,
    reference: str | None,
    context: int | None,
    progress: Progress,
    bits: int | None = None,
) -> dict[str, Any]:
    """Fields of `api.Evaluation`; `bits` is of `model` alone."""
    checkpoint = open_checkpoint(model, bits)
    anatomy = read_anatomy(checkpoint)
    against = open_checkpoint(reference) if reference is not None else None
    other = read_anatomy(against) if against is not None else None
    if other is not None and other.vocab_size != anatomy.vocab_size:
        raise SettingsError(
            f"reference {reference} with {other.vocab_size} tokens",
            f"the vocabulary of {model}, {anatomy.vocab_size} tokens",
            "compare a model with its own source",
        )
    tokenizer = checkpoint.tokenizer()
    longest = min(one.context for one in (anatomy, other) if one is not None)
    if context is not None and not 2 <= context <= longest:
        raise SettingsError(
            f"a context of {context} tokens", f"2 to {longest} tokens", "choose another --context"
        )
    if text is None:
        if locate("demo") not in (checkpoint.directory, against.directory if against else None):
            raise TextError("no held-out text", "text to measure on", "give --text FILE")
        text = str(demo_text("held_out"))
    window = context or min(longest, LONGEST_HELD_OUT_WINDOW)
    windows = held_out_windows(read_documents(Path(text), tokenizer), tokenizer, window, HELD_OUT_TOKENS)
    progress.stage("evaluate", len(anatomy.blocks) + 1)
    with tempfile.TemporaryDirectory(prefix="tailorbird-") as scratch:
        first = StreamingModel(checkpoint, anatomy)
        if against is None or other is None:
            quality = measure_quality(first, None, windows.ids, Path(scratch), progress)
            return {"perplexity": quality.perplexity_before, "tokens": windows.tokens}
        quality = measure_quality(StreamingModel(against, other), first, windows.ids, Path(scratch), progress)
    return {
        "perplexity": quality.perplexity_after,
        "tokens": windows.tokens,
        "kl_mean": quality.kl_mean,
        "kl_p99": quality.kl_p99,
        "top1_agreement": quality.top1_agreement,
    }
