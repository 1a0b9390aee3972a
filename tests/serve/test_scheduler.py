"""Schedules: whatever comes when, each text reads its own tokens from its own pages, and no page is lost.

The model here is a table: a page remembers for each slot which tokens it was read after. So a page of another
text, a stale one or a missing one shows at once.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from tailorbird.serve.guess.tree import Guess
from tailorbird.serve.page_pool import PagePool
from tailorbird.serve.request import Request
from tailorbird.serve.scheduler import Piece, Scheduler
from tailorbird.serve.sequence import Sequence

PAGE = 4
QUICK_SEEDS, SEEDS = 60, 3000


def next_token(tokens: list[int]) -> int:
    """What the model writes after some tokens; few values, so that prefixes and guesses occur."""
    return hash(tuple(tokens[-3:])) % 5


@dataclass
class TableEngine:
    """Steps over a model that is a table."""

    scheduler: Scheduler
    memory: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)
    finished: dict[str, list[int]] = field(default_factory=dict)

    def read(self, piece: Piece) -> None:
        """Write down what the slots hold now; everything before must be there."""
        sequence = piece.sequence
        tokens = [*sequence.tokens[: piece.start + piece.count], *piece.drafts]
        for at in range(piece.start):
            held = self.memory.get((sequence.pages[at // PAGE], at % PAGE))
            assert held == (hash(sequence.salt), *tokens[: at + 1]), "a key of another text"
        for at in range(piece.start, len(tokens)):
            self.memory[sequence.pages[at // PAGE], at % PAGE] = (hash(sequence.salt), *tokens[: at + 1])

    def step(self, guess: random.Random | None = None) -> list[Piece]:
        """One step; guesses are right or wrong by chance."""

        def draft(sequences: list[Sequence], most: int) -> dict[Sequence, Guess]:
            return {sequence: chain(sequence, most) for sequence in sequences}

        def chain(sequence: Sequence, most: int) -> Guess:
            count = min(most, sequence.request.max_tokens - sequence.written - 1, guess.randrange(4))  # type: ignore[union-attr]
            text, found = list(sequence.tokens), []
            for _ in range(count):
                found.append(next_token(text) if guess.random() < 0.7 else 9)  # type: ignore[union-attr]
                text.append(found[-1])
            return Guess(tuple(found))

        pieces = self.scheduler.next_step(draft if guess else None)
        assert sum(piece.count + len(piece.drafts) for piece in pieces) <= self.scheduler.step_tokens
        assert len({id(piece.sequence) for piece in pieces}) == len(pieces)
        for piece in pieces:
            self.read(piece)
        for piece in pieces:
            sequence, accepted = piece.sequence, 0
            if piece.chooses:
                sequence.tokens.append(next_token(sequence.tokens))
                while accepted < len(piece.drafts) and piece.drafts[accepted] == sequence.tokens[-1]:
                    sequence.tokens.append(next_token(sequence.tokens))
                    accepted += 1
            self.scheduler.done(piece, accepted)
            if sequence.written >= sequence.request.max_tokens:
                self.finished[sequence.request.id] = sequence.tokens
                self.scheduler.remove(sequence)
        return pieces


def sequence_of(request: Request, arrival: int) -> Sequence:
    return Sequence(request, 0, arrival, None, None, request.tenant.encode(), list(request.prompt))


def engine(pages: int, step_tokens: int = 12, most: int = 4, shares: bool = True) -> TableEngine:
    return TableEngine(Scheduler(PagePool(pages), PAGE, step_tokens, most, shares))


@pytest.mark.parametrize(
    "seed",
    [*range(QUICK_SEEDS), *(pytest.param(n, marks=pytest.mark.full) for n in range(QUICK_SEEDS, SEEDS))],
)
def test_random_schedules_write_what_each_text_would_alone(seed: int) -> None:
    rng = random.Random(seed)
    pages, shares = rng.choice([8, 12, 30]), rng.random() < 0.8
    run = engine(pages, rng.choice([3, 8, 20]), rng.choice([1, 3, 8]), shares)
    guess = rng if rng.random() < 0.5 else None
    openings = [[rng.randrange(5) for _ in range(rng.randrange(1, 16))] for _ in range(3)]
    requests, alive, cancelled = {}, {}, set()
    for number in range(25):
        prompt = [*rng.choice(openings), *(rng.randrange(5) for _ in range(rng.randrange(1, 5)))]
        most = rng.randrange(1, pages * PAGE - len(prompt) - 4)
        who, priority = rng.choice("ab"), rng.randrange(2)
        request = Request(str(number), tuple(prompt), most, tenant=who, priority=priority)
        requests[request.id] = request
        alive[request.id] = sequence_of(request, number)
        run.scheduler.add(alive[request.id])
        for _ in range(rng.randrange(4)):
            run.step(guess)
        if rng.random() < 0.15:
            victim = rng.choice(list(alive))
            if victim not in run.finished and victim not in cancelled:
                cancelled.add(victim)
                run.scheduler.remove(alive[victim])
    for _ in range(5000):
        if not run.step(guess):
            break
    assert not run.scheduler.waiting
    assert not run.scheduler.running
    assert run.scheduler.pool.used == 0
    assert set(run.finished) == set(requests) - cancelled
    for id, tokens in run.finished.items():
        alone = list(requests[id].prompt)
        while len(alone) < len(tokens):
            alone.append(next_token(alone))
        assert tokens == alone
        assert len(tokens) == len(requests[id].prompt) + requests[id].max_tokens


def test_a_long_prompt_stalls_nobody() -> None:
    run = engine(pages=60, step_tokens=8, most=4)
    for number in range(3):
        run.scheduler.add(sequence_of(Request(str(number), (number,), 40), number))
    run.step()
    run.scheduler.add(sequence_of(Request("long", tuple(range(5)) * 12, 4), 3))
    for _ in range(12):
        pieces = run.step()
        assert [piece.sequence.request.id for piece in pieces[:3]] == ["0", "1", "2"]
        assert sum(piece.count for piece in pieces) <= 8


def test_texts_that_begin_alike_read_their_beginning_once() -> None:
    run = engine(pages=60, step_tokens=40, most=8)
    prompt = tuple(range(5)) * 4
    run.scheduler.add(sequence_of(Request("first", (*prompt, 1), 1), 0))
    run.step()
    again, stranger = Request("again", (*prompt, 2), 1), Request("stranger", (*prompt, 2), 1, tenant="other")
    sequences = [sequence_of(again, 1), sequence_of(stranger, 2)]
    for sequence in sequences:
        run.scheduler.add(sequence)
    pieces = run.step()
    assert [piece.count for piece in pieces] == [1, 21]
    assert [sequence.cached for sequence in sequences] == [20, 0]


def test_urgent_texts_run_first_and_keep_their_pages() -> None:
    run = engine(pages=6, step_tokens=16, most=4)
    run.scheduler.add(sequence_of(Request("patient", (1, 2, 3), 20, priority=1), 0))
    run.step()
    run.scheduler.add(sequence_of(Request("urgent", (3, 2, 1), 20), 1))
    while "urgent" not in run.finished:
        run.step()
    assert run.scheduler.preemptions >= 1
    assert "patient" not in run.finished
    while run.step():
        pass
    assert set(run.finished) == {"patient", "urgent"}


def test_a_tenant_with_one_request_is_not_behind_all_of_anothers() -> None:
    run = engine(pages=40, step_tokens=8, most=1)
    for number in range(6):
        run.scheduler.add(sequence_of(Request(f"many {number}", (number % 5, 1), 3, tenant="many"), number))
    run.step()
    run.scheduler.add(sequence_of(Request("single", (4, 4), 3, tenant="single"), 99))
    while run.step():
        pass
    assert list(run.finished).index("single") == 1


def test_those_behind_one_that_is_not_ready_run_and_it_is_the_first_once_it_is() -> None:
    asked: list[str] = []
    lacking = {"1", "2"}

    def ready(sequence: Sequence) -> bool:
        asked.append(sequence.request.id)
        return sequence.request.id not in lacking

    run = TableEngine(Scheduler(PagePool(40), PAGE, 12, 2, ready=ready))
    for number in range(5):
        run.scheduler.add(sequence_of(Request(str(number), (number, 1), 2), number))
    assert [piece.sequence.request.id for piece in run.step()] == ["0", "3"]
    assert asked == ["0", "1", "2", "3"]  # in the order of turns, and none for which there is no place
    lacking.clear()
    run.step()
    assert [piece.sequence.request.id for piece in run.step()] == ["1", "2"]
