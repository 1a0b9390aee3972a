"""The loop: steps, looks at the held-out loss, and states on disk from which it goes on bit for bit."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tailorbird.adapt.best import Best
from tailorbird.adapt.checkpoints import Checkpoints, State
from tailorbird.adapt.logs import TensorBoard
from tailorbird.adapt.methods.adapter import Attached
from tailorbird.adapt.optimizers.batch_growth import BatchGrowth
from tailorbird.adapt.optimizers.packing import pack_state, unpack_state
from tailorbird.adapt.rows import Row
from tailorbird.adapt.score import Scorer
from tailorbird.adapt.step import Diverged, Step, held_out_loss
from tailorbird.hardware.memory import resident_bytes, trim_heap
from tailorbird.progress import Progress

#: Examples that one message names.
_MOST_SHOWN = 3


@dataclass
class History:
    """What a tuning has been through; lists are of JSON types.

    Attributes
    ----------
    steps : list of dict
        ``step loss norm rate tokens seconds resident_bytes`` of each.
    looks : list of dict
        ``step loss`` of each look at the held-out examples.
    best : int or None
        Step with the least held-out loss.
    scores : list of dict
        ``step right of`` before tuning and of what is kept, where a score is taken.
    loss_before_start : float or None
        The held-out loss of the model alone, where the method began with a start of its own.
    """

    steps: list[dict[str, Any]] = field(default_factory=list)
    looks: list[dict[str, Any]] = field(default_factory=list)
    best: int | None = None
    scores: list[dict[str, Any]] = field(default_factory=list)
    loss_before_start: float | None = None

    def score(self) -> dict[str, int] | None:
        """``before after of``: completions that were right, and how many were asked for; None without any."""
        if not self.scores:
            return None
        first, last = self.scores[0], self.scores[-1]
        return {"before": first["right"], "after": last["right"], "of": first["of"]}

    @property
    def loss_before(self) -> float | None:
        """The held-out loss of the model before anything was learned; None where nothing is held out."""
        if self.loss_before_start is not None:
            return self.loss_before_start
        return float(self.looks[0]["loss"]) if self.looks else None

    @property
    def since_best(self) -> int:
        """Looks after the best one."""
        return sum(look["step"] > (self.best or 0) for look in self.looks)


@dataclass(frozen=True)
class Pace:
    """When things happen, in steps.

    Attributes
    ----------
    steps : int
        Until the end.
    evaluate_every, save_every : int
    patience : int or None
    """

    steps: int
    evaluate_every: int
    save_every: int
    patience: int | None


class Loop:
    """A tuning under way.

    Parameters
    ----------
    step : Step
    rows_of : callable
        Rows of a step by its number.
    held_out : list of Row
        May be empty.
    factor : callable
        Share of the rate, by the number of a step.
    pace : Pace
    checkpoints : Checkpoints
    progress : Progress
    board : TensorBoard, optional
        Is told of each step and look.
    growth : BatchGrowth, optional
        On which `rows_of` depends; states on disk hold it.
    scorer : Scorer, optional
    start : callable, optional
        Changes what is learned before the first step, unless a state on disk holds what came of it.
    most_resident : int, optional
        Bytes from which on the heap gives back, between steps, what it keeps of freed tensors.
    shown : callable, optional
        How the text of a row begins, to name examples whose loss isn't finite.
    """

    def __init__(
        self,
        step: Step,
        rows_of: Callable[[int], list[Row]],
        held_out: list[Row],
        factor: Callable[[int], float],
        pace: Pace,
        checkpoints: Checkpoints,
        progress: Progress,
        board: TensorBoard | None = None,
        growth: BatchGrowth | None = None,
        scorer: Scorer | None = None,
        start: Callable[[], None] | None = None,
        most_resident: int | None = None,
        shown: Callable[[Row], str] | None = None,
    ) -> None:
        self.most_resident, self.shown = most_resident, shown
        self.board, self.growth, self.scorer, self.start = board, growth, scorer, start
        self.step, self.rows_of, self.held_out, self.factor = step, rows_of, held_out, factor
        self.pace, self.checkpoints, self.progress = pace, checkpoints, progress
        self.history = History()
        self.done = 0
        # A second copy of all weights would double what they take.
        self._best = Best(checkpoints.directory if step.method.changed() is not None else None)

    @property
    def method(self) -> Attached:
        """What is learned."""
        return self.step.method

    def run(self) -> History:
        """Go on from the last state on disk, or from the start, to the end; what is learned is the best.

        Raises
        ------
        Diverged
            As `Step.finish`; the last state stays.
        KeyboardInterrupt
            After Ctrl-C or SIGTERM, once the state of the last whole step is on disk.
        """
        resumed = self._resume()
        if not resumed:
            self._score(0)
            self._start()
            self._look()
        self.progress.stage("tune", self.pace.steps)
        self.progress.advance(self.done)
        with _stopping() as stopped:
            while self.done < self.pace.steps and not self._patience_is_over():
                self._take_step()
                if self.done % self.pace.evaluate_every == 0 or self.done == self.pace.steps:
                    self._look()
                if stopped():
                    self._save()
                    raise KeyboardInterrupt
                if self.done % self.pace.save_every == 0 or self.done == self.pace.steps:
                    self._save()
        if self.board is not None:
            self.board.close()
        self._best.restore(self.method, self.done)
        self._score(self.done if self.history.best is None else self.history.best)
        return self.history

    def _start(self) -> None:
        if self.start is None:
            return
        if self.held_out:
            self.history.loss_before_start = self._held_out_loss()
        self.start()

    def _take_step(self) -> None:
        began = time.perf_counter()
        factor = self.factor(self.done)
        rows = self.rows_of(self.done)
        self.step.begin(rows, self.done, self.pace.steps, factor)
        while self.step.advance():
            pass
        try:
            facts = self.step.finish()
        except Diverged as error:
            raise Diverged(f"{error.given}; {self._unsound(rows)}", error.expected, error.remedy) from None
        self.done += 1
        resident = resident_bytes()
        if self.most_resident is not None and resident > self.most_resident:
            trim_heap()
        seconds = time.perf_counter() - began
        self.history.steps.append(
            {"step": self.done, "rate": factor, "seconds": seconds, "resident_bytes": resident}
            | {"loss": facts.loss, "norm": facts.norm, "tokens": facts.tokens}
        )
        if self.board is not None:
            self.board.step(self.history.steps[-1])
        self.progress.advance(note=f"loss {facts.loss:.3f}")

    def _unsound(self, rows: list[Row]) -> str:
        """Of how many of a step's examples the loss isn't finite, each read by itself, and how they begin."""
        alone = [example for row in rows for example in row.cut(1)]
        found = [one for one in alone if not math.isfinite(self._loss([one]))]
        begun = [] if self.shown is None else [f"`{self.shown(one)}`" for one in found[:_MOST_SHOWN]]
        return f"that of {len(found)} of its {len(alone)} examples isn't finite" + (
            f", which begin with {', '.join(begun)}" if begun else ""
        )

    def _look(self) -> None:
        """Measure the held-out loss and remember what was learned where it's the least so far."""
        if not self.held_out:
            return
        loss = self._held_out_loss()
        looks = self.history.looks
        looks.append({"step": self.done, "loss": loss})
        if self.board is not None:
            self.board.look(looks[-1])
        if loss <= min(look["loss"] for look in looks):
            self.history.best = self.done
            self._best.keep(self.done, self.method.state_dict(), self.method.extra())

    def _score(self, step: int) -> None:
        """Score what was learned after so many steps, which is in place."""
        if self.scorer is not None:
            asked = len(self.scorer.questions)
            self.progress.stage("score", 0)
            self.history.scores.append({"step": step, "right": self.scorer.right(), "of": asked})

    def _held_out_loss(self) -> float:
        loss = self._loss(self.held_out)
        if not math.isfinite(loss):
            raise Diverged(
                f"the held-out loss after step {self.done} is {loss}",
                "a finite number",
                "set --rate lower, or look at the held-out examples",
            )
        return loss

    def _loss(self, rows: list[Row]) -> float:
        return held_out_loss(self.step.trunk, rows, self.step.most_tokens)

    def _patience_is_over(self) -> bool:
        return self.pace.patience is not None and self.history.since_best >= self.pace.patience

    def _save(self) -> None:
        tensors = {f"method.{name}": tensor for name, tensor in self.method.state_dict().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self._best.to_save().items()}
        optimizer, numbers = pack_state(self.step.optimizer)
        facts: dict[str, Any] = {"optimizer": numbers}
        tensors |= {f"optimizer.{name}": tensor for name, tensor in optimizer.items()}
        history = self.history
        facts |= {
            "method": self.method.extra(),
            "best_method": self._best.extra,
            "steps": history.steps,
            "looks": history.looks,
            "scores": history.scores,
            "loss_before_start": history.loss_before_start,
        }
        if self.growth is not None:
            facts["growth"] = self.growth.facts()
        state = State(self.done, tensors, facts | {"best": history.best})
        self.checkpoints.save(state, self.step.optimizer.leave)

    def _resume(self) -> bool:
        state = self.checkpoints.latest()
        if state is None:
            return False
        facts = state.facts
        self.method.take_extra(facts["method"])
        self.step.follow()
        self.method.load_state_dict(dict(state.under("method.")))
        unpack_state(self.step.optimizer, state.under("optimizer."), facts["optimizer"])
        if self.growth is not None:
            self.growth.take_facts(facts["growth"])
        self._best.resume(facts["best"], dict(state.under("best.")), facts["best_method"])
        self.history = History(
            facts["steps"], facts["looks"], facts["best"], facts["scores"], facts["loss_before_start"]
        )
        self.done = state.step
        self.progress.note(f"resumed after step {state.step}")
        return True


@contextmanager
def _stopping() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C or SIGTERM came since; a second one interrupts at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def ask(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
