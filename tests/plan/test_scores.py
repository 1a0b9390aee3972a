"""Scores: what is predicted is coefficient times error, kept on disk unchanged, never read when broken."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tailorbird.calibrate.ledger import Ledger
from tailorbird.calibrate.statistics import GramAccumulator, LinearStatistics
from tailorbird.calibrate.stream import StreamingModel
from tailorbird.formats.packed import FloatCoding, IntegerCoding, stored_bytes
from tailorbird.linear.error import output_error, row_energies
from tailorbird.linear.quantize.gptq import Gptq
from tailorbird.linear.quantize.rtn import Rtn
from tailorbird.model.anatomy import read_anatomy
from tailorbird.model.checkpoint import open_checkpoint
from tailorbird.plan.candidates import PROBE_KEY, probe_rounding
from tailorbird.plan.ends import HeadStatistics, end_errors, for_both_uses, without
from tailorbird.plan.errors import measure_errors
from tailorbird.plan.fisher import fisher_coefficients
from tailorbird.plan.places import places_of, uses_of
from tailorbird.plan.score_cache import ScoreCache
from tailorbird.plan.scores import PlaceScore, Scores, assemble, options
from tailorbird.plan.sensitivity import measure_coefficients, measure_divergence
from tiny import fresh, save_model

CODINGS = (IntegerCoding(2, 32), IntegerCoding(4, 32), IntegerCoding(4, 64), FloatCoding("bfloat16"))
SCORES = Scores(
    (
        PlaceScore("embed", "tied", -1, (258, 64), {c.label: 0.1 / c.bits for c in CODINGS}, 0.7),
        PlaceScore("blocks.0.up", "up", 0, (160, 48), {c.label: 0.3 / c.bits for c in CODINGS}, 1.9e-5),
    ),
    {"int4 g32": 0.25, "int2 g32": 0.5},
    "abc",
)


def streaming(directory: Path) -> StreamingModel:
    checkpoint = open_checkpoint(str(directory))
    return StreamingModel(checkpoint, read_anatomy(checkpoint))


def tokens(windows: int, length: int) -> torch.Tensor:
    return torch.randint(0, 256, (windows, length), generator=torch.Generator().manual_seed(3))


def test_predicted_loss_is_coefficient_times_the_methods_error() -> None:
    embed, up = options(SCORES, lambda place: CODINGS)
    by_label = {option.coding.label: option for option in embed.options}
    assert by_label["int4 g32"].loss == pytest.approx(0.7 * 0.25 * 0.1 / 4)
    assert by_label["bf16"].loss == pytest.approx(0.7 * 0.1 / 16)  # no ratio: the error of rounding itself
    assert by_label["int2 g32"].bytes == stored_bytes(CODINGS[0], 258, 64)
    assert len(up.options) == len(CODINGS)
    fewer = options(SCORES, lambda place: CODINGS[place.role == "up" :])
    assert [option.coding for option in fewer[0].options] == [*CODINGS]
    assert [option.coding for option in fewer[1].options] == [*CODINGS[1:]]
    assert {p.together for p in options(SCORES, lambda place: CODINGS, lambda place: place.role)} == {
        "tied",
        "up",
    }


def test_scores_come_back_from_disk_as_they_were() -> None:
    cache = ScoreCache({"source": "x"})
    assert cache.load() is None
    assert cache.load_errors() is None
    cache.save(SCORES)
    assert cache.load() == SCORES
    errors, ratios = {"a": {"int4 g32": 0.1, PROBE_KEY: 1 / 3}}, {"int4 g32": 0.7}
    cache.save_errors(errors, ratios)
    assert cache.load_errors() == (errors, ratios)
    whole, judge = (LinearStatistics(torch.randn(8, 8), None, torch.rand(8), tokens=n) for n in (5, 2))
    cache.save_head(HeadStatistics(whole, None))
    assert cache.load_head().judge is None
    cache.save_head(HeadStatistics(whole, judge))
    cache.save_tied(judge)
    found = cache.load_head()
    for kept, given in ((found.whole, whole), (found.judge, judge), (cache.load_tied(), judge)):
        assert torch.equal(kept.gram, given.gram)
        assert torch.equal(kept.mean_abs, given.mean_abs)
        assert kept.tokens == given.tokens


def test_another_key_is_another_entry() -> None:
    ScoreCache({"source": "x", "tokens": 5}).save(SCORES)
    assert ScoreCache({"tokens": 5, "source": "x"}).load() == SCORES
    assert ScoreCache({"source": "x", "tokens": 6}).load() is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "3",
        '{"places": 1}',
        '{"places": [1], "ratios": {}, "content_hash": ""}',
        "\udc80",
    ],
)
def test_a_broken_file_counts_as_none(text: str) -> None:
    cache = ScoreCache({"source": "x"})
    cache.directory.mkdir(parents=True)
    for name in ("scores.json", "errors.json"):
        (cache.directory / name).write_bytes(text.encode(errors="surrogateescape"))
    assert cache.load() is None
    assert cache.load_errors() is None


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.95])
def test_a_file_cut_short_counts_as_none(keep: float) -> None:
    cache = ScoreCache({"source": "x"})
    cache.save(SCORES)
    path = cache.directory / "scores.json"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep)])
    assert cache.load() is None


def test_a_place_with_unknown_or_missing_fields_counts_as_none() -> None:
    cache = ScoreCache({"source": "x"})
    for change in ("name", "extra"):
        cache.save(SCORES)
        data = json.loads((cache.directory / "scores.json").read_text())
        if change == "extra":
            data["places"][0]["extra"] = 1
        else:
            del data["places"][0][change]
        (cache.directory / "scores.json").write_text(json.dumps(data))
        assert cache.load() is None


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_both_passes_score_every_place(architecture: str, tmp_path: Path) -> None:
    model = streaming(save_model(tmp_path / "model", architecture))
    anatomy, ids = model.anatomy, tokens(12, 64)
    errors, ratios, head = measure_errors(model, ids, Gptq(), CODINGS, fresh(tmp_path))
    coefficients = measure_coefficients(model, ids[:2], errors, fresh(tmp_path))
    divergence = measure_divergence(
        model, uses_of(anatomy), ids[:2], lambda name, weight: probe_rounding(weight), fresh(tmp_path)
    )
    for name, kl in divergence.items():
        assert coefficients[name] * errors[name][PROBE_KEY] == pytest.approx(kl)
    errors |= end_errors(model, Gptq(), head, coefficients, CODINGS)
    scores = assemble(anatomy, errors, ratios, coefficients, "hash")
    assert [place.name for place in scores.places] == [place.name for place in places_of(anatomy)]
    assert len(scores.places) == len(list(anatomy.linears())) + (1 if anatomy.tied else 2)
    assert scores.places[0].role == ("tied" if anatomy.tied else "embedding")
    shapes = {linear.name: (linear.out_features, linear.in_features) for linear in anatomy.linears()}
    for place in scores.places:
        assert set(place.errors) >= {coding.label for coding in CODINGS}
        assert place.shape == shapes.get(place.name, (258, 64))
        assert place.coefficient > 0, place.name
    assert set(ratios) == {coding.label for coding in CODINGS[:-1]}
    assert all(0 < ratio < 1.5 for ratio in ratios.values())
    assert head.whole.gram.shape == (64, 64)


def test_errors_are_weighted_by_the_inputs_that_the_source_sees(tmp_path: Path) -> None:
    model = streaming(save_model(tmp_path / "model", "llama"))
    ids = tokens(3, 20)
    errors, ratios, _ = measure_errors(model, ids, Rtn(), CODINGS, fresh(tmp_path))
    block = model.load_block(0)
    seen: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        model.capture_inputs(block, 0, model.embed(ids), lambda key, x: seen.__setitem__(key, x.clone()))
    for linear in model.anatomy.blocks[0].linears:
        x = seen[linear.shares_input].flatten(0, 1).double()
        statistics = LinearStatistics((x.T @ x / len(x)).float(), None, x.abs().mean(0).float(), len(x))
        weight = model.weight_of(block, linear)
        rounded = Rtn()(weight, statistics, CODINGS[0]).dequantize()
        exact = output_error(weight, rounded, statistics.gram)
        assert errors[linear.name][CODINGS[0].label] == pytest.approx(exact, rel=1e-3)
    assert ratios == {coding.label: pytest.approx(1.0) for coding in CODINGS[:-1]}


def test_where_rounding_changes_nothing_the_coefficient_is_zero(tmp_path: Path) -> None:
    model = streaming(save_model(tmp_path / "model", "llama"))
    errors = {use.name: {PROBE_KEY: 0.0} for use in uses_of(model.anatomy)}
    assert set(measure_coefficients(model, tokens(1, 8), errors, fresh(tmp_path)).values()) == {0.0}


def test_a_place_without_a_ratio_keeps_the_error_of_rounding() -> None:
    bare = replace(SCORES, ratios={})
    assert bare.predicted_error(bare.places[0], CODINGS[1]) == bare.places[0].errors["int4 g32"]


class StoppedModel(StreamingModel):
    """A model whose process dies when a block is about to be read."""

    def __init__(self, model: StreamingModel, stop_at: int) -> None:
        super().__init__(model.checkpoint, model.anatomy)
        self.left, self.read = stop_at, []  # type: ignore[var-annotated]

    def load_block(self, index: int) -> torch.nn.Module:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        self.read.append(index)
        return super().load_block(index)


Pass = Callable[[StreamingModel, Ledger], Any]
IDS = tokens(4, 24)


def errors_pass(model: StreamingModel, ledger: Ledger) -> Any:
    errors, ratios, head = measure_errors(model, IDS, Gptq(), CODINGS, ledger)
    return errors, ratios, head.whole.gram.tolist()


def divergence_pass(model: StreamingModel, ledger: Ledger) -> Any:
    return measure_divergence(
        model, uses_of(model.anatomy), IDS, lambda _, weight: probe_rounding(weight), ledger
    )


def gradient_pass(model: StreamingModel, ledger: Ledger) -> Any:
    errors = {use.name: {PROBE_KEY: 0.1} for use in uses_of(model.anatomy)}
    return fisher_coefficients(model, IDS, errors, ledger)


@pytest.mark.parametrize("measure", [errors_pass, divergence_pass, gradient_pass])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_a_pass_that_dies_goes_on_at_the_block_it_reached(
    measure: Pass, architecture: str, tmp_path: Path
) -> None:
    model = streaming(save_model(tmp_path / "model", architecture, num_hidden_layers=3))
    whole = measure(model, fresh(tmp_path))
    for stop_at in range(1, 3 if measure is not gradient_pass else 6):
        ledger = fresh(tmp_path)
        with pytest.raises(KeyboardInterrupt):
            measure(StoppedModel(model, stop_at), ledger)
        resumed = StoppedModel(model, -1)
        assert measure(resumed, ledger) == whole
        total = 3 if measure is not gradient_pass else 6
        assert len(resumed.read) == total - stop_at


def test_the_method_is_judged_on_tokens_it_did_not_see(tmp_path: Path) -> None:
    """With fewer tokens than inputs, what was fitted to them fits them far better than others."""
    model = streaming(save_model(tmp_path / "model", "llama"))
    few = tokens(4, 10)
    _, ratios, _ = measure_errors(model, few, Gptq(asymmetric=False), CODINGS, fresh(tmp_path))
    _, alone, _ = measure_errors(model, few[:1], Gptq(asymmetric=False), CODINGS, fresh(tmp_path))
    assert all(ratios[label] > 2 * alone[label] for label in ratios)


def test_statistics_without_a_part_are_those_of_the_rest() -> None:
    x = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))

    def statistics(rows: torch.Tensor) -> LinearStatistics:
        accumulator = GramAccumulator(8)
        accumulator.add(rows)
        return accumulator.finish()

    rest = without(statistics(x), statistics(x[40:]))
    exact = statistics(x[:40])
    torch.testing.assert_close(rest.gram, exact.gram, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rest.mean_abs, exact.mean_abs)
    assert rest.tokens == 40


def test_an_input_that_only_the_left_out_part_saw_is_exactly_zero_in_the_rest() -> None:
    x = torch.randn(60, 8, generator=torch.Generator().manual_seed(0)).relu()
    x[:40, 3] = 0

    def gram(rows: torch.Tensor) -> LinearStatistics:
        return LinearStatistics(rows.T @ rows / len(rows), None, rows.abs().mean(0), len(rows))

    rest = without(gram(x), gram(x[40:]))
    assert rest.gram[3].count_nonzero() == rest.gram[:, 3].count_nonzero() == 0
    assert (rest.gram.diagonal() >= 0).all()
    torch.testing.assert_close(rest.gram, gram(x[:40]).gram, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_the_ends_are_foreseen_as_they_will_be_rounded(architecture: str, tmp_path: Path) -> None:
    """An untied embedding is rounded to nearest; a head, tied or not, by the method, for its own inputs."""
    model = streaming(save_model(tmp_path / "model", architecture))
    anatomy, ids = model.anatomy, tokens(12, 64)
    method = Gptq(asymmetric=False)
    errors, ratios, head = measure_errors(model, ids, method, CODINGS, fresh(tmp_path))
    coefficients = dict.fromkeys(errors, 1.0) | {anatomy.embedding: 3.0}
    errors |= end_errors(model, method, head, coefficients, CODINGS)
    scores = assemble(anatomy, errors, ratios, coefficients, "hash")
    own = {place.name for place in scores.places if place.own}
    assert own == {place.name for place in places_of(anatomy)} & {anatomy.embedding, anatomy.head}
    foreseen = {p.name: p.coefficient * scores.predicted_error(p, CODINGS[0]) for p in scores.places}
    weight = model.end_weight(anatomy.head)
    whole = head.whole
    if anatomy.tied:
        whole = for_both_uses(anatomy, weight, head.whole, coefficients)
        rounded = method(weight, whole, CODINGS[0]).dequantize()
        cost = output_error(weight, rounded, head.whole.gram) + 3 * output_error(weight, rounded)
        assert foreseen[anatomy.embedding] == pytest.approx(cost, rel=0.35)
    else:
        rounded = method(weight, whole, CODINGS[0]).dequantize()
        assert foreseen[anatomy.head] == pytest.approx(output_error(weight, rounded, whole.gram), rel=0.35)
        weight = model.end_weight(anatomy.embedding)
        exact = 3 * output_error(weight, Rtn()(weight, None, CODINGS[0]).dequantize())
        assert foreseen[anatomy.embedding] == pytest.approx(exact, rel=0.35)


def test_what_a_tied_weight_costs_is_one_quadratic_form(tmp_path: Path) -> None:
    """``tr(D G D')`` is proportional to the sum of both uses' coefficients times their errors."""
    model = streaming(save_model(tmp_path / "model", "qwen2"))
    anatomy, generator = model.anatomy, torch.Generator().manual_seed(0)
    x = torch.randn(500, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    head = LinearStatistics(x.T @ x / 500, None, x.abs().mean(0), 500)
    coefficients = {anatomy.embedding: 0.3, anatomy.head: 2.1}
    weight = model.end_weight(anatomy.head)
    both = for_both_uses(anatomy, weight, head, coefficients)
    proportions = []
    for seed in range(3):
        change = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)) * torch.rand(64)
        cost = 2.1 * output_error(weight, weight + change, head.gram)
        cost += 0.3 * output_error(weight, weight + change)
        proportions.append(cost / float(row_energies(change, both.gram).sum()))
    assert proportions == pytest.approx([proportions[0]] * 3, rel=1e-4)


def test_a_tied_weight_rounded_for_both_uses_costs_less_than_for_one(tmp_path: Path) -> None:
    model = streaming(save_model(tmp_path / "model", "qwen2"))
    anatomy, ids, method = model.anatomy, tokens(12, 64), Gptq(asymmetric=False)
    errors, _, head = measure_errors(model, ids, method, CODINGS, fresh(tmp_path))
    coefficients = dict.fromkeys(errors, 1.0)
    weight = model.end_weight(anatomy.head)
    nothing = LinearStatistics(torch.eye(64), None, head.whole.mean_abs, head.whole.tokens)

    def cost(statistics: LinearStatistics) -> float:
        rounded = method(weight, statistics, CODINGS[0]).dequantize()
        return output_error(weight, rounded, head.whole.gram) + output_error(weight, rounded)

    both = cost(for_both_uses(anatomy, weight, head.whole, coefficients))
    assert both < min(cost(head.whole), cost(nothing))
