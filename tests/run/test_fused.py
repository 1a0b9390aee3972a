"""Compiled blocks agree with transformers' modules, whatever the batch, and step aside where they can't."""

from __future__ import annotations

import functools
import itertools
import math
import mmap
import random
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from compressed import save_compressed
from readings import LENGTH, by_modules, in_pieces, in_random_pieces, tokens
from tailorbird.formats.modules import CompressedLinear
from tailorbird.formats.packed import CodebookCoding, GroupedCoding, IntegerCoding
from tailorbird.kernels import blocks, native
from tailorbird.kernels.blocks import PAGE
from tailorbird.model.anatomy import read_anatomy
from tailorbird.model.checkpoint import open_checkpoint
from tailorbird.model.layout import ModelLayout
from tailorbird.model.load import load
from tailorbird.run.fused import FusedModel, Trees, obstacle
from tailorbird.run.generate import FusedDecoding, ModuleDecoding, decode
from tailorbird.run.pages import Pages, SharedPages
from tailorbird.run.parts import Unsuited, linear_shape
from tiny import ARCHITECTURES, make_model

pytestmark = pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")

INT4, NF4 = IntegerCoding(4, 32), CodebookCoding("nf4", 32)
#: a linear that isn't packed in models some of whose linears aren't
DENSE = "model.layers.1.self_attn.o_proj"


def compressed(
    directory: Path,
    architecture: str,
    coding: GroupedCoding | Callable[[str], GroupedCoding | None] = INT4,
    rounds: bool = False,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Any:
    """A small model with packed linears."""

    def layout(stated: ModelLayout) -> ModelLayout:
        modules = {name: replace(module, rounds=rounds) for name, module in stated.modules.items()}
        return replace(stated, modules=modules)

    model = make_model(architecture, **config).to(dtype)
    save_compressed(directory, model, coding, layout=layout)
    return load(str(directory))


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_logits_are_those_of_the_modules(architecture: str, tmp_path: Path) -> None:
    model = compressed(tmp_path / "m", architecture)
    ids = tokens(3)
    logits = in_pieces(model, ids, [33, 34, 64])
    torch.testing.assert_close(logits, by_modules(model, ids), atol=2e-5, rtol=1e-4)


SLIDING = ["sliding_attention", "full_attention"]
ROTARY = {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("gemma3_text", {"layer_types": SLIDING}),
        (
            "gemma3_text",
            {
                "layer_types": SLIDING,
                "rope_parameters": {
                    "sliding_attention": ROTARY,
                    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                },
                "final_logit_softcapping": 0.5,
                "attn_logit_softcapping": 0.1,  # which its attention doesn't know
                "query_pre_attn_scalar": 40,
            },
        ),
        ("gemma3_text", {"layer_types": SLIDING, "hidden_size": 80, "num_key_value_heads": 1}),
        ("olmo2", {"num_key_value_heads": 4, "attention_bias": True}),
        ("olmo2", {"num_key_value_heads": 1, "head_dim": 32}),
        ("falcon", {"bias": True, "num_kv_heads": 1}),
        ("falcon", {"num_ln_in_parallel_attn": 1, "num_kv_heads": 4}),
        ("falcon", {"num_ln_in_parallel_attn": 2, "activation": "relu", "ffn_hidden_size": 96}),
        ("falcon", {"new_decoder_architecture": False}),
        ("falcon", {"new_decoder_architecture": False, "bias": True, "num_kv_heads": 4}),
        ("falcon", {"new_decoder_architecture": False, "multi_query": False, "num_kv_heads": 4}),
        ("falcon", {"new_decoder_architecture": False, "parallel_attn": False, "num_kv_heads": 4}),
    ],
)
def test_variants_agree(architecture: str, config: dict[str, Any], tmp_path: Path) -> None:
    model = compressed(tmp_path / "m", architecture, **config)
    ids = tokens(3)
    logits = in_pieces(model, ids, [33, 34, 64])
    torch.testing.assert_close(logits, by_modules(model, ids), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "coding",
    [*(IntegerCoding(bits, 32) for bits in (2, 3, 5, 6, 8)), NF4],
    ids=lambda coding: coding.label,
)
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "falcon", "olmo2"])
def test_every_coding_agrees(architecture: str, coding: GroupedCoding, tmp_path: Path) -> None:
    model = compressed(tmp_path / "m", architecture, coding)
    ids = tokens(2)
    torch.testing.assert_close(in_pieces(model, ids, [40]), by_modules(model, ids), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("coding", [INT4, NF4], ids=lambda c: c.label)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "phi3", "gemma3_text", "falcon", "olmo2"])
def test_rounded_inputs_agree_up_to_their_rounding(
    architecture: str, coding: GroupedCoding, tmp_path: Path
) -> None:
    """A value between two bytes may fall to either side: the last float32 bit before it decides."""
    model = compressed(tmp_path / "m", architecture, coding, rounds=True)
    ids = tokens(2)
    logits, expected = in_pieces(model, ids, [50]), by_modules(model, ids)
    assert float((logits - expected).norm() / expected.norm()) < 5e-3


@pytest.mark.parametrize("coding", [INT4, NF4], ids=lambda c: c.label)
@pytest.mark.parametrize(
    ("rounds", "dtype"), [(False, torch.float32), (True, torch.float32), (True, torch.bfloat16)]
)
@pytest.mark.parametrize("architecture", ["qwen2", "gemma3_text", "falcon", "olmo2"])
def test_a_token_has_the_same_bits_whatever_runs_beside_it(
    architecture: str, rounds: bool, dtype: torch.dtype, coding: GroupedCoding, tmp_path: Path
) -> None:
    model = compressed(tmp_path / "m", architecture, coding, rounds=rounds, dtype=dtype)
    ids = tokens(9)
    together = in_pieces(model, ids, [40])
    assert torch.equal(in_pieces(model, ids, [3, 35, 36, 64]), together)
    assert torch.equal(in_pieces(model, ids[4:5], [17]), together[4:5])
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert torch.equal(in_pieces(model, ids, [40]), together)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("version", native.versions())
@pytest.mark.parametrize(
    ("rounds", "dtype"), [(False, torch.float32), (True, torch.float32), (True, torch.bfloat16)]
)
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt2", "falcon"])
def test_what_is_not_finite_stays_in_its_own_sequence(
    architecture: str,
    rounds: bool,
    dtype: torch.dtype,
    version: int,
    value: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Others beside it, and one that gets its pages later, have the bits that they have alone."""
    model = compressed(tmp_path / "m", architecture, rounds=rounds, dtype=dtype)
    monkeypatch.setattr("tailorbird.kernels.blocks.best_version", lambda: version)
    fused, ids, spoilt, place = FusedModel(model), tokens(5), 2, 20

    def read(rows: list[int], cache: Pages | SharedPages, value: float | None = None) -> Tensor:
        found = []
        for start, stop in itertools.pairwise((0, 40, 41, LENGTH)):
            positions = torch.arange(start, stop, dtype=torch.int32).repeat(len(rows))
            owners = torch.arange(len(rows), dtype=torch.int32).repeat_interleave(stop - start)
            hidden = fused.embed(ids[rows, start:stop].reshape(-1), positions)
            if value is not None and start <= place < stop:
                hidden.view(len(rows), stop - start, -1)[rows.index(spoilt), place - start, 3] = value
            left = fused.run(hidden, positions, owners, cache)
            found.append(fused.logits(left).view(len(rows), stop - start, -1))
        return torch.cat(found, dim=1)

    def pages(sequences: int) -> Pages:
        made = fused.pages(sequences)
        made.reach(LENGTH)
        return made

    cache = pages(5)
    together = read([0, 1, 2, 3, 4], cache, value)
    # With a window, tokens further on see nothing of it.
    assert not torch.isfinite(together[spoilt, place : place + 16]).all(-1).any()
    for row in (0, 1, 3, 4):
        alone = read([row], pages(1))
        assert torch.isfinite(alone).all()
        assert torch.equal(together[row], alone[0])
    cache.tables = cache.tables[spoilt : spoilt + 1].contiguous()
    assert torch.equal(read([3], cache)[0], together[3])


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt_neox", "falcon", "olmo2"])
def test_hidden_states_after_every_block_are_those_of_the_modules(architecture: str, tmp_path: Path) -> None:
    model = compressed(tmp_path / "m", architecture, num_hidden_layers=3)
    fused, ids = FusedModel(model), tokens(1)
    with torch.no_grad():
        expected = model(ids, use_cache=False, output_hidden_states=True).hidden_states
    positions, sequence = torch.arange(LENGTH, dtype=torch.int32), torch.zeros(LENGTH, dtype=torch.int32)
    pages = fused.pages(1)
    pages.reach(LENGTH)
    entering = fused.embed(ids[0], positions)
    torch.testing.assert_close(entering, expected[0][0].float(), atol=1e-6, rtol=1e-6)
    for last in (1, 2):
        left = fused.run(entering, positions, sequence, pages, last=last)
        torch.testing.assert_close(left, expected[last][0], atol=2e-5, rtol=1e-4)
    normed = fused.parts.norm(fused.run(entering, positions, sequence, pages)).detach()
    torch.testing.assert_close(normed, expected[3][0], atol=2e-5, rtol=1e-4)  # transformers' last is normed


def test_a_step_may_stop_and_go_on_at_any_block(tmp_path: Path) -> None:
    model = compressed(tmp_path / "m", "llama", num_hidden_layers=3)
    fused, ids = FusedModel(model), tokens(2)
    flat, sequences = ids.reshape(-1), torch.arange(2, dtype=torch.int32).repeat_interleave(LENGTH)
    positions = torch.arange(LENGTH, dtype=torch.int32).repeat(2)

    def pages() -> Any:
        made = fused.pages(2)
        made.reach(LENGTH)
        return made

    everything = torch.arange(2 * LENGTH)
    whole = fused.step(flat, positions, sequences, pages(), everything)
    cache, entering = pages(), fused.embed(flat, positions)
    before, hidden = entering.clone(), entering
    for first, last in ((0, 0), (0, 1), (1, 3), (3, None)):
        hidden = fused.run(hidden, positions, sequences, cache, first, last)
    assert torch.equal(entering, before)
    assert torch.equal(fused.logits(hidden), whole)
    # Keys of all blocks are there: the last token may be read again.
    end = slice(LENGTH - 1, LENGTH)
    again = fused.step(flat[end], positions[end], sequences[end], cache, torch.tensor([0]))
    assert torch.equal(again[0], whole[LENGTH - 1])
    for first, last in ((-1, 2), (0, 4), (2, 1)):
        with pytest.raises(ValueError, match=rf"blocks {first} to {last}; expected a range within 0 to 3"):
            fused.run(entering, positions, sequences, cache, first, last)
    with pytest.raises(ValueError, match=r"hidden states \[140, 32\]; expected \[140, 64\]"):
        fused.run(entering[:, :32], positions, sequences, cache)


def test_unlike_lengths_run_in_one_batch(tmp_path: Path) -> None:
    model = compressed(tmp_path / "m", "llama")
    fused = FusedModel(model)
    ids, lengths = tokens(3), [5, 40, 33]
    pages = fused.pages(3)
    pages.reach(LENGTH)
    flat = torch.cat([ids[i, :n] for i, n in enumerate(lengths)])
    positions = torch.cat([torch.arange(n, dtype=torch.int32) for n in lengths])
    owners = torch.tensor([i for i, n in enumerate(lengths) for _ in range(n)], dtype=torch.int32)
    ends = torch.tensor(lengths).cumsum(0) - 1
    logits = fused.step(flat, positions, owners, pages, ends)
    for i, n in enumerate(lengths):
        torch.testing.assert_close(
            logits[i], by_modules(model, ids[i : i + 1, :n])[0, -1], atol=2e-5, rtol=1e-4
        )


@pytest.fixture(scope="module")
def packed_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, GroupedCoding], Any]:
    """Small models by architecture and coding, each made once."""
    folder = tmp_path_factory.mktemp("models")

    @functools.cache
    def make(architecture: str, coding: GroupedCoding) -> Any:
        return compressed(folder / f"{architecture} {coding.label}", architecture, coding)

    return make


CODINGS: list[GroupedCoding] = [
    *(
        IntegerCoding(bits, group, symmetric)
        for bits in (2, 3, 4, 5, 6, 8)
        for group in (32, 64, 0)
        for symmetric in (False, True)
    ),
    *(CodebookCoding(name, group) for name in ("nf4", "gauss3") for group in (32, 64, 0)),
]


@given(
    architecture=st.sampled_from(sorted(ARCHITECTURES)),
    coding=st.sampled_from(CODINGS),
    rounds=st.booleans(),
    shared=st.sampled_from([0, 0, PAGE, 2 * PAGE]),
    lengths=st.lists(st.integers(1, 45), min_size=1, max_size=4),
    seed=st.integers(0, 1 << 30),
)
@settings(max_examples=200, deadline=None)
def test_any_batch_of_any_coding_agrees_with_the_modules(
    packed_model: Callable[[str, GroupedCoding], Any],
    architecture: str,
    coding: GroupedCoding,
    rounds: bool,
    shared: int,
    lengths: list[int],
    seed: int,
) -> None:
    """Texts of any lengths, in pieces of any lengths, some of which begin with pages of the first.

    Both sides round inputs of linears to bytes, or neither does. Where they do, a value between two bytes may
    fall to either side, which in a short text can weigh more than half of what rounding changes. Blocks that
    round by no rule, or by another, would differ by all of it.
    """
    model, rng = packed_model(architecture, coding), random.Random(seed)
    ids = torch.randint(
        0, 256, (len(lengths), shared + max(lengths)), generator=torch.Generator().manual_seed(seed)
    )
    ids[:, :shared] = ids[0, :shared].clone()
    texts = [row[: shared + length] for row, length in zip(ids, lengths, strict=True)]

    def all_by_modules(rounds: bool) -> Tensor:
        for module in model.modules():
            if isinstance(module, CompressedLinear):
                module.rounds = rounds
        found = [by_modules(model, text[None])[0] for text in texts]
        return torch.cat([found[0], *(logits[shared:] for logits in found[1:])])

    exact, expected = all_by_modules(False), all_by_modules(rounds)
    assert obstacle(model) is None
    logits = torch.cat(in_random_pieces(FusedModel(model), texts, shared, rng))
    if rounds:
        assert float((logits - expected).norm()) < 0.9 * float((exact - expected).norm())
    else:
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("coding", [IntegerCoding(3, 32), NF4], ids=lambda c: c.label)
@pytest.mark.parametrize("version", native.versions())
@pytest.mark.parametrize("architecture", ["gemma2", "gemma3_text", "falcon", "olmo2"])
def test_every_version_of_the_blocks_agrees(
    architecture: str,
    version: int,
    coding: GroupedCoding,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = compressed(tmp_path / "m", architecture, coding)
    expected = by_modules(model, tokens(2))
    monkeypatch.setattr("tailorbird.kernels.blocks.best_version", lambda: version)
    torch.testing.assert_close(in_pieces(model, tokens(2), [33]), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "falcon", "olmo2"])
def test_bfloat16_models_agree_within_what_bfloat16_rounds(architecture: str, tmp_path: Path) -> None:
    model = compressed(tmp_path / "m", architecture, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    expected = by_modules(model, tokens(2))
    logits = in_pieces(model, tokens(2), [33])
    assert float((logits - expected).norm() / expected.norm()) < 2e-2


def test_decoding_takes_the_blocks_and_agrees(tmp_path: Path) -> None:
    model = compressed(tmp_path / "m", "mistral")
    fused, modules = decode(model), ModuleDecoding(model)
    assert isinstance(fused, FusedDecoding)
    ids = tokens(2)
    for start, stop in ((0, 30), (30, 31), (31, 60)):
        part = ids[:, start:stop]
        torch.testing.assert_close(fused.read(part), modules.read(part), atol=2e-5, rtol=1e-4)


def test_token_by_token_in_turns_gives_the_bits_of_one_reading(tmp_path: Path) -> None:
    """What a step keeps for the next is its own, also where pages are added and others ran in between."""
    model = compressed(tmp_path / "m", "qwen2")
    ids = torch.cat([tokens(3), tokens(3, seed=1)], dim=1)  # more than the pages that are taken first
    expected = in_pieces(model, ids, [])
    shared = FusedModel(model)
    several, alone = FusedDecoding(shared), FusedDecoding(shared)
    for position in range(2 * LENGTH):
        at = slice(position, position + 1)
        found = several.read(ids[:, at])
        assert torch.equal(found, expected[:, position])
        assert torch.equal(alone.read(ids[1:2, at]), expected[1:2, position])
        if position == LENGTH:
            shared.seconds = torch.zeros(len(blocks.STEPS) + 1, dtype=torch.float64)
    assert shared.seconds is not None
    assert (shared.seconds > 0).all()


def test_positions_may_be_known_and_all_tokens_wanted(tmp_path: Path) -> None:
    model = compressed(tmp_path / "m", "gemma2")
    fused, ids = FusedModel(model), tokens(1)[0]
    positions, sequences = torch.arange(LENGTH, dtype=torch.int32), torch.zeros(LENGTH, dtype=torch.int32)
    spread = torch.stack([positions, sequences], dim=1)[:, 0]
    expected = in_pieces(model, ids[None], [])[0]
    for numbers, reach in ((spread, None), (positions, LENGTH), (positions, LENGTH + 300)):
        pages = fused.pages(1)
        pages.reach(LENGTH)
        assert torch.equal(fused.step(ids, numbers, sequences, pages, reach=reach), expected)


def test_branches_of_a_tree_see_their_ancestors_only(tmp_path: Path) -> None:
    """Two continuations of one prompt in one batch: each as if it followed the prompt alone."""
    model = compressed(tmp_path / "m", "llama")
    fused, ids = FusedModel(model), tokens(1)[0]
    pages = fused.pages(1)
    pages.reach(LENGTH)
    prompt = 30
    positions = torch.arange(prompt, dtype=torch.int32)
    fused.step(ids[:prompt], positions, torch.zeros(prompt, dtype=torch.int32), pages, torch.tensor([0]))
    tree = [(5, -1), (6, 0), (7, 1), (8, 0), (9, 3)]  # (token, parent): a root and two chains below it
    masks: list[int] = []
    depths: list[int] = []
    for i, (_, parent) in enumerate(tree):
        masks.append((1 << i) | (masks[parent] if parent >= 0 else 0))
        depths.append(depths[parent] + 1 if parent >= 0 else 0)
    hidden = model.model.embed_tokens(torch.tensor([token for token, _ in tree])).detach().float()
    blocks.run_blocks(
        fused.blocks, hidden, torch.tensor([prompt + d for d in depths], dtype=torch.int32),
        torch.zeros(5, dtype=torch.int32), pages.tables, fused.cache_dtype,
        slots=torch.arange(prompt, prompt + 5, dtype=torch.int32), ancestors=torch.tensor(masks),
        tree_start=torch.full((5,), prompt, dtype=torch.int32),
    )  # fmt: skip
    logits = blocks.run_head(fused.norm, fused.head, hidden)
    for end in (2, 4):
        path: list[int] = []
        node = end
        while node >= 0:
            path.insert(0, tree[node][0])
            node = tree[node][1]
        alone = by_modules(model, torch.cat([ids[:prompt], torch.tensor(path)])[None])[0, -1]
        torch.testing.assert_close(logits[end], alone, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "falcon"])
def test_what_stands_on_a_branch_has_the_bits_of_the_branch_alone(
    architecture: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Whatever tree, wherever it crosses pages, and though others stand in the slots between."""
    model = compressed(tmp_path / "m", architecture, dtype=dtype)
    fused, ids, rng = FusedModel(model), tokens(1)[0], random.Random(0)
    for prompt in (1, 27, 33):
        count = rng.randrange(20, 40)
        parents = [rng.randrange(max(-1, node - 3), node) for node in range(count)]
        guesses = torch.tensor([rng.randrange(200) for _ in range(count)])
        bits: list[int] = []
        depths: list[int] = []
        for node, parent in enumerate(parents):
            bits.append(1 << node | (bits[parent] if parent >= 0 else 0))
            depths.append(depths[parent] + 1 if parent >= 0 else 1)
        pages = fused.pages(1)
        pages.reach(prompt + count)
        slots = torch.arange(prompt + count, dtype=torch.int32)
        positions = torch.cat([slots[:prompt], prompt - 1 + torch.tensor(depths, dtype=torch.int32)])
        trees = Trees(slots, torch.tensor([0] * prompt + bits), torch.full_like(slots, prompt))
        logits = fused.step(
            torch.cat([ids[:prompt], guesses]), positions, torch.zeros_like(slots), pages, trees=trees
        )  # fmt: skip
        for node in range(count):
            way = [other for other in range(count) if bits[node] >> other & 1]
            path = torch.cat([ids[:prompt], guesses[way]])
            alone = in_pieces(model, path[None], [])[0, -1]
            assert torch.equal(logits[prompt + node], alone)


@pytest.mark.parametrize(
    ("architecture", "key", "value"),
    [
        ("llama", "sliding_window", 16),
        ("stablelm", "sliding_window", 16),
        ("llama", "use_parallel_residual", True),
        ("llama", "attn_logit_softcapping", 0.1),
        ("llama", "final_logit_softcapping", 0.1),
        ("llama", "hidden_activation", "relu"),
        ("llama", "logit_scale", 3.0),
        ("mistral", "use_sliding_window", False),
        ("olmo2", "clip_qkv", 0.01),
        ("olmo2", "sliding_window", 16),
        ("falcon", "sliding_window", 16),
    ],
)
def test_keys_that_a_model_does_not_know_change_nothing(
    architecture: str, key: str, value: Any, tmp_path: Path
) -> None:
    model = compressed(tmp_path / "m", architecture, **{key: value})
    ids = tokens(2)
    torch.testing.assert_close(in_pieces(model, ids, [33]), by_modules(model, ids), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_default_dtype_changes_nothing(dtype: torch.dtype, tmp_path: Path) -> None:
    model = compressed(tmp_path / "m", "llama")
    expected = in_pieces(model, tokens(2), [33])
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(in_pieces(model, tokens(2), [33]), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("mlp.down_proj", (80, 160)),
        ("mlp.down_proj", (64, 128)),
        ("mlp.up_proj", (128, 64)),
        ("self_attn.v_proj", (16, 64)),
        ("self_attn.q_proj", (64, 32)),
        ("self_attn.o_proj", (64, 32)),
    ],
)
def test_linears_that_do_not_fit_together_are_left_to_the_modules(
    name: str, shape: tuple[int, int], tmp_path: Path
) -> None:
    model = compressed(tmp_path / "m", "llama")
    parent, _, own = name.rpartition(".")
    other = CompressedLinear(shape[1], shape[0], IntegerCoding(4, 32), bias=False).eval()
    setattr(model.model.layers[1].get_submodule(parent), own, other)
    assert obstacle(model) is not None


def test_threads_that_share_a_model_do_not_disturb_each_other(tmp_path: Path) -> None:
    """One runs the modules, one the blocks; both lay out weights."""
    model = compressed(tmp_path / "m", "llama", dtype=torch.bfloat16)
    ids = tokens(1)
    by_module, by_block = by_modules(model, ids), decode(model).read(ids)
    found: list[bool] = []

    def run(call: Callable[[], Tensor], expected: Tensor) -> None:
        found.extend(torch.equal(call(), expected) for _ in range(40))

    threads = [
        threading.Thread(target=run, args=(lambda: by_modules(model, ids), by_module)),
        threading.Thread(target=run, args=(lambda: decode(model).read(ids), by_block)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 80
    assert all(found)


def test_what_is_stored_can_still_be_read(tmp_path: Path) -> None:
    """Layouts push the stored codes out of memory, not out of existence; what was written to stays."""
    model = compressed(tmp_path / "m", "llama", hidden_size=256, intermediate_size=512)
    linears = [module for module in model.modules() if isinstance(module, CompressedLinear)]
    linears[0].codes[0, 0] ^= 1
    before = [linear.codes.clone() for linear in linears]
    decode(model).read(tokens(1))
    for linear, codes in zip(linears, before, strict=True):
        assert torch.equal(linear.codes, codes)


def pages_in_memory(tensor: Tensor) -> tuple[int, int]:
    """How many whole pages of a tensor this process has in memory, and how many there are.

    `mincore` would tell what the system's cache holds of the file, wherever it is mapped.
    """
    first = -(-tensor.data_ptr() // mmap.PAGESIZE)
    count = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE - first
    with open("/proc/self/pagemap", "rb", buffering=0) as file:
        file.seek(8 * first)
        entries = torch.frombuffer(bytearray(file.read(8 * count)), dtype=torch.int64)
    return int((entries < 0).sum()), count  # the highest bit is that of a page in memory


@pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="this system doesn't tell of its pages")
def test_file_pages_of_what_was_laid_out_leave_memory(tmp_path: Path) -> None:
    """All but those beside tensors that are read, which the system maps along with them, 64 KiB at a time."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 1}
    model = compressed(tmp_path / "m", "llama", **sizes)
    linears = [module for module in model.modules() if isinstance(module, CompressedLinear)]
    changed = linears[0]
    changed.codes[0, 0] ^= 1
    for linear in linears:
        assert int(linear.codes.sum()) != 0
        in_memory, count = pages_in_memory(linear.codes)
        assert in_memory == count > 0
    for _ in range(2):  # layouts are made by the first decoding
        decode(model).read(tokens(1))
        in_memory, counts = zip(
            *(pages_in_memory(linear.codes) for linear in linears if linear is not changed), strict=True
        )
        beside = 2 * (1 << 16) // mmap.PAGESIZE
        assert all(part <= beside for part in in_memory)
        assert sum(in_memory) < 0.2 * sum(counts)
        stays, count = pages_in_memory(changed.codes)
        assert stays == count


def wrap(model: Any) -> None:
    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

    model.model.layers[0].mlp.up_proj = Wrapped(model.model.layers[0].mlp.up_proj).eval()


def replace_forward(model: Any) -> None:
    attention = model.model.layers[1].self_attn
    attention.forward = attention.forward


def narrow_angles(model: Any) -> None:
    model.model.rotary_emb.rope_type = "dynamic"


def reweigh(model: Any) -> None:
    norm = model.model.layers[1].post_attention_layernorm
    model.model.layers[1].post_attention_layernorm = Qwen2RMSNorm(len(norm.weight), norm.variance_epsilon)


def adapt(model: Any) -> None:
    peft = pytest.importorskip("peft")
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))


def parametrize_as(path: str, tensor: str) -> Callable[[Any], None]:
    return lambda model: parametrize.register_parametrization(
        model.get_submodule(path), tensor, nn.Identity()
    )


@pytest.mark.parametrize(
    "change",
    [
        wrap,
        replace_forward,
        narrow_angles,
        reweigh,
        adapt,
        lambda model: model.model.norm.register_forward_hook(lambda *_: None),
        lambda model: model.model.layers[0].register_forward_pre_hook(lambda *_: None),
        lambda model: model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda *_: None),
        lambda model: model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: None),
        lambda model: model.model.layers[0].self_attn.q_proj.register_full_backward_hook(lambda *_: None),
        lambda model: model.model.layers[0].mlp.register_full_backward_pre_hook(lambda *_: None),
        lambda model: setattr(model.model.layers[0], "input_layernorm", nn.Identity()),
        lambda model: setattr(model.model.layers[0].self_attn, "q_proj", nn.Identity()),
        lambda model: setattr(model.model.layers[1].mlp, "act_fn", nn.ReLU()),
        lambda model: setattr(model.config, "_attn_implementation_internal", "my_attention"),
        parametrize_as(DENSE, "weight"),
        parametrize_as("model.layers.1.self_attn.q_proj", "scales"),
        parametrize_as("model.layers.1.input_layernorm", "weight"),
        parametrize_as("model.norm", "weight"),
        parametrize_as("model.embed_tokens", "weight"),
        lambda model: nn.utils.weight_norm(model.get_submodule(DENSE)),
        lambda model: nn.utils.weight_norm(model.model.norm),
        lambda model: nn.utils.parametrizations.weight_norm(model.get_submodule(DENSE)),
        lambda model: nn.utils.parametrizations.weight_norm(model.model.norm),
        lambda model: nn.utils.parametrizations.spectral_norm(model.get_submodule(DENSE)),
    ],
)
def test_a_model_that_was_touched_runs_through_its_modules(
    change: Callable[[Any], Any], tmp_path: Path
) -> None:
    model = compressed(tmp_path / "m", "llama", lambda name: None if name == DENSE else INT4)
    assert obstacle(model) is None
    change(model)
    model.eval()  # new modules are in training mode, which alone would stand in the way
    assert obstacle(model)
    assert isinstance(decode(model), ModuleDecoding)
    with pytest.raises(Unsuited):
        FusedModel(model)


@pytest.mark.parametrize("part", ["", "model.layers.1", "model.layers.0.self_attn.q_proj"])
def test_a_model_in_training_runs_through_its_modules_whatever_needs_gradients(
    part: str, tmp_path: Path
) -> None:
    model = compressed(tmp_path / "m", "llama")
    assert any(parameter.requires_grad for parameter in model.parameters())
    for required in (True, False):
        model.requires_grad_(required)
        assert obstacle(model) is None
        model.get_submodule(part).train()
        assert obstacle(model) == "the model is in training mode"
        assert isinstance(decode(model), ModuleDecoding)
        model.eval()


@pytest.mark.parametrize(
    "register",
    [
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
        nn.modules.module.register_module_full_backward_hook,
        nn.modules.module.register_module_full_backward_pre_hook,
    ],
)
def test_where_all_modules_are_hooked_models_run_through_them(
    register: Callable[[Callable[..., None]], RemovableHandle], tmp_path: Path
) -> None:
    model = compressed(tmp_path / "m", "llama")
    handle = register(lambda *_: None)
    try:
        assert obstacle(model) == "there are hooks on all modules"
        assert isinstance(decode(model), ModuleDecoding)
    finally:
        handle.remove()
    assert isinstance(decode(model), FusedDecoding)


def test_classes_with_another_forward_are_not_what_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = compressed(tmp_path / "m", "llama")
    monkeypatch.setattr(type(model.model.norm), "forward", lambda self, hidden: hidden)
    assert "the forward of LlamaRMSNorm" in str(obstacle(model))


@pytest.mark.parametrize("architecture", ["gemma2", "llama"])
def test_packed_embeddings_may_be_scaled_by_a_hook_and_have_no_other(
    architecture: str, tmp_path: Path
) -> None:
    save_compressed(tmp_path / "m", make_model(architecture), embedding=INT4)
    model = load(str(tmp_path / "m"))
    assert obstacle(model) is None
    for register in (model.model.embed_tokens.register_forward_hook, model.lm_head.register_forward_hook):
        handle = register(lambda *_: None)
        assert "has hooks" in str(obstacle(model))
        handle.remove()
    assert obstacle(model) is None


@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize("architecture", ["qwen2", "gpt2"])
def test_gradients_flow_after_a_decoding_in_blocks_as_if_there_had_been_none(
    architecture: str, rounds: bool, tmp_path: Path
) -> None:
    """A model that is called runs through its modules; what these made for the blocks gives none."""
    ids = tokens(2)

    def gradients(model: Any) -> dict[str, Tensor | None]:
        assert torch.is_grad_enabled()
        model(ids, use_cache=False).logits.square().mean().backward()
        return {name: tensor.grad for name, tensor in model.named_parameters() if tensor.requires_grad}

    expected = gradients(compressed(tmp_path / "m", architecture, rounds=rounds))
    model = load(str(tmp_path / "m"))
    decoding = decode(model)
    assert isinstance(decoding, FusedDecoding)
    decoding.read(ids)
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient is not None
        assert float(gradient.abs().sum()) > 0
        torch.testing.assert_close(found[name], gradient, atol=1e-7, rtol=1e-4)


def test_a_bias_can_be_trained_alone_after_a_decoding_in_blocks(tmp_path: Path) -> None:
    """Nothing that enters its linear needs a gradient, so that this runs as fast as any."""
    model = compressed(tmp_path / "m", "qwen2").requires_grad_(False)
    decode(model).read(tokens(1))
    bias = model.model.layers[0].self_attn.v_proj.bias.requires_grad_(True)
    model(tokens(1), use_cache=False).logits.square().mean().backward()
    assert bias.grad is not None
    assert float(bias.grad.abs().min()) > 0


def test_blocks_give_no_gradients_and_refuse_those_who_ask(tmp_path: Path) -> None:
    model = compressed(tmp_path / "m", "gpt2")
    fused, ids = FusedModel(model), tokens(1)[0]
    positions, owner = torch.arange(LENGTH, dtype=torch.int32), torch.zeros(LENGTH, dtype=torch.int32)
    pages = fused.pages(1)
    pages.reach(LENGTH)
    assert torch.is_grad_enabled()
    assert all(tensor.requires_grad for tensor in (fused.parts.norm.weight, fused.parts.places))
    hidden = fused.embed(ids, positions)
    results = [
        hidden, fused.read(ids, positions, owner, pages), fused.run(hidden, positions, owner, pages),
        fused.normed(hidden), fused.logits(hidden), fused.last_hidden(ids, positions, owner, pages),
        fused.step(ids, positions, owner, pages), decode(model).read(ids[None]),
    ]  # fmt: skip
    for result in results:
        assert not result.requires_grad
        with pytest.raises(RuntimeError, match="does not require grad"):
            result.sum().backward()
    learned = hidden.clone().requires_grad_(True)
    for ask in (
        lambda: fused.run(learned, positions, owner, pages),
        lambda: fused.read_embedded(learned, positions, owner, pages),
        lambda: fused.normed(learned),
        lambda: fused.logits(learned),
        lambda: fused.logits_of_normed(learned),
    ):
        with pytest.raises(ValueError, match=r"need a gradient.*call the model itself"):
            ask()
        with torch.no_grad():
            ask()


@pytest.mark.parametrize(
    ("architecture", "config", "words"),
    [
        ("falcon", {"alibi": True}, "ALiBi"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "tokens that follow"),
        ("gemma3_text", {"head_dim": 24}, "heads of 24 channels"),
        ("cohere", {}, "no fused block for `cohere`"),
    ],
)
def test_other_blocks_run_through_their_modules(
    architecture: str, config: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ARCHITECTURES, "cohere", ARCHITECTURES["llama"])
    assert words in str(obstacle(compressed(tmp_path / "m", architecture, **config)))


def test_a_dense_model_runs_through_its_modules() -> None:
    assert obstacle(make_model("llama")) == "no linear is compressed"


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_linears_are_where_the_anatomy_has_them(architecture: str, tmp_path: Path) -> None:
    model = compressed(tmp_path / "m", architecture)
    fused = FusedModel(model)
    anatomy = read_anatomy(open_checkpoint(str(tmp_path / "m")))
    places = {place.name: (b.index, place) for b in anatomy.blocks for place in b.linears}
    assert fused.linears.keys() == places.keys()
    for path, (block, role, module, alone) in fused.linears.items():
        index, place = places[path]
        others = [p for p in anatomy.blocks[block].linears if p.role[0] in "qkv" and role[0] in "qkv"]
        others += [p for p in anatomy.blocks[block].linears if {p.role, role} <= {"gate", "up"}]
        assert (block, role, module) == (index, place.role, model.get_submodule(path))
        assert linear_shape(module) == (place.out_features, place.in_features)
        assert alone == (len(others) <= 1)
