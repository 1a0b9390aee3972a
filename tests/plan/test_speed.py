"""A speed that is asked for is planned for, or refused with what can be had."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compressed import save_compressed
from tailorbird.errors import BudgetError, SettingsError
from tailorbird.evaluate.foreseen import shape_of
from tailorbird.evaluate.stand_ins import Kernel
from tailorbird.formats.packed import Coding, FloatCoding, IntegerCoding, stored_bytes
from tailorbird.hardware.cost import AttentionTimes, KernelTimes
from tailorbird.model.anatomy import Anatomy, read_anatomy
from tailorbird.model.checkpoint import open_checkpoint
from tailorbird.model.load import load
from tailorbird.plan import speed
from tailorbird.plan.allocate import Allocation, Option, PlaceOptions
from tailorbird.plan.budget import Budget
from tailorbird.plan.scores import PlaceScore
from tailorbird.plan.speed import SpeedPlanner, check_architecture, model_shape, with_speed
from tailorbird.progress import Silent
from tiny import make_model, save_model

CODINGS = [IntegerCoding(bits, 32) for bits in (2, 4, 8)]
LEFT = FloatCoding("bfloat16")
NOTHING = AttentionTimes(0.0, 0.0, 0.0)
#: Seconds per weight: a bit takes 1e-9, half of that where inputs are bytes, 16 bits take 2e-8.
RATES = {
    Kernel(coding, int8).name: ((coding.bits * 1e-9 * (0.5 if int8 else 1.0),) * 2,)
    for coding in CODINGS
    for int8 in (False, True)
}
RATES["bf16"] = ((2e-8, 2e-8),)
TIMES = KernelTimes(
    threads=1, piece=512, tokens=(1,), products=RATES, heads=RATES,
    streaming=((1, 0.0),), block=0.0, token=0.0, norms=0.0, activation=0.0, alone=NOTHING,
    alone_streamed=NOTHING, together=NOTHING, step=1e-4, step_streamed=1e-4, sequence=0.0, begin=0.0,
    begin_block=0.0, logit=0.0, lookup=0.0, unpacked=0.0,
)  # fmt: skip


@pytest.fixture(autouse=True)
def known_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "kernel_times", lambda *_: TIMES)


@pytest.fixture(scope="module")
def anatomy(tmp_path_factory: pytest.TempPathFactory) -> Anatomy:
    return read_anatomy(open_checkpoint(str(save_model(tmp_path_factory.mktemp("m") / "llama", "llama"))))


def budget_for(step_seconds: float) -> Budget:
    return Budget("any", 10**9, step_seconds=step_seconds, speed_text=f"{step_seconds} s")


def options_of(anatomy: Anatomy, seconds: Callable[[PlaceScore, Coding], float]) -> list[PlaceOptions]:
    """Fewer bits cost more, wherever they are taken; the head stays as it is."""
    places = []
    for linear in anatomy.linears():
        shape = linear.out_features, linear.in_features
        score = PlaceScore(linear.name, linear.role, 0, shape, {}, 1.0)
        places.append(
            PlaceOptions(
                linear.name,
                tuple(
                    Option(c, stored_bytes(c, *shape), 4.0**-c.bits * shape[0], seconds(score, c))
                    for c in [*CODINGS, LEFT]
                ),
            )
        )
    shape = anatomy.end_shape(anatomy.head)
    score = PlaceScore(anatomy.head, "head", len(anatomy.blocks), shape, {}, 1.0)
    left = Option(LEFT, stored_bytes(LEFT, *shape), 0.0, seconds(score, LEFT))
    return [*places, PlaceOptions(anatomy.head, (left,))]


def planned(
    anatomy: Anatomy,
    step_seconds: float,
    rounded: Callable[[Allocation], Collection[str]],
    exact: bool = False,
) -> tuple[Allocation, float]:
    planner = SpeedPlanner(anatomy, budget_for(step_seconds), LEFT, exact, Silent())
    plan = planner.allocate(lambda seconds: options_of(anatomy, seconds), 10**9, rounded)
    codings = {n: o.coding for n, o in plan.choices.items() if not isinstance(o.coding, FloatCoding)}
    return plan, planner.step_seconds(codings, rounded(plan))


def weights(anatomy: Anatomy) -> int:
    return sum(linear.out_features * linear.in_features for linear in anatomy.linears())


def everywhere(plan: Allocation) -> Collection[str]:
    return plan.choices


def nowhere(plan: Allocation) -> Collection[str]:
    return ()


@pytest.mark.parametrize("rounded", [everywhere, nowhere])
def test_plans_are_as_fast_as_asked_and_no_worse_than_need_be(anatomy: Anatomy, rounded: Any) -> None:
    """Each speed costs more than the one before it, whether inputs are rounded or not."""
    head = 2e-8 * anatomy.vocab_size * anatomy.hidden_size + 1e-4
    per_bit = 1e-9 * weights(anatomy) * (0.5 if rounded is everywhere else 1.0)
    losses = []
    for bits in (16, 7, 5, 3, 2.5):
        allowed = head + (bits * per_bit if bits < 16 else 2e-8 * weights(anatomy))
        plan, found = planned(anatomy, allowed * (1 + 1e-9), rounded)
        assert found <= allowed * (1 + 1e-6)
        losses.append(plan.loss)
    assert losses == sorted(losses)
    assert losses[0] < losses[-1]


def test_what_no_plan_reaches_is_refused_with_what_one_does(anatomy: Anatomy) -> None:
    fastest = 2e-8 * anatomy.vocab_size * anatomy.hidden_size + 1e-4 + 2 * 0.5e-9 * weights(anatomy)
    with pytest.raises(BudgetError, match="fastest") as caught:
        planned(anatomy, fastest * 0.9, everywhere)
    assert f"{1 / fastest:.3g} tok/s" in str(caught.value)
    planned(anatomy, fastest * 1.001, everywhere)


def test_exact_activations_are_planned_with_slower_kernels(anatomy: Anatomy) -> None:
    allowed = 2e-8 * anatomy.vocab_size * anatomy.hidden_size + 1e-4 + 4e-9 * weights(anatomy)
    rounding, _ = planned(anatomy, allowed, everywhere)
    exact, found = planned(anatomy, allowed, nowhere, exact=True)
    assert found <= allowed
    assert exact.loss > rounding.loss


@pytest.mark.parametrize(
    ("speed_asked", "latency", "concurrency", "seconds"),
    [
        ("30tok/s", None, 1, 1 / 30), ("30 tokens/s", None, 4, 4 / 30), ("12.5", None, 1, 0.08),
        (None, "40ms", 4, 0.04), (None, "0.1s", 1, 0.1), (None, "500us", 1, 5e-4),
        ("10tok/s", "40ms", 1, 0.04), ("50tok/s", "40ms", 1, 0.02),
    ],
)  # fmt: skip
def test_what_a_step_may_take(
    speed_asked: str | None, latency: str | None, concurrency: int, seconds: float
) -> None:
    found = with_speed(Budget("1GB", 10**9, 64, concurrency), speed_asked, latency)
    assert found.step_seconds == pytest.approx(seconds)
    assert found.speed_text


def test_without_a_wish_nothing_is_asked() -> None:
    budget = Budget("1GB", 10**9)
    assert with_speed(budget, None, None) is budget


@pytest.mark.parametrize("text", ["", "fast", "0tok/s", "-3tok/s", "30ms", "1e3tok/s", "30 tok/h", "9" * 50])
def test_speeds_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="--min-speed"):
        with_speed(Budget("1GB", 10**9), text, None)


@pytest.mark.parametrize("text", ["", "soon", "0ms", "-3ms", "40", "40tok/s", "40 min"])
def test_latencies_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="--max-latency"):
        with_speed(Budget("1GB", 10**9), None, text)


def test_models_outside_of_compiled_blocks_are_refused_by_type(anatomy: Anatomy) -> None:
    check_architecture(anatomy)
    with pytest.raises(SettingsError, match=r"`mamba`.*llama"):
        check_architecture(replace(anatomy, architecture="mamba"))


@pytest.mark.parametrize(
    "architecture",
    [
        "llama",
        "qwen2",
        "mistral",
        "gemma2",
        "gemma3_text",
        "gpt2",
        "gpt_neox",
        "opt",
        "phi3",
        "olmo2",
        "falcon",
    ],
)
@pytest.mark.parametrize("embedding", [None, IntegerCoding(8, 32)])
def test_a_plan_has_the_shape_of_the_model_that_comes_of_it(
    tmp_path: Path, architecture: str, embedding: Coding | None
) -> None:
    """What is planned with is what is loaded: kernels, weights, bytes, windows."""
    choice = {"o_proj": None, "down_proj": CODINGS[0], "c_fc": CODINGS[2]}
    model = make_model(architecture)

    def coding_of(name: str) -> Coding | None:
        return choice.get(name.rsplit(".", 1)[-1], CODINGS[1])

    save_compressed(tmp_path, model, coding_of, embedding=embedding)
    loaded, kernels = shape_of(load(tmp_path))
    checkpoint = open_checkpoint(str(tmp_path))
    anatomy = read_anatomy(checkpoint)
    codings = {p.name: c for p in anatomy.linears() if (c := coding_of(p.name)) is not None}
    if not anatomy.tied:
        codings[anatomy.head] = CODINGS[1]
    if embedding is not None:
        codings[anatomy.embedding] = embedding
    dtype = str(model.dtype).removeprefix("torch.")
    foreseen = model_shape(anatomy, codings, (), FloatCoding(dtype))
    assert foreseen.head == loaded.head
    assert foreseen.vocab_size == loaded.vocab_size
    assert foreseen.looked_up == loaded.looked_up
    for ours, theirs in zip(foreseen.blocks, loaded.blocks, strict=True):
        assert sorted(map(str, ours.products)) == sorted(map(str, theirs.products))
        assert (ours.width, ours.attended, ours.inner) == (theirs.width, theirs.attended, theirs.inner)
        assert ours.window == theirs.window
    assert {kernel.name for kernel in kernels} == {
        p.kernel for p in (foreseen.head, *(p for b in foreseen.blocks for p in b.products))
    }
