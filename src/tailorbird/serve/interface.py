"""What the two processes of a server agree on: how an engine is set up, and what it can be asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tailorbird.serve.request import Output, Request

#: Where the engine is found that a server runs, unless it is told another: ``module:callable``.
ENGINE = "tailorbird.serve.engine:Engine"


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is set up.

    Parameters
    ----------
    model : str
        Directory, Hugging Face id or ``demo``.
    adapters : mapping of str to str
        Name -> directory, loaded from the start.
    memory_bytes : int or None
        For weights, keys and values together. None is the weights, and for keys and values a quarter of the
        memory that is available, or what `max_sequences` texts of 2,048 tokens need, whichever is less.
    max_sequences : int
        Most sequences that run at the same time.
    step_tokens : int
        Most tokens of one step, prompts included.
    context : int or None
        Most tokens of a sequence; None is the model's own limit.
    adapter_directory : str or None
        Where adapters may be loaded from while the server runs.
    threads : int or None
        CPU threads; None is all cores.
    speculative : bool
        Whether tokens may be guessed, several of which are then checked at once: from the text itself, and by
        `draft`.
    draft : str or None
        What guesses beside the text itself: a smaller model with the same vocabulary, ``self:skip`` for the
        model with blocks left out, or heads that `tailorbird draft` made.
    """

    model: str
    adapters: Mapping[str, str] = field(default_factory=dict)
    memory_bytes: int | None = None
    max_sequences: int = 64
    step_tokens: int = 512
    context: int | None = None
    adapter_directory: str | None = None
    threads: int | None = None
    speculative: bool = True
    draft: str | None = None

    def to_wire(self) -> dict[str, Any]:
        """As plain values, for a message."""
        found = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return found | {"adapters": dict(self.adapters)}


class EngineLike(Protocol):
    """An engine, as the process that runs it sees it."""

    info: dict[str, Any]

    @property
    def busy(self) -> bool:
        """A step would do something."""

    def add(self, request: Request) -> None:
        """Take a request; raises `UserError` for one that can't be served."""

    def cancel(self, id: str) -> None:
        """Forget a request; unknown ids are ignored."""

    def step(self) -> list[Output]:
        """One iteration."""

    def stats(self) -> dict[str, float]:
        """What goes on now."""

    def load_adapter(self, name: str, path: str) -> None:
        """Serve an adapter under this name."""

    def unload_adapter(self, name: str) -> None:
        """Serve it no longer."""

    def adapters(self) -> list[str]:
        """Names of the adapters that are loaded."""

    def embed(self, ids: Sequence[int], adapter: str | None) -> list[float]:
        """One vector for these tokens."""


EngineFactory = Callable[[EngineOptions, Callable[[str], None]], EngineLike]
