"""Adapters of requests that wait: laid out ahead of their turn, pinned when they run.

A request is for the version that is served when it comes. Where adapters in use leave no room for its own, it
waits, and others go before it: as many as there are without an adapter, and at most `MOST_PASSES` with one,
because each of those may keep its adapter in use for longer. Nothing here waits but `settle`.
"""

from __future__ import annotations

from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass

from tailorbird.kernels.adapters import LaidOut
from tailorbird.serve.adapters.store import AdapterStore, Handle, NoRoom, Reservation

#: How many requests with adapters may run before one that was ahead of them and finds no room for its own.
MOST_PASSES = 64


@dataclass(eq=False)
class Ticket:
    """What a request has of its adapter.

    Attributes
    ----------
    reservation : Reservation
        Of the version that was served when the request came.
    handle : Handle or None
        Once it may run.
    ahead : bool
        It was tried to lay it out ahead of the request's turn.
    """

    reservation: Reservation
    handle: Handle | None = None
    ahead: bool = False

    @property
    def adapter(self) -> LaidOut:
        """For segments of a batch, of a request that may run."""
        assert self.handle is not None
        return self.handle.adapter


class Boarding:
    """Tickets of the requests of one engine, which uses it from one thread.

    Parameters
    ----------
    store : AdapterStore
    """

    def __init__(self, store: AdapterStore) -> None:
        self._store = store
        self._waiting: dict[Ticket, None] = {}
        self._next: Ticket | None = None  # the first that found its adapter cold; room is made for no other
        self._passes = 0
        self._reading: Future[None] | None = None  # for the next
        self._ahead: Future[None] | None = None

    def take(self, name: str) -> Ticket:
        """A ticket for the version that is served now; UnknownAdapter if the name is unknown."""
        ticket = Ticket(self._store.reserve(name))
        self._waiting[ticket] = None
        return ticket

    def give_back(self, ticket: Ticket) -> None:
        """A request ended, whether it ran or not."""
        if ticket.handle is not None:
            self._store.release(ticket.handle)
            return
        del self._waiting[ticket]
        self._store.cancel(ticket.reservation)
        if ticket is self._next:
            self._next = self._reading = None

    def ready(self, ticket: Ticket) -> bool:
        """Whether a request may run, its adapter pinned; asked in the order of turns.

        Raises
        ------
        CheckpointError, ResourceError
            As of `AdapterStore.acquire`, but never for want of room: it can't ever run.
        """
        if ticket.handle is not None:
            return True
        passing = self._next not in (None, ticket)
        if passing and self._passes >= MOST_PASSES:
            return False
        ticket.handle = self._store.pin(ticket.reservation)
        if ticket.handle is None:
            if not passing:
                self._read(ticket)
            return False
        del self._waiting[ticket]
        if passing:
            self._passes += 1
        else:
            self._next = self._reading = None
        return True

    def look_ahead(self) -> None:
        """Let one more adapter of those that wait be laid out, where that takes room from none of them."""
        if self._ahead is not None and not self._ahead.done():
            return
        self._ahead = None
        for ticket in self._waiting:
            if not ticket.ahead and self._store.has_room(ticket.reservation, spare=True):
                ticket.ahead = True
                self._ahead = self._store.fetch(ticket.reservation, spare=True)
                return

    def settle(self, seconds: float) -> None:
        """Wait until something that is being read is there, if anything is, but no longer than so long."""
        reading = [future for future in (self._reading, self._ahead) if future is not None]
        if reading:
            wait(reading, seconds, FIRST_COMPLETED)

    def _read(self, ticket: Ticket) -> None:
        """Let an adapter be laid out whose turn it is, as soon as there is room."""
        if self._next is None:
            self._next, self._passes = ticket, 0
        if self._reading is not None and self._reading.done():
            error, self._reading = self._reading.exception(), None
            if error is not None and not isinstance(error, NoRoom):
                raise error
        if self._store.has_room(ticket.reservation, spare=False) and self._reading is None:
            self._reading = self._store.fetch(ticket.reservation, spare=False)
