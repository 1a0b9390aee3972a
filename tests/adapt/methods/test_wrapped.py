"""IST and DEFT: methods around others."""

from __future__ import annotations

import gc

import pytest
import torch

import tuned
from tailorbird.adapt.methods.adapter import Attached
from tailorbird.adapt.methods.density import density
from tailorbird.adapt.methods.ist import AttachedIst
from tailorbird.adapt.methods.registry import method_named
from tailorbird.adapt.wrap import Adapted
from tailorbird.errors import SettingsError


def ist(blocks: int = 6, **changed: object) -> AttachedIst:
    attached = tuned.attach(tuned.small("ist", **changed), tuned.places(blocks=blocks))
    assert isinstance(attached, AttachedIst)
    return attached


def learning(attached: Attached) -> set[int]:
    """Blocks of which something learns."""
    return {
        int(name.split("model/layers/")[1].split("/")[0])
        for name, parameter in attached.named_parameters()
        if parameter.requires_grad
    }


def test_each_step_teaches_as_many_blocks_as_asked_for_and_all_in_turn() -> None:
    attached = ist(taught=0.34)
    seen = set()
    for step in range(40):
        attached.before_step(step, 40)
        assert len(learning(attached)) == 2
        seen |= learning(attached)
    assert seen == set(range(6))


def test_blocks_that_rest_stay_to_the_bit() -> None:
    places = tuned.places(blocks=4)
    attached = tuned.attach(tuned.small("ist", taught=0.25), places)
    tuned.shaken(attached)
    loss = tuned.regression(attached, places)
    optimizer = tuned.steps(attached, loss, last=5)
    for step in range(5, 9):
        before = {name: p.detach().clone() for name, p in attached.named_parameters()}
        tuned.steps(attached, loss, first=step, last=step + 1, optimizer=optimizer)
        (taught,) = learning(attached)
        for name, parameter in attached.named_parameters():
            assert torch.equal(before[name], parameter) == (f"/{taught}/" not in name)


@pytest.mark.parametrize("method", ["lora", "kasa", "qdylora"])
def test_scores_rise_where_the_model_does_well_without_a_block(method: str) -> None:
    """A loss that is high exactly where block 0 is suppressed, and low where block 5 is."""
    attached = ist(suppressed=0.2, trials=6, interval=1, method=method)
    tuned.shaken(attached)
    base = torch.nn.Linear(8, 12, bias=False)
    base.weight.requires_grad_(False).zero_()
    additions = {}
    for block in range(6):
        addition = attached.addition(f"model.layers.{block}.q_proj")
        assert addition is not None
        additions[block] = Adapted(base, addition)  # as a step runs it
    x = torch.ones(1, 8)
    full = {block: addition(x).norm() for block, addition in additions.items()}

    def loss() -> float:
        shares = {block: float((additions[block](x).norm() / full[block]).detach()) for block in (0, 5)}
        return 1.0 + (1 - shares[0]) - (1 - shares[5])

    for step in range(1, 20):
        attached.explore(step, loss)
    assert attached.scores.argmin() == 0
    assert attached.scores.argmax() == 5
    assert loss() == pytest.approx(1.0)
    counts = torch.zeros(6)
    for step in range(300):
        attached.before_step(step, 300)
        for block in learning(attached):
            counts[block] += 1
    assert counts[0] == counts.max()
    assert counts[5] == counts.min()


def test_nothing_of_the_inner_method_stands_in_the_state_twice() -> None:
    for name in ("ist", "density"):
        attached = tuned.attach(tuned.small(name, method="mos", rank=4, shards=2))
        state = attached.state_dict()
        assert len({value.data_ptr() for value in state.values()}) == len(state)
        assert any("pools" in key for key in state)


def test_settings_that_the_wrapper_lacks_go_to_the_method_within() -> None:
    method = method_named("ist", method="kasa", rank=5, interval=7)
    assert (method.interval, method.method.name, method.method.rank) == (7, "kasa", 5)  # type: ignore[attr-defined]
    with pytest.raises(SettingsError, match="setting `rnak` of kasa"):
        method_named("ist", method="kasa", rnak=5)


def test_density_nears_the_fraction_of_activations_other_than_zero() -> None:
    activations = torch.tensor([[0.0, 0.5, -2.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    assert float(density(activations, 1e-7)) == pytest.approx(3 / 8, rel=1e-4)
    assert float(density(torch.full((4,), 0.1), 0.01)) == pytest.approx(0.5)


def test_the_penalty_is_that_of_the_last_linears_of_the_feed_forward_layers() -> None:
    places = tuned.places()
    attached = tuned.attach(tuned.small("density", weight=0.5, method="kasa"), places)
    alone = tuned.attach(tuned.small("kasa"), places).penalty()
    attached.before_step(0, 10)
    measured = []
    for place in places.values():
        x = torch.randn(5, place.in_features).relu().requires_grad_()
        place.module(x)
        if place.role == "down":
            measured.append(x)
    penalty = attached.penalty()
    assert penalty is not None
    assert alone is not None
    wanted = 0.5 * torch.stack([density(x, 1e-7) for x in measured]).mean() + alone
    torch.testing.assert_close(penalty, wanted)
    penalty.backward()
    assert all(x.grad is not None for x in measured)
    after = attached.penalty()
    assert after is not None
    torch.testing.assert_close(after, alone)


def test_tuning_with_it_makes_activations_sparser() -> None:
    """A linear, a rectifier and the last linear: the gate learns to close."""
    places = {path: place for path, place in tuned.places(blocks=1).items() if place.role in ("up", "down")}
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    up, down = places.values()
    fractions = []
    for weight in (1e-6, 1.0):
        attached = tuned.attach(tuned.small("density", weight=weight, epsilon=0.01), places)
        first, second = (addition for _, addition in tuned.additions(attached, places))

        def activations(first: torch.nn.Module = first) -> torch.Tensor:
            return (up.module(x) + first(x)).relu()

        def loss(second: torch.nn.Module = second) -> torch.Tensor:
            middle = activations()
            return (down.module(middle) + second(middle)).mean().square()

        tuned.steps(attached, loss)
        fractions.append(float((activations() > 0.03).float().mean()))
    assert fractions[1] < 0.7 * fractions[0]


def test_a_model_forgets_what_measured_it() -> None:
    places = tuned.places(blocks=1)
    module = places["model.layers.0.down_proj"].module
    attached = tuned.attach(tuned.small("density"), places)
    assert len(module._forward_pre_hooks) == 1
    del attached
    gc.collect()
    module(torch.randn(2, 16))
    assert not module._forward_pre_hooks


def test_density_refuses_places_where_it_cannot_measure() -> None:
    places = {path: place for path, place in tuned.places().items() if place.role == "q"}
    with pytest.raises(SettingsError, match="`down` or `fc2`"):
        tuned.attach(tuned.small("density"), places)


@pytest.mark.parametrize("name", ["ist", "density"])
@pytest.mark.parametrize("inner", ["dora", "emloc", "prefix-tuning"])
def test_what_changes_modules_by_itself_is_not_wrapped(name: str, inner: str) -> None:
    with pytest.raises(SettingsError, match=f"{name} around `{inner}`"):
        method_named(name, method=inner)


@pytest.mark.parametrize("name", ["ist", "density"])
def test_a_trial_takes_what_needs_the_most_memory_of_the_method_within(name: str) -> None:
    attached = tuned.attach(tuned.small(name, method="glora", b="any"))
    attached.before_step(0, 10)
    attached.before_trial()
    tried = {key: value.clone() for key, value in attached.state_dict().items()}
    attached.inner.before_trial()
    assert all(torch.equal(tried[key], value) for key, value in attached.state_dict().items())
