"""Lets a new version of an adapter in only where it is no worse than the one that is served."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tailorbird.errors import GateRefused
from tailorbird.kernels.adapters import LaidOut
from tailorbird.serve.adapters.store import AdapterStore


@dataclass(frozen=True)
class Published:
    """A version that was let in.

    Attributes
    ----------
    name : str
    version : int
    loss : float
        Of the new version, in the unit of who measured it.
    loss_before : float or None
        Of the version that it replaces; None if there was none.
    """

    name: str
    version: int
    loss: float
    loss_before: float | None


def publish(
    store: AdapterStore, name: str, path: str | Path, evaluate: Callable[[LaidOut], float]
) -> Published:
    """Serve a new version under a name if its loss is at most that of the version served now.

    The version before stays for `AdapterStore.rollback`. Should the name change while losses are measured,
    the new version is compared with what is served then.

    Parameters
    ----------
    store : AdapterStore
    name : str
    path : str or Path
        Directory of the new version.
    evaluate : callable
        Gives an adapter's loss on held-out text; called with no lock held, both versions pinned.

    Raises
    ------
    GateRefused
        The new version's loss is higher, or isn't finite; nothing has changed.
    SettingsError, CheckpointError, ResourceError
        As of `AdapterStore.register` and `AdapterStore.acquire`.
    """
    new = store.stage(name, path)
    try:
        loss = evaluate(new.adapter)
        while True:
            served, before = _served(store, name, evaluate)
            if not math.isfinite(loss) or (before is not None and loss > before):
                raise GateRefused(
                    f"the new version of adapter `{name}` in {path} has a loss of {loss:.6g}",
                    "a finite loss" if before is None else f"at most {before:.6g}, that of version {served}",
                    "train it further, or on other data; the version before is still served",
                )
            if store.serve(new, instead_of=served):
                return Published(name, new.version, loss, before)
    finally:
        store.release(new)


def _served(
    store: AdapterStore, name: str, evaluate: Callable[[LaidOut], float]
) -> tuple[int | None, float | None]:
    """Number and loss of the version that is served; None where there is none."""
    if name not in store.names():
        return None, None
    old = store.acquire(name)
    try:
        return old.version, evaluate(old.adapter)
    finally:
        store.release(old)
