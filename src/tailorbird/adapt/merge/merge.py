"""`adapters merge`: from a checkpoint, an adapter and text to a checkpoint that has taken the adapter in."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import tailorbird
from tailorbird.adapt.merge.adapted import AdaptedModel
from tailorbird.adapt.merge.adapter import LoraAdapter, write_lora
from tailorbird.adapt.merge.change import Adapter
from tailorbird.adapt.merge.files import read_config
from tailorbird.adapt.merge.gate import Survival, measure, measure_again
from tailorbird.adapt.merge.glora import GloraAdapter
from tailorbird.adapt.merge.pipeline import Merger, Residual, packed_places
from tailorbird.adapt.methods.glora import is_glora
from tailorbird.calibrate.job import Job, check_output
from tailorbird.calibrate.stream import StreamingModel
from tailorbird.calibrate.text import (
    Windows,
    check_disjoint,
    held_out_windows,
    read_documents,
    split_held_out,
    token_windows,
)
from tailorbird.errors import CheckpointError, GateRefused, SettingsError
from tailorbird.evaluate.checkpoint import HELD_OUT_TOKENS, LONGEST_HELD_OUT_WINDOW
from tailorbird.hardware.memory import peak_resident_bytes, return_freed_memory
from tailorbird.model.anatomy import Anatomy, read_anatomy
from tailorbird.model.checkpoint import Checkpoint, open_checkpoint
from tailorbird.model.identity import identity
from tailorbird.model.writing import write_json
from tailorbird.progress import Progress, Silent

#: calibration windows, and their tokens, unless the user says so
SEQUENCES, LONGEST_WINDOW = 128, 512
#: beside the weights: what was merged into what, and what survived
MANIFEST = "merge.json"
#: directory of the adapter that holds what merging lost
RESIDUAL = "residual"


@dataclass(frozen=True)
class MergeResult:
    """A merged checkpoint.

    Attributes
    ----------
    output : str
    loss_base, loss_adapter, loss_merged : float
        On held-out text, nats per token: of the base, of the base with the adapter beside it, and of the
        result, with the residual adapter where there is one.
    gain_kept : float or None
        Share of the adapter's gain that survived; None where it gains nothing on this text.
    kl_base, kl_mean : float
        Mean divergence of base and result from the base with the adapter, nats per token.
    residual_rank, residual_adapter_bytes : int
        Of the adapter in ``OUT/residual``; 0 where none was needed.
    tokens : int
        Held-out tokens.
    seconds : float
        Of this run.
    peak_rss_bytes : int
    notes : list of str
        What should be known about the numbers.
    """

    output: str
    loss_base: float
    loss_adapter: float
    loss_merged: float
    gain_kept: float | None
    kl_base: float
    kl_mean: float
    residual_rank: int
    residual_adapter_bytes: int
    tokens: int
    seconds: float
    peak_rss_bytes: int
    notes: list[str]


@dataclass(frozen=True, eq=False)
class Texts:
    """By what is rounded, and on what is measured.

    Attributes
    ----------
    calibration : Windows or None
        None where no packed weight changes.
    held_out : Windows
    notes : tuple of str
        What should be known about them.
    """

    calibration: Windows | None
    held_out: Windows
    notes: tuple[str, ...] = ()


#: Gives the texts for a checkpoint, told whether packed weights change.
ReadTexts = Callable[[Checkpoint, Anatomy, bool], Texts]


@dataclass(frozen=True, eq=False)
class _Inputs:
    """What is merged, and by which text."""

    model: str
    checkpoint: Checkpoint
    anatomy: Anatomy
    adapter: Adapter
    texts: Texts
    keep_share: float
    residual_rank: int
    seed: int

    def record(self) -> dict[str, Any]:
        """Everything that decides the bytes of the result."""
        import transformers

        return {
            "command": "merge",
            "base": {"model": self.model, "fingerprint": self.checkpoint.fingerprint},
            "adapter": {"directory": str(self.adapter.directory), "fingerprint": self.adapter.fingerprint},
            "calibration": None if self.texts.calibration is None else self.texts.calibration.fingerprint,
            "evaluation": self.texts.held_out.fingerprint,
            "keep_share": self.keep_share,
            "residual_rank": self.residual_rank,
            "seed": self.seed,
            "threads": torch.get_num_threads(),
            "versions": {
                "tailorbird": tailorbird.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }


def merge_adapter(
    model: str,
    adapter: Path,
    output: Path,
    data: str,
    calibration: str | None = None,
    keep_share: float = 0.95,
    residual_rank: int = 8,
    sequences: int | None = None,
    length: int | None = None,
    seed: int = 0,
    resume: bool = False,
    progress: Progress | None = None,
) -> MergeResult:
    """Merge a LoRA or GLoRA adapter into a checkpoint, dense or packed, which keeps its format.

    Parameters
    ----------
    model : str
        Directory, Hugging Face id or ``demo``; it stays as it is.
    adapter : Path
        Directory in PEFT's layout, or as `tune` wrote it; it stays as it is.
    output : Path
        Must not exist.
    data : str
        File or directory of text to measure on. Without `calibration`, and where packed weights change, a
        tenth of it is measured on and the rest calibrates.
    calibration : str, optional
        File or directory of text by which packed weights are rounded.
    keep_share : float
        Least share of the adapter's gain that must survive, above 0 and up to 1.
    residual_rank : int
        Most rank of an adapter that makes up for what packed weights can't hold; 0 allows none.
    sequences, length : int, optional
        Calibration windows and their tokens.
    seed : int
    resume : bool
        Insist that there is something to resume.
    progress : Progress, optional

    Raises
    ------
    UserError
        Something about the input; nothing was written.
    GateRefused
        Less survived; the result is kept as ``OUT.rejected``, and `error.result` holds the `MergeResult`.
    """
    read = partial(_read_texts, data, calibration, sequences, length, seed)
    return merge_on_texts(
        model, adapter, output, read, keep_share, residual_rank, seed=seed, resume=resume, progress=progress
    )


def merge_on_texts(
    model: str,
    adapter: Path,
    output: Path,
    read: ReadTexts,
    keep_share: float = 0.95,
    residual_rank: int = 8,
    *,
    seed: int = 0,
    resume: bool = False,
    progress: Progress | None = None,
) -> MergeResult:
    """The same on texts that `read` gives; other parameters, result and errors as of `merge_adapter`."""
    began, progress = time.perf_counter(), progress or Silent()
    return_freed_memory()
    _check_settings(keep_share, residual_rank)
    check_output(output)
    inputs = _open(model, adapter, read, keep_share, residual_rank, seed)
    for note in inputs.texts.notes:
        progress.note(note)
    with Job(output, inputs.record(), resume) as job:
        blocks = len(inputs.anatomy.blocks)
        progress.stage("merge", blocks)
        calibration = inputs.texts.calibration
        ids = None if calibration is None else calibration.ids
        merger = Merger(
            job, inputs.checkpoint, inputs.anatomy, inputs.adapter, ids, residual_rank, seed, progress
        )
        merged = merger.run()
        del merger
        progress.stage("measure", blocks + 1)
        trials = _trials(inputs, job, progress)
        survival, rank = Survival(**trials[-1]["survival"]), int(trials[-1]["rank"])
        accepted = survival.share >= keep_share
        target = job.output if accepted else job.rejected
        size = 0
        if rank:
            residual = Residual(job, inputs.anatomy, rank).products()
            size = write_lora(job.partial / RESIDUAL, residual, str(target.absolute()))
        notes = [*inputs.texts.notes]
        if not survival.has_gain:
            notes.append(
                "the adapter gains nothing on this text beyond chance; what counts is how far the result's "
                "predictions moved from the adapted model's, compared with the base's"
            )
            progress.note(notes[-1])
        manifest = inputs.record() | {
            "content_hash": inputs.checkpoint.content_hash(),
            "identity": identity(inputs.checkpoint), "accepted": accepted, "residual_rank": rank,
            "trials": trials, "notes": notes, "linears": merged,
        }  # fmt: skip
        write_json(job.partial / MANIFEST, manifest)
        if accepted:
            job.publish()
        else:
            job.reject()
    progress.done()
    result = MergeResult(
        str(target), survival.loss_base, survival.loss_adapter, survival.loss_merged, survival.gain_kept,
        survival.kl_base, survival.kl_mean, rank, size, inputs.texts.held_out.tokens,
        time.perf_counter() - began, peak_resident_bytes(), notes,
    )  # fmt: skip
    if accepted:
        return result
    error = GateRefused(
        f"{_share_text(survival)} survived the merge",
        f"at least {100 * keep_share:g} %",
        f"give --residual-rank higher than {residual_rank} or --keep-share lower, serve the adapter beside "
        f"the model, or compress the model to more bits; the result was kept at {target}",
    )
    error.result = result  # type: ignore[attr-defined]
    raise error


def _share_text(survival: Survival) -> str:
    if survival.has_gain:
        return f"{survival.share:.1%} of the adapter's gain"
    return f"{survival.share:.1%} of what the adapter changes in the predictions (it gains nothing here)"


def _check_settings(keep_share: float, residual_rank: int) -> None:
    if not 0 < keep_share <= 1:
        raise SettingsError(
            f"--keep-share {keep_share}", "a share above 0, up to 1", "give for example --keep-share 0.9"
        )
    if residual_rank < 0:
        raise SettingsError(
            f"--residual-rank {residual_rank}", "a rank, or 0 for none", "give for example --residual-rank 8"
        )


def _open(
    model: str, adapter: Path, read: ReadTexts, keep_share: float, residual_rank: int, seed: int
) -> _Inputs:
    """Open and check everything that is read."""
    checkpoint = open_checkpoint(model)
    anatomy = read_anatomy(checkpoint)
    kind = GloraAdapter if is_glora(read_config(adapter)) else LoraAdapter
    opened: Adapter = kind.open(adapter, checkpoint, anatomy)
    _check_numbers(opened)
    packed = bool(packed_places(checkpoint, anatomy) & set(opened.names))
    texts = read(checkpoint, anatomy, packed)
    return _Inputs(model, checkpoint, anatomy, opened, texts, keep_share, residual_rank, seed)


def _read_texts(
    data: str,
    calibration: str | None,
    sequences: int | None,
    length: int | None,
    seed: int,
    checkpoint: Checkpoint,
    anatomy: Anatomy,
    packed: bool,
) -> Texts:
    """Texts of files."""
    if length is not None and not 2 <= length <= anatomy.context:
        raise SettingsError(
            f"calibration windows of {length} tokens",
            f"2 to {anatomy.context} tokens",
            "choose another --length",
        )
    tokenizer = checkpoint.tokenizer()
    held_out = read_documents(Path(data), tokenizer)
    notes: list[str] = []
    windows = None
    if packed:
        if calibration is None:
            documents, held_out = split_held_out(held_out)
            notes.append(
                f"measured on {len(held_out)} of {len(documents) + len(held_out)} documents of {data}; the "
                "others calibrate"
            )
        else:
            documents = read_documents(Path(calibration), tokenizer)
            check_disjoint(documents, held_out)
        window = length or min(anatomy.context, LONGEST_WINDOW)
        windows = token_windows(documents, tokenizer, window, sequences or SEQUENCES, seed)
        notes += windows.warnings
    elif calibration is not None:
        notes.append("calibration text isn't needed: no packed weight changes")
    longest = min(anatomy.context, LONGEST_HELD_OUT_WINDOW)
    measured = held_out_windows(held_out, tokenizer, longest, HELD_OUT_TOKENS)
    notes += measured.warnings
    return Texts(windows, measured, tuple(dict.fromkeys(notes)))


def _check_numbers(adapter: Adapter) -> None:
    """Read all of the adapter once, so that what is damaged is known before work begins."""
    for name in adapter.names:
        change = adapter.change(name)
        if change is not None and not change.is_finite():
            raise CheckpointError(
                f"the adapter's matrices for `{name}` aren't finite once scaled",
                "finite numbers",
                "check its `lora_alpha` and `r`, or train it anew",
            )


def _trials(inputs: _Inputs, job: Job, progress: Progress) -> list[dict[str, Any]]:
    """What survives of the merge alone, and with residual adapters until enough does; the last counts."""
    checkpoint, anatomy = inputs.checkpoint, inputs.anatomy
    adapted = AdaptedModel(checkpoint, anatomy, inputs.adapter)
    result = open_checkpoint(str(job.partial))
    result_anatomy = read_anatomy(result)
    ids, scratch = inputs.texts.held_out.ids, job.work

    def alone() -> dict[str, Any]:
        base, merged = StreamingModel(checkpoint, anatomy), StreamingModel(result, result_anatomy)
        found = measure(base, adapted, merged, ids, scratch, progress)
        return {"rank": 0, "survival": found.to_dict()}

    trials = [job.step("measured", alone)]
    first = Survival(**trials[0]["survival"])
    rank = 1
    while Survival(**trials[-1]["survival"]).share < inputs.keep_share and rank <= inputs.residual_rank:

        def corrected(rank: int = rank) -> dict[str, Any]:
            residual = Residual(job, anatomy, rank)
            merged = AdaptedModel(result, result_anatomy, residual)
            progress.stage(f"measure with a residual of rank {rank}", len(anatomy.blocks) + 1)
            found = measure_again(first, adapted, merged, ids, scratch, progress)
            return {"rank": rank, "survival": found.to_dict()}

        trials.append(job.step(f"measured-{rank}", corrected))
        rank = min(2 * rank, inputs.residual_rank) if rank < inputs.residual_rank else rank + 1
    return trials
