"""Makes transformers know tailorbird's checkpoints as soon as both are imported, in either order.

`import tailorbird` must not import transformers, which takes seconds. Where transformers' table of
quantizers is already there, ours is entered at once; else a finder waits at the head of
`sys.meta_path` until that module has been executed, enters ours, and takes itself away. What is
entered stands in `quantizer.py`.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

#: the module of transformers that holds the tables of quantizers
TABLES = "transformers.quantizers.auto"


def register_on_import() -> None:
    """Enter tailorbird's quantizer now if transformers has its tables, else right after they exist.

    May be called any number of times.
    """
    if TABLES in sys.modules:
        _enter()
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


def _enter() -> None:
    # Importing the module enters it. When that import is what brought transformers' tables in, the
    # module is found half made here and enters itself at its end.
    importlib.import_module("tailorbird.model.quantizer")


class _Waiting(importlib.abc.MetaPathFinder):
    """Finds nothing itself; wraps the loader that another finder gives for `TABLES`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != TABLES:
            return None
        for finder in sys.meta_path:
            if isinstance(finder, _Waiting):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Announcing(spec.loader)
                return spec
        return None


class _Announcing(importlib.abc.Loader):
    """Loads as `loader` does, and enters tailorbird's quantizer when the module is complete."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        module.__loader__ = self.loader
        self.loader.exec_module(module)
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Waiting)]
        _enter()
