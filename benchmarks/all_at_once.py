"""All linears of a model rounded at once, case by case: errors, KL and true bytes on one held-out text.

Every linear sees the inputs of the source, so that one pass of statistics serves all cases.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fit_quality import Subject
from sensitivity import RECIPE, TEST_LENGTH, collect_statistics, divergence_of_all, weights
from tailorbird.calibrate.statistics import LinearStatistics
from tailorbird.calibrate.stream import StreamingModel
from tailorbird.compress.work import open_work
from tailorbird.formats.packed import PackedWeight
from tailorbird.linear.error import output_error
from tailorbird.plan.candidates import geometric_mean, spread


class AllAtOnce:
    """A model with its linears, and the statistics of their inputs.

    Parameters
    ----------
    subject : Subject
    sequences : int
        Calibration windows.
    tokens : int
        Held-out ones.

    Attributes
    ----------
    linears : dict
        Name -> weight ``[out_features, in_features]`` of those inside the blocks.
    judges : dict
        Name -> statistics of its inputs on the held-out text.
    """

    def __init__(self, subject: Subject, sequences: int, tokens: int) -> None:
        work = open_work(
            subject.model, RECIPE, calibration=subject.calibration, evaluation=subject.held_out,
            sequences=sequences, length=None, context=None, target=None, seed=0, progress=None,
        )  # fmt: skip
        self.model = StreamingModel(work.checkpoint, work.anatomy)
        held_out = work.texts.held_out.ids
        length = min(held_out.shape[1], TEST_LENGTH)
        self.test = held_out[spread(tokens // length, len(held_out)), :length]
        self.known = collect_statistics(self.model, work.texts.calibration.ids)
        self.judges = collect_statistics(self.model, self.test)
        ends = (self.model.anatomy.embedding, self.model.anatomy.head)
        self.linears = {name: weight for name, weight in weights(self.model) if name not in ends}

    def error(self, approximation: Callable[[str, Tensor], Tensor]) -> float:
        """Relative output error on the held-out text, geometric mean over the linears."""
        return geometric_mean(
            [output_error(w, approximation(n, w), self.judges[n].gram) for n, w in self.linears.items()]
        )

    def row(self, rounds: Callable[[Tensor, LinearStatistics], PackedWeight]) -> dict[str, Any]:
        """``bits_per_weight error kl`` of all linears rounded by `rounds`."""
        packed = {name: rounds(weight, self.known[name]) for name, weight in self.linears.items()}
        size = sum(tensor.nbytes for one in packed.values() for tensor in one.tensors.values())
        rounded = {name: one.dequantize() for name, one in packed.items()}
        return {
            "bits_per_weight": 8 * size / sum(weight.numel() for weight in self.linears.values()),
            "error": self.error(lambda name, weight: rounded[name]),
            "kl": divergence_of_all(self.model, self.test, lambda name, weight: rounded.get(name, weight)),
        }
