"""What the two processes of a server agree on: how an engine is set up, and what it can be asked."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tailorbird.errors import SettingsError
from tailorbird.serve.request import Output, Request

#: Where the engine is found that a server runs, unless it is told another: ``module:callable``.
ENGINE = "tailorbird.serve.engine:Engine"
#: Bits that adapters' matrices can be rounded to.
ADAPTER_BITS = 8


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is set up.

    Parameters
    ----------
    model : str
        Directory, Hugging Face id or ``demo``.
    adapters : mapping of str to str
        Name -> directory, which may lie anywhere; served from the start, unless there is a state.
    memory_bytes : int or None
        For weights, keys, values and adapters together. None is the weights, and for keys and values a
        quarter of the memory that is available, or what `max_sequences` texts of 2,048 tokens need, whichever
        is less; and for adapters 2 GiB more, or another such quarter.
    max_sequences : int
        Most sequences that run at the same time.
    step_tokens : int
        Most tokens of one step, prompts included.
    context : int or None
        Most tokens of a sequence; None is the model's own limit.
    adapter_directory : str or None
        Where adapters may be loaded from while the server runs.
    adapter_state : str or None
        A file in which the adapters that are served, and their versions, outlive an engine.
    adapter_bits : int or None
        8: adapters' matrices are rounded to bytes when they are read; None: they stay as they are stored.
    threads : int or None
        CPU threads; None is all cores.
    speculative : bool
        Whether tokens may be guessed, several of which are then checked at once: from the text itself, and by
        `draft`.
    draft : str or None
        What guesses beside the text itself: a smaller model with the same vocabulary, ``self:skip`` for the
        model with blocks left out, or heads that `tailorbird draft` made.
    swap_memory_bytes, swap_disk_bytes : int
        For copies of pages that others needed, in RAM and in a file, beside `memory_bytes`; 0 is none.
    bits : int or None
        At which linears of 8 bits are read (`model.load.load`); None is as they are stored.

    Raises
    ------
    SettingsError
        `adapter_bits` is neither 8 nor None, or an adapter has the model's name.
    """

    model: str
    adapters: Mapping[str, str] = field(default_factory=dict)
    memory_bytes: int | None = None
    max_sequences: int = 64
    step_tokens: int = 512
    context: int | None = None
    adapter_directory: str | None = None
    adapter_state: str | None = None
    adapter_bits: int | None = None
    threads: int | None = None
    speculative: bool = True
    draft: str | None = None
    swap_memory_bytes: int = 0
    swap_disk_bytes: int = 0
    bits: int | None = None

    def __post_init__(self) -> None:
        if self.adapter_bits not in (None, ADAPTER_BITS):
            raise SettingsError(
                f"adapters of {self.adapter_bits} bits",
                f"{ADAPTER_BITS}, or none to leave them as they are stored",
                f"use --adapter-bits {ADAPTER_BITS}, or leave it out",
            )
        if self.model in self.adapters:
            raise SettingsError(
                f"an adapter called {self.model}", "another name than the model's", "rename it"
            )

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

    def progress(self) -> float:
        """A number that changes while a step gets on; asked from another thread."""

    def prepare(self, request: Request) -> Any:
        """What takes long and must be done before a request with a grammar is added; in another thread."""

    def add(self, request: Request, prepared: Any = None) -> None:
        """Take a request, with what was prepared for it; raises `UserError` for one that can't be served."""

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

    def publish_adapter(
        self, name: str, path: str, held_out: Sequence[tuple[Sequence[int], int]]
    ) -> Generator[None, None, dict[str, Any]]:
        """Serve an adapter under this name unless held-out text says it is worse than what is served.

        Each text is its tokens, and the number of those that aren't counted. Gives the fields of
        `adapters.publish.Published`, a piece of the work each time it is asked to go on.
        """

    def rollback_adapter(self, name: str) -> int:
        """Serve the version before the one that is served; its number."""

    def adapters(self) -> list[str]:
        """Names of the adapters that are loaded."""

    def embed(self, ids: Sequence[int], adapter: str | None) -> list[float]:
        """One vector for these tokens."""


EngineFactory = Callable[[EngineOptions, Callable[[str], None]], EngineLike]
