"""`tailorbird methods`: every technique by name, with its paper."""

from __future__ import annotations

from typing import Annotated

import typer

from tailorbird.cli import options
from tailorbird.cli.output import plain, print_json, print_table, working

EXAMPLE = "Example: tailorbird methods --family quantize"


def methods(
    family: Annotated[str | None, typer.Option("--family", metavar="NAME", help="Only this family.")] = None,
    json: options.Json = False,
    seed: options.IdleSeed = 0,
    device: options.Device = "cpu",
) -> None:
    """List the methods with family, kind, paper, what they need, fill and cost."""
    from tailorbird import api

    with working():
        fields = plain(api.methods(family=family))
    if json:
        print_json(fields)
        return
    columns = ("name", "family", "kind", "needs", "fills", "cost", "memory", "paper")
    print_table(
        columns, [[_text(row[column]) for column in columns] for row in fields], texts=range(len(columns))
    )


def _text(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
