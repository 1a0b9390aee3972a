"""Steps that are replayed give what the modules give, whatever a graph freezes, and end where memory does.

Without a GPU a step is recorded operator by operator: replayed, each reads and writes the tensors that it
read and wrote then, and no code of the model runs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tailorbird.errors import SettingsError
from tailorbird.run import generate as generation
from tailorbird.run.generate import ModuleDecoding, decode, generate, sample_text
from tailorbird.run.graphs import GraphDecoding, obstacle
from tailorbird.run.parts import Unsuited
from tiny import ARCHITECTURES, byte_tokenizer, make_model

#: windows of the tiny models are shorter
PROMPT, STEPS = 20, 5
#: their modules in transformers read tokens or positions to decide something, which waits for the GPU
UNRECORDED = {"gpt2", "opt"}


class Recorder(TorchDispatchMode):
    """Every operator that runs meanwhile, and what it overwrites."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, Any]] = []
        self.overwritten: dict[int, tuple[Any, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        masked = any(isinstance(part, Tensor) and part.dtype == torch.bool for part in tree_leaves(args[1:]))
        waits = torch.Tag.data_dependent_output in func.tags
        if waits or (torch.Tag.dynamic_output_shape in func.tags and masked):
            raise RuntimeError(f"a graph can't wait for {func}")
        for stated, given in zip(func._schema.arguments, args, strict=False):
            if stated.alias_info is not None and stated.alias_info.is_write:
                storage = given.untyped_storage()
                self.overwritten.setdefault(storage.data_ptr(), (storage, storage.clone()))
        result = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, result))
        return result

    def undo(self) -> None:
        for storage, before in self.overwritten.values():
            storage.copy_(before)

    def replay(self) -> None:
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def record(step: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """As `capture_on_cuda` does."""
    with Recorder() as recorder:
        result = step()
    recorder.undo()

    def replay() -> Tensor:
        with torch.no_grad():
            recorder.replay()
        return result.clone()

    return replay


def tokens(sequences: int, count: int) -> Tensor:
    return torch.randint(0, 256, (sequences, count), generator=torch.Generator().manual_seed(sequences))


@pytest.mark.parametrize("sequences", [1, 3])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_replayed_steps_give_the_logits_of_the_modules(
    architecture: str, sequences: int, caplog: pytest.LogCaptureFixture
) -> None:
    model, ids = make_model(architecture, seed=3), tokens(sequences, PROMPT + STEPS)
    graph, modules = GraphDecoding(model, PROMPT + STEPS, record), ModuleDecoding(model)
    with caplog.at_level(logging.WARNING, logger="tailorbird"):
        for start, stop in [(0, PROMPT), *((PROMPT + n, PROMPT + n + 1) for n in range(STEPS))]:
            part = ids[:, start:stop]
            torch.testing.assert_close(graph.read(part), modules.read(part), atol=2e-5, rtol=1e-4)
    assert ("decoding without a graph" in caplog.text) == (architecture in UNRECORDED)


def test_only_the_first_steps_run_the_model() -> None:
    model, ids = make_model("llama"), tokens(2, PROMPT + STEPS)
    runs = []
    model.register_forward_hook(lambda *_: runs.append(1))
    decoding = GraphDecoding(model, PROMPT + STEPS, record)
    decoding.read(ids[:, :PROMPT])
    for n in range(STEPS):
        decoding.read(ids[:, PROMPT + n : PROMPT + n + 1])
    assert len(runs) == 3, "the prompt, the first step, and the second while it was recorded"


def test_several_tokens_may_follow_replayed_ones() -> None:
    model, ids = make_model("mistral"), tokens(2, 40)
    graph, modules = GraphDecoding(model, 40, record), ModuleDecoding(model)
    for start, stop in [(0, 1), (1, 2), (2, 3), (3, 4), (4, 24), (24, 25), (25, 26), (26, 40)]:
        part = ids[:, start:stop]
        torch.testing.assert_close(graph.read(part), modules.read(part), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("more", [1, 2])
def test_a_full_context_is_refused_and_nothing_is_read(more: int) -> None:
    model, ids = make_model("llama"), tokens(1, 12)
    decoding, modules = GraphDecoding(model, 10, record), ModuleDecoding(model)
    decoding.read(ids[:, :9])
    if more == 1:
        decoding.read(ids[:, 9:10])
    with pytest.raises(SettingsError, match=rf"{more} more tokens after \d+ · expected: at most 10 together"):
        decoding.read(ids[:, 10 : 10 + more])
    if more == 2:
        modules.read(ids[:, :9])
        torch.testing.assert_close(
            decoding.read(ids[:, 9:10]), modules.read(ids[:, 9:10]), atol=2e-5, rtol=1e-4
        )


def test_a_model_that_can_not_be_recorded_goes_on_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(step: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing")

    model, ids = make_model("qwen2"), tokens(2, 12)
    graph, modules = GraphDecoding(model, 12, refuse), ModuleDecoding(model)
    with caplog.at_level(logging.WARNING, logger="tailorbird"):
        for start, stop in [(0, 8), (8, 9), (9, 10), (10, 11), (11, 12)]:
            part = ids[:, start:stop]
            torch.testing.assert_close(graph.read(part), modules.read(part), atol=2e-5, rtol=1e-4)
    (said,) = caplog.records
    assert "operation not permitted" in said.getMessage()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda model: setattr(model, "_can_compile_fullgraph", False), "by values of tensors"),
        (lambda model: setattr(model.config, "_attn_implementation_internal", "flash_attention_2"), "flash"),
        (lambda model: setattr(model.config, "attention_chunk_size", 8), "in chunks"),
        (
            lambda model: setattr(model.config, "layer_types", ["linear_attention"] * 2),
            "keys and values alone",
        ),
        (lambda model: setattr(model.config, "layer_types", ["novel"] * 2), "no static cache"),
    ],
)
def test_models_with_another_state_are_refused(change: Callable[[Any], None], says: str) -> None:
    model = make_model("llama")
    assert obstacle(model) is None
    change(model)
    with pytest.raises(Unsuited, match=says):
        GraphDecoding(model, 10, record)


def test_generation_on_a_gpu_takes_the_graph_and_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As there, with what only a GPU has stood in for."""
    model, tokenizer = make_model("gemma2", seed=1), byte_tokenizer()

    def both() -> tuple[list[int], Tensor]:
        text = generate(model, tokenizer, "a prompt longer than windows", max_tokens=6, stop=())
        return text.tokens, sample_text(model, tokenizer, sequences=3, length=7, seed=2, batch=2)

    expected = both()
    taken = []

    def on_gpu(model: Any, capacity: int) -> GraphDecoding:
        taken.append(capacity)
        return GraphDecoding(model, capacity, record)

    monkeypatch.setattr(generation, "_on_one_gpu", lambda model: True)
    monkeypatch.setattr(generation, "GraphDecoding", on_gpu)
    found = both()
    assert found[0] == expected[0]
    assert torch.equal(found[1], expected[1])
    assert taken == [28 + 6, 7, 7]


def test_without_a_capacity_or_a_gpu_there_is_no_graph() -> None:
    model = make_model("llama")
    assert isinstance(decode(model), ModuleDecoding)
    assert isinstance(decode(model, 50), ModuleDecoding)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_cuda_graph_gives_the_logits_of_the_modules(architecture: str) -> None:
    model, ids = make_model(architecture, seed=3).cuda(), tokens(2, PROMPT + STEPS)
    graph, modules = decode(model, PROMPT + STEPS), ModuleDecoding(model)
    assert isinstance(graph, GraphDecoding)
    for start, stop in [(0, PROMPT), *((PROMPT + n, PROMPT + n + 1) for n in range(STEPS))]:
        part = ids[:, start:stop]
        torch.testing.assert_close(graph.read(part), modules.read(part), atol=1e-3, rtol=1e-3)
