"""`tailorbird speed`: how fast a model reads and writes on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from tailorbird.cli import options
from tailorbird.cli.output import plain, print_facts, print_json, working
from tailorbird.report.table import duration_text, number_text, paths_text, share_text, size_text

EXAMPLE = "Example: tailorbird speed out/demo --prompt-tokens 128 --new-tokens 64"


def speed(
    model: options.Model,
    prompt_tokens: Annotated[
        int, typer.Option("--prompt-tokens", metavar="N", min=1, help="Tokens to read.")
    ] = 64,
    new_tokens: Annotated[
        int, typer.Option("--new-tokens", metavar="N", min=1, help="Tokens to write.")
    ] = 32,
    batch: Annotated[int, typer.Option("--batch", metavar="N", min=1, help="Sequences at once.")] = 1,
    threads: Annotated[
        int | None, typer.Option("--threads", metavar="N", min=1, help="CPU threads; all cores if not given.")
    ] = None,
    json: options.Json = False,
    seed: options.IdleSeed = 0,
    device: options.Device = "cpu",
) -> None:
    """Measure tokens per second, loading time and peak memory."""
    from tailorbird import api

    with working() as progress:
        result = api.speed(
            model,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            batch=batch,
            threads=threads,
            device=device,
            progress=progress,
        )
    fields = plain(result)
    if json:
        print_json(fields)
        return
    print_facts(
        [
            ("prefill", f"{number_text(fields['prefill_tokens_per_s'])} tokens/s"),
            ("decode", f"{number_text(fields['decode_tokens_per_s'])} tokens/s"),
            ("loading", duration_text(fields["load_seconds"])),
            ("of the memory bandwidth", share_text(fields["bandwidth_fraction"])),
            ("peak memory", size_text(fields["peak_rss_bytes"])),
            ("paths", paths_text(fields["paths"])),
        ]
    )
