"""`tailorbird probe`: what this machine can do."""

from __future__ import annotations

from typing import Annotated

import typer

from tailorbird.cli.options import Device, IdleSeed, Json
from tailorbird.cli.output import plain, print_facts, print_json, working
from tailorbird.report.table import machine_facts

EXAMPLE = "Example: tailorbird probe --refresh"


def probe(
    refresh: Annotated[
        bool, typer.Option("--refresh", help="Measure again instead of reading the cache.")
    ] = False,
    json: Json = False,
    seed: IdleSeed = 0,
    device: Device = "cpu",
) -> None:
    """Measure the machine: memory, bandwidths, matrix products, devices."""
    from tailorbird import api

    with working() as progress:
        result = api.probe(refresh=refresh, progress=progress)
    if json:
        print_json(result)
    else:
        print_facts(machine_facts(plain(result)))
