"""`tailorbird export`: write a compressed model in another tool's format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tailorbird.cli import options
from tailorbird.cli.output import plain, print_facts, print_json, print_remarks, working
from tailorbird.report.table import change_text, number_text, size_text

EXAMPLE = "Example: tailorbird export out/demo --to dense -o out/demo-dense"


def export(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A model that tailorbird made.")],
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="dense, compressed-tensors or gguf.")],
    output: options.Output,
    json: options.Json = False,
    seed: options.IdleSeed = 0,
    device: options.Device = "cpu",
) -> None:
    """Export to a format that other tools read, exactly or not at all."""
    from tailorbird import api

    with working() as progress:
        result = api.export(directory, to, output, progress=progress)
    fields = plain(result)
    if json:
        print_json(fields)
        return
    before, after = fields["bytes_before"], fields["bytes_after"]
    print_facts(
        [
            ("format", str(fields["format"])),
            ("output", str(fields["output"])),
            ("KL to the packed model", f"{number_text(fields['kl_mean'])} nats/token"),
            ("largest logit difference", number_text(fields["max_logit_difference"])),
            ("packed", size_text(before)),
            ("exported", f"{size_text(after)} ({change_text(before, after)})"),
        ]
    )
    print_remarks(fields["notes"])
