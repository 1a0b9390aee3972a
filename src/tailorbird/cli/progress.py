"""Live progress on standard error: stage, bar, steps, time left, and what the last step gave.

On a terminal one bar per stage is redrawn in place; elsewhere (a log file, a CI run) each stage leaves one
line when it begins and one when it ends, and at most one line every ten seconds between.
"""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from tailorbird.report.table import duration_text

_LOG_INTERVAL = 10.0


class _TimeLeft(ProgressColumn):
    """How long the stage will still take, once that can be told."""

    def render(self, task: Task) -> Text:
        if task.finished or task.time_remaining is None:
            return Text("")
        return Text(f"{duration_text(task.time_remaining)} left", style="cyan")


class TerminalProgress:
    """Draws what a long job tells (the protocol of `tailorbird.progress`).

    Parameters
    ----------
    console : rich.console.Console
        Where to draw; the one of standard error.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.name = ""
        self.total = self.finished = 0
        self.started = self.logged = 0.0
        self.task: TaskID | None = None
        self.bars = Progress(
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            _TimeLeft(),
            TextColumn("{task.fields[remark]}", style="dim", markup=False),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> TerminalProgress:
        self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.name = ""
        self.done()

    def stage(self, name: str, total: int) -> None:
        """Finish the bar of the last stage and begin one for `name`."""
        self._close()
        self.name, self.total, self.finished = name, total, 0
        self.started = self.logged = time.monotonic()
        self.task = self.bars.add_task(name, total=total or None, remark="")
        if not self.console.is_terminal:
            self._log(f"{name} …")

    def advance(self, n: int = 1, note: str = "") -> None:
        """Move the bar by `n` steps and show `note` beside it."""
        self.finished += n
        if self.task is not None:
            self.bars.update(self.task, advance=n, remark=note)
        now = time.monotonic()
        if not self.console.is_terminal and now - self.logged >= _LOG_INTERVAL:
            self.logged = now
            of = f"/{self.total}" if self.total else ""
            self._log(f"{self.name} {self.finished}{of} {note}".rstrip())

    def note(self, text: str) -> None:
        """Print a line above the bars; it stays."""
        self._log(text)

    def done(self) -> None:
        """Finish the last bar and stop redrawing."""
        self._close()
        self.bars.stop()

    def _close(self) -> None:
        """End the current stage, if there is one."""
        if self.task is not None and self.name:
            self.bars.update(
                self.task, total=max(self.finished, 1), completed=max(self.finished, 1), remark=""
            )
            if not self.console.is_terminal:
                self._log(f"{self.name} done in {duration_text(time.monotonic() - self.started)}")
        self.task, self.name = None, ""

    def _log(self, text: str) -> None:
        self.bars.console.print(text, markup=False, highlight=False, soft_wrap=True)
