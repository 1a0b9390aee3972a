"""How much the result depends on which calibration text was used.

The same plan is carried out twice, with either half of the calibration windows, and the two results
are compared with each other on the held-out text: what another sample of the same text would change.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import torch

from tailorbird.calibrate.job import Job
from tailorbird.calibrate.stream import StreamingModel
from tailorbird.compress.compression import Compression
from tailorbird.compress.pipeline import Pipeline
from tailorbird.evaluate.streamed import measure_quality
from tailorbird.model.anatomy import Anatomy, read_anatomy
from tailorbird.model.checkpoint import Checkpoint, open_checkpoint
from tailorbird.progress import Progress


def calibration_spread(
    job: Job,
    checkpoint: Checkpoint,
    anatomy: Anatomy,
    compression: Compression,
    held_out: torch.Tensor,
    progress: Progress,
) -> float | None:
    """KL between the results of two disjoint halves of the calibration text, nats per token.

    Parameters
    ----------
    job : Job
        Both halves are made under its ``.job``; a half that is done is not made again.
    checkpoint, anatomy
        The source.
    compression : Compression
        As the result itself is made, with all windows.
    held_out : LongTensor ``[windows, length]``

    Returns
    -------
    float or None
        Mean over all positions; None where there is only one calibration window.
    """
    ids = compression.ids
    if ids is None or len(ids) < 2:
        return None
    known = job.result("spread")
    if known is not None:
        return known["kl"]
    halves: list[Path] = []
    for index, part in enumerate((ids[::2], ids[1::2])):
        target = job.work / f"half-{index}"
        if not target.exists():
            inner = Job(target, {"half": index})
            progress.stage(f"half {index + 1} of the calibration text", len(anatomy.blocks) + 1)
            model = StreamingModel(checkpoint, anatomy)
            Pipeline(inner, checkpoint, model, replace(compression, ids=part), progress).run()
            checkpoint.copy_companions(inner.partial)
            inner.publish()
        halves.append(target)
    models = []
    for half in halves:
        result = open_checkpoint(str(half))
        models.append(StreamingModel(result, read_anatomy(result)))
    progress.stage("compare the halves", len(anatomy.blocks) + 1)
    quality = measure_quality(models[0], models[1], held_out, job.work / "streams", progress)
    job.finish("spread", {"kl": quality.kl_mean})
    for half in halves:
        shutil.rmtree(half)
    return quality.kl_mean
