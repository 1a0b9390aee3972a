"""`tailorbird adapters`: of a running server, let in by a gate and rolled back; or many put into a basis."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tailorbird.cli import options
from tailorbird.cli.output import plain, print_facts, print_json, print_table, working
from tailorbird.cli.serve import KEY_VARIABLE
from tailorbird.report.table import number_text, size_text
from tailorbird.serve.client import AdapterClient
from tailorbird.serve.held_out_file import read_file

EXAMPLE = "Example: tailorbird adapters publish support support-v2 --held-out held_out.jsonl"
SHARE_EXAMPLE = "Example: tailorbird adapters share demo loras/fr loras/de loras/es -o out/shared --rank 32"

Name = Annotated[str, typer.Argument(metavar="NAME", help="What clients call the adapter.")]
Url = Annotated[str, typer.Option("--url", metavar="URL", help="Where the server listens.")]
Key = Annotated[
    str | None,
    typer.Option(
        "--key", metavar="KEY", envvar=KEY_VARIABLE, help="One of the server's API keys.", show_envvar=True
    ),
]
URL = "http://127.0.0.1:8000"

app = typer.Typer(
    name="adapters",
    help="List, publish and roll back the adapters of a running server; put many into a shared basis.",
    no_args_is_help=True,
    epilog=EXAMPLE,
)


@app.command(epilog=EXAMPLE)
def publish(
    name: Name,
    directory: Annotated[
        str,
        typer.Argument(metavar="DIR", help="The new version, as the server's --adapter-directory has it."),
    ],
    held_out: Annotated[
        Path,
        typer.Option(
            "--held-out", metavar="FILE", help="Text that the adapter wasn't trained on: jsonl, txt."
        ),
    ],
    url: Url = URL,
    key: Key = None,
    json: options.Json = False,
    seed: options.IdleSeed = 0,
    device: options.Device = "cpu",
) -> None:
    """Serve a new version of an adapter if it is no worse on held-out text than the one served now."""
    fields = AdapterClient(url, key).publish(name, directory, read_file(held_out))
    if json:
        print_json(fields)
        return
    before = fields["loss_before"]
    print_facts(
        [
            ("served", f"{fields['name']}, version {fields['version']}"),
            ("loss", f"{number_text(fields['loss'], 5)} nats/token"),
            ("loss before", "–" if before is None else f"{number_text(before, 5)} nats/token"),
        ]
    )


@app.command()
def rollback(
    name: Name,
    url: Url = URL,
    key: Key = None,
    json: options.Json = False,
    seed: options.IdleSeed = 0,
    device: options.Device = "cpu",
) -> None:
    """Serve the version of an adapter before the one that is served now."""
    fields = AdapterClient(url, key).rollback(name)
    if json:
        print_json(fields)
        return
    print_facts([("served", f"{fields['name']}, version {fields['version']}")])


@app.command(name="list")
def list_names(
    url: Url = URL,
    key: Key = None,
    json: options.Json = False,
    seed: options.IdleSeed = 0,
    device: options.Device = "cpu",
) -> None:
    """Name the adapters that a server has."""
    names = AdapterClient(url, key).names()
    if json:
        print_json(names)
        return
    for name in names:
        print(name)


@app.command(epilog=SHARE_EXAMPLE)
def share(
    model: options.Model,
    directories: Annotated[
        list[Path],
        typer.Argument(metavar="DIR...", help="Adapters of MODEL; each is called as its directory is."),
    ],
    output: options.Output,
    rank: Annotated[
        int,
        typer.Option("--rank", metavar="N", min=1, help="Rank of the basis; a higher one loses less."),
    ] = 16,
    clusters: Annotated[
        int,
        typer.Option(
            "--clusters", metavar="N", min=1, help="How many bases; adapters go where they lose least."
        ),
    ] = 1,
    json: options.Json = False,
    seed: options.IdleSeed = 0,
    device: options.Device = "cpu",
) -> None:
    """Write many adapters anew in a basis that they share, so that each takes little memory when served."""
    from tailorbird import api

    with working() as progress:
        result = api.share_adapters(
            model,
            directories,
            output,
            rank=rank,
            clusters=clusters,
            device=device,
            progress=progress,
        )
    fields = plain(result)
    if json:
        print_json(fields)
        return
    rows = [(one["name"], str(one["cluster"]), f"{one['lost']:.2%}") for one in fields["adapters"]]
    print_table(("adapter", "basis", "lost"), rows)
    print_facts(
        [
            ("before", size_text(fields["bytes_before"])),
            ("after", size_text(fields["bytes_after"])),
            ("output", fields["output"]),
        ]
    )
