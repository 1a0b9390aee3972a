"""Named adapters of one model: in directories, laid out in memory, or in use by requests.

A name has a version that is served and, once that replaced another, the one before it. A version is cold (a
directory whose config and headers fit the model), warm (laid out, and dropped again when others need the
room) or pinned (held by requests that run, and never dropped). Requests keep the version that they began
with until they end, whatever becomes of its name.
"""

from __future__ import annotations

import re
import secrets
import threading
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from tailorbird.errors import ResourceError, SettingsError, UnknownAdapter
from tailorbird.kernels.adapters import LaidOut, LinearAdapter
from tailorbird.run.parts import PlacedLinear
from tailorbird.serve.adapters.kinds import open_adapter, read_linears
from tailorbird.serve.adapters.source import changed
from tailorbird.serve.adapters.versions import Record, read_records, write_records

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,199}")
_SALT_BYTES = 16


class Model(Protocol):
    """What a store asks of a model; `FusedModel` and `PagedModel` have it."""

    @property
    def linears(self) -> Mapping[str, PlacedLinear]:
        """All linears of the blocks by the paths of their modules."""

    def adapter(self, linears: Mapping[tuple[int, str], LinearAdapter]) -> LaidOut:
        """An adapter laid out for the model, from what it makes of linears by (block, role)."""


class NoRoom(ResourceError):
    """Adapters that running requests hold leave no room for another; it may fit once some have ended."""


@dataclass(eq=False)
class _Version:
    """A version of a name, and what is in memory of it."""

    name: str
    record: Record
    #: what it takes in memory; until it was laid out once, what its file has
    nbytes: int
    salt: bytes = field(default_factory=lambda: secrets.token_bytes(_SALT_BYTES))
    adapter: LaidOut | None = None
    loading: Future[LaidOut] | None = None
    pins: int = 0
    #: it is served, or the one before that
    kept: bool = True


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
        For segments of a batch.
    """

    name: str
    version: int
    salt: bytes
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
        Adapters must lie below this directory, links followed.
    state : Path, optional
        A file in which names and versions outlive the process; what it holds is registered at once, and
        read when it is needed.

    Raises
    ------
    CheckpointError
        `state` is damaged.
    """

    def __init__(
        self, model: Model, warm_bytes: int, allowed: Path | None = None, state: Path | None = None
    ) -> None:
        self._model, self._warm_bytes, self._allowed, self._state = model, warm_bytes, allowed, state
        self._lock = threading.Lock()
        self._saving = threading.Lock()  # held while the state file is written, so that the last change wins
        self._names: dict[str, list[_Version]] = {}  # the one that is served, then the one before
        self._warm: OrderedDict[_Version, None] = OrderedDict()  # the least recently used first
        self._handles: set[Handle] = set()
        self._background = ThreadPoolExecutor(1, thread_name_prefix="adapters")
        self._last = 0
        if state is not None:
            self._last, records = read_records(state)
            self._names = {name: [_Version(name, r, 0) for r in found] for name, found in records.items()}

    def register(self, name: str, path: str | Path) -> int:
        """Serve the adapter in a directory under a name, from now on, in place of any that has it.

        Config and headers are read and checked; tensors are read when they are needed.

        Parameters
        ----------
        name : str
            Up to 200 letters, digits and ``._:/@+-``, a letter or digit first.
        path : str or Path

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
        version = self._checked(name, path)
        with self._lock:
            self._install(version)
        self._save()
        return version.record.number

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

    def prefetch(self, name: str) -> Future[None]:
        """Lay an adapter out in a background thread, so that `acquire` finds it, unless others need the room.

        What fails is tried again, and told, by `acquire`.

        Returns
        -------
        Future
            Done when the adapter is laid out, or can't be.

        Raises
        ------
        SettingsError
            The name is unknown.
        """
        with self._lock:
            version = self._served(name)
        return self._background.submit(self._fetch, version)

    def names(self) -> list[str]:
        """All names, sorted."""
        with self._lock:
            return sorted(self._names)

    def version(self, name: str) -> int:
        """Number of the version that is served; UnknownAdapter if the name is unknown."""
        with self._lock:
            return self._served(name).record.number

    @property
    def bytes(self) -> int:
        """Bytes of all adapters that are laid out."""
        with self._lock:
            return sum(version.nbytes for version in self._warm)

    def stage(self, name: str, path: str | Path) -> Handle:
        """Check, lay out and pin an adapter that isn't served yet; errors as of `register` and `acquire`.

        Unless `serve` is given it, it is gone when it is released.
        """
        version = self._checked(name, path)
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

    def _checked(self, name: str, path: str | Path) -> _Version:
        """A new version, once its files and the model are known to fit."""
        if not _NAME.fullmatch(name):
            raise SettingsError(
                f"an adapter called {name[:300]!r}",
                "up to 200 letters, digits and ._:/@+- of which the first is a letter or digit",
                "choose another name",
            )
        source = open_adapter(path, self._model.linears, self._allowed).source
        size = source.weights.total_bytes
        if size > self._warm_bytes:
            raise ResourceError(
                f"the adapter in {source.directory} has {size} bytes",
                f"at most the {self._warm_bytes} bytes that all adapters together may take",
                "give adapters more memory, or train one of lower rank",
            )
        with self._lock:
            self._last += 1
            return _Version(name, Record(self._last, str(source.directory), source.fingerprint), size)

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
        """Forget versions, with the lock held; those in use when they are released."""
        for version in versions:
            version.kept = False
            if not version.pins:
                self._drop(version)

    def _unpin(self, version: _Version) -> None:
        """With the lock held."""
        version.pins -= 1
        if version.pins:
            return
        if not version.kept:
            self._drop(version)
        elif version in self._warm:
            self._warm.move_to_end(version)  # in use until now

    def _drop(self, version: _Version) -> None:
        """Give its memory back, with the lock held."""
        version.adapter = None
        self._warm.pop(version, None)

    def _pinned(self, version: _Version) -> Handle:
        """A handle of a version that was pinned for it."""
        try:
            adapter = self._laid_out(version)
        except BaseException:
            with self._lock:
                self._unpin(version)
            raise
        handle = Handle(version.name, version.record.number, version.salt, adapter, version)
        with self._lock:
            self._handles.add(handle)
        return handle

    def _fetch(self, version: _Version) -> None:
        self._laid_out(version)

    def _laid_out(self, version: _Version) -> LaidOut:
        """The adapter of a version, read by one thread for all that ask."""
        with self._lock:
            if version.adapter is not None:
                self._warm.move_to_end(version)
                return version.adapter
            reading = version.loading
            if reading is None:
                self._refuse_without_room(version)
                mine: Future[LaidOut] = Future()
                version.loading = mine
        if reading is not None:
            return reading.result()
        try:
            adapter = self._read(version)
            with self._lock:
                self._admit(version, adapter)
                version.loading = None
        except BaseException as error:
            with self._lock:
                version.loading = None
            mine.set_exception(error)
            raise
        mine.set_result(adapter)
        return adapter

    def _read(self, version: _Version) -> LaidOut:
        opened = open_adapter(version.record.path, self._model.linears, self._allowed)
        if opened.source.fingerprint != version.record.fingerprint:
            raise changed(opened.source.directory)
        return self._model.adapter(read_linears(opened))

    def _admit(self, version: _Version, adapter: LaidOut) -> None:
        """Keep what was read, in the place of the least recently used, with the lock held."""
        version.nbytes = adapter.nbytes
        if not version.pins and not version.kept:
            return
        self._refuse_without_room(version)
        free = self._warm_bytes - sum(other.nbytes for other in self._warm)
        for other in [other for other in self._warm if not other.pins]:
            if free >= version.nbytes:
                break
            free += other.nbytes
            self._drop(other)
        version.adapter = adapter
        self._warm[version] = None

    def _refuse_without_room(self, version: _Version) -> None:
        """With the lock held."""
        used = sum(other.nbytes for other in self._warm if other.pins)
        if used + version.nbytes > self._warm_bytes:
            raise NoRoom(
                f"adapters in use take {used} of {self._warm_bytes} bytes, and `{version.name}` needs "
                f"{version.nbytes}",
                "room for every adapter that is in use at the same time",
                "try again when other requests have ended, or give adapters more memory",
            )

    def _save(self) -> None:
        if self._state is None:
            return
        with self._saving:
            with self._lock:
                last = self._last
                records = {name: [one.record for one in versions] for name, versions in self._names.items()}
            write_records(self._state, last, records)
