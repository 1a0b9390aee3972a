"""What long work tells whoever watches it: the stage, how far it is, and remarks on the way.

The work knows nothing of terminals; the command line draws what it is told (`cli/progress.py`), and a
caller from Python hands in an object of its own or none.
"""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Told by a long job what it is doing."""

    def stage(self, name: str, total: int) -> None:
        """A new stage begins; it ends when the next one begins.

        Parameters
        ----------
        name : str
            What is done, such as ``"compress"``.
        total : int
            How many steps the stage has (blocks, windows); 0 where the number isn't known.
        """

    def advance(self, n: int = 1, note: str = "") -> None:
        """`n` steps of the current stage are done; `note` says what the last one was or gave."""

    def note(self, text: str) -> None:
        """One remark that stays on the screen, such as a fallback taken or work that was resumed."""

    def done(self) -> None:
        """All stages are over; nothing more is told."""


class Silent:
    """Listens to everything and shows nothing."""

    def stage(self, name: str, total: int) -> None:
        """Nothing is shown."""

    def advance(self, n: int = 1, note: str = "") -> None:
        """Nothing is shown."""

    def note(self, text: str) -> None:
        """Nothing is shown."""

    def done(self) -> None:
        """Nothing is shown."""
