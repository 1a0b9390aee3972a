"""Named adapters of one model: in directories, laid out in memory, or in use by requests.

A name has a version that is served and, once that replaced another, the one before it. A version is cold (a
directory whose config and headers fit the model), warm (laid out, and dropped again when others need the
room) or pinned (held by requests that run, and never dropped). Requests that wait reserve the version that is
served when they come, and pin it when they run: they get that one, whatever becomes of its name.
"""

from __future__ import annotations

import re
import secrets
import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from tailorbird.errors import ResourceError, SettingsError, UnknownAdapter
from tailorbird.kernels.adapters import LaidOut, LinearAdapter
from tailorbird.serve.adapters import kinds
from tailorbird.serve.adapters.beginnings import Learned
from tailorbird.serve.adapters.folded import Folds
from tailorbird.serve.adapters.kinds import Kind, open_served, read_linears
from tailorbird.serve.adapters.room import AdapterRoom
from tailorbird.serve.adapters.rounded import rounded_bytes, rounded_linears
from tailorbird.serve.adapters.source import changed
from tailorbird.serve.adapters.versions import Record, read_records, write_records

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,199}")
_SALT_BYTES = 16


class Model(kinds.Model, Protocol):
    """What a store asks of a model; `FusedModel` and `PagedModel` have it."""

    def adapter(self, linears: Mapping[tuple[int, str], LinearAdapter]) -> LaidOut:
        """An adapter laid out for the model, from what it makes of linears by (block, role)."""


class NoRoom(ResourceError):
    """Adapters that running requests hold leave no room for another; it may fit once some have ended."""


@dataclass(eq=False)
class _Version:
    """A version of a name, and what is in memory of it."""

    name: str
    record: Record
    #: what it takes in memory, with what it shares; until it was laid out once, what its file tells
    nbytes: int
    #: as of `LaidOut`; nothing until it was laid out once
    shared: Mapping[Hashable, int] = field(default_factory=dict)
    salt: bytes = field(default_factory=lambda: secrets.token_bytes(_SALT_BYTES))
    adapter: LaidOut | None = None
    loading: Future[LaidOut] | None = None
    pins: int = 0
    reserved: int = 0
    #: it is served, or the one before that
    kept: bool = True


def _together(versions: Iterable[_Version]) -> int:
    """Bytes of versions in memory; what several share counts once."""
    own, shared = 0, dict[Hashable, int]()
    for version in versions:
        own += version.nbytes - sum(version.shared.values())
        shared |= version.shared
    return own + sum(shared.values())


@dataclass(frozen=True, eq=False)
class Reservation:
    """A version of an adapter that will be needed, laid out or not.

    Attributes
    ----------
    name, version, salt, invocation, places
        As of `Handle`.
    """

    name: str
    version: int
    salt: bytes
    invocation: tuple[int, ...] | None
    places: int
    _version: _Version = field(repr=False)


@dataclass(frozen=True, eq=False)
class Handle:
    """A pinned version of an adapter.

    Attributes
    ----------
    name : str
    version : int
        Rises with each version that a store is given; no two have the same.
    salt : bytes
        16 bytes that no other version has, for hashes of prefixes in a cache.
    adapter : LaidOut
        For segments of a batch; a `Beginning` where there are `places`.
    invocation : tuple of int or None
        Tokens that invoke it (`activation`).
    places : int
        With which it lets texts begin (`beginnings`).
    """

    name: str
    version: int
    salt: bytes
    invocation: tuple[int, ...] | None
    places: int
    adapter: LaidOut
    _version: _Version = field(repr=False)


class AdapterStore:
    """Adapters by name. All methods may be called from any thread; none holds the lock while it reads files.

    Parameters
    ----------
    model : FusedModel or PagedModel
        Or what has their `linears` and `adapter`.
    warm_bytes : int
        Most bytes of adapters that are laid out. While one is read it is there besides.
    allowed : Path, optional
        Adapters that aren't trusted must lie below this directory, links followed.
    state : Path, optional
        A file in which names and versions outlive the process; what it holds is registered at once, and
        read when it is needed.
    room : AdapterRoom, optional
        The memory that adapters share with others.
    folds : Folds, optional
        Of the model's checkpoint.
    bits : int, optional
        8: matrices are rounded to bytes (`rounded`); else they are as they are stored.
    longest : int
        Most tokens of a text, with the places that it begins with.

    Raises
    ------
    CheckpointError
        `state` is damaged.
    """

    def __init__(
        self,
        model: Model,
        warm_bytes: int,
        allowed: Path | None = None,
        state: Path | None = None,
        room: AdapterRoom | None = None,
        folds: Folds | None = None,
        bits: int | None = None,
        longest: int = 1 << 30,
    ) -> None:
        self._model, self._warm_bytes, self._allowed, self._state = model, warm_bytes, allowed, state
        self._room, self._folds, self._bits, self._longest = room, folds, bits, longest
        self._lock = threading.Lock()
        self._saving = threading.Lock()  # held while the state file is written, so that the last change wins
        self._names: dict[str, list[_Version]] = {}  # the one that is served, then the one before
        self._warm: OrderedDict[_Version, None] = OrderedDict()  # the least recently used first
        self._handles: set[Handle] = set()
        self._reservations: set[Reservation] = set()
        self._background = ThreadPoolExecutor(1, thread_name_prefix="adapters")
        self._last = 0
        if state is not None:
            self._last, records = read_records(state)
            self._names = {name: [_Version(name, r, 0) for r in found] for name, found in records.items()}

    def register(self, name: str, path: str | Path, trusted: bool = False) -> int:
        """Serve the adapter in a directory under a name, from now on, in place of any that has it.

        Where just these files are served under it already, nothing changes.

        Config and headers are read and checked; tensors are read when they are needed.

        Parameters
        ----------
        name : str
            Up to 200 letters, digits and ``._:/@+-``, a letter or digit first.
        path : str or Path
        trusted : bool
            It may lie anywhere, now and when it is read again.

        Returns
        -------
        int
            Number of the new version.

        Raises
        ------
        SettingsError
            The name can't be one, the kind or a setting of the adapter can't be served, or the path
            leads out of the allowed directory.
        CheckpointError
            Files are missing, damaged or pickled, or don't fit the model.
        ResourceError
            It is larger than all adapters together may be; or it is served, but the state file can't be
            written.
        """
        version = self._checked(name, path, trusted)
        with self._lock:
            known = self._names.get(name)
            if known is None or not known[0].record.same_files(version.record):
                self._install(version)
            number = self._names[name][0].record.number
        self._save()
        return number

    def unregister(self, name: str) -> None:
        """Forget a name and its versions; requests that run keep theirs. UnknownAdapter if it is unknown."""
        with self._lock:
            self._served(name)
            self._let_go(self._names.pop(name))
        self._save()

    def rollback(self, name: str) -> int:
        """Serve the version before the one that is served, which is forgotten.

        Returns
        -------
        int
            Number of the version that is served now.

        Raises
        ------
        SettingsError
            The name is unknown, or has no version before this one.
        """
        with self._lock:
            self._served(name)
            versions = self._names[name]
            if len(versions) < 2:
                raise SettingsError(
                    f"a rollback of adapter `{name}`, which has one version",
                    "an adapter that was replaced since it was registered or rolled back",
                    "register the directory of the version that is wanted",
                )
            self._names[name] = versions[1:]
            self._let_go(versions[:1])
            number = versions[1].record.number
        self._save()
        return number

    def acquire(self, name: str) -> Handle:
        """Pin the version of an adapter that is served, and lay it out where it isn't yet.

        Raises
        ------
        SettingsError
            The name is unknown.
        CheckpointError
            Its files are gone, damaged or not those that were registered.
        NoRoom
            Adapters in use leave no room for it.
        """
        with self._lock:
            version = self._served(name)
            version.pins += 1
        return self._pinned(version)

    def release(self, handle: Handle) -> None:
        """Unpin a version; ValueError if the handle was released already, or is another store's."""
        with self._lock:
            if handle not in self._handles:
                raise ValueError(f"a handle of `{handle.name}` that this store hasn't given, or has back")
            self._handles.remove(handle)
            self._unpin(handle._version)

    def reserve(self, name: str) -> Reservation:
        """Keep the version of an adapter that is served now for later; UnknownAdapter if there is none."""
        with self._lock:
            version = self._served(name)
            version.reserved += 1
            reservation = Reservation(
                name, version.record.number, version.salt, version.record.invocation, version.record.places,
                version,
            )  # fmt: skip
            self._reservations.add(reservation)
            return reservation

    def cancel(self, reservation: Reservation) -> None:
        """Need a version no longer; ValueError if it was cancelled or pinned, or is another store's."""
        with self._lock:
            self._give_up(reservation)

    def pin(self, reservation: Reservation) -> Handle | None:
        """Pin what was reserved if it is laid out, which ends the reservation; ValueError as of `cancel`."""
        with self._lock:
            version = reservation._version
            if version.adapter is None:
                return None
            version.pins += 1
            self._give_up(reservation)
        return self._pinned(version)

    def has_room(self, reservation: Reservation, spare: bool) -> bool:
        """Whether what was reserved is cold, nobody reads it, and it would find room (see `fetch`).

        Unless `spare`, texts that begin leave it that room until the next step, while it is read, too.
        """
        with self._lock:
            version = reservation._version
            if version.adapter is not None:
                return False
            unread = version.loading is None
            if version.nbytes > self._warm_bytes:
                return unread  # reading it tells so
            wanted = _together([*self._needed(spare), version])
            if wanted > self._warm_bytes:
                return False
            return (self._room is None or self._room.fits(wanted, insist=not spare)) and unread

    def fetch(self, reservation: Reservation, spare: bool) -> Future[None]:
        """Lay out in a background thread what was reserved, for `pin`.

        Parameters
        ----------
        reservation : Reservation
        spare : bool
            Others that are reserved keep their room; else they give it up where that is needed.

        Returns
        -------
        Future
            Done when the adapter is laid out; or fails, as `acquire` does.
        """
        return self._background.submit(self._fetch, reservation._version, spare)

    def names(self) -> list[str]:
        """All names, sorted."""
        with self._lock:
            return sorted(self._names)

    def version(self, name: str) -> int:
        """Number of the version that is served; UnknownAdapter if the name is unknown."""
        with self._lock:
            return self._served(name).record.number

    def places(self, name: str) -> int:
        """With how many places the version that is served lets texts begin; raises as `version`."""
        with self._lock:
            return self._served(name).record.places

    @property
    def bytes(self) -> int:
        """Bytes of all adapters that are laid out."""
        with self._lock:
            return self._warm_now

    def drop_oldest(self) -> bool:
        """Give back the memory of what nobody uses, and nobody has for longest; False where there is none."""
        with self._lock:
            return self._drop_oldest()

    def stage(self, name: str, path: str | Path) -> Handle:
        """Check, lay out and pin an adapter that isn't served yet; errors as of `register` and `acquire`.

        Unless `serve` is given it, it is gone when it is released.
        """
        version = self._checked(name, path, trusted=False)
        version.kept, version.pins = False, 1
        return self._pinned(version)

    def serve(self, handle: Handle, instead_of: int | None) -> bool:
        """Serve a staged version under its name, unless the name has changed meanwhile.

        Parameters
        ----------
        handle : Handle
            From `stage`; it stays pinned.
        instead_of : int or None
            Number of the version that must be served now; None if the name must be unknown.

        Returns
        -------
        bool
            Whether it is served.

        Raises
        ------
        ValueError
            The handle isn't that of a staged version, or was released.
        """
        with self._lock:
            if handle not in self._handles or handle._version.kept:
                raise ValueError(f"a handle of `{handle.name}` that isn't staged; expected one from `stage`")
            versions = self._names.get(handle.name)
            if (versions[0].record.number if versions else None) != instead_of:
                return False
            self._install(handle._version)
        self._save()
        return True

    def close(self) -> None:
        """Wait for what is read in the background, and begin no more."""
        self._background.shutdown(cancel_futures=True)

    def _checked(self, name: str, path: str | Path, trusted: bool) -> _Version:
        """A new version, once its files and the model are known to fit."""
        if not _NAME.fullmatch(name):
            raise SettingsError(
                f"an adapter called {name[:300]!r}",
                "up to 200 letters, digits and ._:/@+- of which the first is a letter or digit",
                "choose another name",
            )
        opened = self._opened(path, trusted)
        source = opened.source
        places = 0
        if isinstance(opened, Learned):
            size, places = opened.nbytes, opened.places
        else:
            size = source.weights.total_bytes if self._bits is None else rounded_bytes(source.weights)
        if size > self._warm_bytes:
            raise self._too_large(source.directory, size)
        with self._lock:
            self._last += 1
            record = Record(
                self._last, str(source.directory), source.fingerprint, trusted, source.invocation, places
            )
            return _Version(name, record, size)

    def _opened(self, path: str | Path, trusted: bool) -> Kind | Learned:
        allowed = None if trusted else self._allowed
        return open_served(path, self._model, self._longest, allowed, self._folds)

    def _served(self, name: str) -> _Version:
        """With the lock held."""
        if name not in self._names:
            raise UnknownAdapter(
                f"no adapter is called {name[:200]!r}",
                "the name of a registered one",
                "register it, or choose another",  # no list: not everybody may know others' names
            )
        return self._names[name][0]

    def _install(self, version: _Version) -> None:
        """With the lock held."""
        version.kept = True
        before = self._names.get(version.name, [])
        self._names[version.name] = [version, *before[:1]]
        self._let_go(before[1:])

    def _let_go(self, versions: list[_Version]) -> None:
        """Forget versions, with the lock held; those in use or reserved when they are released."""
        for version in versions:
            version.kept = False
            self._drop_unless_needed(version)

    def _give_up(self, reservation: Reservation) -> None:
        """With the lock held."""
        if reservation not in self._reservations:
            raise ValueError(f"a reservation of `{reservation.name}` that is over, or another store's")
        self._reservations.remove(reservation)
        reservation._version.reserved -= 1
        self._drop_unless_needed(reservation._version)

    def _unpin(self, version: _Version) -> None:
        """With the lock held."""
        version.pins -= 1
        if version in self._warm and not version.pins:
            self._warm.move_to_end(version)  # in use until now
        self._drop_unless_needed(version)

    def _drop_unless_needed(self, version: _Version) -> None:
        """With the lock held."""
        if not (version.kept or version.pins or version.reserved):
            self._drop(version)

    def _drop(self, version: _Version) -> None:
        """Give its memory back, with the lock held."""
        version.adapter = None
        if version in self._warm:
            del self._warm[version]
            self._holds(self._warm_now)

    def _drop_oldest(self, spare: bool = False) -> bool:
        """With the lock held; `spare` as in `fetch`. Those that are needed soon go last."""
        idle = [version for version in self._warm if not (version.pins or (spare and version.reserved))]
        if idle:
            self._drop(min(idle, key=lambda version: version.reserved > 0))
        return bool(idle)

    def _holds(self, nbytes: int) -> bool:
        """Let adapters have so much memory if they may, with the lock held."""
        return nbytes <= self._warm_bytes and (self._room is None or self._room.hold(nbytes))

    @property
    def _warm_now(self) -> int:
        return _together(self._warm)

    def _pinned(self, version: _Version) -> Handle:
        """A handle of a version that was pinned for it."""
        try:
            adapter = self._laid_out(version)
        except BaseException:
            with self._lock:
                self._unpin(version)
            raise
        record = version.record
        handle = Handle(
            version.name, record.number, version.salt, record.invocation, record.places, adapter, version
        )
        with self._lock:
            self._handles.add(handle)
        return handle

    def _fetch(self, version: _Version, spare: bool) -> None:
        self._laid_out(version, spare)

    def _laid_out(self, version: _Version, spare: bool = False) -> LaidOut:
        """The adapter of a version, read by one thread for all that ask; `spare` as in `fetch`."""
        while True:
            with self._lock:
                if version.adapter is not None:
                    self._warm.move_to_end(version)
                    return version.adapter
                reading = version.loading
                if reading is None:
                    self._refuse_without_room(version, spare)
                    mine: Future[LaidOut] = Future()
                    version.loading = mine
                    break
            try:
                return reading.result()
            except NoRoom:
                if spare:
                    raise
                # Perhaps whoever read it took spare room only.
        try:
            adapter = self._read(version)
            with self._lock:
                self._admit(version, adapter, spare)
                version.loading = None
        except BaseException as error:
            with self._lock:
                version.loading = None
            mine.set_exception(error)
            raise
        mine.set_result(adapter)
        return adapter

    def _read(self, version: _Version) -> LaidOut:
        record = version.record
        opened = self._opened(record.path, record.trusted)
        if opened.source.fingerprint != record.fingerprint:
            raise changed(opened.source.directory)
        if isinstance(opened, Learned):
            return opened.laid_out()
        linears = read_linears(opened, self._folds)
        return self._model.adapter(linears if self._bits is None else rounded_linears(linears))

    def _admit(self, version: _Version, adapter: LaidOut, spare: bool) -> None:
        """Keep what was read, in the place of the least recently used, with the lock held."""
        version.nbytes, version.shared = adapter.nbytes, adapter.shared
        if not (version.pins or version.kept or version.reserved):
            return
        self._refuse_without_room(version, spare)
        while not self._holds(_together([*self._warm, version])):
            if not self._drop_oldest(spare):
                raise self._no_room(version)
        version.adapter = adapter
        self._warm[version] = None

    def _needed(self, spare: bool) -> list[_Version]:
        """Those whose room can't be had, with the lock held; `spare` as in `fetch`."""
        return [other for other in self._warm if other.pins or (spare and other.reserved)]

    def _refuse_without_room(self, version: _Version, spare: bool) -> None:
        """With the lock held."""
        if version.nbytes > self._warm_bytes:
            raise self._too_large(version.record.path, version.nbytes)
        if _together([*self._needed(spare), version]) > self._warm_bytes:
            raise self._no_room(version)

    def _no_room(self, version: _Version) -> NoRoom:
        """With the lock held."""
        pinned = self._needed(spare=False)
        used = _together(pinned)
        return NoRoom(
            f"adapters in use take {used} of {self._warm_bytes} bytes, and `{version.name}` needs "
            f"{_together([*pinned, version]) - used}",
            "room for every adapter that is in use at the same time, beside the texts that are written",
            "try again when other requests have ended, or allow more memory",
        )

    def _too_large(self, directory: str | Path, size: int) -> ResourceError:
        return ResourceError(
            f"the adapter in {directory} has {size} bytes",
            f"at most the {self._warm_bytes} bytes that all adapters together may take",
            "allow more memory, or train a smaller one",
        )

    def _save(self) -> None:
        if self._state is None:
            return
        with self._saving:
            with self._lock:
                last = self._last
                records = {name: [one.record for one in versions] for name, versions in self._names.items()}
            write_records(self._state, last, records)
