"""`tailorbird fit`: plan, compress, evaluate and report, to a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tailorbird.cli import options
from tailorbird.cli.output import (
    plain,
    print_dry_run,
    print_json,
    print_result,
    print_warnings,
    showing_refused,
    working,
)

EXAMPLE = "Example: tailorbird fit demo --memory 30% -o out/demo"


def fit(
    model: options.Model,
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory",
            metavar="SIZE",
            help="The budget: 1.5GiB, 800MB, 60% (of the model at 16 bits) or 3.25bpw (bits per weight). "
            "Holds the weights, and with --context the KV cache. Only one of speed or quality goes without.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            help="Directory to write; must not exist yet. Only --dry-run goes without.",
        ),
    ] = None,
    calibration: options.Calibration = None,
    evaluation: options.Evaluation = None,
    context: Annotated[
        int | None,
        typer.Option(
            "--context",
            metavar="N",
            min=1,
            help="Tokens of context whose KV cache must fit into the budget, and at which speed is planned.",
        ),
    ] = None,
    concurrency: Annotated[
        int | None,
        typer.Option(
            "--concurrency", metavar="N", min=1, help="How many such contexts at once; 1 if not given."
        ),
    ] = None,
    min_speed: Annotated[
        str | None,
        typer.Option(
            "--min-speed",
            metavar="SPEED",
            help="Tokens per second while decoding, of all concurrent sequences together: 30tok/s. "
            "Predicted for this machine.",
        ),
    ] = None,
    max_latency: Annotated[
        str | None,
        typer.Option(
            "--max-latency",
            metavar="TIME",
            help="From one token of a sequence to the next: 40ms. Predicted for this machine.",
        ),
    ] = None,
    sequences: options.Sequences = None,
    length: options.Length = None,
    effort: Annotated[
        str | None,
        typer.Option(
            "--effort",
            metavar="fast|balanced|best",
            help="How much work goes into rounding: block by block; learned in each block; and learned as a "
            "whole. fast if neither this nor --method is given.",
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            metavar="NAME",
            help="Instead of an effort, how weights are rounded; `tailorbird methods` lists all.",
        ),
    ] = None,
    allocator: Annotated[
        str,
        typer.Option(
            "--allocator",
            metavar="NAME",
            help="Who chooses the codings within the budget: exact, evopress, ip-calibrated or ranking; "
            "`tailorbird methods --family plan` says what each goes by.",
        ),
    ] = "exact",
    keep: Annotated[
        list[str] | None,
        typer.Option(
            "--keep",
            metavar="PLACE",
            help="A place that stays at 16 bits: its name, a pattern such as '*.down_proj', embedding or "
            "head; may be repeated.",
        ),
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(
            "--max-kl",
            metavar="NATS",
            min=0.0,
            help="Refuse the result above this mean KL divergence from the source, nats/token. With no "
            "budget beside it, make the smallest model that keeps below.",
        ),
    ] = None,
    max_perplexity_increase: options.MaxPerplexityIncrease = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            metavar="FORMAT",
            help="Plan only what this export can hold exactly: gguf or compressed-tensors.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print predicted memory, disk and time of each stage, and stop.")
    ] = False,
    frontier: Annotated[
        bool, typer.Option("--frontier", help="Also predict and measure quality at six budgets.")
    ] = False,
    activations: options.Activations = "auto",
    allow_slower: options.AllowSlower = False,
    resume: options.Resume = False,
    json: options.Json = False,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
) -> None:
    """Fit a model to a budget: plan, compress, evaluate, report."""
    from tailorbird import api

    with showing_refused(json), working() as progress:
        result = api.fit(
            model,
            memory,
            output,
            calibration=calibration,
            evaluation=evaluation,
            context=context,
            concurrency=concurrency,
            min_speed=min_speed,
            max_latency=max_latency,
            sequences=sequences,
            length=length,
            effort=effort,
            method=method,
            allocator=allocator,
            keep=keep or (),
            max_kl=max_kl,
            max_perplexity_increase=max_perplexity_increase,
            target=target,
            dry_run=dry_run,
            frontier=frontier,
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
    elif dry_run:
        print_dry_run(fields)
    else:
        print_result(fields)
    if dry_run and not fields["fits"]:
        raise typer.Exit(2)
