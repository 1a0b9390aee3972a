"""The kinds of adapters that can be served, by the names in their configs: each a file, and a line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from tailorbird.errors import SettingsError
from tailorbird.formats.peft import BEGINNINGS, CONFIG_FILE, PREFIX_TUNING, PROMPT_TUNING
from tailorbird.kernels.adapters import LinearAdapter
from tailorbird.run.parts import PlacedLinear
from tailorbird.serve.adapters.basis import PEFT_TYPE, SharedBasis
from tailorbird.serve.adapters.beginnings import Learned, PrefixTuning, PromptTuning, TextModel
from tailorbird.serve.adapters.folded import Folds
from tailorbird.serve.adapters.ia3 import IA3
from tailorbird.serve.adapters.lora import Lora
from tailorbird.serve.adapters.source import Source
from tailorbird.serve.adapters.vera import Vera


class Kind(Protocol):
    """An adapter whose config and headers fit the model; made from a `Source`.

    Attributes
    ----------
    source : Source
    adapted : dict of str to PlacedLinear
        Linears for which the file has tensors of this kind, by module path.
    """

    source: Source
    adapted: dict[str, PlacedLinear]

    def linear(self, path: str) -> LinearAdapter:
        """What it makes of one of `adapted`, read from the file."""


_CLASSES: dict[str, tuple[frozenset[str], Callable[[Source], Kind]]] = {
    "LORA": (Lora.settings, Lora),
    "VERA": (Vera.settings, Vera),
    "IA3": (IA3.settings, IA3),
    PEFT_TYPE: (SharedBasis.settings, SharedBasis),
}
_BEGINNINGS: dict[str, tuple[frozenset[str], Callable[[Source, TextModel, int], Learned]]] = {
    PROMPT_TUNING: (PromptTuning.settings, PromptTuning),
    PREFIX_TUNING: (PrefixTuning.settings, PrefixTuning),
}
#: Names of the kinds that change linears: PEFT's, and that of adapters in a shared basis.
KINDS = tuple(_CLASSES)


class Model(TextModel, Protocol):
    """What is asked of a model that adapters are opened for; `FusedModel` and `PagedModel` have it."""

    @property
    def linears(self) -> Mapping[str, PlacedLinear]:
        """All linears of the blocks by the paths of their modules."""


def open_served(
    directory: str | Path,
    model: Model,
    longest: int,
    allowed: Path | None = None,
    folds: Folds | None = None,
) -> Kind | Learned:
    """Open an adapter that PEFT saved, of any kind that can be served; nothing but headers is read.

    Parameters
    ----------
    directory, allowed
        As of `open_adapter`.
    model : FusedModel or PagedModel
    longest : int
        Most tokens of a text, with the places that it begins with.
    folds : Folds, optional
        Of the checkpoint.

    Raises
    ------
    SettingsError, CheckpointError
        As of `open_adapter`; or the adapter belongs to what a checkpoint was before it was folded, and can't
        be scaled to fit.
    """
    source = Source.open(Path(directory), model.linears, allowed)
    name = source.config.get("peft_type")
    if not isinstance(name, str) or name not in _BEGINNINGS:
        opened = _of_linears(source, (*KINDS, *_BEGINNINGS))
        if folds is not None:
            folds.needed(source, opened.adapted)
        return opened
    settings, make = _BEGINNINGS[name]
    source.refuse_others(settings)
    learned = make(source, model, longest)
    if folds is not None:
        learned.refuse_folds(folds)
    return learned


def open_adapter(
    directory: str | Path, linears: Mapping[str, PlacedLinear], allowed: Path | None = None
) -> Kind:
    """Open an adapter of linears that PEFT saved, and check it against the model without reading a tensor.

    Parameters
    ----------
    directory : str or Path
        With adapter_config.json and adapter_model.safetensors.
    linears : mapping of str to PlacedLinear
        Of the model (`linears` of `FusedModel` or `PagedModel`).
    allowed : Path, optional
        The directory must lie below this one, links followed.

    Raises
    ------
    SettingsError
        A kind or setting that can't be served, or a path that leads out of `allowed`.
    CheckpointError
        Files are missing, damaged or pickled; tensors are missing, fit nothing in the model, or have the
        wrong shape.
    """
    source = Source.open(Path(directory), linears, allowed)
    name = source.config.get("peft_type")
    if isinstance(name, str) and name in BEGINNINGS:
        raise SettingsError(
            f"{source.directory / CONFIG_FILE}: `peft_type` is '{name}', {BEGINNINGS[name]}",
            "an adapter of linears: one of " + ", ".join(KINDS),
            "serve this one as it is",
        )
    return _of_linears(source, KINDS)


def _of_linears(source: Source, kinds: Sequence[str]) -> Kind:
    """What a directory holds, if it changes linears; errors tell of `kinds`."""
    name = source.config.get("peft_type")
    if not isinstance(name, str) or name not in _CLASSES:
        raise SettingsError(
            f"{source.directory / CONFIG_FILE}: `peft_type` is {str(name)[:100]!r}",
            "one of " + ", ".join(kinds),
            "serve an adapter of one of these kinds, or merge this one into a checkpoint",
        )
    settings, make = _CLASSES[name]
    source.refuse_others(settings)
    return make(source)


def read_linears(adapter: Kind, folds: Folds | None = None) -> dict[tuple[int, str], LinearAdapter]:
    """What an adapter makes of each linear by (block, role), for `adapter` of a model.

    Parameters
    ----------
    adapter : Kind
    folds : Folds, optional
        Of the checkpoint; an adapter that was trained on its source is scaled to fit.

    Raises
    ------
    SettingsError
        As `Folds.needed`.
    CheckpointError
        A tensor isn't finite, or a file changed since it was opened.
    """
    source = adapter.source
    found = {path: adapter.linear(path) for path in adapter.adapted}
    if folds is not None and folds.needed(source, adapter.adapted):
        found = {path: folds.applied(path, linear) for path, linear in found.items()}
    for path in source.stored_biases.keys() - found.keys():
        found[path] = LinearAdapter(bias=source.bias(path))
    source.refuse_change()
    places = source.linears
    return {(places[path].block, places[path].role): linear for path, linear in found.items()}
