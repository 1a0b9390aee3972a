"""The Python calls that mirror the commands; each returns a dataclass with the fields of its JSON."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tailorbird.errors import ResourceError, SettingsError, nearest
from tailorbird.progress import Progress, Silent

if TYPE_CHECKING:
    from tailorbird.adapt.deltas.apply import ApplyResult
    from tailorbird.adapt.deltas.bitdelta import BitdeltaResult
    from tailorbird.adapt.deltas.combine import CombineResult
    from tailorbird.adapt.deltas.compress import CompressResult, ExpandResult
    from tailorbird.adapt.deltas.extract import ExtractResult
    from tailorbird.adapt.merge.merge import MergeResult
    from tailorbird.adapt.result import TunePreview, TuneResult
    from tailorbird.calibrate.job import Job
    from tailorbird.catalogue import MethodRow
    from tailorbird.compress.compare import Cell
    from tailorbird.compress.export import ExportResult
    from tailorbird.compress.result import DryRun, FitResult
    from tailorbird.compress.work import Work
    from tailorbird.drafting.train import DraftResult
    from tailorbird.evaluate.speed import Speed
    from tailorbird.hardware.probe import Probe
    from tailorbird.plan.budget import Budget
    from tailorbird.plan.capacity import FormatRow
    from tailorbird.plan.predict import Prediction
    from tailorbird.run.generate import Generation
    from tailorbird.serve.adapters.share import ShareResult
    from tailorbird.serve.batch import BatchResult
    from tailorbird.serve.interface import EngineOptions
    from tailorbird.serve.server import Served


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` returns; KL in nats per token, None without a reference."""

    perplexity: float
    tokens: int
    kl_mean: float | None = None
    kl_p99: float | None = None
    top1_agreement: float | None = None


def probe(refresh: bool = False, progress: Progress | None = None) -> Probe:
    """What this machine can do; cached, measured again with `refresh`."""
    from tailorbird.hardware.probe import probe as measure

    return measure(refresh=refresh, progress=progress)


def fit(
    model: str,
    memory: str | None = None,
    output: str | Path | None = None,
    *,
    calibration: str | None = None,
    evaluation: str | None = None,
    context: int | None = None,
    concurrency: int | None = None,
    min_speed: str | None = None,
    max_latency: str | None = None,
    sequences: int | None = None,
    length: int | None = None,
    effort: str | None = None,
    method: str | None = None,
    allocator: str = "exact",
    keep: Sequence[str] = (),
    max_kl: float | None = None,
    max_perplexity_increase: float | None = None,
    target: str | None = None,
    dry_run: bool = False,
    frontier: bool = False,
    resume: bool = False,
    measure_speed: bool = True,
    measure_spread: bool = True,
    activations: str = "auto",
    allow_slower: bool = False,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress | None = None,
) -> FitResult | DryRun:
    """Fit `model` to a budget of memory, speed or both: plan, compress, check, report.

    Parameters
    ----------
    model : str
        Directory, Hugging Face id or ``demo``.
    memory : str
        ``1.5GiB``, ``800MB``, ``60%`` or ``3.25bpw``; weights, plus KV cache where `context` is given. None
        only where speed or `max_kl` is asked for.
    output : path
        Where the result goes; it must not exist. Not needed for a dry run.
    calibration, evaluation : str, optional
        File or directory of text; see `calibrate.text`.
    context, concurrency : int, optional
        Tokens per sequence and sequences at a time for which the KV cache is counted, and speed.
    min_speed, max_latency : str, optional
        ``30tok/s`` of all sequences together while decoding, ``40ms`` from one token of a sequence to the
        next: what the plan is predicted to reach on this machine.
    sequences, length : int, optional
        Calibration windows and their tokens.
    effort : {"fast", "balanced", "best"}, optional
        How much work goes into rounding; ``fast`` where `method` isn't stated either. ``best`` becomes
        ``balanced`` where memory is short of it.
    method : str, optional
        In place of an effort a linear method, and what comes before and after it: ``gptq``,
        ``awq+gptq+signround``.
    allocator : str
        Who chooses the coding of every place: ``exact``, ``evopress``, ``ip-calibrated`` or ``ranking``.
    keep : sequence of str
        Places that stay at 16 bits: names, patterns such as ``*.down_proj``, ``embedding``, ``head``.
    max_kl : float, optional
        Nats per token; the gate refuses more. With no budget beside it, it is the budget: the smallest plan
        that keeps below it is made.
    max_perplexity_increase : float, optional
        Percent; the gate refuses more.
    target : {"gguf", "compressed-tensors"}, optional
        Plan inside what that format holds exactly.
    dry_run : bool
        Predict memory, disk and time, and write nothing.
    frontier : bool
        Also measure quality at six budgets.
    resume : bool
        Insist that there is unfinished work to continue.
    measure_speed : bool
        Time source and result in a process of their own, with as many sequences as `concurrency` states,
        where there is memory for both.
    measure_spread : bool
        Compress with either half of the calibration text too, where that takes a minute or less each, and
        report how far the two lead apart.
    activations : {"auto", "exact"}
        Whether linears may round their inputs to bytes where that costs little and is faster.
    allow_slower : bool
        Accept a result that decoded slower than its source in every round that was timed here.

    Returns
    -------
    FitResult or DryRun

    Raises
    ------
    UserError
        Something about the input; nothing was written.
    GateRefused
        The result is kept as ``OUT.rejected``; `error.result` holds the `FitResult`.
    """
    from tailorbird.calibrate.job import check_output
    from tailorbird.compress import allocation
    from tailorbird.compress import fit as fitting
    from tailorbird.compress import work as work_module
    from tailorbird.compress.effort import lower_where_memory_is_short, recipe_of

    _check_device(device)
    recipe = recipe_of(effort, method)
    limits = _checked_limits(max_kl, max_perplexity_increase)
    speeds = {"--min-speed": min_speed, "--max-latency": max_latency}
    other_budgets = [flag for flag, stated in speeds.items() if stated is not None]
    by_quality = memory is None and not other_budgets and max_kl is not None
    allocation.check_choice(allocator, [*other_budgets, *(["--max-kl"] if by_quality else [])], frontier)
    if output is None and not dry_run:
        raise SettingsError("no --output", "a path for the result", "add -o OUT")
    target_path = Path(output) if output is not None else Path("result")
    if not dry_run:
        check_output(target_path)
    work = work_module.open_work(
        model, recipe, calibration=calibration, evaluation=evaluation, sequences=sequences,
        length=length, context=context, target=target, seed=seed, progress=progress,
    )  # fmt: skip
    work.allocator = allocator
    allocation.check_recipe(work, other_budgets)
    work_module.keep(work, keep)
    what: dict[str, Any] = _choose_activations(work, activations)
    budget = work_module.budget_of(
        work, memory, context, concurrency, min_speed, max_latency, max_kl if by_quality else None
    )
    lower_where_memory_is_short(work, effort, target_path)
    allocation.check_room(work)
    if dry_run:
        return fitting.dry_run(work, budget, work_module.foresee(work, target_path))
    what |= {
        "budget": asdict(budget),
        "frontier": frontier,
        "allocator": allocator,
        "kept": sorted(work.kept),
    }
    job, prediction = _begin(work, target_path, what, resume, budget)
    with job:
        codings, scores, cache = allocation.planned(work, job, budget)
        points = fitting.measure_frontier(work, job, scores, cache, budget) if frontier else None
        work.put_beside(codings)  # the points had their own
        result, accepted = fitting.make(
            work, job, scores, cache, codings, budget,
            limits, prediction, command_line(), points, measure_spread,
        )  # fmt: skip
        return _hand_over(work, job, result, accepted, measure_speed, budget, allow_slower)


def compress(
    model: str,
    output: str | Path,
    *,
    recipe: str | None = None,
    plan: str | Path | None = None,
    calibration: str | None = None,
    evaluation: str | None = None,
    sequences: int | None = None,
    length: int | None = None,
    max_kl: float | None = None,
    max_perplexity_increase: float | None = None,
    resume: bool = False,
    measure_speed: bool = True,
    measure_spread: bool = True,
    activations: str = "auto",
    allow_slower: bool = False,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress | None = None,
) -> FitResult:
    """Compress `model` by a recipe (``gptq:bits=4,group=64`` or a YAML file) or by a plan.

    Parameters are those of `fit`; exactly one of `recipe` and `plan` is given.
    """
    from tailorbird.calibrate.job import check_output
    from tailorbird.compress import fit as fitting
    from tailorbird.compress import planning
    from tailorbird.compress import work as work_module
    from tailorbird.compress.recipe import parse_recipe, recipe_of_plan
    from tailorbird.plan.planfile import load_plan

    _check_device(device)
    limits = _checked_limits(max_kl, max_perplexity_increase)
    if (recipe is None) == (plan is None):
        raise SettingsError(
            "neither a recipe nor a plan" if recipe is None else "a recipe and a plan",
            "exactly one of --recipe and --plan",
            "give for example --recipe gptq:bits=4,group=64",
        )
    check_output(Path(output))
    chosen = load_plan(Path(plan)) if plan is not None else None
    parsed = recipe_of_plan(chosen) if chosen is not None else parse_recipe(str(recipe))
    work = work_module.open_work(
        model, parsed, calibration=calibration, evaluation=evaluation, sequences=sequences,
        length=length, context=None, target=None, seed=seed, progress=progress,
    )  # fmt: skip
    if chosen is not None:
        codings = planning.codings_of_plan(work, chosen)
        work.put_beside(codings)
        work.low_rank = planning.low_rank_of_plan(work, chosen, codings)
        planning.check_recorded(work, chosen)
        work.rounded_inputs = {p.name: p.activation for p in chosen.places if p.activation is not None}
    else:
        codings = planning.codings_of_recipe(work)
        work.rounded_inputs = planning.rounded_inputs_of_recipe(work, codings)
        work.put_beside(codings)
    what = _choose_activations(work, activations)
    work_module.narrow(work, codings.values())
    what["codings"] = planning.describe(codings)
    what["low_rank"] = {name: asdict(part) for name, part in work.low_rank.items()}
    what["sparse"] = {name: asdict(part) for name, part in work.sparse.items()}
    what["transforms"] = {name: asdict(part) for name, part in work.transforms.items()}
    job, prediction = _begin(work, Path(output), what, resume)
    with job:
        scores, cache = planning.score(work, job)
        result, accepted = fitting.make(
            work, job, scores, cache, codings, None,
            limits, prediction, command_line(), None, measure_spread,
        )  # fmt: skip
        return _hand_over(work, job, result, accepted, measure_speed, None, allow_slower)


def compare(
    model: str,
    budgets: Sequence[str],
    methods: Sequence[str],
    output: str | Path,
    *,
    calibration: str | None = None,
    evaluation: str | None = None,
    sequences: int | None = None,
    length: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress | None = None,
) -> list[Cell]:
    """Fit `model` to every budget by every method, and measure all on the same held-out text.

    Cells that are finished are kept in `output` and found there again; a page and a figure are drawn beside
    them. A cell that fails says why and doesn't stop the others.

    Parameters
    ----------
    model : str
        Directory, Hugging Face id or ``demo``.
    budgets : sequence of str
        Each as `memory` of `fit`.
    methods : sequence of str
        Each as `method` of `fit`.
    output : path
        Directory of a comparison, or one to be made.
    calibration, evaluation, sequences, length
        As in `fit`.

    Returns
    -------
    list of Cell
        Budget by budget, in the order in which they are given.
    """
    from tailorbird.compress.compare import compare as run
    from tailorbird.report.comparison import write_comparison

    _check_device(device)
    cells = run(
        model, budgets, methods, Path(output), calibration=calibration, evaluation=evaluation,
        sequences=sequences, length=length, seed=seed, command=command_line(), progress=progress or Silent(),
    )  # fmt: skip
    write_comparison(Path(output))
    return cells


def _choose_activations(work: Work, activations: str) -> dict[str, Any]:
    """Let `work` know of inputs that are rounded; what the job's record says of them."""
    from tailorbird.compress import planning

    if activations not in ("auto", "exact"):
        raise SettingsError(
            f"activations `{activations}`", "auto or exact", nearest(activations, ("auto", "exact"))
        )
    if activations == "exact" and work.recipe.activation is not None:
        raise SettingsError(
            f"activations `exact` with activation={work.recipe.activation} in the recipe",
            "one of them",
            "leave out the other",
        )
    if activations == "exact":
        work.rounded_inputs = {}
    planning.check_static_inputs(work)
    planning.remark_on_simulation(work)
    return {"rounded_inputs": work.rounded_inputs}


def _begin(
    work: Work, output: Path, what: dict[str, Any], resume: bool, budget: Budget | None = None
) -> tuple[Job, Prediction]:
    """The job, begun or continued where texts, machine and budget allow it, and what it is predicted to take.

    `what` is chosen for this job: the part of its record that `work` doesn't know.
    """
    from tailorbird.calibrate.job import Job
    from tailorbird.compress import planning
    from tailorbird.compress import work as work_module
    from tailorbird.compress.stage import continue_stages
    from tailorbird.report.table import stage_rows

    unfinished = work_module.check_unfinished(work, output, what, resume)
    work_module.check_windows(work)
    work_module.remark_on_few_tokens(work)
    prediction = work_module.foresee(work, output)
    for stage in stage_rows(prediction.as_dicts()):
        work.progress.note(
            f"predicted for {stage.name}: {stage.memory} of memory, {stage.disk} of disk, {stage.seconds}"
        )
    work_module.check_resources(prediction)
    if budget is not None and not unfinished:
        planning.check_reach(work, budget, prediction)
    job = Job(output, work_module.record_of(work, what), resume)
    continue_stages(work, job)
    return job, prediction


def _hand_over(
    work: Work,
    job: Job,
    result: FitResult,
    accepted: bool,
    measure_speed: bool,
    budget: Budget | None,
    allow_slower: bool,
) -> FitResult:
    """Measure speed, draw the report, give the result its name; or keep it aside and raise."""
    from tailorbird.compress import fit as fitting
    from tailorbird.errors import GateRefused
    from tailorbird.report.html import write_report

    if measure_speed:
        result = fitting.add_speed(work, job, result, budget, allow_slower)
        accepted = result.accepted
    write_report(job.partial)
    target = job.publish() if accepted else job.reject()
    result = replace(result, output=str(target), report=str(target / "report.html"))
    if accepted:
        return result
    failed = next(check for check in result.checks if not check["passed"])
    where = f" at {failed['place']}" if failed["place"] else ""
    error = GateRefused(
        f"the gate refused the result: {failed['name']}{where}: {failed['detail']}",
        "every check to pass",
        f"see {target / 'report.html'}; the result was kept at {target}",
    )
    error.result = result  # type: ignore[attr-defined]
    raise error


def evaluate(
    model: str,
    *,
    text: str | None = None,
    reference: str | None = None,
    context: int | None = None,
    bits: int | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Evaluation:
    """Perplexity of `model` on held-out text, and its divergence from `reference`.

    Parameters
    ----------
    model, reference : str
        Directory, Hugging Face id or ``demo``.
    text : str, optional
        File or directory of text; the demo's held-out modules where `model` or `reference` is the demo.
    context : int, optional
        Tokens per window; min(the model's, 2048) unless given.
    bits : int, optional
        At which `model`'s linears of 8 bits are read, as in `load`.
    """
    from tailorbird.evaluate.checkpoint import evaluate as run

    _check_device(device)
    return Evaluation(**run(model, text, reference, context, progress or Silent(), bits))


def speed(
    model: str,
    *,
    prompt_tokens: int = 64,
    new_tokens: int = 32,
    batch: int = 1,
    threads: int | None = None,
    bits: int | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Speed:
    """Measure prefill and decode speed of `model` on this machine; `bits` as in `load`."""
    from tailorbird.evaluate.speed import speed as measure

    _check_device(device)
    return measure(
        model,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        batch=batch,
        threads=threads,
        progress=progress,
        bits=bits,
    )


def generate(
    model: str,
    prompt: str,
    *,
    max_tokens: int = 128,
    temperature: float = 0.0,
    bits: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Continue `prompt`; `bits` as in `load`."""
    from tailorbird.model.load import load, load_tokenizer
    from tailorbird.run.generate import generate as run

    _check_device(device)
    tokenizer = load_tokenizer(model)
    return run(
        load(model, bits=bits),
        tokenizer,
        prompt,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        on_text=on_text,
    )


def serve(
    model: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    keys: Sequence[str] = (),
    admin_keys: Sequence[str] = (),
    adapters: Mapping[str, str] | None = None,
    adapter_directory: str | None = None,
    adapter_bits: int | None = None,
    memory: str | None = None,
    swap_memory: str | None = None,
    swap_disk: str | None = None,
    max_sequences: int = 64,
    context: int | None = None,
    draft: str | None = None,
    threads: int | None = None,
    bits: int | None = None,
    queue: int = 256,
    timeout: float = 600.0,
    requests_per_minute: float | None = None,
    hang_limit: float = 60.0,
    device: str = "cpu",
) -> Served:
    """Serve `model` over HTTP until SIGTERM or Ctrl-C.

    Parameters
    ----------
    model : str
        Directory, Hugging Face id or ``demo``.
    host, port : str, int
        Where to listen; port 0 lets the system choose.
    keys : sequence of str
        API keys; none lets in everybody who reaches the port.
    admin_keys : sequence of str
        API keys that alone may load, unload, publish and roll back adapters; with none all may.
    adapters : mapping of str to str, optional
        Name -> directory.
    adapter_directory : str, optional
        Where clients may load adapters from.
    adapter_bits : int, optional
        8 rounds adapters' matrices to bytes when they are read, which halves their memory at least.
    memory : str, optional
        ``4GiB``, ``800MB`` or ``60%``; weights, keys, values and adapters together.
    swap_memory, swap_disk : str, optional
        For copies of keys and values that had to make room for others, in RAM and in a file; none unless
        given, and then they are computed again.
    max_sequences : int
        Sequences that run at a time.
    context : int, optional
        Tokens of prompt and answer; the model's limit unless given.
    draft : str, optional
        What guesses tokens beside the text itself, which changes nothing but the speed: a model with the same
        vocabulary, ``self:skip``, or a directory that `draft` wrote.
    threads : int, optional
        CPU threads; all cores unless given.
    bits : int, optional
        At which the model's linears of 8 bits are read, as in `load`.
    queue : int
        Answers that may wait beside those that run.
    timeout : float
        Seconds that an answer may take.
    requests_per_minute : float, optional
        For each key.
    hang_limit : float
        Seconds that the engine may stand still before it is started again.
    """
    _check_device(device)
    _check_serving()
    from tailorbird.serve import server

    options = _engine_options(
        model, memory, swap_memory, swap_disk, adapters, adapter_bits, max_sequences, context, threads, bits
    )
    options = replace(options, adapter_directory=adapter_directory, draft=draft)
    return server.serve(
        options, host, port, keys=keys, admin_keys=admin_keys, queue=queue, timeout=timeout,
        requests_per_minute=requests_per_minute, hang_limit=hang_limit,
    )  # fmt: skip


def draft(
    model: str,
    output: str | Path,
    *,
    data: str | None = None,
    heads: int = 3,
    epochs: int = 2,
    sequences: int = 128,
    length: int | None = None,
    seed: int = 0,
    resume: bool = False,
    device: str = "cpu",
    progress: Progress | None = None,
) -> DraftResult:
    """Train heads that guess the next tokens of `model`, for the `draft` of `serve` and `batch`.

    Parameters
    ----------
    model : str
        Directory, Hugging Face id or ``demo``; it stays as it is.
    output : str or Path
        Directory to write; must not exist.
    data : str, optional
        File or directory of text; without it the model writes some.
    heads : int
        How many tokens are guessed, each by a head of its own.
    epochs, sequences : int
    length : int, optional
        Tokens of each sequence; min(256, the model's context) unless given.
    seed : int
    resume : bool
        Insist that there is something to resume.
    """
    _check_device(device)
    from tailorbird.drafting.train import train_heads

    return train_heads(
        model, Path(output), data, heads, epochs, sequences, length, seed, resume, progress or Silent()
    )


def tune(
    model: str,
    data: str,
    output: str | Path | None = None,
    *,
    method: str = "lora",
    method_settings: Mapping[str, Any] | None = None,
    targets: Sequence[str] = ("all",),
    optimizer: str | None = None,
    optimizer_settings: Mapping[str, Any] | None = None,
    rate: float | None = None,
    schedule: str = "cosine",
    warmup: float = 0.05,
    rate_ratio: float = 1.0,
    clip: float | None = None,
    steps: int | None = None,
    epochs: float = 1.0,
    batch: int = 8,
    grow_batch: int | None = None,
    grow_tolerance: float = 0.5,
    length: int | None = None,
    validation: str | None = None,
    packing: bool = True,
    skip_bad: bool = False,
    chat_template: str | None = None,
    memory: str | None = None,
    budget: str | None = None,
    init: str | None = None,
    source: str | None = None,
    evaluate_every: int | None = None,
    save_every: int | None = None,
    patience: int | None = None,
    offload_states: str | Path | None = None,
    score: str | None = None,
    merge: bool = False,
    dry_run: bool = False,
    resume: bool = False,
    logs: str | Path | None = None,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress | None = None,
) -> TuneResult | TunePreview:
    """Tune `model` on examples, and write the adapter; the model stays as it is.

    Parameters
    ----------
    model : str
        Directory, Hugging Face id or ``demo``; dense or compressed.
    data : str
        File or directory of examples: jsonl, json, parquet or text.
    output : str or Path
        Directory of the adapter, in PEFT's layout, or with `merge` of the checkpoint; must not exist. Not
        needed for a dry run.
    method, method_settings : str, mapping
        Of ``methods("adapter")``, and its settings by their names.
    targets : sequence of str
        Linears to adapt: ``all``, roles, names or paths of modules.
    optimizer, optimizer_settings : str or None, mapping
        Of ``methods("optimizer")``, and its settings; the method's own, or ``adamw``, if not given.
    rate : float, optional
        Highest learning rate; the method's own if not given.
    schedule : {"constant", "linear", "cosine", "wsd"}
    warmup : float
        Share of the steps in which the rate rises.
    rate_ratio : float
        Rate of LoRA's matrices on the side of the outputs, relative to the others' (LoRA+).
    clip : float, optional
        Longest gradient, 1 if not given; longer ones are scaled down. 0 for any.
    steps, epochs : int, float
        How long; `steps` wins.
    batch : int
        Rows of `length` tokens in a step.
    grow_batch : int, optional
        Rows up to which steps grow when the rows of one disagree; needs `steps`.
    grow_tolerance : float
        Error of the gradient that is allowed then, compared with its length.
    length : int, optional
        Most tokens of an example; 1,024, or the model's context if that's less.
    validation : str, optional
        Held-out examples; else 5 % of `data` are held out.
    packing : bool
        Let examples share rows; they don't see each other.
    skip_bad : bool
        Leave out and count entries that are wrong.
    chat_template : str, optional
        A file with one, in place of the model's own.
    memory : str, optional
        Most memory of the process, such as ``6GiB``.
    budget : str, optional
        Size of the adapter, such as ``20MB``: LoRA's ranks are chosen for each linear.
    init, source : str, optional
        Of ``methods("start")``, how LoRA begins on a packed model, and the dense model that was packed.
    evaluate_every, save_every : int, optional
        Steps between looks at the held-out loss, and between states on disk.
    patience : int, optional
        Stop after so many looks without a better loss.
    offload_states : str or Path, optional
        Directory on a disk where the optimizer's states lie; the result is the same.
    score : {"exact", "number"}, optional
        Let the model complete up to 64 held-out prompts before and after, and count those that are as
        expected: the whole text, or its last number.
    merge : bool
        Take what was learned into the model's own weights, dense or packed, which keep their format; the
        adapter is kept as ``OUTPUT.adapter``. Measured on the held-out examples.
    dry_run : bool
        Tell what a tuning would do, and write nothing.
    resume : bool
        Insist that there is something to resume.
    logs : str or Path, optional
        Directory of TensorBoard's event files.

    Returns
    -------
    TuneResult or TunePreview

    Raises
    ------
    UserError
        Something about the input; see the message.
    Diverged
        A loss isn't finite; the last state is kept.
    GateRefused
        Less than 95 % of the adapter's gain survived `merge`; the result is kept as ``OUTPUT.rejected``, the
        adapter as ``OUTPUT.adapter``, and `error.result` holds the `TuneResult`.
    """
    _check_device(device)
    if output is None and not dry_run:
        raise SettingsError("no output", "a directory to write", "give --output, or --dry-run")
    from tailorbird.adapt.merged import merge_tuned, tune_to_merge
    from tailorbird.adapt.settings import TuneSettings
    from tailorbird.adapt.tune import Data, preview_tuning
    from tailorbird.adapt.tune import tune as run
    from tailorbird.model.checkpoint import open_checkpoint
    from tailorbird.plan.budget import parse_size
    from tailorbird.report.tuning import write_tuning_report

    parameters = open_checkpoint(model).parameters if memory or budget else 0
    settings = TuneSettings(
        method, dict(method_settings or {}), tuple(targets), optimizer, dict(optimizer_settings or {}),
        schedule, rate, warmup, steps, epochs, batch, length, None, clip, packing, evaluate_every, save_every,
        patience, parse_size(memory, 2 * parameters, parameters) if memory else None, seed, rate_ratio,
        parse_size(budget, 2 * parameters, parameters) if budget else None, grow_batch, grow_tolerance, score,
        init, source,
    )  # fmt: skip
    examples = Data(data, validation, skip_bad=skip_bad, chat_template=chat_template)
    offload = None if offload_states is None else Path(offload_states)
    if dry_run or output is None:
        return preview_tuning(model, examples, settings, progress, offload, to_merge=merge)
    events = None if logs is None else Path(logs)
    do = tune_to_merge if merge else run
    result = do(model, examples, Path(output), settings, resume, progress, events, offload)
    result = replace(result, report=str(write_tuning_report(Path(result.output))))
    return merge_tuned(result, model, examples, Path(output), settings, progress) if merge else result


def share_adapters(
    model: str,
    directories: Sequence[str | Path],
    output: str | Path,
    *,
    rank: int = 16,
    clusters: int = 1,
    device: str = "cpu",
    progress: Progress | None = None,
) -> ShareResult:
    """Put many adapters of `model` into a basis that they share, or into a few; all are in memory meanwhile.

    Parameters
    ----------
    model : str
        Directory, Hugging Face id or ``demo``; it stays as it is.
    directories : sequence of str or Path
        Of adapters, whose names are those of the directories; they stay as they are.
    output : str or Path
        Directory to write, with one for each adapter beside the bases; must not exist.
    rank : int
        Of the bases.
    clusters : int
        How many bases; each adapter goes where it loses least.
    """
    _check_device(device)
    from tailorbird.serve.adapters.share import share_for_model

    paths = [Path(directory) for directory in directories]
    return share_for_model(model, paths, Path(output), rank, clusters, progress)


def merge_adapter(
    model: str,
    adapter: str | Path,
    output: str | Path,
    *,
    data: str,
    calibration: str | None = None,
    keep_share: float = 0.95,
    residual_rank: int = 8,
    sequences: int | None = None,
    length: int | None = None,
    seed: int = 0,
    resume: bool = False,
    device: str = "cpu",
    progress: Progress | None = None,
) -> MergeResult:
    """Merge a LoRA or GLoRA adapter into the weights of `model`, packed ones too, and measure what survives.

    Parameters
    ----------
    model : str
        Directory, Hugging Face id or ``demo``; it stays as it is.
    adapter : str or Path
        Directory in PEFT's layout, or as `tune` wrote it; it stays as it is.
    output : str or Path
        Directory to write, in the format of `model`; must not exist.
    data : str
        File or directory of text to measure on. Where packed weights change and there is no `calibration`,
        a tenth of it is measured on and the rest calibrates.
    calibration : str, optional
        File or directory of text by which packed weights are rounded.
    keep_share : float
        Least share of the adapter's gain on that text that must survive, above 0 and up to 1.
    residual_rank : int
        Most rank of an adapter in ``OUT/residual`` that makes up for what packed weights can't hold; it is
        written only where it is needed. 0 allows none.
    sequences, length : int, optional
        Calibration windows and their tokens.
    seed : int
    resume : bool
        Insist that there is something to resume.

    Raises
    ------
    UserError
        Something about the input; nothing was written.
    GateRefused
        Less survived; the result is kept as ``OUT.rejected``, and `error.result` holds the `MergeResult`.
    """
    _check_device(device)
    from tailorbird.adapt.merge.merge import merge_adapter as run

    return run(
        model, Path(adapter), Path(output), data, calibration, keep_share, residual_rank, sequences, length,
        seed, resume, progress,
    )  # fmt: skip


def combine_adapters(
    adapters: Sequence[str | Path],
    output: str | Path,
    *,
    weights: Sequence[float] | None = None,
    how: str = "linear",
    density: float | None = None,
    rank: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress | None = None,
) -> CombineResult:
    """Combine LoRA adapters of one base into one; ranks, scalings and linears may differ.

    Parameters
    ----------
    adapters : sequence of str or Path
        Directories in PEFT's layout; they stay as they are.
    output : str or Path
        Directory to write; must not exist.
    weights : sequence of float, optional
        One for each adapter. Without them, ``1/n`` for linear and dare, 1 for ties and dare-ties.
    how : str
        ``linear``, ``ties``, ``dare`` or ``dare-ties``.
    density : float, optional
        Share of entries that stay with the last three; 0.5 if not given.
    rank : int, optional
        Of the result; without it, at each linear the sum of the ranks, with which linear is exact.
    seed : int
        Of what dare drops.
    """
    _check_device(device)
    from tailorbird.adapt.deltas.combine import combine_adapters as run

    paths = [Path(adapter) for adapter in adapters]
    return run(paths, Path(output), weights, how, density, rank, seed, progress)


def compress_adapter(
    adapter: str | Path,
    output: str | Path,
    *,
    density: float = 0.05,
    model: str | None = None,
    data: str | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> CompressResult:
    """Compress a LoRA adapter to signs of its largest entries and one scalar for each tensor (ComPEFT).

    Parameters
    ----------
    adapter : str or Path
        Directory in PEFT's layout; it stays as it is.
    output : str or Path
        Directory to write, for `expand_adapter`; must not exist.
    density : float
        Share of each tensor's entries that stay.
    model, data : str, optional
        The adapter's model, and held-out text on which alpha is chosen; without them alpha is 1.
    """
    _check_device(device)
    from tailorbird.adapt.deltas.compress import compress_adapter as run

    return run(Path(adapter), Path(output), density, model, data, progress)


def expand_adapter(
    directory: str | Path,
    output: str | Path,
    *,
    device: str = "cpu",
    progress: Progress | None = None,
) -> ExpandResult:
    """Write what `compress_adapter` made in PEFT's layout again; `output` must not exist."""
    _check_device(device)
    from tailorbird.adapt.deltas.compress import expand_adapter as run

    return run(Path(directory), Path(output))


def extract_adapter(
    base: str,
    tuned: str,
    output: str | Path,
    *,
    rank: int = 16,
    ignore_others: bool = False,
    device: str = "cpu",
    progress: Progress | None = None,
) -> ExtractResult:
    """Write what fine-tuning changed in the linears of `base` as a LoRA adapter; two tensors are in memory.

    Parameters
    ----------
    base, tuned : str
        Directories, Hugging Face ids or ``demo``, of one architecture, with dense weights.
    output : str or Path
        Directory to write, in PEFT's layout; must not exist.
    rank : int
        Of each linear's adapter.
    ignore_others : bool
        Go on where tensors beside linears differ, which the adapter doesn't hold.
    """
    _check_device(device)
    from tailorbird.adapt.deltas.extract import extract_adapter as run

    return run(base, tuned, Path(output), rank, ignore_others, progress)


def make_bitdelta(
    base: str,
    tuned: str,
    output: str | Path,
    *,
    data: str | None = None,
    steps: int = 200,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress | None = None,
) -> BitdeltaResult:
    """Write a fine-tune as one bit for each weight of its base's linears and one scale for each (BitDelta).

    Parameters
    ----------
    base, tuned : str
        Directories, Hugging Face ids or ``demo``, of one architecture, with dense weights.
    output : str or Path
        Directory to write, for `apply_bitdelta`; must not exist.
    data : str, optional
        Text: nine tenths of its documents distil the scales, with both models in memory; on the rest the
        divergence from the fine-tune is measured.
    steps : int
        Of distillation.
    seed : int
        Of which text is taken.
    """
    _check_device(device)
    from tailorbird.adapt.deltas.bitdelta import make_bitdelta as run

    return run(base, tuned, Path(output), data, steps, seed, progress)


def apply_bitdelta(
    base: str,
    delta: str | Path,
    output: str | Path,
    *,
    device: str = "cpu",
    progress: Progress | None = None,
) -> ApplyResult:
    """Write the fine-tune that `make_bitdelta` stored as a dense checkpoint; `output` must not exist."""
    _check_device(device)
    from tailorbird.adapt.deltas.apply import apply_bitdelta as run

    return run(base, Path(delta), Path(output), progress)


def batch(
    model: str,
    source: str | Path,
    output: str | Path,
    *,
    adapters: Mapping[str, str] | None = None,
    adapter_bits: int | None = None,
    memory: str | None = None,
    swap_memory: str | None = None,
    swap_disk: str | None = None,
    max_sequences: int = 64,
    context: int | None = None,
    draft: str | None = None,
    threads: int | None = None,
    bits: int | None = None,
    timeout: float = 3600.0,
    device: str = "cpu",
    progress: Progress | None = None,
) -> BatchResult:
    """Answer a file of requests in OpenAI's batch format; an interrupted run goes on where it was.

    Parameters
    ----------
    model : str
        Directory, Hugging Face id or ``demo``; requests name it, or an adapter, in their field `model`.
    source, output : str or Path
        Lines of JSON; `output` must not exist.
    adapters, adapter_bits, memory, swap_memory, swap_disk, max_sequences, context, draft, threads, bits
        As in `serve`.
    timeout : float
        Seconds that one answer may take.
    """
    _check_device(device)
    _check_serving()
    from tailorbird.serve.batch import run_batch

    options = _engine_options(
        model, memory, swap_memory, swap_disk, adapters, adapter_bits, max_sequences, context, threads, bits
    )
    options = replace(options, draft=draft)
    return run_batch(options, Path(source), Path(output), progress or Silent(), timeout=timeout)


def _engine_options(
    model: str,
    memory: str | None,
    swap_memory: str | None,
    swap_disk: str | None,
    adapters: Mapping[str, str] | None,
    adapter_bits: int | None,
    max_sequences: int,
    context: int | None,
    threads: int | None,
    bits: int | None,
) -> EngineOptions:
    from tailorbird.model.checkpoint import locate, open_checkpoint
    from tailorbird.plan.budget import parse_size
    from tailorbird.serve.interface import EngineOptions

    locate(model)  # refused here, before anything is started
    if bits is not None:
        open_checkpoint(model, bits)  # likewise

    def size(text: str) -> int:
        parameters = open_checkpoint(model).parameters
        return parse_size(text, 2 * parameters, parameters)

    return EngineOptions(
        model=model,
        adapters=dict(adapters or {}),
        adapter_bits=adapter_bits,
        memory_bytes=None if memory is None else size(memory),
        swap_memory_bytes=0 if swap_memory is None else size(swap_memory),
        swap_disk_bytes=0 if swap_disk is None else size(swap_disk),
        max_sequences=max_sequences,
        context=context,
        threads=threads,
        bits=bits,
    )


def _check_serving() -> None:
    """Raise `ResourceError` where the packages that only serving needs aren't installed."""
    needed = ("fastapi", "uvicorn", "msgpack", "prometheus_client", "httpx")
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise ResourceError(
            f"packages that aren't installed: {', '.join(missing)}",
            "the packages that serving needs",
            "pip install 'tailorbird[serve]'",
        )


def export(
    directory: str | Path, to: str, output: str | Path, progress: Progress | None = None
) -> ExportResult:
    """Write a compressed checkpoint in another tool's format, and compare it there where that is possible."""
    from tailorbird.compress.export import export as run

    return run(Path(directory), to, Path(output))


def methods(family: str | None = None) -> list[MethodRow]:
    """Every method there is, with its paper; `family` leaves others out."""
    from tailorbird.catalogue import all_methods

    rows = all_methods()
    if family is None:
        return rows
    families = {row.family for row in rows}
    if family not in families:
        raise SettingsError(f"family `{family}`", "a family of methods", nearest(family, families))
    return [row for row in rows if row.family == family]


def formats() -> list[FormatRow]:
    """What weights can be stored in, by the bits that it takes, and what each format can hold."""
    from tailorbird.plan.capacity import format_rows

    return format_rows()


def command_line() -> str:
    """The command that runs, as the report shows it."""
    return " ".join(["tailorbird", *sys.argv[1:]]) if sys.argv and "tailorbird" in sys.argv[0] else "Python"


def _check_device(device: str) -> None:
    if device != "cpu":
        raise SettingsError(
            f"device `{device}`", "cpu, the only one that these calls use so far", "leave it out"
        )


def _checked_limits(max_kl: float | None, max_perplexity_increase: float | None) -> dict[str, float | None]:
    """The limits of the gate by name; one that could refuse nothing, or everything, is an error."""
    limits = {"max_kl": max_kl, "max_perplexity_increase": max_perplexity_increase}
    for name, limit in limits.items():
        if limit is not None and not math.isfinite(limit):
            flag = "--" + name.replace("_", "-")
            raise SettingsError(f"{flag} {limit}", "a finite number", f"give another, or leave out {flag}")
    return limits
