"""`tailorbird serve`: an HTTP server for a model and its adapters."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from tailorbird.cli import options
from tailorbird.cli.output import plain, print_facts, print_json, working
from tailorbird.errors import SettingsError
from tailorbird.report.table import duration_text

EXAMPLE = "Example: tailorbird serve out/demo --port 8000 --api-key secret"

#: Where keys are looked for beside --api-key and --admin-key: the list of processes needn't show them.
KEY_VARIABLE, ADMIN_KEY_VARIABLE = "TAILORBIRD_API_KEY", "TAILORBIRD_ADMIN_KEY"


def serve(
    model: options.Model,
    host: Annotated[
        str, typer.Option("--host", metavar="NAME", help="Name or address to listen on.")
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option("--port", metavar="N", min=0, max=65535, help="Port; 0 lets the system choose one."),
    ] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            "--api-key",
            metavar="KEY",
            help=f"A key that lets clients in; may be repeated. Also taken from {KEY_VARIABLE}.",
        ),
    ] = None,
    admin_key: Annotated[
        list[str] | None,
        typer.Option(
            "--admin-key",
            metavar="KEY",
            help="A key that lets clients in and change adapters, as no other key may then; may be repeated. "
            f"Also taken from {ADMIN_KEY_VARIABLE}.",
        ),
    ] = None,
    adapter: options.Adapters = None,
    adapter_directory: Annotated[
        str | None,
        typer.Option(
            "--adapter-directory",
            metavar="DIR",
            help="Where clients may load adapters from; without it they may load none.",
        ),
    ] = None,
    adapter_bits: options.AdapterBits = None,
    memory: options.ServingMemory = None,
    swap_memory: options.SwapMemory = None,
    swap_disk: options.SwapDisk = None,
    max_sequences: options.MaxSequences = 64,
    context: options.ServingContext = None,
    draft: options.DraftFrom = None,
    threads: options.Threads = None,
    bits: options.Bits = None,
    queue: Annotated[
        int, typer.Option("--queue", metavar="N", min=0, help="Answers that may wait beside those that run.")
    ] = 256,
    timeout: options.Timeout = 600.0,
    requests_per_minute: Annotated[
        float | None,
        typer.Option("--requests-per-minute", metavar="N", min=1, help="Most requests of each key."),
    ] = None,
    hang_limit: Annotated[
        float,
        typer.Option(
            "--hang-limit",
            metavar="SECONDS",
            min=5,
            help="How long the engine may stand still before it is started again.",
        ),
    ] = 60.0,
    json: options.Json = False,
    seed: options.IdleSeed = 0,
    device: options.Device = "cpu",
) -> None:
    """Serve a model to many clients at once, by OpenAI's API and a page for browsers."""
    from tailorbird import api

    keys, admin_keys = list(api_key or []), list(admin_key or [])
    for variable, given in ((KEY_VARIABLE, keys), (ADMIN_KEY_VARIABLE, admin_keys)):
        if os.environ.get(variable):
            given.append(os.environ[variable])
    with working():
        result = api.serve(
            model,
            host=host,
            port=port,
            keys=keys,
            admin_keys=admin_keys,
            adapters=parse_adapters(adapter or []),
            adapter_directory=adapter_directory,
            adapter_bits=adapter_bits,
            memory=memory,
            swap_memory=swap_memory,
            swap_disk=swap_disk,
            max_sequences=max_sequences,
            context=context,
            draft=draft,
            threads=threads,
            bits=bits,
            queue=queue,
            timeout=timeout,
            requests_per_minute=requests_per_minute,
            hang_limit=hang_limit,
            device=device,
        )
    fields = plain(result)
    if json:
        print_json(fields)
        return
    print_facts(
        [
            ("served", fields["url"]),
            ("for", duration_text(fields["seconds"])),
            ("tokens written", str(fields["generated_tokens"])),
            ("engine restarts", str(fields["restarts"])),
        ]
    )


def parse_adapters(given: list[str]) -> dict[str, str]:
    """Names and directories, from ``NAME=DIR``.

    Raises
    ------
    SettingsError
        Another form, or a name twice.
    """
    found: dict[str, str] = {}
    for one in given:
        name, sign, directory = one.partition("=")
        if not (name and sign and directory):
            raise SettingsError(f"--adapter {one}", "NAME=DIR", "write it like --adapter support=out/support")
        if name in found:
            raise SettingsError(f"--adapter {name} twice", "each name once", "give one of them another name")
        found[name] = directory
    return found
