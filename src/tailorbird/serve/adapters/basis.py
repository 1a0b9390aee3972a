"""Adapters in a basis that they share (https://arxiv.org/abs/2407.00066): each has small cores of its own.

    y = W x + B (C (A x)) + bias

A and B of every linear stand in one file beside the adapters' directories, are in memory once for all of
them, and are read from caches when many of them run in a batch. `share` writes them.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import ClassVar
from weakref import WeakValueDictionary

from tailorbird.errors import CheckpointError
from tailorbird.kernels.adapters import BasisPart, LinearAdapter
from tailorbird.model.weights import Weights
from tailorbird.run.parts import PlacedLinear, linear_shape
from tailorbird.serve.adapters.source import Shapes, Source, within

#: How the config calls this kind, and the tensor that each linear has.
PEFT_TYPE, CORE = "SHARED_BASIS", "shared_core"


_parts: WeakValueDictionary[tuple[str, str], BasisPart] = WeakValueDictionary()
_lock = threading.Lock()


class SharedBasis:
    """An adapter of type ``SHARED_BASIS``; parameters, attributes and errors as of `lora.Lora`."""

    settings: ClassVar[frozenset[str]] = frozenset({"r", "basis", "basis_digest"})

    def __init__(self, source: Source) -> None:
        self.source = source
        rank = source.whole("r", 1)

        def expected(path: str, linear: PlacedLinear) -> Shapes:
            return {CORE: (rank, rank)}

        self.adapted = source.check(expected)
        self._basis = self._open()
        self._refuse_another(rank)

    def linear(self, path: str) -> LinearAdapter:
        """What it makes of the linear at `path`; all adapters with this basis get the same A and B."""
        part = self._part(path)
        bias = self.source.bias(path) if path in self.source.stored_biases else None
        return LinearAdapter(part.down, part, bias=bias, core=self.source.read(path, CORE).float())

    def _open(self) -> Weights:
        """The basis' file, which lies beside the adapter's directory."""
        name, digest = self.source.config.get("basis"), self.source.config.get("basis_digest")
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise self.source.refuse_setting("basis", "the name of a safetensors file beside the directory")
        folder = self.source.directory.parent
        weights = Weights.open_file(within(folder / name, folder))
        if weights.header_digest != digest:
            raise CheckpointError(
                f"{folder / name} is another basis than that of {self.source.directory.name}",
                "the file that was written with this adapter",
                "copy a basis and its adapters together, or share the adapters anew",
            )
        return weights

    def _refuse_another(self, rank: int) -> None:
        """Raise CheckpointError unless the basis has what the adapted linears need."""
        for path, placed in self.adapted.items():
            out_features, in_features = linear_shape(placed.module)
            for part, shape in (("up", (out_features, rank)), ("down", (rank, in_features))):
                name = f"{path}.{part}"
                found = self._basis.info(name).shape if name in self._basis else None
                if found != shape:
                    raise CheckpointError(
                        f"{self._basis.files[0]}: tensor `{name}` is {found and list(found)}",
                        f"{list(shape)}",
                        "check that the adapters were made for this model",
                    )

    def _part(self, path: str) -> BasisPart:
        key = self._basis.header_digest, path  # the header has the hashes of all tensors
        with _lock:
            part = _parts.get(key)
            if part is None:
                up, down = (self._basis.read(f"{path}.{name}") for name in ("up", "down"))
                part = _parts[key] = BasisPart(up, down, key)
            return part
