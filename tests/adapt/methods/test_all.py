"""What holds for every method of tuning."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import tiny
import tuned
from tailorbird.adapt.methods.adapter import Place
from tailorbird.adapt.methods.registry import KNOWN, METHODS, method_named
from tailorbird.errors import SettingsError

ALL = sorted(METHODS)
#: those that don't begin at the model's own function, or only almost
OTHER_START = {"kasa", "lora-xs", "goat"}
#: those with a rank, which the weight must have
RANKED = {name for name in ALL if "rank" in {field.name for field in dataclasses.fields(METHODS[name])}} - {
    "eigenlorax"
}
#: those whose addition isn't a change of the weight
CHOOSING = {"goat", "mixlora"}

#: learned numbers of one linear, by the paper's count
COUNTS: dict[str, Callable[[int, int], int]] = {
    "lora": lambda o, i: 3 * (o + i),
    "rslora": lambda o, i: 3 * (o + i),
    "lora-xs": lambda o, i: 3 * 3,
    "nora": lambda o, i: 2 * 5 * 2,
    "lamda": lambda o, i: 4 * (o + 4),
    "loldu": lambda o, i: 5 + 1,
    "kasa": lambda o, i: 3 * (o + i + 1),
    "mos": lambda o, i: 2 * (o + i),
    "allora": lambda o, i: 3 * (o + i),
    "lora-pro": lambda o, i: 3 * (o + i),
    "ir-qlora": lambda o, i: 4 * (o + i) + 2,
    "qdylora": lambda o, i: 4 * (o + i),
    "hydra": lambda o, i: 2 * (3 * o + i),
    "glora": lambda o, i: 2 * 2 * (o + i),
    "elalora": lambda o, i: 3 * (o + i + 1),
    "triadaptlora": lambda o, i: o + i + 2,
    "loca": lambda o, i: 3 * 20,
    "goat": lambda o, i: 4 * (o + i) + 4 * i,
    "ist": lambda o, i: 3 * (o + i),
    "density": lambda o, i: 3 * (o + i),
    "eigenlorax": lambda o, i: 2 * 5 * 2,
}


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    model: nn.Module = tiny.make_model("llama")
    return model


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_what_is_called_rate_is_a_learning_rate(name: str) -> None:
    rate = getattr(KNOWN[name], "rate", None)
    assert rate is None or 0 < rate <= 0.1


def test_whose_penalty_depends_on_all_tokens_says_so() -> None:
    assert {name for name in ALL if tuned.attach(tuned.small(name)).weighs_tokens} == {
        "mixlora", "goat", "density"
    }  # fmt: skip


@pytest.mark.parametrize("name", ALL)
def test_says_what_it_is(name: str) -> None:
    kind = METHODS[name]
    assert kind.name == name
    assert kind.family == "adapter"
    assert "arXiv:" in kind.paper
    assert kind.kind
    assert kind.needs
    field = dataclasses.fields(kind)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(kind(), field, None)


@pytest.mark.parametrize("name", ALL)
def test_every_linear_gains_something_of_its_shape(name: str) -> None:
    places = tuned.places()
    attached = tuned.attach(tuned.small(name), places)
    assert attached.addition("model.layers.9.q_proj") is None
    for place, addition in tuned.additions(attached, places):
        for shape in ((5,), (2, 3)):
            x = torch.randn(*shape, place.in_features)
            assert addition(x).shape == (*shape, place.out_features)
        assert all(parameter.dtype == torch.float32 for parameter in addition.parameters())


@pytest.mark.parametrize("name", [name for name in ALL if name not in OTHER_START])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_begins_as_nothing(name: str, dtype: torch.dtype) -> None:
    places = tuned.places()
    attached = tuned.attach(tuned.small(name), places)
    for place, addition in tuned.additions(attached, places):
        gained = addition(torch.randn(7, place.in_features, dtype=dtype))
        assert gained.dtype == dtype
        assert torch.count_nonzero(gained) == 0


@pytest.mark.parametrize("name", [name for name in ALL if name not in OTHER_START])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_begins_with_its_own_logits(name: str, dtype: torch.dtype, llama: nn.Module) -> None:
    model = copy.deepcopy(llama).to(dtype)
    places = {}
    for path, module in model.named_modules():
        role = path.rpartition(".")[2].removesuffix("_proj")
        if isinstance(module, nn.Linear) and role in tuned.SHAPES:
            block, shape = int(path.split(".")[2]), (module.in_features, module.out_features)
            places[path] = Place(path, role, block, *shape, module)
    adapters = {"adapters": tuned.existing_adapters(places)} if name == "eigenlorax" else {}
    attached = tuned.attach(tuned.small(name, **adapters), places)
    attached.before_step(0, 10)

    def hook(module: nn.Module, given: Any, output: torch.Tensor) -> torch.Tensor:
        path = next(path for path, place in places.items() if place.module is module)
        addition: Any = attached.addition(path)
        more = {"output": output} if addition.needs_output else {}
        gained: torch.Tensor = output + addition(given[0], **more)
        return gained

    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        before = model(ids).logits
        for place in places.values():
            place.module.register_forward_hook(hook)
        assert torch.equal(model(ids).logits, before)
    assert len(places) == 6


@pytest.mark.parametrize("name", [name for name in ALL if name not in CHOOSING])
@pytest.mark.parametrize("bias", [False, True])
def test_is_the_change_of_weight_that_it_says(name: str, bias: bool) -> None:
    places = tuned.places(bias=bias)
    attached = tuned.double(tuned.shaken(tuned.attach(tuned.small(name), places)))
    for place, addition in tuned.additions(attached, places):
        x = torch.randn(9, place.in_features, dtype=torch.float64)
        delta = addition.delta()
        assert delta.shape == (place.out_features, place.in_features)
        assert not delta.requires_grad
        shift = addition.bias_delta()
        expected = x @ delta.T if shift is None else x @ delta.T + shift
        assert shift is None or bias
        torch.testing.assert_close(addition(x), expected, rtol=1e-6, atol=1e-8)
        if addition.needs_output:
            output = copy.deepcopy(place.module).double()(x)
            torch.testing.assert_close(addition(x, output=output), expected, rtol=1e-6, atol=1e-8)
        factors = addition.factors()
        if factors is not None:
            torch.testing.assert_close(factors[0] @ factors[1], delta)


@pytest.mark.parametrize("name", ALL)
def test_gradients_agree_with_finite_differences(name: str) -> None:
    places = tuned.places(blocks=1)
    attached = tuned.double(tuned.shaken(tuned.attach(tuned.small(name), places)))
    attached.before_step(0, 100)
    for place, addition in tuned.additions(attached, places):
        x = torch.randn(3, place.in_features, dtype=torch.float64, requires_grad=True)
        learned = [parameter for parameter in attached.parameters() if parameter.requires_grad]
        assert torch.autograd.gradcheck(lambda *_, x=x, addition=addition: addition(x), (x, *learned))


@pytest.mark.parametrize("name", [name for name in ALL if name not in CHOOSING])
def test_gradients_of_bfloat16_inputs_reach_the_float32_parameters(name: str) -> None:
    places = tuned.places(blocks=1)
    attached = tuned.shaken(tuned.attach(tuned.small(name), places))
    for place, addition in tuned.additions(attached, places):
        x = torch.randn(32, place.in_features)
        attached.zero_grad()
        addition(x).square().sum().backward()
        exact = {key: p.grad.clone() for key, p in attached.named_parameters() if p.grad is not None}
        attached.zero_grad()
        addition(x.bfloat16()).float().square().sum().backward()
        largest = max(one.norm() for one in exact.values())
        for key, parameter in attached.named_parameters():
            if key in exact:
                assert parameter.grad is not None
                assert parameter.grad.dtype == torch.float32
                # in the sum that is a single number's gradient, much may cancel
                size = exact[key].norm() if exact[key].numel() > 1 else largest
                assert (parameter.grad - exact[key]).norm() <= 0.05 * size + 1e-6


@pytest.mark.parametrize("name", sorted(COUNTS))
def test_learns_as_many_numbers_as_the_paper_counts(name: str) -> None:
    places = tuned.places(blocks=3)
    attached = tuned.attach(tuned.small(name), places)
    wanted = sum(COUNTS[name](place.out_features, place.in_features) for place in places.values())
    assert sum(parameter.numel() for parameter in attached.parameters()) == wanted


@pytest.mark.parametrize("name", ALL)
def test_the_generator_decides(name: str) -> None:
    method = tuned.small(name)
    one, same = (tuned.attach(method, seed=4).state_dict() for _ in range(2))
    other = tuned.attach(method, seed=5).state_dict()
    assert one.keys() == same.keys() == other.keys()
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert name == "loldu" or any(not torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", ALL)
def test_resumes_to_the_bit(name: str) -> None:
    """30 steps at once, and 15 steps, a stop, and 15 more."""
    places = tuned.places()
    method = tuned.small(name)
    whole = tuned.attach(method, places)
    tuned.steps(whole, tuned.regression(whole, places), last=30, total=30)

    first = tuned.attach(method, places)
    stopped = tuned.steps(first, tuned.regression(first, places), last=15, total=30)
    kept = copy.deepcopy((first.extra(), first.state_dict(), stopped.state_dict()))

    second = tuned.attach(method, places)
    loss = tuned.regression(second, places)
    second.take_extra(json.loads(json.dumps(kept[0])))
    second.load_state_dict(kept[1])
    optimizer = torch.optim.Adam(second.parameters(), lr=0.02)
    optimizer.load_state_dict(kept[2])
    tuned.steps(second, loss, first=15, last=30, total=30, optimizer=optimizer)
    states = whole.state_dict(), second.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("name", ALL)
def test_learns_a_teacher_of_its_own_class(name: str) -> None:
    places = tuned.places()
    attached = tuned.attach(tuned.small(name), places)
    loss = tuned.regression(attached, places)
    before = float(loss().detach())
    tuned.steps(attached, loss)
    assert float(loss().detach()) < 0.5 * before


@pytest.mark.parametrize("name", sorted(RANKED))
def test_refuses_a_rank_that_the_weight_cannot_have(name: str) -> None:
    place = Place("model.layers.0.v_proj", "v", 0, 6, 4, nn.Linear(6, 4, bias=False))
    other = {"nora": {"inner_rank": 2}, "goat": {"rank": 6, "experts": 2}}
    settings = {"rank": 5} | other.get(name, {})
    with pytest.raises(SettingsError, match=r"model\.layers\.0\.v_proj"):
        tuned.attach(method_named(name, **settings), {place.path: place})


def test_names_what_is_near() -> None:
    with pytest.raises(SettingsError, match="did you mean `lora-xs`"):
        method_named("lora_xs")
    with pytest.raises(SettingsError, match=r"one of `rank`, `alpha` · did you mean `rank`"):
        method_named("lora", rnak=3)


@pytest.mark.parametrize("name", ALL)
def test_refuses_nonsense(name: str) -> None:
    for field in dataclasses.fields(METHODS[name]):
        if field.name in ("rank", "alpha"):
            with pytest.raises(SettingsError, match=field.name):
                method_named(name, **{field.name: 0})
