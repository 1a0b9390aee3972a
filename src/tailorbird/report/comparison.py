"""`DIR/comparison.html` and `DIR/kl-by-bytes.svg` from `DIR/comparison.json`: methods against each other.

What html.py says of its page holds here, too: everything escaped, nothing loaded, no script, and the same
data give the same bytes. The figure stands beside the page once more, in fixed colours, for use elsewhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tailorbird.report.page import abbreviated, base_name, known_groups, mapping, objects, render_page
from tailorbird.report.plots import FULL_WIDTH, LINE, PAGE, THEME, drawing, log_ticks, plain_locator
from tailorbird.report.table import (
    duration_text,
    is_number,
    machine_facts,
    number_text,
    share_text,
    size_text,
)

DATA, PAGE_NAME, FIGURE = "comparison.json", "comparison.html", "kl-by-bytes.svg"

#: CSS variables of the lines, and the shapes of their points; further methods begin again with other pairs.
COLOURS = ("--accent", "--warm", "--bits-16", "--heat-3", "--muted", "--bits-5", "--heat-6")
SHAPES = ("o", "s", "^", "D", "v", "P", "X", "*")
#: Of the figure that stands alone: those of the page by light.
FIXED = {
    "--ink": "#1d2422", "--muted": "#5d6865", "--line": "#dcdfd8", "--page": "#ffffff", "--accent": "#2c7563",
    "--warm": "#a9481f", "--bits-16": "#245b5f", "--heat-3": "#e1a577", "--bits-5": "#8fb793",
    "--heat-6": "#863f1b",
}  # fmt: skip

COLUMNS = (
    "budget", "method", "size", "bits per weight", "KL, nats/token", "perplexity", "top-1 agreement", "time",
    "peak memory", "",
)  # fmt: skip
#: Which of them hold texts.
TEXTS = (0, 1, 9)


@dataclass(frozen=True)
class ComparisonRow:
    """One cell, as texts in the order of `COLUMNS`; `best` has the least divergence within its budget."""

    texts: tuple[str, ...]
    best: bool


def comparison_rows(cells: Sequence[Mapping[str, Any]]) -> list[ComparisonRow]:
    """The table of a comparison.

    Parameters
    ----------
    cells : sequence of mappings
        The fields of `compress.compare.Cell`.
    """
    least: dict[Any, float] = {}
    for cell in cells:
        kl = cell.get("kl_mean")
        if is_number(kl):
            least[cell.get("budget")] = min(kl, least.get(cell.get("budget"), kl))
    return [
        ComparisonRow(
            (
                str(cell.get("budget")),
                str(cell.get("method")),
                size_text(cell.get("total_bytes")),
                number_text(cell.get("bits_per_weight")),
                number_text(cell.get("kl_mean")),
                number_text(cell.get("perplexity"), 4),
                share_text(cell.get("top1_agreement")),
                duration_text(cell.get("seconds")),
                size_text(cell.get("peak_rss_bytes")),
                str(cell.get("failure") or ""),
            ),
            is_number(cell.get("kl_mean")) and cell["kl_mean"] == least[cell.get("budget")],
        )
        for cell in cells
    ]


def write_comparison(directory: Path) -> Path:
    """Write the page and the figure of `directory`/comparison.json.

    Returns
    -------
    Path
        The page.
    """
    from tailorbird.model.writing import write_text  # which loads PyTorch

    data = json.loads((directory / DATA).read_text(encoding="utf-8"))
    figure = kl_by_bytes(objects(data.get("cells")))
    page = directory / PAGE_NAME
    write_text(page, render_comparison(data, figure))
    if figure:
        write_text(directory / FIGURE, standalone(figure))
    return page


def render_comparison(data: Mapping[str, Any], figure: str) -> str:
    """The page as a string; `figure` is that of `kl_by_bytes`."""
    from markupsafe import Markup

    cells = objects(data.get("cells"))
    before = next((c["perplexity_before"] for c in cells if is_number(c.get("perplexity_before"))), None)
    return render_page(
        "comparison.html.j2",
        {
            "model": base_name(str(data.get("model") or "model")),
            "perplexity": before,
            "tokens": mapping(data.get("evaluation")).get("tokens"),
            "warnings": data.get("warnings") or [],
            "figure": Markup(figure),
            "columns": COLUMNS,
            "text_columns": TEXTS,
            "rows": comparison_rows(cells),
            "facts": _facts(data),
            "command": str(data.get("command") or ""),
        },
    )


def kl_by_bytes(cells: Sequence[Mapping[str, Any]]) -> str:
    """KL against stored bytes, one line for each method; an ``<svg>`` element, "" where nothing was measured.

    Parameters
    ----------
    cells : sequence of mappings
        ``method total_bytes kl_mean``; cells without numbers, or without divergence, are left out.
    """
    lines: dict[str, list[tuple[float, float]]] = {}
    for cell in cells:
        size, kl = cell.get("total_bytes"), cell.get("kl_mean")
        if is_number(size) and is_number(kl) and kl > 0:
            lines.setdefault(str(cell.get("method")), []).append((size, kl))
    points = [point for line in lines.values() for point in line]
    if not points:
        return ""
    sizes, heights = [size for size, _ in points], [kl for _, kl in points]
    low, high = min(heights) / 1.5, max(heights) * 1.5
    scale = next((1024**power for power in (3, 2, 1) if max(sizes) >= 1024**power), 1)
    unit = {1024**3: "GiB", 1024**2: "MiB", 1024: "KiB", 1: "bytes"}[scale]
    placeholders = {variable: placeholder for placeholder, variable in THEME.items()}
    with drawing(FULL_WIDTH, 420, left=58, right=24, top=14, bottom=46) as (figure, axes, finish):
        axes.set_yscale("log")
        axes.set_ylim(low, high)
        span = (max(sizes) - min(sizes)) or max(sizes)
        axes.set_xlim((min(sizes) - 0.06 * span) / scale, (max(sizes) + 0.06 * span) / scale)
        for number, (method, line) in enumerate(lines.items()):
            line.sort()
            axes.plot(
                [size / scale for size, _ in line],
                [kl for _, kl in line],
                label=method,
                color=placeholders[COLOURS[number % len(COLOURS)]],
                linewidth=1.6,
                marker=SHAPES[number % len(SHAPES)],
                markersize=7,
                markeredgecolor=PAGE,
                markeredgewidth=0.8,
            )
        axes.legend(loc="upper right", frameon=False)
        log_ticks(axes.yaxis, low, high)
        axes.xaxis.set_major_locator(plain_locator(8))
        axes.grid(axis="y", color=LINE, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.set_xlabel(f"size, {unit}")
        axes.set_ylabel("KL, nats per token")
        return finish(
            figure,
            "comparison",
            f"KL against size for {len(lines)} methods: from {number_text(max(heights))} to "
            f"{number_text(min(heights))} nats per token",
        )


def standalone(svg: str) -> str:
    """An inline figure as a file of its own: with its name space, and colours in place of CSS variables."""
    whole = svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" ', 1)
    return re.sub(r"var\((--[a-z0-9-]+)\)", lambda found: FIXED[found[1]], whole) + "\n"


def _facts(data: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Groups of name and value at the end of the page."""

    def text(name: str) -> list[tuple[str, Any]]:
        facts = mapping(data.get(name))
        return [
            ("source", facts.get("source")),
            ("tokens", number_text(facts.get("tokens"))),
            ("fingerprint", abbreviated(facts.get("fingerprint"))),
        ]

    return known_groups(
        [
            (
                "Source",
                [
                    ("model", data.get("model")),
                    ("parameters", number_text(data.get("parameters"))),
                    ("fingerprint", abbreviated(data.get("fingerprint"))),
                    ("seed", data.get("seed")),
                ],
            ),
            ("Calibration", text("calibration")),
            ("Held-out text", text("evaluation")),
            ("Machine", machine_facts(mapping(data.get("machine")))),
            ("Versions", list(mapping(data.get("versions")).items())),
        ]
    )
