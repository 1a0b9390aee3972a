"""Tunes a model: opens it and its examples, attaches a method, runs the loop, and writes what was learned."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import tailorbird
from tailorbird.adapt.card import card, checkpoint_card
from tailorbird.adapt.checkpoints import Checkpoints
from tailorbird.adapt.curvature import CurvedStep, check_sampling
from tailorbird.adapt.data.examples import Examples
from tailorbird.adapt.data.order import Order, held_out_rows
from tailorbird.adapt.data.preview import beginning, preview
from tailorbird.adapt.data.store import prepare
from tailorbird.adapt.growing import GrowingStep, check_growing
from tailorbird.adapt.logs import TensorBoard
from tailorbird.adapt.loop import History, Loop, Pace
from tailorbird.adapt.methods.adapter import Attached, Place
from tailorbird.adapt.methods.attach import attach
from tailorbird.adapt.methods.low_rank import LowRank
from tailorbird.adapt.methods.registry import method_named
from tailorbird.adapt.methods.zeroth.moved import Moved
from tailorbird.adapt.optimizers.batch_growth import BatchGrowth
from tailorbird.adapt.optimizers.loraplus import faces_outputs, lora_plus_groups
from tailorbird.adapt.optimizers.offload import MappedStates, resident_state_bytes
from tailorbird.adapt.optimizers.optimizer import RuleOptimizer
from tailorbird.adapt.optimizers.registry import optimizer_named
from tailorbird.adapt.optimizers.rule import Rule, state_bytes
from tailorbird.adapt.optimizers.sgd import Sgd
from tailorbird.adapt.places import ALL, places_of
from tailorbird.adapt.planned import planned_ranks
from tailorbird.adapt.probe import Cost, measure, worst_row
from tailorbird.adapt.quick import quickened
from tailorbird.adapt.result import TunePreview, TuneResult
from tailorbird.adapt.room import Room, find_room
from tailorbird.adapt.rows import Row
from tailorbird.adapt.save import ORIGIN, check_mergeable, write_adapter
from tailorbird.adapt.schedules import Schedule
from tailorbird.adapt.score import Scorer, questions_of
from tailorbird.adapt.settings import TuneSettings
from tailorbird.adapt.starts.registry import start_named
from tailorbird.adapt.starts.source import Source
from tailorbird.adapt.starts.start import Given, products
from tailorbird.adapt.step import Step, held_out_loss
from tailorbird.adapt.trunk import Trunk
from tailorbird.adapt.whole import check_names, write_checkpoint
from tailorbird.adapt.wrap import attached, detached
from tailorbird.adapt.zeroth import ZerothStep
from tailorbird.calibrate.job import Job
from tailorbird.errors import ResumeError, SettingsError
from tailorbird.formats.peft import CONFIG_FILE, WEIGHTS_FILE
from tailorbird.hardware.memory import keep_freed_memory, peak_resident_bytes, reset_peak
from tailorbird.kernels.few_sizes import KEPT_BYTES, STRIDE
from tailorbird.model.anatomy import Anatomy, read_anatomy
from tailorbird.model.checkpoint import Checkpoint, open_checkpoint, write_json, write_text
from tailorbird.model.identity import identity
from tailorbird.model.json_file import read_json
from tailorbird.model.load import load
from tailorbird.model.weights import Weights
from tailorbird.progress import Progress, Silent

#: Tokens of the longest example where nothing is stated.
LENGTH = 1024
#: Looks at the held-out loss and states on disk in a whole tuning, if nothing is stated.
LOOKS, STATES = 10, 20
#: Share of a tuning's time that looks may take then, and of its tokens that a look may read; reading takes a
#: third of learning.
LOOKING, HELD_OUT = 0.2, 0.1
LEAST_HELD_OUT = 4096
#: Share of a tuning's time that its two scores may take, and tokens that are taken to be read while one is
#: generated: a constant, so that the same prompts are asked on any machine.
SCORING, GENERATING = 0.2, 50
#: Tokens that are read at a time where ranks are planned.
PLANNING_TOKENS = 512
#: Tokens, or more up to the end of a step, that a start reads.
START_TOKENS = 16_384
HISTORY, README = "history.json", "README.md"
#: Where neither the user nor the method chooses.
ADAPTERS_OPTIMIZER = "adamw"


@dataclass(frozen=True)
class Data:
    """Where examples come from.

    Attributes
    ----------
    source : str
        File or directory.
    validation : str or None
        The same for held-out examples; else `share` of the source's are held out.
    skip_bad : bool
        Leave out what is wrong instead of refusing it.
    chat_template : str or None
        File with one, or one itself.
    """

    source: str
    validation: str | None = None
    share: float = 0.05
    skip_bad: bool = False
    chat_template: str | None = None


@dataclass
class Work:
    """Everything that one tuning works with, once it's open."""

    name: str
    checkpoint: Checkpoint
    anatomy: Anatomy
    settings: TuneSettings
    model: Any
    trunk: Trunk
    places: dict[str, Place]
    all_paths: list[str]
    blocks: list[Any]
    method: Attached
    optimizer: RuleOptimizer
    training: Examples
    held_out: Examples | None
    order: Order
    steps: int
    growth: BatchGrowth | None
    source: Source | None
    scorer: Scorer | None = None

    @property
    def tokens(self) -> int:
        """That are read in all steps, about; without growth of the batch."""
        facts = self.training.facts
        read = facts.tokens + facts.examples * self.method.prompt_tokens
        return int(self.steps * read / max(1, self.order.steps_per_epoch()))

    @property
    def trained_parameters(self) -> int:
        """Numbers that are learned at some step, whatever rests at the moment."""
        return sum(one.numel() for group in self.optimizer.param_groups for one in group["params"])

    @property
    def warnings(self) -> list[str]:
        """What a user should know of the path that was taken."""
        if not self.trunk.note:
            return []
        told = [f"examples don't share rows: {self.trunk.note}"]
        return told + (["--memory is without effect: a pass is one example"] if self.settings.memory else [])

    @property
    def states_bytes(self) -> int:
        """What comes on top of passes once tuning is under way.

        The optimizer's states, copies of what is best, and what products keep of sizes yet to come.
        """
        held = state_bytes if self.optimizer.mapped is None else resident_state_bytes
        states = held(self.optimizer.rule, [tuple(one.shape) for one in self.method.learned_at_once()])
        states += KEPT_BYTES
        if self.method.changed() is not None:  # what is best is on the disk
            return states
        return states + sum(tensor.nbytes for tensor in self.method.state_dict().values())

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the model run with what is learned until the end of the block."""
        with (
            quickened(self.model),
            attached(self.model, self.places, self.method),
            self.trunk.beginning(self.method),
        ):
            yield

    def step(self, pass_tokens: int, recomputed: int) -> Step:
        """A step with so many tokens in a pass, and so many of the first blocks computed again."""
        if isinstance(self.method, Moved):
            return ZerothStep(self.trunk, self.method, self.optimizer, pass_tokens)
        own = self.trunk, self.method, self.optimizer, pass_tokens
        shared = self.settings.longest_gradient, self.blocks[:recomputed]
        sampling = self.optimizer.rule.sampling
        if sampling is not None:
            return CurvedStep(*own, sampling, *shared)
        return Step(*own, *shared) if self.growth is None else GrowingStep(*own, self.growth, *shared)

    def seconds(self, cost: Cost) -> float:
        """What all steps take at most, by what a pass of the first one took."""
        seconds = self.tokens * cost.seconds / cost.tokens
        sampling = self.optimizer.rule.sampling
        if sampling is not None:  # the first step reads everything three times, others once
            seconds *= (2 / sampling.every + 1) / 3
        return seconds if self.growth is None else seconds * self.growth.most / self.settings.batch

    def room(self) -> Room:
        """What goes through the model at a time."""
        longest, settings = self.order.longest_first(), self.settings
        if not self.trunk.packs:  # a pass is one example
            return Room(len(longest), 0, measure(self.step(len(longest), 0), [longest]))
        worst = [longest, self.order.most_continued(STRIDE)]
        if settings.pass_tokens is not None:
            tokens = max(settings.pass_tokens, *map(len, worst))
            cost = measure(self.step(settings.pass_tokens, 0), [worst_row(row, tokens) for row in worst])
            return Room(settings.pass_tokens, 0, cost)
        alone = self.growth is not None  # each row is a pass
        return find_room(
            self.step, worst, len(self.blocks), self.order.capacity * (1 if alone else settings.batch),
            self.trunk.packs and not alone and not self.method.reversible, settings.memory, self.states_bytes,
            one_pass=self.method.clipping is not None,
        )  # fmt: skip


def tune(
    model: str,
    data: Data,
    output: Path,
    settings: TuneSettings | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    logs: Path | None = None,
    offload: Path | None = None,
    to_merge: bool = False,
) -> TuneResult:
    """Tune a model, and write the adapter, or the changed model, to a directory that doesn't exist yet.

    A tuning that was interrupted goes on from its last state by the same call, and ends with the same bytes.

    Parameters
    ----------
    model : str
        Directory, Hugging Face id or ``demo``.
    data : Data
    output : Path
    settings : TuneSettings, optional
    resume : bool
        Insist that there is something to resume.
    progress : Progress, optional
    logs : Path, optional
        Directory of TensorBoard's event files.
    offload : Path, optional
        Directory of files in which the optimizer's states lie; in RAM if not given. The result is the same.
    to_merge : bool
        Refuse a method whose adapter weights can't take in.

    Raises
    ------
    SettingsError, TextError, ResumeError, ResourceError, UnsupportedArchitecture
        What is wrong with the settings, the examples, unfinished work, the machine or the model.
    Diverged
        A loss isn't finite; the last state is kept.
    """
    began, progress, settings = time.perf_counter(), progress or Silent(), settings or TuneSettings()
    method_named(settings.method, **settings.method_settings)  # before anything is opened
    if settings.optimizer is not None:
        optimizer_named(settings.optimizer, **settings.optimizer_settings)
    Schedule(settings.schedule, warmup=settings.warmup)
    _growth(settings)
    if settings.init is not None:
        start_named(settings.init)
    checkpoint = open_checkpoint(model)
    board = TensorBoard(logs) if logs else None
    keep_freed_memory()
    reset_peak()
    record = tuning_record(checkpoint, data, settings)
    with Job(output, record, resume) as job, ExitStack() as stack:
        work = _open(model, checkpoint, data, settings, job.work / "data", progress, offload, to_merge)
        stack.enter_context(work.in_place())
        room = work.room()
        for line in room.why:
            progress.note(line)
        learned = work.trained_parameters
        history = _loop(work, room, job, progress, board).run()
        learned = max(learned, work.trained_parameters)  # methods may give up some, or begin with few
        before = history.loss_before
        after = next((look["loss"] for look in history.looks if look["step"] == history.best), None)
        if work.method.conclude() and history.looks:
            own, after = _own_losses(work, room)
            before = own if work.method.changed() is None else before  # it's no longer there
        origin = {
            "base": identity(checkpoint), "base_name": model, "base_licence": checkpoint.licence,
            "method": asdict(settings)
            | {"method_settings": dict(settings.method_settings), "optimizer": work.optimizer.rule.name},
            "data": asdict(work.training.facts), "loss_before": before, "loss_after": after,
            "trainable_parameters": learned, "tailorbird": tailorbird.__version__,
            "tuning": fingerprint(record),
            "score": history.score(),
        }  # fmt: skip
        written = _write(work, job.partial, origin)
        write_json(job.partial / HISTORY, asdict(history))
        job.publish()
    progress.done()
    return _result(output, origin, history, written, time.perf_counter() - began, work.warnings)


def tuned_before(output: Path, model: str, data: Data, settings: TuneSettings | None = None) -> TuneResult:
    """The result of a tuning that is over, from what it wrote.

    Parameters
    ----------
    output : Path
        As the same call of `tune` left it.
    model, data, settings
        As of `tune`.

    Raises
    ------
    ResumeError
        Something else made what is there.
    """
    began, settings = time.perf_counter(), settings or TuneSettings()
    origin_file = output / ORIGIN
    origin = read_json(origin_file) if origin_file.exists() else {}
    if origin.get("tuning") != fingerprint(tuning_record(open_checkpoint(model), data, settings)):
        raise ResumeError(
            f"{output} exists and was made with other inputs",
            "what the same command left there: model, data, settings, threads and versions",
            f"give the command that began it, or move {output} away",
        )
    written = Weights.open_file(output / WEIGHTS_FILE).total_bytes
    history = History(**read_json(output / HISTORY))
    return _result(output, origin, history, written, time.perf_counter() - began, [])


def _result(
    output: Path, origin: dict[str, Any], history: History, written: int, seconds: float, warnings: list[str]
) -> TuneResult:
    score = origin["score"] or {}
    return TuneResult(
        str(output), origin["method"]["method"], origin["loss_before"], origin["loss_after"],
        len(history.steps), history.best, _pace(history), peak_resident_bytes(),
        origin["trainable_parameters"], written, seconds, origin["data"], warnings=warnings,
        score_before=score.get("before"), score_after=score.get("after"), scored=score.get("of"),
    )  # fmt: skip


def preview_tuning(
    model: str,
    data: Data,
    settings: TuneSettings | None = None,
    progress: Progress | None = None,
    offload: Path | None = None,
    to_merge: bool = False,
) -> TunePreview:
    """What a tuning would do: its examples, and memory and time as the longest pass took them.

    Parameters, results and errors are those of `tune`; nothing is written that stays.
    """
    progress, settings = progress or Silent(), settings or TuneSettings()
    if settings.init is not None:
        start_named(settings.init)
    checkpoint = open_checkpoint(model)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as store, ExitStack() as stack:
        work = _open(model, checkpoint, data, settings, Path(store), progress, offload, to_merge)
        stack.enter_context(work.in_place())
        room = work.room()
        rows = work.order.rows_summary()
        example = preview(work.training, checkpoint.tokenizer())
        progress.done()
        why = [*work.warnings, *room.why]
        if settings.init is not None:
            why.append(f"time and memory of the start `{settings.init}` come on top")
        return TunePreview(
            model, settings.method, asdict(work.training.facts), asdict(rows), example, work.steps,
            work.trained_parameters, room.pass_tokens, room.recomputed,
            room.cost.peak_bytes + work.states_bytes, work.seconds(room.cost), why,
        )  # fmt: skip


def _write(work: Work, directory: Path, origin: dict[str, Any]) -> int:
    """Write what was learned, and its card; gives the bytes of its tensors."""
    method = work.method
    changed = method.checkpoint_tensors() if isinstance(method, Moved) else method.changed()
    if changed is None:
        written = write_adapter(directory, work.places, work.method, work.all_paths, work.name, origin)
        text = card(origin, read_json(directory / CONFIG_FILE), work.name)
    else:
        parts = method.low_rank_parts()
        written = write_checkpoint(directory, work.checkpoint, work.anatomy, changed, origin, parts)
        text = checkpoint_card(origin, work.name)
    write_text(directory / README, text)
    return written


def _loop(work: Work, room: Room, job: Job, progress: Progress, board: TensorBoard | None) -> Loop:
    """The loop over the steps of this tuning."""
    settings, steps = work.settings, work.steps
    schedule = Schedule(settings.schedule, warmup=settings.warmup)
    held_out = _held_out(work)
    pace = Pace(
        steps,
        settings.evaluate_every or math.ceil(steps / _looks(work, sum(map(len, held_out)))),
        settings.save_every or math.ceil(steps / STATES),
        settings.patience,
    )
    step, growth = work.step(room.pass_tokens, room.recomputed), work.growth

    def rows_of(number: int) -> list[Row]:
        return work.order.step(number) if growth is None else work.order.take(growth.position, growth.rows)

    start = None if settings.init is None else partial(_start, work, settings.init, progress)
    return Loop(
        step, rows_of, held_out, lambda number: schedule.factor(number, steps), pace,
        Checkpoints(job.work / "states"), progress, board, growth, work.scorer, start,
        room.cost.peak_bytes + work.states_bytes, lambda row: beginning(row, work.checkpoint.tokenizer()),
    )  # fmt: skip


def _start(work: Work, name: str, progress: Progress) -> None:
    """Let the additions begin as `name` says."""
    assert work.source is not None
    steps: list[list[Row]] = []
    while len(steps) < work.steps and sum(len(row) for rows in steps for row in rows) < START_TOKENS:
        steps.append(work.order.step(len(steps)))
    additions = products(work.method)
    places = {path: work.places[path] for path in additions}
    progress.note(f"start {name} on {sum(len(row) for rows in steps for row in rows):,} tokens")
    start_named(name)(Given(work.trunk, work.blocks, places, additions, work.source, steps))


def _held_out(work: Work) -> list[Row]:
    """Rows of held-out examples: as many as a look may read."""
    if work.held_out is None:
        return []
    room = max(LEAST_HELD_OUT, int(HELD_OUT * work.tokens))
    found: list[Row] = []
    for row in held_out_rows(work.held_out, work.order.capacity, work.method.prompt_tokens):
        if found and room < len(row):
            break
        found.append(row)
        room -= len(row)
    return found


def _own_losses(work: Work, room: Room) -> tuple[float, float]:
    """The held-out loss of the model itself, and with what was learned, which is in place."""
    rows = _held_out(work)
    after = held_out_loss(work.trunk, rows, room.pass_tokens)
    with detached(work.model, work.places):
        return held_out_loss(work.trunk, rows, room.pass_tokens), after


def _looks(work: Work, tokens: int) -> int:
    """How often the held-out loss is looked at where each look reads so many tokens."""
    return max(1, min(LOOKS, int(LOOKING * 3 * work.tokens / max(1, tokens))))


def _open(
    name: str,
    checkpoint: Checkpoint,
    data: Data,
    settings: TuneSettings,
    store: Path,
    progress: Progress,
    offload: Path | None,
    to_merge: bool,
) -> Work:
    """Open model, examples, method and optimizer."""
    anatomy = read_anatomy(checkpoint)
    longest_example(anatomy, settings)
    model = load(name).requires_grad_(False)
    trunk = Trunk(model)
    places = places_of(model, anatomy, settings.targets)
    generator = torch.Generator().manual_seed(settings.seed)
    method = method_named(settings.method, **settings.method_settings)
    attachment = None if settings.budget else attach(method, model, places, generator)
    source = None
    if settings.source is not None:
        if attachment is not None:
            products(attachment)  # before examples are read
        source = Source(settings.source, checkpoint, anatomy, places)
    if isinstance(attachment, Moved):
        _begin_zeroth(attachment, checkpoint, settings)
    elif attachment is not None:
        check_names(checkpoint, attachment.changed() or ())
    if attachment is not None:  # before examples are read
        _rule(settings, attachment, trunk, offload)
        if to_merge:
            check_mergeable(settings.method, attachment)
    begins = attachment or Attached()
    learned_tokens = begins.prompt_tokens + begins.prefix_tokens
    length = longest_example(anatomy, settings, learned_tokens)
    if learned_tokens:
        _refuse_targets(settings)
        trunk.require_room_for(begins)
    training, held_out = read_examples(checkpoint, data, length, settings.seed, store, progress)
    order = Order(
        training, rows_per_step=settings.batch, capacity=length + begins.prompt_tokens, seed=settings.seed,
        packing=settings.packing and trunk.packs, prompt_tokens=begins.prompt_tokens,
    )  # fmt: skip
    if attachment is None:
        attachment = _planned(settings, trunk, places, order, generator)
    attachment.begin(lambda tokens: _read(trunk, order, tokens), checkpoint.weights)
    rule = _rule(settings, attachment, trunk, offload)
    rate = settings.rate or getattr(method, "rate", None) or rule.lr
    chosen = set(attachment.learned())
    learned = [(path, one) for path, one in attachment.named_parameters() if one in chosen]
    groups = lora_plus_groups(learned, rate, settings.rate_ratio)
    optimizer = rule.build(groups, settings.seed, None if offload is None else MappedStates(offload))
    steps = settings.steps or max(1, math.ceil(order.steps_per_epoch() * settings.epochs))
    blocks = [model.get_submodule(block.name) for block in anatomy.blocks if not attachment.reversible]
    work = Work(
        name, checkpoint, anatomy, settings, model, trunk, places, list(places_of(model, anatomy)), blocks,
        attachment, optimizer, training, held_out, order, steps, _growth(settings), source,
    )  # fmt: skip
    if settings.score is not None:
        work.scorer = _scorer(settings.score, work)
    return work


def _scorer(name: str, work: Work) -> Scorer:
    """What scores the model before and after, on as many held-out examples as may take the time."""
    if work.held_out is None:
        raise SettingsError("a score without held-out examples", "some to complete", "give --validation")
    tokenizer, room = work.checkpoint.tokenizer(), int(SCORING / 2 * 3 * work.tokens / GENERATING)
    questions = questions_of(name, work.held_out, tokenizer, work.order.capacity, room)
    return Scorer(name, work.model, tokenizer, questions)


def read_examples(
    checkpoint: Checkpoint, data: Data, length: int, seed: int, store: Path, progress: Progress
) -> tuple[Examples, Examples | None]:
    """The examples of a tuning, encoded below `store`: as of `prepare`."""
    return prepare(
        data.source, checkpoint.tokenizer(), store, length=length, validation=data.validation,
        validation_share=data.share, skip_bad=data.skip_bad, chat_template=data.chat_template, seed=seed,
        progress=progress,
    )  # fmt: skip


def _growth(settings: TuneSettings) -> BatchGrowth | None:
    """How the batch grows, if it does."""
    if settings.grow_batch is None:
        return None
    return BatchGrowth(settings.batch, settings.grow_batch, settings.grow_tolerance)


def _refuse_targets(settings: TuneSettings) -> None:
    """SettingsError where linears were chosen."""
    if ALL not in settings.targets:
        raise SettingsError(
            f"targets {', '.join(settings.targets)} for {settings.method}, which adapts no linear",
            "a method that does", "leave out --targets, or choose another --method",
        )  # fmt: skip


def longest_example(anatomy: Anatomy, settings: TuneSettings, learned: int = 0) -> int:
    """Most tokens of an example that begins with so many learned ones.

    Raises
    ------
    SettingsError
        Both together are more than the model's context.
    """
    context = anatomy.context
    room = None if context is None else context - learned
    length = settings.length or (LENGTH if room is None else max(2, min(LENGTH, room)))
    if room is not None and length > room:
        behind = f" behind {learned} learned ones" if learned else ""
        remedy = "set --length lower, or `tokens` of the method" if learned else "set --length lower"
        raise SettingsError(
            f"examples of up to {length} tokens{behind} for a model with a context of {context}",
            f"at most {max(room, 0)}", remedy,
        )  # fmt: skip
    return length


@torch.no_grad()
def _read(trunk: Trunk, order: Order, tokens: int) -> None:
    """Run the model over the first rows of examples, until so many tokens were read."""
    for number in range(order.steps_per_epoch()):
        for row in order.step(number):
            if tokens <= 0:
                return
            with trunk.reading(row):
                trunk.hidden(row)
            tokens -= len(row)


def _planned(
    settings: TuneSettings,
    trunk: Trunk,
    places: dict[str, Place],
    order: Order,
    generator: torch.Generator,
) -> Attached:
    """LoRA whose ranks were chosen for the budget."""
    assert settings.budget is not None
    most_tokens = settings.pass_tokens or max(order.capacity, PLANNING_TOKENS)
    ranks = planned_ranks(trunk, places, order.step(0), settings.budget, most_tokens, settings.seed)
    attachment = Attached()
    for path, rank in ranks.items():
        attachment.add(path, LowRank.beginning(places[path], rank, 1.0, generator))
    return attachment


def _begin_zeroth(method: Moved, checkpoint: Checkpoint, settings: TuneSettings) -> None:
    """Tell a method without gradients where the weights are, unless it can't do what is asked."""
    for given, name in (
        (settings.rate_ratio != 1, "rate ratio"),
        (settings.optimizer is not None, "optimizer"),
        (settings.clip is not None, "clip"),
    ):
        if given:
            raise SettingsError(
                f"an own {name} for a method of zeroth order, which descends by itself", "none",
                f"leave out --{name.replace(' ', '-')}",
            )  # fmt: skip
    check_names(checkpoint, method.checkpoint_tensors() or {})
    method.begin_from(checkpoint.weights.read)


def _rule(settings: TuneSettings, method: Attached, trunk: Trunk, offload: Path | None) -> Rule:
    """The optimizer that was chosen, else the method's own, else AdamW; refused where it can't work."""
    rule = _chosen_rule(settings, method)
    if settings.rate_ratio != 1 and not any(faces_outputs(name) for name, _ in method.named_parameters()):
        raise SettingsError(
            f"a rate ratio of {settings.rate_ratio:g} for {settings.method}",
            "a method with matrices of LoRA that face the outputs, such as lora or dora",
            "leave out --rate-ratio, or choose another --method",
        )
    check_sampling(rule, method, trunk.model.dtype)
    if settings.grow_batch is not None:
        check_growing(rule, method, settings.method)
    if offload is not None and not rule.layout((1, 1)):
        raise SettingsError(
            f"offloaded states of optimizer `{rule.name}`", "an optimizer that has states",
            "leave out --offload-states",
        )  # fmt: skip
    return rule


def _chosen_rule(settings: TuneSettings, method: Attached) -> Rule:
    if isinstance(method, Moved):
        return Sgd(lr=method.rate, momentum=0.0)
    own = method.rule
    if settings.optimizer is None and own is not None:
        return optimizer_named(own.name, **(vars(own) | dict(settings.optimizer_settings)))
    return optimizer_named(settings.optimizer or ADAPTERS_OPTIMIZER, **settings.optimizer_settings)


def tuning_record(checkpoint: Checkpoint, data: Data, settings: TuneSettings) -> dict[str, Any]:
    """Everything that decides the result's bytes."""
    sources = {"source": data.source, "validation": data.validation}
    dense = {} if settings.source is None else {"source_model": identity(open_checkpoint(settings.source))}
    return dense | {
        "model": identity(checkpoint),
        "data": asdict(data),
        "contents": {name: _digest(Path(path)) for name, path in sources.items() if path},
        "settings": asdict(settings) | {"method_settings": dict(settings.method_settings)},
        "threads": torch.get_num_threads(),
        "versions": {"tailorbird": tailorbird.__version__, "torch": torch.__version__},
    }


def fingerprint(record: dict[str, Any]) -> str:
    """SHA-256 of a record, hex."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    """SHA-256 over a file's bytes, or over those of the files in a directory with their names, hex."""
    digest = hashlib.sha256()
    for file in sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]:
        digest.update(f"{file.name}\0".encode())
        if file.is_file():
            with open(file, "rb") as opened:
                while piece := opened.read(1 << 20):
                    digest.update(piece)
    return digest.hexdigest()


def _pace(history: History) -> float:
    """Tokens per second, by the medians of what steps took and read."""
    if not history.steps:
        return 0.0
    tokens = statistics.median(step["tokens"] for step in history.steps)
    return float(tokens / statistics.median(step["seconds"] for step in history.steps))
