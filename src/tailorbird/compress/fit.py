"""`fit` and `compress`: from an opened source and a plan to a checked result.

The pipeline writes the files, the gate compares them with the source, plan and report data are
written beside them. What is unfinished lives in a `Job` and resumes.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from tailorbird.calibrate.job import Job
from tailorbird.calibrate.stream import StreamingModel
from tailorbird.compress.compression import Compression
from tailorbird.compress.effort import methods_run
from tailorbird.compress.gate import Check, Verdict, examine
from tailorbird.compress.manifest import plan_of, report_data
from tailorbird.compress.pipeline import Pipeline
from tailorbird.compress.planning import (
    chosen,
    describe,
    fastest_step_seconds,
    predicted_losses,
    predicted_step_seconds,
    remark_on_damping,
    remark_on_exact_inputs,
    with_rounded_inputs,
)
from tailorbird.compress.result import DryRun, FitResult
from tailorbird.compress.rotation import check_rotated
from tailorbird.compress.spread import calibration_spread
from tailorbird.compress.stage import Stage
from tailorbird.compress.work import Work, record_of
from tailorbird.errors import ResumeError
from tailorbird.evaluate.streamed import measure_quality
from tailorbird.formats.packed import (
    Coding,
)
from tailorbird.hardware.memory import (
    available_bytes,
    peak_resident_bytes,
)
from tailorbird.linear.folds import read_folds
from tailorbird.model.anatomy import read_anatomy
from tailorbird.model.checkpoint import open_checkpoint
from tailorbird.model.json_file import read_json
from tailorbird.model.weights import Weights
from tailorbird.model.writing import write_json
from tailorbird.plan.budget import Budget, format_size
from tailorbird.plan.planfile import save_plan
from tailorbird.plan.predict import Prediction
from tailorbird.plan.score_cache import ScoreCache
from tailorbird.plan.scores import Scores

#: The spread of calibration is measured where one compression is predicted to take no longer.
SPREAD_SECONDS = 60
#: Where between the smallest plan and 16 bits the frontier is measured.
FRONTIER = (0.05, 0.15, 0.25, 0.35, 0.5, 0.7)


def dry_run(work: Work, budget: Budget | None, prediction: Prediction) -> DryRun:
    """What `fit` would need, without doing it."""
    asked, fastest = budget.step_seconds if budget else None, fastest_step_seconds(work, budget)
    advice = prediction.advice
    if advice is None and asked is not None and fastest is not None and fastest > asked:
        advice = (
            f"the fastest plan within the memory is predicted to take {1e3 * fastest:.3g} ms for a step: "
            "ask for less speed, fewer --concurrency or a shorter --context"
        )
    return DryRun(
        model=work.name,
        method=work.recipe.name,
        parameters=work.checkpoint.parameters,
        dense_bytes=work.dense_bytes,
        budget_bytes=budget.total_bytes if budget else None,
        kv_bytes=budget.kv_bytes if budget else 0,
        smallest_bytes=work.smallest_bytes + (budget.kv_bytes if budget else 0),
        predicted_total_bytes=budget.total_bytes if budget else work.smallest_bytes,
        stages=prediction.as_dicts(),
        fits=advice is None,
        advice=advice,
        machine_available_bytes=prediction.available_bytes,
        disk_free_bytes=prediction.disk_free_bytes,
        asked_step_seconds=asked,
        fastest_step_seconds=fastest,
        fastest_tokens_per_s=None if budget is None or fastest is None else budget.concurrency / fastest,
    )


def make(
    work: Work,
    job: Job,
    scores: Scores,
    cache: ScoreCache,
    codings: dict[str, Coding],
    budget: Budget | None,
    limits: dict[str, float | None],
    prediction: Prediction,
    command: str,
    frontier: Sequence[dict[str, Any]] | None = None,
    measure_spread: bool = True,
) -> tuple[FitResult, bool]:
    """Compress, check, and write plan and report data into ``OUT.partial``.

    Returns
    -------
    FitResult, bool
        The result, and whether the gate accepted it.
    """
    if scores.content_hash != work.checkpoint.content_hash():
        raise ResumeError(
            f"the weights of {work.name} are not those that were measured",
            "the source as it was when its scores were taken",
            f"remove {cache.directory} to measure it again",
        )
    compression = compression_of(work, scores, cache, codings)
    remark_on_exact_inputs(work, codings, compression.rounded_inputs)
    measured = compress_into(work, job, compression)
    remark_on_damping(work, measured)
    predicted = predicted_losses(work, scores, codings)
    predicted_kl = sum(p["kl"] for p in predicted.values())
    verdict = check(work, job, codings, predicted_kl, limits)
    spread = spread_of(work, job, compression, prediction) if measure_spread else None
    step = predicted_step_seconds(work, scores, budget, codings)
    result = summarize(work, job, verdict, budget, predicted_kl, prediction, step)
    result = replace(result, methods=methods_run(work.recipe, measured))
    folds = read_folds(job.partial, work.anatomy)
    plan = plan_of(work, scores, compression, budget, predicted, measured, result, folds)
    save_plan(plan, job.partial / "plan.yaml")
    write_json(
        job.partial / "report.json",
        report_data(
            work, scores, plan, result, verdict.quality, prediction, command, frontier, spread, measured
        ),
    )
    return result, verdict.passed


def compression_of(work: Work, scores: Scores, cache: ScoreCache, codings: dict[str, Coding]) -> Compression:
    """What the pipeline is asked to do."""
    tied = work.anatomy.tied and work.anatomy.embedding in codings and not work.lossless
    return Compression(
        codings=codings,
        method=work.recipe.method,
        ids=work.texts.calibration.ids,
        tied=cache.load_tied() if tied else None,
        rotation=work.recipe.rotation_facts,
        fold=work.recipe.fold,
        correction=work.recipe.correction,
        low_rank=work.low_rank,
        sparse=work.sparse,
        transforms=work.transforms,
        block=work.recipe.block,
        whole=work.recipe.whole,
        seed=work.seed,
        rounded_inputs=with_rounded_inputs(work, scores, codings),
    )


def spread_of(work: Work, job: Job, compression: Compression, prediction: Prediction) -> float | None:
    """How far two halves of the calibration text lead apart; None, with a remark, where it takes too long."""
    seconds = next(stage.seconds for stage in prediction.stages if stage.name == "compress")
    if seconds > SPREAD_SECONDS:
        work.progress.note(
            f"the spread between halves of the calibration text was not measured: it takes about "
            f"{2 * seconds / 60:.0f} minutes"
        )
        return None
    return calibration_spread(
        job, work.checkpoint, work.anatomy, compression, work.texts.held_out.ids, work.progress
    )


def compress_into(work: Work, job: Job, compression: Compression) -> dict[str, dict[str, float]]:
    """Run the pipeline into `job`; returns the errors measured at each place."""
    model = StreamingModel(work.checkpoint, work.anatomy)
    if work.recipe.rotation is not None:
        window = work.texts.held_out.ids[:1]
        check_rotated(work.checkpoint, work.anatomy, window, job.work / "streams", work.progress)
    with Stage(work, "compress", len(work.anatomy.blocks) + 1):
        measured = Pipeline(job, work.checkpoint, model, compression, work.progress).run()
        work.checkpoint.copy_companions(job.partial)
    return measured


def check(
    work: Work, job: Job, codings: dict[str, Coding], predicted_kl: float, limits: dict[str, float | None]
) -> Verdict:
    """Hold what lies in ``OUT.partial`` against the source."""
    with Stage(work, "gate", len(work.anatomy.blocks) + 1):
        return examine(
            work.checkpoint, work.anatomy, job.partial, codings, recorded_rows(job),
            work.texts.held_out.ids, work.texts.held_out_texts, predicted_kl,
            job.work / "streams", work.progress, **limits,
        )  # fmt: skip


def recorded_rows(job: Job) -> dict[str, torch.Tensor]:
    """Row errors of all places as the pipeline recorded them."""
    rows: dict[str, torch.Tensor] = {}
    for path in sorted((job.work / "done").glob("*.rows.safetensors")):
        weights = Weights.open_file(path)
        rows |= {name: weights.read(name) for name in weights.names}
    return rows


def summarize(
    work: Work,
    job: Job,
    verdict: Verdict,
    budget: Budget | None,
    predicted_kl: float,
    prediction: Prediction,
    step_seconds: float | None,
) -> FitResult:
    """The result in numbers."""
    weight_bytes = Weights.open(job.partial).total_bytes
    kv_bytes = budget.kv_bytes if budget else 0
    quality = verdict.quality
    peaks = [s["measured_bytes"] for s in work.stages if s["measured_bytes"]]
    return FitResult(
        output=str(job.output),
        budget_bytes=budget.total_bytes if budget and budget.max_kl is None else None,
        total_bytes=weight_bytes + kv_bytes,
        weight_bytes=weight_bytes,
        kv_bytes=kv_bytes,
        bits_per_weight=8 * weight_bytes / work.checkpoint.parameters,
        perplexity_before=quality.perplexity_before if quality else None,
        perplexity_after=quality.perplexity_after if quality else None,
        kl_mean=quality.kl_mean if quality else None,
        kl_p99=quality.kl_p99 if quality else None,
        top1_agreement=quality.top1_agreement if quality else None,
        predicted={
            "kl": predicted_kl,
            "peak_rss_bytes": prediction.peak_rss_bytes,
            "seconds": prediction.seconds,
            **_predicted_speed(budget, step_seconds),
        },
        seconds=sum(s["seconds"] for s in work.stages),
        peak_rss_bytes=max(peaks, default=peak_resident_bytes()),
        accepted=verdict.passed,
        checks=[asdict(check) for check in verdict.checks],
        warnings=[*work.texts.notes, *work.remarks],
    )


def _predicted_speed(budget: Budget | None, step_seconds: float | None) -> dict[str, float]:
    """Of decoding, at the context and concurrency of the budget; nothing where no speed was asked for."""
    if budget is None or step_seconds is None:
        return {}
    return {"step_seconds": step_seconds, "decode_tokens_per_s": budget.concurrency / step_seconds}


def measure_frontier(
    work: Work, job: Job, scores: Scores, cache: ScoreCache, budget: Budget
) -> list[dict[str, Any]]:
    """Predicted and measured quality at six budgets, from near the smallest plan to near 16 bits.

    Each point is a compression of its own under ``.job``; a point that is done is not made again.
    """
    smallest = work.smallest_bytes
    largest = work.dense_bytes
    points = []
    # What the points take is no part of the stages of the result.
    before, ledger, work.ledger = copy.deepcopy(work.stages), work.ledger, None
    for index, share in enumerate(FRONTIER):
        size = int(smallest + share * (largest - smallest))
        smaller = replace(budget, total_bytes=size + budget.kv_bytes)
        codings = chosen(work, job, scores, smaller, f"frontier-{index}-plan")
        label = f"point {index + 1} of {len(FRONTIER)}"
        known = measured_point(work, job, scores, cache, codings, f"frontier-{index}", label)
        points.append(known)
    work.stages, work.ledger = before, ledger
    return points


def measured_point(
    work: Work,
    job: Job,
    scores: Scores,
    cache: ScoreCache,
    codings: dict[str, Coding],
    name: str,
    label: str,
) -> dict[str, Any]:
    """Bytes, predicted and measured KL on the held-out text of a plan, from a compression of its own.

    It lies under ``.job`` as long as it isn't done; a point that is done is not made again.
    """
    known: dict[str, Any] | None = job.result(name)
    if known is None:
        work.put_beside(codings)
        inner = Job(job.work / name, record_of(work, {"codings": describe(codings)}))
        compress_into(work, inner, compression_of(work, scores, cache, codings))
        work.progress.stage(label, len(work.anatomy.blocks) + 1)
        result = open_checkpoint(str(inner.partial))
        quality = measure_quality(
            StreamingModel(work.checkpoint, work.anatomy),
            StreamingModel(result, read_anatomy(result)),
            work.texts.held_out.ids,
            inner.work / "streams",
            work.progress,
        )
        known = {
            "bytes": result.weights.total_bytes,
            "predicted_kl": sum(p["kl"] for p in predicted_losses(work, scores, codings).values()),
            "measured_kl": quality.kl_mean,
            "label": f"{8 * result.weights.total_bytes / work.checkpoint.parameters:.2f} bits",
        }
        inner.close()
        job.finish(name, known)
        shutil.rmtree(inner.partial)
    return known


def add_speed(
    work: Work, job: Job, result: FitResult, budget: Budget | None, allow_slower: bool
) -> FitResult:
    """Tokens per second of source and result, where both fit into memory at once.

    They are measured in a process of their own, so that neither the peak nor the caches of this one count,
    with as many sequences as the budget states. A result that decodes slower than its source in every
    round isn't accepted unless `allow_slower`. Where they don't fit, a warning says so and none is refused.
    """
    needed = 2 * (work.checkpoint.weights.total_bytes + result.weight_bytes) + (1 << 30)
    if needed > available_bytes():
        note = f"speed was not measured: source and result together need {format_size(needed)} of memory"
        return replace(result, warnings=[*result.warnings, note])
    from tailorbird.evaluate.speed import compare_in_child

    work.progress.stage("speed", 0)
    batch = budget.concurrency if budget else 1
    found = compare_in_child(work.checkpoint.directory, job.partial, batch)
    warnings, checks = list(result.warnings), list(result.checks)
    words = f"{found['ratio']:.2f} times the source's decoding speed at batch {batch}"
    if found["ratio"] < 1:
        warnings.append(f"SLOWER than its source on this machine: {words} ({', '.join(found['paths'])})")
    slow = found["slower"] and not allow_slower
    checks.append(asdict(Check("speed", not slow, words + " (--allow-slower takes it)" * slow)))
    if budget and budget.step_seconds and found["result_decode_tokens_per_s"] < batch / budget.step_seconds:
        warnings.append(
            f"asked for {budget.speed_text}, and a context of a few tokens already gives no more than "
            f"{found['result_decode_tokens_per_s']:.3g} tok/s"
        )
    accepted = result.accepted and not slow
    result = replace(result, speed=found, warnings=warnings, checks=checks, accepted=accepted)
    data = read_json(job.partial / "report.json")
    data["result"] = asdict(result)
    write_json(job.partial / "report.json", data)
    return result
