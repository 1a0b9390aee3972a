"""`tailorbird compare`: methods against each other, within the same budgets and on the same text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tailorbird.cli import options
from tailorbird.cli.output import plain, print_comparison, print_json, working

EXAMPLE = (
    "Example: tailorbird compare demo --budgets 2.25,3.25bpw --methods rtn,gptq,awq+gptq -o out/compared"
)


def compare(
    model: options.Model,
    budgets: Annotated[
        str,
        typer.Option(
            "--budgets",
            metavar="SIZE,...",
            help="What the weights may take, each as `fit --memory` has it: 1.5GiB,60%. Numbers without a "
            "unit have the last one's: 2.25,3.25,4.25bpw.",
        ),
    ],
    methods: Annotated[
        str,
        typer.Option(
            "--methods",
            metavar="NAME,...",
            help="What `fit --method` takes: rtn,gptq,awq+gptq,gptq+signround.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Directory of the comparison; MODEL-compared, here, if not given. One that is there is gone "
            "on with: known cells stay.",
        ),
    ] = None,
    calibration: options.Calibration = None,
    evaluation: options.Evaluation = None,
    sequences: options.Sequences = None,
    length: options.Length = None,
    json: options.Json = False,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
) -> None:
    """Compare methods within budgets: size, quality, time and memory of each."""
    from tailorbird import api
    from tailorbird.plan.budget import with_last_unit

    directory = output or Path(f"{Path(model).absolute().name}-compared")
    with working() as progress:
        cells = api.compare(
            model,
            with_last_unit(_listed(budgets)),
            _listed(methods),
            directory,
            calibration=calibration,
            evaluation=evaluation,
            sequences=sequences,
            length=length,
            seed=seed,
            device=device,
            progress=progress,
        )
    fields = plain(cells)
    if json:
        print_json(fields)
    else:
        print_comparison(fields, directory)
    if any(cell["total_bytes"] is None for cell in fields):
        raise typer.Exit(1)


def _listed(text: str) -> list[str]:
    """What commas separate."""
    return [part.strip() for part in text.split(",") if part.strip()]
