"""Lets a folder be called: `tailorbird.compress` is a package, and the call of the same name in `api`.

Importing a package's submodule binds it as an attribute of the package, over anything that the package
offers under that name; so the folders that share their name with a call become callable.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class CallableModule(ModuleType):
    """A module that passes its call on to the function of `api` with its own last name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call ``tailorbird.api.<name>``."""
        from tailorbird import api

        return getattr(api, self.__name__.rpartition(".")[2])(*args, **kwargs)


def make_callable(name: str) -> None:
    """Make the imported module `name` callable."""
    sys.modules[name].__class__ = CallableModule
