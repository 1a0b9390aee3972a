"""From a source to a choice per place: scores, allocation, and what the choice is predicted to cost."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch

from tailorbird.calibrate.job import Job
from tailorbird.calibrate.ledger import Ledger
from tailorbird.calibrate.stream import StreamingModel
from tailorbird.compress.blocks.flatquant import FlatQuant
from tailorbird.compress.lossless import check_entropy_codings, entropy_codings
from tailorbird.compress.recipe import JOINT, check_end
from tailorbird.compress.stage import Stage
from tailorbird.compress.work import (
    SCORING,
    SENSITIVITY_TOKENS,
    Work,
    as_stored,
    by_gradients,
    sensitivity_ids,
)
from tailorbird.errors import ResourceError, SettingsError, nearest
from tailorbird.formats.packed import (
    BinaryCoding,
    CodesCoding,
    Coding,
    DoubleCoding,
    EntropyCoding,
    FloatCoding,
    LowRank,
    ScaledCoding,
    TableCoding,
    coding_from_dict,
    coding_to_dict,
)
from tailorbird.kernels import dispatch
from tailorbird.kernels.reference import INT8, INT8_STATIC, SIMULATED
from tailorbird.linear.lossless.df11 import Df11
from tailorbird.linear.outliers import without_outliers
from tailorbird.linear.quantize.double_rounding import DoubleRounding, check_nestable
from tailorbird.linear.quantize.higgs import Higgs, normal_grid
from tailorbird.linear.settings import check_codes
from tailorbird.plan.allocate import Allocation, PlaceOptions, allocate
from tailorbird.plan.budget import Budget
from tailorbird.plan.candidates import candidate_codings
from tailorbird.plan.ends import end_errors, for_both_uses
from tailorbird.plan.errors import measure_errors
from tailorbird.plan.fisher import fisher_coefficients
from tailorbird.plan.inputs import input_cost, rounded_inputs
from tailorbird.plan.places import uses_of
from tailorbird.plan.planfile import Plan
from tailorbird.plan.predict import Prediction
from tailorbird.plan.score_cache import ScoreCache
from tailorbird.plan.scores import PlaceScore, Scores, assemble, options
from tailorbird.plan.sensitivity import measure_coefficients
from tailorbird.plan.speed import SpeedPlanner

#: Parts of a job in which its scoring passes keep what they have done.
STATISTICS, SENSITIVITY = "statistics", "sensitivity"
#: Share of the predicted loss up to which a plan that isn't proved optimal is not remarked on.
WORTH_SAYING = 1e-3
#: Linears that a remark names of those whose damping was raised.
DAMPINGS = 4


def chosen(work: Work, job: Job, scores: Scores, budget: Budget, name: str = "plan") -> dict[str, Coding]:
    """The plan `name` of this job: solved once, so that a resumed run goes on with the same."""
    known = job.step(name, lambda: describe(choose(work, scores, budget)))
    return {name: coding_from_dict(entry) for name, entry in known.items()}


def simulated_inputs(work: Work) -> list[str]:
    """To what inputs are stated to be rounded beside bytes."""
    stated = (work.rounded_inputs or {}).values()
    return [to for to in SIMULATED if to in stated]


def score_cache(work: Work) -> ScoreCache:
    """Where the scores of this source, text and linear method are kept."""
    simulated = simulated_inputs(work)
    return ScoreCache(
        {
            "source": work.checkpoint.fingerprint,
            "calibration": work.texts.calibration.fingerprint,
            "method": work.recipe.rounding,
            "correction": work.recipe.correcting,
            "codings": [coding_to_dict(coding) for coding in work.codings],
            "sensitivity_tokens": work.sensitivity_tokens,
            "gradients": work.seed if by_gradients(work) else None,
            **({"inputs": simulated} if simulated else {}),
        }
    )


def score(work: Work, ledger: Ledger) -> tuple[Scores, ScoreCache]:
    """Errors and sensitivities of the source, from the cache where they are known.

    What changes no weight has no errors, so that nothing is measured for it.
    """
    cache = score_cache(work)
    if work.lossless:
        return _without_errors(work), cache
    for known in (cache, *_wider_caches(work)):
        scores = known.load()
        if scores is not None:
            work.progress.note("scores of this model and text are known")
            for part in (STATISTICS, SENSITIVITY):  # another job may have finished what this one began
                ledger.drop_part(part)
            return scores, known
    cache.make_directory()  # that it can't be shows before anything is measured
    if cache.load_errors() is None:
        score_errors(work, cache, ledger)
    ledger.drop_part(STATISTICS)  # a run that was killed, or another job, may have left it
    return score_sensitivity(work, cache, ledger), cache


def _without_errors(work: Work) -> Scores:
    """Scores of a source of which every weight stays as it is."""
    places = [*work.place_shapes(), work.anatomy.embedding, work.anatomy.head]
    errors: dict[str, dict[str, float]] = {name: {} for name in places}
    coefficients = dict.fromkeys(places, 0.0)
    return assemble(work.anatomy, errors, {}, coefficients, work.checkpoint.content_hash())


def _wider_caches(work: Work) -> list[ScoreCache]:
    """Where a `fit` of the same source keeps its scores, if the codings of `work` are among them."""
    wide = copy.copy(work)
    wide.codings = candidate_codings(None, work.float_dtype, work.recipe.method.makes)
    wide.sensitivity_tokens = SENSITIVITY_TOKENS
    return [score_cache(wide)] if set(work.codings) < set(wide.codings) else []


def score_errors(work: Work, cache: ScoreCache, ledger: Ledger) -> None:
    """First pass over the source: errors of all candidates, kept in `cache`."""
    model = StreamingModel(work.checkpoint, work.anatomy)
    with Stage(work, "statistics", len(work.anatomy.blocks) + 1):
        errors, ratios, head = measure_errors(
            model,
            work.texts.calibration.ids,
            work.recipe.method,
            work.codings,
            ledger.part(STATISTICS),
            work.progress,
            work.recipe.correction,
            (INT8, *simulated_inputs(work)),
        )
        cache.save_head(head)
        cache.save_errors(errors, ratios)


def score_sensitivity(work: Work, cache: ScoreCache, ledger: Ledger) -> Scores:
    """Second pass over the source: what the errors cost; the scores are then whole and kept."""
    known = cache.load_errors()
    assert known is not None  # `score_errors` has run
    errors, ratios = known
    ids = sensitivity_ids(work)
    model = StreamingModel(work.checkpoint, work.anatomy)
    blocks = len(work.anatomy.blocks)
    gradients = by_gradients(work)
    part = ledger.part(SENSITIVITY)
    with Stage(work, "sensitivity", 2 * blocks + 1 if gradients else blocks + len(ids)):
        if gradients:
            work.progress.note(
                "a large model: sensitivity is taken from gradients, not measured place by place"
            )
            coefficients = fisher_coefficients(model, ids, errors, part, work.seed, work.progress)
        else:
            coefficients = measure_coefficients(model, ids, errors, part, work.progress)
        head = cache.load_head()
        for use, found in end_errors(
            model, without_outliers(work.recipe.method), head, coefficients, work.codings
        ).items():
            errors[use] |= found
        if work.anatomy.tied:
            weight = model.end_weight(work.anatomy.head)
            cache.save_tied(for_both_uses(work.anatomy, weight, head.whole, coefficients))
            model.release_ends()
        content_hash = work.checkpoint.content_hash()
    scores = assemble(work.anatomy, errors, ratios, coefficients, content_hash)
    cache.save(scores)
    ledger.drop_part(SENSITIVITY)
    return scores


def choose(work: Work, scores: Scores, budget: Budget) -> dict[str, Coding]:
    """Place -> coding of the best plan within `budget`; places that stay as stored are left out."""
    capacity = budget.weight_bytes - work.other_bytes
    if budget.step_seconds is None:
        allocation = allocate(place_options(work, scores), capacity)
    else:
        allocation = speed_planner(work, budget).allocate(
            lambda seconds: place_options(work, scores, seconds),
            capacity,
            lambda plan: with_rounded_inputs(work, scores, codings_of_allocation(work, plan)),
        )
    if allocation.gap > WORTH_SAYING:
        work.progress.note(f"a plan with up to {allocation.gap:.1%} less predicted loss may exist")
    return codings_of_allocation(work, allocation)


def place_options(
    work: Work, scores: Scores, seconds: Callable[[PlaceScore, Coding], float] = lambda place, coding: 0.0
) -> list[PlaceOptions]:
    """What every place may take, with bytes, predicted loss and `seconds`."""
    return options(
        scores,
        lambda place: work.codings_at(place.name, place.shape[1]),
        lambda place: together_for(work.target, place),
        seconds,
        lambda place, coding: work.bytes_of(place.name, place.shape, coding),
    )


def codings_of_allocation(work: Work, allocation: Allocation) -> dict[str, Coding]:
    """Place -> coding; places that stay as stored are left out."""
    return {
        name: option.coding
        for name, option in allocation.choices.items()
        if not as_stored(work, name, option.coding)
    }


def speed_planner(work: Work, budget: Budget) -> SpeedPlanner:
    """Who plans for speed."""
    exact = work.rounded_inputs is not None and not work.rounded_inputs
    return SpeedPlanner(work.anatomy, budget, FloatCoding(work.float_dtype), exact, work.progress)


def fastest_step_seconds(work: Work, budget: Budget | None) -> float | None:
    """What a decoding step of the fastest plan within the budget takes, where it asks for speed.

    It reads no weight. None where kernels aren't timed yet, too.
    """
    if budget is None or budget.step_seconds is None:
        return None
    scores = unmeasured(work)
    return speed_planner(work, budget).fastest(
        lambda seconds: place_options(work, scores, seconds), budget.weight_bytes - work.other_bytes
    )


def check_reach(work: Work, budget: Budget, prediction: Prediction) -> None:
    """Refuse before scores are taken a speed that no plan reaches.

    Where kernels would have to be timed first, and that takes longer than scores do, planning finds it.

    Raises
    ------
    BudgetError
    """
    if budget.step_seconds is None:
        return
    scoring = sum(stage.seconds for stage in prediction.stages if stage.name in SCORING)
    scores = unmeasured(work)
    speed_planner(work, budget).check_reach(
        lambda seconds: place_options(work, scores, seconds), budget.weight_bytes - work.other_bytes, scoring
    )


def unmeasured(work: Work) -> Scores:
    """Scores of a model of which nothing but its shapes is known: no coding costs anything."""
    uses = [use.name for use in uses_of(work.anatomy)]
    nothing = dict.fromkeys((coding.label for coding in work.codings), 0.0)
    return assemble(work.anatomy, dict.fromkeys(uses, nothing), {}, dict.fromkeys(uses, 0.0), "")


def predicted_step_seconds(
    work: Work, scores: Scores, budget: Budget | None, codings: dict[str, Coding]
) -> float | None:
    """What a decoding step is predicted to take, where the budget asks for speed."""
    if budget is None or budget.step_seconds is None:
        return None
    return speed_planner(work, budget).step_seconds(codings, with_rounded_inputs(work, scores, codings))


def together_for(target: str | None, place: PlaceScore) -> str | None:
    """Places that must share a coding because `target` fuses them when it loads: q/k/v and gate/up."""
    if target != "compressed-tensors":
        return None
    if place.role in ("q", "k", "v"):
        return f"{place.block}.qkv"
    if place.role in ("gate", "up"):
        return f"{place.block}.gate-up"
    return None


def with_rounded_inputs(work: Work, scores: Scores, codings: dict[str, Coding]) -> dict[str, str]:
    """Place -> what its inputs are rounded to: as stated, else bytes where that is cheapest."""
    if work.rounded_inputs is not None:
        known = input_cost(scores, codings, work.rounded_inputs)
        return {name: to for name, to in work.rounded_inputs.items() if name in known}
    predicted = sum(
        place.coefficient * scores.predicted_error(place, codings[place.name])
        for place in scores.places
        if place.name in codings
    )
    return dict.fromkeys(sorted(rounded_inputs(scores, codings, predicted)), INT8)


def predicted_losses(work: Work, scores: Scores, codings: dict[str, Coding]) -> dict[str, dict[str, float]]:
    """Place -> predicted relative error of its weight, and KL of that and of rounded inputs.

    Places left as stored cost nothing.
    """
    result = {}
    costs = input_cost(scores, codings, with_rounded_inputs(work, scores, codings))
    for place in scores.places:
        coding = codings.get(place.name)
        if coding is None:
            continue
        error = scores.predicted_error(place, coding)
        kl = place.coefficient * error + costs.get(place.name, 0.0)
        result[place.name] = {"error": error, "kl": kl}
    return result


def codings_of_recipe(work: Work) -> dict[str, Coding]:
    """Place -> coding as the recipe states it for all linears, and for the ends."""
    recipe = work.recipe
    if isinstance(recipe.method, Df11):
        return {**entropy_codings(work, work.place_shapes())}
    if recipe.coding is None:
        raise SettingsError("a recipe without a coding", "coding: {bits: N, group_size: M}", "add it")
    codings: dict[str, Coding] = {place.name: recipe.coding for place in work.anatomy.linears()}
    if recipe.embedding is not None:
        for name in dict.fromkeys((work.anatomy.embedding, work.anatomy.head)):
            if name in work.place_shapes():
                codings[name] = recipe.embedding
    return {n: c for n, c in codings.items() if not as_stored(work, n, c)}


def codings_of_plan(work: Work, plan: Plan) -> dict[str, Coding]:
    """Place -> coding as the plan states it; a place that it doesn't name stays as stored."""
    known = work.place_shapes()
    ends = {work.anatomy.embedding, work.anatomy.head}
    codings = {}
    for place in plan.places:
        if place.name not in known:
            raise SettingsError(
                f"the plan names `{place.name}`", "a place of this model", nearest(place.name, known)
            )
        coding = place.coding.coding()
        if place.activation is not None and not isinstance(coding, ScaledCoding):
            held = "values of tables" if isinstance(coding, TableCoding | BinaryCoding) else "floats"
            held = "codes for scales" if isinstance(coding, DoubleCoding) else held
            raise SettingsError(
                f"`activation: {place.activation}` at `{place.name}`, whose weight holds {held}",
                "it only where weights are integers",
                "remove the line, or set it to null",
            )
        if place.name in ends:
            check_end(coding, f"`{place.name}`")
        elif not isinstance(coding, FloatCoding):
            check_codes(work.recipe.rounding["name"], work.recipe.method.makes, coding)
            if isinstance(work.recipe.method, DoubleRounding):
                check_nestable(coding)
            if isinstance(work.recipe.method, Higgs):
                normal_grid(Higgs.name, coding)
        if not as_stored(work, place.name, coding):
            codings[place.name] = coding
    coded = {name: coding for name, coding in codings.items() if isinstance(coding, EntropyCoding)}
    check_entropy_codings(work, coded)
    return codings


def rounded_inputs_of_recipe(work: Work, codings: dict[str, Coding]) -> dict[str, str] | None:
    """Linear -> what the recipe has its inputs rounded to; None where it doesn't say.

    Raises
    ------
    ResourceError
        Where nothing here multiplies inputs rounded to bytes, and the result would be measured with exact
        ones.
    """
    activation = work.recipe.activation
    if activation is None:
        return None
    names = {}
    for place in work.anatomy.linears():
        coding = codings.get(place.name)
        if not isinstance(coding, ScaledCoding):
            continue
        if activation == INT8 and not multiplies_bytes(coding, place.in_features):
            raise ResourceError(
                f"activation {activation} for `{place.name}` of {coding.label} on this machine",
                "a path that multiplies inputs rounded to bytes, which a C++ compiler at installation makes",
                "install tailorbird with a compiler, or leave out activation",
            )
        names[place.name] = activation
    return names


def multiplies_bytes(coding: ScaledCoding, in_features: int) -> bool:
    """Whether inputs before such a weight that may be rounded to bytes are, where results are measured."""
    path = dispatch.find(coding, in_features, 1, torch.float32, torch.device("cpu"), rounds=True)
    return path is not None and path.rounds


def remark_on_exact_inputs(work: Work, codings: Mapping[str, Coding], rounded: Mapping[str, str]) -> None:
    """Have the result say where inputs may be rounded to bytes, and nothing here does so.

    A plan may come from another machine, and go to one: it is carried out all the same, but what is measured
    is the result with exact inputs.
    """
    shapes = work.place_shapes()
    exact = [
        name
        for name, to in rounded.items()
        if to == INT8
        and isinstance(coding := codings.get(name), ScaledCoding)
        and not multiplies_bytes(coding, shapes[name][1])
    ]
    if exact:
        remark = (
            f"inputs of {len(exact)} linears, such as `{exact[0]}`, may be rounded to bytes, and nothing on "
            "this machine does so: all that was measured is with exact inputs"
        )
        work.remarks = (*work.remarks, remark)


def remark_on_damping(work: Work, measured: Mapping[str, Mapping[str, float]]) -> None:
    """Have the result say where Gram matrices could be factorized with more damping than asked only."""
    raised = {name: found["damping"] for name, found in measured.items() if "damping" in found}
    if raised:
        named = [f"{damping:g} at `{name}`" for name, damping in raised.items()]
        more = f" and {len(named) - DAMPINGS} more, in plan.yaml" if len(named) > DAMPINGS else ""
        remark = (
            "damping was raised, as Gram matrices could not be factorized with less: "
            f"{', '.join(named[:DAMPINGS])}{more}; with more calibration text less may do"
        )
        work.remarks = (*work.remarks, remark)
        work.progress.note(remark)


def check_static_inputs(work: Work) -> None:
    """Refuse static scales of inputs where there is none to find, or where it would not stay right."""
    static = {name for name, to in (work.rounded_inputs or {}).items() if to == INT8_STATIC}
    if not static:
        return
    for name in sorted(static - {place.name for place in work.anatomy.linears()}):
        raise SettingsError(
            f"`activation: {INT8_STATIC}` at `{name}`",
            "it only at linears inside the blocks, where calibration finds scales",
            f"write `activation: {INT8}`, or set it to null",
        )
    if work.recipe.whole is not None or isinstance(work.recipe.block, FlatQuant):
        learns = work.recipe.name.split(JOINT)[-1]
        raise SettingsError(
            f"activation {INT8_STATIC} with `{learns}`",
            "inputs whose scales are found when all is learned; this learns behind them, or after",
            f"write activation={INT8}, or leave out `{learns}`",
        )


def remark_on_simulation(work: Work) -> None:
    """Have the result say that products of inputs in other formats than bytes are no faster here."""
    for to in simulated_inputs(work):
        remark = (
            f"inputs are rounded to {to}, simulated: the rounding is that of {to}, the products are of "
            "floats and no faster"
        )
        work.remarks = (*work.remarks, remark)


def low_rank_of_plan(work: Work, plan: Plan, codings: dict[str, Coding]) -> dict[str, LowRank]:
    """Linear of the blocks -> the low-rank part that the plan states; no other is made."""
    shapes = {place.name: (place.out_features, place.in_features) for place in work.anatomy.linears()}
    stated = {place.name: place.low_rank.low_rank() for place in plan.places if place.low_rank is not None}
    if bool(stated) != (work.recipe.correction is not None):
        raise SettingsError(
            f"a plan of method `{work.recipe.name}` with {len(stated)} low-rank parts",
            "`low_rank` at places, and a correction in the method's name; or neither",
            "add for example `low_rank: {rank: 8, dtype: bfloat16}`, or name a method such as gptq+eora",
        )
    for name, part in stated.items():
        if name not in shapes or not isinstance(codings.get(name), CodesCoding):
            raise SettingsError(
                f"`low_rank` at `{name}`", "it at linears of blocks, beside codes", "remove the line"
            )
        if part.rank > min(shapes[name]):
            raise SettingsError(
                f"`low_rank` of rank {part.rank} at `{name}`",
                f"at most {min(shapes[name])}, its smaller side",
                "lower the rank",
            )
    return stated


def check_recorded(work: Work, plan: Plan) -> None:
    """Refuse a plan that states other sparse parts or transforms than its linear method makes.

    Raises
    ------
    SettingsError
        Naming the place, and what stands beside its codes.
    """
    method = work.recipe.method
    for place in plan.places:
        sparse = None if place.sparse is None else place.sparse.sparse()
        if sparse is not None and sparse != work.sparse.get(place.name):
            own = work.sparse.get(place.name)
            raise SettingsError(
                f"`sparse` of {sparse.nonzeros} nonzeros in {sparse.dtype} at `{place.name}`",
                f"what `{work.recipe.name}` with outliers {method.outliers:g} makes: "
                + ("none" if own is None else f"{own.nonzeros} in {own.dtype}"),
                "change `outliers` in the method's settings, and remove the line",
            )
        transform = None if place.transform is None else place.transform.transform()
        if transform is not None and transform != work.transforms.get(place.name):
            made = work.transforms.get(place.name)
            raise SettingsError(
                f"`transform` of {transform} at `{place.name}`",
                f"what `{work.recipe.name}` makes: " + ("none" if made is None else str(made)),
                "change the method's settings, and remove the line",
            )


def describe(codings: dict[str, Coding]) -> dict[str, Any]:
    """Codings in JSON types."""
    return {name: coding_to_dict(coding) for name, coding in codings.items()}
