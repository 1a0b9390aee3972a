"""Where results and messages go: results to standard output, everything else to standard error."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tailorbird.cli.progress import TerminalProgress
from tailorbird.errors import GateRefused
from tailorbird.report.comparison import COLUMNS, FIGURE, PAGE_NAME, TEXTS, comparison_rows
from tailorbird.report.table import (
    Row,
    duration_text,
    is_loud,
    number_text,
    result_rows,
    size_text,
    stage_rows,
)

#: columns of a table that goes to a file or a pipe, where nothing needs to be folded
_FILE_WIDTH = 200


def out() -> Console:
    """Standard output as it is now."""
    return Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else _FILE_WIDTH)


def err() -> Console:
    """Standard error as it is now."""
    return Console(file=sys.stderr, highlight=False)


@contextlib.contextmanager
def working() -> Iterator[TerminalProgress]:
    """Progress on standard error; whatever the work prints goes there too, so that results stand alone."""
    with contextlib.redirect_stdout(sys.stderr), TerminalProgress(err()) as progress:
        yield progress


@contextlib.contextmanager
def showing_refused(json: bool) -> Iterator[None]:
    """Print the table of a result that the gate refuses, unless `json` keeps standard output empty."""
    try:
        yield
    except GateRefused as refused:
        result = getattr(refused, "result", None)
        if result is not None and not json:
            print_result(plain(result))
        raise


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: dataclasses as objects, paths as text, NaN and infinities as null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, set | frozenset):
        return sorted(plain(inner) for inner in value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def print_json(value: Any) -> None:
    """One JSON value on standard output."""
    sys.stdout.write(json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    sys.stdout.flush()


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], texts: Container[int] = (0,)) -> None:
    """A table on standard output; `texts` are the columns that hold texts, the others hold numbers."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i in texts else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    out().print(table)


def print_facts(facts: Sequence[tuple[str, str]]) -> None:
    """Names and values, one pair per line."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), show_header=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(Text(name), Text(value))
    out().print(table)


def print_result(result: Mapping[str, Any]) -> None:
    """The table that closes `fit` and `compress`, the path of the report, and what should be known."""
    rows: list[Row] = result_rows(result)
    print_table(
        ("", "source", "predicted", "measured", ""),
        [(row.name, row.source, row.predicted, row.result, row.remark) for row in rows],
        texts=(0, 4),
    )
    checks = result.get("checks") or []
    if checks:
        passed = sum(bool(check.get("passed")) for check in checks)
        out().print(Text(f"\n{passed} of {len(checks)} checks of the quality gate passed"))
    methods = [str(method.get("name")) for method in result.get("methods") or []]
    if methods:
        out().print(Text(f"method  {'+'.join(methods)}"))
    out().print(Text(f"model   {result.get('output')}"))
    if result.get("report"):
        out().print(Text(f"report  {result['report']}"))
    print_warnings(result)


def print_comparison(cells: Sequence[Mapping[str, Any]], directory: Path) -> None:
    """The table of `compare`, and where its page and figure lie."""
    print_table(COLUMNS, [row.texts for row in comparison_rows(cells)], texts=TEXTS)
    out().print()
    print_facts([("page", str(directory / PAGE_NAME)), ("figure", str(directory / FIGURE))])


def print_warnings(result: Mapping[str, Any]) -> None:
    """Warnings on standard error, the loud ones last."""
    for warning in sorted(result.get("warnings") or [], key=is_loud):
        style = "bold white on red" if is_loud(warning) else "yellow"
        err().print(Text(warning, style=style), soft_wrap=True)


def print_remarks(remarks: Sequence[str]) -> None:
    """Lines on standard error that the user should know."""
    for remark in remarks:
        err().print(Text(remark), soft_wrap=True)


def _speed_facts(dry: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a decoding step may take, and what the fastest plan does."""
    asked, fastest = dry.get("asked_step_seconds"), dry.get("fastest_step_seconds")
    if asked is None:
        return []
    found = "not known before kernels are timed, as the full run does first"
    if fastest is not None:
        speed = number_text(dry["fastest_tokens_per_s"])
        found = f"{number_text(1e3 * fastest)} ms, {speed} tok/s, predicted"
    return [("step asked for", f"{number_text(1e3 * asked)} ms"), ("fastest possible", found)]


def print_dry_run(dry: Mapping[str, Any]) -> None:
    """The stages of a dry run, the memory of the result, and whether it fits this machine."""
    print_table(
        ("stage", "peak memory", "device", "disk", "time"),
        [(r.name, r.memory, r.device, r.disk, r.seconds) for r in stage_rows(dry.get("stages") or [])],
    )
    out().print()
    kv = dry.get("kv_bytes")
    stages = dry.get("stages") or []
    print_facts(
        [
            ("method", str(dry.get("method"))),
            ("source at 16 bits", size_text(dry.get("dense_bytes"))),
            ("budget", size_text(dry.get("budget_bytes"))),
            *([("KV cache in it", size_text(kv))] if kv else []),
            ("predicted total", size_text(dry.get("predicted_total_bytes"))),
            ("smallest possible", size_text(dry.get("smallest_bytes"))),
            *_speed_facts(dry),
            ("time in all", duration_text(sum(stage.get("seconds") or 0 for stage in stages))),
            ("memory available", size_text(dry.get("machine_available_bytes"))),
            ("disk free", size_text(dry.get("disk_free_bytes"))),
        ]
    )
    if dry.get("fits"):
        out().print(Text("\nfits this machine", style="green"))
    else:
        out().print(Text("\ndoes NOT fit this machine", style="bold red"))
    if dry.get("advice"):
        out().print(Text(str(dry["advice"])))
