"""Speed as part of the budget: what a user asks of decoding, and what a plan is predicted to take.

Linears that run in compiled blocks take a time that depends on their coding (`hardware.cost`), so a plan has
seconds as it has bytes, and the allocator keeps both below what is allowed. To measure each operator on the
device itself and to choose widths by a program over what was measured is the idea of OHQ (Huang et al. 2023,
https://arxiv.org/abs/2309.01945); what an error costs is measured here as for every other plan, not by masks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from tailorbird.errors import BudgetError, SettingsError
from tailorbird.evaluate.kernel_times import kernel_times, known_kernel_times, timing_seconds
from tailorbird.evaluate.stand_ins import Kernel
from tailorbird.formats.packed import Coding, FloatCoding, stored_bytes
from tailorbird.hardware.cost import (
    BlockShape,
    KernelTimes,
    ModelShape,
    ProductShape,
    decode_step_seconds,
)
from tailorbird.model.anatomy import BYTES_PER_CACHED_VALUE, Anatomy, BlockAnatomy
from tailorbird.plan.allocate import Allocation, PlaceOptions, allocate
from tailorbird.plan.allocate_timed import allocate_timed
from tailorbird.plan.budget import Budget
from tailorbird.plan.scores import PlaceScore
from tailorbird.progress import Progress
from tailorbird.run.parts import ARCHITECTURES

#: Keys that a query meets while decoding where no context is stated.
CONTEXT = 128
#: Plans that are tried until one is fast enough with the inputs that it rounds.
TRIES = 6

_NUMBER = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([a-z/]*)\s*", re.ASCII | re.IGNORECASE)
_SPEED_UNITS = ("", "tok/s", "tokens/s")
_TIME_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}


def with_speed(budget: Budget, min_speed: str | None, max_latency: str | None) -> Budget:
    """`budget` with what is asked of a decoding step.

    Parameters
    ----------
    min_speed : str, optional
        ``30tok/s``: tokens per second of all concurrent sequences together.
    max_latency : str, optional
        ``40ms``: from one token of a sequence to the next.

    Raises
    ------
    SettingsError
        For what can't be read, or isn't positive.
    """
    allowed, texts = [], []
    if min_speed is not None:
        number, unit = _read("--min-speed", min_speed, "tokens per second such as `30tok/s`")
        if unit not in _SPEED_UNITS:
            raise SettingsError(
                f"--min-speed {min_speed}", "tokens per second such as `30tok/s`", "write it like this"
            )
        allowed.append(budget.concurrency / number)
        texts.append(f"{number:g} tok/s")
    if max_latency is not None:
        number, unit = _read("--max-latency", max_latency, "a time such as `40ms` or `0.1s`")
        if unit not in _TIME_UNITS:
            raise SettingsError(
                f"--max-latency {max_latency}",
                "a time such as `40ms` or `0.1s`",
                "write it like one of these",
            )
        allowed.append(number * _TIME_UNITS[unit])
        texts.append(f"{number:g} {unit} per token")
    if not allowed:
        return budget
    return replace(budget, step_seconds=min(allowed), speed_text=" and ".join(texts))


def _read(flag: str, text: str, expected: str) -> tuple[float, str]:
    match = _NUMBER.fullmatch(text) if len(text) <= 40 else None
    if match is None or not float(match[1]) > 0:
        raise SettingsError(f"{flag} {text[:40]}", expected, "give a positive number with its unit")
    return float(match[1]), match[2].lower()


def check_architecture(anatomy: Anatomy) -> None:
    """Refuse to plan the speed of a model that doesn't run in compiled blocks.

    Raises
    ------
    SettingsError
        With the names of those that do.
    """
    if anatomy.architecture not in ARCHITECTURES:
        raise SettingsError(
            f"a speed asked of a model of type `{anatomy.architecture}`",
            "a type that runs in compiled blocks: " + ", ".join(sorted(ARCHITECTURES)),
            "leave out --min-speed and --max-latency; `tailorbird speed` measures what comes out",
        )


def model_shape(
    anatomy: Anatomy, codings: Mapping[str, Coding], rounded: Collection[str], left: FloatCoding
) -> ModelShape:
    """A planned model as the cost model knows it.

    Parameters
    ----------
    codings : mapping
        Place -> coding; a place that isn't named stays `left`.
    rounded : collection of str
        Places whose inputs are rounded to bytes.
    """

    def product(place: str, shape: tuple[int, int]) -> ProductShape:
        coding = codings.get(place, left)
        kernel = Kernel(coding, place in rounded)
        return ProductShape(kernel.name, shape[0] * shape[1], stored_bytes(coding, *shape))

    def block(one: BlockAnatomy) -> BlockShape:
        products = tuple(product(p.name, (p.out_features, p.in_features)) for p in one.linears)
        attended = next((p.in_features for p in one.linears if p.role == "o"), 0)
        inner = next((p.in_features for p in one.linears if p.role in ("down", "fc2")), 0)
        cached = one.cached_width * BYTES_PER_CACHED_VALUE
        return BlockShape(products, anatomy.hidden_size, attended, inner, cached, one.window)

    embedding = codings.get(anatomy.embedding, left)
    return ModelShape(
        tuple(block(one) for one in anatomy.blocks),
        product(anatomy.embedding if anatomy.tied else anatomy.head, anatomy.end_shape(anatomy.head)),
        anatomy.vocab_size,
        0 if isinstance(embedding, FloatCoding) else anatomy.embedding_width,
    )


@dataclass(frozen=True)
class SpeedPlanner:
    """Plans that are predicted to be fast enough.

    Attributes
    ----------
    anatomy : Anatomy
    budget : Budget
        With `step_seconds`.
    left : FloatCoding
        Of a place that stays as it is.
    exact : bool
        Whether no inputs may be rounded to bytes.
    progress : Progress
        Told of kernels that are timed first.
    """

    family: ClassVar[str] = "plan"
    kind: ClassVar[str] = "allocator"
    paper: ClassVar[str] = "Huang et al. 2023, arXiv:2309.01945"
    requirements: ClassVar[str] = "--min-speed or --max-latency"

    anatomy: Anatomy
    budget: Budget
    left: FloatCoding
    exact: bool
    progress: Progress

    def step_seconds(self, codings: Mapping[str, Coding], rounded: Collection[str]) -> float:
        """Predicted seconds of a decoding step of a plan."""
        kernels = {Kernel(coding, name in rounded) for name, coding in codings.items()}
        shape = model_shape(self.anatomy, codings, rounded, self.left)
        return self._step(shape, kernel_times({*kernels, Kernel(self.left)}, shape, self.progress))

    def _step(self, shape: ModelShape, times: KernelTimes) -> float:
        return decode_step_seconds(shape, times, self.budget.concurrency, self.budget.context or CONTEXT)

    def allocate(
        self,
        places: Callable[[Callable[[PlaceScore, Coding], float]], list[PlaceOptions]],
        capacity_bytes: int,
        rounded_of: Callable[[Allocation], Collection[str]],
    ) -> Allocation:
        """The plan with the least loss within bytes and seconds.

        Parameters
        ----------
        places : callable
            Options of all places, given the seconds that a coding takes at a place.
        capacity_bytes : int
            As in `allocate.allocate`.
        rounded_of : callable
            The places of a plan whose inputs are rounded; the rest takes a slower kernel.

        Raises
        ------
        BudgetError
            No plan is both small and fast enough.
        """
        allowed = self.budget.step_seconds
        assert allowed is not None  # the caller asks for speed
        refused: set[str] = set()
        limit = allowed
        found = 0.0
        for _ in range(TRIES):
            offered = self._offered(places, refused)
            times = kernel_times({*offered, Kernel(self.left)}, self._nothing, self.progress)
            options, around = self._options(places, refused, times)
            plan = allocate_timed(options, capacity_bytes, limit - around)
            if plan.seconds > limit - around:
                raise self._too_slow(plan.seconds + around)
            codings = {name: option.coding for name, option in plan.choices.items()}
            rounded = rounded_of(plan)
            found = self.step_seconds(codings, rounded)
            if found <= allowed:
                return plan
            slower = (
                {n for n, c in codings.items() if not isinstance(c, FloatCoding)} - set(rounded) - refused
            )
            refused |= slower
            if not slower:
                limit *= allowed / found
        raise self._too_slow(found)

    def fastest(
        self,
        places: Callable[[Callable[[PlaceScore, Coding], float]], list[PlaceOptions]],
        capacity_bytes: int,
    ) -> float | None:
        """Seconds of a decoding step of the fastest plan within the bytes, whatever it loses.

        Inputs are rounded wherever they may be. None where kernels aren't timed yet.

        Parameters
        ----------
        places, capacity_bytes
            As in `allocate`.
        """
        times = known_kernel_times({*self._offered(places, ()), Kernel(self.left)}, self._nothing)
        if times is None:
            return None
        plan, around = self._fastest(places, capacity_bytes, times)
        return plan.seconds + around

    def check_reach(
        self,
        places: Callable[[Callable[[PlaceScore, Coding], float]], list[PlaceOptions]],
        capacity_bytes: int,
        patience: float,
    ) -> None:
        """Refuse what not even the fastest plan reaches, where that can be told within `patience` seconds.

        Kernels that aren't timed yet are timed where that takes no longer: `allocate` needs them anyway.

        Parameters
        ----------
        places, capacity_bytes
            As in `allocate`.

        Raises
        ------
        BudgetError
            No plan is both small and fast enough.
        """
        kernels = {*self._offered(places, ()), Kernel(self.left)}
        if timing_seconds(kernels, self._nothing) > patience:
            return
        times = kernel_times(kernels, self._nothing, self.progress)
        plan, around = self._fastest(places, capacity_bytes, times)
        allowed = self.budget.step_seconds
        assert allowed is not None  # the caller asks for speed
        if (1 - plan.gap) * plan.seconds + around > allowed:
            raise self._too_slow(plan.seconds + around)

    def _fastest(
        self,
        places: Callable[[Callable[[PlaceScore, Coding], float]], list[PlaceOptions]],
        capacity_bytes: int,
        times: KernelTimes,
    ) -> tuple[Allocation, float]:
        """The fastest plan, and what a step takes beside it."""
        options, around = self._options(places, (), times)
        taken = [
            replace(place, options=tuple(replace(one, loss=one.seconds) for one in place.options))
            for place in options
        ]
        return allocate(taken, capacity_bytes), around

    @property
    def _nothing(self) -> ModelShape:
        """The model with all places left as they are."""
        return model_shape(self.anatomy, {}, (), self.left)

    def _offered(
        self,
        places: Callable[[Callable[[PlaceScore, Coding], float]], list[PlaceOptions]],
        refused: Collection[str],
    ) -> set[Kernel]:
        """What may run somewhere."""
        return {
            Kernel(option.coding, self._rounds(place.name, option.coding, refused))
            for place in places(lambda *_: 0.0)
            for option in place.options
        }

    def _options(
        self,
        places: Callable[[Callable[[PlaceScore, Coding], float]], list[PlaceOptions]],
        refused: Collection[str],
        times: KernelTimes,
    ) -> tuple[list[PlaceOptions], float]:
        """Options with their seconds, and what a step takes beside them."""
        batch, nothing = self.budget.concurrency, self._nothing
        streamed = times.streamed_share(self.budget.weight_bytes)
        idle = replace(nothing.head, weights=0)
        around = replace(
            nothing,
            head=idle,
            blocks=tuple(
                replace(block, products=tuple(replace(p, weights=0) for p in block.products))
                for block in nothing.blocks
            ),
        )

        def seconds(place: PlaceScore, coding: Coding) -> float:
            if place.role == "embedding":  # looked up, not multiplied
                return 0.0
            kernel = Kernel(coding, self._rounds(place.name, coding, refused))
            rows, columns = place.shape
            product = ProductShape(kernel.name, rows * columns, stored_bytes(coding, rows, columns))
            rate = times.head_seconds if place.role in ("head", "tied") else times.product_seconds
            return rate(product, batch, streamed)

        return places(seconds), self._step(around, times)

    def _rounds(self, name: str, coding: Coding, refused: Collection[str]) -> bool:
        return not (self.exact or name in refused or isinstance(coding, FloatCoding))

    def _too_slow(self, seconds: float) -> BudgetError:
        budget = self.budget
        assert budget.step_seconds is not None
        return BudgetError(
            f"{budget.speed_text}, {1e3 * budget.step_seconds:.3g} ms for a step of {budget.concurrency} "
            f"sequence{'s' if budget.concurrency > 1 else ''}",
            f"at least {1e3 * seconds:.3g} ms ({budget.concurrency / seconds:.3g} tok/s), predicted for the "
            "fastest plan there is within the memory",
            "ask for less speed, fewer --concurrency or a shorter --context",
        )
