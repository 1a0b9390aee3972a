"""`tailorbird compress`: compress by a recipe or a plan instead of a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tailorbird.cli import options
from tailorbird.cli.output import plain, print_json, print_result, print_warnings, showing_refused, working

EXAMPLE = "Example: tailorbird compress demo --plan out/demo/plan.yaml -o out/again"


def compress(
    model: options.Model,
    output: options.Output,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            metavar="NAME|FILE",
            help="One choice for all linears, such as gptq:bits=4,group=64, or a YAML file.",
        ),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option("--plan", metavar="FILE", help="A plan.yaml, as `fit` wrote it or edited by hand."),
    ] = None,
    calibration: options.Calibration = None,
    evaluation: options.Evaluation = None,
    sequences: options.Sequences = None,
    length: options.Length = None,
    max_kl: options.MaxKl = None,
    max_perplexity_increase: options.MaxPerplexityIncrease = None,
    activations: options.Activations = "auto",
    allow_slower: options.AllowSlower = False,
    resume: options.Resume = False,
    json: options.Json = False,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
) -> None:
    """Compress a model by a recipe or an edited plan."""
    from tailorbird import api

    with showing_refused(json), working() as progress:
        result = api.compress(
            model,
            output,
            recipe=recipe,
            plan=plan,
            calibration=calibration,
            evaluation=evaluation,
            sequences=sequences,
            length=length,
            max_kl=max_kl,
            max_perplexity_increase=max_perplexity_increase,
            activations=activations,
            allow_slower=allow_slower,
            resume=resume,
            seed=seed,
            device=device,
            progress=progress,
        )
    fields = plain(result)
    if json:
        print_json(fields)
        print_warnings(fields)
    else:
        print_result(fields)
