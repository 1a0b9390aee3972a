"""A loaded model through its own modules: one step over packed tokens, keys and values in pages.

For models, and devices, that compiled blocks (`fused.py`) don't suit. All tokens of a step go through the
modules as one row without padding. Attention, the one place where tokens meet, is replaced through
transformers' registry: a layer writes its new keys and values into pages, and each token attends over those
of its own sequence. Nothing is taken on trust: before a model is used, two texts that share a row, one of
them in two pieces, must give what they give alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tailorbird.kernels import paged_attention
from tailorbird.kernels.adapters import LinearAdapter, Segment, check_segments
from tailorbird.kernels.paged_attention import PackedTokens
from tailorbird.model.anatomy import is_linear
from tailorbird.run.attention_layers import attending, attention_layers, configs_of
from tailorbird.run.module_adapters import ModuleAdapter, adapted
from tailorbird.run.pages import Cache, Pages
from tailorbird.run.parts import PlacedLinear, Unsuited, check_rotary

#: Tokens of the texts on which a model is tried, and of the first piece of the one that is cut in two.
_LONG, _SHORT, _CUT = 8, 4, 5
#: How far logits of half of the tokens may be off then, relative to their size, by the width of the dtype.
_TOLERANCE = {4: 1e-3, 2: 0.05}


class PagedModel:
    """A model whose attention runs over pages.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        In evaluation mode, on one device. It stays as it is; it isn't run by others during a step.

    Raises
    ------
    Unsuited
        Not all blocks attend through transformers' registry, or the model remembers more of a text than its
        keys and values, or sees where in a row a token stands.
    """

    def __init__(self, model: Any) -> None:
        if model.training:
            raise Unsuited("the model is in training mode")
        self.model, self._configs = model, configs_of(model)
        devices = {parameter.device for parameter in model.parameters()}
        if len(devices) != 1:
            raise Unsuited(f"the model is on {len(devices)} devices")
        self.device = devices.pop()
        for module in model.modules():
            check_rotary(module)
        narrow = torch.bfloat16 if self.device.type == "cpu" else model.dtype
        self.cache_dtype = torch.float32 if model.dtype == torch.float32 else narrow
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        ids = torch.arange(1, 1 + 7 * _LONG, 7, device=self.device)[None] % vocabulary
        with _watched_linears(model, _LONG) as linears:
            layers = attention_layers(model, ids)
        #: all linears through which each token goes once, by the paths of their modules
        self.linears = linears
        self._numbers = {module: number for number, module in enumerate(layers)}
        self._layers = [
            (layer, paged_attention.choose(layer, self.cache_dtype, self.device)) for layer in layers.values()
        ]
        self.page_shapes = [(layer.kv_heads, layer.head_dim) for layer, _ in self._layers]
        #: of every block, how keys and values lie in pages (`paged_attention`)
        self.page_paths = [path for _, path in self._layers]
        self.width: int = model.get_input_embeddings().embedding_dim
        #: embeddings can be given in place of tokens
        self.takes_embeddings = "inputs_embeds" in inspect.signature(model.base_model.forward).parameters
        self._attended = 0
        self._picks = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._try(ids[0])

    def progress(self) -> float:
        """A number that changes with each block of a step: how often any of them has attended."""
        return self._attended

    def pages(self, sequences: int) -> Pages:
        """Room for keys and values of so many sequences."""
        return Pages(self.page_shapes, self.cache_dtype, sequences, self.device)

    def adapter(self, linears: Mapping[tuple[int, str], LinearAdapter]) -> ModuleAdapter:
        """An adapter for segments of a batch.

        Parameters
        ----------
        linears : mapping of (block, role) to LinearAdapter
            A role is the path of a linear's module within its block.

        Raises
        ------
        ValueError
            For a linear that this model hasn't, or tensors that don't fit.
        """
        return ModuleAdapter(self.linears, linears, self.device)

    @torch.no_grad()
    def step(
        self,
        ids: Tensor,
        positions: Tensor,
        sequences: Tensor,
        cache: Cache,
        wanted: Tensor | None = None,
        adapters: Iterable[Segment] = (),
    ) -> Tensor:
        """Logits after some of the tokens that are read now, on the CPU.

        Parameters, results and errors are those of `FusedModel.step`.
        """
        settings = {}
        if wanted is not None and self._picks:
            settings["logits_to_keep"] = wanted.to(self.device)
        with self._attending(positions, sequences, cache, adapters):
            logits = self.model(**self._arguments(ids, positions), **settings).logits[0]
        if wanted is not None and not self._picks:
            logits = logits[wanted.to(self.device)]
        return logits.float().cpu()

    @torch.no_grad()
    def read_embedded(self, embeddings: Tensor, positions: Tensor, sequences: Tensor, cache: Cache) -> None:
        """Read tokens of which the embeddings ``[tokens, width]`` are given; other arguments as in `step`."""
        given = self._arguments(positions, positions)
        del given["input_ids"]
        with self._attending(positions, sequences, cache, ()):
            self.model.base_model(inputs_embeds=embeddings[None].to(self.device, self.model.dtype), **given)

    @torch.no_grad()
    def last_hidden(
        self,
        ids: Tensor,
        positions: Tensor,
        sequences: Tensor,
        cache: Cache,
        adapters: Iterable[Segment] = (),
    ) -> Tensor:
        """What leaves the model's last norm, float32 ``[tokens, hidden_size]``; arguments as in `step`."""
        with self._attending(positions, sequences, cache, adapters):
            output = self.model.base_model(**self._arguments(ids, positions))
        return output.last_hidden_state[0].float().cpu()

    def _arguments(self, ids: Tensor, positions: Tensor) -> dict[str, Any]:
        """Of the model's forward, for one packed row."""
        return {
            "input_ids": ids[None].to(self.device), "position_ids": positions[None].long().to(self.device),
            "use_cache": False,
        }  # fmt: skip

    @contextmanager
    def _attending(
        self, positions: Tensor, sequences: Tensor, cache: Cache, adapters: Iterable[Segment]
    ) -> Iterator[None]:
        """Attention over pages, and linears with adapters, until the end of the block."""
        segments = check_segments(adapters, len(positions), self.linears)
        tokens = PackedTokens(positions, sequences, cache.tables, self.device)

        def attend(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, settings: dict[str, Any]
        ) -> Tensor:
            self._attended += 1
            number = self._numbers[module]
            layer, path = self._layers[number]
            pages = cache.keys[number], cache.values[number]
            found = paged_attention.attend(
                layer, path, tokens, query[0], key[0], value[0], pages, settings.get("s_aux")
            )
            return found[None]

        with attending(self._configs, attend), adapted(segments):
            yield

    @torch.no_grad()
    def _try(self, ids: Tensor) -> None:
        """Raise unless texts that share a row, and one that is read in pieces, give what they give alone."""
        texts = ids, ids.flip(0)[:_SHORT]
        expected = torch.cat([self.model(input_ids=text[None], use_cache=False).logits[0] for text in texts])
        cache = self.pages(2)
        cache.reach(_LONG)
        positions = torch.arange(_LONG, dtype=torch.int32)
        first = self.step(ids[:_CUT], positions[:_CUT], torch.zeros(_CUT, dtype=torch.int32), cache)
        rest = _LONG - _CUT
        both = self.step(
            torch.cat([ids[_CUT:], texts[1]]), torch.cat([positions[_CUT:], positions[:_SHORT]]),
            torch.tensor([0] * rest + [1] * _SHORT, dtype=torch.int32), cache,
        )  # fmt: skip
        expected = expected.float().cpu()
        off = (torch.cat([first, both]) - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=1e-6)
        if not float(off.median()) <= _TOLERANCE[min(self.model.dtype.itemsize, 4)]:
            raise Unsuited("its modules give other logits for texts that share a row")


@contextmanager
def _watched_linears(model: Any, tokens: int) -> Iterator[dict[str, PlacedLinear]]:
    """The linears of blocks that see each of so many tokens of a row once; filled while the model runs.

    Those of experts see some tokens only, in another order.
    """
    seen: dict[str, list[Any]] = {}
    found: dict[str, PlacedLinear] = {}

    def watch(path: str, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        seen.setdefault(path, []).append(arguments[0].shape[:-1])

    handles, places = [], {}
    for path, module in model.named_modules():
        parts = path.split(".")
        numbers = [place for place, part in enumerate(parts) if part.isdigit()]
        if len(numbers) == 1 and is_linear(module):
            block, inside = int(parts[numbers[0]]), ".".join(parts[numbers[0] + 1 :])
            places[path] = PlacedLinear(block, inside, module, alone=True)
            handles.append(module.register_forward_pre_hook(partial(watch, path)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    whole = [torch.Size([1, tokens])], [torch.Size([tokens])]
    found |= {path: place for path, place in places.items() if seen.get(path) in whole}
