"""`OUT/report.html` of a tuning, from the JSON files that `tune` wrote beside its adapter.

What html.py says of its page holds here, too: everything escaped, nothing loaded, no script, parts that are
missing left out, and the same data give the same bytes.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from tailorbird.errors import CheckpointError
from tailorbird.formats.peft import CONFIG_FILE, WEIGHTS_FILE
from tailorbird.model.weights import Weights
from tailorbird.model.writing import write_text
from tailorbird.report import curves
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
    duration_text,
    is_number,
    number_text,
    setting_text,
    share_text,
    size_text,
)

ORIGIN, HISTORY = "tailorbird.json", "history.json"
CHECKPOINT_CONFIG = "config.json"
PAGE = "report.html"

#: Share of the examples from which on it's worth saying that so many were cut or left out.
_MANY = 0.05


def write_tuning_report(directory: Path) -> Path:
    """Write `directory`/report.html from the files of a tuned adapter or checkpoint.

    Parameters
    ----------
    directory : Path
        With adapter_config.json, or a checkpoint's config.json, tailorbird.json and history.json; the
        tensors may be gone.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    CheckpointError
        One of the three files is missing or isn't one JSON object, or the tensors' file is damaged.
    """
    is_checkpoint = (directory / CHECKPOINT_CONFIG).exists()
    config = {} if is_checkpoint else _read(directory / CONFIG_FILE)
    origin, history = _read(directory / ORIGIN), _read(directory / HISTORY)
    tensors = directory / WEIGHTS_FILE
    page = directory / PAGE
    size = Weights.open_file(tensors).total_bytes if tensors.exists() else None
    write_text(page, render_tuning(config, origin, history, size))
    return page


def render_tuning(
    config: Mapping[str, Any],
    origin: Mapping[str, Any],
    history: Mapping[str, Any],
    adapter_bytes: int | None = None,
) -> str:
    """The page as a string.

    Parameters
    ----------
    config, origin, history : mapping
        Contents of adapter_config.json, tailorbird.json and history.json; every part may be missing.
    adapter_bytes : int, optional
        Of the adapter's tensors.
    """
    return render_page("tuning.html.j2", _view(config, origin, history, adapter_bytes))


def _read(path: Path) -> dict[str, Any]:
    """One of the files."""
    remedy = "run `tailorbird tune` again, or restore the file"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} can't be read as JSON ({error})", "a file as `tune` writes it", remedy
        ) from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds {type(found).__name__}", "one JSON object", remedy)
    return found


def _view(
    config: Mapping[str, Any],
    origin: Mapping[str, Any],
    history: Mapping[str, Any],
    adapter_bytes: int | None,
) -> dict[str, Any]:
    """Everything the template prints, computed."""
    from markupsafe import Markup

    settings, data = mapping(origin.get("method")), mapping(origin.get("data"))
    steps = [one for one in objects(history.get("steps")) if is_number(one.get("step"))]
    looks = _points(objects(history.get("looks")), "loss")
    best = history.get("best") if is_number(history.get("best")) else None
    training, seconds = _points(steps, "loss"), _elapsed(steps)
    unit, divisor = _time_unit(seconds[-1] if seconds else 0)
    resident = [
        (time / divisor, step["resident_bytes"])
        for time, step in zip(seconds, steps, strict=True)
        if is_number(step.get("resident_bytes"))
    ]
    size_unit, size = _size_unit(max((y for _, y in resident), default=0))
    figures = {
        "rate": curves.curve("rate", _points(steps, "rate"), "step", "share of the highest", from_zero=True),
        "norm": curves.curve(
            "norm", _points(steps, "norm"), "step", "length", logarithmic=True, average=True
        ),
        "memory": curves.curve(
            "memory", [(x, y / size) for x, y in resident], unit, size_unit, from_zero=True
        ),
        "speed": curves.curve("speed", _speeds(steps), "step", "tokens/s", from_zero=True, average=True),
    }
    return {
        "model": base_name(str(origin.get("base_name") or "model")),
        "headline": unbroken(
            _headline(training, looks, best, len(steps), origin.get("loss_before")) + _score(origin)
        ),
        "adapter": unbroken(_adapter(config, origin, settings, adapter_bytes)),
        "warnings": _warnings(looks, best, data),
        "losses": Markup(curves.losses(training, looks, best)),
        "has_looks": bool(looks),
        "has_best": any(step == best for step, _ in looks),
        "figures": {name: Markup(figure) for name, figure in figures.items()},
        "speed": _median([y for _, y in _speeds(steps)]),
        "facts": _facts(config, origin, settings, data, steps, adapter_bytes),
    }


def _headline(
    training: curves.Points, looks: curves.Points, best: float | None, steps: int, loss_before: object
) -> str:
    """What tuning did to the loss, in one sentence."""
    if looks:
        before = float(loss_before) if is_number(loss_before) else looks[0][1]
        step, after = next((look for look in looks if look[0] == best), looks[-1])
        kept = ", the best state, which is kept" if step == best else ""
        return (
            f"The held-out loss went from {number_text(before, 4)} to {number_text(after, 4)} nats per "
            f"learned token ({change_text(before, after)}) after {number_text(step)} of "
            f"{_count(steps, 'step')}{kept}."
        )
    if training:
        first, last = (number_text(training[end][1], 4) for end in (0, -1))
        return (
            f"The training loss was {first} nats per learned token in the first step and {last} in the last "
            f"of {number_text(steps)}; no examples were held out."
        )
    return ""


def _score(origin: Mapping[str, Any]) -> str:
    """How many completions were right, in one sentence."""
    score = mapping(origin.get("score"))
    before, after, asked = (score.get(name) for name in ("before", "after", "of"))
    if not (is_number(before) and is_number(after) and is_number(asked)):
        return ""
    return (
        f" Of {number_text(asked)} held-out prompts it completes {number_text(after)} as expected, the model "
        f"as it was {number_text(before)}."
    )


def _adapter(
    config: Mapping[str, Any],
    origin: Mapping[str, Any],
    settings: Mapping[str, Any],
    adapter_bytes: int | None,
) -> str:
    """What was learned, in one sentence."""
    method = settings.get("method")
    if not method:
        return ""
    learned = origin.get("trainable_parameters")
    parts = [f"{number_text(learned)} learned parameters"] if is_number(learned) else []
    parts += [f"rank {config['r']}"] if is_number(config.get("r")) else []
    parts += [f"{size_text(adapter_bytes)} beside the base"] if is_number(adapter_bytes) else []
    return f"Method {method}" + (": " + ", ".join(parts) if parts else "") + "."


def _warnings(looks: curves.Points, best: float | None, data: Mapping[str, Any]) -> list[str]:
    """What a reader should know before the curves."""
    found = []
    if len(looks) > 1 and best == looks[0][0] == 0:
        found.append("No look was better than the model as it was, and so what is kept changes nothing.")
    bad = data.get("bad")
    if is_number(bad) and bad > 0:
        found.append(f"{_count(bad, 'entry', 'entries')} of the data had something wrong and was left out.")
        found += [str(one) for one in listing(data.get("first_bad"))]
    examples = data.get("examples")
    for key, what in (("truncated", "lost tokens at the end"), ("dropped", "had nothing left to learn")):
        count = data.get(key)
        if is_number(count) and is_number(examples) and count > _MANY * max(1, examples):
            found.append(f"{_count(count, 'example')} {what}.")
    return found


def _facts(
    config: Mapping[str, Any],
    origin: Mapping[str, Any],
    settings: Mapping[str, Any],
    data: Mapping[str, Any],
    steps: Sequence[Mapping[str, Any]],
    adapter_bytes: int | None,
) -> list[tuple[str, list[tuple[str, str]]]]:
    """Groups of name and value at the end of the page."""
    of_method = mapping(settings.get("method_settings"))
    own = ("method", "method_settings", "memory")
    elapsed = _elapsed(steps)
    return known_groups(
        [
            (
                "Data",
                [
                    ("source", data.get("source")),
                    ("shape", data.get("shape")),
                    ("examples", number_text(data.get("examples"))),
                    ("tokens", number_text(data.get("tokens"))),
                    ("learned tokens", _with_share(data.get("learned_tokens"), data.get("tokens"))),
                    ("longest", _with_unit(data.get("longest"), "tokens")),
                    ("truncated", number_text(data.get("truncated"))),
                    ("dropped", number_text(data.get("dropped"))),
                    ("bad", number_text(data.get("bad"))),
                    ("fingerprint", abbreviated(data.get("fingerprint"))),
                ],
            ),
            (
                "Base and adapter",
                [
                    ("base", origin.get("base_name")),
                    ("identity", abbreviated(origin.get("base"))),
                    ("licence", origin.get("base_licence")),
                    ("learned parameters", number_text(origin.get("trainable_parameters"))),
                    ("adapter", size_text(adapter_bytes)),
                    ("kind", config.get("peft_type")),
                    ("targets", setting_text(config.get("target_modules"))),
                ],
            ),
            (
                "Settings",
                [
                    ("method", settings.get("method")),
                    *((str(key), setting_text(value)) for key, value in of_method.items()),
                    *(
                        (str(key).replace("_", " "), setting_text(value))
                        for key, value in settings.items()
                        if key not in own
                    ),
                    ("memory", size_text(settings.get("memory"))),
                ],
            ),
            (
                "This run",
                [
                    ("steps", number_text(len(steps))),
                    ("tokens", number_text(sum(_numbers(steps, "tokens")))),
                    ("time of the steps", duration_text(elapsed[-1] if elapsed else None)),
                    ("most resident", size_text(max(_numbers(steps, "resident_bytes"), default=None))),
                    ("tailorbird", origin.get("tailorbird")),
                ],
            ),
        ]
    )


def _numbers(entries: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """The numbers of that name that there are."""
    return [entry[key] for entry in entries if is_number(entry.get(key))]


def _points(entries: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """Steps and what was found there."""
    return [
        (entry["step"], entry[key])
        for entry in entries
        if is_number(entry.get("step")) and is_number(entry.get(key))
    ]


def _speeds(steps: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """Tokens per second of each step."""
    return [
        (step["step"], step["tokens"] / step["seconds"])
        for step in steps
        if is_number(step.get("tokens")) and is_number(step.get("seconds")) and step["seconds"] > 0
    ]


def _elapsed(steps: Sequence[Mapping[str, Any]]) -> list[float]:
    """Seconds that had been spent on steps at the end of each."""
    return list(accumulate(step["seconds"] if is_number(step.get("seconds")) else 0 for step in steps))


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _time_unit(seconds: float) -> tuple[str, float]:
    """The unit in which so long a time is shown, and its seconds."""
    units = (("hours", 3600), ("minutes", 60))
    return next(((name, size) for name, size in units if seconds >= 2 * size), ("seconds", 1))


def _size_unit(size: float) -> tuple[str, float]:
    """The unit in which so many bytes are shown, and its bytes."""
    units = (("GiB", 1024**3), ("MiB", 1024**2))
    return next(((name, unit) for name, unit in units if size >= unit), ("bytes", 1))


def _count(count: float, one: str, many: str | None = None) -> str:
    """``1 step``, ``1,200 steps``."""
    return f"{number_text(count)} {one if count == 1 else many or one + 's'}"


def _with_share(part: Any, whole: Any) -> str:
    """A number, and how much of the whole it is."""
    share = share_text(part, whole)
    return number_text(part) if share == ABSENT else f"{number_text(part)} ({share})"


def _with_unit(value: Any, unit: str) -> str:
    return f"{number_text(value)} {unit}" if is_number(value) else ABSENT
