"""Decoding on a GPU through a recorded graph of one step.

A step of one token per sequence launches some hundred kernels, and launching them can take longer than what
they do. A CUDA graph records them once and replays them in one launch
(https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs). What a replay reads and writes lies where
it lay when it was recorded, so that keys and values are kept in tensors of the full length from the start,
and tokens are copied into the place of the recorded ones.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tailorbird.errors import SettingsError
from tailorbird.run.parts import Unsuited

logger = logging.getLogger("tailorbird")

#: kinds of attention, in transformers' words, that keep to a mask
ATTENTION = ("sdpa", "eager")

#: Records what a function does with tensors of a device, without doing it; the result does it, and returns
#: what the function would.
Capture = Callable[[Callable[[], Tensor], torch.device], Callable[[], Tensor]]


def capture_on_cuda(step: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """Record a CUDA graph of a step that has run before; other threads may use the device meanwhile.

    Raises
    ------
    RuntimeError
        The step does what no graph can hold, such as waiting for a result.
    """
    graph = torch.cuda.CUDAGraph()
    recorded = torch.cuda.graph(graph, stream=torch.cuda.Stream(device), capture_error_mode="thread_local")
    # The outer stream is put back even where recording fails.
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)), recorded:
        result = step()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def obstacle(model: Any) -> str | None:
    """What keeps a model from decoding through a graph, or None.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    """
    from transformers import StaticCache
    from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

    config = model.config.get_text_config(decoder=True)
    if not getattr(model, "_can_compile_fullgraph", False):
        return "its modules decide by values of tensors what to do next"
    if config._attn_implementation not in ATTENTION:
        return f"its attention of kind `{config._attn_implementation}` may read keys that aren't there yet"
    if getattr(config, "attention_chunk_size", None) is not None:
        return "it attends in chunks"
    try:
        layers = StaticCache(config=model.config, max_cache_len=1).layers
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return f"transformers has no static cache for it: {error!r}"
    if any(type(layer) not in (StaticLayer, StaticSlidingWindowLayer) for layer in layers):
        return "its state isn't keys and values alone"
    return None


class GraphDecoding:
    """Decoding whose steps of one token are replayed; prompts go through the model's modules.

    The first step of one token runs as it is, which lets kernels be compiled and chosen; the second is
    recorded. A model that can't be recorded goes on through its modules, which is logged.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        On one CUDA device, in evaluation mode.
    capacity : int
        Most tokens of a sequence, prompt and new ones together; keys and values of so many are allocated.
    capture : callable
        Records a step (`Capture`).

    Raises
    ------
    Unsuited
        As `obstacle` says.
    """

    def __init__(self, model: Any, capacity: int, capture: Capture = capture_on_cuda) -> None:
        from transformers import Cache
        from transformers.cache_utils import StaticLayer

        reason = obstacle(model)
        if reason is not None:
            raise Unsuited(reason)
        self.model, self.capacity, self._capture = model, capacity, capture
        # Layers with a window keep its place in a number that a graph would freeze. Keys and values of the
        # full length need none: the window is in the mask.
        layers = model.config.get_text_config(decoder=True).num_hidden_layers
        self.cache = Cache(layers=[StaticLayer(max_cache_len=capacity) for _ in range(layers)])
        self.length = 0
        self._step: Callable[[], Tensor] | None = None
        self._token: Tensor | None = None  # of each sequence, where the step reads it

    @torch.no_grad()
    def read(self, ids: Tensor) -> Tensor:
        """See `generate.Decoding`.

        Raises
        ------
        SettingsError
            Sequences would get longer than `capacity`.
        """
        tokens = ids.shape[1]
        if self.length + tokens > self.capacity:
            raise SettingsError(
                f"{tokens} more tokens after {self.length}",
                f"at most {self.capacity} together, for which keys and values were allocated",
                "ask for fewer new tokens, or begin with a larger capacity",
            )
        if tokens == 1 and self.length:
            logits = self._one(ids)
        else:
            logits = self._forward(ids.to(self.model.device))
        self.length += tokens
        return logits.float().cpu()

    def _forward(self, ids: Tensor) -> Tensor:
        """Logits of the next token of each sequence."""
        output = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1]

    def _one(self, ids: Tensor) -> Tensor:
        """One step of one token per sequence."""
        if self._token is None:
            self._token = ids.to(self.model.device, copy=True)
            return self._forward(self._token)
        self._token.copy_(ids)
        if self._step is None:
            self._step = self._recorded(self._token)
        return self._step()

    def _recorded(self, token: Tensor) -> Callable[[], Tensor]:
        def step() -> Tensor:
            return self._forward(token)

        try:
            return self._capture(step, token.device)
        except RuntimeError as error:
            logger.warning("decoding without a graph, which this model can't be recorded in: %s", error)
            return step
