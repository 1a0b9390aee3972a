"""Perplexity, divergence and speed."""

from tailorbird.callable_module import make_callable

make_callable(__name__)
