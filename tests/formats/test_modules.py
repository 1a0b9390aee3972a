"""Compressed modules: they look like what they replace, and nothing changes their stored tensors."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from packed_weights import random_packed
from tailorbird.errors import CheckpointError, SettingsError
from tailorbird.formats.modules import CompressedEmbedding, CompressedLinear, share
from tailorbird.formats.packed import (
    BinaryCoding,
    CodebookCoding,
    CodesCoding,
    FloatCoding,
    IntegerCoding,
    PackedWeight,
    TableCoding,
    VectorCoding,
)
from tailorbird.kernels.packing import BITS

CODING = IntegerCoding(4, 32)
CODINGS = st.builds(IntegerCoding, st.sampled_from(BITS), st.just(64), st.booleans()) | st.sampled_from(
    [
        CodebookCoding("nf4", 64),
        CodebookCoding("fp4", 64),
        CodebookCoding("gauss2", 64),
        CodebookCoding("gauss3", 64),
        VectorCoding("gauss2x4", 64),
        VectorCoding("gauss3x2", 64),
        TableCoding(2, "float16"),
        TableCoding(3),
        TableCoding(4),
        BinaryCoding(64),
    ]
)


def make_linear(
    coding: CodesCoding = CODING, shape: tuple[int, int] = (24, 96), order: bool = False, bias: bool = True
) -> CompressedLinear:
    return CompressedLinear.from_packed(
        random_packed(coding, shape, order), torch.linspace(-1, 1, shape[0]) if bias else None
    )


def stored(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name


@given(coding=CODINGS, order=st.booleans(), bias=st.booleans())
@settings(max_examples=40, deadline=None)
def test_a_linear_computes_with_the_weight_that_it_shows(coding, order, bias) -> None:
    module = make_linear(coding, (24, 172), order, bias)
    assert isinstance(module, nn.Linear)
    assert module.weight.shape == (24, 172)
    assert torch.equal(module.weight, module.packed().dequantize())
    x = torch.randn(2, 3, 172)
    expected = nn.functional.linear(x, torch.Tensor(module.packed().dequantize()), module.bias)
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-3)


@given(coding=CODINGS, order=st.booleans(), ends=st.tuples(st.integers(0, 24), st.integers(0, 24)))
@settings(max_examples=40, deadline=None)
def test_some_rows_of_the_weight_are_those_of_all(coding, order, ends) -> None:
    module = make_linear(coding, (24, 172), order)
    assert torch.equal(module.weight_rows(slice(*ends)), module.weight[slice(*ends)])


def test_nothing_but_stored_tensors_and_bias_is_saved() -> None:
    assert list(make_linear().state_dict()) == ["bias", "codes", "scales", "zeros"]
    module = make_linear(IntegerCoding(4, 32, symmetric=True), order=True, bias=False)
    assert list(module.state_dict()) == ["codes", "scales", "order"]
    assert [name for name, _ in make_linear().named_parameters()] == ["bias"]
    assert not make_linear().bias.requires_grad


def test_bfloat16_calls_leave_no_trace_in_what_is_saved() -> None:
    module = make_linear()
    before = stored(module)
    module(torch.randn(2, 96).bfloat16())
    assert_same(stored(module), before)


@pytest.mark.parametrize(
    "write",
    [
        lambda m: setattr(m, "weight", nn.Parameter(torch.zeros(24, 96))),
        lambda m: setattr(m, "weight", torch.zeros(24, 96)),
        lambda m: delattr(m, "weight"),
        lambda m: m.register_parameter("weight", nn.Parameter(torch.zeros(24, 96))),
        lambda m: m.register_parameter("weight", None),
        lambda m: m.register_buffer("weight", torch.zeros(24, 96)),
        lambda m: m.weight.zero_(),
        lambda m: m.weight.add_(1),
        lambda m: m.weight.copy_(torch.zeros(24, 96)),
        lambda m: m.weight.__setitem__(0, 0.0),
        lambda m: m.weight.__iadd__(1),
        lambda m: setattr(m.weight, "data", torch.zeros(24, 96)),
        lambda m: torch.add(torch.zeros(24, 96), 1, out=m.weight),
        lambda m: nn.init.normal_(m.weight),
        lambda m: m.reset_parameters(),
    ],
)
def test_every_way_of_writing_the_weight_raises(write) -> None:
    module = make_linear()
    before = stored(module)
    with pytest.raises(SettingsError, match="reads only"), torch.no_grad():
        write(module)
    assert_same(stored(module), before)


def test_initialization_by_transformers_leaves_it_alone() -> None:
    from transformers import initialization

    module = make_linear()
    before = stored(module)
    initialization.normal_(module.weight, mean=0.0, std=1.0)
    assert_same(stored(module), before)


def test_merging_as_adapters_do_raises_instead_of_being_lost() -> None:
    module = make_linear()
    with pytest.raises(SettingsError, match="reads only"):
        module.weight.data += torch.ones(24, 96)


def test_the_weight_can_be_read_in_every_way() -> None:
    module = make_linear()
    plain = module.packed().dequantize()
    weight = module.weight
    assert weight.device == plain.device
    assert weight.dtype == torch.float32
    for result in (weight + 0, weight.clone(), weight.t().t(), weight.to(torch.float32).detach(), +weight):
        assert torch.equal(result, plain)
    assert type(weight * 1) is torch.Tensor
    (weight * 1).zero_()
    other = torch.zeros(24, 96)
    other.copy_(weight)
    assert torch.equal(other, plain)
    assert weight.requires_grad_(True).requires_grad
    assert weight.sum().item() == plain.sum().item()
    assert "0." in repr(weight)
    assert torch.equal(torch.stack(list(weight)), plain)


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.double, nn.Module.float])
def test_casts_change_the_dtype_of_the_result_and_nothing_stored(cast) -> None:
    model = nn.ModuleDict(
        {
            "embedding": CompressedEmbedding.from_packed(random_packed(CODING, (50, 96))),
            "linear": make_linear(order=True, bias=False),
        }
    )
    before = stored(model)
    cast(model)
    assert_same(stored(model), before)
    wanted = cast(nn.Linear(1, 1)).weight.dtype
    assert model["linear"].weight.dtype == wanted
    assert model["embedding"](torch.tensor([3])).dtype == wanted


def test_the_bias_follows_a_cast_as_in_any_linear() -> None:
    assert make_linear().to(torch.bfloat16).bias.dtype == torch.bfloat16


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip_replaces_the_fast_layout(assign: bool) -> None:
    source, target = make_linear(shape=(32, 96)), make_linear(shape=(32, 96))
    with torch.no_grad():
        source.codes.bitwise_not_()
    x = torch.randn(4, 96).bfloat16()
    target(x)
    target.load_state_dict(copy.deepcopy(source.state_dict()), assign=assign)
    assert_same(stored(source), stored(target))
    assert torch.equal(target(x), source(x))


def test_a_changed_or_replaced_stored_tensor_is_noticed() -> None:
    module, x = make_linear(shape=(32, 96)), torch.randn(4, 96).bfloat16()
    first = module(x)
    with torch.no_grad():
        module.scales.mul_(2)
    torch.testing.assert_close(module(x) - module.bias, 2 * (first - module.bias), rtol=0.05, atol=0.5)
    changed = module(x)
    module.scales = module.scales / 2
    assert torch.equal(module(x), first)
    assert not torch.equal(changed, first)


def test_a_state_dict_that_does_not_fit_is_refused() -> None:
    module = make_linear(order=True)
    good = module.state_dict()
    for name, wrong in [
        ("scales", good["scales"].float()),
        ("codes", good["codes"].int()),
        ("codes", good["codes"][:, 1:]),
        ("order", torch.zeros_like(good["order"])),
    ]:
        with pytest.raises(RuntimeError, match=name):
            make_linear(order=True).load_state_dict({**good, name: wrong})
    with pytest.raises(RuntimeError, match=r"Unexpected.*weight"):
        module.load_state_dict({**good, "weight": torch.zeros(24, 96)})


def test_meta_then_assign_equals_from_packed() -> None:
    source = make_linear(order=True)
    module = CompressedLinear(96, 24, CODING, bias=True, has_order=True, device="meta")
    assert module.weight.shape == (24, 96)
    assert module(torch.zeros(2, 96, device="meta")).shape == (2, 24)
    module.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(5, 96)
    assert torch.equal(module(x), source(x))
    assert module.to(torch.bfloat16).scales.dtype == torch.bfloat16


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_compute_the_same_and_are_independent(how: str) -> None:
    module, x = make_linear(order=True), torch.randn(3, 96).bfloat16()
    expected = module(x)
    if how == "deepcopy":
        twin = copy.deepcopy(module)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(module))
    else:
        torch.save(module, buffer := io.BytesIO())
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        twin.scales.zero_()
    assert torch.equal(module(x), expected)


def test_gradients_reach_the_input() -> None:
    module = make_linear()
    x = torch.randn(3, 96, requires_grad=True)
    module(x).sum().backward()
    torch.testing.assert_close(x.grad, module.weight.sum(0).expand(3, -1), rtol=1e-4, atol=1e-4)
    low = torch.randn(3, 96).bfloat16().requires_grad_()
    module(low).sum().backward()
    assert low.grad is not None


def test_a_wrong_number_of_inputs_is_refused_on_every_path() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(ValueError, match="192 inputs"):
            make_linear()(torch.zeros(2, 192, dtype=dtype))


def test_no_rows_give_no_rows() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert make_linear()(torch.zeros(0, 96, dtype=dtype)).shape == (0, 24)


def test_float_codings_belong_into_ordinary_modules() -> None:
    with pytest.raises(SettingsError, match="ordinary"):
        CompressedLinear(8, 8, FloatCoding(), bias=False)  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="ordinary"):
        CompressedLinear.from_packed(PackedWeight.from_float(torch.zeros(2, 2), FloatCoding()))
    with pytest.raises(SettingsError, match="ordinary"):
        CompressedEmbedding.from_packed(PackedWeight.from_float(torch.zeros(2, 2), FloatCoding()))


@given(coding=CODINGS, order=st.booleans())
@settings(max_examples=30, deadline=None)
def test_an_embedding_gives_the_rows_of_its_weight(coding, order) -> None:
    packed = random_packed(coding, (50, 172), order)
    module = CompressedEmbedding.from_packed(packed, padding_idx=1)
    assert isinstance(module, nn.Embedding)
    assert module.padding_idx == 1
    ids = torch.tensor([[0, 49, 1], [7, 7, 1]])
    assert torch.equal(module(ids), packed.dequantize()[ids])
    assert module(ids[:, :0]).shape == (2, 0, 172)
    with pytest.raises(IndexError):
        module(torch.tensor([50]))
    with pytest.raises(SettingsError, match="reads only"):
        module.weight = nn.Parameter(torch.zeros(50, 172))


def tied() -> nn.ModuleDict:
    embedding = CompressedEmbedding.from_packed(random_packed(CODING, (64, 96)))
    head = CompressedLinear(96, 64, CODING, bias=False, device="meta")
    share(embedding, head)
    return nn.ModuleDict({"embedding": embedding, "head": head})


def test_a_tied_pair_is_one_set_of_tensors_stored_once() -> None:
    model = tied()
    assert list(model.state_dict()) == ["embedding.codes", "embedding.scales", "embedding.zeros"]
    for name in ("codes", "scales", "zeros"):
        assert getattr(model["head"], name) is getattr(model["embedding"], name)
    assert model["head"].order is None
    assert torch.equal(model["head"].weight, model["embedding"].weight)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.to(torch.bfloat16),
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: (m.load_state_dict({k: t.clone() for k, t in m.state_dict().items()}, assign=True), m)[1],
    ],
)
def test_a_tied_pair_stays_tied(change) -> None:
    model = change(tied())
    x = torch.randn(3, 96).bfloat16()
    model["head"](x)
    assert model["head"].codes is model["embedding"].codes
    with torch.no_grad():
        model["embedding"].scales.zero_()
    assert not model["head"](x).any()


def test_only_equals_can_be_tied() -> None:
    embedding = CompressedEmbedding.from_packed(random_packed(CODING, (64, 96)))
    for head in (
        CompressedLinear(96, 63, CODING, bias=False),
        CompressedLinear(96, 64, IntegerCoding(4, 64), bias=False),
        CompressedLinear(96, 64, CodebookCoding("nf4", 32), bias=False),
        CompressedLinear(96, 64, CODING, bias=False, has_order=True),
    ):
        with pytest.raises(CheckpointError, match="tied"):
            share(embedding, head)
