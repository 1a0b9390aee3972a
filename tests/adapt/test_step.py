"""A step: the loss and gradients of its examples, however they share rows, passes, chunks and memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from compressed import INT4, save_compressed
from tailorbird.adapt.optimizers.registry import optimizer_named
from tailorbird.adapt.quick import quickened
from tailorbird.adapt.rows import IGNORED, Row
from tailorbird.adapt.step import Diverged, Step, held_out_loss, passes
from tailorbird.adapt.trunk import Trunk
from tailorbird.adapt.wrap import attached
from tailorbird.formats.packed import (
    BinaryCoding,
    CodebookCoding,
    Coding,
    DoubleCoding,
    IntegerCoding,
    TableCoding,
    VectorCoding,
)
from tiny import ARCHITECTURES, byte_tokenizer, make_model, save_model
from tuning import additions, examples, gradients, merge, open_model, still

LENGTHS = (37, 20, 9, 2)
CODINGS: list[Coding] = [
    INT4,
    IntegerCoding(3, 0),
    CodebookCoding("nf4", 32),
    DoubleCoding("nf4", 32),
    VectorCoding("gauss2x4", 32),
    TableCoding(3),
    BinaryCoding(32),
]


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Distance relative to the expected one's length."""
    return float((found - expected).detach().norm() / expected.detach().norm())


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_examples_in_one_row_learn_what_they_learn_alone(architecture: str, tmp_path: Path) -> None:
    model, places = open_model(save_model(tmp_path / "m", architecture))
    trunk = Trunk(model)
    assert trunk.packs == (architecture != "falcon"), trunk.note
    found = examples(LENGTHS, 258)
    alone = [Row.of([one]) for one in found]
    expected = sum(
        float(
            cross_entropy(model(row.ids[None]).logits[0], row.targets, ignore_index=IGNORED, reduction="sum")
        )
        for row in alone
    ) / sum(row.learned for row in alone)
    method = additions(places)
    assert held_out_loss(trunk, alone, 1) == pytest.approx(expected, rel=1e-5)
    with attached(model, places, method):
        loss, one_by_one, turns = gradients(
            Step(trunk, method, still(method), 1000 if not trunk.packs else 40), alone
        )
        assert turns == (4 if not trunk.packs else 2)
        if trunk.packs:
            again, together, turns = gradients(Step(trunk, method, still(method), 1000), [Row.of(found)])
            assert turns == 1
            assert again == pytest.approx(loss, rel=1e-5)
            assert apart(together, one_by_one) < 1e-5


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "mistral"])
@pytest.mark.parametrize("tokens", [1, 7, 16])
def test_chunks_give_the_gradient_of_the_whole_example(
    architecture: str, tokens: int, tmp_path: Path
) -> None:
    model, places = open_model(save_model(tmp_path / "m", architecture))
    trunk, method = Trunk(model), additions(places)
    rows = [Row.of(examples((37,), 258))]
    with attached(model, places, method):
        loss, whole, _ = gradients(Step(trunk, method, still(method), 37), rows)
        again, pieces, turns = gradients(Step(trunk, method, still(method), tokens), rows)
    assert turns == 2 * -(-37 // tokens) - 1
    assert again == pytest.approx(loss, rel=1e-5)
    assert apart(pieces, whole) < 1e-5


def test_blocks_computed_again_change_no_bit(tmp_path: Path) -> None:
    model, places = open_model(save_model(tmp_path / "m"))
    trunk, method = Trunk(model), additions(places)
    rows = [Row.of(examples(LENGTHS, 258))]
    with attached(model, places, method):
        _, kept, _ = gradients(Step(trunk, method, still(method), 1000), rows)
        _, again, _ = gradients(Step(trunk, method, still(method), 1000, recomputed=model.model.layers), rows)
    assert torch.equal(kept, again)
    assert "forward" not in vars(model.model.layers[0])


@pytest.mark.parametrize("ordered", [False, True], ids=["in order", "reordered"])
@pytest.mark.parametrize("coding", CODINGS, ids=lambda coding: coding.label)
def test_a_packed_base_learns_what_its_dequantized_copy_learns(
    coding: Coding, ordered: bool, tmp_path: Path
) -> None:
    save_compressed(tmp_path / "m", make_model("llama"), coding, ordered=ordered, tokenizer=byte_tokenizer())
    model, places = open_model(tmp_path / "m")
    method, rows = additions(places), [Row.of(examples(LENGTHS, 258))]
    with attached(model, places, method):
        loss, packed, _ = gradients(Step(Trunk(model), method, still(method), 1000), rows)
    for path, place in places.items():
        dense = torch.nn.Linear(place.in_features, place.out_features, bias=place.module.bias is not None)
        dense.weight.data = place.weight()
        parent, name = path.rsplit(".", 1)
        setattr(model.get_submodule(parent), name, dense.requires_grad_(False))
    with attached(model, places, method):
        again, copied, _ = gradients(Step(Trunk(model), method, still(method), 1000), rows)
    assert again == pytest.approx(loss, rel=1e-5)
    assert apart(packed, copied) < 1e-5


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_merged_weights_compute_what_additions_did(architecture: str, tmp_path: Path) -> None:
    model, places = open_model(save_model(tmp_path / "m", architecture))
    method, ids = additions(places), torch.arange(40)[None]
    plain = model(ids).logits
    with attached(model, places, method):
        expected = model(ids).logits
    assert torch.equal(model(ids).logits, plain)
    merge(places, method)
    assert apart(model(ids).logits, expected) < 1e-5
    assert apart(plain, expected) > 1e-3


def test_additions_that_are_nothing_change_no_logit(tmp_path: Path) -> None:
    model, places = open_model(save_model(tmp_path / "m"))
    method, ids = additions(places), torch.arange(40)[None]
    for parameter in method.parameters():
        if parameter.shape[1] == 4:  # the output's side
            parameter.data.zero_()
    expected = model(ids).logits
    with attached(model, places, method):
        assert torch.equal(model(ids).logits, expected)


def test_who_watches_a_linear_sees_what_it_is_given(tmp_path: Path) -> None:
    model, places = open_model(save_model(tmp_path / "m"))
    trunk, method, seen = Trunk(model), additions(places), []
    down = model.model.layers[1].mlp.down_proj
    down.register_forward_pre_hook(lambda module, given: seen.append(given[0].shape))
    with quickened(model), attached(model, places, method):
        gradients(Step(trunk, method, still(method), 1000), [Row.of(examples(LENGTHS, 258))])
    assert seen[-1] == (1, 128, 160)  # the step's tokens, continued


def test_what_isnt_finite_changes_nothing(tmp_path: Path) -> None:
    model, places = open_model(save_model(tmp_path / "m"))
    method = additions(places)
    next(iter(method.parameters())).data[0, 0] = float("nan")
    trunk = Trunk(model)
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    with attached(model, places, method):
        groups = [{"params": list(method.parameters()), "lr": 1.0, "base_lr": 1.0}]
        step = Step(trunk, method, optimizer_named("sgd").build(groups), 1000)
        step.begin([Row.of(examples(LENGTHS, 258))], 2, 5, 1.0)
        while step.advance():
            pass
        with pytest.raises(Diverged, match="step 3: the loss is nan"):
            step.finish()
    after = method.state_dict()
    assert all(torch.equal(one.nan_to_num(), after[name].nan_to_num()) for name, one in before.items())


def test_passes_hold_every_row_once_and_no_more_than_they_may() -> None:
    rows = [Row.of([one]) for one in examples((30, 10, 25, 5, 60, 8), 100)]
    found = passes(rows, 40, continued=False)
    assert [one.lengths for one in found] == [(30, 10), (25, 5), (60,), (8,)]
    assert [one.lengths for one in passes([Row.joined(rows)], 40, continued=False)] == [
        (30, 10), (25, 5), (60,), (8,)
    ]  # fmt: skip
    assert torch.equal(torch.cat([one.ids for one in found]), torch.cat([row.ids for row in rows]))
    assert [len(one) for one in passes(rows, 40, joined=False)] == [30, 10, 25, 5, 60, 8]


def test_passes_are_continued_to_few_lengths_by_an_example_that_teaches_nothing() -> None:
    rows = [Row.of([one]) for one in examples((300, 10, 700, 1500, 60, 8), 100)]
    found = passes(rows, 2048)
    assert [len(one) for one in found] == [1024, 1792]
    assert [one.lengths for one in found] == [(300, 10, 700, 14), (1500, 60, 8, 224)]
    assert all((one.targets[-one.lengths[-1] :] == IGNORED).all() for one in found)
    assert [one.learned for one in found] == [one.learned for one in passes(rows, 2048, continued=False)]


def test_continued_passes_have_the_gradients_of_their_examples(tmp_path: Path) -> None:
    model, places = open_model(save_model(tmp_path / "m"))
    trunk, method, seen = Trunk(model), additions(places), []
    down = model.model.layers[1].mlp.down_proj
    down.register_forward_pre_hook(lambda module, given: seen.append(given[0].shape[1]))
    found = []
    for weighs in (False, True):
        method.weighs_tokens = weighs
        with quickened(model), attached(model, places, method):
            seen.clear()
            for most in (1000, 30):
                rows = [Row.of([one]) for one in examples(LENGTHS, 258)]
                found.append(gradients(Step(trunk, method, still(method), most), rows)[:2])
        assert (set(seen) == {128, 30}) is not weighs
    for loss, gradient in found:
        assert loss == pytest.approx(found[-1][0], rel=1e-5)
        assert apart(gradient, found[-1][1]) < 1e-5


def test_no_example_predicts_the_next_one() -> None:
    found = examples((6, 5), 100)
    row = Row.of(found)
    assert row.positions.tolist() == [*range(6), *range(5)]
    assert row.targets[5] == row.targets[10] == IGNORED
    for start, one in zip((0, 6), found, strict=True):
        expected = torch.where(one.learned[1:], one.ids[1:], IGNORED)
        assert torch.equal(row.targets[start : start + len(one) - 1], expected)
