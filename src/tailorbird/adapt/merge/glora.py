"""A GLoRA adapter, in PEFT's layout or as `tune` wrote it, as the change of each linear's weight and bias.

    T = W + W ⊙ A + B,    t = b + W C + D ⊙ b + E

Chavan et al. 2023, "One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning" (arXiv:2306.07967);
`adapt/methods/glora.py` says what the tensors are. The change of the weight is no product of low rank, as it
scales the weight itself: it is formed for some rows at a time, and never whole. `W` is the weight that the
model has, of a packed one what its codes stand for.

With `W' = diag(1/o) W diag(i)` for channels that were scaled, the adapter of the source becomes `A`,
`diag(1/o) B diag(i)`, `C / i`, `D` and `E / o`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from tailorbird.adapt.merge.files import (
    DTYPES,
    AdapterSettings,
    files_fingerprint,
    folded,
    read_config,
    refuse_tensors,
)
from tailorbird.adapt.methods.adapter import OWN_TYPE
from tailorbird.adapt.methods.glora import in_widest_forms
from tailorbird.formats.peft import PREFIX, WEIGHTS_FILE
from tailorbird.model.anatomy import Anatomy, LinearPlace
from tailorbird.model.checkpoint import Checkpoint
from tailorbird.model.weights import Weights

#: values of a change that are formed at once
TILE_VALUES = 1 << 20
#: settings that say which forms tensors have, which these say themselves
_UNDERSTOOD = frozenset({"r", "config_A_B", "config_C", "config_D_E", "init_weights", "bias", "method"})
_INSTEAD = "run it with PEFT"
#: ends the names of tensors that PEFT writes for forms that are nothing
_NOTHING = ".zeros"
#: of the draws, in the form of the method's own
_SEED = "seed"

#: `up` and `down` of a product
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Scaling:
    """The change of one linear; what isn't there changes nothing.

    Attributes
    ----------
    a, b : (Tensor[out_features, rank], Tensor[rank, in_features]) or None
    c : (Tensor[in_features, rank], Tensor[rank, 1]) or None
        This one and those below change the bias.
    d, e : Tensor[out_features] or None
    """

    a: Pair | None = None
    b: Pair | None = None
    c: Pair | None = None
    d: Tensor | None = None
    e: Tensor | None = None

    def moved(self, weight: Tensor) -> Tensor:
        """``W + W ⊙ A + B``."""
        moved = torch.empty_like(weight)
        for rows, delta in self._tiles(weight):
            torch.add(weight[rows], delta, out=moved[rows])
        return moved

    def moved_bias(self, weight: Tensor, bias: Tensor) -> Tensor | None:
        """``b + W C + D ⊙ b + E``."""
        shift = self._shift(weight, bias)
        return None if shift is None else bias + shift

    def output(self, x: Tensor, weight: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
        """``(W ⊙ A + B) x + W C + D ⊙ b + E``, ``[..., out_features]``."""
        own = weight()
        output = x.new_empty(*x.shape[:-1], len(own))
        for rows, delta in self._tiles(own):
            output[..., rows] = functional.linear(x, delta)
        shift = None if bias is None else self._shift(own, bias)
        return output if shift is None else output + shift

    def is_finite(self) -> bool:
        """Whether all factors and vectors are."""
        pairs = [one for pair in (self.a, self.b, self.c) if pair is not None for one in pair]
        vectors = [one for one in (self.d, self.e) if one is not None]
        return all(bool(one.isfinite().all()) for one in (*pairs, *vectors))

    def _tiles(self, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Some rows, and ``W ⊙ A + B`` for them."""
        step = max(1, TILE_VALUES // weight.shape[1])
        for start in range(0, len(weight), step):
            rows = slice(start, start + step)
            part = weight[rows]
            delta = torch.zeros_like(part) if self.a is None else part * (self.a[0][rows] @ self.a[1])
            yield rows, delta if self.b is None else delta.addmm_(self.b[0][rows], self.b[1])

    def _shift(self, weight: Tensor, bias: Tensor) -> Tensor | None:
        """``W C + D ⊙ b + E``; None where there is none of them."""
        parts = [
            None if self.c is None else (weight @ self.c[0] @ self.c[1])[:, 0],
            None if self.d is None else self.d * bias,
            self.e,
        ]
        there = [one for one in parts if one is not None]
        return sum(there[1:], there[0]) if there else None

    def folded(self, inputs: Tensor | None, outputs: Tensor | None) -> Scaling:
        """The same for a weight whose input and output channels were divided by these."""
        b, c, e = self.b, self.c, self.e
        if inputs is not None:
            b = None if b is None else (b[0], b[1] * inputs)
            c = None if c is None else (c[0] / inputs[:, None], c[1])
        if outputs is not None:
            b = None if b is None else (b[0] / outputs[:, None], b[1])
            e = None if e is None else e / outputs
        return Scaling(self.a, b, c, self.d, e)


@dataclass(frozen=True, eq=False)
class GloraAdapter:
    """An adapter whose config and headers fit a checkpoint; made by `GloraAdapter.open`.

    Attributes
    ----------
    directory : Path
    fingerprint : str
        SHA-256 over the bytes of both files, hex.
    """

    directory: Path
    fingerprint: str
    _weights: Weights
    _places: Mapping[str, LinearPlace]
    _stored: Mapping[str, Mapping[str, str]]
    _inputs: Mapping[str, Tensor]
    _outputs: Mapping[str, Tensor]

    @property
    def names(self) -> tuple[str, ...]:
        """The linears that it changes."""
        return tuple(self._stored)

    def change(self, name: str) -> Scaling | None:
        """The change of one linear, read from the file; None where it stays as it is."""
        if name not in self._stored:
            return None
        read = {own: self._weights.read(stored) for own, stored in self._stored[name].items()}
        forms = read.pop("forms", None)
        tensors = {own: tensor.float() for own, tensor in read.items()}
        if forms is not None:
            tensors = in_widest_forms(forms, tensors)
        found = _scaling(self._places[name], tensors)
        return found.folded(self._inputs.get(name), self._outputs.get(name))

    @classmethod
    def open(cls, directory: Path, checkpoint: Checkpoint, anatomy: Anatomy) -> GloraAdapter:
        """Read config and headers and hold them against the checkpoint; no tensor is read.

        Parameters
        ----------
        directory : Path
            With adapter_config.json and adapter_model.safetensors.
        checkpoint : Checkpoint
        anatomy : Anatomy
            Of that checkpoint.

        Raises
        ------
        SettingsError
            It learned more than GLoRA, or was made for another model.
        CheckpointError
            Files are missing, damaged or pickled, or tensors don't fit the model, such as those that change
            a bias that it doesn't have; names them.
        """
        settings = AdapterSettings(directory, read_config(directory))
        weights = Weights.open_file(directory / WEIGHTS_FILE)
        if settings.config.get("bias") not in (None, "none"):
            raise settings.refused("bias", "none: other biases of the model aren't merged", _INSTEAD)
        settings.refuse_others(_UNDERSTOOD, "which is more than GLoRA", _INSTEAD)
        settings.check_base(checkpoint)
        own_form = settings.config["peft_type"] == OWN_TYPE
        places = {place.name: place for place in anatomy.linears()}
        stored: dict[str, dict[str, str]] = {}
        problems: list[str] = []
        known = {name for name in weights.names if name == _SEED or name.endswith(_NOTHING)}
        for place in places.values():
            tensors = _tensors(place, weights, own_form)
            if tensors:
                problems += _problems(place, weights, tensors, own_form)
                stored[place.name] = tensors
                known |= set(tensors.values())
        expected = "A and B, and C, D and E where the model has a bias"
        refuse_tensors(weights, known if stored else (), problems, expected)
        inputs, outputs = folded(settings, checkpoint, anatomy, stored)
        fingerprint = files_fingerprint(directory)
        return cls(directory, fingerprint, weights, places, stored, inputs, outputs)


def _tensors(place: LinearPlace, weights: Weights, own_form: bool) -> dict[str, str]:
    """Names in the file of a linear's tensors, by what they are called there behind the linear's own name."""
    beginning = f"additions.{place.name.replace('.', '/')}." if own_form else f"{PREFIX}{place.name}."
    return {
        name.removeprefix(beginning): name
        for name in weights.names
        if name.startswith(beginning) and not name.endswith(_NOTHING)
    }


def _shapes(place: LinearPlace, rank: int, own_form: bool) -> dict[str, list[tuple[int, ...]]]:
    """The shapes that each of a linear's tensors may have."""
    rows, columns = place.out_features, place.in_features
    sizes = {"A": (rows, columns), "B": (rows, columns), "C": (columns, 1)}
    found: dict[str, list[tuple[int, ...]]] = {}
    if own_form:
        for name, (up, down) in sizes.items():
            found |= {f"{name.lower()}_up": [(up, rank)], f"{name.lower()}_down": [(rank, down)]}
        return found | {"d": [(rows,)], "e": [(rows,)], "forms": [(5,)]}
    for name, (up, down) in sizes.items():
        found |= {f"glora_{name}.Xd": [(up, rank)], f"glora_{name}.Xu": [(rank, down)]}
        found[f"glora_{name}.X"] = [(up, 1)] if name == "C" else [(up, 1), (1,)]
    return found | {f"glora_{name}.X": [(rows,), (1,)] for name in "DE"}


def _problems(
    place: LinearPlace, weights: Weights, tensors: Mapping[str, str], own_form: bool
) -> Iterator[str]:
    """What is wrong with a linear's tensors."""
    ups = [name for own, name in tensors.items() if own.endswith(("Xd", "_up"))]
    shapes = _shapes(place, weights.info(ups[0]).shape[-1] if ups else 1, own_form)
    for own, name in tensors.items():
        shape, dtype = weights.info(name).shape, weights.info(name).dtype
        if own not in shapes:
            yield f"`{name}` {list(shape)} is none of GLoRA's"
        elif not place.bias and _of_bias(own):
            yield f"`{name}` {list(shape)} changes a bias, which the linear doesn't have"
        elif shape not in shapes[own]:
            yield f"`{name}` is {list(shape)}, not " + " or ".join(str(list(one)) for one in shapes[own])
        elif dtype not in DTYPES and own != "forms":
            yield f"`{name}` is stored as {dtype}"
    if own_form:
        needed = {own for own in shapes if place.bias or not _of_bias(own)}
    else:
        halves = {own[:-1] for own in tensors if own.endswith(("Xd", "Xu"))}
        needed = {half + side for half in halves for side in "du"}
    for own in sorted(needed - tensors.keys()):
        yield f"`{own}` of `{place.name}` is missing"


def _of_bias(own: str) -> bool:
    """Whether a tensor changes the bias."""
    return own.removeprefix("glora_")[0] in "CDEcde"


def _scaling(place: LinearPlace, tensors: Mapping[str, Tensor]) -> Scaling:
    """The change of tensors in PEFT's layout, float32."""
    rows, columns = place.out_features, place.in_features
    pairs: dict[str, Pair | None] = {}
    for name, down in (("A", columns), ("B", columns), ("C", 1)):
        both = tensors.get(f"glora_{name}.Xd"), tensors.get(f"glora_{name}.Xu")
        spread = tensors.get(f"glora_{name}.X")
        pairs[name] = None
        if both[0] is not None and both[1] is not None:
            pairs[name] = both[0], both[1]
        elif spread is not None:
            pairs[name] = spread.expand(columns if name == "C" else rows, 1), spread.new_ones(1, down)
    d, e = (tensors.get(f"glora_{name}.X") for name in "DE")
    return Scaling(
        pairs["A"], pairs["B"], pairs["C"],
        None if d is None else d.expand(rows), None if e is None else e.expand(rows),
    )  # fmt: skip
