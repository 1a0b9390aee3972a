"""`tailorbird adapters`: of a running server, let in by a gate and rolled back; put into a basis; merged."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from tailorbird.cli import deltas, options
from tailorbird.cli.output import plain, print_facts, print_json, print_table, working
from tailorbird.cli.serve import ADMIN_KEY_VARIABLE, KEY_VARIABLE
from tailorbird.errors import GateRefused
from tailorbird.report.table import duration_text, number_text, size_text
from tailorbird.serve.client import AdapterClient
from tailorbird.serve.held_out_file import read_file

EXAMPLE = "Example: tailorbird adapters publish support support-v2 --held-out held_out.jsonl"
SHARE_EXAMPLE = "Example: tailorbird adapters share demo loras/fr loras/de loras/es -o out/shared --rank 32"
MERGE_EXAMPLE = "Example: tailorbird adapters merge out/demo loras/fr -o out/fr --data held_out.jsonl"

Name = Annotated[str, typer.Argument(metavar="NAME", help="What clients call the adapter.")]
Url = Annotated[str, typer.Option("--url", metavar="URL", help="Where the server listens.")]
Key = Annotated[
    str | None,
    typer.Option(
        "--key",
        metavar="KEY",
        envvar=[ADMIN_KEY_VARIABLE, KEY_VARIABLE],
        help="One of the server's API keys; an admin key where it has any.",
        show_envvar=True,
    ),
]
URL = "http://127.0.0.1:8000"

app = typer.Typer(
    name="adapters",
    help="Publish, roll back and list those of a server; share, merge, combine, compress and extract them.",
    no_args_is_help=True,
    epilog=EXAMPLE,
)
app.command(epilog=deltas.COMBINE_EXAMPLE)(deltas.combine)
app.command(epilog=deltas.COMPRESS_EXAMPLE)(deltas.compress)
app.command(epilog=deltas.EXPAND_EXAMPLE)(deltas.expand)
app.command(epilog=deltas.EXTRACT_EXAMPLE)(deltas.extract)
app.command(epilog=deltas.BITDELTA_EXAMPLE)(deltas.bitdelta)
app.command(epilog=deltas.APPLY_EXAMPLE)(deltas.apply)


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


@app.command(epilog=MERGE_EXAMPLE)
def merge(
    model: options.Model,
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="A LoRA or GLoRA adapter of MODEL.")],
    output: options.Output,
    data: Annotated[
        str,
        typer.Option("--data", metavar="FILE|DIR", help="Held-out text: what survives is measured on it."),
    ],
    calibration: Annotated[
        str | None,
        typer.Option(
            "--calibration",
            metavar="FILE|DIR",
            help="Text by which packed weights are rounded. Without it, nine tenths of --data.",
        ),
    ] = None,
    keep_share: Annotated[
        float,
        typer.Option(
            "--keep-share",
            metavar="SHARE",
            help="Refuse the result where less of the adapter's gain survives.",
        ),
    ] = 0.95,
    residual_rank: Annotated[
        int,
        typer.Option(
            "--residual-rank",
            metavar="N",
            min=0,
            help="Most rank of a small adapter beside the result, written where too little survives else.",
        ),
    ] = 8,
    sequences: options.Sequences = None,
    length: options.Length = None,
    resume: options.Resume = False,
    json: options.Json = False,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
) -> None:
    """Take an adapter into the weights of a checkpoint, packed ones too, and prove that it survives there."""
    from tailorbird import api

    try:
        with working() as progress:
            result = api.merge_adapter(
                model,
                adapter,
                output,
                data=data,
                calibration=calibration,
                keep_share=keep_share,
                residual_rank=residual_rank,
                sequences=sequences,
                length=length,
                seed=seed,
                resume=resume,
                device=device,
                progress=progress,
            )
    except GateRefused as refused:
        kept = getattr(refused, "result", None)
        if kept is not None and not json:
            _print_merged(plain(kept))
        raise
    fields = plain(result)
    if json:
        print_json(fields)
        return
    _print_merged(fields)


def _print_merged(fields: Mapping[str, Any]) -> None:
    """What survived, and where the result is."""
    kept, rank = fields["gain_kept"], fields["residual_rank"]
    residual = f"rank {rank}, {size_text(fields['residual_adapter_bytes'])}" if rank else "none needed"
    print_facts(
        [
            ("loss of the base", f"{number_text(fields['loss_base'], 5)} nats/token"),
            ("with the adapter", f"{number_text(fields['loss_adapter'], 5)} nats/token"),
            ("merged", f"{number_text(fields['loss_merged'], 5)} nats/token"),
            ("gain kept", "–" if kept is None else f"{kept:.1%}"),
            ("divergence from the adapter", f"{number_text(fields['kl_mean'], 3)} nats/token"),
            ("residual adapter", residual),
            ("time", duration_text(fields["seconds"])),
            ("peak memory", size_text(fields["peak_rss_bytes"])),
            ("output", str(fields["output"])),
        ]
    )
