"""MEFT: gradients and inputs of reversible blocks, what they keep, the start, and the adapter on disk."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compressed import INT4, save_compressed
from tailorbird.adapt.methods import meft
from tailorbird.adapt.methods.adapter import Attached
from tailorbird.adapt.methods.attach import attach
from tailorbird.adapt.methods.registry import OF_BLOCKS, method_named
from tailorbird.adapt.open import load_adapted
from tailorbird.adapt.quick import quickened
from tailorbird.adapt.recompute import recomputing
from tailorbird.adapt.reversible import NotReversed, packed, unpacked
from tailorbird.adapt.rows import Row
from tailorbird.adapt.save import check_mergeable, write_adapter
from tailorbird.adapt.step import Step
from tailorbird.adapt.trunk import Trunk
from tailorbird.errors import SettingsError, UnsupportedArchitecture
from tailorbird.model.checkpoint import open_checkpoint
from tailorbird.model.identity import identity
from tailorbird.model.load import load, load_tokenizer
from tiny import ARCHITECTURES, byte_tokenizer, make_model, save_model
from tuning import examples, gradients, open_model, still

IDS = torch.randint(0, 258, (2, 24), generator=torch.Generator().manual_seed(0))
RANK = 4
TEXT = "def add(first, second):\n    return first + second\n\n\nprint(add(1, 2))\n"


def opened(
    folder: Path, depth: int = 2, dtype: torch.dtype = torch.float32, **settings: Any
) -> tuple[Any, Attached]:
    """A Llama with the method, away from its start."""
    directory = folder / f"{depth}"
    if not directory.exists():
        save_model(directory, "llama", num_hidden_layers=depth)
    model, places = open_model(directory, dtype)
    attached = put(model, places, **settings)
    return model, attached.to(torch.promote_types(dtype, torch.float32))


def put(model: Any, places: Any, shaken: float = 0.1, **settings: Any) -> Attached:
    """The method on a model, away from its start."""
    method = method_named("meft", **{"rank": RANK, "bits": 4, **settings})
    attached = attach(method, model, places, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in attached.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * shaken)
    return attached


def keep_all(blocks: list[Any], attached: Any, lam: float) -> None:
    """Let blocks run by the method's formulas, word for word, in PyTorch's own graph."""
    streams: list[Tensor] = []
    for number, block in enumerate(blocks):

        def forward(
            hidden: Tensor, *given: Any, number: int = number, block: Any = block, **more: Any
        ) -> Any:
            x1, x2 = streams if number else (hidden, hidden)
            y1 = lam * x1 + type(block).forward(block, x2, *given, **more)
            added = attached.between[number](y1) if number < len(blocks) - 1 else 0
            streams[:] = [x2 + added, y1]
            return y1

        block.forward = forward


class Kept:
    """A tensor that a graph keeps for its gradient, without the graph behind it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()


@contextmanager
def kept_tensors(model: Any) -> Iterator[Callable[[], int]]:
    """Bytes that graphs keep which were made until the end of the block, less the model's own."""
    held: weakref.WeakSet[Kept] = weakref.WeakSet()
    weights = {one.untyped_storage().data_ptr() for one in model.parameters()}

    def pack(tensor: Tensor) -> Kept:
        kept = Kept(tensor)
        held.add(kept)
        return kept

    def count() -> int:
        storages = (one.tensor.untyped_storage() for one in held)
        sizes = {one.data_ptr(): one.nbytes() for one in storages}
        return sum(size for pointer, size in sizes.items() if pointer not in weights)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        yield count


def inputs_of(model: Any, tensors: dict[int, list[Tensor]]) -> None:
    """Write down what each block reads, in forward and gradient."""
    for number, block in enumerate(model.model.layers):

        def keep(module: Any, given: tuple[Tensor, ...], number: int = number) -> None:
            tensors.setdefault(number, []).append(given[0].detach().clone())

        block.input_layernorm.register_forward_pre_hook(keep)


@pytest.mark.parametrize(("bits", "last"), [(3, 0), (8, 0), (4, 3)])
def test_gradients_are_those_of_the_same_function_with_everything_kept(
    bits: int, last: int, tmp_path: Path
) -> None:
    save_model(tmp_path / "m", "gpt2", n_layer=5)  # whose norms compute in float64
    found = []
    for own in (True, False):
        model, places = open_model(tmp_path / "m", torch.float64)
        attached = put(model, places, bits=bits, blocks=last).double()
        if not own:
            keep_all(list(model.transformer.h[-last:]), attached, 2.0**-bits)
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        found.append([float(loss.detach()), *(one.grad for one in attached.parameters())])
    assert len(found[0]) == 1 + 4 * (2 * (last or 5) - 1)
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-9)
    for one, other in zip(found[0][1:], found[1][1:], strict=True):
        assert other.norm() > 1e-6
        assert (one - other).norm() <= 1e-8 * other.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("depth", "bits"), [(8, 8), (30, 3), (30, 8)])
def test_inputs_of_blocks_come_back_to_the_bit(
    depth: int, bits: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    model, _ = opened(tmp_path, depth, dtype, bits=bits)
    read: dict[int, list[Tensor]] = {}
    inputs_of(model, read)
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    assert len(read) == depth
    for first, again in read.values():
        assert torch.equal(first, again)


@pytest.mark.parametrize("bits", [1, 4, 5, 8])
@pytest.mark.parametrize("width", [6, 7])
def test_lost_bits_are_packed_and_come_back(bits: int, width: int) -> None:
    lost = torch.randint(0, 2**bits, (3, width), generator=torch.Generator().manual_seed(0))
    kept = packed(lost, bits)
    assert kept.nbytes == (3 * width // 2 if bits <= 4 and width == 6 else 3 * width)
    assert torch.equal(unpacked(kept, width, bits), lost)


@pytest.mark.parametrize(("bits", "share"), [(4, 8), (8, 4)])
def test_a_block_keeps_an_eighth_or_a_quarter_of_its_input(bits: int, share: int, tmp_path: Path) -> None:
    """Of what it keeps in float32 where it's computed again from its input."""

    def kept(depth: int, again: bool) -> int:
        model, _ = opened(tmp_path, depth, bits=bits)
        chosen: list[Any] = []
        if again:  # plain blocks, whose inputs have gradients
            model, _ = open_model(tmp_path / f"{depth}")
            chosen = list(model.model.layers)
            model.get_input_embeddings().weight.requires_grad_()
        with kept_tensors(model) as count, recomputing(chosen):
            loss = model(input_ids=IDS, use_cache=False).logits.sum()
            found = count()
            del loss
        return found

    stream = IDS.numel() * 64 * 4
    assert kept(12, again=True) - kept(4, again=True) == 8 * stream
    assert kept(12, again=False) - kept(4, again=False) == 8 * stream // share


@pytest.mark.parametrize("architecture", [*sorted(ARCHITECTURES), "packed"])
def test_without_the_older_stream_and_adapters_it_is_the_model(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if architecture == "packed":
        save_compressed(tmp_path / "m", make_model("llama"), INT4, tokenizer=byte_tokenizer())
    else:
        save_model(tmp_path / "m", architecture)
    model, places = open_model(tmp_path / "m")
    expected = model(input_ids=IDS, use_cache=False).logits
    monkeypatch.setattr(meft, "MOST_BITS", 62)
    attached = put(model, places, bits=62)
    with torch.no_grad():
        away = model(input_ids=IDS, use_cache=False).logits
        for parameter in attached.parameters():
            parameter.zero_()
        found = model(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert (away - expected).norm() > 1e-3 * expected.norm()


def test_begins_the_nearer_to_the_model_the_more_bits_there_are() -> None:
    ids = load_tokenizer("demo")(TEXT, return_tensors="pt")["input_ids"]
    expected = load("demo", dtype=torch.float32)(input_ids=ids, labels=ids, use_cache=False).loss
    off = []
    for bits in (3, 5, 8):
        model, places = open_model("demo")
        put(model, places, shaken=0.0, bits=bits)
        off.append(
            abs(float(model(input_ids=ids, labels=ids, use_cache=False).loss.detach() - expected.detach()))
        )
    assert off[0] > 3 * off[1] > 9 * off[2]
    assert off[2] < 0.01


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_examples_in_one_row_learn_what_they_learn_alone(architecture: str, tmp_path: Path) -> None:
    model, places = open_model(save_model(tmp_path / "m", architecture))
    trunk = Trunk(model)
    attached = put(model, places)
    found = examples((37, 20, 9, 2), 258)
    with quickened(model):
        loss, alone, turns = gradients(
            Step(trunk, attached, still(attached), 10, clip=None), [Row.of([one]) for one in found]
        )
        assert turns == 4  # and no example is cut
        if trunk.packs:
            step = Step(trunk, attached, still(attached), 1000, clip=None)
            again, together, turns = gradients(step, [Row.of(found)])
            assert turns == 1
            assert again == pytest.approx(loss, rel=1e-5)
            assert (together - alone).norm() < 1e-4 * alone.norm()


def test_learns_in_float32_on_a_model_of_sixteen_bits(tmp_path: Path) -> None:
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model, attached = opened(tmp_path, 2, dtype)
        trunk = Trunk(model)
        step = Step(trunk, attached, still(attached), 1000, clip=None)
        found.append(gradients(step, [Row.of(examples((37, 20), 258))])[1])
    assert found[1].dtype == torch.float32
    assert (found[1] - found[0]).norm() < 0.1 * found[0].norm()


@pytest.mark.parametrize("on_codes", [False, True])
def test_what_was_learned_is_loaded_and_generates_with_a_cache(on_codes: bool, tmp_path: Path) -> None:
    if on_codes:
        save_compressed(tmp_path / "m", make_model("llama"), INT4, tokenizer=byte_tokenizer())
    else:
        save_model(tmp_path / "m")
    model, places = open_model(tmp_path / "m")
    attached = put(model, places)
    with torch.no_grad():
        expected = model(input_ids=IDS, use_cache=False).logits
    origin = {
        "base": identity(open_checkpoint(str(tmp_path / "m"))), "base_name": str(tmp_path / "m"),
        "method": {
            "method": "meft", "method_settings": {"rank": RANK, "bits": 4}, "targets": ["all"], "seed": 0,
        },
    }  # fmt: skip
    (tmp_path / "a").mkdir()
    write_adapter(tmp_path / "a", places, attached, list(places), "base", origin)
    adapted = load_adapted(str(tmp_path / "m"), tmp_path / "a", dtype=torch.float32)
    assert torch.equal(adapted(input_ids=IDS, use_cache=False).logits, expected)
    texts = [
        adapted.generate(IDS[:1], max_new_tokens=12, do_sample=False, use_cache=cache, pad_token_id=257)
        for cache in (True, False)
    ]
    assert torch.equal(*texts)
    with pytest.raises(SettingsError, match="merge"):
        check_mergeable("meft", attached)


def test_says_where_blocks_give_other_numbers_when_they_run_again(tmp_path: Path) -> None:
    model, _ = opened(tmp_path, 6)
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    model.model.layers[3].mlp.register_forward_hook(lambda module, given, output: output * 1.001)
    with pytest.raises(NotReversed, match="the same numbers"):
        loss.backward()


@pytest.mark.parametrize("number", [math.nan, math.inf, 1e9])
def test_refuses_numbers_that_streams_cant_hold(number: float, tmp_path: Path) -> None:
    model, attached = opened(tmp_path)
    with torch.no_grad():
        next(attached.parameters())[0] = number
    with pytest.raises(NotReversed, match="finite"):
        model(input_ids=IDS, use_cache=False)


def test_refuses_a_model_that_changes_what_blocks_give(tmp_path: Path) -> None:
    model, _ = opened(tmp_path)
    model.model.layers[0].register_forward_hook(lambda module, given, output: output * 1.0)
    with pytest.raises(UnsupportedArchitecture, match="before the next one"):
        model(input_ids=IDS, use_cache=False)


def test_says_what_it_is_and_begins_by_its_generator(tmp_path: Path) -> None:
    kind = OF_BLOCKS["meft"]
    assert (kind.name, kind.family) == ("meft", "adapter")
    assert "arXiv:2306.00477" in kind.paper
    save_model(tmp_path / "m")
    states = []
    for seed in (4, 4, 5):
        model, places = open_model(tmp_path / "m")
        method = attach(method_named("meft", rank=3), model, places, torch.Generator().manual_seed(seed))
        states.append(method.state_dict())
        assert sum(one.numel() for one in method.parameters()) == 3 * (2 * 64 * 3 + 3 + 64)
    one, same, other = states
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"rank": 0}, "rank 0"),
        ({"bits": 0}, "bits 0"),
        ({"bits": 9}, "bits 9"),
        ({"blocks": -1}, "blocks -1"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        method_named("meft", **settings)


def test_refuses_more_blocks_than_there_are_and_some_of_the_linears(tmp_path: Path) -> None:
    model, places = open_model(save_model(tmp_path / "m"))
    with pytest.raises(SettingsError, match="2 at most"):
        put(model, places, blocks=3)
    attention = {path: place for path, place in places.items() if place.role in "qkvo"}
    with pytest.raises(SettingsError, match="--targets"):
        put(model, attention)
