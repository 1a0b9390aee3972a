"""Makes a neural network that somebody else trained fit a memory budget.

The calls mirror the commands: `fit`, `compress`, `compare`, `evaluate`, `speed`, `generate`, `tune`, `draft`,
`serve`, `batch`, `export`, `methods`, `formats`, `probe`, `merge_adapter` for ``adapters merge``, and `load`
for what they made.
After this import, transformers' own ``AutoModelForCausalLM.from_pretrained`` loads it too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tailorbird.model.registration import register_on_import

if TYPE_CHECKING:
    from tailorbird.api import (
        batch,
        compare,
        compress,
        draft,
        evaluate,
        export,
        fit,
        formats,
        generate,
        merge_adapter,
        methods,
        probe,
        serve,
        speed,
        tune,
    )
    from tailorbird.model.load import load

__version__ = "0.1.0"
__all__ = [
    "batch",
    "compare",
    "compress",
    "draft",
    "evaluate",
    "export",
    "fit",
    "formats",
    "generate",
    "load",
    "merge_adapter",
    "methods",
    "probe",
    "serve",
    "speed",
    "tune",
]

register_on_import()


def __getattr__(name: str) -> Any:
    """Import a call when it is first used: the package itself loads neither torch nor transformers."""
    if name == "load":
        from tailorbird.model.load import load

        return load
    if name in __all__:
        from tailorbird import api

        return getattr(api, name)
    raise AttributeError(f"module `tailorbird` has no attribute `{name}`")
