"""One text that the engine is writing: its tokens, the pages that hold them, and how far it has got."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tailorbird.serve.page_pool import prefix_key
from tailorbird.serve.request import Request


def placeholders(count: int) -> list[int]:
    """What stands for places without tokens: numbers that are no token's, each another one."""
    return [-1 - place for place in range(count)]


@dataclass(eq=False)
class Sequence:
    """A continuation of a request.

    Attributes
    ----------
    request : Request
    index : int
        Which of the request's continuations.
    arrival : int
        Rising with the order in which requests came.
    sampler : object
        The state from which its tokens are chosen (`sampling.Sampler`).
    adapter : object or None
        What its request has of its adapter (`adapters.boarding.Ticket`); its `adapter` is for the runner.
    salt : bytes
        What its pages' keys begin with: tokens alone don't make keys and values equal.
    adapted_from : int
        The first token on which its adapter acts.
    adapter_salt : bytes
        What the keys of pages depend on besides, from the page of that token on, beside its place there.
    tokens : list of int
        Prompt and output.
    computed : int
        Leading tokens whose keys and values are in the pages.
    pages : list of int
    keys : list of bytes
        Of the leading full pages.
    cached : int
        Tokens of the prompt that were found in pages when it first ran.
    ended : bool
    beams : object or None
        The search that it is a beam of (`beam_sequences.BeamSequences`).
    begun : int
        Places before the prompt whose keys and values its adapter gives (`adapters.beginnings`). They have
        `placeholders` among `tokens`, and are computed whenever it runs.
    """

    request: Request
    index: int
    arrival: int
    sampler: Any
    adapter: Any
    salt: bytes
    tokens: list[int]
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    cached: int | None = None
    ended: bool = False
    beams: Any = None
    adapted_from: int = 0
    adapter_salt: bytes = b""
    begun: int = 0

    @property
    def pending(self) -> int:
        """Tokens to be read before the next one can be chosen: 1 while it is writing, 0 while it rests."""
        return len(self.tokens) - self.computed

    @property
    def written(self) -> int:
        """Tokens of the output."""
        return len(self.tokens) - self.begun - len(self.request.prompt)

    @property
    def takes_guesses(self) -> bool:
        """Whether what it writes may be guessed: guessers know no beams."""
        return self.beams is None

    def keys_of_full_pages(self, page_tokens: int, until: int) -> list[bytes]:
        """Keys of the full pages among the first `until` tokens."""
        for number in range(len(self.keys), until // page_tokens):
            before = self.keys[-1] if self.keys else self.salt
            full, rest = divmod(self.adapted_from, page_tokens)
            if self.adapter_salt and number == full:
                before += self.adapter_salt + rest.to_bytes(4, "little")
            here = self.tokens[number * page_tokens : (number + 1) * page_tokens]
            self.keys.append(prefix_key(before, here))
        return self.keys[: until // page_tokens]
