"""What a compression works with: the opened source, its texts, the recipe; checked before work starts.

Everything that can be wrong with the input is found here, without reading weights and without
writing anything. Texts come last: to read them, or to sample them where there are none, takes longest.
"""

from __future__ import annotations

import copy
import fnmatch
import functools
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

import tailorbird
from tailorbird.calibrate.documents import Document
from tailorbird.calibrate.importance import attention_received
from tailorbird.calibrate.job import WORK, Job
from tailorbird.calibrate.ledger import Ledger
from tailorbird.calibrate.stream import StreamingModel
from tailorbird.calibrate.text import (
    Windows,
    check_disjoint,
    held_out_windows,
    read_documents,
    split_held_out,
    token_windows,
)
from tailorbird.compress.blocks.flatquant import MATRICES, FlatQuant
from tailorbird.compress.blocks.method import LearningMethod
from tailorbird.compress.recipe import JOINT, STAGES, Recipe
from tailorbird.compress.rotation import rotate
from tailorbird.errors import CheckpointError, ExportError, ResourceError, SettingsError, TextError, nearest
from tailorbird.evaluate.checkpoint import HELD_OUT_TOKENS, LONGEST_HELD_OUT_WINDOW
from tailorbird.formats import gguf
from tailorbird.formats.packed import (
    CodesCoding,
    Coding,
    EntropyCoding,
    FloatCoding,
    GroupedCoding,
    IntegerCoding,
    LowRank,
    stored_bytes,
)
from tailorbird.formats.sparse import Sparse
from tailorbird.formats.transform import Transform, kronecker_transform
from tailorbird.hardware.memory import (
    available_bytes,
    return_freed_memory,
)
from tailorbird.kernels import native
from tailorbird.kernels.reference import INT8_STATIC, group_layout
from tailorbird.linear.lossless.df11 import Df11
from tailorbird.linear.outliers import sparse_of
from tailorbird.linear.quantize.billm import Billm
from tailorbird.linear.quantize.gptq import Gptq
from tailorbird.linear.quantize.higgs import Higgs
from tailorbird.model.anatomy import Anatomy, read_anatomy
from tailorbird.model.checkpoint import Checkpoint, demo_text, locate, open_checkpoint
from tailorbird.model.json_file import read_json
from tailorbird.plan.budget import Budget, format_size, read_budget
from tailorbird.plan.candidates import candidate_codings
from tailorbird.plan.places import places_of
from tailorbird.plan.planfile import MOST_COUNT
from tailorbird.plan.predict import Prediction, Workload, measuring_flops, predict
from tailorbird.plan.speed import check_architecture, with_speed
from tailorbird.progress import Progress, Silent

SEQUENCES = 128
LONGEST_WINDOW = 512
SENSITIVITY_TOKENS = 2048
#: Models beyond this size are measured on proportionally fewer tokens; each costs more, and tells more.
SENSITIVITY_PARAMETERS = 200e6
#: Enough to foresee the divergence of codings that are given, within the gate's factor.
FEWER_SENSITIVITY_TOKENS = 512


#: Stages of a recipe that learn by gradients, and what is in memory then; those that take most first.
LEARNING = {"whole": "source and result", "block": "all that the updates of a block keep"}
#: Stages that measure what errors cost; left out where there are none.
SCORING = ("statistics", "sensitivity")
#: Operations up to which sensitivity is measured, some four minutes of two CPU cores; beyond, gradients tell.
MOST_MEASURED_FLOPS = 2e13


@dataclass(frozen=True)
class TextSettings:
    """Where the texts come from, None where the user gave none, and how calibration text is cut.

    Attributes
    ----------
    calibration, evaluation : str or None
        File or directory.
    sequences, length : int
        Calibration windows at most, and tokens in each.
    """

    calibration: str | None
    evaluation: str | None
    sequences: int
    length: int


@dataclass(frozen=True)
class Texts:
    """Token windows of both texts, and what the report says of them."""

    calibration: Windows
    held_out: Windows
    held_out_texts: tuple[str, ...]
    notes: tuple[str, ...]
    self_generated: bool = False


class Beside(NamedTuple):
    """What stands beside the codes of a place; None for nothing."""

    low_rank: LowRank | None = None
    sparse: Sparse | None = None
    transform: Transform | None = None


@dataclass
class Work:
    """Everything that one `fit` or `compress` works with.

    Attributes
    ----------
    name : str
        The model as the user named it.
    codings : tuple of Coding
        Those whose errors are measured; the planner's candidates.
    sensitivity_tokens : int
        Calibration tokens on which sensitivity is measured.
    rounded_inputs : dict of str to str or None
        Place -> what its inputs are rounded to, where the user states it; None chooses the cheapest places
        for bytes.
    remarks : tuple of str
        What the user should know of choices that were made, beside what is said of the texts.
    low_rank, sparse, transforms : dict
        Linear -> its part of that kind.
    allocator : str or None
        Who chooses the codings; None where they are given.
    kept : frozenset of str
        Places that a plan leaves at 16 bits.
    stages : list of dict
        What each stage took so far.
    ledger : Ledger or None
        Where that is kept between runs.
    """

    name: str
    checkpoint: Checkpoint
    anatomy: Anatomy
    tokenizer: Any
    recipe: Recipe
    text_settings: TextSettings
    target: str | None
    seed: int
    progress: Progress
    codings: tuple[Coding, ...] = ()
    sensitivity_tokens: int = SENSITIVITY_TOKENS
    rounded_inputs: dict[str, str] | None = None
    remarks: tuple[str, ...] = ()
    low_rank: dict[str, LowRank] = field(default_factory=dict)
    sparse: dict[str, Sparse] = field(default_factory=dict)
    transforms: dict[str, Transform] = field(default_factory=dict)
    allocator: str | None = None
    kept: frozenset[str] = frozenset()
    stages: list[dict[str, Any]] = field(default_factory=list)
    ledger: Ledger | None = None

    @functools.cached_property
    def texts(self) -> Texts:
        """The texts, opened when they are first asked for."""
        return open_texts(self)

    @property
    def lossless(self) -> bool:
        """Whether the method keeps every bit, and no float of another dtype is among the codings."""
        kept = all(coding == FloatCoding(self.float_dtype) for coding in self.codings)
        return kept and isinstance(self.recipe.method, Df11)

    @property
    def float_dtype(self) -> str:
        """The 16-bit dtype in which a place is left: the source's own, or bfloat16."""
        dtype = self.checkpoint.weights.info(f"{self.anatomy.embedding}.weight").dtype
        return "float16" if dtype == torch.float16 else "bfloat16"

    @property
    def dense_bytes(self) -> int:
        """Bytes of the source with every parameter at 2 bytes."""
        return 2 * self.checkpoint.parameters

    @property
    def other_bytes(self) -> int:
        """Bytes of everything that is not a place, as it is stored."""
        places = {f"{p.name}.weight" for p in places_of(self.anatomy)}
        weights = self.checkpoint.weights
        names = [n for n in weights.names if n not in places and n not in self.anatomy.ignored]
        return sum(weights.info(name).nbytes for name in names)

    def place_shapes(self) -> dict[str, tuple[int, int]]:
        """Place -> ``(out_features, in_features)``."""
        shapes = {p.name: (p.out_features, p.in_features) for p in self.anatomy.linears()}
        for place in places_of(self.anatomy):
            if place.name not in shapes:
                shapes[place.name] = self.anatomy.end_shape(place.name)
        return shapes

    @property
    def smallest_bytes(self) -> int:
        """Tensor data of the smallest plan there is."""
        return self.other_bytes + sum(
            min(self.bytes_of(name, shape, coding) for coding in self.codings_at(name, shape[1]))
            for name, shape in self.place_shapes().items()
        )

    def _inside(self, name: str) -> bool:
        """Whether a place is a linear of the blocks."""
        return name not in (self.anatomy.embedding, self.anatomy.head)

    def beside(self, name: str, shape: tuple[int, int], coding: Coding) -> Beside:
        """What the recipe's methods put beside the codes of a place of this shape."""
        if not self._inside(name) or not isinstance(coding, CodesCoding):
            return Beside()
        low_rank, method, correction = None, self.recipe.method, self.recipe.correction
        if correction is not None:
            part = correction.low_rank
            low_rank = replace(part, rank=min(part.rank, *shape))
        return Beside(
            low_rank,
            sparse_of(method, *shape) if isinstance(coding, GroupedCoding) else None,
            self._transform(shape[1], coding),
        )

    def _transform(self, in_features: int, coding: Coding) -> Transform | None:
        """What the recipe sends so many inputs through, before codes of this coding."""
        if isinstance(self.recipe.method, Higgs):
            return self.recipe.method.transform(in_features)
        if isinstance(self.recipe.block, FlatQuant) and isinstance(coding, IntegerCoding):
            return kronecker_transform(in_features, MATRICES)
        return None

    def bytes_of(self, name: str, shape: tuple[int, int], coding: Coding) -> int:
        """Bytes of a place of this shape, with what stands beside its codes."""
        has_order = self.has_order(name, shape[1], coding)
        return stored_bytes(coding, *shape, has_order, **self.beside(name, shape, coding)._asdict())

    def has_order(self, name: str, in_features: int, coding: Coding) -> bool:
        """Whether the method stores the columns of a place in an order of its own."""
        method = self.recipe.method
        if not self._inside(name) or not isinstance(coding, CodesCoding):
            return False
        groups, _ = group_layout(in_features, coding.group_size)
        return groups > 1 and isinstance(method, Gptq | Billm) and method.reorders

    def put_beside(self, codings: dict[str, Coding]) -> None:
        """Have the linears of a plan get what correction and linear method put beside their codes."""
        shapes = self.place_shapes()
        parts = {name: self.beside(name, shapes[name], coding) for name, coding in codings.items()}
        self.low_rank = {name: part.low_rank for name, part in parts.items() if part.low_rank is not None}
        self.sparse = {name: part.sparse for name, part in parts.items() if part.sparse is not None}
        self.transforms = {name: part.transform for name, part in parts.items() if part.transform is not None}

    def codings_at(self, name: str, in_features: int) -> list[Coding]:
        """Those of `codings` that a place may have by method and `target`; a 16-bit one is among them."""
        kinds = self.recipe.method.makes if self._inside(name) else {IntegerCoding.kind}
        kinds = frozenset() if name in self.kept else kinds
        codings = [c for c in self.codings if isinstance(c, FloatCoding) or c.kind in kinds]
        if self.target == "gguf":
            return [c for c in codings if gguf.refusal(c, in_features) is None]
        if self.target == "compressed-tensors" and name == self.anatomy.embedding:
            return [c for c in codings if isinstance(c, FloatCoding)]
        return codings


def open_work(
    model: str,
    recipe: Recipe,
    *,
    calibration: str | None,
    evaluation: str | None,
    sequences: int | None,
    length: int | None,
    context: int | None,
    target: str | None,
    seed: int,
    progress: Progress | None,
) -> Work:
    """Open the source and check the settings; the texts are opened when they are first asked for.

    Raises
    ------
    UserError
        Whatever is wrong with the model or the settings.
    """
    progress = progress or Silent()
    if not 0 <= seed <= MOST_COUNT:
        raise SettingsError(f"a seed of {seed}", f"0 to {MOST_COUNT}, which plans can hold", "choose another")
    return_freed_memory()
    checkpoint = open_checkpoint(model)
    if checkpoint.compressed:
        learning = _learning(recipe, LEARNING)
        frozen = f", and {learning} can't learn by gradients through its codes" if learning else ""
        raise SettingsError(
            f"{model} is compressed already{frozen}",
            "a dense source",
            "start from the model it was made of (`plan.yaml` names it)",
        )
    anatomy = read_anatomy(checkpoint)
    if target == "gguf":
        from tailorbird.compress.export import check_gguf_architecture

        check_gguf_architecture(checkpoint)
    if target == "compressed-tensors" and any(place.transposed for place in anatomy.linears()):
        raise ExportError(
            f"{model} has linears stored as [in, out], which compressed-tensors can't hold",
            "a model made of torch's linears",
            "fit it without --target",
        )
    remarks: tuple[str, ...] = ()
    if recipe.rotation_facts is not None:
        assert recipe.rotation is not None
        rotated = rotate(checkpoint, anatomy, recipe.rotation, recipe.rotation_facts["name"])
        checkpoint, anatomy = rotated.checkpoint, rotated.anatomy
        if rotated.untied_bytes:
            remarks = (
                "the rotation unties the head from the embedding, as the final norm's weight goes into it: "
                f"{format_size(rotated.untied_bytes)} more than the source has, before they are compressed",
            )
    if "attention" in recipe.needs:
        check_attention(checkpoint, anatomy)
    tokenizer = checkpoint.tokenizer()
    if length is not None and not 1 <= length <= anatomy.context:
        raise SettingsError(
            f"calibration windows of {length} tokens",
            f"1 to {anatomy.context} tokens",
            "choose another --length",
        )
    if context is not None and not 1 <= context <= anatomy.context:
        raise SettingsError(
            f"a context of {context} tokens", f"1 to {anatomy.context} tokens", "choose another --context"
        )
    texts = TextSettings(
        calibration, evaluation, sequences or SEQUENCES, length or min(anatomy.context, LONGEST_WINDOW)
    )
    work = Work(
        model, checkpoint, anatomy, tokenizer, recipe, texts, target, seed, progress, remarks=remarks
    )  # fmt: skip
    work.codings = candidate_codings(target, work.float_dtype, recipe.method.makes)
    return work


def check_attention(checkpoint: Checkpoint, anatomy: Anatomy) -> None:
    """Refuse a model whose attention can't be looked into, by its first block.

    Raises
    ------
    SettingsError
    """
    model = StreamingModel(checkpoint, anatomy)
    attention_received(model, model.load_block(0), 0, torch.zeros(1, 2, anatomy.hidden_size))


def open_texts(work: Work) -> Texts:
    """Calibration and held-out windows: from files, from the demo's own texts, or from the model itself.

    Raises
    ------
    TextError
        Whatever is wrong with the texts.
    """
    settings, tokenizer = work.text_settings, work.tokenizer
    calibration, evaluation = settings.calibration, settings.evaluation
    notes: list[str] = []
    if calibration is None and work.checkpoint.directory == locate("demo"):
        calibration = str(demo_text("calibration"))
        evaluation = evaluation or str(demo_text("held_out"))
        notes.append("text: the demo's own calibration and held-out modules of Python's standard library")
    if calibration is None:
        return _generated_texts(work)
    documents = read_documents(Path(calibration), tokenizer)
    if evaluation is None:
        documents, held_out = split_held_out(documents)
        notes.append(
            f"held-out text: {len(held_out)} of {len(documents) + len(held_out)} documents of {calibration}"
        )
    else:
        held_out = read_documents(Path(evaluation), tokenizer)
        check_disjoint(documents, held_out)
    cal = token_windows(documents, tokenizer, settings.length, settings.sequences, work.seed)
    if cal.ids.shape[0] < settings.sequences:
        notes.append(
            f"calibration text holds {cal.ids.shape[0]} windows of {settings.length} tokens, fewer than "
            f"{settings.sequences}"
        )
    ev = held_out_windows(held_out, tokenizer, _held_out_length(work), HELD_OUT_TOKENS)
    notes += [*cal.warnings, *ev.warnings]
    return Texts(cal, ev, tuple(d.text for d in held_out[:64]), tuple(notes))


def _held_out_length(work: Work) -> int:
    """Tokens of a held-out window."""
    return min(work.anatomy.context, LONGEST_HELD_OUT_WINDOW)


def _read_held_out(work: Work, evaluation: str) -> tuple[list[Document], Windows]:
    """Documents and windows of held-out text that the user gave."""
    documents = read_documents(Path(evaluation), work.tokenizer)
    return documents, held_out_windows(documents, work.tokenizer, _held_out_length(work), HELD_OUT_TOKENS)


def _sampled_windows(length: int) -> int:
    """Held-out windows that are sampled where the user gave no text."""
    return max(1, min(32, HELD_OUT_TOKENS // length))


def _text_shapes(work: Work) -> tuple[tuple[int, int], tuple[int, int]]:
    """``(windows, length)`` of calibration and held-out text; nothing is sampled to know them."""
    settings = work.text_settings
    yet_to_sample = settings.calibration is None and work.checkpoint.directory != locate("demo")
    if yet_to_sample and "texts" not in vars(work):
        length = _held_out_length(work)
        held_out = _sampled_windows(length), length
        if settings.evaluation is not None:
            held_out = _shape(_read_held_out(work, settings.evaluation)[1].ids)
        return (settings.sequences, settings.length), held_out
    return _shape(work.texts.calibration.ids), _shape(work.texts.held_out.ids)


def _generated_texts(work: Work) -> Texts:
    """Text sampled from the model itself, where the user gave none to calibrate with."""
    from tailorbird.model.load import load
    from tailorbird.run.generate import sample_text

    settings, tokenizer, window = work.text_settings, work.tokenizer, _held_out_length(work)
    weight_bytes = work.checkpoint.weights.total_bytes
    if 2 * weight_bytes > available_bytes():
        raise TextError(
            f"no calibration text, and the model ({format_size(weight_bytes)}) is too "
            f"large to sample text from with {format_size(available_bytes())} of memory free",
            "text to calibrate with",
            "give --calibration FILE",
        )
    ev = None
    if settings.evaluation is not None:
        held_out, ev = _read_held_out(work, settings.evaluation)
        held_out_texts = tuple(d.text for d in held_out[:64])
    model = load(str(work.checkpoint.directory))
    work.progress.stage("sample text", 2 if ev is None else 1)
    cal_ids = sample_text(model, tokenizer, settings.sequences, settings.length, work.seed)
    work.progress.advance()
    notes = ["calibration text was sampled from the model itself; give --calibration for text like yours"]
    cal = Windows.from_ids(cal_ids, "sampled from the model")
    if ev is not None:
        return Texts(cal, ev, held_out_texts, (*notes, *ev.warnings))
    count = _sampled_windows(window)
    ev = Windows.from_ids(
        sample_text(model, tokenizer, count, window, work.seed + 1), "sampled from the model"
    )
    work.progress.advance()
    notes.append("quality is measured on self-generated text")
    decoded = tuple(tokenizer.decode(row) for row in ev.ids[:8])
    return Texts(cal, ev, decoded, tuple(notes), self_generated=True)


def keep(work: Work, patterns: Sequence[str]) -> None:
    """Have plans leave at 16 bits all places that a pattern fits.

    Parameters
    ----------
    patterns : sequence of str
        Names of places, with ``*`` for any letters; ``embedding`` and ``head`` whatever they are called. A
        tied pair is one place, which either word names.

    Raises
    ------
    SettingsError
        A pattern that fits no place.
    """
    ends = {"embedding": work.anatomy.embedding, "head": work.anatomy.head}
    if work.anatomy.tied:
        ends["head"] = work.anatomy.embedding
    places = work.place_shapes()
    for pattern in patterns:
        fitting = fnmatch.filter(places, ends.get(pattern, pattern))
        if not fitting:
            raise SettingsError(
                f"--keep {pattern}, which fits no place of {work.name}",
                "the name of a place or a pattern such as *.down_proj; embedding or head",
                nearest(pattern, (*ends, *places)),
            )
        work.kept |= frozenset(fitting)


def budget_of(
    work: Work,
    memory: str | None,
    context: int | None,
    concurrency: int | None,
    min_speed: str | None = None,
    max_latency: str | None = None,
    max_kl: float | None = None,
) -> Budget:
    """The budget in bytes and seconds; refused where it can't be met or is met already.

    Without `memory`, which only a budget of speed or quality goes without, all that is smaller than the
    source will do. `max_kl` is given where it is the budget.
    """
    if memory is None:
        if max_kl is not None and max_kl <= 0:
            raise SettingsError(
                f"--max-kl {max_kl:g} and no other budget",
                "more than 0 nats per token, which nothing smaller than the source keeps",
                "allow some, for example --max-kl 0.01, or give --memory",
            )
        if min_speed is None and max_latency is None and max_kl is None:
            raise SettingsError(
                "no budget",
                "--memory, --min-speed, --max-latency or --max-kl",
                "say what the model must fit into, for example --memory 30%",
            )
        cached = 0 if context is None else work.anatomy.kv_bytes(context, concurrency or 1)
        memory = str(work.dense_bytes + cached - 1)
    budget = read_budget(
        memory,
        dense_bytes=work.dense_bytes,
        parameters=work.checkpoint.parameters,
        smallest_bytes=work.smallest_bytes,
        kv_bytes=work.anatomy.kv_bytes,
        longest_context=work.anatomy.context,
        context=context,
        concurrency=concurrency,
    )
    if max_kl is not None:
        budget = replace(budget, max_kl=max_kl, text=f"KL {max_kl:g}")
    budget = with_speed(budget, min_speed, max_latency)
    if budget.step_seconds is not None:
        check_architecture(work.anatomy)
    return budget


def sensitivity_ids(work: Work) -> torch.Tensor:
    """The calibration windows on which sensitivity is measured."""
    ids = work.texts.calibration.ids
    return ids[: _sensitivity_windows(work, ids.shape[1])]


def _sensitivity_windows(work: Work, length: int) -> int:
    """How many calibration windows of `length` tokens that is, where there are as many.

    Gradients take no longer for many places than for few, and say too little of one window.
    """
    return max(1, SENSITIVITY_TOKENS // length) if by_gradients(work) else _measured_windows(work, length)


def _measured_windows(work: Work, length: int) -> int:
    """How many windows it is where every place is measured."""
    size = work.checkpoint.parameters / SENSITIVITY_PARAMETERS
    tokens = min(work.sensitivity_tokens, max(FEWER_SENSITIVITY_TOKENS, work.sensitivity_tokens / size))
    return max(1, int(tokens) // length)


def by_gradients(work: Work) -> bool:
    """Whether sensitivity comes from gradients, since measuring it at every place would take too long."""
    (windows, length), _ = _text_shapes(work)
    tokens = min(windows, _measured_windows(work, length)) * length
    return measuring_flops(work.anatomy, tokens) > MOST_MEASURED_FLOPS


def narrow(work: Work, codings: Iterable[Coding]) -> None:
    """Measure for `codings` only: they are chosen already, and want a prediction, not a comparison.

    Those that change no weight cost nothing, which needn't be measured.
    """
    rounding = (coding for coding in codings if not isinstance(coding, EntropyCoding))
    work.codings = tuple(dict.fromkeys((*rounding, FloatCoding(work.float_dtype))))
    work.sensitivity_tokens = FEWER_SENSITIVITY_TOKENS


def as_stored(work: Work, name: str, coding: Coding) -> bool:
    """Whether `coding` is just what the source stores there."""
    stored = work.checkpoint.weights.info(f"{name}.weight").dtype
    return isinstance(coding, FloatCoding) and getattr(torch, coding.dtype) == stored


def foresee(work: Work, output: Path) -> Prediction:
    """Memory, disk and time per stage, and whether this machine has them; samples no text.

    Where memory is short and would do without the gradients that methods learn by, the shortage names these.
    """
    prediction = _foreseen(work, output)
    if prediction.peak_rss_bytes <= prediction.available_bytes:
        return prediction
    left_out: dict[str, Any] = {}
    for stage in (stage for stage in LEARNING if getattr(work.recipe, stage) is not None):
        left_out[stage] = None
        without = copy.copy(work)
        without.recipe = replace(work.recipe, **left_out)
        rest = _foreseen(without, output)
        if rest.peak_rss_bytes <= rest.available_bytes:
            learning, held = _learning(work.recipe, left_out), LEARNING[next(iter(left_out))]
            need, free = format_size(prediction.peak_rss_bytes), format_size(prediction.available_bytes)
            return replace(
                prediction,
                shortage=f"{learning}, which needs gradients with {held} in memory: {need}; {free} are free",
                advice=f"leave out {learning}, without which the model streams through in "
                f"{format_size(rest.peak_rss_bytes)}, or use a machine with more memory",
            )
    return prediction


def _learning(recipe: Recipe, stages: Iterable[str]) -> str:
    """Names of the methods of these stages, for messages."""
    names = [name for name in recipe.name.split(JOINT) if any(name in STAGES[stage] for stage in stages)]
    return " and ".join(f"`{name}`" for name in names)


def _foreseen(work: Work, output: Path) -> Prediction:
    """The same, where nobody is at fault."""
    calibration, held_out = _text_shapes(work)
    windows, length = calibration
    block = work.recipe.block
    prediction = predict(
        Workload(
            anatomy=work.anatomy,
            weights=work.checkpoint.weights,
            calibration=calibration,
            held_out=held_out,
            sensitivity=(min(windows, _sensitivity_windows(work, length)), length),
            gradients=by_gradients(work),
            needs=work.recipe.needs,
            corrects=work.recipe.correction is not None,
            block_updates=_updates(block),
            whole_updates=_updates(work.recipe.whole),
            whole_bytes=0 if work.recipe.whole is None else work.recipe.whole.bytes_per_weight,
            codings=work.codings,
            output=output,
            packed_products=native.available() and work.rounded_inputs != {},
            together=1 if block is None else block.window,
            again=0 if block is None else block.overlap,
            static_inputs=frozenset(
                name for name, to in (work.rounded_inputs or {}).items() if to == INT8_STATIC
            ),
        )
    )
    if not work.lossless:
        return prediction
    return replace(prediction, stages=tuple(s for s in prediction.stages if s.name not in SCORING))


def _updates(method: LearningMethod | None) -> tuple[int, int]:
    """How often a method learns, and from how many windows at a time."""
    return (0, 0) if method is None else (method.steps, method.batch)


def _shape(ids: torch.Tensor) -> tuple[int, int]:
    """``(windows, length)`` of token ids."""
    windows, length = ids.shape
    return windows, length


def check_windows(work: Work) -> None:
    """Refuse to learn a whole model from less text than it takes to keep some back.

    Raises
    ------
    TextError
    """
    (windows, _), _ = _text_shapes(work)
    if work.recipe.whole is not None and windows < 2:
        raise TextError(
            "one window of calibration text, of which learning the whole model keeps one back",
            "two windows or more",
            "give more text, or a higher --sequences",
        )


def few_tokens(work: Work) -> tuple[str, ...]:
    """What to say where the calibration text has fewer tokens than a Gram matrix has columns; else nothing.

    With so few its rank is theirs at most, and error feedback divides by what damping adds.
    """
    method = work.recipe.method
    damping = Gptq.damping if isinstance(method, Higgs) else getattr(method, "damping", None)
    if damping is None or "gram" not in method.needs:
        return ()
    (windows, length), _ = _text_shapes(work)
    widest = max(work.anatomy.linears(), key=lambda place: place.in_features)
    tokens, needed = windows * length, widest.in_features
    if tokens >= needed:
        return ()
    return (
        f"calibration text has {tokens} tokens, and the Gram matrix of the {needed} inputs of "
        f"`{widest.name}` needs {needed} at least: damping holds the rest, {damping:g} of the mean of its "
        "diagonal",
    )


def remark_on_few_tokens(work: Work) -> None:
    """Have the log and the result say so."""
    for remark in few_tokens(work):
        work.progress.note(remark)
        work.remarks = (*work.remarks, remark)


def check_resources(prediction: Prediction) -> None:
    """Stop before work starts where memory or disk can't suffice."""
    if prediction.advice is not None:
        raise ResourceError(prediction.shortage or "", "a machine that holds every stage", prediction.advice)


def record_of(work: Work, what: dict[str, Any]) -> dict[str, Any]:
    """Everything that decides the bytes of the result."""
    return {
        **_record_before_texts(work, what),
        "calibration": work.texts.calibration.fingerprint,
        "evaluation": work.texts.held_out.fingerprint,
    }


def _record_before_texts(work: Work, what: dict[str, Any]) -> dict[str, Any]:
    """As much of the record as is known without the texts."""
    import transformers

    return {
        "source": work.checkpoint.fingerprint,
        "method": work.recipe.describe(),
        "target": work.target,
        "seed": work.seed,
        "threads": torch.get_num_threads(),
        "versions": {
            "tailorbird": tailorbird.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        **what,
    }


def check_unfinished(work: Work, output: Path, what: dict[str, Any], resume: bool) -> bool:
    """Refuse early what `Job` would refuse with `record_of(work, what)`, whatever the texts are.

    Returns
    -------
    bool
        Whether there is unfinished work.

    Raises
    ------
    ResumeError, ResourceError
        As `Job`.
    """
    partial = output.with_name(f"{output.name}.partial")
    if not resume and not partial.exists():
        return False
    try:
        saved = read_json(partial / WORK / "record.json")
    except CheckpointError:
        saved = {}  # `Job` says what is wrong with it
    texts = {key: saved.get(key) for key in ("calibration", "evaluation")}
    Job(output, _record_before_texts(work, what) | texts, resume).close()
    return True


def machine() -> dict[str, Any]:
    """What the result was made on."""
    from tailorbird.hardware.probe import processor_name, usable_cores

    return {
        "processor": processor_name(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
