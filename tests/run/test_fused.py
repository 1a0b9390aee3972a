"""Compiled blocks agree with transformers' modules, whatever the batch, and step aside where they can't."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressed import save_compressed
from readings import LENGTH, by_modules, in_pieces, tokens
from tailorbird.formats.modules import CompressedLinear
from tailorbird.formats.packed import CodebookCoding, GroupedCoding, IntegerCoding
from tailorbird.kernels import blocks, native
from tailorbird.model.anatomy import read_anatomy
from tailorbird.model.checkpoint import open_checkpoint
from tailorbird.model.layout import ModelLayout
from tailorbird.model.load import load
from tailorbird.run.fused import FusedModel, Trees, obstacle
from tailorbird.run.generate import FusedDecoding, ModuleDecoding, decode
from tailorbird.run.parts import Unsuited, linear_shape
from tiny import ARCHITECTURES, make_model

pytestmark = pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")

INT4, NF4 = IntegerCoding(4, 32), CodebookCoding("nf4", 32)


def compressed(
    directory: Path,
    architecture: str,
    coding: GroupedCoding = INT4,
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


@pytest.mark.parametrize(
    "change",
    [
        wrap,
        replace_forward,
        narrow_angles,
        lambda model: model.train(),
        lambda model: model.model.norm.register_forward_hook(lambda *_: None),
        lambda model: model.model.layers[0].register_forward_pre_hook(lambda *_: None),
        lambda model: setattr(model.model.layers[0], "input_layernorm", nn.Identity().eval()),
        lambda model: setattr(model.model.layers[0].self_attn, "q_proj", nn.Identity().eval()),
        lambda model: setattr(model.config, "_attn_implementation_internal", "my_attention"),
    ],
)
def test_a_model_that_was_touched_runs_through_its_modules(
    change: Callable[[Any], Any], tmp_path: Path
) -> None:
    model = compressed(tmp_path / "m", "llama")
    assert obstacle(model) is None
    change(model)
    assert obstacle(model)
    assert isinstance(decode(model), ModuleDecoding)
    with pytest.raises(Unsuited):
        FusedModel(model)


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
