"""Where the time goes from the start of the program until requests are taken."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Startup:
    """The time of one start; what the two processes do at the same time counts once, as the engine's.

    Attributes
    ----------
    seconds : float
        From the start of the process until it takes requests.
    parts : dict of str to float
        What the time went to, in seconds: ``program`` (interpreter, imports, settings, port), the parts that
        the engine tells, as ``engine: NAME``, and ``http`` (from a ready engine to an open port).
    """

    seconds: float
    parts: dict[str, float]

    @property
    def accounted(self) -> float:
        """Share of the time that the parts explain."""
        return min(1.0, sum(self.parts.values()) / self.seconds) if self.seconds > 0 else 1.0

    def told(self) -> dict[str, Any]:
        """As plain values, for the log and for `/health`."""
        parts = {name: round(seconds, 3) for name, seconds in self.parts.items()}
        return {"seconds": round(self.seconds, 3), "accounted": round(self.accounted, 3), "parts": parts}


def account(launched: float, loaded: float, opened: float, engine: Mapping[str, float]) -> Startup:
    """The time of a start.

    Parameters
    ----------
    launched, loaded, opened : float
        Age of the process, in seconds, when the engine was launched, when it was ready, and when the port was
        open.
    engine : mapping of str to float
        Seconds of the engine's parts, from ``launched`` to ``loaded``.
    """
    parts = {"program": launched} | {f"engine: {name}": seconds for name, seconds in engine.items()}
    return Startup(opened, parts | {"http": opened - loaded})
