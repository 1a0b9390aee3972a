"""Where tailorbird keeps what it may compute again: probes and sensitivities, nothing that is missed."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """Directory of the cache: ``$TAILORBIRD_CACHE``, else ``~/.cache/tailorbird``.

    It is not created here; whoever writes into it does that.
    """
    stated = os.environ.get("TAILORBIRD_CACHE")
    return Path(stated).expanduser() if stated else Path.home() / ".cache" / "tailorbird"
