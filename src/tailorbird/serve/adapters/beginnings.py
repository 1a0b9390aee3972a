"""Adapters that change no weight: keys and values of some places with which every text begins.

    [ P learned places | prompt ... answer ]
      0 ........ P - 1 | P ...

Prefix tuning (Li & Liang 2021, https://arxiv.org/abs/2101.00190) holds keys and values of every block as they
are scored, rotary angles included. Prompt tuning (Lester et al. 2021, https://arxiv.org/abs/2104.08691) holds
embeddings, which the model reads once, as any tokens, at positions 0 to P - 1: their keys and values depend
on nothing that follows. Either way they are kept as pages hold them, and copied into pages of the engine's
where a text's own begin; texts share the full ones. PEFT's files have one tensor, flattened over blocks:

    prompt tuning  [P, width]        prefix tuning  [P, blocks * (key, value) * kv_heads * head_dim]
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from functools import cached_property
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from tailorbird.errors import CheckpointError, SettingsError
from tailorbird.formats.peft import PROMPT
from tailorbird.kernels import paged_attention
from tailorbird.kernels.blocks import PAGE
from tailorbird.run.pages import Cache, SharedPages, page_bytes
from tailorbird.serve.adapters.folded import Folds
from tailorbird.serve.adapters.source import DTYPES, Source


class TextModel(Protocol):
    """What beginnings ask of a model; `FusedModel` and `PagedModel` have it."""

    device: torch.device
    cache_dtype: torch.dtype
    page_shapes: list[tuple[int, int]]
    page_paths: list[str]
    width: int
    takes_embeddings: bool

    def read_embedded(self, embeddings: Tensor, positions: Tensor, sequences: Tensor, cache: Cache) -> None:
        """See `FusedModel`."""


class Beginning:
    """Keys and values of the first places of a text, laid out for one model.

    Parameters
    ----------
    places : int
    nbytes : int
        Of all that is kept.
    make : callable
        Gives `pages`.
    """

    #: it is in no segment of a batch
    blocks: None = None
    #: as of `LaidOut`
    shared: ClassVar[Mapping[Hashable, int]] = {}

    def __init__(self, places: int, nbytes: int, make: Callable[[], list[Tensor]]) -> None:
        self.places, self.nbytes, self._make = places, nbytes, make

    @cached_property
    def pages(self) -> list[Tensor]:
        """What each page holds, as of `SharedPages.save`; first asked for where the model may run."""
        return self._make()


class PromptTuning:
    """An adapter of type ``PROMPT_TUNING``.

    Parameters
    ----------
    source : Source
    model : FusedModel or PagedModel
    longest : int
        Most positions of a text.

    Attributes
    ----------
    source : Source
    places : int
    nbytes : int
        That it takes laid out.

    Raises
    ------
    SettingsError
        A setting that can't be served, or is another model's.
    CheckpointError
        The tensor is missing, not alone, or has the wrong shape.
    """

    settings: ClassVar[frozenset[str]] = frozenset(
        {"num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers",
         "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"}
    )  # fmt: skip

    def __init__(self, source: Source, model: TextModel, longest: int) -> None:
        self.source, self._model = source, model
        self.places = _places(source, longest)
        if not model.takes_embeddings:
            raise SettingsError(
                f"{source.directory}: learned embeddings, for a model that reads tokens only",
                "a model that can begin with embeddings",
                "tune this model by another method, such as prefix-tuning or lora",
            )
        _refuse_other(source, "token_dim", model.width, "the width of the served model's embeddings")
        _check_tensor(source, (self.places, model.width))
        self.nbytes = _bytes_of_pages(model, self.places) + 4 * self.places * model.width

    def refuse_folds(self, folds: Folds) -> None:
        """SettingsError where `folds` changed the channels between blocks, and it was tuned on others."""
        if folds.rotated:
            folds.refuse_source(self.source, "rotated")

    def laid_out(self) -> Beginning:
        """The beginning, read from the file; CheckpointError as of `Source.read`."""
        embeddings, model = self.source.read_named(PROMPT, torch.float32), self._model
        self.source.refuse_change()

        def make() -> list[Tensor]:
            cache = _own_pages(model, len(embeddings))
            positions = torch.arange(len(embeddings), dtype=torch.int32, device="cpu")
            model.read_embedded(embeddings, positions, torch.zeros_like(positions), cache)
            return _saved(cache, len(embeddings))

        return Beginning(self.places, self.nbytes, make)


class PrefixTuning:
    """An adapter of type ``PREFIX_TUNING``; parameters, attributes and errors as of `PromptTuning`.

    A projection must have been carried out, which PEFT does when it saves.
    """

    settings: ClassVar[frozenset[str]] = frozenset(
        {"num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers",
         "encoder_hidden_size", "prefix_projection", "init_weights"}
    )  # fmt: skip

    def __init__(self, source: Source, model: TextModel, longest: int) -> None:
        self.source, self._model = source, model
        self.places = _places(source, longest)
        shapes = sorted(set(model.page_shapes))
        if len(shapes) > 1:
            told = " and ".join(f"{kv_heads} x {head_dim}" for kv_heads, head_dim in shapes)
            raise SettingsError(
                f"{source.directory}: learned keys and values, for a model whose blocks have keys of {told}",
                "a model whose blocks have keys of one shape",
                "tune this model by another method, such as prompt-tuning or lora",
            )
        ((kv_heads, head_dim),) = shapes
        blocks = len(model.page_shapes)
        _refuse_other(source, "num_layers", blocks, "the blocks of the served model")
        _refuse_other(source, "num_attention_heads", kv_heads, "its heads of keys in each block")
        _refuse_other(source, "token_dim", kv_heads * head_dim, "the channels of its keys in each block")
        _check_tensor(source, (self.places, blocks * 2 * kv_heads * head_dim))
        self._shape = blocks, 2, kv_heads, head_dim
        self.nbytes = _bytes_of_pages(model, self.places)

    def refuse_folds(self, folds: Folds) -> None:
        """SettingsError where `folds` may have changed keys or values, and it was tuned on others."""
        if folds.rotated or folds.outputs or folds.shifted:
            folds.refuse_source(self.source, "rotated" if folds.rotated else "scaled or shifted")

    def laid_out(self) -> Beginning:
        """The beginning, read from the file; CheckpointError as of `Source.read`."""
        flat = self.source.read_named(PROMPT, torch.float32)
        self.source.refuse_change()
        cache = _own_pages(self._model, self.places)
        of_blocks = flat.unflatten(1, self._shape).movedim(0, 2)
        for (keys, values), path, *pools in zip(
            of_blocks, self._model.page_paths, cache.keys, cache.values, strict=True
        ):
            paged_attention.store(path, keys, values, (pools[0], pools[1]))
        pages = _saved(cache, self.places)
        return Beginning(self.places, self.nbytes, lambda: pages)


#: what can stand before every text
Learned = PromptTuning | PrefixTuning


def _places(source: Source, longest: int) -> int:
    """How many places there are, which leave room for a token of a prompt and one of an answer."""
    places = source.whole("num_virtual_tokens", 1)
    if places > longest - 2:
        raise source.refuse_setting(
            "num_virtual_tokens", f"at most {longest - 2}, for texts of {longest} tokens with them"
        )
    _refuse_other(source, "num_transformer_submodules", 1, "a model without an encoder")
    return places


def _refuse_other(source: Source, name: str, expected: int, what: str) -> None:
    """SettingsError for a setting that is there, and isn't what the served model has."""
    value: Any = source.config.get(name)
    if value is not None and (type(value) is not int or value != expected):
        raise SettingsError(
            f"{source.directory}: `{name}` is {value!r} in its config", f"{expected}: {what}",
            "check that the adapter was tuned on this model",
        )  # fmt: skip


def _check_tensor(source: Source, shape: tuple[int, int]) -> None:
    """CheckpointError unless the file holds the one tensor, in such a shape."""
    others = sorted(set(source.weights.names) - {PROMPT})
    problems = source.problems({PROMPT: shape}) + [f"`{name}` is one too many" for name in others[:3]]
    if not problems:
        return
    how = "check that the adapter was tuned on this model"
    if source.config.get("prefix_projection"):
        how = "let PEFT save it (`save_pretrained`), which writes what the projection gives"
    raise CheckpointError(
        f"{source.weights.files[0]}: tensor " + "; ".join(problems),
        f"`{PROMPT}` {list(shape)} alone, in " + ", ".join(str(dtype)[6:] for dtype in DTYPES),
        how,
    )


def _bytes_of_pages(model: TextModel, places: int) -> int:
    return -(-places // PAGE) * page_bytes(model.page_shapes, model.cache_dtype)


def _own_pages(model: TextModel, places: int) -> SharedPages:
    return SharedPages.of_one(model.page_shapes, model.cache_dtype, places, model.device)


def _saved(cache: SharedPages, places: int) -> list[Tensor]:
    return [cache.save(page) for page in range(-(-places // PAGE))]
