"""Which allocator plans, what it is given, and in which order source and plan are measured.

`exact` plans from scores alone (`planning`), which a limit of quality repeats (`smallest`); `evopress` and
`ip-calibrated` then judge whole models; `ranking` plans first, after one forward pass,
and scores are taken for its plan only, as they are for a recipe.
"""

from __future__ import annotations

from collections.abc import Iterable

from tailorbird.calibrate.job import Job
from tailorbird.calibrate.statistics import LinearStatistics
from tailorbird.calibrate.stream import StreamingModel
from tailorbird.compress import planning
from tailorbird.compress.blocks.flatquant import FlatQuant
from tailorbird.compress.smallest import smallest
from tailorbird.compress.stage import Stage
from tailorbird.compress.work import Work, narrow, sensitivity_ids
from tailorbird.errors import SettingsError
from tailorbird.formats.packed import Coding, IntegerCoding, TableCoding, coding_from_dict
from tailorbird.linear.quantize.higgs import Higgs
from tailorbird.plan.allocate import allocate
from tailorbird.plan.allocators import DEFAULT, check_allocator
from tailorbird.plan.allocators.evopress import Evopress
from tailorbird.plan.allocators.ip_calibrated import IpCalibrated
from tailorbird.plan.allocators.nearby import Nearby
from tailorbird.plan.allocators.ranking import Ranking, layer_input_modification
from tailorbird.plan.allocators.stitched import Stitched, check_memory, round_versions
from tailorbird.plan.budget import Budget
from tailorbird.plan.score_cache import ScoreCache
from tailorbird.plan.scores import Scores

#: Allocators that judge whole models.
JUDGING = ("evopress", "ip-calibrated")
#: Calibration tokens on which they do.
JUDGED_TOKENS = 4096
#: The part of a job in which they keep what they have done.
SEARCH = "search"


def check_choice(name: str, budgets_of_other_kinds: Iterable[str], frontier: bool) -> None:
    """Refuse an allocator that is unknown, or can't plan what is asked for.

    Parameters
    ----------
    budgets_of_other_kinds : iterable of str
        Flags of budgets other than bytes.

    Raises
    ------
    SettingsError
    """
    check_allocator(name)
    others = [*budgets_of_other_kinds, *(["--frontier"] if frontier else [])]
    if name != DEFAULT and others:
        raise SettingsError(
            f"--allocator {name} with {others[0]}",
            f"--allocator {DEFAULT}, the only one that plans this",
            f"leave out one of the two, or give --memory in place of {others[0]}"
            if others[0] != "--frontier"
            else "leave out one of the two",
        )


def check_recipe(work: Work, budgets_of_speed: Iterable[str]) -> None:
    """Refuse a recipe whose weights the allocator, a budget of speed or a target of `work` doesn't know.

    Parameters
    ----------
    budgets_of_speed : iterable of str
        Flags of those.

    Raises
    ------
    SettingsError
    """
    recipe, made = work.recipe, f"as `{work.recipe.name}` has them"
    speeds, judging = list(budgets_of_speed), [f"--allocator {work.allocator}"] * (work.allocator in JUDGING)
    target = [] if work.target is None else [f"--target {work.target}"]
    kinds = recipe.method.makes
    refused = [
        ({IntegerCoding.kind, TableCoding.kind} & kinds == {TableCoding.kind}, f"tables, {made}", target),
        (isinstance(recipe.method, Higgs), f"inputs that are rotated, {made}", [*speeds, *target]),
        (isinstance(recipe.block, FlatQuant), f"inputs that are mixed, {made}", [*speeds, *target]),
        (recipe.method.outliers > 0, f"outliers beside codes, {made}", [*speeds, *target]),
        (recipe.correction is not None, f"low-rank parts beside codes, {made}", [*speeds, *target, *judging]),
    ]
    for holds, what, flags in refused:
        if holds and flags:
            raise SettingsError(
                f"{flags[0]} with {what}",
                "integers alone, for this",
                f"choose a method without, such as gptq, or leave out {flags[0]}",
            )


def check_room(work: Work) -> None:
    """Refuse early an allocator that judges whole models where there is no memory for it.

    Raises
    ------
    ResourceError
    """
    if work.allocator in JUDGING:
        check_memory(work.anatomy, work.checkpoint.parameters, None, JUDGED_TOKENS)


def planned(work: Work, job: Job, budget: Budget) -> tuple[dict[str, Coding], Scores, ScoreCache]:
    """Place -> coding as the allocator of `work` has it within `budget`, and the scores of the source."""
    if work.allocator == "ranking":
        found = job.step("plan", lambda: planning.describe(_ranked(work, budget)))
        codings = {name: coding_from_dict(entry) for name, entry in found.items()}
        narrow(work, codings.values())
        return codings, *planning.score(work, job)
    scores, cache = planning.score(work, job)
    if budget.max_kl is not None:
        return smallest(work, job, scores, cache, budget), scores, cache
    if work.allocator in JUDGING:
        found = job.step("plan", lambda: planning.describe(_judged(work, job, scores, cache, budget)))
        job.drop_part(SEARCH)
        return {name: coding_from_dict(entry) for name, entry in found.items()}, scores, cache
    return planning.chosen(work, job, scores, budget), scores, cache


def _ranked(work: Work, budget: Budget) -> dict[str, Coding]:
    blocks = work.anatomy.blocks
    with Stage(work, "ranking", len(blocks)):
        model = StreamingModel(work.checkpoint, work.anatomy)
        importance = layer_input_modification(model, sensitivity_ids(work), work.progress)
    by_importance = sorted(blocks, key=lambda block: importance[block.index], reverse=True)
    ends = tuple(dict.fromkeys((work.anatomy.embedding, work.anatomy.head)))
    layers = (ends, *(tuple(linear.name for linear in block.linears) for block in by_importance))
    places = planning.place_options(work, planning.unmeasured(work))
    return planning.codings_of_allocation(
        work, Ranking(layers)(places, budget.weight_bytes - work.other_bytes)
    )


def _judged(work: Work, job: Job, scores: Scores, cache: ScoreCache, budget: Budget) -> dict[str, Coding]:
    """Let whole models near the exact plan be judged on calibration text."""
    ledger, places = job.part(SEARCH), planning.place_options(work, scores)
    capacity = budget.weight_bytes - work.other_bytes

    def exact() -> dict[str, dict[str, object]]:
        return planning.describe(
            {name: option.coding for name, option in allocate(places, capacity).choices.items()}
        )

    start = {name: coding_from_dict(entry) for name, entry in ledger.step("exact", exact).items()}
    offered = Nearby.around(places, start).offered
    ids = work.texts.calibration.ids
    judged = ids[: max(1, JUDGED_TOKENS // ids.shape[1])]
    check_memory(work.anatomy, work.checkpoint.parameters, offered, judged.numel())
    model = StreamingModel(work.checkpoint, work.anatomy)
    with Stage(work, "versions", len(work.anatomy.blocks) + 1):
        versions = round_versions(
            model, ids, work.recipe.method, offered, _end_statistics(work, cache), ledger.part("versions"),
            work.progress,
        )  # fmt: skip
    judge = Stitched(model, judged, versions)
    allocator: Evopress | IpCalibrated
    if work.allocator == "evopress":
        allocator = Evopress(start, judge, ledger, work.seed, work.progress)
        steps = allocator.generations
    else:
        allocator = IpCalibrated(start, judge, ledger, work.progress)
        steps = len(places)
    with Stage(work, "search", steps):
        return planning.codings_of_allocation(work, allocator(places, capacity))


def _end_statistics(work: Work, cache: ScoreCache) -> dict[str, LinearStatistics]:
    """By which the head, or a tied pair, is rounded."""
    if work.anatomy.tied:
        return {work.anatomy.embedding: cache.load_tied()}
    return {work.anatomy.head: cache.load_head().whole}
