"""Every method on every form of a packed base: the loss and gradients of the dequantized dense copy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import tuned
from compressed import INT4, pack
from tailorbird.adapt.methods.adapter import Attached, Place
from tailorbird.adapt.methods.attach import attach
from tailorbird.adapt.methods.low_rank import Lora
from tailorbird.adapt.methods.peft import OF_PEFT
from tailorbird.adapt.methods.registry import METHODS, method_named
from tailorbird.adapt.places import places_of
from tailorbird.adapt.rows import Row
from tailorbird.adapt.step import Step
from tailorbird.adapt.trunk import Trunk
from tailorbird.adapt.wrap import attached
from tailorbird.formats.modules import CompressedLinear
from tailorbird.formats.packed import (
    CodebookCoding,
    Coding,
    DoubleCoding,
    EntropyCoding,
    IntegerCoding,
    PackedWeight,
)
from tailorbird.kernels.packing import BITS
from tailorbird.kernels.reference import FP8, INT8, INT8_STATIC, round_inputs, round_to_scale
from tailorbird.kernels.reference import INT4 as INT4_INPUTS
from tailorbird.model.anatomy import Anatomy, read_anatomy
from tailorbird.model.checkpoint import open_checkpoint
from tailorbird.model.load import load
from tiny import save_model
from tuning import additions, examples, gradients, still

GROUP = 32
STATIC_SCALE = 0.03
Packing = Callable[[Tensor, torch.Generator], PackedWeight]
Put = Callable[[Any, dict[str, Place]], Attached]


def apart(found: Tensor, expected: Tensor) -> float:
    """Distance relative to the expected one's length."""
    return float((found - expected).detach().norm() / expected.detach().norm())


def coded(coding: Coding) -> Packing:
    return lambda weight, _: pack(weight, coding)


def with_parts(weight: Tensor, generator: torch.Generator) -> PackedWeight:
    """3 bits, a product of rank 4 and one value in twenty beside them."""
    packed = pack(weight, IntegerCoding(3, GROUP))
    up = torch.randn(len(weight), 4, generator=generator) * 0.02
    down = torch.randn(4, weight.shape[1], generator=generator) * 0.1
    mask = torch.rand(weight.shape, generator=generator) < 0.05
    return packed.with_low_rank(up, down).with_sparse(weight, mask)


def rotated(weight: Tensor, generator: torch.Generator) -> PackedWeight:
    """Codes for inputs behind a block Hadamard transform with signs."""
    signs = 2 * torch.randint(0, 2, (weight.shape[1] // GROUP, GROUP), generator=generator) - 1
    return pack(weight, INT4).with_transform(signs)


def mixed(weight: Tensor, generator: torch.Generator) -> PackedWeight:
    """Codes for inputs behind a Kronecker pair that is no rotation."""
    orders = 8, weight.shape[1] // 8
    left, right = (torch.eye(n) + 0.1 * torch.randn(n, n, generator=generator) for n in orders)
    return pack(weight, INT4).with_matrices(left, right)


FORMS: dict[str, Packing] = {
    "int4": coded(INT4),
    "nf4 double": coded(DoubleCoding("nf4", GROUP)),
    "low rank and sparse": with_parts,
    "hadamard": rotated,
    "kronecker": mixed,
}
#: settings of PEFT's methods that fit the model
PEFT: dict[str, dict[str, Any]] = {
    "dora": {"rank": 4},
    "pissa": {"rank": 4},
    "adalora": {"rank": 2, "initial": 4},
    "vera": {"rank": 32},
    "vblora": {"rank": 2, "vectors": 16, "length": 32},
    "c3a": {"block": 32},
    "loha": {"rank": 3},
    "lokr": {"rank": 2, "factor": 4},
}
#: those that test_step.py doesn't have
CODINGS: list[Coding] = [
    *(IntegerCoding(bits, GROUP) for bits in BITS if bits not in (3, 4)),
    IntegerCoding(4, GROUP, symmetric=True),
    CodebookCoding("fp4", GROUP),
    CodebookCoding("gauss2", GROUP),
]


class RoundedLinear(nn.Linear):
    """A dense linear of rounded inputs, whose gradient passes the rounding."""

    rounding: Callable[[Tensor], Tensor]

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input + (self.rounding(input) - input).detach(), self.weight)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Anatomy]:
    """A small dense model."""
    directory = save_model(tmp_path_factory.mktemp("model") / "m")
    return load(str(directory)).requires_grad_(False), read_anatomy(open_checkpoint(str(directory)))


def replaced(model: Any, places: dict[str, Place], made: Callable[[str, Place], nn.Module]) -> Any:
    for path, place in places.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, made(path, place).requires_grad_(False))
    return model


def pair(base: tuple[Any, Anatomy], packing: Packing, **inputs: Any) -> tuple[Any, Any]:
    """The model with packed linears, and its copy with dense ones of the same weights."""
    model, anatomy = base

    def packed(path: str, place: Place) -> nn.Module:
        generator = torch.Generator().manual_seed(sum(map(ord, path)))
        return CompressedLinear.from_packed(packing(place.weight(), generator), **inputs)

    one = copy.deepcopy(model)
    one = replaced(one, places_of(one, anatomy), packed)

    def dense(path: str, place: Place) -> nn.Module:
        rounding = rounding_of(inputs)
        kind = nn.Linear if rounding is None else RoundedLinear
        linear = kind(place.in_features, place.out_features, bias=False)
        linear.weight.data = place.weight().clone()
        if isinstance(linear, RoundedLinear):
            linear.rounding = rounding
        return linear

    other = copy.deepcopy(one)
    return one, replaced(other, places_of(other, anatomy), dense)


def rounding_of(inputs: dict[str, Any]) -> Callable[[Tensor], Tensor] | None:
    """What a linear with these settings does to its inputs."""
    if inputs.get("rounds"):
        return lambda x: x if x.requires_grad else round_inputs(x, GROUP, INT8)
    to = inputs.get("simulated")
    if to is None:
        return None
    if to == INT8_STATIC:
        return lambda x: round_to_scale(x, inputs["input_scale"])
    return lambda x: round_inputs(x, GROUP, to)


def learned(model: Any, anatomy: Anatomy, put: Put) -> tuple[float, Tensor]:
    """Loss and gradients of a step."""
    places = places_of(model, anatomy)
    method = put(model, places)
    with attached(model, places, method):
        rows = [Row.of(examples((21, 12, 2), 258))]
        loss, found, _ = gradients(Step(Trunk(model), method, still(method), 1000), rows)
    return loss, found


def agree(base: tuple[Any, Anatomy], packing: Packing, put: Put, **inputs: Any) -> None:
    """Both learn the same, and not nothing."""
    packed, dense = pair(base, packing, **inputs)
    loss, found = learned(packed, base[1], put)
    again, expected = learned(dense, base[1], put)
    assert loss == pytest.approx(again, rel=1e-5)
    assert float(expected.norm()) > 0
    assert apart(found, expected) < 5e-5


def low_rank(model: Any, places: dict[str, Place]) -> Attached:
    """Plain products."""
    return additions(places)


def shaken(name: str) -> Put:
    """A method away from its start."""

    def put(model: Any, places: dict[str, Place]) -> Attached:
        if name in OF_PEFT:
            made = attach(
                method_named(name, **PEFT.get(name, {})), model, places, torch.Generator().manual_seed(1)
            )
            return tuned.shaken(made, 0.05)
        given = {"adapters": tuned.existing_adapters(places)} if name == "eigenlorax" else {}
        return tuned.shaken(tuned.attach(tuned.small(name, **given), places), 0.05)

    return put


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [*METHODS, *OF_PEFT])
def test_a_method_learns_on_packed_weights_what_it_learns_on_dense_ones(
    name: str, form: str, base: tuple[Any, Anatomy]
) -> None:
    agree(base, FORMS[form], shaken(name))


@pytest.mark.parametrize("coding", CODINGS, ids=lambda coding: coding.label)
def test_every_coding_has_the_gradients_of_what_it_stands_for(
    coding: Coding, base: tuple[Any, Anatomy]
) -> None:
    agree(base, coded(coding), low_rank)


def test_entropy_coded_weights_have_the_gradients_of_what_they_stand_for(base: tuple[Any, Anatomy]) -> None:
    def packing(weight: Tensor, _: torch.Generator) -> PackedWeight:
        packed = PackedWeight.from_bfloat16(weight.bfloat16())
        assert isinstance(packed.coding, EntropyCoding)
        return packed

    agree(base, packing, low_rank)


@pytest.mark.parametrize("to", [FP8, INT4_INPUTS, INT8_STATIC])
@pytest.mark.parametrize("form", ["int4", "nf4"])
def test_gradients_pass_the_rounding_of_inputs(to: str, form: str, base: tuple[Any, Anatomy]) -> None:
    inputs = {"simulated": to} | ({"input_scale": STATIC_SCALE} if to == INT8_STATIC else {})
    coding = INT4 if form == "int4" else CodebookCoding("nf4", GROUP)
    agree(base, coded(coding), low_rank, **inputs)


def test_inputs_that_may_be_rounded_are_where_they_need_no_gradient(base: tuple[Any, Anatomy]) -> None:
    """Those of the first block's attention, before which nothing learns."""
    agree(base, coded(INT4), low_rank, rounds=True)


def test_a_wrong_gradient_would_show(base: tuple[Any, Anatomy]) -> None:
    """Weights that are a little other ones are told apart."""
    packed, dense = pair(base, coded(INT4))
    down = dense.model.layers[0].mlp.down_proj
    down.weight.data += 0.01 * down.weight.std() * torch.randn(down.weight.shape)

    def put(model: Any, places: dict[str, Place]) -> Attached:
        return tuned.shaken(Lora(rank=2).attach(places, torch.Generator().manual_seed(0)), 0.05)

    _, found = learned(packed, base[1], put)
    _, expected = learned(dense, base[1], put)
    assert apart(found, expected) > 5e-5
