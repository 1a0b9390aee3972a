"""The engine: requests in, tokens out, one step at a time.

A step reads the pieces that the scheduler picked, in one packed row, and chooses a token for each sequence
that has read all it has. It knows tokens only; text, sockets and clients are elsewhere. Nothing here waits,
but a moment for an adapter where there is nothing else to do.
"""

from __future__ import annotations

import importlib
import logging
import random
import threading
import time
from collections.abc import Callable, Generator, Iterator
from collections.abc import Sequence as Many
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tailorbird.errors import ContextExceeded, SettingsError, TailorbirdError, UnknownAdapter
from tailorbird.model.anatomy import read_anatomy
from tailorbird.model.checkpoint import open_checkpoint
from tailorbird.model.load import load, load_tokenizer
from tailorbird.run.generate import context_length, stop_tokens
from tailorbird.serve.adapters.activation import first_adapted
from tailorbird.serve.adapters.boarding import Boarding, Ticket
from tailorbird.serve.adapters.folded import folds_of
from tailorbird.serve.adapters.held_out import Example, mean_loss, pieces
from tailorbird.serve.adapters.publish import publish
from tailorbird.serve.adapters.room import AdapterRoom
from tailorbird.serve.adapters.store import AdapterStore, Handle
from tailorbird.serve.beam import Search
from tailorbird.serve.beam_sequences import BeamSequences
from tailorbird.serve.grammar import Compiler, Matcher
from tailorbird.serve.guess.check import Walk, choose_along
from tailorbird.serve.guess.guessing import Guessing
from tailorbird.serve.guess.open import open_guessers
from tailorbird.serve.guess.tree import Guess
from tailorbird.serve.interface import EngineOptions
from tailorbird.serve.memory import Needs, longest_text, page_count, weight_bytes
from tailorbird.serve.page_pool import PagePool
from tailorbird.serve.request import BeamSearch, Finish, Output, Request
from tailorbird.serve.runner import runner_for
from tailorbird.serve.sampling import Sampler
from tailorbird.serve.scheduler import Piece, Scheduler
from tailorbird.serve.sequence import Sequence, placeholders
from tailorbird.serve.swap import Swap

logger = logging.getLogger("tailorbird")

#: Context where neither model nor options state one.
DEFAULT_CONTEXT = 4096
#: Seconds that a step without anything to read waits for an adapter: then there may be messages.
SETTLE_SECONDS = 0.01


@dataclass(eq=False)
class _Head:
    """A sequence for which tokens are chosen: after its piece, or after the prompt that it shares.

    `hidden` is what left the last norm ``[1 + drafts, hidden_size]``, where a guesser wants to know.
    """

    sequence: Sequence
    walk: Walk
    hidden: Tensor | None = None
    piece: Piece | None = None


class Engine:
    """A model that serves many requests at once.

    Parameters
    ----------
    options : EngineOptions
    log : callable
        Gets a line for each part of starting.

    Attributes
    ----------
    info : dict
        ``model``, ``context``, ``vocab_size``, ``max_sequences``, ``kv_tokens``, ``path`` (``fused``,
        ``paged`` or ``modules``), ``note`` (why not fused), ``adapters``, ``startup`` (name -> seconds).

    Raises
    ------
    SettingsError
        An option out of range.
    BudgetError
        The memory holds the weights and not one sequence.
    """

    def __init__(self, options: EngineOptions, log: Callable[[str], None] = logger.info) -> None:
        for name, least in (("max_sequences", 1), ("step_tokens", 1), ("context", 2), ("threads", 1)):
            value = getattr(options, name)
            if value is not None and value < least:
                raise SettingsError(f"{name} {value}", f"at least {least}", f"set {name} to {least} or more")
        self.options = options
        self._startup: dict[str, float] = {}
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        with self._part("transformers", log):
            importlib.import_module("transformers.modeling_utils")  # loading would, and be blamed for it
        with self._part("weights", log):
            checkpoint = open_checkpoint(options.model, options.bits)
            self.model = load(options.model, bits=options.bits)
        with self._part("blocks", log):
            self.runner = runner_for(self.model, lambda: read_anatomy(checkpoint).kv_bytes_per_token)
        with self._part("tokenizer", log):
            self._tokenizer = load_tokenizer(options.model)
            self.stop = frozenset(stop_tokens(self.model, self._tokenizer))
        with self._part("draft", log):
            opened = open_guessers(options.draft, self._tokenizer, self.runner)
        with self._part("pages", log):
            stated = context_length(self.model)
            self.context = min(options.context or stated or DEFAULT_CONTEXT, stated or 1 << 30)
            needs = Needs(
                weight_bytes(self.model) + opened.weight_bytes, self.runner.page_bytes + opened.page_bytes,
                self.runner.page_tokens, self.context, self.runner.adaptable is not None,
            )  # fmt: skip
            pages = page_count(options, needs)
            self.swap = self._swap(log)
            self.pool = PagePool(pages, None if self.swap is None else self.swap.put)
            self.runner.reserve(pages)
            self.scheduler = Scheduler(
                self.pool, self.runner.page_tokens, options.step_tokens, options.max_sequences,
                self.runner.shares_prefixes, self.swap, self._reclaim, self._ready, self._begin,
            )  # fmt: skip
            self._longest = longest_text(options, needs, pages)
            room = AdapterRoom(
                self.pool, self.runner.page_bytes, pages - -(-self._longest // self.runner.page_tokens),
                self.runner.discard,
            )  # fmt: skip
            log(
                f"memory: {needs.weight_bytes:,} bytes of weights, {pages * needs.page_bytes:,} of keys, "
                f"values and adapters; adapters may take {room.most_bytes:,} of it, "
                f"a text {self._longest:,} tokens"
            )
            self.guessing = Guessing(opened.make(pages, self.scheduler.has_room))
        self.store: AdapterStore | None = None
        self.boarding: Boarding | None = None
        with self._part("adapters", log):
            allowed, state = (
                None if path is None else Path(path)
                for path in (options.adapter_directory, options.adapter_state)
            )
            goes_on = state is not None and state.exists()
            if self.runner.adaptable is not None:
                self.store = AdapterStore(
                    self.runner.adaptable, room.most_bytes, allowed, state, room, folds_of(checkpoint),
                    options.adapter_bits, self._longest,
                )  # fmt: skip
                self.boarding = Boarding(self.store)
            for name, path in () if goes_on else options.adapters.items():
                self.adapters_of_model().register(name, path, trusted=True)
        self._sequences: dict[str, list[Sequence]] = {}
        self._hopeless: list[tuple[Request, TailorbirdError]] = []
        self._arrivals = 0
        self._outputs: list[Output] = []
        self._seeds = random.Random()
        self._steps = self._found = self._step_tokens = 0
        self._compiler: Compiler | None = None
        self._compiler_lock = threading.Lock()
        self.vocab_size: int = self.model.config.get_text_config().vocab_size

    @contextmanager
    def _part(self, name: str, log: Callable[[str], None]) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._startup[name] = time.perf_counter() - began
        log(f"{name}: {self._startup[name]:.2f} s")

    def _reclaim(self) -> bool:
        """Give the pages of an adapter that nobody uses back to the pool; False where there is none."""
        return self.store is not None and self.store.drop_oldest()

    def _swap(self, log: Callable[[str], None]) -> Swap | None:
        memory, disk = self.options.swap_memory_bytes, self.options.swap_disk_bytes
        if not memory and not disk:
            return None
        if not self.runner.shares_prefixes:
            log("no page is swapped: this model's keys and values aren't in pages")
            return None
        return Swap(self.runner, self.runner.page_tokens, self.runner.page_bytes, memory, disk)

    @property
    def info(self) -> dict[str, Any]:
        """See the class."""
        return {
            "model": self.options.model, "context": self.context, "vocab_size": self.vocab_size,
            "max_sequences": self.scheduler.max_sequences,
            "kv_tokens": self.pool.pages * self.runner.page_tokens, "path": self.runner.path,
            "note": self.runner.note, "adapters": self.adapters(), "startup": dict(self._startup),
        }  # fmt: skip

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.scheduler.waiting or self.scheduler.running or self._outputs)

    def progress(self) -> float:
        """A number that changes with each block of a step; may be asked from another thread."""
        return self.runner.progress()

    def stats(self) -> dict[str, float]:
        """Counts of now (``waiting running kv_pages kv_pages_used``) and since the start."""
        swap = {} if self.swap is None else self.swap.stats()
        return {
            "waiting": len(self.scheduler.waiting), "running": len(self.scheduler.running),
            "kv_pages": self.pool.pages, "kv_pages_used": self.pool.used, "adapter_pages": self.pool.lent,
            "cached_tokens": self._found,
            "preemptions": self.scheduler.preemptions, "step_tokens": self._step_tokens, "steps": self._steps,
            **self.guessing.stats(), **swap,
        }  # fmt: skip

    def prepare(self, request: Request) -> Matcher | None:
        """The start of a request's grammar, which may take long to compile; may be called by any thread.

        Raises
        ------
        SettingsError
            As `Compiler.matcher`.
        """
        grammar = request.sampling.grammar
        return None if grammar is None else self._grammars().matcher(grammar, self._stop_of(request))

    def add(self, request: Request, prepared: Matcher | None = None) -> None:
        """Let a request wait for its turn.

        Parameters
        ----------
        request : Request
        prepared : Matcher, optional
            What `prepare` gave for it; done here where it is left out.

        Raises
        ------
        SettingsError
            A prompt beyond the context or the memory, a token that the model hasn't, an unknown adapter, an
            impossible grammar, or an id that runs already.
        """
        if request.id in self._sequences:
            raise SettingsError(f"request {request.id!r}", "an id that isn't in use", "choose another id")
        self._check_tokens(request.prompt, self.context - 1)
        ticket = None if request.adapter is None else self._boarding_of_model().take(request.adapter)
        start = None if ticket is None else first_adapted(request.prompt, ticket.reservation.invocation)
        if start is None:
            self._let_go(ticket)
            ticket = None
        try:
            places = 0 if ticket is None else ticket.reservation.places
            self._check_length(len(request.prompt), places, self._longest, 1)
            made = self._sequences_of(request, ticket, start or 0, prepared or self.prepare(request))
        except TailorbirdError:
            self._let_go(ticket)
            raise
        self._sequences[request.id] = made
        self.scheduler.add(made[0])
        self._arrivals += 1

    def _check_tokens(self, tokens: Many[int], most: int) -> None:
        if not 0 < len(tokens) <= most:
            raise SettingsError(
                f"a prompt of {len(tokens)} tokens",
                f"1 to {most} tokens, for a context of {self.context}",
                "shorten the prompt" if tokens else "give a longer prompt",
            )
        wrong = next((token for token in tokens if not 0 <= token < self.vocab_size), None)
        if wrong is not None:
            raise SettingsError(
                f"token {wrong} in a prompt", f"0 to {self.vocab_size - 1}", "use this model's tokenizer"
            )

    def _check_length(self, length: int, places: int, longest: int, more: int = 0) -> None:
        """ContextExceeded unless a text fits behind so many places of its adapter, with so many tokens more.

        All together may have `longest` tokens: the context, or those for which there is memory.
        """
        most = max(0, longest - places - more)
        if length > most:
            behind = f" behind the {places} places that its adapter begins with" if places else ""
            short = longest < self.context
            raise ContextExceeded(
                f"a text of {length} tokens{behind}",
                f"at most {most}, for {'memory for' if short else 'a context of'} {longest} together",
                "shorten the prompt, or allow more memory" if short else "shorten the prompt",
            )

    def _stop_of(self, request: Request) -> frozenset[int]:
        return self.stop if request.stop is None else request.stop

    def _sequences_of(
        self, request: Request, ticket: Ticket | None, start: int, prepared: Matcher | None
    ) -> list[Sequence]:
        """The continuations of a request, whose adapter acts from `start` on.

        All but the first begin when its prompt was read.
        """
        stop = self._stop_of(request)
        seed = self._seeds.getrandbits(63) if request.sampling.seed is None else request.sampling.seed
        salt = f"{request.tenant}\0".encode()
        adapter_salt = b"" if ticket is None else ticket.reservation.salt
        begun = 0 if ticket is None else ticket.reservation.places
        made = []
        for index in range(request.n if request.beams is None else 1):
            matcher = None if prepared is None else prepared.copy()
            sampler = Sampler(request.sampling, request.prompt, stop, self.vocab_size, seed + index, matcher)
            made.append(
                Sequence(
                    request, index, self._arrivals, sampler, ticket, salt,
                    [*placeholders(begun), *request.prompt], adapted_from=start, adapter_salt=adapter_salt,
                    begun=begun,
                )
            )  # fmt: skip
        if request.beams is not None:
            return self._searched(request.beams, made[0])
        return made

    def _searched(self, settings: BeamSearch, first: Sequence) -> list[Sequence]:
        """The list of a search's sequences, which it changes as it goes on."""
        request = first.request
        stop = self._stop_of(request)
        stop = frozenset() if request.sampling.ignore_end else stop & frozenset(range(self.vocab_size))
        if settings.num_beams > self.vocab_size - len(stop):
            raise SettingsError(
                f"num_beams {settings.num_beams}",
                f"at most the {self.vocab_size - len(stop)} tokens that don't end a text",
                "search with fewer beams",
            )
        search = Search(settings, stop, self._left(first))
        return BeamSequences(first, search, stop, self.scheduler, self.runner).sequences

    def _grammars(self) -> Compiler:
        with self._compiler_lock:
            if self._compiler is None:
                self._compiler = Compiler(self._tokenizer, self.vocab_size)
            return self._compiler

    def cancel(self, id: str) -> None:
        """End a request without another word; one that isn't there is no mistake."""
        sequences = self._sequences.pop(id, [])
        for sequence in sequences:
            if sequence in self.scheduler.running or sequence in self.scheduler.waiting:
                self.scheduler.remove(sequence)
            self._forget(sequence)
        if sequences:
            self._let_go(sequences[0].adapter)

    def step(self) -> list[Output]:
        """Read what comes next, choose tokens; what happened to whom."""
        self.guessing.begin()
        pieces = self.scheduler.next_step(self._draft if self._may_draft else None)
        self._end_hopeless()
        if self.boarding is not None:
            self.boarding.look_ahead()
            if not pieces and not self._outputs:
                self.boarding.settle(SETTLE_SECONDS)
        if pieces:
            began = time.perf_counter()
            self.runner.keeps_hidden = self.guessing.wants_hidden
            logits = self.runner.step(pieces)
            tokens = sum(piece.count + len(piece.drafts) for piece in pieces)
            if self.swap is not None:
                self.swap.costs.stepped(tokens, time.perf_counter() - began)
            only_writes = all(
                piece.chooses and piece.count == 1 and piece.sequence.takes_guesses for piece in pieces
            )
            self._steps += 1
            self._step_tokens = tokens
            written = self._take(pieces, logits)
            if only_writes:
                self.guessing.wrote(len(pieces), tokens, written)
            else:
                self.guessing.read()
        outputs, self._outputs = self._outputs, []
        return outputs

    def _ready(self, sequence: Sequence) -> bool:
        """Whether a waiting sequence has its adapter; one that can't ever get it is noted for its end."""
        if sequence.adapter is None or self.boarding is None:
            return True
        try:
            return self.boarding.ready(sequence.adapter)
        except TailorbirdError as error:
            self._hopeless.append((sequence.request, error))
            return False

    def _begin(self, sequence: Sequence, number: int, page: int) -> None:
        """Let a page hold what page `number` of a sequence's beginning does."""
        self.runner.begin(sequence.adapter.adapter, [page], number)

    def _end_hopeless(self) -> None:
        """End the requests whose adapters turned out to be no good."""
        for request, error in self._hopeless:
            self.cancel(request.id)
            self._outputs += [
                Output(request.id, index, finish="error", error=str(error)) for index in range(request.n)
            ]
        self._hopeless.clear()

    @property
    def _may_draft(self) -> bool:
        return self.options.speculative and self.runner.takes_drafts

    def _draft(self, sequences: Many[Sequence], most: int) -> dict[Sequence, Guess]:
        fit = [sequence for sequence in sequences if sequence.takes_guesses]
        return self.guessing.guess(fit, most, self._left)

    def _left(self, sequence: Sequence) -> int:
        """Tokens that a sequence may still write."""
        written = sequence.request.max_tokens - sequence.written
        return min(written, self._longest - len(sequence.tokens))

    def _ends(self, sequence: Sequence, token: int) -> bool:
        stop = self._stop_of(sequence.request)
        heeded = not sequence.request.sampling.ignore_end
        return (heeded and token in stop) or sequence.sampler.finished

    def _take(self, pieces: Many[Piece], logits: Many[Tensor]) -> int:
        """Choose tokens after the pieces that are read whole, and after those of their drafts that fit.

        How many were chosen, but by beams.
        """
        heads, rows_of, hidden_of = [], iter(logits), iter(self.runner.hidden_states)
        for piece in pieces:
            if not piece.chooses:
                self.scheduler.done(piece)
                continue
            sequence, rows, hidden = piece.sequence, next(rows_of), next(hidden_of, None)
            if sequence.beams is not None:
                self._search(piece, rows[0])
                continue
            heads.append(_Head(sequence, Walk(rows, sequence.sampler, piece.guess), hidden, piece))
            if sequence.index == 0 and sequence.written == 0:
                siblings = self._sequences[sequence.request.id][1:]
                heads += [_Head(sibling, Walk(rows[:1], sibling.sampler), hidden) for sibling in siblings]
        choose_along([head.walk for head in heads], [self._end_of(head.sequence) for head in heads])
        for head in reversed(heads):  # a first continuation may end, and its pages are needed until then
            self._extend(head)
        return sum(len(head.walk.choices) for head in heads)

    def _search(self, piece: Piece, row: Tensor) -> None:
        """Let a beam choose with the others; at the end, say what was found."""
        if piece.sequence.request.id not in self._sequences:
            return  # another beam's logits have ended the search in this step
        self.scheduler.done(piece)
        outputs: list[Output] = piece.sequence.beams.take(piece.sequence, row)
        if outputs:
            self._found += outputs[0].cached_tokens
            self._outputs += outputs
            self.cancel(outputs[0].id)

    def _end_of(self, sequence: Sequence) -> Callable[[int, int], bool]:
        """Whether nothing may follow the n-th token that is chosen in this step."""
        left = self._left(sequence)
        return lambda number, token: number >= left or self._ends(sequence, token)

    def _extend(self, head: _Head) -> None:
        """Give a sequence the tokens that were chosen for it, and say so."""
        sequence, choices = head.sequence, head.walk.choices
        prompt_read = sequence.written == 0
        error = choices[-1].error
        ended = error is None and self._ends(sequence, choices[-1].token)
        new = choices[:-1] if ended or error is not None else choices
        sequence.tokens += [choice.token for choice in new]
        if head.piece is not None:
            self._settle(head, head.piece)
        finish: Finish | None = None
        if error is not None:
            finish = "refused" if isinstance(error, SettingsError) else "error"
        elif ended:
            finish = "stop"
        elif self._left(sequence) <= 0:
            finish = "length"
        cached = 0
        if prompt_read:
            parent = self._sequences[sequence.request.id][0]
            cached = parent.cached or 0
            self._found += cached if head.piece is not None else 0
        self._outputs.append(
            Output(
                sequence.request.id, sequence.index, tuple(choice.token for choice in new),
                tuple(choice.logprob for choice in new if choice.logprob is not None), finish,
                None if error is None else str(error), cached,
            )
        )  # fmt: skip
        if head.piece is None and finish is None:
            self._branch(sequence)
        if finish is not None:
            self._end(sequence, running=head.piece is not None)
        elif head.hidden is not None:
            self.guessing.saw(sequence, head.hidden[head.walk.row])

    def _settle(self, head: _Head, piece: Piece) -> None:
        """Keep what was read of a piece: its tokens, and those of its drafts that were right."""
        sequence, path = head.sequence, head.walk.path
        first = piece.start + piece.count
        if path != list(range(len(path))):
            sources = [first + node for node in path]
            self.runner.move(sequence.pages, sources, range(first, first + len(path)))
        chosen = [choice.token for choice in head.walk.choices if choice.error is None]
        self.guessing.checked(sequence, piece.guess, chosen)
        self.scheduler.done(piece, len(path))

    def _branch(self, sequence: Sequence) -> None:
        """Let a continuation run on pages of the first one, with a copy of the page that isn't full."""
        parent = self._sequences[sequence.request.id][0]
        length = sequence.begun + len(sequence.request.prompt)
        full, rest = divmod(length, self.runner.page_tokens)
        runs = self.runner.shares_prefixes and len(self.scheduler.running) < self.scheduler.max_sequences
        own = self.pool.take(1 if rest else 0) if runs else None
        if own is None:
            self.scheduler.add(sequence)  # it reads the prompt again, or finds it
            return
        if rest:
            self.runner.copy(parent.pages[full], own[0])
        shared = parent.pages[:full]
        self.pool.share(shared)
        sequence.pages, sequence.computed = shared + own, length
        self.scheduler.fork(sequence)

    def _end(self, sequence: Sequence, running: bool) -> None:
        """A sequence wrote its last token."""
        if running:
            self.scheduler.remove(sequence)
        self._forget(sequence)
        left = self._sequences[sequence.request.id]
        sequence.ended = True
        if all(other.ended for other in left):
            del self._sequences[sequence.request.id]
            self._let_go(sequence.adapter)

    def _forget(self, sequence: Sequence) -> None:
        """Let go of what is kept for a sequence beside its pages."""
        self.runner.forget(sequence)
        self.guessing.forget(sequence)

    def load_adapter(self, name: str, path: str) -> None:
        """Register an adapter, or a new version of it; requests that run keep the one that they began with.

        Raises
        ------
        SettingsError
            The model runs through its modules alone, or the path isn't below `adapter_directory`, links
            followed.
        CheckpointError
            Files are missing, damaged or pickled, or don't fit the model.
        """
        self._open_store().register(name, path)

    def publish_adapter(
        self, name: str, path: str, held_out: Many[tuple[Many[int], int]]
    ) -> Generator[None, None, dict[str, Any]]:
        """Serve a new version of an adapter if held-out text says it is no worse than the one served now.

        Parameters
        ----------
        name, path : str
        held_out : sequence of (tokens, first)
            Texts, and how many of their tokens are read without being counted: at least 1 of at least
            ``first + 1``.

        Yields
        ------
        None
            Between windows of text (`adapters.held_out`).

        Returns
        -------
        dict
            Fields of `adapters.publish.Published`; losses in nats per token.

        Raises
        ------
        GateRefused
            It is worse; nothing has changed.
        SettingsError, CheckpointError, ResourceError
            As `load_adapter`, or no text, or one that doesn't fit the context behind what an adapter begins
            with; one that is counted from its second token on is cut to fit.
        """
        store = self._open_store()
        examples = [Example(tuple(tokens), first) for tokens, first in held_out]
        for example in examples:
            self._check_tokens(example.tokens, self._longest)
        if not examples or not all(0 < one.first < len(one.tokens) for one in examples):
            raise SettingsError(
                "held-out text with nothing to foretell", "texts of at least two tokens", "give longer texts"
            )
        places = store.places(name) if name in store.names() else 0

        def loss(handle: Handle) -> Generator[None, None, float]:
            """The same pieces of text for both versions, whatever they begin with."""
            nonlocal places
            places = max(places, handle.places)
            cut = [piece for example in examples for piece in pieces(example, self._longest - places)]
            for piece in cut:
                self._check_length(len(piece.tokens), places, self._longest)
            return mean_loss(cut, self.runner, self.pool, handle)

        published = yield from publish(store, name, path, loss)
        return asdict(published)

    def rollback_adapter(self, name: str) -> int:
        """Serve the version of an adapter before the one that is served; its number.

        Raises
        ------
        SettingsError
            The name is unknown, or has no version before this one.
        """
        return self.adapters_of_model().rollback(name)

    def _open_store(self) -> AdapterStore:
        """The adapters, where some may be added; SettingsError where there is no directory for them."""
        store = self.adapters_of_model()
        if self.options.adapter_directory is None:
            raise SettingsError(
                "an adapter for a server that takes none while it runs",
                "a server with a directory for adapters",
                "start it with --adapter-directory",
            )
        return store

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter, if it is known; requests that run keep it until they end."""
        with suppress(UnknownAdapter):
            self.adapters_of_model().unregister(name)

    def adapters(self) -> list[str]:
        """Names of the adapters."""
        return [] if self.store is None else self.store.names()

    def adapters_of_model(self) -> AdapterStore:
        """The adapters of a model that can have some; SettingsError where it can't."""
        if self.store is None:
            raise SettingsError(
                f"an adapter for a model that runs through its modules alone ({self.runner.note})",
                "a model that runs in compiled blocks, or over pages",
                "merge the adapter into the model",
            )
        return self.store

    def _boarding_of_model(self) -> Boarding:
        """Tickets for a model that can have adapters; SettingsError where it can't."""
        self.adapters_of_model()
        assert self.boarding is not None
        return self.boarding

    def _let_go(self, ticket: Ticket | None) -> None:
        if ticket is not None:
            self._boarding_of_model().give_back(ticket)

    def embed(self, ids: Many[int], adapter: str | None = None) -> list[float]:
        """The mean of what leaves the last norm for each token of a text, with length 1.

        Raises
        ------
        SettingsError
            No token, more than the context holds, a token that the model hasn't, or an unknown adapter.
        """
        self._check_tokens(ids, self.context)
        handle = None if adapter is None else self.adapters_of_model().acquire(adapter)
        try:
            if handle is not None:
                self._check_length(len(ids), handle.places, self.context)
            start = 0 if handle is None else first_adapted(ids, handle.invocation)
            mean = self.runner.hidden(ids, None if start is None else handle, start or 0).mean(0)
        finally:
            if handle is not None:
                self.adapters_of_model().release(handle)
        return (mean / mean.norm().clamp(min=1e-12)).tolist()
