"""LoQT: subspaces of gradients, and merges that lose as little as codes and a subspace can hold."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tailorbird
from compressed import save_compressed
from own_weights import rows, take
from tailorbird.adapt.methods.loqt import AttachedLoqt, Loqt, Subspace, compensated, merge_steps, subspace
from tailorbird.adapt.methods.registry import method_named
from tailorbird.adapt.optimizers.registry import optimizer_named
from tailorbird.adapt.rows import IGNORED, Row
from tailorbird.adapt.step import Step
from tailorbird.adapt.trunk import Trunk
from tailorbird.adapt.whole import check_names, write_checkpoint
from tailorbird.adapt.wrap import put
from tailorbird.errors import SettingsError
from tailorbird.formats.modules import CompressedLinear
from tailorbird.formats.packed import CodebookCoding, GroupedCoding, IntegerCoding, TableCoding
from tailorbird.linear.quantize.rtn import Rtn
from tailorbird.model.anatomy import read_anatomy
from tailorbird.model.checkpoint import open_checkpoint
from tiny import make_model
from tuning import examples, open_model

CODINGS: list[GroupedCoding] = [
    *(IntegerCoding(bits, 32) for bits in (2, 4, 8)),
    IntegerCoding(4, 0, symmetric=True),
    CodebookCoding("nf4", 32),
]


def named(coding: GroupedCoding | None) -> str:
    return "dense" if coding is None else coding.label


def begun(
    directory: Path, coding: GroupedCoding | None, architecture: str = "llama", **settings: Any
) -> tuple[Any, Step]:
    """A small model, dense or packed, and the step of a tuning of it."""
    source = make_model(architecture)
    if coding is None:
        source.save_pretrained(directory)
    else:
        save_compressed(directory, source, coding, ordered=isinstance(coding, IntegerCoding))
    model, places = open_model(directory)
    chosen = Loqt(**({"rank": 3, "interval": 2, "growth": 1.0} | settings))
    method = chosen.attach_to(model, places, torch.Generator())
    put(model, places, method)
    groups = [{"params": method.learned(), "lr": 0.5, "base_lr": 0.5}]
    return model, Step(Trunk(model), method, optimizer_named("sgd", momentum=0.0).build(groups), 200, None)


def subspaces(step: Step) -> dict[str, Subspace]:
    assert isinstance(step.method, AttachedLoqt)
    return {path.replace("/", "."): one for path, one in step.method.additions.items()}  # type: ignore[misc]


def weights_of(step: Step) -> dict[str, Tensor]:
    """What linears multiply by."""
    assert isinstance(step.method, AttachedLoqt)
    return {path: step.method.places[path].weight() + one.delta() for path, one in subspaces(step).items()}


def test_intervals_grow_and_the_last_one_is_whole() -> None:
    assert merge_steps(1000, 100, 1.2)[:5] == [0, 100, 201, 302, 403]
    assert merge_steps(50, 100, 1.2) == [0]
    for steps, interval, growth in ((1000, 100, 1.2), (5000, 20, 1.5), (300, 7, 1.0)):
        found = merge_steps(steps, interval, growth)
        gaps = [after - before for before, after in itertools.pairwise(found)]
        assert gaps == sorted(gaps)
        assert min(gaps) >= interval
        assert found[-1] + interval < steps


@pytest.mark.parametrize("shape", [(7, 20), (20, 7), (9, 9)])
def test_the_subspace_is_that_of_the_largest_singular_values(shape: tuple[int, int]) -> None:
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    basis = subspace(gradient, 4)
    left, _, right = torch.linalg.svd(gradient.double(), full_matrices=False)
    vectors = left[:, :4].T if shape[0] < shape[1] else right[:4]
    torch.testing.assert_close(basis @ basis.T, torch.eye(4))
    torch.testing.assert_close((basis.double() @ vectors.T).abs(), torch.eye(4).double(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(24, 72), (72, 24)])
@pytest.mark.parametrize("coding", CODINGS, ids=lambda coding: coding.label)
def test_what_rounding_takes_lies_outside_of_the_subspace(
    coding: GroupedCoding, shape: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(1)
    weight, moved = (torch.randn(shape, generator=generator) * size for size in (0.1, 0.02))
    stored = Rtn()(weight, None, coding)
    basis = subspace(torch.randn(shape, generator=generator), 5)
    target = stored.dequantize() + moved
    lacking = []
    for rounds in (0, 1, 5):
        packed, beside = compensated(stored, target, basis, rounds)
        share = basis.T @ beside if shape[0] < shape[1] else beside.T @ basis
        lacking.append(target - packed.dequantize() - share)
    outside = basis @ lacking[2] if shape[0] < shape[1] else lacking[2] @ basis.T
    assert outside.abs().max() < 1e-6
    norms = [float(one.norm()) for one in lacking]
    assert norms[0] > norms[1] >= norms[2] > 0


@pytest.mark.parametrize("coding", CODINGS, ids=lambda coding: coding.label)
def test_what_has_not_moved_keeps_every_byte(coding: GroupedCoding) -> None:
    stored = Rtn()(torch.randn(24, 72, generator=torch.Generator().manual_seed(1)), None, coding)
    packed, beside = compensated(stored, stored.dequantize(), torch.eye(24)[:3], 5)
    assert all(torch.equal(packed.tensors[part], tensor) for part, tensor in stored.tensors.items())
    assert not beside.any()


@pytest.mark.parametrize("coding", [None, *CODINGS], ids=named)
def test_a_merge_takes_the_gradient_of_the_whole_weight(coding: GroupedCoding | None, tmp_path: Path) -> None:
    model, step = begun(tmp_path, coding)
    before, row = weights_of(step), Row.of(examples((40,), 258))
    step.begin([row], 0, 100, 1.0)
    while step.advance():
        pass
    found = {path: one.whole.grad for path, one in subspaces(step).items() if one.whole is not None}
    assert len(found) == len(before)
    exact: Any = make_model("llama").double()
    exact.lm_head.weight.data.copy_(model.lm_head.weight)
    for path, weight in before.items():
        exact.get_submodule(path).weight.data.copy_(weight)
    logits = exact(row.ids[None]).logits[0]
    nn.functional.cross_entropy(logits, row.targets, ignore_index=IGNORED).backward()
    for path, gradient in found.items():
        expected = exact.get_submodule(path).weight.grad.float()
        assert gradient is not None
        assert (gradient - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_dense_weights_take_in_what_was_learned_and_nothing_else_changes(
    architecture: str, tmp_path: Path
) -> None:
    _, step = begun(tmp_path, None, architecture)
    begin = weights_of(step)
    take(step, 0, rows())
    assert all(torch.equal(one, begin[path]) for path, one in weights_of(step).items())
    take(step, 1, rows())
    learned = weights_of(step)
    assert all(torch.linalg.matrix_rank(learned[path] - one, rtol=1e-3) <= 3 for path, one in begin.items())
    assert any(not torch.equal(one, begin[path]) for path, one in learned.items())
    take(step, 2, rows(seed=1))
    assert not any(one.learned.any() for one in subspaces(step).values())
    for path, one in weights_of(step).items():
        torch.testing.assert_close(one, learned[path], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("coding", CODINGS, ids=lambda coding: coding.label)
def test_a_merge_into_codes_stays_near_and_the_loss_falls(coding: GroupedCoding, tmp_path: Path) -> None:
    _, step = begun(tmp_path, coding)
    read = rows()
    first = take(step, 0, read).loss
    for number in range(1, 8):
        learned = weights_of(step)
        loss = take(step, number, read).loss
        if number in merge_steps(100, 2, 1.0):
            for path, one in weights_of(step).items():
                assert isinstance(step.method, AttachedLoqt)
                module = step.method.places[path].module
                assert isinstance(module, CompressedLinear)
                rounding = Rtn()(learned[path], None, coding).dequantize() - learned[path]
                assert (one - learned[path]).norm() <= rounding.norm() * 1.01 + 1e-6
    assert loss < first


@pytest.mark.parametrize("coding", [None, CODINGS[1], CODINGS[4]], ids=named)
def test_a_state_goes_on_with_the_same_bits(coding: GroupedCoding | None, tmp_path: Path) -> None:
    found = []
    for stopped in (False, True):
        _, step = begun(tmp_path / str(stopped), coding)
        for number in range(3):
            take(step, number, rows(seed=number))
        if stopped:
            state = copy.deepcopy(step.method.state_dict())
            _, step = begun(tmp_path / "again", coding)
            step.method.load_state_dict(state)
        for number in range(3, 6):
            take(step, number, rows(seed=number))
        found.append(weights_of(step))
    assert all(torch.equal(one, found[1][path]) for path, one in found[0].items())


@pytest.mark.parametrize("coding", [None, CODINGS[1], CODINGS[4]], ids=named)
def test_the_checkpoint_has_the_tuned_logits(coding: GroupedCoding | None, tmp_path: Path) -> None:
    model, step = begun(tmp_path / "m", coding)
    for number in range(4):
        take(step, number, rows(seed=number))
    assert step.method.conclude()
    checkpoint, ids = open_checkpoint(str(tmp_path / "m")), torch.arange(40)[None]
    anatomy, changed = read_anatomy(checkpoint), step.method.changed()
    assert changed is not None
    check_names(checkpoint, changed)
    out = tmp_path / "out"
    out.mkdir()
    write_checkpoint(out, checkpoint, anatomy, changed, {}, step.method.low_rank_parts())
    opened = tailorbird.load(out)
    torch.testing.assert_close(opened(ids).logits, model(ids).logits, atol=2e-4, rtol=2e-4)
    assert not torch.allclose(tailorbird.load(tmp_path / "m")(ids).logits, opened(ids).logits, atol=1e-3)
    linear = opened.model.layers[0].self_attn.q_proj
    assert isinstance(linear, CompressedLinear) == (coding is not None)
    assert coding is None or linear.low_rank.rank == 3


@pytest.mark.parametrize(
    ("settings", "stated"),
    [
        ({"rank": 0}, "rank 0"),
        ({"alpha": 0.0}, "alpha 0.0"),
        ({"interval": 0}, "interval 0"),
        ({"growth": 0.9}, "growth 0.9"),
        ({"rounds": -1}, "rounds -1"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], stated: str) -> None:
    with pytest.raises(SettingsError, match=stated):
        Loqt(**settings)


def test_other_bases_are_refused(tmp_path: Path) -> None:
    save_compressed(tmp_path, make_model("llama"), TableCoding(4))
    model, places = open_model(tmp_path)
    with pytest.raises(SettingsError, match="codes of table4"):
        Loqt(rank=2).attach_to(model, places, torch.Generator())
    with pytest.raises(SettingsError, match="rank 100000"):
        Loqt(rank=100000).attach_to(model, places, torch.Generator())
    with pytest.raises(SettingsError, match="changes the model's modules by itself"):
        method_named("ist", method="loqt")


def test_a_base_with_rotated_inputs_is_refused(tmp_path: Path) -> None:
    save_compressed(tmp_path, make_model("llama"), IntegerCoding(4, 32))
    model, places = open_model(tmp_path)
    first = next(iter(places.values())).module
    first.signs = torch.ones(1, first.in_features, dtype=torch.int8)
    with pytest.raises(SettingsError, match="with rotated inputs"):
        Loqt(rank=2).attach_to(model, places, torch.Generator())
