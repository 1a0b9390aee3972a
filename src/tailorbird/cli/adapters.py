"""`tailorbird adapters`: new versions of adapters on a running server, let in by a gate and rolled back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tailorbird.cli import options
from tailorbird.cli.output import print_facts, print_json
from tailorbird.cli.serve import KEY_VARIABLE
from tailorbird.report.table import number_text
from tailorbird.serve.client import AdapterClient
from tailorbird.serve.held_out_file import read_file

EXAMPLE = "Example: tailorbird adapters publish support support-v2 --held-out held_out.jsonl"

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
    help="List, publish and roll back the adapters of a running server.",
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
