"""FlatQuant: exact before the rounding, stored as learned, and better where a few inputs stand out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from learned_weights import files, weight_of
from tailorbird.compress.blocks.flatquant import (
    WIDEST_VALUE,
    FlatQuant,
    FlatQuantWeight,
    LearnedMatrices,
    cayley,
    share_inputs,
)
from tailorbird.compress.blocks.training import learn, replaced
from tailorbird.compress.blocks.transform import LearnedScales
from tailorbird.formats.modules import CompressedLinear
from tailorbird.formats.packed import IntegerCoding
from tailorbird.formats.transform import invertible, weight_in_front
from tailorbird.kernels.kronecker import mix
from tailorbird.kernels.reference import round_inputs
from tailorbird.linear.quantize.rtn import Rtn

CODINGS = [
    IntegerCoding(2, 32, False), IntegerCoding(3, 64, True, "float16"), IntegerCoding(4, 0, False),
    IntegerCoding(8, 32, True),
]  # fmt: skip
each_coding = pytest.mark.parametrize("coding", CODINGS, ids=lambda coding: coding.label)


def started(coding: IntegerCoding, moved: float = 0.0) -> FlatQuantWeight:
    """What learns of `weight_of()`, each parameter moved at random."""
    weight = weight_of()
    learned = FlatQuant().begin(weight, Rtn()(weight, None, coding), coding)
    assert isinstance(learned, FlatQuantWeight)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in learned.parameters():
            parameter += moved * torch.randn(parameter.shape, generator=generator)
    learned.limit()
    return learned


def scales(width: int, seed: int) -> LearnedScales:
    made = LearnedScales(width, lambda asked: asked)
    with torch.no_grad():
        made.logarithms += 0.5 * weight_of(1, width, seed)[0]
    return made


def test_before_the_rounding_nothing_changes() -> None:
    """In float64, with matrices as they are stored and scales on both sides."""
    learned = started(IntegerCoding(4, 32), moved=0.4).double()
    learned.matrices.double()
    for matrix in (learned.matrices.left, learned.matrices.right):
        matrix.ends = [end.double() for end in matrix.ends]
    learned.weight = learned.weight.double()
    learned.inputs, learned.outputs = scales(80, 3).double(), scales(6, 4).double()
    x = weight_of(9, 80, seed=5).double()
    rows = learned.outputs()[:, None]
    found = mix(x / learned.inputs(), *learned.matrices()) @ (learned.behind() * rows).t()
    expected = x @ learned.weight.t()
    assert (found - expected).abs().max() <= 1e-12 * expected.abs().max() * 100
    assert not torch.allclose(learned.behind(), learned.weight, atol=0.1)


@each_coding
@pytest.mark.parametrize("moved", [0.0, 0.4])
def test_what_is_stored_is_what_was_learned(coding: IntegerCoding, moved: float) -> None:
    learned = started(coding, moved)
    packed = learned.packed()
    assert packed.transform is not None
    assert packed.transform.matrices == "bfloat16"
    assert torch.equal(packed.behind_transform.dequantize(), learned())
    assert torch.equal(packed.dequantize(), weight_in_front(learned().detach(), packed.tensors))


@each_coding
@pytest.mark.parametrize("rounds_to", [None, "int4", "int8", "fp8"])
def test_a_module_that_learns_gives_what_the_stored_one_will(
    coding: IntegerCoding, rounds_to: str | None
) -> None:
    learned = started(coding, 0.3)
    learned.rounds_to = rounds_to
    module = nn.Linear(80, 6).requires_grad_(False)
    weight = module.weight.clone()
    x = weight_of(7, 80, seed=3)
    with torch.no_grad(), replaced({"w": module}, {"w": learned}):
        found = module(x)
    packed = learned.packed()
    mixed = mix(x, packed.tensors["left"], packed.tensors["right"])
    reads = mixed if rounds_to is None else round_inputs(mixed, coding.group_size, rounds_to)
    expected = reads @ packed.behind_transform.dequantize().t() + module.bias
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    assert torch.equal(module.weight, weight)
    assert not module._forward_pre_hooks


def test_gradients_reach_all_that_is_learned() -> None:
    learned = started(IntegerCoding(3, 32), 0.2)
    learned.rounds_to = "int4"
    x = weight_of(7, 80, seed=3).requires_grad_()
    (learned.reads(x) @ learned().t()).square().sum().backward()
    assert x.grad is not None
    assert all(one.grad is not None and one.grad.abs().sum() > 0 for one in learned.parameters())


def test_a_matrix_stays_invertible_wherever_it_is_pushed() -> None:
    matrices = LearnedMatrices(192)
    with torch.no_grad():
        for parameter in matrices.parameters():
            parameter += 50 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    matrices.limit()
    for matrix in matrices():
        assert invertible(matrix)
        values = torch.linalg.svdvals(matrix)
        assert values[0] <= 1.02 * WIDEST_VALUE
        assert values[-1] >= 0.5 / WIDEST_VALUE


def test_turned_matrices_stay_orthogonal() -> None:
    turned = cayley(3 * weight_of(12, 12))
    torch.testing.assert_close(turned @ turned.t(), torch.eye(12), rtol=0, atol=1e-5)


def outstanding(seed: int = 1) -> Tensor:
    """Inputs ``[windows, length, 64]``, of which two channels are far larger than the others."""
    x = torch.randn(4, 64, 64, generator=torch.Generator().manual_seed(seed))
    x[..., [5, 40]] *= 40
    return x


def test_inputs_that_stand_out_cost_far_less(tmp_path: Path) -> None:
    weight, coding = weight_of(48, 64), IntegerCoding(4, 64)
    weight[:, [5, 40]] /= 40  # as networks have it: what stands out matters no more than the rest
    x = outstanding()
    packed = Rtn()(weight, None, coding)
    module = nn.Linear(64, 48, bias=False).requires_grad_(False)
    module.weight.copy_(packed.dequantize())
    inputs, targets = files(tmp_path, x, x @ weight.t())
    method = FlatQuant(steps=100, batch=4, rate=0.05)
    learned = method.begin(weight, packed, coding)
    assert isinstance(learned, FlatQuantWeight)
    learned.rounds_to, learned.inputs = "int4", LearnedScales(64, lambda asked: asked)
    found = learn(method, {"w": module}, {"w": learned}, module, inputs, targets, 0, [(0, 4)])
    assert found.after < 0.5 * found.before
    plain = CompressedLinear.from_packed(packed, simulated="int4")
    stored = CompressedLinear.from_packed(learned.packed(), simulated="int4")
    fresh = outstanding(seed=9)
    outputs = plain(fresh), stored(fresh / learned.inputs())
    before, after = ((output - fresh @ weight.t()).square().sum() for output in outputs)
    assert after < 0.5 * before


def test_where_it_didn_t_help_the_weight_is_what_it_was() -> None:
    coding = IntegerCoding(3, 32)
    packed = Rtn()(weight_of(), None, coding)
    kept = started(coding).kept(packed)
    assert torch.equal(kept.dequantize(), packed.dequantize())
    assert kept.transform == started(coding).packed().transform


def test_linears_of_one_input_share_matrices() -> None:
    three = [started(IntegerCoding(4, 32)) for _ in range(3)]
    share_inputs([three[:2], three[2:], []])
    assert three[0].matrices is three[1].matrices
    assert three[0].matrices is not three[2].matrices
    shared = FlatQuant().optimizer(three).param_groups[0]["params"]
    assert len(shared) == len(set(map(id, shared))) == 2 * len(list(three[0].matrices.parameters()))
