"""The page stands alone, runs nothing, and shows what report.json says."""

from __future__ import annotations

import importlib.util
import json
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from sample_report import hostile, sample
from tailorbird.errors import CheckpointError
from tailorbird.report.html import render, write_report

VOID = {"meta", "br", "hr", "img", "input", "link", "rect", "path", "use"}


class Page(HTMLParser):
    """Elements, attributes and visible text of a page; fails where tags don't nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(params=["sample", "hostile", "nothing"])
def page(request: pytest.FixtureRequest) -> Page:
    return Page(render({"sample": sample, "hostile": hostile, "nothing": dict}[request.param]()))


def test_nothing_is_loaded_and_nothing_runs(page: Page) -> None:
    for tag, attributes in page.elements:
        assert tag not in ("script", "img", "link", "iframe", "object", "embed", "form", "base")
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "action"):
                assert (value or "").startswith("#")
            assert "url(" not in (value or "").replace("url(#", "")


def test_the_page_forbids_the_browser_to_load_anything(page: Page) -> None:
    policies = [a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert len(policies) == 1
    assert "default-src 'none'" in (policies[0] or "")


def test_images_have_names_and_ids_are_unique(page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.elements:
        if tag == "svg":
            assert attributes.get("aria-label") or attributes.get("aria-hidden") or "class" not in attributes
        if tag == "th":
            assert attributes.get("scope") in ("row", "col")


def test_headings_label_their_sections(page: Page) -> None:
    ids = {attributes.get("id") for _, attributes in page.elements}
    assert {a["aria-labelledby"] for _, a in page.elements if "aria-labelledby" in a} <= ids
    assert sum(tag == "h1" for tag, _ in page.elements) == 1


def test_the_page_says_what_the_data_say() -> None:
    text = Page(render(sample())).text
    for expected in (
        "python-8m",
        "5.813",
        "5.942",
        "0.0183",
        "0.0161",
        "94.7",
        "All 4 checks",
        "32,768",
        "0.00212 nats/token",
        "tailorbird fit models/python-8m",
        "apache-2.0",
        "2.13.0",
        "avx512_vnni",
        "sensitivity",
        "int4 g64",
        "3.5 bpw",
        "headroom",
        "KV cache",
    ):
        assert expected in text.replace("\u00a0", " "), expected


def test_a_failed_check_is_the_first_thing_said() -> None:
    report = sample()
    report["result"]["checks"][2] = {
        "name": "tokenizer",
        "passed": False,
        "detail": "ids differ",
        "place": "tokenizer.json",
    }
    text = Page(render(report)).text
    assert "All 4 checks" not in text
    assert text.index("Refused by the quality gate") < text.index("Where the bytes go")
    assert "ids differ" in text


def test_loud_warnings_and_quiet_ones_are_both_shown() -> None:
    report = sample()
    report["result"]["warnings"] = ["SLOWER than its source", "few tokens"]
    text = Page(render(report)).text
    assert text.index("SLOWER than its source") < text.index("few tokens")


@pytest.mark.parametrize(
    "absent",
    [
        "kl_histogram",
        "frontier",
        "sensitivity",
        "candidates",
        "probe",
        "calibration_halves_kl",
        "stages",
        "result",
    ],
)
def test_any_part_may_be_missing(absent: str) -> None:
    without, nothing = sample(), sample()
    del without[absent]
    nothing[absent] = None
    assert Page(render(without)).text == Page(render(nothing)).text


def test_parts_of_the_bar_add_up_to_the_budget() -> None:
    report = sample()
    page = Page(render(report))
    bar = next(i for i, (_, attributes) in enumerate(page.elements) if attributes.get("class") == "bar")
    shares = []
    for tag, attributes in page.elements[bar + 1 :]:
        if tag == "svg":
            break
        if tag == "rect" and "var(--part" in (attributes.get("fill") or ""):
            x, extent = ((attributes[name] or "").rstrip("%") for name in ("x", "width"))
            shares.append((float(x), float(extent)))
    for (start, width), (following, _) in pairwise(shares):
        assert start + width == pytest.approx(following, abs=1e-3)
    result = report["result"]
    covered = sum(shares[-1])
    assert covered == pytest.approx(100 * result["total_bytes"] / result["budget_bytes"], abs=1e-3)


def test_the_same_data_give_the_same_page() -> None:
    assert render(sample()) == render(sample())


def test_the_page_is_written_beside_the_data(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps(sample(blocks=1)), encoding="utf-8")
    page = write_report(tmp_path)
    assert page == tmp_path / "report.html"
    assert page.read_text(encoding="utf-8") == render(sample(blocks=1))


@pytest.mark.parametrize("content", [None, "", "[1]", "{", "\x00"])
def test_data_that_cant_be_read_are_refused_by_name(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"report\.json"):
        write_report(tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [400, 1100])
def test_a_browser_draws_the_page_in_both_colours_without_cutting_it(
    tmp_path: Path, dark: bool, width: int
) -> None:
    script = Path(__file__).parents[2] / "scripts" / "screenshot_report.py"
    spec = importlib.util.spec_from_file_location("screenshot_report", script)
    assert spec is not None
    assert spec.loader is not None
    shots = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shots)
    browser = shots.find_browser()
    if browser is None:
        pytest.skip("no Chromium on PATH")
    page, image = tmp_path / "report.html", tmp_path / "report.png"
    page.write_text(render(sample()), encoding="utf-8")
    shots.screenshot(browser, page, image, width, 900, dark)
    from matplotlib.image import imread

    pixels = imread(image)[..., :3]
    corner = pixels[-3, 3].mean()
    assert (corner < 0.2) if dark else (corner > 0.9)
    assert len({tuple((255 * pixel).astype(int)) for row in pixels[::9] for pixel in row[::9]}) > 15
    scale = 2 if width >= 500 else 1
    edge = pixels[:, (width - 6) * scale : (width - 2) * scale]
    assert abs(edge - pixels[-3, 3]).max() < 0.05, "something reaches the right edge of the page"
