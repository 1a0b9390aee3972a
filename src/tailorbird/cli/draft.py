"""`tailorbird draft`: train heads that guess a model's next tokens."""

from __future__ import annotations

from typing import Annotated

import typer

from tailorbird.cli import options
from tailorbird.cli.output import plain, print_facts, print_json, working
from tailorbird.report.table import duration_text, size_text

EXAMPLE = "Example: tailorbird draft demo -o out/heads"


def draft(
    model: options.Model,
    output: options.Output,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="FILE|DIR",
            help="Text to learn from, like that which will be written. Without it, the model writes some.",
        ),
    ] = None,
    heads: Annotated[
        int, typer.Option("--heads", metavar="N", min=1, max=6, help="Tokens that are guessed in a row.")
    ] = 3,
    epochs: Annotated[
        int, typer.Option("--epochs", metavar="N", min=1, help="How often the text is gone through.")
    ] = 2,
    sequences: Annotated[
        int, typer.Option("--sequences", metavar="N", min=2, help="Sequences of text to learn from.")
    ] = 128,
    length: options.Length = None,
    resume: options.Resume = False,
    json: options.Json = False,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
) -> None:
    """Train small heads that guess a model's next tokens, for `serve --draft`; the model stays as it is."""
    from tailorbird import api

    with working() as progress:
        result = api.draft(
            model,
            output,
            data=data,
            heads=heads,
            epochs=epochs,
            sequences=sequences,
            length=length,
            seed=seed,
            resume=resume,
            device=device,
            progress=progress,
        )
    fields = plain(result)
    if json:
        print_json(fields)
        return
    shares = ", ".join(f"{share:.0%}" for share in fields["acceptance"])
    print_facts(
        [
            ("heads", f"{fields['heads']}, {size_text(fields['bytes'])}"),
            ("text", f"{fields['tokens']:,} tokens, {fields['text']}"),
            ("guesses that were right", f"{shares} (held-out text, place by place)"),
            ("tokens per step", f"{fields['tokens_per_step']:.2f} expected"),
            ("time", duration_text(fields["seconds"])),
            ("output", str(fields["output"])),
        ]
    )
