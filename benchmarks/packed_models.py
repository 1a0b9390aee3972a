"""Compressed models to time: random weights rounded to nearest, with one coding throughout."""

from __future__ import annotations

from pathlib import Path

from tailorbird.calibrate.job import Job
from tailorbird.calibrate.stream import StreamingModel
from tailorbird.compress.compression import Compression
from tailorbird.compress.pipeline import Pipeline
from tailorbird.formats.packed import IntegerCoding
from tailorbird.kernels.reference import INT8
from tailorbird.linear.quantize.rtn import Rtn
from tailorbird.model.anatomy import read_anatomy
from tailorbird.model.checkpoint import open_checkpoint
from tailorbird.progress import Silent


def round_plainly(
    source: Path, output: Path, bits: int, group_size: int, int8: bool = True, ends: bool = True
) -> Path:
    """Write `source` with every linear rounded to nearest; returns `output`.

    Parameters
    ----------
    bits, group_size : int
    int8 : bool
        Whether inputs may be rounded to bytes.
    ends : bool
        Whether embedding and head are rounded, too.
    """
    checkpoint = open_checkpoint(str(source))
    anatomy = read_anatomy(checkpoint)
    coding = IntegerCoding(bits, group_size)
    places = {linear.name for linear in anatomy.linears()}
    if ends and not anatomy.tied:
        places = places | {anatomy.head}
    elif ends:
        places = places | {anatomy.embedding}
    compression = Compression(
        codings=dict.fromkeys(places, coding),
        method=Rtn(clip_search=False),
        ids=None,
        tied=None,
        rounded_inputs=dict.fromkeys(places if int8 else (), INT8),
    )
    with Job(output, {"bits": bits, "group": group_size}) as job:
        model = StreamingModel(checkpoint, anatomy)
        Pipeline(job, checkpoint, model, compression, Silent()).run()
        checkpoint.copy_companions(job.partial)
        return job.publish()
