"""Progress says in a log what it draws on a terminal, and never fails on what it is told."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from tailorbird.cli.progress import TerminalProgress
from tailorbird.progress import Progress, Silent


def listen(progress: Progress) -> None:
    """A run as the work tells it."""
    progress.note("resumed at block 3")
    progress.stage("statistics", 3)
    for block in range(3):
        progress.advance(note=f"block {block} [red]done[/]")
    progress.stage("unknown length", 0)
    progress.advance(5)
    progress.note("fallback [slow]")
    progress.done()


@pytest.mark.parametrize("terminal", [False, True])
def test_stages_and_remarks_are_shown(terminal: bool) -> None:
    screen = io.StringIO()
    with TerminalProgress(Console(file=screen, force_terminal=terminal, width=120)) as progress:
        listen(progress)
    shown = screen.getvalue()
    for text in ("resumed at block 3", "statistics", "unknown length", "fallback [slow]"):
        assert text in shown
    assert ("3/3" in shown) == terminal


def test_a_log_has_a_few_lines_per_stage_however_many_steps_it_has() -> None:
    screen = io.StringIO()
    with TerminalProgress(Console(file=screen, force_terminal=False)) as progress:
        progress.stage("compress", 5000)
        for _ in range(5000):
            progress.advance()
    assert len(screen.getvalue().splitlines()) <= 4


def test_a_failed_stage_is_not_called_done() -> None:
    screen = io.StringIO()

    def fail() -> None:
        with TerminalProgress(Console(file=screen, force_terminal=False)) as progress:
            progress.stage("compress", 2)
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        fail()
    assert "done" not in screen.getvalue()


def test_done_twice_is_done_once() -> None:
    screen = io.StringIO()
    with TerminalProgress(Console(file=screen, force_terminal=False)) as progress:
        progress.stage("compress", 1)
        progress.done()
        progress.done()
    assert screen.getvalue().count("compress done") == 1


def test_silence_takes_the_same_calls() -> None:
    listen(Silent())
