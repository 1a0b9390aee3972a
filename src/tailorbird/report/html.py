"""`OUT/report.html` from `OUT/report.json`: one file that needs nothing else and runs no script.

All texts are escaped by the template, which also forbids the browser to load anything; parts that are
missing from the data are left out of the page. The same data gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tailorbird.errors import CheckpointError
from tailorbird.model.writing import write_text
from tailorbird.report import plots
from tailorbird.report.page import (
    abbreviated,
    base_name,
    known_groups,
    listing,
    mapping,
    objects,
    render_page,
    unbroken,
)
from tailorbird.report.table import (
    ABSENT,
    change_text,
    dense_bytes,
    duration_text,
    is_loud,
    is_number,
    machine_facts,
    number_text,
    result_rows,
    setting_text,
    share_text,
    size_text,
)

DATA = "report.json"
PAGE = "report.html"

_ATTENTION = frozenset(("q", "k", "v", "o", "qkv"))
_FEED_FORWARD = frozenset(("gate", "up", "down", "fc1", "fc2", "gate_up"))


def write_report(directory: Path) -> Path:
    """Write `directory`/report.html from `directory`/report.json.

    Parameters
    ----------
    directory : Path
        The checkpoint's directory, or the one of a refused result.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    CheckpointError
        If report.json is missing or isn't one JSON object.
    """
    data = directory / DATA
    try:
        report = json.loads(data.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{data} can't be read as JSON ({error})",
            "the report's data, as `fit` and `compress` write them",
            "run `tailorbird fit` again, or restore the file",
        ) from error
    if not isinstance(report, dict):
        raise CheckpointError(
            f"{data} holds {type(report).__name__}",
            "one JSON object with `result` and `plan`",
            "run `tailorbird fit` again, or restore the file",
        )
    page = directory / PAGE
    write_text(page, render(report))
    return page


def render(report: Mapping[str, Any]) -> str:
    """The page as a string.

    Parameters
    ----------
    report : mapping
        The content of report.json: ``result plan kl_histogram frontier sensitivity probe
        calibration_halves_kl command stages``; every part may be missing.
    """
    return render_page("report.html.j2", _view(report))


def _view(report: Mapping[str, Any]) -> dict[str, Any]:
    """Everything the template prints, computed."""
    from markupsafe import Markup

    result, plan = mapping(report.get("result")), mapping(report.get("plan"))
    source = mapping(plan.get("source"))
    places = objects(plan.get("places"))
    sensitivity = objects(report.get("sensitivity"))
    points = objects(report.get("frontier"))
    checks = objects(result.get("checks"))
    warnings = [str(warning) for warning in listing(result.get("warnings"))]
    calibration = mapping(plan.get("calibration"))
    evaluation = mapping(plan.get("evaluation"))
    scale = plots.heat_scale([e.get("coefficient", 0) for e in sensitivity if _in_block(e)])
    return {
        "model": base_name(str(source.get("model") or "model")),
        "source": source,
        "headline": unbroken(_headline(result)),
        "quality": unbroken(_quality(result, evaluation)),
        "failed": [check for check in checks if not check.get("passed")],
        "checks": checks,
        "loud": [warning for warning in warnings if is_loud(warning)],
        "warnings": [warning for warning in warnings if not is_loud(warning)],
        "rows": result_rows(result),
        "budget": _budget_parts(result, places),
        "ends": [place for place in places if not _in_block(place)],
        "places": places,
        "codings": _legend(places),
        "heat_low": number_text(10 ** scale[0], 2),
        "heat_high": number_text(10 ** scale[1], 2),
        "end_sensitivity": [entry for entry in sensitivity if not _in_block(entry)],
        "bits_map": Markup(plots.bits_map(places)),
        "sensitivity_map": Markup(plots.sensitivity_map(sensitivity)),
        "predicted_measured": Markup(plots.predicted_measured(places)),
        "predicted_kl": mapping(result.get("predicted")).get("kl"),
        "kl_mean": result.get("kl_mean"),
        "kl_histogram": Markup(
            plots.kl_histogram(
                mapping(report.get("kl_histogram")), result.get("kl_mean"), result.get("kl_p99")
            )
        ),
        "frontier": Markup(
            plots.frontier(points, (result.get("weight_bytes"), result.get("kl_mean"))) if points else ""
        ),
        "stages": [_stage(stage) for stage in objects(report.get("stages"))],
        "facts": _facts(report, plan, calibration, evaluation),
        "command": str(report.get("command") or ""),
    }


def _headline(result: Mapping[str, Any]) -> str:
    """What fits where, in one sentence."""
    dense, weights = dense_bytes(result), result.get("weight_bytes")
    if dense is None or not is_number(weights):
        return ""
    sentence = (
        f"{size_text(weights)} of weights instead of {size_text(dense)}: "
        f"{share_text(weights, dense)} of the source at 16 bits, "
        f"{number_text(result.get('bits_per_weight'))} bits per weight"
    )
    if is_number(result.get("budget_bytes")):
        sentence += f", within a budget of {size_text(result['budget_bytes'])}"
        if result.get("kv_bytes"):
            sentence += f" that also holds {size_text(result['kv_bytes'])} of KV cache"
    return sentence + "."


def _quality(result: Mapping[str, Any], evaluation: Mapping[str, Any]) -> str:
    """What it cost, in one sentence."""
    before, after = result.get("perplexity_before"), result.get("perplexity_after")
    parts = []
    if is_number(before) and is_number(after):
        parts.append(
            f"perplexity went from {number_text(before, 4)} to {number_text(after, 4)} "
            f"({change_text(before, after)})"
        )
    if is_number(result.get("kl_mean")):
        parts.append(f"the mean KL divergence is {number_text(result['kl_mean'])} nats per token")
    if is_number(result.get("top1_agreement")):
        parts.append(
            f"both models agree on the likeliest token in {share_text(result['top1_agreement'])} of cases"
        )
    if not parts:
        return ""
    tokens = evaluation.get("tokens")
    where = f"On {number_text(tokens)} held-out tokens, " if is_number(tokens) else "On held-out text, "
    return where + ", ".join(parts[:-1]) + (" and " if len(parts) > 1 else "") + parts[-1] + "."


def _budget_parts(result: Mapping[str, Any], places: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Segments of the stacked bar: weights by kind, KV cache, and what is left; shares add up to 1."""
    total, budget = result.get("total_bytes"), result.get("budget_bytes")
    weights = result.get("weight_bytes")
    if not is_number(total) or not is_number(weights):
        return []
    kinds: dict[str, float] = {"attention": 0, "feed-forward": 0, "embedding and head": 0}
    for place in places:
        role, size = str(place.get("role")), place.get("bytes")
        if is_number(size):
            if role in _ATTENTION:
                kinds["attention"] += size
            elif role in _FEED_FORWARD:
                kinds["feed-forward"] += size
            else:
                kinds["embedding and head"] += size
    known = sum(kinds.values())
    parts = [(name, size, f"part-{i}") for i, (name, size) in enumerate(kinds.items())]
    parts.append(("norms and biases" if places else "weights", max(0, weights - known), "part-3"))
    parts.append(("KV cache", result.get("kv_bytes") or 0, "part-4"))
    if is_number(budget):
        parts.append(("headroom", max(0, budget - total), "part-5"))
    whole = sum(size for _, size, _ in parts)
    segments, start = [], 0.0
    for name, size, style in parts:
        if size > 0:
            share = size / whole
            segments.append({"name": name, "bytes": size, "style": style, "start": start, "share": share})
            start += share
    return segments


def _stage(stage: Mapping[str, Any]) -> dict[str, str]:
    """One row of the table of stages, predicted beside measured."""
    return {
        "name": str(stage.get("name", "")),
        "predicted": size_text(stage.get("predicted_bytes")),
        "measured": size_text(stage.get("measured_bytes")),
        "change": change_text(stage.get("predicted_bytes"), stage.get("measured_bytes")),
        "predicted_time": duration_text(stage.get("predicted_seconds")),
        "time": duration_text(stage.get("seconds")),
    }


def _facts(
    report: Mapping[str, Any],
    plan: Mapping[str, Any],
    calibration: Mapping[str, Any],
    evaluation: Mapping[str, Any],
) -> list[tuple[str, list[tuple[str, str]]]]:
    """Groups of name and value at the end of the page; groups without any value are left out."""
    source, budget = mapping(plan.get("source")), mapping(plan.get("budget"))
    method = plan.get("method")
    settings = {"name": method} if isinstance(method, str) else mapping(method)
    probe = mapping(report.get("probe")) or mapping(plan.get("machine"))
    halves = report.get("calibration_halves_kl")
    groups = [
        (
            "Source",
            [
                ("model", source.get("model")),
                ("architecture", source.get("architecture")),
                ("parameters", number_text(source.get("parameters"))),
                ("licence", source.get("licence")),
                ("fingerprint", abbreviated(source.get("fingerprint"))),
                ("content hash", abbreviated(source.get("content_hash"))),
            ],
        ),
        (
            "Budget and method",
            [
                ("budget", budget.get("text")),
                ("allocator", plan.get("allocator")),
                ("context", number_text(budget.get("context"))),
                ("concurrency", number_text(budget.get("concurrency"))),
                ("method", settings.get("name")),
                *((str(key), setting_text(value)) for key, value in settings.items() if key != "name"),
                ("target", plan.get("target")),
                ("seed", plan.get("seed")),
            ],
        ),
        ("Calibration", [*_text_facts(calibration), ("KL between two halves", _with_unit(halves))]),
        ("Held-out text", _text_facts(evaluation)),
        ("Machine", machine_facts(probe)),
        ("Versions", list(mapping(plan.get("versions")).items())),
    ]
    return known_groups(groups)


def _text_facts(text: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Where a text came from and how much of it was used."""
    windows = (
        f"{number_text(text['sequences'])} × {number_text(text['length'])} tokens"
        if is_number(text.get("sequences")) and is_number(text.get("length"))
        else None
    )
    return [
        ("source", text.get("source")),
        ("tokens", number_text(text.get("tokens"))),
        ("windows", windows),
        ("documents", number_text(text.get("documents"))),
        ("licence", text.get("licence")),
        ("fingerprint", abbreviated(text.get("fingerprint"))),
    ]


def _legend(places: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Swatches of the codings in use: colour by bits, group sizes of one width named together."""
    groups: dict[int, list[str]] = {}
    for bits, name in plots.codings_in_use(places):
        kept = groups.setdefault(bits, [])
        prefix = f"{kept[0].split()[0]} " if kept else ""
        kept.append(name.removeprefix(prefix))
    return [
        {"style": f"bits-{plots.shown_bits(bits)}", "text": " · ".join(names)}
        for bits, names in groups.items()
    ]


def _with_unit(kl: Any) -> str:
    return f"{number_text(kl)} nats/token" if is_number(kl) else ABSENT


def _in_block(place: Mapping[str, Any]) -> bool:
    return isinstance(place.get("block"), int)
