"""What of a long work is done, on disk: one file per finished step, and the hidden states between steps.

A step writes the hidden states that leave it, closes them, and is then marked done with what it found.
A killed run finds the marks of the finished steps and the states with which the next one begins.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tailorbird.calibrate.activations import ActivationFile
from tailorbird.errors import ResumeError
from tailorbird.model.writing import write_json


class Ledger:
    """Marks and hidden states of one work in a directory.

    Attributes
    ----------
    work : Path
        Holds ``done/`` and ``streams/``, made where they are missing.
    """

    def __init__(self, work: Path) -> None:
        self.work = work
        (work / "done").mkdir(parents=True, exist_ok=True)
        (work / "streams").mkdir(exist_ok=True)

    def result(self, step: str) -> Any | None:
        """What `finish` recorded for `step`, or None where it isn't done."""
        path = self.work / "done" / f"{step}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def finish(self, step: str, data: Any) -> None:
        """Mark `step` done for good, with `data` (JSON types) for whoever continues."""
        write_json(self.work / "done" / f"{step}.json", data)

    def part(self, name: str) -> Ledger:
        """A ledger of its own for one stage of the work."""
        return Ledger(self.work / name)

    def drop_part(self, name: str) -> None:
        """Delete the part `name`, if there is one: its outcome is kept elsewhere."""
        if (self.work / name).exists():
            shutil.rmtree(self.work / name)

    def step(self, name: str, work: Callable[[], Any], keep: set[str] | None = None) -> Any:
        """What `work` finds (JSON types), from the mark where it is done already.

        Parameters
        ----------
        name : str
        work : callable
            Closes every file of hidden states that it writes.
        keep : set of str, optional
            Hidden states that the steps after this one need; others are deleted once it is done.
        """
        found = self.result(name)
        if found is None:
            found = work()
            self.finish(name, found)
            if keep is not None:
                self.drop_streams(keep)
        return found

    def stream(self, name: str) -> Path:
        """Path of the hidden states `name`."""
        return self.work / "streams" / name

    def new_stream(self, name: str, windows: int, length: int, width: int) -> ActivationFile:
        """The hidden states `name`, ``[windows, length, width]``, to be written anew."""
        self.stream(name).unlink(missing_ok=True)
        return ActivationFile(self.stream(name), windows, length, width)

    def open_stream(self, name: str, windows: int, length: int, width: int) -> ActivationFile:
        """The hidden states `name`, ``[windows, length, width]``, that an earlier step left.

        Raises
        ------
        ResumeError
            They are gone.
        """
        if not self.stream(name).exists():
            raise ResumeError(
                f"{self.stream(name)} is missing",
                "the hidden states that the finished steps left",
                "remove the `.partial` directory in which it lies, and start again",
            )
        return ActivationFile(self.stream(name), windows, length, width)

    def drop_streams(self, keep: set[str]) -> None:
        """Delete the hidden states that are not named in `keep`."""
        for path in (self.work / "streams").iterdir():
            if path.name not in keep:
                path.unlink()
