"""Combined adapters are sums of changes, TIES and DARE of them, and PEFT loads what is written."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import tailorbird.api as api
from peft_adapters import expected_logits, prompt, save, wrapped
from tailorbird.adapt.deltas.entries import disjoint_mean, drop, generator_of, trim
from tailorbird.adapt.deltas.factors import truncate, truncate_product
from tailorbird.adapt.save import ORIGIN
from tailorbird.errors import CheckpointError, SettingsError
from tailorbird.formats.peft import WEIGHTS_FILE
from tailorbird.linear.product import Product
from tiny import make_model
from written_loras import SHAPES, changes, write


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    """Adapters that differ in rank, scaling and linears."""
    fewer = {name: SHAPES[name] for name in ("layers.0.q", "layers.1.q")}
    return [
        write(tmp_path / "a", 2, 1, use_rslora=True),
        write(tmp_path / "b", 3, 2, fewer, lora_alpha=5, rank_pattern={}, alpha_pattern={"layers.1.q": 1.5}),
    ]


def test_linear_is_the_sum_of_the_changes_exactly(tmp_path: Path, two: list[Path]) -> None:
    result = api.combine_adapters(two, tmp_path / "out", weights=[0.25, -1.5])
    first, second, both = (changes(path) for path in (*two, tmp_path / "out"))
    for name in SHAPES:
        expected = 0.25 * first[name] - 1.5 * second.get(name, torch.zeros(()))
        torch.testing.assert_close(both[name], expected, rtol=1e-5, atol=1e-5)
    assert [(one.rank, one.error) for one in result.linears] == [(5, 0.0), (2, 0.0), (5, 0.0)]
    assert (result.error, result.rank) == (0.0, 5)


def test_a_sum_of_ranks_beyond_the_matrix_is_still_exact(tmp_path: Path) -> None:
    parts = [write(tmp_path / str(seed), 5, seed) for seed in range(3)]
    result = api.combine_adapters(parts, tmp_path / "out", weights=[1, 1, 1])
    assert {one.name: one.rank for one in result.linears} == {
        name: min(shape) for name, shape in SHAPES.items()
    }
    total = [changes(part) for part in parts]
    for name, change in changes(tmp_path / "out").items():
        torch.testing.assert_close(change, sum(one[name] for one in total), rtol=1e-4, atol=1e-4)
    assert result.error < 1e-12


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_truncation_is_the_best_there_is(rank: int) -> None:
    product = Product(torch.randn(12, 6), torch.randn(6, 10))
    change = product.delta()
    left, sizes, right = torch.linalg.svd(change.double())
    best = left[:, :rank] * sizes[:rank] @ right[:rank]
    for found in (truncate_product(product, rank), truncate(change, rank)):
        torch.testing.assert_close(found.product.delta().double(), best, rtol=1e-4, atol=1e-4)
        rest = float(sizes[rank:].square().sum())
        assert found.lost == pytest.approx(rest, rel=1e-4, abs=1e-8)
        assert found.energy == pytest.approx(float(change.double().square().sum()), rel=1e-5)


def _slow_ties(given: list[torch.Tensor], density: float) -> torch.Tensor:
    """The paper's three steps, one entry at a time."""
    trimmed = []
    for change in given:
        entries = change.flatten().tolist()
        order = sorted(range(len(entries)), key=lambda place: -abs(entries[place]))
        kept = set(order[: round(density * len(entries))])
        trimmed.append([value if place in kept else 0.0 for place, value in enumerate(entries)])
    merged = []
    for values in zip(*trimmed, strict=True):
        elected = (sum(values) > 0) - (sum(values) < 0)
        agreeing = [value for value in values if elected and value * elected > 0]
        merged.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return torch.tensor(merged).reshape(given[0].shape)


def test_ties_trims_elects_and_takes_the_disjoint_mean(tmp_path: Path) -> None:
    parts = [write(tmp_path / str(seed), 2, seed) for seed in range(3)]
    result = api.combine_adapters(parts, tmp_path / "out", how="ties", density=0.3, rank=10)
    given, combined = [changes(part) for part in parts], changes(tmp_path / "out")
    for name in SHAPES:
        expected = _slow_ties([one[name] for one in given], 0.3)
        torch.testing.assert_close(combined[name], expected, rtol=1e-4, atol=1e-4)
    assert result.error < 1e-5  # of full rank
    merged = peft.utils.merge_utils.ties([one["layers.0.q"] for one in given], torch.ones(3), 0.3)
    torch.testing.assert_close(combined["layers.0.q"], merged, rtol=1e-4, atol=1e-4)


def test_opposite_entries_elect_nothing() -> None:
    assert disjoint_mean([torch.tensor([1.0, 2.0]), torch.tensor([-1.0, 0.0])]).tolist() == [0.0, 2.0]


def test_trimming_keeps_the_largest_share() -> None:
    assert trim(torch.tensor([3.0, -1.0, 2.0, -4.0]), 0.5).tolist() == [3.0, 0.0, 0.0, -4.0]
    assert int((trim(torch.randn(7), 0.01) != 0).sum()) == 1


def test_dare_is_unbiased_over_seeds() -> None:
    change, density, seeds = torch.randn(40), 0.25, 4000
    draws = torch.stack([drop(change, density, generator_of(seed)) for seed in range(seeds)])
    deviation = change.abs() * ((1 - density) / density / seeds) ** 0.5
    assert bool(((draws.mean(0) - change).abs() < 5 * deviation).all())
    assert set((draws[0] / change).unique().tolist()) <= {0.0, 1 / density}


def test_dare_depends_on_the_seed_alone(tmp_path: Path, two: list[Path]) -> None:
    names = ("a1", "a2", "b")
    for name, seed in zip(names, (3, 3, 4), strict=True):
        api.combine_adapters(two, tmp_path / name / "out", how="dare", rank=10, seed=seed)
    first, again, other = ((tmp_path / name / "out" / WEIGHTS_FILE).read_bytes() for name in names)
    assert first == again != other


def test_dare_of_full_density_is_linear_and_dare_ties_is_ties(tmp_path: Path, two: list[Path]) -> None:
    for how, like in (("dare", "linear"), ("dare-ties", "ties")):
        density = {"linear": None}.get(like, 1.0)
        api.combine_adapters(two, tmp_path / how, how=how, density=1.0, rank=10)
        api.combine_adapters(two, tmp_path / like, how=like, density=density, rank=10)
        found, expected = changes(tmp_path / how), changes(tmp_path / like)
        for name in SHAPES:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-4)


def test_a_lower_rank_states_what_it_loses(tmp_path: Path, two: list[Path]) -> None:
    exact = api.combine_adapters(two, tmp_path / "exact")
    result = api.combine_adapters(two, tmp_path / "out", rank=2)
    full, low = changes(tmp_path / "exact"), changes(tmp_path / "out")
    missing = sum(float((full[name] - low[name]).square().sum()) for name in SHAPES)
    size = sum(float(full[name].square().sum()) for name in SHAPES)
    assert exact.error == 0
    assert result.error == pytest.approx((missing / size) ** 0.5, rel=1e-4)
    assert {one.rank for one in result.linears} == {2}


def test_peft_loads_the_result(tmp_path: Path) -> None:
    model = make_model("llama")
    parts = []
    for seed, targets in enumerate((["q_proj", "v_proj"], ["q_proj", "down_proj"])):
        made = wrapped(model, peft.LoraConfig(r=2 + seed, target_modules=targets), seed)
        parts.append(save(made, tmp_path / str(seed), base_model_name_or_path="base"))
    api.combine_adapters(parts, tmp_path / "out", weights=[1, 1])
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "out")).eval()
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for name, change in changes(tmp_path / "out").items():
            reference.get_submodule(name).weight.add_(change.to(reference.dtype))
    torch.testing.assert_close(
        expected_logits(loaded, prompt()), expected_logits(reference, prompt()), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"weights": [1.0]}, "1 weights for 2 adapters"),
        ({"weights": [1.0, float("nan")]}, "finite"),
        ({"how": "tie"}, "did you mean `ties`"),
        ({"how": "ties", "density": 0.0}, "above 0"),
        ({"density": 0.5}, "leave --density out"),
        ({"rank": 0}, "at least 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    tmp_path: Path, two: list[Path], settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(SettingsError, match=said):
        api.combine_adapters(two, tmp_path / "out", **settings)
    assert not list(tmp_path.glob("out*"))


def test_adapters_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    first = write(tmp_path / "a")
    others = [
        (write(tmp_path / "b", base_model_name_or_path="other"), SettingsError, "'other'"),
        (write(tmp_path / "c", shapes={"layers.0.q": (12, 11)}), SettingsError, r"\[12, 11\]"),
        (write(tmp_path / "d", peft_type="VERA"), SettingsError, "VERA"),
        (write(tmp_path / "e", use_dora=True), SettingsError, "use_dora"),
        (write(tmp_path / "f", r=3), CheckpointError, "not"),
        (tmp_path / "nowhere", CheckpointError, "no directory"),
    ]
    for other, kind, said in others:
        with pytest.raises(kind, match=said):
            api.combine_adapters([first, other], tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_an_adapter_with_nan_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    import safetensors.torch

    damaged = write(tmp_path / "a")
    tensors = safetensors.torch.load_file(damaged / WEIGHTS_FILE)
    next(iter(tensors.values()))[0, 0] = float("nan")
    safetensors.torch.save_file(tensors, damaged / WEIGHTS_FILE)
    with pytest.raises(CheckpointError):
        api.combine_adapters([damaged], tmp_path / "out")
    with pytest.raises(CheckpointError, match="finite once scaled"):
        api.combine_adapters([write(tmp_path / "b", lora_alpha=1e300)], tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_an_output_that_exists_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(SettingsError, match="exists already"):
        api.combine_adapters([write(tmp_path / "a")], tmp_path / "out")


def test_weights_that_adapters_were_tuned_on_count_more_than_names(tmp_path: Path) -> None:
    parts = [write(tmp_path / name, base_model_name_or_path=name) for name in "abc"]
    for part, identity in zip(parts, ("same", "same", "other"), strict=True):
        (part / ORIGIN).write_text(json.dumps({"base": identity}))
    api.combine_adapters(parts[:2], tmp_path / "out")
    assert json.loads((tmp_path / "out" / ORIGIN).read_text())["base"] == "same"
    with pytest.raises(SettingsError, match="one base"):
        api.combine_adapters([parts[0], parts[2]], tmp_path / "again")
