"""A model over pages gives what its modules give, whatever shares the row; others are refused by reason."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from tailorbird.kernels import native, paged_attention
from tailorbird.kernels.adapters import LinearAdapter, Segment, TiledRows
from tailorbird.run.paged import PagedModel
from tailorbird.run.parts import Unsuited
from tiny import ARCHITECTURES, BASE, DECODER, make_model
from triton_cases import with_triton

WINDOWED = {**DECODER, "head_dim": 16, "sliding_window": 16}
#: architectures without compiled blocks
OTHERS: dict[str, dict[str, Any]] = {
    "arcee": DECODER,
    "cohere": DECODER,
    "cohere2": WINDOWED,
    "gemma": {**DECODER, "head_dim": 16},
    "glm4": {**DECODER, "head_dim": 16},
    "gpt_bigcode": {**BASE, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gpt_oss": {**WINDOWED, "num_local_experts": 4},
    "granite": DECODER,
    "helium": {**DECODER, "head_dim": 16},
    "mixtral": {**DECODER, "num_local_experts": 4},
    "nemotron": DECODER,
    "olmo3": WINDOWED,
    "phi": DECODER,
    "starcoder2": {**DECODER, "sliding_window": 16},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bloom": ({**BASE, "hidden_size": 64, "n_layer": 2, "n_head": 4}, "0 of 2 blocks"),
    "diffllama": (DECODER, "more than once"),
    "falcon": ({**ARCHITECTURES["falcon"], "alibi": True}, "0 of 2 blocks"),
    "jamba": (DECODER, "blocks of kind"),
    "llama4_text": ({**DECODER, "head_dim": 16, "num_local_experts": 4}, "chunked_attention"),
    "mamba": ({**BASE, "hidden_size": 64, "num_hidden_layers": 2}, "blocks of kind"),
    "minicpm3": (DECODER, "other shapes"),
    "rwkv": ({**BASE, "hidden_size": 64, "num_hidden_layers": 2}, "0 of 2 blocks"),
}


def other(architecture: str, **changes: Any) -> Any:
    """As `make_model`, for `OTHERS` and those that are refused."""
    settings = {**OTHERS, **{name: config for name, (config, _) in REFUSED.items()}}[architecture]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **{**settings, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def read_in_pieces(
    made: PagedModel, texts: list[Tensor], segments: dict[int, Any], seed: int = 0
) -> list[Tensor]:
    """Logits after every token of every text; in each step some of the texts get pieces of any length."""
    rng, done = random.Random(seed), [0] * len(texts)
    cache = made.pages(len(texts))
    cache.reach(max(len(text) for text in texts))
    found: list[list[Tensor]] = [[] for _ in texts]
    while any(at < len(text) for at, text in zip(done, texts, strict=True)):
        ids, positions, sequences, adapters = [], [], [], []
        chosen = [number for number in range(len(texts)) if done[number] < len(texts[number])]
        for number in rng.sample(chosen, rng.randint(1, len(chosen))):
            start = done[number]
            end = min(len(texts[number]), start + rng.choice([1, 1, 2, 7, 30]))
            if number in segments:
                adapters.append(Segment(len(ids), len(ids) + end - start, segments[number]))
            ids += texts[number][start:end].tolist()
            positions += range(start, end)
            sequences += [number] * (end - start)
            done[number] = end
        wanted = torch.arange(len(ids))
        rows = made.step(
            torch.tensor(ids), torch.tensor(positions, dtype=torch.int32),
            torch.tensor(sequences, dtype=torch.int32), cache, wanted, adapters,
        )  # fmt: skip
        for row, number in zip(rows, sequences, strict=True):
            found[number].append(row)
    return [torch.stack(rows) for rows in found]


def texts_of(lengths: list[int], vocabulary: int = 256) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, vocabulary, (length,), generator=generator) for length in lengths]


def alone(model: Any, text: Tensor) -> Tensor:
    with torch.no_grad():
        return model(text[None], use_cache=False).logits[0].float()


@pytest.mark.parametrize("architecture", [*sorted(set(ARCHITECTURES) - {"falcon"}), *sorted(OTHERS)])
def test_packed_pieces_give_what_the_modules_give_for_each_text(architecture: str) -> None:
    model = other(architecture) if architecture in OTHERS else make_model(architecture)
    made, texts = PagedModel(model), texts_of([70, 33, 1, 50])
    for found, text in zip(read_in_pieces(made, texts, {}), texts, strict=True):
        torch.testing.assert_close(found, alone(model, text), atol=1e-4, rtol=1e-4)


def test_it_needs_no_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", lambda: False)
    model = make_model("gemma2")
    made, texts = PagedModel(model), texts_of([70, 33])
    for found, text in zip(read_in_pieces(made, texts, {}), texts, strict=True):
        torch.testing.assert_close(found, alone(model, text), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["granite", "gpt_oss"])
def test_bfloat16_stays_close(architecture: str) -> None:
    model = other(architecture).bfloat16()
    made, texts = PagedModel(model), texts_of([40, 20])
    for found, text in zip(read_in_pieces(made, texts, {}), texts, strict=True):
        expected = alone(model, text)
        assert float((found - expected).norm() / expected.norm()) < 0.03


def test_blocks_may_have_heads_of_their_own() -> None:
    model = make_model("llama")
    attention = model.model.layers[1].self_attn
    for name, rows in (("q_proj", 32), ("k_proj", 16), ("v_proj", 16)):
        linear = getattr(attention, name)
        linear.weight = nn.Parameter(linear.weight[:rows].detach().clone())
        linear.out_features = rows
    attention.o_proj.weight = nn.Parameter(attention.o_proj.weight[:, :32].detach().clone())
    attention.o_proj.in_features = 32
    made, texts = PagedModel(model), texts_of([50, 9])
    assert made.page_shapes == [(2, 16), (1, 16)]
    for found, text in zip(read_in_pieces(made, texts, {}), texts, strict=True):
        torch.testing.assert_close(found, alone(model, text), atol=1e-4, rtol=1e-4)


@with_triton
def test_on_a_gpu_single_tokens_are_decoded_by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    from tailorbird.kernels import triton_attention

    monkeypatch.setattr(paged_attention, "choose", lambda layer, dtype, device: paged_attention.TRITON)
    decode, decoded = triton_attention.decode, []

    def counted(queries: Tensor, *arguments: Any, **settings: Any) -> Tensor:
        decoded.append((len(queries), settings["window"]))
        return decode(queries, *arguments, **settings)

    monkeypatch.setattr(triton_attention, "decode", counted)
    model = other("cohere2", num_hidden_layers=4).bfloat16()
    made, texts = PagedModel(model), texts_of([60, 35, 22])
    for found, text in zip(read_in_pieces(made, texts, {}), texts, strict=True):
        expected = alone(model, text)
        assert float((found - expected).norm() / expected.norm()) < 0.05
    assert {window for _, window in decoded} == {None, 16}


@pytest.mark.parametrize("architecture", sorted(REFUSED))
def test_what_remembers_more_than_keys_and_values_is_refused(architecture: str) -> None:
    with pytest.raises(Unsuited, match=REFUSED[architecture][1]):
        PagedModel(other(architecture))


def test_angles_that_follow_the_longest_text_of_a_row_are_refused() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    with pytest.raises(Unsuited, match="dynamic"):
        PagedModel(make_model("llama", rope_parameters=rope))


def test_a_model_that_sees_its_neighbours_is_refused() -> None:
    model = make_model("llama")
    forward = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = lambda x: forward(x + x.roll(1, 1))  # the row's token before
    with pytest.raises(Unsuited, match="share a row"):
        PagedModel(model)


def test_the_model_stays_as_it_was() -> None:
    model = other("granite")
    text = texts_of([20])[0]
    before, attention = alone(model, text), model.config._attn_implementation
    made = PagedModel(model)
    read_in_pieces(
        made, [text], {0: made.adapter({(0, "mlp.down_proj"): LinearAdapter(bias=torch.ones(64))})}
    )
    assert model.config._attn_implementation == attention
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(alone(model, text), before)


def test_hidden_states_are_those_that_leave_the_last_norm() -> None:
    model = other("granite")
    made, text = PagedModel(model), texts_of([40])[0]
    cache = made.pages(1)
    cache.reach(len(text))
    positions = torch.arange(len(text), dtype=torch.int32)
    found = made.last_hidden(text, positions, torch.zeros_like(positions), cache)
    with torch.no_grad():
        expected = model.base_model(text[None], use_cache=False).last_hidden_state[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@contextmanager
def merged(model: Any, made: PagedModel, change: dict[tuple[int, str], LinearAdapter]) -> Iterator[None]:
    """A model whose linears are what an adapter makes of them."""
    before = {}
    for place in made.linears.values():
        adapter, module = change.get((place.block, place.role)), place.module
        if adapter is None:
            continue
        before[module] = module.weight.data, module.bias
        weight = module.weight.data.double()
        if adapter.down is not None and adapter.up is not None:
            up, core = adapter.up, torch.eye(len(adapter.down)) if adapter.core is None else adapter.core
            if isinstance(up, TiledRows):
                up = up.times(torch.eye(up.shape[1])).t()
            ranks = torch.ones(len(core)) if adapter.ranks is None else adapter.ranks
            low = ranks.double()[:, None] * adapter.down.double()
            weight = weight + adapter.scale * (up.double() @ core.double() @ low)
        if adapter.outputs is not None:
            weight = adapter.outputs.double()[:, None] * weight
        if adapter.inputs is not None:
            weight = weight * adapter.inputs.double()
        module.weight.data = weight.float()
        if adapter.bias is not None:
            module.bias = nn.Parameter(adapter.bias)
    try:
        yield
    finally:
        for module, (weight, bias) in before.items():
            module.weight.data, module.bias = weight, bias


def change_of(made: PagedModel, seed: int) -> dict[tuple[int, str], LinearAdapter]:
    """A random adapter with parts of all kinds."""
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    found = {}
    for place in made.linears.values():
        rows, columns = place.module.weight.shape
        rank = rng.randint(1, 9)
        matrix = normal(rows, rank) / rank**0.5
        low = (normal(rank, columns) / columns**0.5, TiledRows(matrix) if rng.random() < 0.3 else matrix)
        down, up = low if rng.random() < 0.7 else (None, None)
        core, ranks = (
            normal(rank, *more) / rank**0.5 if down is not None and rng.random() < 0.4 else None
            for more in ((rank,), ())
        )
        found[place.block, place.role] = LinearAdapter(
            down, up, 0.4, *(1 + 0.3 * normal(n) if rng.random() < 0.5 else None for n in (columns, rows)),
            bias=normal(rows) if rng.random() < 0.3 else None, core=core,
            ranks=ranks,
        )  # fmt: skip
    return found


@pytest.mark.parametrize("architecture", ["granite", "phi", "starcoder2", "cohere2"])
def test_segments_of_a_row_have_adapters_of_their_own(architecture: str) -> None:
    model = other(architecture)
    made, texts = PagedModel(model), texts_of([40, 33, 12, 50])
    changes = {number: change_of(made, number) for number in (0, 2, 3)}
    adapters = {number: made.adapter(change) for number, change in changes.items()}
    found = read_in_pieces(made, texts, adapters)
    for number, text in enumerate(texts):
        with merged(model, made, changes.get(number, {})):
            expected = alone(model, text)
        torch.testing.assert_close(found[number], expected, atol=2e-4, rtol=2e-3)


def test_linears_of_experts_take_no_adapters_and_shared_tensors_count_once() -> None:
    made = PagedModel(other("mixtral"))
    assert {place.role for place in made.linears.values()} == {f"self_attn.{n}_proj" for n in "qkvo"}
    down, up = torch.zeros(2, 64), torch.zeros(64, 2)
    both = {(block, "self_attn.q_proj"): LinearAdapter(down, up) for block in (0, 1)}
    assert made.adapter(both).nbytes == down.nbytes + up.nbytes
    with pytest.raises(ValueError, match="block 7"):
        made.adapter({(7, "self_attn.q_proj"): LinearAdapter(down, up)})
    with pytest.raises(ValueError, match="`up` is"):
        made.adapter({(0, "self_attn.k_proj"): LinearAdapter(down, up)})


def test_training_and_several_devices_are_refused() -> None:
    with pytest.raises(Unsuited, match="training"):
        PagedModel(make_model("llama").train())
    model = make_model("llama")
    model.lm_head.to("meta")
    with pytest.raises(Unsuited, match="2 devices"):
        PagedModel(model)
