"""Every error that a user can meet.

Each one says what was given, what was expected and what to do. The command line turns them into
exit statuses: 2 for a user's mistake, 1 for a gate that refused or a failure of our own.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TailorbirdError(Exception):
    """Base of all errors raised on purpose.

    Parameters
    ----------
    given : str
        What was found, with the value.
    expected : str
        What would have been right.
    remedy : str
        What the user can do now.
    """

    exit_status = 1

    def __init__(self, given: str, expected: str, remedy: str) -> None:
        super().__init__(given, expected, remedy)
        self.given = given
        self.expected = expected
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.given} · expected: {self.expected} · {self.remedy}"


class UserError(TailorbirdError):
    """A mistake in what the user gave; nothing was written."""

    exit_status = 2


class ModelNotFound(UserError):
    """The model's path or Hub id leads nowhere from here."""


class CheckpointError(UserError):
    """Files of a checkpoint are missing, damaged, unsafe or contradict each other."""


class UnsupportedArchitecture(UserError):
    """The anatomy of a model could not be read; names the modules that were not understood."""


class TextError(UserError):
    """Calibration or evaluation text is unreadable, empty or unusable."""


class SettingsError(UserError):
    """An option, recipe, plan or method setting is unknown, out of range or in conflict."""


class UnknownAdapter(SettingsError):
    """No adapter has this name, or has it any longer."""


class ContextExceeded(SettingsError):
    """A text is longer than what a server's model can read, or has memory for."""


class BudgetError(UserError):
    """The budget can't be met, or already is."""


class ResumeError(UserError):
    """Unfinished work exists but was made from something else, or there is none to resume."""


class ResourceError(UserError):
    """Disk, memory or permissions of this machine don't allow the job."""


class ExportError(UserError):
    """The other tool's format cannot hold this model exactly."""


class TensorError(TailorbirdError, ValueError):
    """Tensors that compiled code can't take, or that don't go together; it wasn't called."""


class GateRefused(TailorbirdError):
    """The result was made, but a quality check refused it; it was kept as ``OUT.rejected``."""


class EngineError(TailorbirdError):
    """The engine of a server failed, or isn't running."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`did you mean …` with the closest of `known`, or the list of all where none is close."""
    candidates = sorted(known)
    close = difflib.get_close_matches(name, candidates, n=3, cutoff=0.55)
    if close:
        return "did you mean " + " or ".join(f"`{c}`" for c in close) + "?"
    return "choose one of " + ", ".join(f"`{c}`" for c in candidates)
