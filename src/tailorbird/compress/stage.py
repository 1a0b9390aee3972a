"""What each stage of a job takes: seconds and peak memory, kept over all runs of the job."""

from __future__ import annotations

import time
from types import TracebackType

from tailorbird.calibrate.ledger import Ledger
from tailorbird.compress.work import Work
from tailorbird.hardware.memory import peak_resident_bytes, reset_peak

#: Under which name a job keeps what its stages took.
STAGES = "stages"


class Stage:
    """Measures one stage: seconds, and peak resident memory where the system lets it be reset.

    What a job's earlier runs took of a stage is added to.
    """

    def __init__(self, work: Work, name: str, steps: int) -> None:
        self.work, self.name = work, name
        work.progress.stage(name, steps)

    def __enter__(self) -> None:
        self.whole = not reset_peak()
        self.began = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        seconds = time.perf_counter() - self.began
        peak = None if self.whole else peak_resident_bytes()
        for stage in self.work.stages:
            if stage["name"] == self.name:
                stage["seconds"] += seconds
                stage["measured_bytes"] = max(stage["measured_bytes"] or 0, peak or 0) or None
                break
        else:
            self.work.stages.append({"name": self.name, "seconds": seconds, "measured_bytes": peak})
        if self.work.ledger is not None and kind in (None, KeyboardInterrupt):
            self.work.ledger.finish(STAGES, self.work.stages)


def continue_stages(work: Work, ledger: Ledger) -> None:
    """Let `work` keep what its stages take in `ledger`, beginning with what is there."""
    work.ledger = ledger
    work.stages = ledger.result(STAGES) or []
