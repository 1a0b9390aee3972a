"""Which sensitivity predicts best: coefficients measured by perturbing, or from the Fisher diagonal?

For every language model at hand and every place, the KL of rounding that place alone at 2, 3, 4, 5 and 8
bits (groups of 64) is measured on held-out text and compared with its prediction, coefficient × error. The
coefficients come from the calibration text: measured with probes of 2, 3 and 4 bits, the geometric mean of
the first and last, and the Fisher diagonal. Then all places are rounded at once, uniformly and by plans
that were made with either kind of coefficient.

    python benchmarks/sensitivity.py [--assets DIR] [--only NAME] [--tokens N]

Writes results/sensitivity.json (and docs/images/sensitivity.svg) unless --only is given. Rounding is to
nearest. Of the time it is the processor's that is compared, which other processes hardly change.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from fit_quality import ASSETS, Subject, subjects
from machine import others_cores, write_result
from tailorbird.calibrate.ledger import Ledger
from tailorbird.calibrate.statistics import GramAccumulator, LinearStatistics
from tailorbird.calibrate.stream import StreamingModel
from tailorbird.compress.recipe import make_recipe
from tailorbird.compress.work import SENSITIVITY_TOKENS, open_work
from tailorbird.evaluate.quality import Divergence
from tailorbird.evaluate.streamed import batches, position_chunks
from tailorbird.formats.packed import Coding, FloatCoding, IntegerCoding
from tailorbird.linear.error import output_error
from tailorbird.linear.quantize.rtn import Rtn
from tailorbird.plan.allocate import allocate
from tailorbird.plan.candidates import PROBE, candidate_codings, rounding_errors, sample_rows, spread
from tailorbird.plan.fisher import fisher_diagonals, quadratic_divergence
from tailorbird.plan.places import uses_of
from tailorbird.plan.scores import Scores, assemble, options
from tailorbird.plan.sensitivity import measure_divergence

IMAGE = Path(__file__).parents[1] / "docs" / "images" / "sensitivity.svg"
CODINGS = tuple(IntegerCoding(bits, 64) for bits in (2, 3, 4, 5, 8))
PROBES = tuple(IntegerCoding(bits, 64) for bits in (2, 3, 4))
#: bits per weight, over all places, of the plans
PLANNED_BITS = (2.75, 3.5)
UNIFORM_BITS = (3, 4)
SEQUENCES = 64
#: Held-out windows are cut to so many tokens, so that few tokens come from many places of the text.
TEST_LENGTH = 256
RECIPE = make_recipe("rtn")
#: Where a KL is below this, float32 has too few digits left for its ratio to mean something.
LEAST_KL = 1e-9
MEASURED, FISHER = "measured, 3 bits", "Fisher, 3 bits"


@torch.no_grad()
def collect_statistics(model: StreamingModel, ids: torch.Tensor) -> dict[str, LinearStatistics | None]:
    """Use of a weight -> statistics of its input; None for the embedding."""
    anatomy = model.anatomy
    found: dict[str, LinearStatistics | None] = {}
    hidden = [model.embed(ids[start:stop]) for start, stop in batches(*ids.shape)]
    for index, block_anatomy in enumerate(anatomy.blocks):
        block = model.load_block(index)
        widths = {linear.shares_input: linear.in_features for linear in block_anatomy.linears}
        grams = {key: GramAccumulator(width) for key, width in widths.items()}

        def on_input(key: str, x: torch.Tensor, into: dict[str, GramAccumulator] = grams) -> None:
            into[key].add(x)

        hidden = [model.capture_inputs(block, index, h, on_input) for h in hidden]
        statistics = {key: gram.finish() for key, gram in grams.items()}
        found |= {linear.name: statistics[linear.shares_input] for linear in block_anatomy.linears}
    head = GramAccumulator(model.head_width)
    for h in hidden:
        head.add(model.head_input(h))
    found[anatomy.embedding] = None
    found[anatomy.head] = head.finish()
    return found


@torch.no_grad()
def collect_errors(
    model: StreamingModel, statistics: dict[str, LinearStatistics | None], codings: tuple[Coding, ...]
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """(use -> errors of all codings, use -> errors of the probes, by label)."""
    errors, probe_errors = {}, {}
    for name, weight in weights(model):
        known = statistics[name]
        errors[name] = rounding_errors(weight, known, codings)
        sample = sample_rows(weight, 256)
        gram = None if known is None else known.gram
        probe_errors[name] = {
            probe.label: output_error(sample, Rtn()(sample, None, probe).dequantize(), gram)
            for probe in PROBES
        }
    return errors, probe_errors


def weights(model: StreamingModel) -> Any:
    """(name, weight) of every use of a weight."""
    anatomy = model.anatomy
    for end in (anatomy.embedding, anatomy.head):
        yield end, model.end_weight(end)
    for index, block_anatomy in enumerate(anatomy.blocks):
        block = model.load_block(index)
        for linear in block_anatomy.linears:
            yield linear.name, model.weight_of(block, linear)


@torch.no_grad()
def divergence_of_all(
    model: StreamingModel, ids: torch.Tensor, rounded: Callable[[str, torch.Tensor], torch.Tensor]
) -> float:
    """Mean KL when every place is replaced by `rounded` (name, weight) at once."""
    anatomy = model.anatomy
    ends = (anatomy.embedding,) if anatomy.tied else (anatomy.embedding, anatomy.head)
    originals = {name: model.end_weight(name) for name in ends}
    changed = {name: rounded(name, weight) for name, weight in originals.items()}

    def use(which: dict[str, torch.Tensor]) -> None:
        for name, weight in which.items():
            model.set_end_weight(name, weight)

    source = [model.embed(ids[start:stop]) for start, stop in batches(*ids.shape)]
    use(changed)
    result = [model.embed(ids[start:stop]) for start, stop in batches(*ids.shape)]
    use(originals)
    for index, block_anatomy in enumerate(anatomy.blocks):
        block = model.load_block(index)
        source = [model.run_block(block, index, h) for h in source]
        for linear in block_anatomy.linears:
            model.set_weight(block, linear, rounded(linear.name, model.weight_of(block, linear)))
        result = [model.run_block(block, index, h) for h in result]
    metric = Divergence()
    for a, b, labels in zip(source, result, ids.split(len(source[0])), strict=True):
        for row in range(len(a)):
            for start, stop in position_chunks(a.shape[1], anatomy.vocab_size):
                target = model.logits(a[row : row + 1, start:stop])[0]
                use(changed)
                other = model.logits(b[row : row + 1, start:stop])[0]
                use(originals)
                metric.add(target, other, labels[row, start + 1 : stop + 1])
    return metric.finish().kl_mean


def coefficients_of(
    model: StreamingModel, ids: torch.Tensor, probe_errors: dict[str, dict[str, float]]
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """(kind -> use -> coefficient, kind -> seconds of processor time)."""
    uses = uses_of(model.anatomy)
    found: dict[str, dict[str, float]] = {}
    seconds: dict[str, float] = {}
    for probe in PROBES:
        began = time.process_time()
        with fresh_ledger() as ledger:
            kl = measure_divergence(model, uses, ids, lambda _, w, p=probe: round_plainly(w, p), ledger)
        seconds[f"measured, {probe.bits} bits"] = time.process_time() - began
        found[f"measured, {probe.bits} bits"] = {
            name: value / probe_errors[name][probe.label] for name, value in kl.items()
        }
    few, many = (found[f"measured, {bits} bits"] for bits in (2, 4))
    found["measured, 2 and 4 bits"] = {name: math.sqrt(few[name] * many[name]) for name in few}
    seconds["measured, 2 and 4 bits"] = seconds["measured, 2 bits"] + seconds["measured, 4 bits"]

    def coefficient(name: str, weight: torch.Tensor, diagonal: torch.Tensor) -> float:
        divergence = quadratic_divergence(diagonal, round_plainly(weight, PROBE) - weight)
        return divergence / probe_errors[name][PROBE.label]

    began = time.process_time()
    with fresh_ledger() as ledger:
        found[FISHER] = fisher_diagonals(model, ids, coefficient, ledger)
    seconds[FISHER] = time.process_time() - began
    return found, seconds


@contextmanager
def fresh_ledger() -> Iterator[Ledger]:
    """A ledger of its own, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="sensitivity-") as folder:
        yield Ledger(Path(folder))


def round_plainly(weight: torch.Tensor, coding: Coding) -> torch.Tensor:
    """Rounded to nearest without statistics, as probes are."""
    return Rtn()(weight, None, coding).dequantize()


def fit_of(predicted: Sequence[float], measured: Sequence[float]) -> dict[str, float]:
    """How well predictions rank and hit what was measured; both above `LEAST_KL`."""
    logs = np.log(np.array(predicted) / np.array(measured))
    return {
        "spearman": float(spearmanr(predicted, measured).statistic),
        "median_abs_log_ratio": float(np.median(np.abs(logs))),
        "median_log_ratio": float(np.median(logs)),
    }


def run(subject: Subject, tokens: int) -> dict[str, Any]:
    """All numbers of one model."""
    work = open_work(
        subject.model, RECIPE, calibration=subject.calibration, evaluation=subject.held_out,
        sequences=SEQUENCES, length=None, context=None, target=None, seed=0, progress=None,
    )  # fmt: skip
    model = StreamingModel(work.checkpoint, work.anatomy)
    calibration, held_out = work.texts.calibration.ids, work.texts.held_out.ids
    ids = calibration[: max(1, SENSITIVITY_TOKENS // calibration.shape[1])]
    length = min(held_out.shape[1], TEST_LENGTH)
    test = held_out[spread(max(2, tokens // length), len(held_out)), :length]
    candidates = tuple(dict.fromkeys((*CODINGS, *candidate_codings(None, work.float_dtype))))
    statistics = collect_statistics(model, calibration)
    errors, probe_errors = collect_errors(model, statistics, candidates)
    coefficients, seconds = coefficients_of(model, ids, probe_errors)

    def rounded(name: str, weight: torch.Tensor, coding: Coding) -> torch.Tensor:
        return Rtn()(weight, statistics[name], coding).dequantize()

    points = []
    for coding in CODINGS:
        with fresh_ledger() as ledger:
            kl = measure_divergence(
                model, uses_of(model.anatomy), test, lambda n, w, c=coding: rounded(n, w, c), ledger
            )
        for name, value in kl.items():
            predicted = {kind: c[name] * errors[name][coding.label] for kind, c in coefficients.items()}
            points.append({"place": name, "bits": coding.bits, "measured": value, "predicted": predicted})
    usable = [p for p in points if p["measured"] >= LEAST_KL]
    fits = {}
    for kind in coefficients:
        pairs = [(p["predicted"][kind], p["measured"], p["bits"]) for p in usable]
        fits[kind] = fit_of([p for p, _, _ in pairs], [m for _, m, _ in pairs])
        fits[kind]["by_bits"] = {
            coding.bits: fit_of(*zip(*[(p, m) for p, m, b in pairs if b == coding.bits], strict=True))
            for coding in CODINGS
        }
        fits[kind]["cpu_seconds"] = seconds[kind]

    whole = []
    for bits in UNIFORM_BITS:
        coding = IntegerCoding(bits, 64)
        here = [p for p in points if p["bits"] == bits]
        whole.append(
            {
                "bits": bits,
                "measured": divergence_of_all(model, test, lambda n, w, c=coding: rounded(n, w, c)),
                "sum_of_measured": sum(p["measured"] for p in here),
                "predicted": {kind: sum(p["predicted"][kind] for p in here) for kind in coefficients},
            }
        )
    plans = []
    tied = model.anatomy.head if model.anatomy.tied else None
    weight_count = sum(w.numel() for name, w in weights(model) if name != tied)
    allowed = candidate_codings(None, work.float_dtype)
    for bits_per_weight in PLANNED_BITS:
        for kind, values in coefficients.items():
            scores = assemble(work.anatomy, errors, {}, values, "")
            plans.append(
                {
                    "bits_per_weight": bits_per_weight,
                    "kind": kind,
                    **planned(model, test, scores, allowed, int(bits_per_weight * weight_count / 8), rounded),
                }
            )
    return {
        "model": subject.name,
        "uses": len(uses_of(model.anatomy)),
        "coefficient_tokens": ids.numel(),
        "test_tokens": test.numel(),
        "left_out": len(points) - len(usable),
        "fits": fits,
        "whole": whole,
        "plans": plans,
        "coefficients": coefficients,
        "points": points,
    }


def planned(
    model: StreamingModel,
    ids: torch.Tensor,
    scores: Scores,
    codings: tuple[Coding, ...],
    capacity: int,
    rounded: Callable[[str, torch.Tensor, Coding], torch.Tensor],
) -> dict[str, float]:
    """Predicted and measured KL of the best plan within `capacity` bytes."""
    allocation = allocate(options(scores, lambda place: codings), capacity)

    def apply(name: str, weight: torch.Tensor) -> torch.Tensor:
        coding = allocation.choices[name].coding
        if isinstance(coding, FloatCoding):
            return weight.to(getattr(torch, coding.dtype)).float()
        return rounded(name, weight, coding)

    return {
        "bytes": allocation.bytes,
        "predicted": allocation.loss,
        "measured": divergence_of_all(model, ids, apply),
    }


def plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Predicted against measured KL of every place and coding, one panel per kind."""
    matplotlib.rcParams.update({"svg.hashsalt": "sensitivity", "svg.fonttype": "none"})
    ink, line = "#7b8480", "#9aa5a0"  # readable on white and on near black
    colours = ("#2c9c83", "#d9713f", "#6b7fd7", "#b8952b")
    figure = Figure(figsize=(9, 4.4), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    shown = [p for r in results for p in r["points"] if p["measured"] >= LEAST_KL]
    low = min(p["measured"] for p in shown) / 2
    high = max(p["measured"] for p in shown) * 2
    for panel, kind, title in zip(
        panels, (MEASURED, FISHER), ("measured coefficients", "Fisher diagonal"), strict=True
    ):
        panel.plot([low, high], [low, high], color=line, linewidth=1, zorder=1)
        for result, colour in zip(results, colours, strict=False):
            points = [p for p in result["points"] if p["measured"] >= LEAST_KL]
            panel.scatter(
                [p["measured"] for p in points], [p["predicted"][kind] for p in points],
                s=11, color=colour, alpha=0.75, linewidths=0, label=result["model"], zorder=2,
            )  # fmt: skip
        panel.set(xscale="log", yscale="log", aspect="equal", xlabel="measured KL, nats per token")
        panel.set_title(title, color=ink, fontsize=11)
        panel.set_facecolor("none")
        panel.tick_params(colors=ink, which="both")
        panel.xaxis.label.set_color(ink)
        for spine in panel.spines.values():
            spine.set_color(line)
    panels[0].set_ylabel("predicted KL, nats per token", color=ink)
    panels[0].legend(frameon=False, labelcolor=ink, fontsize=9, loc="upper left")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, transparent=True, metadata={"Date": None})


def print_tables(console: Console, results: Sequence[dict[str, Any]]) -> None:
    """One table per question."""
    table = Table("model", "coefficients", "rank correlation", "median |log ratio|", "CPU seconds")
    for result in results:
        for kind, fit in result["fits"].items():
            table.add_row(
                result["model"], kind, f"{fit['spearman']:.3f}", f"{fit['median_abs_log_ratio']:.3f}",
                f"{fit['cpu_seconds']:.1f}",
            )  # fmt: skip
    console.print(table)
    kinds = list(results[0]["coefficients"])
    table = Table("model", "all places at", "measured KL", "sum of measured", *kinds)
    for result in results:
        for case in result["whole"]:
            table.add_row(
                result["model"], f"{case['bits']} bits", f"{case['measured']:.4g}",
                f"{case['sum_of_measured']:.4g}", *(f"{case['predicted'][kind]:.4g}" for kind in kinds),
            )  # fmt: skip
    console.print(table)
    table = Table("model", "plan of", *kinds, title="measured KL of plans made with each kind")
    for result in results:
        for budget in PLANNED_BITS:
            found = {p["kind"]: p["measured"] for p in result["plans"] if p["bits_per_weight"] == budget}
            table.add_row(result["model"], f"{budget} bits per weight", *(f"{found[k]:.4g}" for k in kinds))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--assets", type=Path, default=ASSETS)
    parser.add_argument("--only", help="name of one model; nothing is written")
    parser.add_argument("--tokens", type=int, default=2048, help="held-out tokens (default 2048)")
    arguments = parser.parse_args()
    console = Console(width=150)
    busy = others_cores()
    results = []
    for subject in subjects(arguments.assets):
        if arguments.only and subject.name != arguments.only:
            continue
        console.print(f"{subject.name} …")
        results.append(run(subject, arguments.tokens))
        print_tables(console, results[-1:])
    if arguments.only:
        return
    print_tables(console, results)
    plot(results, IMAGE)
    write_result("sensitivity", {"cores_kept_busy_by_others": busy, "models": results})


if __name__ == "__main__":
    main()
