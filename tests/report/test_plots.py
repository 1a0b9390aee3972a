"""Figures are well-formed, in the page's colours, and show every value they are given."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from sample_report import hostile, sample
from tailorbird.report import plots


def parse(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def words(svg: str) -> list[str]:
    return [
        text for element in parse(svg).iter() if element.tag.endswith("text") for text in element.itertext()
    ]


def figures(report: dict) -> list[str]:
    places = report["plan"]["places"]
    return [
        plots.bits_map(places),
        plots.sensitivity_map(report["sensitivity"]),
        plots.predicted_measured(places),
        plots.kl_histogram(report["kl_histogram"], 0.018, 0.2),
        plots.frontier(report["frontier"], (3_000_000, 0.02)),
    ]


@pytest.mark.parametrize("report", [sample(), hostile()], ids=["sample", "hostile"])
def test_every_figure_is_well_formed_and_accessible(report: dict) -> None:
    for svg in figures(report):
        root = parse(svg)
        assert root.get("role") == "img"
        assert root.get("aria-label")
        assert not any(element.tag.endswith(("script", "image", "style")) for element in root.iter())


def test_colours_are_variables_of_the_page() -> None:
    for svg in figures(sample()):
        assert re.findall(r"#[0-9a-f]{6}", svg) == []
        assert set(re.findall(r"var\((--[^)]*)\)", svg)) <= set(plots.THEME.values())


def test_ids_of_figures_never_meet() -> None:
    ids = [found for svg in figures(sample()) for found in re.findall(r'\bid="([^"]*)"', svg)]
    assert len(ids) == len(set(ids))


def test_references_inside_a_figure_resolve() -> None:
    for svg in figures(sample()):
        ids = set(re.findall(r'\bid="([^"]*)"', svg))
        assert set(re.findall(r'href="#([^"]*)"', svg)) <= ids
        assert set(re.findall(r"url\(#([^)]*)\)", svg)) <= ids


def test_the_same_data_give_the_same_bytes_whatever_matplotlibrc_says() -> None:
    import matplotlib

    before = figures(sample())
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.fonttype": "path"}):
        assert figures(sample()) == before


def test_the_map_shows_the_bits_of_every_linear() -> None:
    places = sample(blocks=3)["plan"]["places"]
    expected = sorted(str(place["coding"]["bits"]) for place in places if place["block"] is not None)
    labels = {"0", "1", "2", "block", *(place["role"] for place in places)}
    shown = words(plots.bits_map(places))
    for label in ("0", "1", "2", "block"):
        shown.remove(label)
    assert sorted(text for text in shown if text not in labels - {"0", "1", "2"}) == expected


def test_maps_of_deep_models_stay_of_reasonable_height() -> None:
    box = parse(plots.bits_map(sample(blocks=80)["plan"]["places"])).get("viewBox")
    assert box is not None
    assert float(box.split()[3]) < 800


def test_heat_levels_rise_with_the_value_and_use_both_ends() -> None:
    values = [10.0**e for e in range(-6, 1)]
    scale = plots.heat_scale(values)
    levels = [plots.heat_level(value, scale) for value in values]
    assert levels == sorted(levels)
    assert (levels[0], levels[-1]) == (0, plots.HEAT_LEVELS - 1)
    assert plots.heat_level(0.0, scale) == plots.heat_level(math.nan, scale) == 0


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 32])
def test_every_width_has_a_colour(bits: int) -> None:
    assert f"--bits-{plots.shown_bits(bits)}" in plots.THEME.values()


@pytest.mark.parametrize(
    "histogram",
    [
        {},
        {"edges": [0, 1], "counts": []},
        {"edges": [0, 1, 2], "counts": [1]},
        {"edges": [0, 1], "counts": [0]},
        {"edges": [1, 0], "counts": [3]},
        {"edges": [0, math.nan], "counts": [3]},
    ],
)
def test_a_histogram_that_says_nothing_is_left_out(histogram: dict) -> None:
    assert plots.kl_histogram(histogram) == ""


@pytest.mark.parametrize(
    "edges",
    [[0, 1e-6, 1e-3, 1.0], [0, 0.5, 1.0, 1.5], [1e-9, 1e-5, 1e-4, 1e-2]],
    ids=["zero", "linear", "log"],
)
def test_histograms_start_at_zero_or_not(edges: list[float]) -> None:
    svg = plots.kl_histogram({"edges": edges, "counts": [5, 0, 2]}, 1e-3, 0.9)
    assert sum("--accent" in str(element.get("style")) for element in parse(svg).iter()) == 2


def test_figures_without_data_are_left_out() -> None:
    assert plots.bits_map([]) == plots.sensitivity_map([]) == plots.predicted_measured([]) == ""
    assert plots.frontier([]) == plots.frontier([{"bytes": 10, "predicted_kl": None}]) == ""


def test_one_point_is_enough_to_draw() -> None:
    place = {
        "block": 0,
        "role": "q",
        "coding": {"kind": "integer", "bits": 4, "group_size": 64},
        "predicted": {"error": 0.01},
        "measured": {"error": 0.01},
    }
    parse(plots.predicted_measured([place]))
    parse(plots.bits_map([place]))
    parse(plots.frontier([{"bytes": 1000, "predicted_kl": 0.1, "measured_kl": 0.1, "label": "one"}]))
    parse(plots.sensitivity_map([{"block": 0, "role": "q", "coefficient": 0.0}]))


def test_the_legend_names_each_coding_once_fewest_bits_first() -> None:
    legend = plots.codings_in_use(sample()["plan"]["places"])
    assert legend == sorted(set(legend), key=lambda pair: (pair[0], len(pair[1]), pair[1]))
