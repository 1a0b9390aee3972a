"""Which tokens the next step reads.

Every step first gives one token to each sequence that is writing, then fills what is left of its budget with
pieces of prompts (https://arxiv.org/abs/2403.02310, Sarathi-Serve), so that a long prompt never stalls those
who are writing. Where pages run out, the sequence that is least urgent gives its pages back and waits; it is
read again later, mostly from pages that are still findable. Among those who wait, the tenant that has been
served least goes first (https://arxiv.org/abs/2401.00588, virtual token counters), after priority.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tailorbird.serve.guess.tree import NOTHING, Guess
from tailorbird.serve.page_pool import PagePool
from tailorbird.serve.sequence import Sequence
from tailorbird.serve.swap import Swap

#: What a token of output counts for in a tenant's share, beside a token of a prompt.
OUTPUT_WEIGHT = 2


@dataclass(frozen=True)
class Piece:
    """Tokens of a sequence that a step reads: from `start` on, then the drafts.

    Attributes
    ----------
    sequence : Sequence
    start, count : int
        Of the sequence's own tokens.
    drafts : tuple of int
        Guesses of what follows its last token.
    parents : tuple of int
        Which draft each one follows, as of `guess.tree.Guess`; empty where each follows the one before.
    """

    sequence: Sequence
    start: int
    count: int
    drafts: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()

    @property
    def guess(self) -> Guess:
        """The drafts, and how they branch."""
        return Guess(self.drafts, self.parents)

    @property
    def chooses(self) -> bool:
        """Whether a token is chosen after it."""
        return self.start + self.count == len(self.sequence.tokens)


class Scheduler:
    """The sequences of an engine, waiting and running.

    Parameters
    ----------
    pool : PagePool
    page_tokens : int
        Tokens of a page.
    step_tokens : int
        Most tokens of a step.
    max_sequences : int
        Most that run at once; at most `step_tokens`.
    shares_prefixes : bool
        Whether pages of one sequence may serve another.
    swap : Swap, optional
        Where pages are looked for that the pool doesn't have any more.
    reclaim : callable, optional
        Gives pages that serve for something else back to the pool, some at a time; False where there are
        none.
    ready : callable, optional
        Whether a waiting sequence has all but pages to run; asked in the order of turns. Those behind one
        that hasn't may run before it.
    begin : callable, optional
        Gives a page of a sequence, by its number there, the keys and values of places that it begins with.
    """

    def __init__(
        self,
        pool: PagePool,
        page_tokens: int,
        step_tokens: int,
        max_sequences: int,
        shares_prefixes: bool = True,
        swap: Swap | None = None,
        reclaim: Callable[[], bool] = lambda: False,
        ready: Callable[[Sequence], bool] = lambda sequence: True,
        begin: Callable[[Sequence, int, int], None] = lambda sequence, number, page: None,
    ) -> None:
        self.pool, self.page_tokens = pool, page_tokens
        self.step_tokens, self.max_sequences = step_tokens, min(max_sequences, step_tokens)
        self.shares_prefixes, self.swap = shares_prefixes, swap
        self._reclaim, self._ready, self._begin = reclaim, ready, begin
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._served: dict[str, float] = {}

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait. A tenant who was away gets no credit for it."""
        self._join(sequence.request.tenant)
        self.waiting.append(sequence)

    def _join(self, tenant: str) -> None:
        present = {other.request.tenant for other in (*self.waiting, *self.running)}
        if tenant not in present:
            least = min((self._served.get(other, 0.0) for other in present), default=0.0)
            self._served[tenant] = max(self._served.get(tenant, 0.0), least)
        if not present:
            self._served = {tenant: self._served[tenant]}

    @property
    def has_place(self) -> bool:
        """Whether one more sequence may run."""
        return len(self.running) < self.max_sequences

    def fork(self, sequence: Sequence) -> None:
        """Let a sequence run at once; it has its pages already."""
        self.running.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, which ended or was cancelled, and release its pages."""
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.pages)
        sequence.pages = []

    def next_step(
        self, draft: Callable[[list[Sequence], int], Mapping[Sequence, Guess]] | None = None
    ) -> list[Piece]:
        """The pieces that are read now, with pages for all of them; empty when there is nothing to do.

        Parameters
        ----------
        draft : callable, optional
            Guesses at most so many tokens that follow these sequences, which all write.
        """
        room, pieces = self.step_tokens, []
        self.pool.wanted = 0  # whoever waits says so again
        writing = [sequence for sequence in self.running if sequence.pending == 1]
        spare = max(0, room - len(writing) - sum(s.pending > 1 for s in self.running) - bool(self.waiting))
        ready = [
            sequence
            for sequence in sorted(writing, key=_urgency)
            # it may have given its pages to one before it
            if sequence in self.running and self._reach(sequence, len(sequence.tokens))
        ]
        guesses = draft(ready, spare) if draft is not None and ready and spare > 0 else {}
        for sequence in ready:
            guess = guesses.get(sequence, NOTHING).first(spare)
            if len(guess) and not self.has_room(sequence, len(sequence.tokens) + len(guess)):
                guess = NOTHING
            spare -= len(guess)
            pieces.append(Piece(sequence, sequence.computed, 1, guess.tokens, guess.parents))
            room -= 1 + len(guess)
        for sequence in sorted((s for s in self.running if s.pending > 1), key=_urgency):
            count = min(room, sequence.pending)
            if count == 0:
                break
            if sequence in self.running and self._reach(sequence, sequence.computed + count):
                pieces.append(Piece(sequence, sequence.computed, count))
                room -= count
        pieces = [piece for piece in pieces if piece.sequence in self.running]
        for sequence in sorted(self.waiting, key=self._turn):
            if room == 0 or not self.has_place:
                break
            if not self._ready(sequence):
                continue
            if not self._admit(sequence):
                break
            count = min(room, sequence.pending)
            pieces.append(Piece(sequence, sequence.computed, count))
            room -= count
        resting = [sequence for sequence in self.running if not sequence.pending]
        if not pieces and self.waiting and resting:
            self._preempt(max(resting, key=_urgency))
            return self.next_step(draft)
        for piece in pieces:
            self._serve(piece.sequence.request.tenant, piece.count, piece.chooses)
        return pieces

    def done(self, piece: Piece, accepted: int = 0) -> None:
        """What was read is in the pages: the piece's own tokens, and so many of its drafts."""
        sequence = piece.sequence
        sequence.computed = piece.start + piece.count + accepted
        if self.shares_prefixes:
            known = sequence.computed // self.page_tokens
            had = piece.start // self.page_tokens
            keys = sequence.keys_of_full_pages(self.page_tokens, sequence.computed)
            for number in range(had, known):
                self.pool.publish(sequence.pages[number], keys[number])

    def _turn(self, sequence: Sequence) -> tuple[int, float, int, int]:
        served = self._served.get(sequence.request.tenant, 0.0)
        return sequence.request.priority, served, sequence.arrival, sequence.index

    def _serve(self, tenant: str, tokens: int, chooses: bool) -> None:
        self._served[tenant] = self._served.get(tenant, 0.0) + tokens + (OUTPUT_WEIGHT if chooses else 0)

    def _admit(self, sequence: Sequence) -> bool:
        """Let a waiting sequence run if all its tokens, and one more, find pages without taking anybody's."""
        keys: list[bytes] = []
        if self.shares_prefixes:
            # at least the last token is read, for what follows it
            keys = sequence.keys_of_full_pages(self.page_tokens, len(sequence.tokens) - 1)
        found = self.pool.find(keys)
        needed = self._pages_of(len(sequence.tokens) + 1) - len(found)
        while needed > self.pool.available - self.pool.wanted:
            if not self._reclaim():
                self.pool.release(found)
                return False
        self._bring_back(sequence, found, keys)
        sequence.pages, sequence.computed = found, len(found) * self.page_tokens
        taken = self.pool.take(self._pages_of(len(sequence.tokens)) - len(found))
        if taken is None:  # an adapter was given them meanwhile
            self._release(sequence)
            sequence.computed = 0
            return False
        sequence.pages += taken
        had = sequence.computed // self.page_tokens
        for number in range(had, self._pages_of(sequence.begun)):  # mostly the one that isn't full
            self._begin(sequence, number, sequence.pages[number])
        sequence.computed = max(sequence.computed, sequence.begun)
        if sequence.cached is None:
            sequence.cached = sequence.computed - sequence.begun
        self.waiting.remove(sequence)
        self.running.append(sequence)
        return True

    def _bring_back(self, sequence: Sequence, found: list[int], keys: list[bytes]) -> None:
        """Add to `found` the pages with the next keys, up to the first that is nowhere.

        They are what a sequence begins with, or in the pool, or in swap.
        """
        while len(found) < len(keys):
            number = len(found)
            begins = (number + 1) * self.page_tokens <= sequence.begun
            if not begins and (self.swap is None or not self.swap.wants(keys[number])):
                return
            taken = self.pool.take(1)
            if taken is None:  # an adapter was given them meanwhile
                return
            if begins:
                self._begin(sequence, number, taken[0])
            elif self.swap is None or not self.swap.bring(keys[number], taken[0]):
                self.pool.release(taken)
                return
            self.pool.publish(taken[0], keys[number])
            found += taken
            found += self.pool.find(keys[number + 1 :])

    def _pages_of(self, tokens: int) -> int:
        return -(-tokens // self.page_tokens)

    def has_room(self, sequence: Sequence, tokens: int) -> bool:
        """Whether so many tokens have pages, or get them without taking anybody's."""
        needed = self._pages_of(tokens) - len(sequence.pages)
        taken = self.pool.take(max(0, needed))
        if taken is None:
            return False
        sequence.pages += taken
        return True

    def _reach(self, sequence: Sequence, tokens: int) -> bool:
        """Pages for so many tokens, from those who are less urgent if need be; False: it gave up its own."""
        while not self.has_room(sequence, tokens):
            if self._reclaim():
                continue
            last = max(self.running, key=_urgency)
            self._preempt(last)
            if last is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        if sequence.pending:  # one that rests is added again when it knows what follows
            self.waiting.append(sequence)
        self._release(sequence)
        sequence.computed = 0
        self.preemptions += 1
        self.running.remove(sequence)


def _urgency(sequence: Sequence) -> tuple[int, int, int]:
    """Rising with how soon a running sequence would be preempted."""
    return sequence.request.priority, sequence.arrival, sequence.index
