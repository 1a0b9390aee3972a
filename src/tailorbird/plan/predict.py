"""Memory, disk and time of a job, from configuration and file headers alone.

Every stage holds one block (two where calibration is asymmetric, or while the gate compares), what
its arithmetic needs beside it, or the two ends of the model. The terms below name what is alive at a
stage's worst moment; large tensors leave the process when they are freed, so the sum is
the peak. Hidden states lie in files and count as disk.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tailorbird.calibrate.kept import has_room, input_bytes, output_bytes
from tailorbird.calibrate.statistics import CHUNK_TOKENS
from tailorbird.evaluate.streamed import BATCH_TOKENS, LOGIT_VALUES
from tailorbird.formats.packed import Coding
from tailorbird.hardware.cost import forward_flops, gptq_flops, gram_flops
from tailorbird.hardware.memory import available_bytes, resident_bytes
from tailorbird.model.anatomy import Anatomy, BlockAnatomy
from tailorbird.model.weights import Weights
from tailorbird.plan.budget import format_size
from tailorbird.plan.candidates import ERROR_ROWS
from tailorbird.plan.errors import RATIO_ROWS, compared_linears
from tailorbird.plan.places import uses_of

FP32 = 4
#: Share of the measured matmul rate that whole stages reach.
EFFICIENCY = 0.5
#: What small tensors, thread buffers and the interpreter add while a stage runs, bytes.
OVERHEAD = 32 << 20
#: Elementwise passes over a weight that the search for one grid takes, and elements per second of one.
SEARCH_PASSES, PASS_RATE = 80, 5e8
#: The same over inputs that the search for a static scale takes.
SCALE_PASSES = 70
#: Elementwise passes over a weight that one update of a learned rounding takes, and copies of it that are
#: alive meanwhile: what is learned, its gradients, the optimizer's, and the rounded values.
UPDATE_PASSES, LEARNED_COPIES = 30, 8
#: What a forward pass keeps for the backward one, in live tensors of a block's forward pass.
SAVED = 3
#: The same where all blocks learn together, with products in bfloat16 and without.
SAVED_NARROW, SAVED_WIDE = 1.05, 1.9
#: What the heap keeps of freed tensors meanwhile: this share of the saved ones, and at most so many bytes.
KEPT_SHARE, KEPT_BYTES = 0.5, 96 << 20
#: Tensors as large as the logits, in float32, that the divergence and its gradient take at their worst.
LOGIT_COPIES = 5.5
#: States of unfinished learning that lie on disk at once, while one is written.
STATES = 3
#: Operations of the eigenvectors of a matrix, over its size cubed, each counted as two of float32.
DECOMPOSING_FLOPS = 18
#: Logits that are formed at once where a whole model is learned.
TOGETHER_VALUES = 1 << 24


@dataclass(frozen=True)
class Stage:
    """One stage of a job.

    Attributes
    ----------
    name : str
    peak_rss_bytes, device_bytes, disk_bytes : int
        Resident memory of the process at its worst; memory of an accelerator; disk for hidden states
        and results.
    seconds : float
    """

    name: str
    peak_rss_bytes: int
    device_bytes: int
    disk_bytes: int
    seconds: float


@dataclass(frozen=True)
class Workload:
    """What the prediction is made from.

    Attributes
    ----------
    calibration, held_out, sensitivity : tuple of int
        ``(windows, length)`` of the token windows of each.
    gradients : bool
        Whether sensitivity comes from gradients instead of measured divergences.
    needs : frozenset of str
        What the methods need: ``gram``, ``cross``, ``attention``, ``sketch``, ``outputs`` and ``logits`` of
        the source.
    corrects : bool
        Whether a low-rank part is put beside what was rounded.
    block_updates, whole_updates : tuple of int
        ``(updates, windows of each)`` in which each block is learned, and the whole model; zeros for none.
    together, again : int
        Blocks that are learned together, and how many of them once more with those after them.
    static_inputs : frozenset of str
        Linears whose inputs get a static scale.
    whole_bytes : int
        What learning the whole model holds for each weight, beside the weight and its gradient.
    packed_products : bool
        Whether the result multiplies by packed weights as they are, at any number of rows.
    """

    anatomy: Anatomy
    weights: Weights
    calibration: tuple[int, int]
    held_out: tuple[int, int]
    sensitivity: tuple[int, int]
    gradients: bool
    needs: frozenset[str]
    corrects: bool
    block_updates: tuple[int, int]
    whole_updates: tuple[int, int]
    whole_bytes: int
    codings: tuple[Coding, ...]
    output: Path
    packed_products: bool
    together: int = 1
    again: int = 0
    static_inputs: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Prediction:
    """Stages, and where this machine falls short of them."""

    stages: tuple[Stage, ...]
    available_bytes: int
    disk_free_bytes: int
    shortage: str | None
    advice: str | None

    @property
    def peak_rss_bytes(self) -> int:
        """Resident memory of the worst stage."""
        return max(stage.peak_rss_bytes for stage in self.stages)

    @property
    def seconds(self) -> float:
        """All stages together."""
        return sum(stage.seconds for stage in self.stages)

    def as_dicts(self) -> list[dict[str, Any]]:
        """The stages in JSON types."""
        return [asdict(stage) for stage in self.stages]


def measuring_flops(anatomy: Anatomy, tokens: int) -> float:
    """Operations of measuring the sensitivity of every use of a weight.

    On average each copy runs half the blocks.
    """
    linears = list(anatomy.linears())
    parameters = sum(p.in_features * p.out_features for p in linears)
    head = 2.0 * anatomy.vocab_size * anatomy.hidden_size
    return len(uses_of(anatomy)) * (forward_flops(tokens, parameters) / 2 + tokens * head)


def matmul_rate() -> float:
    """FLOP per second of a float32 product here and now; takes a tenth of a second."""
    a = torch.ones(768, 768)
    a @ a
    best = min(_timed(a) for _ in range(3))
    return 2 * 768**3 / best


def _timed(a: torch.Tensor) -> float:
    began = time.perf_counter()
    a @ a
    return time.perf_counter() - began


class _Sizes:
    """Bytes and operations of the parts of a model, computed in float32."""

    def __init__(self, work: Workload) -> None:
        anatomy = work.anatomy
        self.width = anatomy.hidden_size
        self.blocks = len(anatomy.blocks)
        self.block_parameters = [
            sum(p.in_features * p.out_features for p in block.linears) for block in anatomy.blocks
        ]
        self.block = FP32 * max(self.block_parameters)
        self.linear = FP32 * max(p.in_features * p.out_features for p in anatomy.linears())
        self.sketches = [
            FP32 * sum(p.in_features**2 + p.out_features**2 for p in block.linears)
            for block in anatomy.blocks
        ]
        self.sketch = FP32 * max(p.in_features**2 + p.out_features**2 for p in anatomy.linears())
        self.widest = max(max(p.in_features, p.out_features) for p in anatomy.linears())
        widths = [{p.shares_input: p.in_features for p in block.linears} for block in anatomy.blocks]
        self.gram = FP32 * max(w * w for inputs in widths for w in inputs.values())
        self.uses = len(uses_of(anatomy))
        self.head_gram = FP32 * anatomy.hidden_size**2
        self.vocabulary = anatomy.vocab_size
        end = FP32 * anatomy.vocab_size * anatomy.hidden_size
        self.end = end
        self.parameters = sum(self.block_parameters)

    def batch(self, windows: int, length: int) -> int:
        """Tokens that go through a block in one call."""
        return min(windows, max(1, BATCH_TOKENS // length)) * length

    def activations(self, tokens: int) -> int:
        """Live tensors of one block's forward pass."""
        return FP32 * tokens * (3 * self.width + 3 * self.widest)

    @property
    def logits(self) -> int:
        """Logits of the positions that are formed at once."""
        return FP32 * max(self.vocabulary, LOGIT_VALUES // self.vocabulary * self.vocabulary)


def narrow_products() -> bool:
    """Whether products are learned in bfloat16: where the processor has instructions for them."""
    return bool(torch.cpu._is_avx512_bf16_supported())


def _whole_peak(work: Workload, s: _Sizes, tokens: int) -> int:
    """Bytes while a whole model is learned from updates of `tokens`, with its source beside it."""
    together = min(tokens, max(work.calibration[1], TOGETHER_VALUES // s.vocabulary))
    ends = s.end * (1 if work.anatomy.tied else 2)
    models = 2 * (FP32 * s.parameters + ends) + (FP32 + work.whole_bytes) * s.parameters
    narrow = narrow_products()
    saved = s.blocks * (SAVED_NARROW if narrow else SAVED_WIDE) * s.activations(together)
    heap = min(KEPT_SHARE * saved, KEPT_BYTES)
    copies = s.parameters * FP32 // 2 if narrow else 0
    return int(models + saved + heap + copies + LOGIT_COPIES * FP32 * together * s.vocabulary)


def _occupied(directory: Path) -> int:
    """Disk that the unfinished work of the same output holds, and will use again."""
    return sum(path.lstat().st_blocks * 512 for path in directory.rglob("*"))


def _statistics_peak(block: BlockAnatomy, anatomy: Anatomy, activations: int) -> int:
    """Bytes while one block's Gram matrices are summed, and then used one after the other.

    Where the method is compared with rounding, a second matrix judges it and its own is factorized.
    """
    compared = compared_linears(anatomy)
    widths = {p.shares_input: p.in_features for p in block.linears}
    judged = {p.shares_input for p in block.linears if p.name in compared}
    weights = FP32 * sum(p.in_features * p.out_features for p in block.linears)
    held = {key: FP32 * (w * w + CHUNK_TOKENS * w) * (2 if key in judged else 1) for key, w in widths.items()}
    peak = weights + sum(held.values()) + activations
    for key, width in widths.items():
        peak = max(peak, weights + sum(held.values()) + (2 * FP32 * width * width if key in judged else 0))
        del held[key]
    return peak


def _kept_bytes(work: Workload) -> int:
    """What passes over a block leave on the disk for later ones."""
    tokens = work.calibration[0] * work.calibration[1]
    inputs = max(input_bytes(block, tokens) for block in work.anatomy.blocks)
    outputs = max(output_bytes(block, tokens) for block in work.anatomy.blocks)
    return ("cross" in work.needs) * inputs + ("gram" in work.needs) * outputs


def predict(work: Workload) -> Prediction:
    """Stages of `fit` for `work` on this machine.

    Returns
    -------
    Prediction
    """
    s = _Sizes(work)
    base = resident_bytes() + OVERHEAD
    rate = matmul_rate() * EFFICIENCY
    cal, held, sens = work.calibration, work.held_out, work.sensitivity
    source_bytes = work.weights.total_bytes

    def hidden(shape: tuple[int, int], copies: int) -> int:
        return FP32 * shape[0] * shape[1] * s.width * copies

    def forward(tokens: int) -> float:
        return forward_flops(tokens, s.parameters)

    parent = work.output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free + _occupied(work.output.with_name(f"{work.output.name}.partial"))
    streams = 2 if work.needs & {"cross", "outputs"} else 1
    keeps = has_room(free - hidden(cal, 2 * streams) - source_bytes, _kept_bytes(work))
    sources = 1 if "cross" in work.needs and not keeps else 0  # blocks of the source beside the others
    tokens = {k: v[0] * v[1] for k, v in (("cal", cal), ("held", held), ("sens", sens))}
    # An end's rounding by the method holds it, a working copy, its codes and the values they stand for.
    rounding_end = int(4.2 * s.end) if "gram" in work.needs else int(2.6 * s.end)

    statistics = max(
        s.end + FP32 * s.batch(*cal) * s.width,
        max(
            _statistics_peak(block, work.anatomy, s.activations(s.batch(*cal)))
            for block in work.anatomy.blocks
        ),
    )
    if work.gradients:
        sensitivity = max(4 * s.end + 4 * s.logits, 3 * s.block + int(2.5 * s.activations(sens[1])))
    else:
        copies = s.batch(sens[0] * (1 + s.uses), sens[1])
        sensitivity = max(
            int(2.6 * s.end),
            2 * s.end + 4 * s.logits,
            s.block + 2 * s.linear + s.activations(copies),
        )
    sensitivity = max(sensitivity, s.end + 6 * s.head_gram)  # the errors of the head, or the tied pair
    compress = max(
        rounding_end,
        (1 + sources) * s.block
        + streams * s.gram
        + max(s.activations(s.batch(*cal)), 3 * s.gram + 3 * s.linear),
    )
    if work.corrects:  # in float64: the Gram matrix, its eigenvectors, the solver's own; and the difference
        compress = max(
            compress, (1 + sources) * s.block + (streams + 1) * s.gram + 10 * s.gram + 8 * s.linear
        )
    if "sketch" in work.needs:
        passing = 2 * s.block + max(s.sketches) + s.linear + int(2.5 * s.activations(cal[1]))
        both_sides = (1 + sources) * s.block + (streams + 4) * s.gram + 3 * s.sketch + 6 * s.linear
        compress = max(compress, passing, 2 * s.end + 4 * s.logits, both_sides)
    block_tokens, whole_tokens = (windows * cal[1] for _, windows in (work.block_updates, work.whole_updates))
    if block_tokens:
        window = min(work.together, s.blocks)
        copies = 1 + window * (1 + LEARNED_COPIES)
        compress = max(compress, copies * s.block + window * SAVED * s.activations(block_tokens))
    if whole_tokens:
        compress = max(compress, _whole_peak(work, s, whole_tokens))
    gate = max(
        # The source's head in float32; the result's as codes and their layout, or in float32 too.
        int((1.65 if work.packed_products else 2.15) * s.end) + 5 * s.logits,
        s.block * 2 + s.linear + s.activations(s.batch(*held)),
    )
    grams = sum(
        gram_flops(tokens["cal"], width)
        for block in work.anatomy.blocks
        for width in {p.shares_input: p.in_features for p in block.linears}.values()
    )
    linears = list(work.anatomy.linears())
    rounding = sum(2.0 * ERROR_ROWS * p.in_features**2 * len(work.codings) for p in linears)
    searching = sum(ERROR_ROWS * p.in_features * len(work.codings) * SEARCH_PASSES for p in linears)
    compared = compared_linears(work.anatomy)
    # One factorization each; for every coding a rounding, and two errors against the judging matrix.
    comparing = sum(
        4 / 3 * p.in_features**3 + 5.0 * RATIO_ROWS * p.in_features**2 * len(work.codings)
        for p in linears
        if p.name in compared
    )
    correcting = sum(DECOMPOSING_FLOPS * p.in_features**3 for p in linears) if work.corrects else 0.0
    solving = sum(gptq_flops(p.out_features, p.in_features) for p in linears)
    # Their blocks run twice more when they are finished, and each input is rounded by every scale.
    scaled = [[p for p in block.linears if p.name in work.static_inputs] for block in work.anatomy.blocks]
    inputs = sum(sum({p.shares_input: p.in_features for p in places}.values()) for places in scaled)
    scaling = 2 * sum(map(bool, scaled)) / s.blocks * forward(tokens["cal"])
    scaling += tokens["cal"] * inputs * SCALE_PASSES / PASS_RATE * rate
    sketching = 0.0
    if "sketch" in work.needs:  # forward and back; both factors of every window; then both sides' feedback
        sketching = 4 * forward(tokens["cal"])
        sketching += sum(
            (2.0 * cal[0] + 4) * p.in_features * p.out_features * (p.in_features + p.out_features)
            for p in linears
        )
    head_flops = 2.0 * s.vocabulary * s.width
    # Forward and backward, of the whole model the source's forward too; each update rounds all weights.
    often = work.together / (work.together - work.again)  # a block is learned, on average
    learning = 3 * often * work.block_updates[0] * forward(block_tokens)
    learning += work.whole_updates[0] * (4 * forward(whole_tokens) + 4 * whole_tokens * head_flops)
    updates = often * work.block_updates[0] + work.whole_updates[0]
    learning += updates * s.parameters * UPDATE_PASSES / PASS_RATE * rate
    times = {
        "statistics": forward(tokens["cal"]) + grams + rounding + comparing + searching / PASS_RATE * rate,
        "sensitivity": 4 * forward(tokens["sens"]) + 6 * tokens["sens"] * head_flops
        if work.gradients
        else measuring_flops(work.anatomy, tokens["sens"]),
        "compress": (1 if keeps else 3) * streams * forward(tokens["cal"])
        + streams * grams
        + 4 * solving
        + correcting
        + scaling
        + sketching
        + learning,
        "gate": 2 * forward(tokens["held"]) + 2 * tokens["held"] * head_flops,
    }
    states = STATES * work.whole_bytes * s.parameters
    sketches = sum(s.sketches) if "sketch" in work.needs else 0
    waiting = 2 * work.again * 2 * s.block  # of two windows, weights before they were rounded and after
    passes = max(2 * streams, s.blocks + 3 if sketches else 0)
    stages = (
        Stage("statistics", base + statistics, 0, hidden(cal, 2), times["statistics"] / rate),
        Stage(
            "sensitivity",
            base + sensitivity,
            0,
            hidden(sens, s.blocks + 3 if work.gradients else 2 * (1 + s.uses)),
            times["sensitivity"] / rate,
        ),
        Stage(
            "compress",
            base + compress,
            0,
            max(hidden(cal, passes) + keeps * _kept_bytes(work) + sketches + waiting, states) + source_bytes,
            times["compress"] / rate,
        ),
        Stage("gate", base + gate, 0, hidden(held, 2) + source_bytes, times["gate"] / rate),
    )
    available = available_bytes() + resident_bytes()
    worst = max(stages, key=lambda stage: stage.peak_rss_bytes)
    disk = max(stages, key=lambda stage: stage.disk_bytes)
    shortage = advice = None
    if worst.peak_rss_bytes > available:
        shortage = (
            f"stage {worst.name} needs {format_size(worst.peak_rss_bytes)} of memory, "
            f"{format_size(available)} are free"
        )
        advice = f"free {format_size(worst.peak_rss_bytes - available)} of memory or use a larger machine"
    elif disk.disk_bytes > free:
        shortage = (
            f"stage {disk.name} needs {format_size(disk.disk_bytes)} of disk at {parent}, "
            f"{format_size(free)} are free"
        )
        fewer = int((free - source_bytes - sketches) / hidden((1, cal[1]), passes))
        advice = (
            f"use --sequences {fewer}, or an --output on a larger disk"
            if fewer > 0  # and it isn't what takes as much, whatever the sequences
            and max(stages[1].disk_bytes, stages[3].disk_bytes, states + source_bytes) <= free
            else "use an --output on a larger disk"
        )
    return Prediction(stages, available, free, shortage, advice)
