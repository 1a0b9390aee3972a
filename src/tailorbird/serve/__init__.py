"""Serving: the engine, its scheduler, adapters in a batch, the HTTP API."""

from tailorbird.callable_module import make_callable

make_callable(__name__)
